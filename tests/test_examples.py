# SPDX-License-Identifier: Apache-2.0
"""The demo and the README's example run as a reader would run them."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import xarray as xr

ROOT = Path(__file__).parents[1]
METHODS = ("interpolation", "super-resolution")


def run(folder, *arguments, **environment):
    """What Python writes when it is run in a folder."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        # One thread, since other tests run beside this one.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output of a small demo, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("demo")
    small = ["--members", "2", "--steps", "2", "--spin-up", "1"]
    return run(folder, str(ROOT / "examples" / "01_demo.py"), *small), folder


@pytest.mark.slow
def test_demo_prints_a_row_for_each_analysis(demo):
    text, _ = demo
    assert "3,973 unobserved points" in text
    for label in ("climatology", "optimal interpolation", "diffusion posterior"):
        row = re.search(rf"{label}\s+2((?:\s+[\d.]+){{4}})", text)
        assert row, text
        error, spread, ratio, crps = map(float, row[1].split())
        assert 0 < crps < error < 2
        assert ratio == pytest.approx(1.5**0.5 * spread / error, rel=0.05, abs=0.006)


@pytest.mark.slow
def test_demo_writes_what_it_names_and_nothing_else(demo):
    text, folder = demo
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    names = {"analysis.png", "ranks.png", "spectra.png", "stations.csv"}
    assert written == {f"outputs/demo/{name}" for name in names}
    for path in written:
        assert path in text
        start = (folder / path).read_bytes()[:8]
        assert path.endswith("csv") or start == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_command_that_the_demo_proposes_runs(demo, monkeypatch):
    from ddo_modulus.cli.main import main

    text, folder = demo
    command = re.search(r"^ +ddo (.+)$", text, re.M)
    assert command, text
    monkeypatch.chdir(folder)
    assert main([*command[1].split(), "ensemble=2", "posterior.steps=2"]) == 0
    assert (folder / "outputs" / "uk_t2m.zarr").is_dir()


