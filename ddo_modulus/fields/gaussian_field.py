# SPDX-License-Identifier: Apache-2.0
r"""Gaussian random fields: a basis and a spectrum.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients.

A field is :math:`x = L z` with :math:`z \sim N(0, I)` and
:math:`L = \Phi\,\mathrm{diag}(\sqrt{s_k})`, where :math:`\Phi` evaluates the basis functions on a
grid and :math:`s_k` is the variance of coefficient :math:`k`. Its covariance is :math:`C = L L^T`.
Because the coefficients belong to functions and not to a grid, the same field is defined on every
grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.refinement import Refinement, Tail
from ddo_modulus.fields.rotation import Rotation, SubsetRotation


class Spectrum(Protocol):
    """Variance of each coefficient of a basis."""

    #: Whether only the shape counts, and the field is to be scaled to unit variance.
    unit_variance: bool

    def __call__(self, basis: Basis) -> Float[Tensor, "*C K"]:
        """Variances ``(K,)`` or ``(C, K)``, float64."""
        ...


@dataclass(frozen=True)
class Matern:
    r"""Matérn family, :math:`s(\lambda) \propto (2\nu/\ell^2 + \lambda)^{-(\nu + d/2)}`.

    Args:
        length_scale: Correlation length :math:`\ell`, in the units of the basis' lengths
            (radians on the sphere).
        smoothness: :math:`\nu > 0`; 1/2 is the exponential covariance, infinity the Gaussian.
            Samples are :math:`\lceil\nu\rceil - 1` times differentiable.

    Raises:
        InputError: If a parameter is not positive and finite.
    """

    length_scale: float
    smoothness: float
    unit_variance = True

    def __post_init__(self) -> None:
        for name in ("length_scale", "smoothness"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"Matern {name} must be positive and finite, got {value}")

    def __call__(self, basis: Basis) -> Float[Tensor, " K"]:
        """Spectral density at the basis' eigenvalues."""
        kappa2 = 2 * self.smoothness / self.length_scale**2
        # Relative to the mode of wavenumber zero, so that no exponent under- or overflows.
        return (1 + basis.eigenvalues / kappa2) ** -(self.smoothness + basis.dimension / 2)


@dataclass(frozen=True)
class Flat:
    """Equal variance in every coefficient: white noise on the grid, the EDM special case.

    Unlike the others it has no limit as the grid is refined.
    """

    unit_variance = True

    def __call__(self, basis: Basis) -> Float[Tensor, " K"]:
        """Ones."""
        return torch.ones_like(basis.eigenvalues)


@dataclass(frozen=True)
class Scaled:
    """A spectrum with a factor of its own for each channel.

    Attributes:
        spectrum: Its shape.
        factors: ``(C,)``.
    """

    spectrum: Spectrum
    factors: tuple[float, ...]
    unit_variance = False

    @classmethod
    def with_variance(cls, basis: Basis, spectrum: Spectrum, variance: Sequence[float]) -> Scaled:
        """Such that the channels have these variances, in the mean over the grid of a basis."""
        unit = float(basis.mean_square() @ spectrum(basis))
        return cls(spectrum, tuple(float(v) / unit for v in variance))

    def __call__(self, basis: Basis) -> Float[Tensor, "C K"]:
        """Variances of each channel."""
        return torch.tensor(self.factors, dtype=torch.float64)[:, None] * self.spectrum(basis)


# Least variance of a measured coefficient, as a fraction of the mean: below it is round-off.
_FLOOR = 1e-6


