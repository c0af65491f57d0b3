# SPDX-License-Identifier: Apache-2.0
"""Backgrounds: forecasts as states in a package's units, with their error covariance.

Axes: ``T`` times, ``E`` members, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.data.source import is_cartesian
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import checked_names
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern, Scaled
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid, resampled
from ddo_modulus.lexicon import check_units
from ddo_modulus.posterior import Background

#: Correlation length of forecast errors, km, and smoothness of their Matérn correlation. This
#: smoothness is that of exponential correlations, with errors of fine scales as large as those
#: scales themselves. Smoother errors would make a forecast most accurate at the finest scales.
LENGTH_KM, SMOOTHNESS = 200.0, 0.5


@dataclass(frozen=True)
class BackgroundConfig:
    """A forecast that is combined with the prior, and its errors.

    Attributes:
        error: Standard deviation of the forecast errors in physical units, one for all channels or
            by channel; or their covariance in the operator's units. For an ensemble of forecasts,
            it is the part of the error that the spread of the members does not represent.
        length: Correlation length of the errors in km; for a box, in units of the box.
        forecast: Forecast valid at each analysis time, in physical units
            (:func:`background_states`). With several members, the members of the posterior use
            them in turn. None for an assimilation model that gets its forecasts at each step.

    Raises:
        InputError: If an error or the length is not positive.
    """

    error: float | Mapping[str, float] | GaussianField
    length: float = LENGTH_KM
    forecast: xr.Dataset | None = None

    def __post_init__(self) -> None:
        if self.error is None:
            raise InputError("a background needs background_error, its standard deviation")
        errors = self.error.values() if isinstance(self.error, Mapping) else [self.error]
        for value in (*errors, self.length):
            if not isinstance(value, GaussianField) and not (np.isfinite(value) and value > 0):
                raise InputError(
                    f"background errors and their length must be positive, got {value}"
                )

    @classmethod
    def of(cls, options: BackgroundConfig | Mapping[str, Any] | None) -> BackgroundConfig | None:
        """The options from such an object or a mapping (JSON, YAML); None stays None.

        Raises:
            InputError: If an option is unknown, or a value is out of range.
        """
        if options is None or isinstance(options, BackgroundConfig):
            return options
        return cls(**{"error": None, **checked_names(cls, options, "background")})

    def field(self, package: Package) -> GaussianField:
        """Error covariance, on the basis of a package's prior."""
        if isinstance(self.error, GaussianField):
            return self.error
        return background_error_field(package, self.error, self.length)

    def to_json(self) -> dict[str, Any]:
        """Error and length for JSON, without the forecast.

        Raises:
            InputError: If the error is a covariance.
        """
        if isinstance(self.error, GaussianField):
            raise InputError("a covariance cannot be saved with the options; give a number")
        plain = self.error
        if isinstance(plain, Mapping):
            plain = {str(k): float(v) for k, v in plain.items()}
        return {"error": plain, "length": self.length}


@dataclass(frozen=True)
class Forecast:
    """Background states of each analysis, and their error covariance.

    Attributes:
        states: ``(T, E, C, H, W)`` normalised, float64.
        error: Error covariance in the operator's units.
    """

    states: Float[Tensor, "T E C H W"]
    error: GaussianField

    def select(self, analyses: slice) -> Forecast:
        """The forecasts of some of the analyses."""
        return Forecast(self.states[analyses], self.error)

    def condition(self, prior: Prior, members: range) -> Background:
        """Condition a prior on the forecasts, for some members of each analysis."""
        states = self.states
        if states.shape[1] > 1:
            states = states[:, [member % states.shape[1] for member in members]]
        return Background(prior, states.flatten(0, 1), self.error)

    def expected(self, noise: GaussianField) -> list[GaussianDenoiser]:
        """A Gaussian for each analysis, with the mean of the forecast, and its error and spread.

        Args:
            noise: Noise field of the prior, on the grid of the analysis.
        """
        error = self.error.at(noise.shape)
        stated = (error.basis.mean_square() * error.variance).sum(1).mean()
        return [
            GaussianDenoiser(
                members.mean(0),
                error,
                noise,
                1.0 + (float(members.var(0).mean() / stated) if len(members) > 1 else 0.0),
            )
            for members in self.states
        ]


