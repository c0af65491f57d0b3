# SPDX-License-Identifier: Apache-2.0
"""NNJA-AI: the NOAA-NASA Joint Archive of observations as parquet tables, since 1979.

Brightband converts the archive from BUFR and keeps it in two public buckets; the package `nnja-ai`
reads its catalogue and loads tables of whole days. These networks, with their tables, can be read:

- `synop` (NC000001), `synop_mobile` (NC000002), `synop_bufr` (NC000101, the same reports in their
  newer form), `metar` (NC000007): surface stations. A METAR has an altimeter setting, from which
  `sp` is computed with the station's elevation.
- `radiosonde` (conv-adpupa-NC002001): the mandatory levels.
- `amsua`, `atms`: brightness temperatures (K); the channel is `sensor_index`, as in Earth2Studio's
  own satellite sources.

Earth2Studio's `NNJAObsConv` reads another form of the archive: NCEP's quality-controlled PrepBUFR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ddo_modulus.data.formats import said
from ddo_modulus.earth2.sources.nnja_tables import NETWORKS, Table, columns, rows, serves
from ddo_modulus.earth2.sources.reports import (
    SCHEMA,
    SURFACE_VARIABLES,
    UPPER_AIR_VARIABLES,
    parse_variable,
)
from ddo_modulus.earth2.sources.source import (
    HALF_HOUR,
    ObservationSource,
    Tolerance,
    Window,
    days_of,
    needed,
    with_description,
)
from ddo_modulus.errors import InputError

MIRRORS = ("gcp_nodd", "gcp_brightband")
DEFAULT_NETWORKS = ("synop", "metar", "radiosonde", "amsua", "atms")


def _satellite_fields() -> list[pa.Field]:
    kinds = {
        "satellite": (pa.string(), "Satellite"),
        "sensor_index": (pa.uint16(), "Channel"),
        "satellite_za": (pa.float32(), "Zenith angle of the satellite, degrees"),
        "solza": (pa.float32(), "Zenith angle of the sun, degrees"),
    }
    return [pa.field(n, k, True, {"description": text}) for n, (k, text) in kinds.items()]


class NnjaSource(ObservationSource):
    """Observations of the NNJA-AI archive, from a bucket or from a local copy.

    Args:
        networks: Keys of `NETWORKS`; a variable is read from each network that has it. None for
            those of SYNOP, METAR, radiosondes, AMSU-A and ATMS that are in the catalogue.
        mirror: The public bucket: `gcp_nodd` or `gcp_brightband`; no account is needed.
        base_path: Folder with a full or partial copy of a bucket, read in place of the bucket.
        catalog_json: File name of the catalogue in `base_path`.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep what was read from a bucket.
        retries: How often to retry after an error of the connection, in addition to the six tries
            of the bucket's client.
        async_timeout: Time limit of a call, in seconds.

    Raises:
        InputError: If a network or the mirror is unknown, or `networks` is empty.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.NnjaSource"
    SCHEMA = with_description(
        pa.schema([*SCHEMA, *_satellite_fields()]),
        quality="NCEP's quality mark: 0 and 1 good, 2 not checked, 3 suspect, 4 to 15 bad",
        elev="Elevation (m) of the station, the upper-air level or the surface in the pixel",
    )

    def __init__(
        self,
        networks: Sequence[str] | None = None,
        mirror: str = MIRRORS[0],
        base_path: str | Path | None = None,
        catalog_json: str = "catalog.json",
        time_tolerance: Tolerance = HALF_HOUR,
        cache: bool = True,
        retries: int = 1,
        async_timeout: float = 3600,
    ) -> None:
        super().__init__(time_tolerance, cache, retries, async_timeout)
        unknown = [name for name in networks or () if name not in NETWORKS]
        if unknown or (networks is not None and not networks):
            raise InputError(
                f"networks: {', '.join(unknown) or 'none'}; choose among {', '.join(NETWORKS)}"
            )
        if mirror not in MIRRORS:
            raise InputError(f"mirror is {mirror!r}; choose {' or '.join(MIRRORS)}")
        self.networks = tuple(DEFAULT_NETWORKS if networks is None else networks)
        self._all_needed = networks is not None
        self.mirror = mirror
        self.base_path = None if base_path is None else Path(base_path)
        self.catalog_json = catalog_json
        self._catalogue: Any = None

    @property
    def _where(self) -> str:
        return f"NNJA-AI ({self.mirror if self.base_path is None else self.base_path})"

    @property
    def _is_whole(self) -> bool:
        return False

    def variables(self) -> tuple[str, ...]:
        """The ids that can be requested; an upper-air `t` stands for `t850` and so on as well."""
        kinds = {NETWORKS[name].kind for name in self.networks}
        return (
            *(SURFACE_VARIABLES if "surface" in kinds else ()),
            *(UPPER_AIR_VARIABLES if "levels" in kinds else ()),
            *(name for name in self.networks if NETWORKS[name].kind == "channels"),
        )

    def _offers(self, variable: str) -> bool:
        parsed = parse_variable(variable)
        if parsed is None or parsed[1] is None or np.isnan(parsed[1]):
            return variable in self.variables()
        return "t" in self.variables()  # a single level, e.g. t850

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        rows, problems = [], []
        for name in self.networks:
            wanted = [v for v in variables if serves(name, v)]
            if not wanted:
                continue
            dataset = self._dataset(name)
            if dataset is None:
                continue
            days = _days(dataset, windows)
            if not len(days):
                index = dataset.manifest.index
                problems.append(f"{name} has {index.min():%Y-%m-%d} to {index.max():%Y-%m-%d}")
                continue
            rows += [self._day(name, dataset, day, wanted) for day in days]
        if not rows:
            reasons = "; ".join(problems) or "the catalogue has no table of these networks"
            raise InputError(
                f"{self._where}: no data for {', '.join(variables)} from {windows[0][0]} to "
                f"{windows[-1][1]}: {reasons}. Choose other times or networks"
            )
        return pd.concat(rows, ignore_index=True)

    def _dataset(self, name: str) -> Table | None:
        """The table of a network with its list of files; None if it is not in the catalogue."""
        nnja = needed("nnja_ai")
        if self._catalogue is None:
            self._catalogue = self._opened(nnja.DataCatalog)
        catalogue, dataset_name = self._catalogue, NETWORKS[name].dataset
        if dataset_name not in catalogue.list_datasets():
            if self._all_needed:
                raise InputError(
                    f"{self._where}: no table {dataset_name} ({name}); it has "
                    f"{', '.join(catalogue.list_datasets())}"
                )
            return None
        dataset = catalogue[dataset_name]
        try:
            # `load_manifest` of the data set itself prints to standard output.
            dataset.manifest = needed("nnja_ai.io").load_manifest(dataset.parquet_root_path)
        except FileNotFoundError as error:
            raise InputError(
                f"{self._where}: no files of {dataset_name} ({error}); copy the folder again"
            ) from error
        return dataset

    def _opened(self, catalogue: Callable[..., Any]) -> Any:  # noqa: ANN401 - untyped package
        options: dict[str, str | None] = {"mirror": self.mirror}
        where = f"the bucket {self.mirror}"
        if self.base_path is not None:
            file = self.base_path / self.catalog_json
            if not file.is_file():
                raise InputError(f"{file}: no such file; give the folder that has the catalogue")
            where = str(file)
            options = {"mirror": None, "base_path": str(self.base_path)}
            options["catalog_json"] = self.catalog_json
        try:
            return catalogue(**options)
        except Exception as error:  # nnja-ai, json, jsonschema and gcsfs raise many
            # nnja-ai wraps an OSError that occurs while it loads the description of a table.
            if self.base_path is None and isinstance(error.__cause__ or error, OSError):
                raise ConnectionError(str(error)) from error  # is retried
            raise InputError(
                f"{where}: not a complete catalogue of NNJA-AI ({type(error).__name__}: "
                f"{error}); copy it again, or choose another mirror"
            ) from error

    def _day(
        self, network: str, table: Table, day: pd.Timestamp, variables: Sequence[str]
    ) -> pd.DataFrame:
        """The observations of a network on one day."""
        names = columns(network, table, variables)
        one = table.sel(time=[day], variables=names)

        def load() -> pd.DataFrame:
            return one.load_dataset(backend="pandas").reset_index(drop=True)

        try:
            if self.base_path is None:
                key = "|".join([table.parquet_root_path, f"{day}", *names])
                values = self._kept_frame(key, load)
            else:
                values = load()
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise InputError(
                f"{self._where}: a file of {table.name} on {day:%Y-%m-%d} cannot be read "
                f"({said(error)}); copy it again"
            ) from error
        return rows(network, table, values, variables)


def _days(table: Table, windows: Sequence[Window]) -> pd.DatetimeIndex:
    """The days of a table that the time windows touch."""
    wanted = {day.tz_localize("UTC") for day in days_of(windows)}
    return pd.DatetimeIndex(sorted(wanted & set(table.manifest.index)))