class MeasuredSpectrum:
    """Variances measured on data, mode by mode; a law fitted to them beyond the measured band.

    Args:
        basis: The basis they were measured in.
        variance: ``(C, K)`` positive.
        refinement: What is assumed of the field beyond the band: where variances are those of means
            over cells, the shared ones stay so on every grid, and the others are of the field
            itself (:meth:`response` makes them one).
    """

    unit_variance = False

    def __init__(
        self,
        basis: Basis,
        variance: Float[Tensor, "C K"],
        *,
        refinement: Refinement | None = None,
    ) -> None:
        if variance.shape[-1] != basis.size or not bool((variance > 0).all()):
            raise InputError(
                f"a measured spectrum needs {basis.size} positive variances per channel, "
                f"got shape {tuple(variance.shape)} with minimum {float(variance.min()):.3g}"
            )
        self.basis = basis
        self.variance = variance.detach().to("cpu", torch.float64)
        self.refinement = Refinement() if refinement is None else refinement

    @classmethod
    def fit(
        cls,
        basis: Basis,
        fields: Float[Tensor, "B C H W"],
        *,
        floor: float = _FLOOR,
        refinement: Refinement | None = None,
    ) -> MeasuredSpectrum:
        """Mean square of the coefficients of centred fields.

        Functions of one :meth:`.symmetry` share an estimate, which keeps a
        homogeneous field homogeneous and lowers the sampling error.

        Args:
            basis: Basis that the grid of ``fields`` resolves.
            fields: Centred samples.
            floor: Smallest variance, as a fraction of the mean variance of a coefficient.
            refinement: What is assumed of the field beyond the band.
        """
        square = basis.analyze(fields.double()).square().mean(0).cpu()
        return cls.from_power(basis, square, floor=floor, refinement=refinement)

    @classmethod
    def from_power(
        cls,
        basis: Basis,
        square: Float[Tensor, "C K"],
        *,
        floor: float = _FLOOR,
        refinement: Refinement | None = None,
    ) -> MeasuredSpectrum:
        """As :meth:`fit`, from the mean squares of the coefficients (float64)."""
        label = basis.symmetry()
        count = torch.zeros(int(label.max()) + 1, dtype=square.dtype).index_add(
            0, label, torch.ones_like(label, dtype=square.dtype)
        )
        total = torch.zeros(len(square), len(count), dtype=square.dtype)
        mean = total.index_add(1, label, square) / count
        smallest = floor * square.mean(1, keepdim=True)
        return cls(basis, torch.maximum(mean[:, label], smallest), refinement=refinement)

    @cached_property
    def tail(self) -> Tail:
        """The spectrum of the field itself at small scales."""
        # Single precision may have moved what was set to the floor.
        smallest = 1.001 * _FLOOR * self.variance.mean(1, keepdim=True)
        return self.refinement.fit(self.basis, self.variance, smallest=smallest)

    def __call__(self, basis: Basis) -> Float[Tensor, "C K"]:
        """Measured variances where the bases share functions, the tail elsewhere."""
        own = self.basis.eigenvalues
        values = self.tail(basis.eigenvalues.clamp_min(float(own[own > 0].min())))
        here, there = self.basis.shared(basis)
        values[:, there] = self.variance[:, here]
        return values

    def response(self, basis: Basis) -> Float[Tensor, "C K"]:
        """Factors that turn coefficients of this law on another grid into those of cell means.

        One for a field of values at points.

        Raises:
            InputError: If the values are means over cells, on a domain where these mix functions.
        """
        here, there = self.basis.shared(basis)
        factor = self.refinement.response(basis, self.tail)
        factor[:, there] /= self.refinement.response(self.basis, self.tail)[:, here]
        return factor.sqrt()


