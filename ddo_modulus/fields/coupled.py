# SPDX-License-Identifier: Apache-2.0
r"""Gaussian fields whose channels depend on each other: variables, or the frames of a window.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients, ``G`` groups of
functions that a symmetry of the domain turns into each other, ``P`` lag in frames.

Coefficients of different functions are independent (the law is homogeneous); those of one function
in different channels have a covariance, :math:`\Sigma_k`. In units of a reference field that has
the same law in all channels, such as the noise, :math:`\Sigma_k` and the identity are diagonal
together, so that every noise level has a closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import (
    GaussianField,
    MeasuredSpectrum,
    RotatedField,
    check_same_law,
)
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.fields.rotation import ChannelRotation

# Least variance along any direction of a mode, over its mean.
_FLOOR = 1e-6


class CoupledField(RotatedField):
    r"""A homogeneous Gaussian field with a covariance between channels, mode by mode.

    Args:
        reference: Field whose whitened coefficients the covariance is of.
        covariance: ``(K, C, C)`` symmetric, positive definite.
        refinement: What is assumed of the field beyond its grid.

    Raises:
        InputError: If the shape does not fit the reference.
    """

    def __init__(
        self,
        reference: GaussianField,
        covariance: Float[Tensor, "K C C"],
        refinement: Refinement | None = None,
    ) -> None:
        size = (reference.basis.size, reference.channels, reference.channels)
        if tuple(covariance.shape) != size:
            raise InputError(f"a coupled field needs {size} covariances, got {covariance.shape}")
        self.reference = reference
        self.covariance = covariance.detach().to("cpu", torch.float64)
        self.refinement = refinement

    @classmethod
    def fit(
        cls,
        reference: GaussianField,
        fields: Iterable[Float[Tensor, "B C H W"]],
        *,
        floor: float = _FLOOR,
    ) -> CoupledField:
        """Mean products of the coefficients of centred fields, as :meth:`MeasuredSpectrum.fit`.

        Args:
            reference: Gives the basis.
            fields: Centred samples, in pieces.
            floor: Smallest variance along any direction of a mode, as a fraction of the mode's
                mean variance.
        """
        basis, count = reference.basis, 0
        label = basis.symmetry()
        size = (int(label.max()) + 1, reference.channels, reference.channels)  # G C C
        total = torch.zeros(size, dtype=torch.float64)
        for piece in fields:
            z = reference.whiten(piece.double()).cpu()
            product = torch.einsum("bck,bdk->kcd", z, z)
            total = total.index_add(0, label, product)
            count += len(piece)
        members = torch.bincount(label, minlength=size[0])
        mean = total / (count * members[:, None, None])
        values, vectors = torch.linalg.eigh(mean)
        values = torch.maximum(values, floor * values.mean(1, keepdim=True))
        return cls(reference, ((vectors * values[:, None]) @ vectors.mT)[label])

    def relative_to(self, reference: GaussianField) -> tuple[Float[Tensor, " N"], ChannelRotation]:
        """Covariance in the whitened coordinates of the reference, as variances and a rotation.

        Raises:
            InputError: If ``reference`` is not the field that this one was built on.
        """
        check_same_law(self.reference, reference)
        values, vectors = self._axes
        return values.clamp_min(1e-12 * float(values.max())).mT.flatten(), ChannelRotation(vectors)

    @cached_property
    def _axes(self) -> tuple[Float[Tensor, "K C"], Float[Tensor, "K C C"]]:
        """Eigenvalues and eigenvectors of the covariances; equal ones are solved once."""
        label, distinct = self._distinct
        values, vectors = torch.linalg.eigh(distinct)
        if not bool((values[:, 0] >= -0.01 * values[:, -1]).all()):
            raise InputError(
                "the covariances between channels are not positive definite; they are damaged"
            )
        return values[label], vectors[label]

    @cached_property
    def _distinct(self) -> tuple[Int[Tensor, " K"], Float[Tensor, "G C C"]]:
        """Distinct covariances, and which of them each function has.

        Functions that a symmetry turns into each other usually share theirs.
        """
        label = self.reference.basis.symmetry()
        order = label.argsort(stable=True)
        sizes = torch.bincount(label)
        shared = self.covariance[order[sizes.cumsum(0) - sizes]]  # of the first of each group
        if torch.equal(shared[label], self.covariance):
            return label, shared
        return torch.arange(len(label)), self.covariance

    @property
    def spectrum(self) -> MeasuredSpectrum:
        """Variance of each coefficient."""
        own = self.covariance.diagonal(dim1=1, dim2=2).mT
        return MeasuredSpectrum(
            self.reference.basis, own * self.reference.variance, refinement=self.refinement
        )

    def at(self, shape: Sequence[int]) -> CoupledField:
        """The same field on another grid.

        Scales that are new follow the spectrum's tail, with the correlation of the finest scales
        measured.
        """
        old = self.reference
        if tuple(shape) == old.shape:
            return self
        new = old.at(shape)
        here, there = old.basis.shared(new.basis)
        deviation = self.covariance.diagonal(dim1=1, dim2=2).sqrt()  # K C
        variance = self.spectrum(new.basis) / new.variance
        fine = old.basis.eigenvalues > 0.5 * old.basis.eigenvalues.max()
        correlation = self.covariance / (deviation[:, :, None] * deviation[:, None])
        tail = variance.sqrt().mT
        covariance = correlation[fine].mean(0) * tail[:, :, None] * tail[:, None]
        covariance[there] = self.covariance[here]
        return CoupledField(new, covariance, self.refinement)

    def stationary(self, frames: int) -> CoupledField:
        """The same window with a covariance that depends on the lag in time alone.

        In an estimate this removes the sampling errors by which frames differ. Lags come from the
        mean squares of differences between frames. Those are small where a process is smooth;
        computed as differences of variances they would drown in the errors of these.

        Args:
            frames: Frames of the window; the channels are ``frames`` times the variables.

        Raises:
            InputError: If the channels are no multiple of ``frames``.
        """
        lags = _autocovariance(self.covariance, self._window(frames))
        return CoupledField(self.reference, _toeplitz(lags), self.refinement)

    def extended(self, frames: int, length: int) -> CoupledField:
        r"""The stationary process in time of which this field is a window, over a longer one.

        The window holds the autocovariances of ``frames`` lags; the process of largest entropy
        that has them is autoregressive of order ``frames - 1`` (Burg), and its other lags follow
        by recursion, :math:`R_p = \sum_j A_j R_{p-j}`, with :math:`A_j` of the Yule-Walker
        equations. It needs no record longer than the window.

        Args:
            frames: Frames of the window; the channels are ``frames`` times the variables.
            length: Frames wanted.

        Raises:
            InputError: If the channels are no multiple of ``frames``, or ``frames`` is one.
        """
        if self._window(frames) < 2:
            raise InputError(
                "the covariance of one frame says nothing of others; take frames=2 or more"
            )
        label, distinct = self._distinct
        lags = _recursion(_autocovariance(distinct, frames), length)
        own, channels = self.reference, length * lags.shape[-1]
        reference = GaussianField(own.basis, own.spectrum, channels, scale=own.scale)
        return CoupledField(reference, _toeplitz(lags)[label], self.refinement)

    def _window(self, frames: int) -> int:
        channels = self.reference.channels
        if frames < 1 or channels % frames:
            raise InputError(f"{channels} channels are no window of {frames} frames")
        return frames


def _autocovariance(covariance: Float[Tensor, "K N N"], frames: int) -> Float[Tensor, "K P C C"]:
    r"""``E[x_{t+p} x_t^T]`` of a window, made that of a stationary process.

    With :math:`\gamma_p` half the mean square of differences over a lag, :math:`R_p = R_0 -
    \gamma_p`. What sampling leaves of negative directions is lifted by white noise in time.
    """
    variables = covariance.shape[1] // frames
    blocks = covariance.reshape(-1, frames, variables, frames, variables).permute(0, 1, 3, 2, 4)
    own = torch.stack([blocks[:, t, t] for t in range(frames)], 1)
    lags = [own.mean(1)]
    for p in range(1, frames):
        half = [(own[:, t + p] + own[:, t]) / 2 - blocks[:, t + p, t] for t in range(frames - p)]
        lags.append(lags[0] - torch.stack(half).mean(0))
    found = torch.stack(lags, 1)
    lowest = torch.linalg.eigvalsh(_toeplitz(found))[:, 0]
    mean = found[:, 0].diagonal(dim1=1, dim2=2).mean(1)
    lift = (_FLOOR * mean - lowest).clamp_min(0)
    found[:, 0] += lift[:, None, None] * torch.eye(variables)
    return found * (mean / (mean + lift))[:, None, None, None]


def _toeplitz(lags: Float[Tensor, "K P C C"]) -> Float[Tensor, "K N N"]:
    """Covariance of consecutive frames: lag ``s - t`` of frames ``s`` and ``t``."""
    modes, length, variables, _ = lags.shape
    both = torch.cat([lags[:, 1:].flip(1), lags.mT], 1)  # t - s from -(P-1) to P-1
    step = torch.arange(length)
    blocks = both[:, length - 1 + step[None] - step[:, None]]  # K s t C C
    covariance = blocks.permute(0, 1, 3, 2, 4).reshape(modes, length * variables, -1)
    return (covariance + covariance.mT) / 2


def _recursion(lags: Float[Tensor, "K P C C"], length: int) -> Float[Tensor, "K L C C"]:
    """The first ``length`` lags of the autoregressive process that has ``lags``."""
    modes, first, variables, _ = lags.shape
    if length <= first:
        return lags[:, :length]
    order = first - 1
    size = order * variables
    # Yule-Walker: [A_1 ... A_p] Gamma = [R_1 ... R_p], block (i, j) of Gamma is R_{j-i}.
    gamma = _toeplitz(lags[:, :order].mT)
    right = lags[:, 1:].permute(0, 2, 1, 3).reshape(modes, variables, size)
    weights = torch.linalg.solve(gamma.mT, right.mT).mT
    weights = weights.reshape(modes, variables, order, variables).movedim(2, 1)  # K order C C
    found = list(lags.unbind(1))
    for p in range(first, length):
        found.append(sum(weights[:, j] @ found[p - 1 - j] for j in range(order)))
    return torch.stack(found, 1)
