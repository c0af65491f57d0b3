# SPDX-License-Identifier: Apache-2.0
r"""A prior of trajectories of any length, composed of a prior of short windows.

Axes: ``B`` batch, ``L`` frames of the trajectory, ``P`` frames of a window, ``S = L - P + 1``
windows, ``C`` variables, ``H W`` grid. Frames are channels, the first frame's variables first:
states are ``(B, L C, H, W)``.

A frame given all others depends mostly on its neighbours in time. Rozet and Louppe ("Score-based
Data Assimilation", 2023, arXiv 2306.10574) take the score of each frame from the window around it.
That breaks down at high noise, where a frame says little and far ones count. In the Gaussian part
of the prior, however, any number of frames has a closed form
(:meth:`~ddo_modulus.fields.coupled.CoupledField.extended`). So the linear part is that of the whole
trajectory, and what is taken from windows is their deviation from their own linear part:

.. math:: D(x)_i = W_L(x)_i + \left[D_P(x_w) - W_P(x_w)\right]_{i - w}, \qquad w
    \text{ the window around frame } i .

Exact for Gaussian processes that a window determines; with ``joint=False`` it is the composition of
Rozet and Louppe. The result is a denoiser: every sampler and every posterior takes it.

A network's deviation :math:`e` from the linear part has no say in variances: the linear part is
the best linear estimate, so :math:`E[e\,a] = 0` in each of its coordinates ``a``. On states of the
data a trained network keeps to that. On a sample that its errors have led away from them it does
not: it sees less structure, estimates less, and the next step starts with less. A deviation
:math:`e = -\epsilon h` with :math:`h = \sigma \sqrt{s} / (s + \sigma^2)\,a` leaves the share
:math:`e^{-\pi \epsilon}` of the variance. *Balanced*, the deviation loses its part along
:math:`h`, in every direction in time and every shell of the spectrum, state by state, and free
trajectories have the second moments of the Gaussian process. (Ning et al., "Elucidating the
Exposure Bias in Diffusion Models", 2023, arXiv 2308.15321, scale the whole output instead.)
Members of a posterior fade as well, and spread too little; what the observations hold them to does
not, so that a part of the balance is enough for them.
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

# Windows that are denoised together: on a GPU a bound on the memory of a long trajectory, on a CPU
# what its caches hold.
_TOGETHER, _TOGETHER_ON_CPU = 256, 4

# Functions of the first shell of the spectrum; each further one has twice as many. Fewer would
# leave the mean over a shell to chance.
_SHELL = 24


class TrajectoryPrior(Differentiable):
    """Prior of trajectories, from one of windows.

    Args:
        window: Denoiser of windows, with a coupled prior.
        frames: Frames ``P`` of a window; its channels are ``P`` times the variables.
        length: Frames ``L`` of the trajectory, at least ``frames``.
        joint: Whether the linear part is that of the whole trajectory, or of each window.
        balance: Share of the balance, 0 to 1; needs ``joint``. With 1 windows leave the variances
            to the linear part, for free trajectories. For posteriors a part that gives the
            ensemble its spread, as one tunes an inflation.

    Attributes:
        noise: The window's noise, for all frames; build the scheduler with it.
        linear: Gaussian part, that posteriors precondition with.

    Raises:
        InputError: If the trajectory is shorter than a window, the operator's prior is not that of
            windows, the balance is no share, or what is to be balanced is not joint.
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
                f"an operator of {window.channels} channels without a coupled prior knows no "
                f"windows of {frames} frames; train one with data.frames={frames}"
            )
        if length < frames:
            raise InputError(f"a trajectory of {length} frames is shorter than a window: {frames}")
        if not 0 <= balance <= 1:
            raise InputError(f"balance={balance} must be a share, from 0 to 1")
        if balance and not joint:
            raise InputError(f"balance={balance} needs joint=True: variances are the linear part's")
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
            condition: ``(B, S, ...)``, that of each window.
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
            given = None if condition is None else condition[part]
            pieces.append(self._denoise(windows[part], levels[part], given, short))
        found = self._gather(torch.cat(pieces), len(x))
        if not self.joint:
            return found
        linear = self.linear.at(shape)
        a = linear.modes(x)
        if self.balance:
            e = self._balanced(
                linear.rotate(linear.noise.whiten(found).flatten(1)), a, sigma, linear
            )
            return linear.fields(a * linear.gain(sigma) + e)
        return linear.fields(a * linear.gain(sigma)) + found

    def _balanced(
        self,
        e: Float[Tensor, "B N"],
        a: Float[Tensor, "B N"],
        sigma: Float[Tensor, " B"],
        linear: GaussianDenoiser,
    ) -> Float[Tensor, "B N"]:
        """Deviation without (a share of) what it would do to the variance of its state."""
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
        """Shell of each function; those that no network has a hand in have one of their own."""
        key = (basis.shape, str(device))
        if key not in self._shells:
            _, rank = torch.unique(basis.eigenvalues, return_inverse=True)
            below = torch.bincount(rank).cumsum(0).roll(1)
            below[0] = 0  # functions of a smaller eigenvalue
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
        """Windows denoised; minus their linear part if that is taken from the trajectory."""

        def run(x: Tensor) -> Tensor:
            clean = self.window(x, sigma, condition)
            return clean - linear(x, sigma) if self.joint else clean

        if torch.is_grad_enabled() and x.requires_grad:  # only one part's activations at a time
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return run(x)

    def _windows(self, x: Float[Tensor, "B LC H W"]) -> Float[Tensor, "BS PC H W"]:
        """Windows of each trajectory, next to each other in the batch."""
        frames = x.unflatten(1, (self.length, -1))
        return frames[:, self._members(x.device)].flatten(2, 3).flatten(0, 1)

    @property
    def members(self) -> Int[Tensor, "S P"]:
        """Numbers of the frames of each window."""
        return self._members(torch.device("cpu"))

    def _members(self, device: torch.device) -> Int[Tensor, "S P"]:
        start = torch.arange(self.length - self.frames + 1, device=device)
        return start[:, None] + torch.arange(self.frames, device=device)

    def _gather(self, windows: Float[Tensor, "BS PC H W"], batch: int) -> Tensor:
        """Each frame from the window that it is nearest to the middle of."""
        parts = windows.unflatten(0, (batch, -1)).unflatten(2, (self.frames, -1))
        frame = torch.arange(self.length, device=windows.device)
        window = (frame - self.frames // 2).clamp(0, self.length - self.frames)
        return parts[:, window, frame - window].flatten(1, 2)