class GaussianField:
    r"""A Gaussian random field with independent coefficients in a basis.

    Args:
        basis: Functions and default grid.
        spectrum: Variance of the coefficients. Spectra that only have a shape
            (:class:`Matern`, :class:`Flat`) are scaled to unit variance in the mean over the grid;
            on the torus and the sphere that is unit variance at every point.
        channels: Independent copies ``C``; a spectrum with an axis of channels sets it itself.
        scale: Factor on the spectrum. None to scale as above; :meth:`at` hands on its own, so
            that a mode has the same variance on every grid.
    """

    def __init__(
        self,
        basis: Basis,
        spectrum: Spectrum,
        channels: int = 1,
        *,
        scale: float | None = None,
    ) -> None:
        self.basis = basis
        self.spectrum = spectrum
        variance = spectrum(basis)
        if variance.ndim == 2 and channels not in (1, len(variance)):
            raise InputError(f"{channels} channels asked of a spectrum with {len(variance)}")
        if scale is None:
            scale = 1.0
            if spectrum.unit_variance:
                scale = 1.0 / float(basis.mean_square() @ variance)
        self.scale = scale
        self.channels = len(variance) if variance.ndim == 2 else channels
        self.variance = (scale * variance).expand(self.channels, basis.size)
        self._roots: dict[tuple, Tensor] = {}
        self._elsewhere: dict[tuple[int, ...], GaussianField] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: not the roots, which belong to a device, nor other grids."""
        return self.__dict__ | {"_roots": {}, "_elsewhere": {}}

    @property
    def shape(self) -> tuple[int, int]:
        """Grid ``(H, W)``."""
        return self.basis.shape

    def root(self, like: Tensor) -> Float[Tensor, "C K"]:
        """Standard deviation of the coefficients, in the dtype and on the device of ``like``."""
        key = (like.dtype, str(like.device))
        if key not in self._roots:
            with lasting():
                self._roots[key] = self.variance.sqrt().to(like.device, like.dtype)
        return self._roots[key]

    def color(self, z: Float[Tensor, "*B C K"]) -> Float[Tensor, "*B C H W"]:
        """White coefficients to the grid, ``L z``."""
        return self.basis.synthesize(self.root(z) * z)

    def color_adjoint(self, v: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C K"]:
        """Euclidean adjoint of :meth:`color`, ``L^T v``."""
        return self.root(v) * self.basis.synthesize_adjoint(v)

    def whiten(self, x: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C K"]:
        """Inverse of :meth:`color` on band-limited fields, in the least-squares sense elsewhere."""
        return self.basis.analyze(x) / self.root(x)

    def cov(self, v: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
        """Covariance applied to a field, ``C v = L L^T v``."""
        return self.color(self.color_adjoint(v))

    def sample(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "B C H W"]:
        """Independent draws, on the device of the generator (the CPU without one)."""
        device = "cpu" if generator is None else generator.device
        size = (batch, self.channels, self.basis.size)
        return self.color(torch.randn(size, generator=generator, dtype=dtype, device=device))

    def at(self, shape: Sequence[int]) -> GaussianField:
        """The same field on another grid: shared modes keep their variance.

        A finer grid adds the scales that the coarse one could not show.
        """
        if tuple(shape) == self.shape:
            return self
        if tuple(shape) not in self._elsewhere:  # kept, with what it has on a device
            self._elsewhere[tuple(shape)] = GaussianField(
                self.basis.at(shape), self.spectrum, self.channels, scale=self.scale
            )
        return self._elsewhere[tuple(shape)]

    def relative_to(self, reference: GaussianField) -> tuple[Float[Tensor, " N"], None]:
        """Covariance in the whitened coordinates of another field, as variances and a rotation.

        Returns:
            ``(C K,)`` variances, and None: fields that share a basis need no rotation.

        Raises:
            InputError: If the fields do not share their basis and channels.
        """
        check_same_basis(self, reference)
        return (self.variance / reference.variance).reshape(-1), None


class RotatedField(ABC):
    """A Gaussian field with independent coordinates along rotated axes of a reference field.

    Attributes:
        reference: Field whose whitened coefficients are rotated.
    """

    reference: GaussianField

    @abstractmethod
    def relative_to(self, reference: GaussianField) -> tuple[Float[Tensor, " N"], Rotation]:
        """Variances and rotation in whitened coordinates of the reference.

        Raises:
            InputError: If ``reference`` is not the field that this one was built on.
        """

    def sample(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "B C H W"]:
        """Independent draws, on the device of the generator (the CPU without one)."""
        variance, rotation = self.relative_to(self.reference)
        device = "cpu" if generator is None else generator.device
        z = torch.randn((batch, len(variance)), generator=generator, dtype=dtype, device=device)
        z = rotation.to(z)(z * variance.sqrt().to(z), back=True)
        return self.reference.color(z.unflatten(1, (self.reference.channels, -1)))


class EOFField(RotatedField):
    r"""A Gaussian field that is not homogeneous: EOFs at large scale, a spectrum beyond.

    The covariance is :math:`L E\,\mathrm{diag}(s)\,E^T L^T` with :math:`L` of a reference field
    (the noise). :math:`E` is orthogonal and rotates only the first ``n`` whitened coefficients
    (those named by ``index``); its columns are the generalised eigenvectors of the data covariance
    with respect to the reference's, so both are diagonal together and every noise level has a
    closed form.

    Args:
        reference: Field whose whitened coefficients are rotated.
        variance: ``(C K,)`` variances :math:`s` along the rotated axes.
        index: ``(n,)`` flat coefficients (channel-major) that the rotation mixes.
        vectors: ``(n, n)`` orthogonal; column ``i`` is the axis of ``variance[index[i]]``.
        refinement: What is assumed of the field beyond its grid.
    """

    def __init__(
        self,
        reference: GaussianField,
        variance: Float[Tensor, " N"],
        index: Tensor,
        vectors: Float[Tensor, "n n"],
        refinement: Refinement | None = None,
    ) -> None:
        if variance.numel() != reference.channels * reference.basis.size:
            raise InputError("one variance is needed for each channel and coefficient")
        self.reference = reference
        self.variance = variance
        self.index = index
        self.vectors = vectors
        self.refinement = refinement

    @classmethod
    def from_covariance(
        cls,
        reference: GaussianField,
        covariance: Float[Tensor, "n n"],
        index: Tensor,
        remainder: Float[Tensor, " N"],
        *,
        floor: float = 1e-6,
        refinement: Refinement | None = None,
    ) -> EOFField:
        """Diagonalise a covariance of whitened coefficients.

        Args:
            reference: Field whose whitened coefficients the covariance is of.
            covariance: ``(n, n)`` of the coefficients in ``index``.
            index: ``(n,)`` flat coefficients.
            remainder: ``(C K,)`` variances used outside ``index``.
            floor: Smallest variance, as a fraction of the largest.
            refinement: What is assumed of the field beyond its grid.

        Raises:
            InputError: If the covariance is far from positive definite.
        """
        values, vectors = torch.linalg.eigh(covariance.double())
        if not float(values[0]) >= -0.05 * float(values[-1]):  # less is rounding to half precision
            raise InputError(f"the covariance of {len(values)} EOFs is not positive definite")
        variance = remainder.double().clone()
        variance[index] = values.clamp_min(floor * float(values.max()))
        return cls(reference, variance, index, vectors, refinement)

    def relative_to(self, reference: GaussianField) -> tuple[Float[Tensor, " N"], SubsetRotation]:
        """Variances and rotation in whitened coordinates.

        Raises:
            InputError: If ``reference`` is not the field that this one was built on.
        """
        check_same_law(self.reference, reference)
        return self.variance, SubsetRotation(self.index, self.vectors)

    @property
    def spectrum(self) -> MeasuredSpectrum:
        """Variance of each coefficient."""
        old = self.reference
        marginal = SubsetRotation(self.index, self.vectors).marginal(self.variance.double())
        return MeasuredSpectrum(
            old.basis,
            marginal.unflatten(0, (old.channels, -1)) * old.variance,
            refinement=self.refinement,
        )

    def at(self, shape: Sequence[int]) -> EOFField:
        """The same field on a finer grid; the scales that are new get the spectrum's tail.

        Raises:
            InputError: If the grid is coarser: the EOFs are not functions on it.
        """
        old = self.reference
        if tuple(shape) == old.shape:
            return self
        if not old.basis.resolves(shape):
            raise InputError(
                f"EOFs of a {old.shape[0]}x{old.shape[1]} grid do not live on the coarser grid "
                f"{shape[0]}x{shape[1]}"
            )
        new = old.at(shape)
        variance = self.spectrum(new.basis) / new.variance
        here, there = old.basis.shared(new.basis)
        variance[:, there] = self.variance.double().unflatten(0, (old.channels, -1))[:, here]
        channel, position = self.index // old.basis.size, self.index % old.basis.size
        moved = torch.empty(old.basis.size, dtype=torch.long)
        moved[here] = there
        index = channel * new.basis.size + moved[position]
        return EOFField(new, variance.flatten(), index, self.vectors, self.refinement)


def check_same_law(own: GaussianField, other: GaussianField) -> None:
    """Raise unless fields that are diagonal relative to ``own`` are so relative to ``other``.

    Raises:
        InputError: If it is not.
    """
    check_same_basis(own, other)
    if not torch.allclose(own.variance, other.variance):
        raise InputError("the field is diagonal only with respect to its own reference")


def WhiteField(basis: Basis, channels: int = 1) -> GaussianField:  # noqa: N802
    """White noise as a field; with it everything here reduces to ordinary EDM."""
    return GaussianField(basis, Flat(), channels)


def check_same_basis(one: GaussianField, other: GaussianField) -> None:
    """Raise unless two fields share family, grid, eigenvalues and channels.

    Raises:
        InputError: If they do not.
    """
    same = (
        type(one.basis) is type(other.basis)
        and one.shape == other.shape
        and one.channels == other.channels
        and torch.equal(one.basis.eigenvalues, other.basis.eigenvalues)
    )
    if not same:
        raise InputError(
            f"the fields do not share a basis: {one.basis!r} with {one.channels} channel(s) and "
            f"{other.basis!r} with {other.channels}"
        )
