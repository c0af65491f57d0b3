# SPDX-License-Identifier: Apache-2.0
"""Parts of real BUFR files, and an archive in NNJA-AI's layout written from one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A temporary folder as Earth2Studio's cache."""
    pytest.importorskip("earth2studio")
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EARTH2STUDIO_DATA_CACHE", str(folder))
        yield folder


def part_of(source: Path, target: Path, messages: int) -> Path:
    """The first messages of a BUFR file."""
    import eccodes

    sizes = list(eccodes.codes_extract_offsets_sizes(str(source), eccodes.CODES_PRODUCT_BUFR))
    offset, size = sizes[messages - 1]
    target.write_bytes(source.read_bytes()[: offset + size])
    return target


@pytest.fixture(scope="session")
def synop_file(shared_data, tmp_path_factory):
    """150 SYNOP reports of two generations of templates; one has a wind of 349 m/s."""
    folder = tmp_path_factory.mktemp("synop")
    return part_of(shared_data / "pdbufr_perf_synop.bufr", folder / "synop.bufr", 300)


@pytest.fixture(scope="session")
def sounding_file(shared_data, tmp_path_factory):
    """The messages of some 20 radiosondes."""
    folder = tmp_path_factory.mktemp("soundings")
    return part_of(shared_data / "pdbufr_temp.bufr", folder / "temp.bufr", 40)


class Archive:
    """Writes tables and a catalogue in the layout of the buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalogue: dict = {}

    def add(self, dataset: str, table: pd.DataFrame, dimensions=(), variables=None) -> None:
        """A table of one network; a file for each day."""
        root = Path(*dataset.split("-"))
        days = pd.to_datetime(table["OBS_TIMESTAMP"]).dt.strftime("%Y-%m-%d")
        for day, rows in table.groupby(days):
            path = self.folder / root / f"OBS_DATE={day}"
            path.mkdir(parents=True)
            rows.to_parquet(path / f"gdas.{day.replace('-', '')}.{root.name}.parquet")
        common = {"description": dataset, "category": "primary data"}
        description = {
            "name": dataset,
            "description": dataset,
            "tags": [],
            "parquet_root_path": str(root),
            "dimensions": list(dimensions),
            "variables": [common | v for v in variables or [{"id": c} for c in table.columns]],
        }
        (self.folder / root / "dataset.json").write_text(json.dumps(description))
        entry = {"name": root.name, "description": dataset, "tags": []}
        entry["json"] = f"{root}/dataset.json"
        self.catalogue[dataset] = {"description": dataset, "datasets": {root.name: entry}}
        (self.folder / "catalog.json").write_text(json.dumps(self.catalogue))


@pytest.fixture
def archive(tmp_path):
    """An empty archive."""
    return Archive(tmp_path / "archive")


@pytest.fixture(scope="session")
def synop_reports(synop_file):
    """The reports of the SYNOP file, decoded."""
    from ddo_modulus.earth2.sources.bufr import read_synop

    return read_synop(synop_file)


@pytest.fixture(scope="session")
def synop_archive(synop_reports, tmp_path_factory):
    """The reports of the SYNOP file as a table of NNJA-AI, and the archive's folder."""
    reports = synop_reports
    names = "lat lon elev t td speed direction p msl t_quality".split()
    value = {name: pd.to_numeric(reports[name]).to_numpy(float) for name in names}
    missing = 1e11
    table = pd.DataFrame(
        {
            "OBS_TIMESTAMP": reports["time"].astype("datetime64[ns]").dt.tz_localize("UTC"),
            "LAT": value["lat"],
            "LON": value["lon"],
            "SELV": value["elev"],
            "RPID": reports["station"],
            "TMPSQ1.TMDB": np.nan_to_num(value["t"], nan=missing),
            "TMPSQ1.TMDP": np.nan_to_num(value["td"], nan=missing),
            "TMPSQ1.QMAT": np.where(value["t_quality"] < 60, 3.0, 2.0),
            "TMPSQ1.QMDD": np.nan,
            "WNDSQ1.WSPD": np.nan_to_num(value["speed"], nan=missing),
            "WNDSQ1.WDIR": np.nan_to_num(value["direction"], nan=missing),
            "WNDSQ1.QMWN": 2.0,
            "PRSSQ1.PRES": value["p"],
            "PRSSQ1.PMSL": value["msl"],
            "PRSSQ1.QMPR": 2.0,
            "TOCC": 0.0,
        }
    )
    # A second day, so that selection within a day is tested.
    later = table.assign(OBS_TIMESTAMP=table["OBS_TIMESTAMP"] + pd.Timedelta("14h"))
    archive = Archive(tmp_path_factory.mktemp("archive"))
    archive.add("conv-adpsfc-NC000001", pd.concat([table, later], ignore_index=True))
    return archive.folder, table
