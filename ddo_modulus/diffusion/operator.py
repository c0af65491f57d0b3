# SPDX-License-Identifier: Apache-2.0
r"""Denoisers: the posterior mean of a state given a noisy copy of it.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients, ``N = C K``.

With :math:`x_\sigma = x_0 + \sigma L z` a *denoiser* is
:math:`D(x, \sigma) = E[x_0 | x_\sigma = x]` (PhysicsNeMo's *x0 predictor*). It gives the score,
:math:`C \nabla \log p = (D - x) / \sigma^2`, and by Tweedie's second formula the covariance
:math:`Cov[x_0 | x_\sigma] = \sigma^2 J C` with :math:`J = \partial D / \partial x`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from physicsnemo.core.meta import ModelMetaData
from physicsnemo.core.module import Module
from torch import Tensor

from ddo_modulus.compat import lasting, recorded
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.domains import build_basis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser, Prior
from ddo_modulus.fields.gaussian_field import (
    EOFField,
    Flat,
    GaussianField,
    Matern,
    MeasuredSpectrum,
    Spectrum,
)
from ddo_modulus.fields.product import ProductField
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.fields.rotation import SubsetRotation
from ddo_modulus.nn.operator import NeuralOperator


class DiffusionOperator(Module):
    r"""Denoiser in function space: the exact linear one plus a neural operator's correction.

    In the coordinates of :class:`GaussianDenoiser`, with data variances :math:`s` and Wiener weight
    :math:`w = s / (s + \sigma^2)`,

    .. math:: D(x, \sigma) = m + L E \left(w\,a + c_{out}\,F\right), \qquad
        c_{out} = \sqrt{\sigma^2 w}, \quad c_{in} = 1 / \sqrt{s + \sigma^2} .

    This is EDM preconditioning mode by mode: the network sees :math:`c_{in} a` (unit variance) and
    predicts the error of the linear estimate in units of its standard deviation. With
    :math:`F = 0` guided sampling is optimal interpolation; training can only add to it.

    The network acts on the band of the training grid. On a finer grid it is fed, and corrects, the
    same band, and is evaluated on the training grid: its pointwise maps would otherwise alias
    differently, and the same function meet another operator. The scales beyond the band follow the
    linear part with an extrapolated spectrum. On a coarser grid it is evaluated there.

    Args:
        shape: Training grid ``(H, W)``.
        channels: Channels ``C`` of the state.
        domain: ``"torus"``, ``"box"`` or ``"sphere"``.
        lengths: Extent of the domain, in the units of the noise's length scale.
        noise: ``{"length_scale": ..., "smoothness": ...}`` of the Matérn noise, or None for white.
        condition_channels: Channels of the condition.
        eof_modes: Whitened coefficients that EOFs mix in the linear part (:class:`EOFField`).
        coupled: Whether the linear part knows covariances between channels
            (:class:`CoupledField`).
        regression: Whether the linear part knows the condition: its mean is then a linear map of
            the condition, mode by mode (:meth:`set_regression`), and all else is about the
            deviation from it.
        network: Options of :class:`~ddo_modulus.nn.operator.NeuralOperator`.
        network_sigma: Noise level above which the network's output fades out and the linear part
            stands alone, for small samples: at high noise only the largest scales are left, and a
            few independent states do not teach more of them than their covariance. None: never.
        cell_means: Whether states are means over the cells of their grid (:meth:`cell_means`);
            values at its points otherwise.
        tail: ``(c, a, b)`` of each channel's spectrum beyond the band
            (:class:`.Refinement`), where finer data have told it. None:
            fitted to the band.

    Forward:
        x: ``(B, C, H, W)`` noisy states, normalised.
        sigma: ``(B,)`` noise levels.
        condition: ``(B, D)`` or ``(B, D, H, W)`` if ``condition_channels`` is not zero.

    Outputs:
        ``(B, C, H, W)`` denoised states.

    Raises:
        InputError: On a missing condition, or one that was not trained for.
    """

    __model_checkpoint_version__ = "0.1.0"

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 1,
        domain: str = "torus",
        lengths: Sequence[float] = (1.0, 1.0),
        noise: Mapping[str, float] | None = None,
        condition_channels: int = 0,
        eof_modes: int = 0,
        network: Mapping[str, Any] | None = None,
        network_sigma: float | None = None,
        coupled: bool = False,
        regression: bool = False,
        cell_means: bool = False,
        tail: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(
            meta=ModelMetaData(
                cuda_graphs=True,
                amp=True,
                bf16=True,
                onnx=True,
                func_torch=True,
                auto_grad=True,
            )
        )
        if coupled and eof_modes:
            raise InputError("the linear part is either coupled or has EOFs")
        self.basis = build_basis(domain, shape, lengths)
        spectrum: Spectrum = Flat() if noise is None else Matern(**noise)
        self.noise = GaussianField(self.basis, spectrum, channels)
        self.channels, self.condition_channels = channels, condition_channels
        self.network_sigma = network_sigma
        rows = None if tail is None else tuple((float(c), float(a), float(b)) for c, a, b in tail)
        self.refinement = Refinement(cell_means, rows)
        if cell_means:
            self.basis.cell_mean_response()  # refuses a domain that has none
        self.network = NeuralOperator(
            3 * channels + condition_channels,
            channels,
            list(shape),
            domain,
            list(lengths),
            **(network or {}),
        )
        size = channels * self.basis.size
        # Prior covariance of the whitened coefficients: a diagonal, and the lower triangle of the
        # block that EOFs mix (a symmetric matrix bears half precision, eigenvectors do not).
        self.register_buffer("prior_variance", torch.ones(size))
        self.register_buffer("eof_index", torch.arange(eof_modes, dtype=torch.int32))
        self.register_buffer("eof_covariance", torch.eye(eof_modes)[_lower(eof_modes)])
        # Instead of the diagonal: the lower triangles of covariances between channels.
        triangles = torch.eye(channels)[_lower(channels)].expand(self.basis.size, -1)
        self.coupling: Tensor | None
        self.register_buffer("coupling", triangles.clone() if coupled else None)
        weights = torch.zeros(channels, condition_channels, self.basis.size)
        self.regression: Tensor | None
        self.register_buffer("regression", weights if regression else None)
        self._linear: GaussianDenoiser | None = None
        self._bands: dict[tuple[int, int], _Band] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())

    @property
    def linear(self) -> GaussianDenoiser:
        """The linear part: the whole operator where the network's output is zero."""
        if self._linear is None:
            with lasting():
                self._linear = self._stored_prior()
        return self._linear

    def set_prior(self, prior: Prior) -> None:
        """Take a Gaussian prior as the linear part.

        Args:
            prior: Covariance of the normalised states (of their deviation from the regression, if
                there is one); of the kind that the operator was built for, and an
                :class:`EOFField` must mix as many coefficients as ``eof_modes``.

        Raises:
            InputError: If it does not fit the noise field or the operator.
        """
        variance, rotation = prior.relative_to(self.noise)
        if isinstance(prior, CoupledField) != (self.coupling is not None):
            raise InputError("a coupled prior is for an operator that was built with coupled=True")
        if self.coupling is not None and isinstance(prior, CoupledField):
            self.coupling.copy_(prior.covariance[:, *_lower(self.channels)])
            self.prior_variance.copy_(prior.covariance.diagonal(dim1=1, dim2=2).mT.flatten())
            self._forget()
            return
        mixed = len(rotation.index) if isinstance(rotation, SubsetRotation) else 0
        if mixed != len(self.eof_index):
            raise InputError(
                f"the prior mixes {mixed} coefficients, eof_modes={len(self.eof_index)}"
            )
        self.prior_variance.copy_(variance)
        if isinstance(rotation, SubsetRotation):
            index, vectors = rotation.index, rotation.vectors
            block = (vectors * variance[index]) @ vectors.mT
            self.eof_index.copy_(index)
            self.eof_covariance.copy_(block[_lower(len(index))])
        self._forget()

    def set_regression(self, weights: Float[Tensor, "C D K"]) -> None:
        """Take the linear map from a condition to the mean of the states, mode by mode.

        Raises:
            InputError: If the operator was built without one, or for another size.
        """
        if self.regression is None or weights.shape != self.regression.shape:
            have = None if self.regression is None else tuple(self.regression.shape)
            raise InputError(f"the operator takes a regression {have}, got {tuple(weights.shape)}")
        self.regression.copy_(weights)

    def conditional_mean(
        self, condition: Tensor | None, like: Float[Tensor, "B C H W"]
    ) -> Tensor | float:
        """Linear estimate of the states from the condition alone, on the grid of ``like``.

        Zero for an operator without a regression.
        """
        if self.regression is None:
            return 0.0
        shape = (like.shape[-2], like.shape[-1])
        band = self._band(self.linear.at(shape).noise.basis)
        (given,) = self._condition(condition, like, band)
        weights = self.regression.to(like)
        if band.basis.size != self.basis.size:  # a coarser grid shows only some of the functions
            here, there = (i.to(weights.device) for i in self.basis.shared(band.basis))
            shown = weights.new_zeros(*weights.shape[:2], band.basis.size)
            weights = shown.index_copy(2, there, weights[..., here])
        c = torch.einsum("cdk,bdk->bck", weights, band.basis.analyze(given))
        return band.basis.synthesize(c, shape)

    def cell_means(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """States drawn on another grid, as means over that grid's cells.

        On every grid the operator's states hold its band as the training grid's cells show it, and
        the scales beyond as they are: the form that noise, network and observations work on. This
        makes them what data on that grid are. Nothing changes on the training grid, nor for an
        operator of values at points.

        Args:
            x: States of all channels, or of one frame of a window.

        Raises:
            InputError: If the channels are not those of the operator or of one frame.
        """
        shape = (x.shape[-2], x.shape[-1])
        if not self.refinement.cell_means or shape == self.basis.shape:
            return x
        variables = x.shape[1]
        if self.channels % variables:
            raise InputError(f"{variables} channels are no frame of an operator of {self.channels}")
        prior = self.linear.prior
        assert not isinstance(prior, ProductField)  # which is none that an operator stores
        spectrum = prior.spectrum
        assert isinstance(spectrum, MeasuredSpectrum)
        basis = self.linear.at(shape).noise.basis
        frames = spectrum.response(basis).unflatten(0, (-1, variables))
        factor = frames[len(frames) // 2].to(x)
        return basis.synthesize(factor * basis.analyze(x))

    def refined(self, refinement: Refinement) -> DiffusionOperator:
        """The same weights with other knowledge of what lies beyond the training grid.

        Raises:
            InputError: If the domain knows no means over cells, or the tail does not fit.
        """
        options = self._args["__args__"] | asdict(refinement)
        other = DiffusionOperator(**options).to(self.prior_variance.device)
        other.load_state_dict(self.state_dict())
        return other.train(self.training).requires_grad_(next(self.parameters()).requires_grad)

    def _forget(self) -> None:
        self._linear = None

    def _stored_prior(self) -> GaussianDenoiser:
        variance = self.prior_variance.detach().double().cpu()
        prior: Prior
        if self.coupling is not None:
            covariance = torch.zeros(self.basis.size, self.channels, self.channels).double()
            covariance[:, *_lower(self.channels)] = self.coupling.detach().double().cpu()
            covariance = covariance + covariance.tril(-1).mT
            prior = CoupledField(self.noise, covariance, self.refinement)
        elif len(self.eof_index):
            index = self.eof_index.long().cpu()
            block = torch.zeros(len(index), len(index), dtype=torch.float64)
            block[_lower(len(index))] = self.eof_covariance.detach().double().cpu()
            block = block + block.tril(-1).mT
            prior = EOFField.from_covariance(
                self.noise, block, index, variance, refinement=self.refinement
            )
        else:
            spectrum = variance.unflatten(0, (self.channels, -1)) * self.noise.variance
            measured = MeasuredSpectrum(self.basis, spectrum, refinement=self.refinement)
            prior = GaussianField(self.basis, measured)
        return GaussianDenoiser(0.0, prior, self.noise)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states given noisy ones."""
        shape = (x.shape[-2], x.shape[-1])
        linear = self.linear.at(shape)
        with torch.autocast(x.device.type, enabled=False):  # the linear part is exact, or nothing
            mean = self.conditional_mean(condition, x)
            a = linear.modes(x - mean)
        residual = self.residual(a, sigma, shape, condition)
        with torch.autocast(x.device.type, enabled=False):
            level = _few(sigma, linear)
            deviation = linear.posterior_variance(level).sqrt()
            return mean + linear.fields(a * linear.gain(level) + deviation * residual)

    def residual(
        self,
        a: Float[Tensor, "B N"],
        sigma: Float[Tensor, " B"],
        shape: tuple[int, int],
        condition: Tensor | None = None,
        linear: GaussianDenoiser | None = None,
    ) -> Float[Tensor, "B N"]:
        """The network's output: error of the linear estimate over its standard deviation.

        Args:
            a: Coordinates of the noisy states (:meth:`GaussianDenoiser.modes`), or of their
                deviation from :meth:`conditional_mean`.
            sigma: Noise levels.
            shape: Grid of the states.
            condition: As in :meth:`forward`.
            linear: Linear part to use instead of the operator's own.
        """
        linear = self.linear.at(shape) if linear is None else linear
        band = self._band(linear.noise.basis)
        given = self._condition(condition, a, band)
        fade = self._fade(sigma)
        # Spared where it would count for nothing; training and tracers want one path for all, and
        # to look at a level would have the host wait for a GPU.
        everywhere = self.training or recorded() or a.device.type != "cpu"
        if not (everywhere or fade is None or fade.any()):
            return torch.zeros_like(a)
        rounded = torch.is_autocast_enabled(a.device.type)  # the network rounds what it is given
        show = partial(self._show, linear=linear, band=band, rounded=rounded)
        with torch.autocast(a.device.type, enabled=False):
            level = _few(sigma, linear)
            inputs = [
                show(a * linear.whitening(level), scale=self.basis.size**-0.5),
                show(a) / (1 + level**2).sqrt().view(-1, 1, 1, 1),
                show(a * linear.gain(level)),
                *given,
            ]
        f = self.network(torch.cat(inputs, 1), sigma).to(a.dtype)
        if fade is not None:
            f = f * fade.view(-1, 1, 1, 1)
        with torch.autocast(a.device.type, enabled=False):
            z = band.widen(band.basis.analyze(f, rounded=rounded)) * self.basis.size**0.5
            return linear.rotate(z.flatten(1))

    def _band(self, other: Basis) -> _Band:
        if other.shape not in self._bands:
            with lasting():
                self._bands[other.shape] = _Band(self.basis, other)
        return self._bands[other.shape]

    def _fade(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, " B"] | None:
        """Share of the network's output at each noise level: zero where it is below 1e-4."""
        if self.network_sigma is None:
            return None
        ratio = sigma / self.network_sigma
        return torch.where(ratio > 10, 0.0, 1 / (1 + ratio**4))

    def _show(
        self,
        coordinates: Float[Tensor, "B N"],
        *,
        linear: GaussianDenoiser,
        band: _Band,
        rounded: bool,
        scale: float | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Coordinates as fields in the training band: white of a given scale, or the states."""
        z = linear.rotate(coordinates, back=True).unflatten(1, (self.channels, -1))
        z = z * (linear.noise.root(z) if scale is None else scale)
        return band.basis.synthesize(band.narrow(z), rounded=rounded)

    def _condition(self, condition: Tensor | None, like: Tensor, band: _Band) -> list[Tensor]:
        given = 0 if condition is None else condition.shape[1]
        if given != self.condition_channels:
            raise InputError(
                f"the operator takes a condition of {self.condition_channels} channels, got {given}"
            )
        if condition is None:
            return []
        if condition.ndim == 2:
            condition = condition[:, :, None, None]
        condition = condition.to(like)
        if condition.shape[-2:] != band.basis.shape and condition[0, 0].numel() > 1:
            condition = band.basis.synthesize(band.basis.analyze(condition))
        return [condition.expand(like.shape[0], -1, *band.basis.shape)]


def _few(sigma: Float[Tensor, " B"], linear: GaussianDenoiser) -> Tensor:
    """One level for all states where that is plain, so that factors are found once."""
    return sigma[:1] if sigma.stride(0) == 0 and linear.analyses == 1 else sigma


def _lower(size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the entries of a lower triangle."""
    row, column = torch.tril_indices(size, size)
    return row, column


class _Band:
    """The functions that the training basis shares with the basis of another grid.

    Attributes:
        basis: These functions, on the coarser one of the two grids.
    """

    def __init__(self, training: Basis, other: Basis) -> None:
        same = other.shape == training.shape
        self.basis = training if training.resolves(other.shape) else other
        self._size = other.size
        self._index: dict[torch.device, Tensor] = {}
        if not same and self.basis is training:
            self._index[torch.device("cpu")] = training.shared(other)[1]

    def narrow(self, z: Float[Tensor, "B C N"]) -> Float[Tensor, "B C K"]:
        """Coefficients of the other grid's basis to those of the shared one."""
        return z[..., self._index_on(z.device)] if self._index else z

    def widen(self, c: Float[Tensor, "B C K"]) -> Float[Tensor, "B C N"]:
        """The reverse; zero outside the band."""
        if not self._index:
            return c
        z = c.new_zeros(*c.shape[:2], self._size)
        return z.index_copy(2, self._index_on(c.device), c)

    def _index_on(self, device: torch.device) -> Tensor:
        """Places of the shared coefficients among the other grid's; copied to a device once."""
        if device not in self._index:
            with lasting():
                self._index[device] = self._index[torch.device("cpu")].to(device)
        return self._index[device]
