# SPDX-License-Identifier: Apache-2.0
"""Backgrounds: forecasts in physical units as states of a package, with their errors.

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

#: Correlation length of forecast errors, km, and smoothness: exponential correlations, whose fine
#: scales are as uncertain as those of the fields themselves. Smoother errors claim that a forecast
#: knows the fine scales best of all.
LENGTH_KM, SMOOTHNESS = 200.0, 0.5


@dataclass(frozen=True)
class BackgroundConfig:
    """A forecast as prior information beside what the prior has learned, and its errors.

    Attributes:
        error: Standard deviation of its errors in physical units, one for all channels or by
            channel; or their covariance in the operator's units. Of an ensemble of forecasts, the
            errors that its members do not show (:mod:`ddo_modulus.posterior.background`).
        length: Correlation length of the errors, km; of a box, in its own units.
        forecast: Forecast valid at each analysis time, in physical units
            (:func:`background_states`). Of several members each is that of a posterior member, in
            turn. A model that is handed its forecasts later leaves it out.

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
        """The options as one object, from itself or a mapping (JSON, YAML); None stays None.

        Raises:
            InputError: If there is no such option, or a value is out of range.
        """
        if options is None or isinstance(options, BackgroundConfig):
            return options
        return cls(**{"error": None, **checked_names(cls, options, "background")})

    def field(self, package: Package) -> GaussianField:
        """Covariance of the errors, on the basis of a package's prior."""
        if isinstance(self.error, GaussianField):
            return self.error
        return background_error_field(package, self.error, self.length)

    def to_json(self) -> dict[str, Any]:
        """Error and length for JSON, without the forecast."""
        if isinstance(self.error, GaussianField):
            raise InputError("a covariance cannot be saved with the options; give a number")
        plain = self.error
        if isinstance(plain, Mapping):
            plain = {str(k): float(v) for k, v in plain.items()}
        return {"error": plain, "length": self.length}


@dataclass(frozen=True)
class Forecast:
    """Background states of each analysis and the covariance of their errors.

    Attributes:
        states: Normalised, ``(T, E, C, H, W)`` float64.
        error: In the operator's units.
    """

    states: Float[Tensor, "T E C H W"]
    error: GaussianField

    def select(self, analyses: slice) -> Forecast:
        """Those of some of the analyses."""
        return Forecast(self.states[analyses], self.error)

    def condition(self, prior: Prior, members: range) -> Background:
        """A prior given the forecasts of some members of each analysis."""
        states = self.states
        if states.shape[1] > 1:
            states = states[:, [member % states.shape[1] for member in members]]
        return Background(prior, states.flatten(0, 1), self.error)

    def expected(self, noise: GaussianField) -> list[GaussianDenoiser]:
        """For each analysis a Gaussian of the forecast's mean, error and spread.

        Args:
            noise: Of the prior, on the grid of the analysis.
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
    """States of a forecast at given times, in the units of a package's operator.

    Args:
        package: Names the channels.
        forecast: Every channel on ``(time, lat, lon)`` in any order, or on ``ensemble`` too, in
            physical units. It may be on another grid that covers the package's.
        times: UTC.
        grid: Where the states are wanted, on the package's domain.

    Returns:
        Normalised states, float64; one member if the forecast has no ensemble.

    Raises:
        InputError: If a channel or a time is missing, values are, or are not in the lexicon's
            units, or the forecast does not cover the grid.
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
        raise InputError(f"the background has the axes {', '.join(sorted(more))} besides; choose")
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
    """Values on the points of a grid, bilinear."""
    if cartesian != isinstance(grid, BoxGrid):
        raise InputError(
            "a background in degrees is for a prior in degrees, one on a box for a box"
        )
    if isinstance(grid, BoxGrid):
        own: Grid = BoxGrid((len(lat), len(lon)), grid.lengths, periodic=grid.periodic)
    else:  # longitudes of any branch, also across its seam
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
    """Homogeneous errors of a forecast, in the units of a package's operator.

    Args:
        package: Gives basis, channels and scales.
        error: Standard deviation in physical units, one for all channels or by channel.
        length: Correlation length in km; of a box, in its own units.
        smoothness: Of the Matérn correlation.

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
    if isinstance(package.grid, LatLonGrid):  # the box of a region is measured in 1000 km
        units = length / (EARTH_RADIUS_KM if package.grid.is_global else 1000.0)
    spectrum = Scaled.with_variance(basis, Matern(units, smoothness), variance)
    return GaussianField(basis, spectrum)
