# SPDX-License-Identifier: Apache-2.0
"""Observations from the NNJA-AI archive, ready to be assimilated.

The archive lies in public buckets. Without a network, or to try things out, a folder in the same
layout does as well; without arguments, one with a day of eight stations is written and read
through the archive's own client:

    python examples/02_observations_nnja.py
    python examples/02_observations_nnja.py --path /data/nnja-ai --time 2021-01-01T12:00
    python examples/02_observations_nnja.py --mirror gcp_nodd --time 2021-01-01T12:00

The observations go to ``outputs/observations_nnja.csv``.
"""

from __future__ import annotations

import argparse
import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from ddo_modulus.earth2.sources import NnjaSource
from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table

OUT = Path("outputs")
VARIABLES = ["t2m", "d2m", "u10m", "v10m", "sp", "msl"]
BAD_MARK = 4  # NCEP's quality marks from here on mean that a value is not to be used

# Invented: WMO number, latitude, longitude, height, temperature at noon (K).
STATIONS = """\
station,lat,lon,height,noon
03772,51.48,-0.45,25,285.3
03535,52.42,-1.83,97,284.4
03334,53.36,-2.28,69,284.0
03839,50.74,-3.41,27,284.9
03160,55.95,-3.35,41,283.2
03091,57.20,-2.20,65,282.7
03917,54.66,-6.22,68,283.6
03969,53.43,-6.25,71,284.1
"""


def invented_day(day: str) -> pd.DataFrame:
    """Hourly SYNOP reports in the columns of the archive's table NC000001."""
    stations = pd.read_csv(StringIO(STATIONS), dtype={"station": str})
    hours = pd.DataFrame({"hour": range(24)})
    reports = stations.merge(hours, how="cross")
    random = np.random.default_rng(0)
    size = len(reports)
    cycle = 3 * (np.cos(2 * np.pi * (reports["hour"] - 14) / 24) - np.cos(np.pi / 6))
    temperature = reports["noon"] + cycle + 0.3 * random.standard_normal(size)
    table = pd.DataFrame(
        {
            "OBS_TIMESTAMP": pd.Timestamp(day, tz="UTC")
            + pd.to_timedelta(reports["hour"], unit="h"),
            "LAT": reports["lat"],
            "LON": reports["lon"],
            "SELV": reports["height"].astype(float),
            "RPID": reports["station"],
            "TMPSQ1.TMDB": temperature,
            "TMPSQ1.TMDP": temperature - random.uniform(1, 6, size),
            "TMPSQ1.QMAT": 2.0,
            "TMPSQ1.QMDD": 2.0,
            "WNDSQ1.WSPD": random.gamma(4, 1.2, size),
            "WNDSQ1.WDIR": random.normal(245, 20, size) % 360,
            "WNDSQ1.QMWN": 2.0,
            "PRSSQ1.PRES": 102_800 - 12 * reports["height"] + 40 * random.standard_normal(size),
            "PRSSQ1.QMPR": 2.0,
        }
    )
    noon = reports.index[reports["hour"] == 12]
    table.loc[noon[0], "WNDSQ1.WDIR"] = 1e11  # the archive's mark of what is missing
    table.loc[noon[7], ["TMPSQ1.TMDB", "TMPSQ1.QMAT"]] = 384.1, 13.0  # seen and marked by NCEP
    return table


def write_archive(folder: Path, day: str) -> None:
    """Write a folder that `nnja_ai.DataCatalog` reads as it reads the buckets."""
    name, root = "conv-adpsfc-NC000001", "conv/adpsfc/NC000001"
    table = invented_day(day)
    parquet = folder / root / f"OBS_DATE={day}" / f"gdas.{day.replace('-', '')}.NC000001.parquet"
    parquet.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(parquet)
    words = {"description": "Synoptic, fixed land (invented)", "tags": ["surface"]}
    variables = [{"id": c, "description": c, "category": "primary data"} for c in table.columns]
    dataset = {"name": name, **words, "parquet_root_path": root, "dimensions": []}
    (folder / root / "dataset.json").write_text(json.dumps(dataset | {"variables": variables}))
    entry = {"name": "NC000001", **words, "json": f"{root}/dataset.json"}
    catalogue = {name: {"description": name, "datasets": {"NC000001": entry}}}
    (folder / "catalog.json").write_text(json.dumps(catalogue))


def main() -> int:
    """Find an archive, read it as a source of Earth2Studio, write a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--path", type=Path, help="folder with catalog.json")
    where.add_argument("--mirror", choices=("gcp_nodd", "gcp_brightband"), help="a bucket")
    parser.add_argument("--time", default="2019-03-27T12:00", help="UTC")
    parser.add_argument("--tolerance", type=int, default=30, help="minutes, either way")
    options = parser.parse_args()
    console = Console()

    within = np.timedelta64(options.tolerance, "m")
    if options.mirror:
        source = NnjaSource(mirror=options.mirror, time_tolerance=within)
    else:
        folder = options.path or OUT / "nnja"
        if options.path is None:
            write_archive(folder, options.time[:10])
            console.print(f"Wrote an archive of a day and eight invented stations, {folder}.")
        source = NnjaSource(base_path=folder, time_tolerance=within)

    try:
        observations = source(np.datetime64(options.time), VARIABLES)
    except InputError as error:
        console.print(f"[red]{error}", soft_wrap=True)
        return 2

    table = Table("variable", "observations", "marked bad", "least", "most", title=options.time)
    bad = observations["quality"].fillna(0) >= BAD_MARK
    for variable, rows in observations.groupby("variable"):
        low, high = rows["observation"].quantile([0, 1])
        marked = str(int(bad[rows.index].sum()))
        table.add_row(str(variable), f"{len(rows):,}", marked, f"{low:.6g}", f"{high:.6g}")
    console.print(table)

    # Sources pass on what was reported, with the provider's marks; what to do with it is for the
    # user of the observations to say. Here: believe NCEP, and the table's own checks.
    checked = read_table(observations[~bad])
    path = OUT / "observations_nnja.csv"
    path.parent.mkdir(exist_ok=True)
    checked.frame.to_csv(path, index=False)
    console.print(
        f"See {path}. Next, temperatures over the United Kingdom from these stations:\n"
        f"  ddo assimilate package=uk_t2m observations={path} out=outputs/uk_t2m_nnja.zarr",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
