# SPDX-License-Identifier: Apache-2.0
r"""How fields vary in space: power spectra, structure functions, autocovariance.

.. math::
    S_p(r) = \mathrm{E} |x(s + r) - x(s)|^p, \qquad
    C(r) = \mathrm{E}\, (x(s + r) - m) (x(s) - m),

with separations :math:`r` along the rows' axis (meridians) and along the columns' (parallels). For
a homogeneous field :math:`S_2(r) = 2 (C(0) - C(r))`.

Distances are the domain's own lengths on a torus or in a box, and great-circle kilometres on the
globe. Along a parallel the distance of ``k`` columns shrinks towards the poles: pairs are taken
row by row at the two lags whose distances enclose ``r``, with weights linear in distance.

Axes: ``N`` fields, ``H W`` grid, ``S`` shells of wavenumbers, ``A`` axes (0 along the rows' axis,
1 along the columns'), ``P`` orders, ``L`` separations, ``Q`` points of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, CosineBasis, FourierBasis
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis

#: Orders of the structure functions; the third is of the absolute increment.
ORDERS = (2, 3, 4)

_SEPARATIONS = 16  # of each axis, at most


def basis_of(grid: Grid) -> Basis:
    """Basis for spectra: of the torus, the globe, or a region (lengths in 1000 km)."""
    if isinstance(grid, BoxGrid):
        family = FourierBasis if grid.periodic else CosineBasis
        return family(grid.shape, grid.lengths)
    assert isinstance(grid, LatLonGrid)
    if grid.is_global:
        return SphericalBasis(grid.shape, latitudes=grid.lat)
    height, width = (len(a) * abs(float(a[1] - a[0])) for a in (grid.lat, grid.lon))
    degree = 1e-3 * np.deg2rad(EARTH_RADIUS_KM)
    return CosineBasis(
        grid.shape, (height * degree, width * degree * float(np.cos(np.deg2rad(grid.lat.mean()))))
    )


# ---- spectra ----------------------------------------------------------------------------------


def complete_shells(basis: Basis, largest: float | None = None) -> tuple[Tensor, Tensor]:
    """Shells to compare: above wavenumber zero, filled by the basis, up to a largest wavenumber.

    Args:
        basis: Basis whose shells are meant.
        largest: Largest wavenumber (angular, as in `Basis.shells`); all that are filled if None.

    Returns:
        Indices and wavenumbers of the shells, ``(S,)`` each.

    Raises:
        InputError: If no shell is left.
    """
    wavenumber, _ = basis.shells()
    width = float(wavenumber[1])
    end = basis.complete_wavenumber()
    if largest is not None:
        end = min(end, largest)
    chosen = torch.nonzero((wavenumber > 0) & (wavenumber <= end + 1e-9 * width)).flatten()
    if len(chosen) == 0:
        raise InputError(
            f"largest wavenumber {largest} leaves no shell; the smallest is {width:.4g} and the "
            f"grid resolves {basis.complete_wavenumber():.4g}"
        )
    return chosen, wavenumber[chosen]


def shell_power(
    x: Float[Tensor, "*N H W"], basis: Basis, *, largest: float | None = None
) -> tuple[Float[Tensor, " S"], Float[Tensor, "*N S"]]:
    """Wavenumbers ``(S,)`` and power of each field in each shell of `complete_shells`."""
    chosen, wavenumber = complete_shells(basis, largest)
    return wavenumber, basis.power(x.double())[..., chosen.to(x.device)]


def rms_log_ratio(one: Float[Tensor, "*R K"], other: Float[Tensor, "*R K"]) -> Tensor:
    """Root-mean-square over the last axis of the difference of natural logarithms.

    0.1 means that the two differ by a factor of 1.1, typically. Where one of them vanishes the
    distance is infinite; where both do, that place does not count.
    """
    both = (one <= 0) & (other <= 0)
    logs = one.clamp_min(0).log() - other.clamp_min(0).log()
    square = torch.where(both, 0.0, logs).square()
    return (square.sum(-1) / (~both).sum(-1).clamp_min(1)).sqrt()


def spectral_distance(
    samples: Float[Tensor, "*R S"], truth: Float[Tensor, "*R S"]
) -> Float[Tensor, "*R"]:
    """`rms_log_ratio` of spectra, of which nothing is seen below the round-off of the fields.

    Power below 1e-10 of the truth's strongest shell counts as that much: scales that a simulator
    has cut off hold rounding errors of single precision.
    """
    floor = 1e-10 * truth.amax(-1, keepdim=True)
    return rms_log_ratio(torch.maximum(samples, floor), torch.maximum(truth, floor))


def log_spectrum_distance(
    samples: Float[Tensor, "*N H W"],
    truth: Float[Tensor, "*M H2 W2"],
    basis: Basis,
    *,
    largest: float | None = None,
) -> float:
    r"""Distance between the mean power spectra of two sets of fields.

    .. math::
        \Bigl(\frac1S \sum_s (\ln P_s - \ln Q_s)^2\Bigr)^{1/2}

    over the shells that both grids fill, in natural logarithms (times 4.34: decibel); see
    `spectral_distance` for powers near round-off.

    Args:
        samples: Fields, on any grid of the domain.
        truth: Fields, on any grid of the domain.
        basis: Basis of the domain, of any grid.
        largest: Largest wavenumber to compare (angular, in the units of the basis).

    Returns:
        The distance, zero for equal spectra.
    """
    bases = [basis.at((x.shape[-2], x.shape[-1])) for x in (samples, truth)]
    end = min(b.complete_wavenumber() for b in bases)
    end = end if largest is None else min(end, largest)
    powers = [
        shell_power(x, b, largest=end)[1].flatten(0, -2).mean(0)
        for x, b in zip((samples, truth), bases, strict=True)
    ]
    return float(spectral_distance(powers[0], powers[1].to(powers[0])))


# ---- pairs of points --------------------------------------------------------------------------


def separations(grid: Grid) -> tuple[Float[Tensor, "A L"], Tensor]:
    """Distances at which pairs are compared, and their lags in points of the grid.

    Lags are all small ones and then ever sparser, to half the shorter axis. Along parallels the
    distance is that of the row nearest the equator.

    Returns:
        Distances ``(2, L)`` in lengths of the domain or kilometres, and lags ``(L,)``.
    """
    longest = max(1, min(grid.shape) // 2)
    lags = np.unique(np.rint(np.geomspace(1, longest, _SEPARATIONS)).astype(int))
    rows, columns = (_distance(grid, axis)[1:] for axis in (0, 1))
    along = np.stack([rows[lags - 1, 0], columns[lags - 1].max(-1)])
    return torch.from_numpy(along), torch.from_numpy(lags)


def _distance(grid: Grid, axis: int) -> np.ndarray:
    """Distance of points a number of lags apart, ``(lags, H)`` (zonal) or ``(lags, 1)``."""
    lags = np.arange(grid.shape[axis] // 2 + 1 if _periodic(grid, axis) else grid.shape[axis])
    if isinstance(grid, LatLonGrid):
        step = np.deg2rad(
            abs(grid.lat[1] - grid.lat[0]) if axis == 0 else grid.lon[1] - grid.lon[0]
        )
        if axis == 0:
            return EARTH_RADIUS_KM * step * lags[:, None]
        chord = np.cos(np.deg2rad(grid.lat)) * np.sin(0.5 * step * lags[:, None])
        return 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(np.abs(chord), 1.0))
    assert isinstance(grid, BoxGrid)
    return lags[:, None] * grid.lengths[axis] / grid.shape[axis]


def _periodic(grid: Grid, axis: int) -> bool:
    if isinstance(grid, LatLonGrid):
        return axis == 1 and grid.is_global
    assert isinstance(grid, BoxGrid)
    return grid.periodic


def _pairs(grid: Grid, axis: int, distance: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Second point of each pair a distance apart, and the pair's weight: ``(Q,)`` each.

    Weights sum to one over all that is yielded.
    """
    height, width = grid.shape
    distances = np.broadcast_to(_distance(grid, axis), (len(_distance(grid, axis)), height))
    upper = np.array([np.searchsorted(d, distance * (1 - 1e-9)) for d in distances.T])
    reached = upper < len(distances)  # else the row has no points so far apart
    upper = np.minimum(upper, len(distances) - 1)
    far, near = distances[upper, np.arange(height)], distances[upper - 1, np.arange(height)]
    share = np.clip((distance - near) / np.maximum(far - near, 1e-12), 0.0, 1.0)
    # Nearer than one column there is nothing to interpolate with.
    reached &= (upper > 1) | (share > 1 - 1e-6)
    area = grid.area()
    found = []
    for lag, part in ((upper, share), (upper - 1, 1 - share)):
        if not (part > 1e-9).any():
            continue
        row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        moving = (row if axis == 0 else column) + lag[:, None]
        inside = np.ones_like(area, bool) if _periodic(grid, axis) else moving < grid.shape[axis]
        moving = moving % grid.shape[axis]
        second = moving * width + column if axis == 0 else row * width + moving
        weight = np.sqrt(area * area.reshape(-1)[second]) * inside * (part * reached)[:, None]
        if axis == 1:  # a row that leaves its domain early has no more say than its area
            pairs = inside.sum(1, keepdims=True)
            weight = weight * width / np.maximum(pairs, 1)
        found.append((second.reshape(-1), weight.reshape(-1)))
    total = sum(weight.sum() for _, weight in found)
    for second, weight in found:
        yield torch.from_numpy(second), torch.from_numpy(weight / total)


