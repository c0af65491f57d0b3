# SPDX-License-Identifier: Apache-2.0
r"""The diffusion operator: a Gaussian denoiser and the neural operator that corrects it.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients, ``N = C K``.

It is a denoiser ``D(x, sigma)``: the mean of the clean state, given a noisy one (:mod:`.prior`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float
from physicsnemo.core.meta import ModelMetaData
from physicsnemo.core.module import Module
from torch import Tensor

from ddo_modulus.checks import POSITIVE, Real
from ddo_modulus.compat import Rehearsed, lasting, recorded
from ddo_modulus.diffusion.band import Band
from ddo_modulus.diffusion.stored_prior import StoredPrior, check_state
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.domains import build_basis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser, PriorCovariance
from ddo_modulus.fields.gaussian_field import (
    Flat,
    GaussianField,
    Matern,
    MeasuredSpectrum,
    Spectrum,
)
from ddo_modulus.fields.product import ProductField
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.nn.operator import NeuralOperator


class DiffusionOperator(Module, Rehearsed, Differentiable):
    r"""Denoiser in function space: a closed-form linear part plus a learned correction.

    In the coordinates of :class:`GaussianDenoiser`, with data variances :math:`s` and Wiener weight
    :math:`w = s / (s + \sigma^2)`,

    .. math:: D(x, \sigma) = m + L E \left(w\,a + c_{out}\,F\right), \qquad
        c_{out} = \sqrt{\sigma^2 w}, \quad c_{in} = 1 / \sqrt{s + \sigma^2} .

    This is EDM preconditioning mode by mode: the network sees :math:`c_{in} a` (unit variance) and
    predicts the error of the linear estimate in units of its standard deviation. With
    :math:`F = 0` guided sampling is optimal interpolation; training adds to that.

    The network always runs on the training grid or a coarser one. For states on a finer grid, it
    reads and corrects the part that the training grid resolves. If it ran on the finer grid, its
    pointwise maps would alias differently, and it would be another operator. Smaller scales are
    left to the linear part, with an extrapolated spectrum.

    An operator can be pickled, copied, compiled and exported at any time, even before its first
    call. Its cached constants are rebuilt from its arguments and buffers.

    Args:
        shape: Training grid ``(H, W)``.
        channels: Channels ``C`` of the state.
        domain: ``"torus"``, ``"box"`` or ``"sphere"``.
        lengths: Extent of the domain, in the units of the noise's length scale.
        noise: Arguments of :class:`.Matern`, the spectrum of the noise
            (``{"length_scale": ..., "smoothness": ...}``); None for white noise.
        condition_channels: Channels ``D`` of the condition.
        eof_modes: Number of whitened coefficients that EOFs mix in the linear part
            (:class:`.EOFField`).
        network: Options of :class:`.NeuralOperator`; its defaults if None.
        network_sigma: Noise level above which the network's output fades to zero, which leaves the
            linear part. Meant for small data sets: at high noise only the largest scales are
            visible, and a few independent states show little more of them than a covariance. None
            for no fading.
        coupled: Whether the linear part has covariances between channels (:class:`.CoupledField`).
        regression: Whether the linear part uses the condition. Its mean is then a linear map of
            the condition, mode by mode (:meth:`set_regression`), and covariance and network
            describe the deviation from that mean.
        refinement: Arguments of :class:`.Refinement`: whether states are means over the cells of
            their grid (``cell_means``), and the spectrum beyond the training grid (``tail``).
            None for values at points, and a tail fitted to the band.

    Forward:
        x: ``(B, C, H, W)`` noisy states, normalised.
        sigma: ``(B,)`` noise levels.
        condition: ``(B, D)`` or ``(B, D, H, W)`` if ``condition_channels`` is not zero.

    Outputs:
        ``(B, C, H, W)`` denoised states.

    Raises:
        InputError: If arguments contradict each other. In a call, if a condition is missing or has
            the wrong number of channels.
    """

    __model_checkpoint_version__ = "0.2.0"
    __supported_model_checkpoint_version__ = {
        "0.1.0": "DiffusionOperator: arguments of checkpoint version 0.1.0 are converted to 0.2.0",
    }

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
        refinement: Mapping[str, Any] | None = None,
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
        if network_sigma is not None:
            POSITIVE.check("network_sigma", network_sigma)
        if coupled and eof_modes:
            raise InputError("the linear part has EOFs or is coupled: give eof_modes or coupled")
        self.basis = build_basis(domain, shape, lengths)
        spectrum: Spectrum = Flat() if noise is None else Matern(**noise)
        self.noise = GaussianField(self.basis, spectrum, channels)
        self.channels, self.condition_channels = channels, condition_channels
        self.network_sigma = network_sigma
        self.refinement = _build_refinement(refinement)
        if self.refinement.cell_means:
            self.basis.cell_mean_response()  # raises on a domain without cell means
        self.network = NeuralOperator(
            3 * channels + condition_channels,
            channels,
            {"domain": domain, "shape": list(shape), "lengths": list(lengths)},
            **(network or {}),
        )
        stored = StoredPrior.identity(channels, self.basis.size, eof_modes, coupled=coupled)
        self.coupling: Tensor | None
        for buffer in fields(stored):
            self.register_buffer(buffer.name, getattr(stored, buffer.name))
        weights = torch.zeros(channels, condition_channels, self.basis.size)
        self.regression: Tensor | None
        self.register_buffer("regression", weights if regression else None)
        self._bands: dict[tuple[int, int], Band] = {}
        self._linear = self._build_linear()
        self.register_load_state_dict_pre_hook(_check_state)
        self.register_load_state_dict_post_hook(_rebuild_linear)

    @classmethod
    def _backward_compat_arg_mapper(cls, version: str, args: dict[str, Any]) -> dict[str, Any]:
        """Convert the arguments of an older checkpoint to those of the constructor.

        Version 0.1.0 had ``cell_means`` and ``tail`` instead of ``refinement``.
        """
        if version != "0.1.0":
            return args
        refinement = {k: args[k] for k in ("cell_means", "tail") if k in args}
        kept = {k: v for k, v in args.items() if k not in refinement}
        return kept | ({"refinement": refinement} if any(refinement.values()) else {})

    @property
    def linear(self) -> GaussianDenoiser:
        """The linear part; it is the whole operator if the network's output is zero."""
        return self._linear

    def set_prior(self, prior: PriorCovariance) -> None:
        """Set the Gaussian prior that the linear part is computed from.

        Args:
            prior: Covariance of the normalised states, or of their deviations from the regression
                if there is one. It must be of the kind that the operator was built for; an
                :class:`EOFField` must mix ``eof_modes`` coefficients.

        Raises:
            InputError: If the prior does not fit the noise field or the operator.
        """
        self._stored_prior().write(prior, self.noise)
        self._linear = self._build_linear()

    def set_regression(self, weights: Float[Tensor, "C D K"]) -> None:
        """Set the linear map from a condition to the mean of the states, mode by mode.

        Raises:
            InputError: If the operator was built without a regression, or for another size.
        """
        if self.regression is None or weights.shape != self.regression.shape:
            have = None if self.regression is None else tuple(self.regression.shape)
            raise InputError(f"the operator takes a regression {have}, got {tuple(weights.shape)}")
        self.regression.copy_(weights)

    def conditional_mean(
        self, condition: Tensor | None, like: Float[Tensor, "B C H W"]
    ) -> Tensor | float:
        """Linear estimate of the states from the condition alone, on the grid of ``like``.

        It is zero for an operator without a regression.
        """
        if self.regression is None:
            return 0.0
        shape = (like.shape[-2], like.shape[-1])
        band = self._band(self.linear.at(shape).noise.basis)
        (values,) = self._condition_fields(condition, like, band)
        weights = self.regression.to(like)
        if band.basis.size != self.basis.size:  # a coarser grid resolves only some functions
            here, there = (i.to(weights.device) for i in self.basis.shared(band.basis))
            shown = weights.new_zeros(*weights.shape[:2], band.basis.size)
            weights = shown.index_copy(2, there, weights[..., here])
        c = torch.einsum("cdk,bdk->bck", weights, band.basis.analyze(values))
        return band.basis.synthesize(c, shape)

    def cell_means(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Convert states drawn on another grid to means over the cells of that grid.

        The operator's states on any grid are means over the cells of the *training* grid at scales
        that the training grid resolves, and values at points at smaller scales. Noise, network and
        observations use that form. The result has the form of data on the grid of the states. On
        the training grid, and for an operator of values at points, the states are unchanged.

        Args:
            x: States of all channels, or of one frame.

        Raises:
            InputError: If the number of channels is neither that of the operator nor of a frame.
        """
        shape = (x.shape[-2], x.shape[-1])
        if not self.refinement.cell_means or shape == self.basis.shape:
            return x
        variables = x.shape[1]
        if self.channels % variables:
            raise InputError(f"{variables} channels are no frame of an operator of {self.channels}")
        prior = self.linear.prior
        assert not isinstance(prior, ProductField)  # never stored in an operator
        spectrum = prior.spectrum
        assert isinstance(spectrum, MeasuredSpectrum)
        basis = self.linear.at(shape).noise.basis
        frames = spectrum.response(basis).unflatten(0, (-1, variables))
        factor = frames[len(frames) // 2].to(x)
        return basis.synthesize(factor * basis.analyze(x))

    def refined(self, refinement: Refinement) -> DiffusionOperator:
        """The same weights with other assumptions beyond the training grid.

        Raises:
            InputError: If the domain does not support means over cells, or the tail does not fit.
        """
        options = self._args["__args__"] | {"refinement": asdict(refinement)}
        other = DiffusionOperator(**options).to(self.prior_variance.device)
        other.load_state_dict(self.state_dict())
        return other.train(self.training).requires_grad_(next(self.parameters()).requires_grad)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states, given noisy ones."""
        self.rehearse(x, sigma, condition)
        shape = (x.shape[-2], x.shape[-1])
        linear = self.linear.at(shape)
        with torch.autocast(x.device.type, enabled=False):  # the linear part keeps its precision
            mean = self.conditional_mean(condition, x)
            a = linear.modes(x - mean)
        residual = self.residual(a, sigma, shape, condition)
        with torch.autocast(x.device.type, enabled=False):
            level = _few(sigma, linear)
            deviation = linear.posterior_variance(level).sqrt()
            return mean + linear.fields(a * linear.wiener_weight(level) + deviation * residual)

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
        conditions = self._condition_fields(condition, a, band)
        fade = self._fade(sigma)
        # Skip the network where its output fades to zero. Not in training or while operations are
        # recorded, which need one path for all levels, nor on a GPU, where reading the levels would
        # make the CPU wait.
        everywhere = self.training or recorded() or a.device.type != "cpu"
        if not (everywhere or fade is None or fade.any()):
            return torch.zeros_like(a)
        rounded = torch.is_autocast_enabled(a.device.type)  # the network then rounds its input
        show = partial(self._show, linear=linear, band=band, rounded=rounded)
        with torch.autocast(a.device.type, enabled=False):
            level = _few(sigma, linear)
            inputs = [
                show(a * linear.whitening(level), scale=self.basis.size**-0.5),
                show(a) / (1 + level**2).sqrt().view(-1, 1, 1, 1),
                show(a * linear.wiener_weight(level)),
                *conditions,
            ]
        f = self.network(torch.cat(inputs, 1), sigma).to(a.dtype)
        if fade is not None:
            f = f * fade.view(-1, 1, 1, 1)
        with torch.autocast(a.device.type, enabled=False):
            z = band.widen(band.basis.analyze(f, rounded=rounded)) * self.basis.size**0.5
            return linear.rotate(z.flatten(1))

    def _stored_prior(self) -> StoredPrior:
        return StoredPrior(self.prior_variance, self.eof_index, self.eof_covariance, self.coupling)

    def _build_linear(self) -> GaussianDenoiser:
        """Compute the linear part from the buffers.

        This is done when the buffers change, not when the linear part is needed: an exporter
        replaces buffers by tensors without values.
        """
        with lasting():
            prior = self._stored_prior().read(self.noise, self.refinement)
            return GaussianDenoiser(0.0, prior, self.noise)

    def __getstate__(self) -> dict[str, Any]:
        """State of a pickle, without the cached constants, which are large and on a device."""
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_linear", "_bands")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of a pickle, and rebuild the constants."""
        super().__setstate__(state)
        self._bands = {}
        self._linear = self._build_linear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy weights and buffers; constants never change and are shared."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        shared = {k: self.__dict__[k] for k in ("basis", "noise", "_linear", "_bands")}
        state = {k: v for k, v in super().__getstate__().items() if k not in shared}
        other.__dict__.update(copy.deepcopy(state, memo) | shared)
        return other

    def _band(self, other: Basis) -> Band:
        if other.shape not in self._bands:
            with lasting():
                self._bands[other.shape] = Band(self.basis, other)
        return self._bands[other.shape]

    def _fade(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, " B"] | None:
        """Factor on the network's output at each noise level; zero where it is below 1e-4."""
        if self.network_sigma is None:
            return None
        ratio = sigma / self.network_sigma
        return torch.where(ratio > 10, 0.0, 1 / (1 + ratio**4))

    def _show(
        self,
        coordinates: Float[Tensor, "B N"],
        *,
        linear: GaussianDenoiser,
        band: Band,
        rounded: bool,
        scale: float | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Fields in the training band from coordinates.

        Args:
            coordinates: Coordinates.
            linear: Linear part that they belong to.
            band: Functions that the training grid shares with the grid of the states.
            rounded: Whether products may be rounded to TF32.
            scale: Factor on all whitened coefficients, for a white field; if None, coefficients get
                the amplitudes of the noise, as in a state.
        """
        z = linear.rotate(coordinates, back=True).unflatten(1, (self.channels, -1))
        z = z * (linear.noise.root(z) if scale is None else scale)
        return band.basis.synthesize(band.narrow(z), rounded=rounded)

    def _condition_fields(self, condition: Tensor | None, like: Tensor, band: Band) -> list[Tensor]:
        channels = 0 if condition is None else condition.shape[1]
        if channels != self.condition_channels:
            raise InputError(
                f"the operator takes a condition of {self.condition_channels} channels, "
                f"got {channels}"
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
    """The first level only, if all states share it and one covariance: factors are then smaller."""
    return sigma[:1] if sigma.stride(0) == 0 and linear.analyses == 1 else sigma


def _build_refinement(arguments: Mapping[str, Any] | None) -> Refinement:
    """The refinement from JSON, which has lists in place of tuples."""
    options = dict(arguments or {})
    if options.get("tail") is not None:
        for value in (v for row in options["tail"] for v in row):
            Real().check("refinement.tail", value)
        options["tail"] = tuple(tuple(float(v) for v in row) for row in options["tail"])
    return Refinement(**options)


def _check_state(
    operator: DiffusionOperator, state: dict[str, Tensor], prefix: str, *others: object
) -> None:
    """Hook that runs before an operator loads a state."""
    own = (item for item in state.items() if item[0].startswith(prefix))
    check_state({name.removeprefix(prefix): value for name, value in own})


def _rebuild_linear(operator: DiffusionOperator, incompatible: object) -> None:
    """Hook that runs after an operator has loaded a state."""
    operator._linear = operator._build_linear()
