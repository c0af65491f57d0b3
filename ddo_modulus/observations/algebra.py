# SPDX-License-Identifier: Apache-2.0
r"""Algebra of observation operators.

Axes: ``B`` batch, ``T`` analyses (a divisor of ``B``: each has ``B / T`` members, which stand next
to each other), ``C`` channel, ``H W`` grid, ``M`` observations, ``n`` grid values that one
observation reads, ``N`` fields that span a covariance.

Every operator has the form :math:`H(x) = g(P_1 x, \dots, P_q x)`: a few linear functionals of the
state (interpolation, area means, vertical weighting) and a function of their values, observation
by observation (wind speed, a radiance). Its linearisation is :math:`\sum_i a_i P_i` with
:math:`a_i = \partial g / \partial p_i`, so the tangent, its adjoint and its products with a
covariance all come from the same sparse rows.

An operator only gathers, multiplies and adds values of the states, on their device and in their
precision. Indices, weights and constants are copied there once (:class:`_Placed`), so that
no later call waits for the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.fields.linalg import per_member


class ObservationOperator(ABC):
    """Maps states to observed quantities; differentiable."""

    #: Number of observations ``M``.
    size: int

    @abstractmethod
    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """What would be observed in the states."""

    @abstractmethod
    def linearize(self, x: Float[Tensor, "B C H W"]) -> Tangent:
        """First-order change of the observations around states."""

    @abstractmethod
    def rescale(self, mean: Tensor, std: Tensor) -> ObservationOperator:
        """The same operator on normalised states ``(x - mean) / std``.

        Args:
            mean: ``(C, H, W)``, or ``(T, C, H, W)`` if it differs between analyses.
            std: Of the same shape.
        """

    @abstractmethod
    def take(self, rows: Int[Tensor, " R"]) -> ObservationOperator:
        """Some of the observations.

        Args:
            rows: Their numbers, ascending.
        """


class _Placed:
    """Constant tensors, with one copy for each device and precision that asks for them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def __call__(self, like: Tensor) -> tuple[Tensor, ...]:
        """The tensors beside ``like``; whole numbers stay what they are."""
        key = like.device, like.dtype
        if key not in self._copies:
            with lasting():
                self._copies[key] = tuple(
                    t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
                    for t in self.tensors
                )
        return self._copies[key]