def background_states(
    package: Package, forecast: xr.Dataset, times: np.ndarray, grid: Grid
) -> Float[Tensor, "T E C H W"]:
    """States of a forecast at some times, in the units of a package's operator.

    Args:
        package: The package, for channels and statistics.
        forecast: Every channel on ``(time, lat, lon)`` in any order, optionally with ``ensemble``,
            in physical units. It may be on another grid that covers the package's.
        times: UTC.
        grid: Grid of the states, on the package's domain.

    Returns:
        Normalised states, float64; one member if the forecast has no ensemble.

    Raises:
        InputError: If a channel, a time or a value is missing, values are not plausible in the
            units of the lexicon, or the forecast does not cover the grid.
    """
    if missing := [c for c in package.channels if c not in forecast]:
        raise InputError(
            f"the background has no {', '.join(missing)}; it has "
            f"{', '.join(map(str, forecast.data_vars))}"
        )
    axes = {"time", "lat", "lon"}
    fields = forecast[list(package.channels)]
    if absent := axes - set(fields.dims) - ({"time"} if "time" in fields.coords else set()):
        raise InputError(f"the background has no axis {', '.join(sorted(absent))}")
    if "time" not in fields.dims:
        fields = fields.expand_dims("time")
    if "ensemble" not in fields.dims:
        fields = fields.expand_dims("ensemble")
    if more := set(map(str, fields.dims)) - axes - {"ensemble"}:
        raise InputError(
            f"the background has further axes: {', '.join(sorted(more))}; select one index of each"
        )
    available = fields["time"].values.astype("datetime64[ns]")
    for time in times:
        if time not in available:
            raise InputError(
                f"the background has no {pd.Timestamp(time)}; it has {len(available)} times from "
                f"{pd.Timestamp(available.min())} to {pd.Timestamp(available.max())}"
            )
    chosen = fields.isel(time=[int(np.flatnonzero(available == time)[0]) for time in times])
    order = ("time", "ensemble", "lat", "lon")
    values = torch.from_numpy(
        np.stack([chosen[c].transpose(*order).values.astype(float) for c in package.channels], 2)
    )
    if not bool(values.isfinite().all()):
        raise InputError("the background holds values that are NaN or infinite; fill them")
    for channel, one in zip(package.channels, values.unbind(2), strict=True):
        check_units(channel, float(one.min()), float(one.max()), "the background")
    lat, lon = fields["lat"].values, fields["lon"].values
    values = _interpolated(values, lat, lon, is_cartesian(forecast), grid)
    hours = package.hours(np.repeat(times, values.shape[1]))
    statistics = package.statistics_at(grid).to("cpu")
    return statistics.normalize(values.flatten(0, 1), hours).unflatten(0, values.shape[:2])


def _interpolated(
    values: Float[Tensor, "T E C h w"],
    lat: np.ndarray,
    lon: np.ndarray,
    cartesian: bool,
    grid: Grid,
) -> Float[Tensor, "T E C H W"]:
    """Interpolate values to the points of a grid, bilinearly."""
    if cartesian != isinstance(grid, BoxGrid):
        raise InputError(
            "a background in degrees needs a prior in degrees; one on a box, a prior on a box"
        )
    if isinstance(grid, BoxGrid):
        own: Grid = BoxGrid((len(lat), len(lon)), grid.lengths, periodic=grid.periodic)
    else:  # longitudes may start anywhere, and wrap
        middle = 0.5 * (grid.lon[0] + grid.lon[-1])
        turned = (lon - middle + 180) % 360 + middle - 180
        order = np.argsort(turned)
        own = LatLonGrid(lat, turned[order])
        values = values[..., torch.from_numpy(order.copy())]
    try:
        return resampled(values, own, grid)
    except InputError as error:
        raise InputError(f"the background does not cover the analysis: {error}") from None


def background_error_field(
    package: Package,
    error: float | Mapping[str, float],
    length: float = LENGTH_KM,
    smoothness: float = SMOOTHNESS,
) -> GaussianField:
    """Covariance of homogeneous forecast errors, in the units of a package's operator.

    Args:
        package: The package, for basis, channels and statistics.
        error: Standard deviation in physical units, one for all channels or by channel.
        length: Correlation length in km; for a box, in units of the box.
        smoothness: Smoothness of the Matérn correlation.

    Raises:
        InputError: If a channel has no error, or a value is not positive.
    """
    channels = package.channels
    by_channel = dict(error) if isinstance(error, Mapping) else dict.fromkeys(channels, error)
    if missing := [c for c in channels if c not in by_channel]:
        raise InputError(
            f"background_error has no {', '.join(missing)}: give the standard deviation "
            f"of each channel, as {{{missing[0]}:...}}"
        )
    wrong = {c: v for c, v in by_channel.items() if not (np.isfinite(v) and v > 0)}
    if wrong or not (np.isfinite(length) and length > 0):
        raise InputError(
            f"background errors and their length must be positive, got {wrong or length}"
        )
    basis = package.operator.noise.basis
    scale = package.normalization.std.double().square().mean((0, 2, 3)).cpu().tolist()
    variance = [by_channel[c] ** 2 / s for c, s in zip(channels, scale, strict=True)]
    units = length
    if isinstance(package.grid, LatLonGrid):  # the basis of a region is in units of 1000 km
        units = length / (EARTH_RADIUS_KM if package.grid.is_global else 1000.0)
    spectrum = Scaled.with_variance(basis, Matern(units, smoothness), variance)
    return GaussianField(basis, spectrum)
