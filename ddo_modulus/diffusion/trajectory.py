# SPDX-License-Identifier: Apache-2.0
r"""A prior of trajectories of any length, composed from a prior of short windows in time.

Axes: ``B`` batch, ``L`` frames of the trajectory, ``P`` frames of a window, ``S = L - P + 1``
windows, ``C`` variables, ``H W`` grid. Frames are stacked as channels, with the variables of the
first frame first: states are ``(B, L C, H, W)``.

Conditioned on all other frames, a frame depends mostly on its neighbours in time. Rozet and Louppe
("Score-based Data Assimilation", 2023, arXiv 2306.10574) therefore take the score of each frame
from the window around it. At high noise this fails: neighbours then hold little information, and
distant frames matter too. The Gaussian part of the prior, however, has a closed form for any number
of frames (:meth:`~ddo_modulus.fields.coupled.CoupledField.extended`). So the linear part is that of
the whole trajectory, and windows give only the deviation from their own linear part:

.. math:: D(x)_i = W_L(x)_i + \left[D_P(x_w) - W_P(x_w)\right]_{i - w}, \qquad w
    \text{ the window around frame } i .

This is exact for Gaussian processes that are determined by the covariance of a window. With
``joint=False`` it is the composition of Rozet and Louppe. The result is a prior, for every sampler
and every posterior.

*Balance.* The linear part is the best linear estimate, so the deviation :math:`e` of the exact
denoiser from it is uncorrelated with each coordinate :math:`a` of the noisy state,
:math:`E[e\,a] = 0`, and variances follow from the linear part alone. A trained network satisfies
that on noisy data. During sampling its errors lead away from the data; there it sees less structure
and predicts less, so the next step starts with less variance. A deviation
:math:`e = -\epsilon h` with :math:`h = \sigma \sqrt{s} / (s + \sigma^2)\,a` reduces the variance
by the factor :math:`e^{-\pi \epsilon}`. *Balancing* removes the component of :math:`e` along
:math:`h`, separately for each direction in time, each shell of the spectrum and each state. Free
trajectories then have the second moments of the Gaussian process. (Ning et al., "Elucidating the
Exposure Bias in Diffusion Models", 2023, arXiv 2308.15321, scale the whole output instead.)
Members of a posterior lose variance too, but only where the observations do not constrain them, so
that removing a part of that component is enough.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField

# Number of windows that are denoised together. On a GPU it bounds the memory of a long trajectory;
# on a CPU it is chosen for its caches.
_TOGETHER, _TOGETHER_ON_CPU = 256, 4

# Number of functions in the first shell of the spectrum; each further shell has twice as many. With
# fewer, the mean over a shell would be dominated by sampling noise.
_SHELL = 24


class TrajectoryPrior(Differentiable):
    """Prior of trajectories, from a prior of windows in time.

    Args:
        window: Denoiser of windows, with a coupled prior.
        frames: Number of frames ``P`` of a window, which has ``P`` channels for each variable.
        length: Number of frames ``L`` of the trajectory, at least ``frames``.
        joint: Whether the linear part is that of the whole trajectory (True) or of each window.
        balance: Share of the component along the state that is removed, 0 to 1; needs ``joint``.
            Use 1 for free trajectories, whose variances are then those of the linear part. For
            posteriors, tune it like an inflation, so that the spread of the ensemble matches its
            error.

    Attributes:
        noise: Noise field of the window, for all frames of the trajectory; use it for the
            scheduler.
        linear: Gaussian part.

    Raises:
        InputError: If the trajectory is shorter than a window, the operator has no prior of
            windows, or ``balance`` is out of range or used without ``joint``.
    """

    def __init__(
        self,
        window: DiffusionOperator,
        frames: int,
        length: int,
        *,
        joint: bool = True,
        balance: float = 0.0,
    ) -> None:
        prior = window.linear.prior
        if not isinstance(prior, CoupledField) or window.channels % frames:
            raise InputError(
                f"an operator of {window.channels} channels without a coupled prior has no "
                f"windows of {frames} frames; train one with data.frames={frames}"
            )
        if length < frames:
            raise InputError(f"a trajectory of {length} frames is shorter than a window: {frames}")
        if not 0 <= balance <= 1:
            raise InputError(f"balance={balance} must be a share, from 0 to 1")
        if balance and not joint:
            raise InputError(f"balance={balance} needs joint=True, for the variances to balance to")
        self.window, self.frames, self.length, self.joint = window, frames, length, joint
        self.balance = balance
        long = prior.extended(frames, length)
        self.noise: GaussianField = long.reference
        self.linear = GaussianDenoiser(0.0, long, self.noise)
        self._shells: dict[tuple, Int[Tensor, " K"]] = {}

    def __call__(
        self,
        x: Float[Tensor, "B LC H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B LC H W"]:
        """Expected clean trajectory.

        Args:
            x: Noisy trajectories.
            sigma: Noise levels.
            condition: ``(B, S, ...)``, one for each window.
        """
        shape = (x.shape[-2], x.shape[-1])
        short = self.window.linear.at(shape)
        windows = self._windows(x)
        levels = sigma.repeat_interleave(len(self.members))
        if condition is not None:
            condition = condition.flatten(0, 1)
        pieces = []
        together = _TOGETHER_ON_CPU if x.device.type == "cpu" else _TOGETHER
        for part in torch.arange(len(windows), device=x.device).split(together):
            own = None if condition is None else condition[part]
            pieces.append(self._denoise(windows[part], levels[part], own, short))
        found = self._gather(torch.cat(pieces), len(x))
        if not self.joint:
            return found
        linear = self.linear.at(shape)
        a = linear.modes(x)
        if self.balance:
            e = self._balanced(
                linear.rotate(linear.noise.whiten(found).flatten(1)), a, sigma, linear
            )
            return linear.fields(a * linear.wiener_weight(sigma) + e)
        return linear.fields(a * linear.wiener_weight(sigma)) + found

    def _balanced(
        self,
        e: Float[Tensor, "B N"],
        a: Float[Tensor, "B N"],
        sigma: Float[Tensor, " B"],
        linear: GaussianDenoiser,
    ) -> Float[Tensor, "B N"]:
        """Deviation ``e`` minus ``balance`` times its component along ``h`` in each shell."""
        shell = self._shell(linear.noise.basis, a.device)
        size = (self.noise.channels, len(shell))
        h = linear.posterior_variance(sigma).sqrt() * linear.whitening(sigma) * a
        along = h.unflatten(1, size)
        own = e.unflatten(1, size)
        total = own.new_zeros(len(own), size[0], int(shell.max()) + 1)
        both = total.index_add(2, shell, own * along)
        share = self.balance * both / total.index_add(2, shell, along.square()).clamp_min(1e-30)
        return (own - share[..., shell] * along).flatten(1)

    def _shell(self, basis: Basis, device: torch.device) -> Int[Tensor, " K"]:
        """Shell of each function; those beyond the network's band are a shell of their own."""
        key = (basis.shape, str(device))
        if key not in self._shells:
            _, rank = torch.unique(basis.eigenvalues, return_inverse=True)
            below = torch.bincount(rank).cumsum(0).roll(1)
            below[0] = 0  # number of functions with a smaller eigenvalue
            shell = torch.log2(below[rank] / _SHELL + 1).long()
            _, there = self.window.basis.shared(basis)
            beyond = torch.ones_like(shell, dtype=torch.bool)
            beyond[there] = False
            shell[beyond] = shell.max() + 1
            self._shells[key] = shell.to(device)
        return self._shells[key]

    def _denoise(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None, linear: GaussianDenoiser
    ) -> Tensor:
        """Denoised windows; their deviation from the linear part of the window if ``joint``."""

        def run(x: Tensor) -> Tensor:
            clean = self.window(x, sigma, condition)
            return clean - linear(x, sigma) if self.joint else clean

        if torch.is_grad_enabled() and x.requires_grad:  # keep the activations of one part only
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return run(x)

    def _windows(self, x: Float[Tensor, "B LC H W"]) -> Float[Tensor, "BS PC H W"]:
        """Windows of each trajectory, consecutive in the batch."""
        frames = x.unflatten(1, (self.length, -1))
        return frames[:, self._members(x.device)].flatten(2, 3).flatten(0, 1)

    @property
    def members(self) -> Int[Tensor, "S P"]:
        """Indices of the frames of each window."""
        return self._members(torch.device("cpu"))

    def _members(self, device: torch.device) -> Int[Tensor, "S P"]:
        start = torch.arange(self.length - self.frames + 1, device=device)
        return start[:, None] + torch.arange(self.frames, device=device)

    def _gather(self, windows: Float[Tensor, "BS PC H W"], batch: int) -> Tensor:
        """Each frame from the window whose middle is nearest."""
        parts = windows.unflatten(0, (batch, -1)).unflatten(2, (self.frames, -1))
        frame = torch.arange(self.length, device=windows.device)
        window = (frame - self.frames // 2).clamp(0, self.length - self.frames)
        return parts[:, window, frame - window].flatten(1, 2)
