# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

from ddo_modulus.diffusion.package import Package

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import guidance_interval

    yield guidance_interval
    del sys.modules["guidance_interval"]


def test_what_a_package_does_is_compared_once(benchmark):
    names = benchmark.methods(Package.load("kolmogorov64"))
    assert "as packaged" in names and "1 from 0.2 to 20" not in names
    assert {"none", "1 at all levels", "2 from 0.2 to 20", "1 from 0.4 to 10"} <= names.keys()


@pytest.mark.slow
def test_the_table(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "INTERVALS", [])
    out = tmp_path / "table.md"
    arguments = ["--analyses", "1", "--members", "2", "--observations", "50", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["guidance_interval.py", *arguments])
    benchmark.main()
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| 50")]
    assert [(row[1], int(row[2])) for row in rows] == [
        ("as packaged", 50),
        ("none", 24),
        ("1 at all levels", 72),
        ("2 at all levels", 120),
    ]
    assert all(0.2 < float(row[3]) < 2 for row in rows)