def pair_moments(x: Float[Tensor, "N H W"], grid: Grid) -> Float[Tensor, "N A P1 L"]:
    """Structure functions of the `ORDERS` and, last, products of both points, field by field.

    Args:
        x: Fields; for the products, deviations from the mean.
        grid: Of the fields.

    Returns:
        Means over all pairs of a field at the distances of `separations`, float64.
    """
    distances, _ = separations(grid)
    values = x.double().flatten(-2)
    result = values.new_zeros(len(values), 2, len(ORDERS) + 1, distances.shape[1])
    for axis in (0, 1):
        for index, distance in enumerate(distances[axis].tolist()):
            for second, weight in _pairs(grid, axis, distance):
                other = values[:, second.to(x.device)]
                weight = weight.to(x.device)
                increment = (other - values).abs()
                square = increment.square()
                powers = (square, square * increment, square.square(), other * values)
                for place, power in enumerate(powers):
                    result[:, axis, place, index] += power @ weight
    return result


def structure_functions(
    x: Float[Tensor, "*N H W"], grid: Grid, *, batch: int = 64
) -> tuple[Float[Tensor, "A L"], Float[Tensor, "A P L"]]:
    """Structure functions of the `ORDERS`, mean over fields.

    Args:
        x: Fields, with any axes in front.
        grid: Of the fields.
        batch: Fields at a time.

    Returns:
        Distances along each axis (the domain's lengths, or kilometres on the globe) and the
        functions, in the fields' units to the power of the order.
    """
    return separations(grid)[0], _mean_moments(x, grid, batch)[:, :-1]