@dataclass(frozen=True)
class Tangent:
    """Sum of sparse linear operators, each scaled observation by observation.

    Attributes:
        terms: Pairs of factors ``(B, M)`` (or None for one) and linear operators.
        linear: Whether it is the same for all states.
    """

    terms: Sequence[tuple[Tensor | None, LinearOperator]]
    linear: bool

    def __call__(self, v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """Tangent of the operator applied to perturbations."""
        return sum(_scaled(a, operator.increment(v)) for a, operator in self.terms)  # type: ignore

    def adjoint(self, u: Float[Tensor, "B M"], shape: Sequence[int]) -> Float[Tensor, "B C H W"]:
        """Euclidean adjoint for states of shape ``(C, H, W)``."""
        return sum(operator.adjoint(_scaled(a, u), shape) for a, operator in self.terms)  # type: ignore

    def rows(self, fields: Float[Tensor, "N C H W"]) -> Float[Tensor, "T M N"]:
        """The tangent applied to a set of fields; one matrix for each state if not linear."""
        total: Tensor | float = 0.0
        for a, operator in self.terms:
            rows = operator.rows(fields)
            total = total + (rows if a is None else a[..., None] * per_member(rows, len(a)))
        assert isinstance(total, Tensor)
        return total


class LinearOperator(ObservationOperator):
    """Weighted sums of grid values plus an offset.

    Args:
        index: ``(M, n)`` into the flattened state ``C H W``; ``(T, M, n)`` if every analysis has
            its own places.
        weight: Same shape. Rows of zeros observe nothing (they pad ragged batches).
        offset: ``(M,)`` or ``(T, M)``, added to the sums.
    """

    def __init__(
        self, index: Int[Tensor, "*T M n"], weight: Float[Tensor, "*T M n"], offset: Tensor
    ) -> None:
        self.size = index.shape[-2]
        self.index = index if index.ndim == 3 else index[None]
        self.weight = weight.reshape(self.index.shape)
        self.offset = offset if offset.ndim == 2 else offset[None]
        self._placed = _Placed(self.index, self.weight, self.offset)

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """Observed values of the states."""
        return self.increment(x) + per_member(self._placed(x)[2], len(x))

    def increment(self, v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """The operator without its offset."""
        index, weight, _ = self._placed(v)
        values = v.flatten(1).gather(1, per_member(index, len(v)).flatten(1))
        return (values.unflatten(1, (self.size, -1)) * per_member(weight, len(v))).sum(-1)

    def adjoint(self, u: Float[Tensor, "B M"], shape: Sequence[int]) -> Float[Tensor, "B C H W"]:
        """Euclidean adjoint of :meth:`increment` for states of shape ``(C, H, W)``."""
        index, weight, _ = self._placed(u)
        values = (u[..., None] * per_member(weight, len(u))).flatten(1)
        flat = u.new_zeros(len(u), math.prod(shape))
        flat = flat.scatter_add(1, per_member(index, len(u)).flatten(1), values)
        return flat.unflatten(1, tuple(shape))

    def rows(self, fields: Float[Tensor, "N C H W"]) -> Float[Tensor, "T M N"]:
        """:meth:`increment` of a set of fields that all states share."""
        flat = fields.flatten(1).T.contiguous()  # CHW N
        index, weight, _ = self._placed(fields)
        rows = flat.new_zeros(*index.shape[:2], flat.shape[1])
        for i in range(index.shape[-1]):  # one value after another keeps the memory at one result
            rows += flat[index[..., i]] * weight[..., i, None]
        return rows

    def linearize(self, x: Float[Tensor, "B C H W"]) -> Tangent:
        """Itself, without the offset."""
        return Tangent([(None, self)], linear=True)

    def rescale(self, mean: Tensor, std: Tensor) -> LinearOperator:
        """Fold the standard deviations into the weights and the mean into the offset."""
        analyses = max(len(self.index), 1 if std.ndim == 3 else len(std))
        index = per_member(self.index, analyses).flatten(1)
        factor, shift = (
            per_member(t.reshape(-1, math.prod(t.shape[-3:])), analyses)
            .gather(1, index)
            .unflatten(1, (self.size, -1))
            for t in (std, mean)
        )
        weight = per_member(self.weight, analyses).to(factor)
        offset = per_member(self.offset, analyses) + (weight * shift).sum(-1)
        return LinearOperator(index.unflatten(1, (self.size, -1)), weight * factor, offset)

    def take(self, rows: Int[Tensor, " R"]) -> LinearOperator:
        """The observations numbered ``index``, in that order; repetitions are allowed."""
        return LinearOperator(self.index[:, rows], self.weight[:, rows], self.offset[:, rows])


def combined(
    operators: Sequence[LinearOperator],
    factors: Sequence[float | Tensor],
    offset: float | Tensor = 0.0,
) -> LinearOperator:
    """The linear operator ``sum_i factors_i operators_i + offset``.

    Args:
        operators: Of equal size.
        factors: One for each operator: a number, or ``(M,)``.
        offset: A number, or ``(M,)``.
    """
    _check_sizes(operators)
    columns = [torch.as_tensor(f, dtype=torch.float64)[..., None] for f in factors]
    pairs = list(zip(operators, columns, strict=True))
    shift = sum(o.offset.double() * f[..., 0] for o, f in pairs) + offset
    return LinearOperator(
        torch.cat([o.index for o in operators], -1),
        torch.cat([o.weight.double() * f for o, f in pairs], -1),
        torch.as_tensor(shift, dtype=torch.float64),
    )


def joined(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Linear operators one after the other along ``M``, as one linear operator."""
    width = max(o.index.shape[-1] for o in operators)
    pad = torch.nn.functional.pad
    wide = [(pad(t, (0, width - t.shape[-1])) for t in (o.index, o.weight)) for o in operators]
    index, weight = zip(*wide, strict=True)
    offset = torch.cat([o.offset for o in operators], 1)
    return LinearOperator(torch.cat(index, 1), torch.cat([w.double() for w in weight], 1), offset)


class PointOperator(LinearOperator):
    """Bilinear interpolation to points; wraps in longitude and holds across the poles.

    Args:
        grid: A grid, or a pair of one-dimensional ``(lat, lon)`` coordinates.
        lat: ``(M,)`` latitudes (row coordinates), or ``(T, M)`` if analyses differ.
        lon: Longitudes (column coordinates), same shape, any branch.
        channels: Channel observed, one for all or ``(M,)``.

    Raises:
        InputError: If a point is outside the grid, or a channel negative.
    """

    def __init__(
        self,
        grid: Grid | tuple[ArrayLike, ArrayLike],
        lat: ArrayLike,
        lon: ArrayLike,
        channels: int | ArrayLike = 0,
    ) -> None:
        grid = grid if isinstance(grid, Grid) else LatLonGrid(*grid)
        lat = np.atleast_1d(np.asarray(lat, np.float64))
        index, weight = grid.bilinear(lat, np.atleast_1d(np.asarray(lon, np.float64)))
        index = index + _channel_offset(channels, grid, lat.shape)
        super().__init__(
            torch.from_numpy(index),
            torch.from_numpy(weight).float(),
            torch.zeros(index.shape[:-1]),
        )


class AreaMeanOperator(LinearOperator):
    """Area-weighted means over latitude-longitude rectangles.

    Args:
        grid: The grid.
        south: ``(M,)`` lower row coordinates, inclusive.
        north: ``(M,)`` upper row coordinates.
        west: ``(M,)`` first column coordinates; ``west > east`` crosses the seam.
        east: ``(M,)`` last column coordinates.
        channels: Channel observed, one for all or ``(M,)``.

    Raises:
        InputError: If a rectangle holds no grid point.
    """

    def __init__(
        self,
        grid: Grid,
        south: ArrayLike,
        north: ArrayLike,
        west: ArrayLike,
        east: ArrayLike,
        channels: int | ArrayLike = 0,
    ) -> None:
        bounds = np.broadcast_arrays(*(np.atleast_1d(v) for v in (south, north, west, east)))
        area = grid.area()
        chosen = []
        for low, high, first, last in zip(*bounds, strict=True):
            rows = (grid.lat >= low) & (grid.lat <= high)
            columns = (grid.lon >= first) & (grid.lon <= last)
            if first > last:
                columns = (grid.lon >= first) | (grid.lon <= last)
            flat = np.flatnonzero(rows[:, None] & columns)
            if not len(flat):
                raise InputError(
                    f"the rectangle {low:g}..{high:g}, {first:g}..{last:g} holds no grid point"
                )
            chosen.append(flat)
        width = max(len(flat) for flat in chosen)
        index = np.zeros((len(chosen), width), int)
        weight = np.zeros((len(chosen), width))
        for m, flat in enumerate(chosen):
            share = area.reshape(-1)[flat]
            index[m, : len(flat)], weight[m, : len(flat)] = flat, share / share.sum()
        index = index + _channel_offset(channels, grid, (len(chosen),))
        super().__init__(
            torch.from_numpy(index), torch.from_numpy(weight).float(), torch.zeros(len(chosen))
        )


class DerivedOperator(ObservationOperator):
    """A function of several linear operators, observation by observation.

    Args:
        function: Elementwise, differentiable: as many tensors ``(B, M)`` as operators, and then
            the constants, to one.
        operators: Linear operators of equal size.
        constants: What else differs between observations, such as the height of a station; each
            ``(M,)``.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *operators: LinearOperator,
        constants: Sequence[Tensor] = (),
    ) -> None:
        _check_sizes(operators)
        self.function, self.operators, self.constants = function, operators, tuple(constants)
        self.size = operators[0].size
        self._placed = _Placed(*self.constants)

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """Observed values of the states."""
        return self.function(*(operator(x) for operator in self.operators), *self._placed(x))

    def linearize(self, x: Float[Tensor, "B C H W"]) -> Tangent:
        """Partial derivatives of the function at the states, times the operators."""
        constants = self._placed(x)
        values = [operator(x.detach()) for operator in self.operators]

        def function(*values: Tensor) -> Tensor:
            return self.function(*values, *constants)

        observed, pullback = torch.func.vjp(function, *values)  # type: ignore[misc]
        slopes = pullback(torch.ones_like(observed))
        return Tangent(list(zip(slopes, self.operators, strict=True)), linear=False)

    def rescale(self, mean: Tensor, std: Tensor) -> DerivedOperator:
        """The same function of the rescaled operators."""
        operators = (operator.rescale(mean, std) for operator in self.operators)
        return DerivedOperator(self.function, *operators, constants=self.constants)

    def take(self, rows: Int[Tensor, " R"]) -> DerivedOperator:
        """The same function for some of the observations."""
        operators = (operator.take(rows) for operator in self.operators)
        constants = [constant[rows] for constant in self.constants]
        return DerivedOperator(self.function, *operators, constants=constants)


class StackedOperator(ObservationOperator):
    """Several operators observed together, one after the other along ``M``."""

    def __init__(self, *operators: ObservationOperator) -> None:
        self.operators = operators
        self.size = sum(operator.size for operator in operators)
        # Padded rows of the parts' linear operators, beside what they are rows of.
        self._padded: dict[tuple[int, int], tuple[LinearOperator, LinearOperator]] = {}

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """Observed values of the states."""
        return torch.cat([operator(x) for operator in self.operators], 1)

    def linearize(self, x: Float[Tensor, "B C H W"]) -> Tangent:
        """Tangents of the parts, each padded with empty rows for the others."""
        terms, linear, start = [], True, 0
        for operator in self.operators:
            tangent = operator.linearize(x)
            linear &= tangent.linear
            after = self.size - start - operator.size
            for a, part in tangent.terms:
                factor = None if a is None else torch.nn.functional.pad(a, (start, after))
                if (id(part), start) not in self._padded:
                    with lasting():
                        self._padded[id(part), start] = part, _padded(part, start, after)
                terms.append((factor, self._padded[id(part), start][1]))
            start += operator.size
        return Tangent(terms, linear)

    def rescale(self, mean: Tensor, std: Tensor) -> StackedOperator:
        """The rescaled parts."""
        return StackedOperator(*(operator.rescale(mean, std) for operator in self.operators))

    def take(self, rows: Int[Tensor, " R"]) -> StackedOperator:
        """Some of the observations; a part of which none is left is left out."""
        parts, start = [], 0
        for operator in self.operators:
            inside = rows[(rows >= start) & (rows < start + operator.size)] - start
            if len(inside):
                parts.append(operator.take(inside))
            start += operator.size
        return StackedOperator(*parts)


def _channel_offset(channels: int | ArrayLike, grid: Grid, shape: tuple[int, ...]) -> np.ndarray:
    """Flat index at which each observation's channel begins, with an axis for the grid values."""
    channel = np.broadcast_to(np.asarray(channels, int), shape)
    if (channel < 0).any():
        raise InputError("channels must not be negative")
    return (channel * grid.shape[0] * grid.shape[1])[..., None]


def _check_sizes(operators: Sequence[LinearOperator]) -> None:
    if len({operator.size for operator in operators}) != 1:
        raise InputError("the operators of a derived quantity must observe equally often")


def _scaled(a: Tensor | None, u: Tensor) -> Tensor:
    return u if a is None else a * u


def _padded(operator: LinearOperator, before: int, after: int) -> LinearOperator:
    pad = torch.nn.functional.pad
    return LinearOperator(
        pad(operator.index, (0, 0, before, after)),
        pad(operator.weight, (0, 0, before, after)),
        pad(operator.offset, (before, after)),
    )
