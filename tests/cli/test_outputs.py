# SPDX-License-Identifier: Apache-2.0
"""No command deletes what is not its own, with overwrite=true either."""

import shutil

import pytest


@pytest.fixture
def own(files, tmp_path):
    """Copies of a table and a store, and a folder of something else."""
    table = tmp_path / "reports.parquet"
    shutil.copy(files.table, table)
    shutil.copy(files.truth, tmp_path / "truth.nc")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    return tmp_path


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


CASES = {
    "a report in place of the truth": (
        "verify",
        {"samples": "truth.nc", "truth": "truth.nc", "out": "truth.nc"},
        "is read by this command",
    ),
    "a report in place of a thesis": (
        "verify",
        {"samples": "truth.nc", "truth": "truth.nc", "out": "thesis"},
        "is not a report of `ddo verify`",
    ),
    "rejected reports in place of the table": (
        "assimilate",
        {"observations": "reports.parquet", "rejected": "reports.parquet", "out": "x.zarr"},
        "is read by this command",
    ),
    "rejected reports in place of the analysis": (
        "assimilate",
        {"observations": "reports.parquet", "rejected": "x.csv", "out": "x.csv"},
        "give the table a name of its own",
    ),
    "an analysis in place of the table": (
        "assimilate",
        {"observations": "reports.parquet", "out": "reports.parquet"},
        "reports.parquet",
    ),
    "a training store in place of its source": (
        "prepare",
        {"source": "truth.nc", "out": "truth.nc"},
        "is read by this command",
    ),
    "an engine in place of a thesis": (
        "export",
        {"out": "thesis"},
        "is not a folder of `ddo export`",
    ),
    "a film in place of a thesis": (
        "animate",
        {"dataset": "truth.nc", "out": "thesis"},
        "is not a file",
    ),
    "samples in place of a thesis": (
        "generate",
        {"out": "thesis", "time": "2019-03-27T12"},
        "is not a zarr store",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_is_deleted(case, ddo, files, own):
    command, keys, message = CASES[case]
    places = {"out", "observations", "rejected", "samples", "truth", "source", "dataset"}
    keys = {k: own / v if k in places else v for k, v in keys.items()}
    if command in ("assimilate", "export", "generate"):
        keys["package"] = files.package
    before = contents(own)
    result = ddo(command, **keys, overwrite="true")
    assert result.status == 2 and message in result.err
    assert result.err.count("\n") == 1
    assert contents(own) == before