def autocovariance(
    x: Float[Tensor, "*N H W"], grid: Grid, *, mean: float | None = None, batch: int = 64
) -> tuple[Float[Tensor, "A L"], Float[Tensor, "A L"]]:
    """Spatial autocovariance along both axes, mean over fields.

    Args:
        x: Fields, with any axes in front.
        grid: Of the fields.
        mean: Origin of the deviations; the area-weighted mean of all fields if None.
        batch: Fields at a time.

    Returns:
        Distances, the first one zero, and the autocovariance in the fields' units squared.
    """
    area = torch.from_numpy(grid.area()).to(x.device)
    origin = float((x.double() * area).mean()) if mean is None else mean
    deviation = x.double() - origin
    variance = (deviation.square() * area).mean()
    distances = separations(grid)[0]
    zero = torch.zeros(2, 1, dtype=torch.float64)
    products = _mean_moments(deviation, grid, batch)[:, -1]
    return (
        torch.cat([zero, distances], 1),
        torch.cat([variance.expand(2, 1), products], 1),
    )


def _mean_moments(x: Tensor, grid: Grid, batch: int) -> Tensor:
    fields = x.reshape(-1, *x.shape[-2:])
    parts: Sequence[Tensor] = [pair_moments(part, grid).sum(0) for part in fields.split(batch)]
    return torch.stack(list(parts)).sum(0) / len(fields)
