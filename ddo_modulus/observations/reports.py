# SPDX-License-Identifier: Apache-2.0
"""From the rows of an observation table to operators on a prior's states.

Axes: ``H W`` grid, ``M`` observations.

| variable | read from the channels | with the columns |
|---|---|---|
| any channel | itself | |
| `t2m` | itself, with the lapse rate from the model's surface to the station | `elev` |
| `sp` | `sp`, or `msl`, hydrostatically to the station (with `t2m` if there) | `elev` |
| `msl` | itself, or `sp` from the model's surface down to the sea | |
| `d2m`, `r2m`, `q2m` | itself, or `d2m`; `q2m` and pressure; `r2m` and `t2m` | |
| `ws10m`, `wd10m` | `u10m` and `v10m`; other heights alike | |
| `t`, `u`, `v`, `w`, `z`, `q`, `r`, `ws`, `wd` | the levels around a pressure | `pres` |
| `t700` and so on | the levels around 700 hPa | |
| a sensor, as `amsua` | levels of temperature, or what its model takes | `sensor_index` |

`elev` is the height of the station above sea level, in metres (`station_elev` where that is
missing), `pres` a pressure in Pa, `sensor_index` the number of the satellite's channel: columns of
Earth2Studio. Where either the station's height or the model's is unknown, there is no correction
for height; :meth:`ReportOperators.notes` counts such reports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ddo_modulus.constants import LAPSE_RATE
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, check_orography
from ddo_modulus.observations.algebra import (
    DerivedOperator,
    LinearOperator,
    ObservationOperator,
    PointOperator,
    StackedOperator,
    combined,
    joined,
)
from ddo_modulus.observations.atmosphere import standard_pressure, standard_temperature
from ddo_modulus.observations.radiance import (
    AMSU_A_PEAKS,
    ATMS_PEAKS,
    LinearRadiance,
    ProfileOperator,
    Radiance,
    sounding,
)
from ddo_modulus.observations.surface import (
    humidity,
    pressure_at,
    temperature_at,
    wind_direction,
    wind_speed,
)
from ddo_modulus.observations.typical import ALOFT, LEVEL, column, pressures, station_heights
from ddo_modulus.observations.upper_air import LevelOperator, between

UNKNOWN = "unknown variable"

_WIND = re.compile(r"(ws|wd)(\d+m)")
_MOIST = re.compile(r"([dqr])2m")


@dataclass(frozen=True)
class ReportOperators:
    """Operators that predict reports from a prior's states.

    Attributes:
        channels: Variable ids of the states' channels.
        grid: Where the states live.
        orography: ``(H, W)`` height of the model's surface above sea level, m; None if unknown.
        lapse_rate: Fall of temperature from the model's surface to a station, K/m; that of the
            standard atmosphere (6.5 K/km) by default.
        radiances: Brightness temperatures by the name of the sensor; `amsua` and `atms` are built
            in (:func:`.radiance.sounding`, on the levels of temperature) unless they are here.

    Raises:
        InputError: If the orography does not fit the grid or has impossible heights, or a
            radiance takes what is no channel.
    """

    channels: Sequence[str]
    grid: Grid
    orography: np.ndarray | None = None
    lapse_rate: float = LAPSE_RATE
    radiances: Mapping[str, Radiance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not -0.01 <= self.lapse_rate <= 0.02:
            raise InputError(
                f"a lapse rate of {self.lapse_rate:g} K/m cannot be right; the usual one is 0.0065"
            )
        for sensor, radiance in self.radiances.items():
            if missing := [name for name in radiance.inputs if name not in self.channels]:
                raise InputError(
                    f"the brightness temperatures of {sensor} need {', '.join(missing)}; the "
                    f"prior has {', '.join(self.channels)}"
                )
        levels = {name: level / 100 for level, name in self._named("t").items()}
        surface = next((name for name in ("skt", "t2m") if name in self.channels), None)
        peaks = {"amsua": AMSU_A_PEAKS, "atms": ATMS_PEAKS} if levels else {}
        built_in = {name: sounding(levels, p, surface=surface) for name, p in peaks.items()}
        object.__setattr__(self, "radiances", {**built_in, **self.radiances})
        if self.orography is not None:
            heights = check_orography(self.orography, self.grid, "the orography")
            object.__setattr__(self, "orography", heights)

    def observable(self, variable: str) -> bool:
        """Whether some reports of a variable can be predicted from the states."""
        return self._refusal(variable, None) != UNKNOWN

    def refused(self, rows: pd.DataFrame) -> pd.Series:
        """Why each row of a table cannot be used, empty where it can; places are not checked."""
        reason = pd.Series("", rows.index, dtype=object)
        for variable, part in rows.groupby("variable"):
            reason[part.index] = self._refusal(str(variable), part)
        return reason

    def notes(self, rows: pd.DataFrame) -> dict[str, int]:
        """Remarks on rows that are used: how many have no correction for height."""
        counts: dict[str, int] = {}
        for variable in ("t2m", "sp"):
            if variable in self.channels:
                part = rows[rows["variable"] == variable]
                unknown = (
                    len(part) if self.orography is None else int(station_heights(part).isna().sum())
                )
                if unknown:
                    counts[f"{variable} without correction for height"] = unknown
        return counts

    def operator(self, rows: pd.DataFrame) -> tuple[ObservationOperator, pd.DataFrame]:
        """Operator of the rows of one analysis.

        Args:
            rows: Of a checked table, all of them usable (:meth:`refused`) and in the grid.

        Returns:
            The operator, and the rows in its order: those that are linear in the state first.

        Raises:
            InputError: If a row cannot be used.
        """
        if (reason := self.refused(rows)).any():
            raise InputError(f"{int((reason != '').sum())} reports: {reason[reason != ''].iloc[0]}")
        linear: list[tuple[LinearOperator, pd.DataFrame]] = []
        others: list[tuple[ObservationOperator, pd.DataFrame]] = []
        for variable, part in rows.groupby("variable", sort=False):
            operator = self._operator(str(variable), part)
            if isinstance(operator, LinearOperator):
                linear.append((operator, part))
            else:
                others.append((operator, part))
        operators = [operator for operator, _ in others]
        if linear:
            operators.insert(0, joined([operator for operator, _ in linear]))
        ordered = pd.concat([part for _, part in (*linear, *others)])
        return operators[0] if len(operators) == 1 else StackedOperator(*operators), ordered

    # ---- which reports can be used ---------------------------------------------------------------

    def _refusal(self, variable: str, rows: pd.DataFrame | None) -> str | np.ndarray:
        """Reason for each row, or one for all; without rows, whether any may be usable."""
        if variable in self.radiances:
            channels = self.radiances[variable].channels
            if not channels:
                return UNKNOWN
            channel = np.asarray([channels[0]] if rows is None else column(rows, "sensor_index"))
            return np.where(np.isin(channel, channels), "", "satellite channel not modelled")
        if variable in self.channels:
            return ""
        if variable == "sp" and "msl" in self.channels:
            if rows is None:
                return ""
            return np.where(station_heights(rows).isna(), "no height of the station", "")
        if variable == "msl" and "sp" in self.channels and self.orography is not None:
            return ""
        if match := _WIND.fullmatch(variable):
            parts = {f"u{match[2]}", f"v{match[2]}"}
            return "" if parts <= set(self.channels) else UNKNOWN
        if match := _MOIST.fullmatch(variable):
            return UNKNOWN if self._moisture_source(match[1]) is None else ""
        if (match := ALOFT.fullmatch(variable)) and (sources := self._upper_sources(match[1])):
            if rows is None:
                return ""
            pressure = pressures(rows, match[2])
            inside = np.all([between(list(self._levels(s)), pressure) for s in sources], axis=0)
            outside = np.where(np.isnan(pressure), "no pressure", "outside the pressure levels")
            return np.where(inside, "", outside)
        return UNKNOWN

    def _levels(self, family: str) -> dict[float, int]:
        """Pressures (Pa) of a variable's levels, and their channels."""
        return {p: self.channels.index(name) for p, name in self._named(family).items()}

    def _named(self, family: str) -> dict[float, str]:
        levels = {}
        for name in self.channels:
            if match := re.fullmatch(rf"{family}{LEVEL}", name):
                levels[100.0 * float(match[1])] = name
        return levels

    def _upper_sources(self, family: str) -> tuple[str, ...]:
        """Variables on levels that a report aloft is read from; none if there are not enough."""
        ways: dict[str, tuple[tuple[str, ...], ...]] = {
            "ws": (("u", "v"),),
            "wd": (("u", "v"),),
            "q": (("q",), ("r", "t")),
            "r": (("r",), ("q", "t")),
        }
        for way in ways.get(family, ((family,),)):
            if all(self._named(source) for source in way):
                return way
        return ()

    def _moisture_source(self, report: str) -> str | None:
        """Kind of humidity at two metres that a report of another kind is read from."""
        pressure = "sp" in self.channels or self.orography is not None
        for source in ("d", "q", "r"):
            kinds = {source, report}
            if (
                f"{source}2m" in self.channels
                and ("r" not in kinds or "t2m" in self.channels)
                and ("q" not in kinds or pressure)
            ):
                return source
        return None

    # ---- their operators -------------------------------------------------------------------------

    def _operator(self, variable: str, rows: pd.DataFrame) -> ObservationOperator:
        if variable in self.radiances:
            return self._radiance(self.radiances[variable], rows)
        if variable == "t2m" and variable in self.channels:
            return temperature_at(self._points("t2m", rows), self._rise(rows), self.lapse_rate)
        if variable == "sp":
            return self._station_pressure(rows)
        if variable in self.channels:
            return self._points(variable, rows)
        if variable == "msl":
            ground = self._ground(rows)
            return pressure_at(
                self._points("sp", rows), -ground, self._warmth(rows, ground), self.lapse_rate
            )
        if match := _WIND.fullmatch(variable):
            kind, height = match.groups()
            return self._wind(kind, lambda c: self._points(f"{c}{height}", rows), rows)
        if match := _MOIST.fullmatch(variable):
            return self._moisture(match[1], rows)
        match = ALOFT.fullmatch(variable)
        assert match is not None
        return self._aloft(match[1], pressures(rows, match[2]), rows)

    def _points(self, channel: str, rows: pd.DataFrame) -> LinearOperator:
        return PointOperator(self.grid, rows["lat"], rows["lon"], self.channels.index(channel))

    def _ground(self, rows: pd.DataFrame) -> Tensor:
        """Height of the model's surface at the reports; NaN if unknown."""
        if self.orography is None:
            return torch.full((len(rows),), torch.nan, dtype=torch.float64)
        index, weight = self.grid.bilinear(rows["lat"], rows["lon"])
        return torch.from_numpy((self.orography.reshape(-1)[index] * weight).sum(-1))

    def _rise(self, rows: pd.DataFrame) -> Tensor:
        """From the model's surface up to the stations, m; zero where unknown."""
        rise = torch.from_numpy(station_heights(rows).to_numpy(copy=True)) - self._ground(rows)
        return rise.nan_to_num(0.0)

    def _warmth(self, rows: pd.DataFrame, ground: Tensor) -> LinearOperator | Tensor:
        """Temperature at the model's surface; the standard atmosphere's if the prior has none."""
        if "t2m" in self.channels:
            return self._points("t2m", rows)
        return standard_temperature(ground.nan_to_num(0.0))

    def _station_pressure(self, rows: pd.DataFrame) -> LinearOperator | DerivedOperator:
        ground = self._ground(rows)
        if "sp" in self.channels:
            rise = self._rise(rows)
            pressure = self._points("sp", rows)
            if not bool(rise.any()):
                return pressure
            return pressure_at(pressure, rise, self._warmth(rows, ground), self.lapse_rate)
        # From the sea up; the temperature there continues the one at the model's surface.
        heights = torch.from_numpy(station_heights(rows).to_numpy(copy=True))
        warmth: LinearOperator | Tensor = standard_temperature(torch.zeros(len(rows)).double())
        if "t2m" in self.channels and self.orography is not None:
            warmth = temperature_at(self._points("t2m", rows), -ground, self.lapse_rate)
        return pressure_at(self._points("msl", rows), heights, warmth, self.lapse_rate)

    def _wind(
        self, kind: str, component: Callable[[str], LinearOperator], rows: pd.DataFrame
    ) -> DerivedOperator:
        u, v = component("u"), component("v")
        if kind == "ws":
            return wind_speed(u, v)
        return wind_direction(u, v, torch.from_numpy(rows["observation"].to_numpy(copy=True)))

    def _moisture(self, report: str, rows: pd.DataFrame) -> DerivedOperator:
        source = self._moisture_source(report)
        assert source is not None
        warmth = self._points("t2m", rows) if "t2m" in self.channels else None
        pressure: LinearOperator | Tensor | None = None
        if "sp" in self.channels:
            pressure = self._points("sp", rows)
        elif self.orography is not None:
            pressure = standard_pressure(self._ground(rows))
        moisture = self._points(f"{source}2m", rows)
        return humidity(report, source, moisture, warmth, pressure)  # type: ignore[arg-type]

    def _aloft(
        self, family: str, pressure: np.ndarray, rows: pd.DataFrame
    ) -> LinearOperator | DerivedOperator:
        def at(source: str) -> LinearOperator:
            levels = self._levels(source)
            return LevelOperator(self.grid, levels, rows["lat"], rows["lon"], pressure)

        if family in ("ws", "wd"):
            return self._wind(family, at, rows)
        sources = self._upper_sources(family)
        if sources == (family,):
            return at(family)
        source, level = sources[0], torch.from_numpy(pressure)
        return humidity(family, source, at(source), at("t"), level)  # type: ignore[arg-type]

    def _radiance(self, radiance: Radiance, rows: pd.DataFrame) -> ObservationOperator:
        channel = column(rows, "sensor_index").astype(int)
        if isinstance(radiance, LinearRadiance):
            names = radiance.inputs
            weight = np.array([[radiance.weights[c].get(n, 0.0) for n in names] for c in channel])
            offset = np.array([radiance.offset.get(int(c), 0.0) for c in channel])
            parts = [self._points(name, rows) for name in names]
            return combined(parts, list(torch.from_numpy(weight.T)), torch.from_numpy(offset))
        # Channels of one view share its profile.
        view = ["lat", "lon", *radiance.columns]
        if missing := [c for c in radiance.columns if c not in rows]:
            raise InputError(f"the brightness temperatures need the columns {', '.join(missing)}")
        place = rows.groupby(view, sort=False, dropna=False).ngroup().to_numpy()
        views = rows.iloc[np.unique(place, return_index=True)[1]]
        columns = views[list(radiance.columns)].to_numpy(float)
        if not np.isfinite(columns).all():
            raise InputError(f"values of the columns {', '.join(radiance.columns)} are missing")
        output = {c: k for k, c in enumerate(radiance.channels)}
        return ProfileOperator(
            radiance.function,
            [self._points(name, views) for name in radiance.inputs],
            torch.tensor(place),
            torch.tensor([output[int(c)] for c in channel]),
            torch.tensor(columns),
        )