OBSERVATIONS = ("02_observations_nnja", "03_observations_ecmwf")
# One after the other in one process: importing Earth2Studio takes longer than all the rest.
RUN_ALL = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def observations(tmp_path_factory):
    """Output of the examples of observations, and the folder they ran in."""
    for package in ("earth2studio", "nnja_ai", "pdbufr"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("observations")
    scripts = [str(ROOT / "examples" / f"{name}.py") for name in OBSERVATIONS]
    environment = {"EARTH2STUDIO_DATA_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return run(folder, "-c", RUN_ALL, *scripts, **environment, COLUMNS="100"), folder


@pytest.mark.slow
def test_observations_are_read_back_as_they_were_written(observations):
    text, folder = observations
    assert re.findall(r"t2m +\S (\d+) +\S ([\d.]+) +\S", text) == [("8", "1"), ("8", "282.7")]
    for name in ("nnja", "ecmwf"):
        table = pd.read_csv(folder / "outputs" / f"observations_{name}.csv")
        counts = table["variable"].value_counts()
        # Of eight stations one gives no direction, and the temperature of one is not believed.
        assert counts.to_dict() == {"d2m": 8, "sp": 8, "t2m": 7, "u10m": 7, "v10m": 7, "ws10m": 1}
        assert table[table["variable"] == "t2m"]["observation"].between(275, 290).all()
        assert f"outputs/observations_{name}.csv" in text
    assert "left out, implausible value: 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("example", range(len(OBSERVATIONS)))
def test_the_commands_that_they_propose_run(observations, example, monkeypatch):
    from ddo_modulus.cli.main import main

    text, folder = observations
    command = re.findall(r"^ +ddo (.+)$", text, re.M)[example]
    monkeypatch.chdir(folder)
    assert main([*command.split(), "ensemble=2", "posterior.steps=2"]) == 0
    assert (folder / command.split("out=")[1]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("own_table", [False, True])
def test_assimilate(tmp_path, own_table, monkeypatch, capsys):
    arguments = ["--members", "4", "--steps", "8"]
    if own_table:
        rows = ["2019-03-27T12:00,51.48,-0.45,285.3,t2m", "2019-03-27T12:00,53.36,-2.28,284.0,t2m"]
        table = ["time,lat,lon,observation,variable", *rows, "2019-03-27T11:00,53.36,-2.28,284,t2m"]
        (tmp_path / "stations.csv").write_text("\n".join(table))
        arguments += ["--table", "stations.csv"]
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "04_assimilate.py"
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    written = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")]
    assert written == ["outputs/assimilate/analysis.png"] and written[0] in text.replace("\n", "")
    if own_table:
        assert "gross error" not in text and "withheld" not in text
        return
    assert re.search(r"gross error .* 306\.60", text) and "thinned" in text
    before, after = (float(re.search(rf"t2m_{k} ([\d.]+)", text)[1]) for k in ("omb", "oma"))
    assert after < 0.6 * before
    misfit = re.search(r"off by ([\d.]+)", text.replace("\n", " "))
    assert float(misfit[1]) < 0.8


def readme_blocks():
    """Python of the README: a posterior by hand; from a source to a store."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    return blocks


@pytest.mark.slow
def test_readme_goes_from_a_source_to_a_store(tmp_path, monkeypatch):
    pytest.importorskip("earth2studio")
    monkeypatch.chdir(tmp_path)
    time = np.datetime64("2019-03-27T12", "ns")
    columns = ["time", "lat", "lon", "observation", "variable"]

    class Thermometer:
        SCHEMA = pa.schema([(name, pa.float64()) for name in columns])

        def __call__(self, time, variable, fields=None):
            return pd.DataFrame([[time[0], 53.36, 357.72, 284.0, "t2m"]], columns=columns)

    names = {"source": Thermometer(), "times": np.array([time])}
    exec(compile(readme_blocks()[1], "README.md", "exec"), names)
    with xr.open_zarr("analysis.zarr", consolidated=False) as stored:
        field = stored["t2m"].sel(time=time)
        assert abs(float(field.sel(lat=53.25, lon=357.75)) - 284.0) < 2.0


@pytest.mark.slow
def test_readme_example_runs():
    blocks = readme_blocks()
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    kelvin, at_stations = names["members"], names["stations"](names["members"])
    assert kelvin.shape == (8, 1, *names["package"].grid.shape)
    # Unbiased at the stations within the errors of their reports and of eight members.
    misfit = at_stations.mean(0) - torch.tensor([285.3, 284.0, 283.2])
    assert misfit.abs().max() < 1.5
    assert kelvin.std(0).mean() > at_stations.std(0).mean()


def test_readme_commands_are_understood():
    from ddo_modulus.cli.main import COMMANDS, compose

    lines = re.findall(r"^ddo (\w+) +([^#\n]*=[^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    assert {command for command, _ in lines} == set(COMMANDS)
    for command, arguments in lines:
        if command != "resume":  # which reads a run's own configuration
            compose(command, arguments.split())


PAGES = ("README.md", *(f"docs/{p}.md" for p in ("export", "glossary", "mathematics", "sources")))


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_and_tests_that_exist(page):
    path = ROOT / page
    text = path.read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (path.parent / target).exists(), target
    file = None
    for name, test in re.findall(r"`((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = ROOT / "tests" / name if name else file
        assert not test or f"def {test}(" in file.read_text(), test


@pytest.mark.slow
def test_super_resolution_beats_interpolation(tmp_path, monkeypatch, capsys):
    pytest.importorskip("earth2studio")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "06_super_resolve.py"
    monkeypatch.setattr(sys, "argv", [path.name, "--members", "2", "--steps", "6"])
    runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    rows = [re.search(rf"{label}\s+([\d.]+)\s+([\d.]+)", text) for label in METHODS]
    interpolated, drawn = (tuple(map(float, row.groups())) for row in rows if row)
    assert 0 < drawn[0] < interpolated[0] and 0 < drawn[1] < interpolated[1]
    written = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert written == ["outputs/super_resolve/super_resolution.png"]
    assert written[0] in text


@pytest.mark.slow
@pytest.mark.timeout(900)  # importing Earth2Studio's forecast models takes minutes at worst
def test_cycle_uses_its_forecasts_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    pytest.importorskip("earth2studio")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "05_cycle.py"
    monkeypatch.setattr(sys, "argv", [path.name, "--members", "2", "--steps", "4"])
    tables = []
    for _ in range(2):
        runpy.run_path(str(path), run_name="__main__")
        text, progress = capsys.readouterr()
        row = re.search(r"mean\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", text)
        tables.append(row[0])
        alone, forecast, cycled = map(float, row.groups())
        # Persistence of a state that drifts slowly: of use, and mended by the reports.
        assert 0 < cycled < forecast < 1.5 * alone
        assert "errors of the stations 0." in text.replace("\n", " ")
    assert tables[0] == tables[1] and "already complete" in text + progress
    names = {p.name for p in (tmp_path / "outputs" / "cycle").iterdir()}
    assert names == {"alone.zarr", "alone.record", "cycled.zarr", "cycled.record"}
