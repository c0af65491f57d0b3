# SPDX-License-Identifier: Apache-2.0
"""Tables on a torus, tables that `ddo verify` reads, and keys that a sweep refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.cli.main import main
from ddo_modulus.fields.grid import BoxGrid

ON_TORUS = pd.DataFrame(
    {
        "time": pd.Timestamp("2019-03-27T06:00"),
        "y": BoxGrid((8, 8)).lat[[1, 4]],
        "x": BoxGrid((8, 8)).lon[[2, 7]],
        "observation": [1.0, -1.0],
        "variable": "vorticity",
        "observation_error": 0.1,
    }
)


@pytest.fixture(scope="module")
def on_torus(untrained, tmp_path_factory):
    """A package on the torus."""
    folder = tmp_path_factory.mktemp("torus") / "package"
    untrained(("vorticity",), ("1/s",), BoxGrid((8, 8))).save(folder)
    return folder


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_y_and_x_are_places_on_a_torus(accepted, on_torus, tmp_path, suffix):
    table = tmp_path / f"obs.{suffix}"
    ON_TORUS.to_csv(table, index=False) if suffix == "csv" else ON_TORUS.to_parquet(table)
    keys = {"package": on_torus, "observations": table, "ensemble": 2, "posterior__steps": 6}
    store, _ = accepted("assimilate", tolerance="1h", **keys)
    found = store["vorticity"].mean("ensemble").squeeze("time").values
    assert found[[1, 4], [2, 7]] == pytest.approx(ON_TORUS["observation"].to_numpy(), abs=0.4)


@pytest.fixture(scope="module")
def analysis(files, tmp_path_factory):
    """An analysis of the table."""
    out = tmp_path_factory.mktemp("analysis") / "x.zarr"
    keys = {"package": files.package, "observations": files.table, "ensemble": 3, "out": out}
    assert main(["assimilate", *(f"{k}={v}" for k, v in keys.items()), "posterior.steps=6"]) == 0
    return out


@pytest.fixture
def verified(ddo, files, analysis, tmp_path):
    """Run `ddo verify` on a changed table; the number of points away from stations."""

    def run(change, **keys):
        path, out = tmp_path / "obs.csv", tmp_path / "report"
        change(pd.read_parquet(files.table)).to_csv(path, index=False)
        keys |= {"analysis": analysis, "truth": files.truth, "observations": path}
        result = ddo("verify", out=out, overwrite="true", resamples=2, **keys)
        assert result.status == 0, result.err
        report = json.loads((out / "scores.json").read_text())
        return report["t2m, away from stations"]["points"]

    return run


def test_verify_takes_the_names_of_columns(verified):
    plain = verified(lambda table: table)
    renamed = {"time": "valid_time", "observation": "t2m_obs"}
    columns = "{time:valid_time,observation:t2m_obs}"
    assert verified(lambda table: table.rename(columns=renamed), columns=columns) == plain


def test_verify_leaves_out_what_the_analysis_left_out(verified):
    def marked(table):
        return table.assign(quality=np.arange(len(table)) % 2)

    every, half = verified(marked), verified(marked, quality__accept="[0,0]")
    assert half > every
    assert half == verified(lambda table: table[::2])
    assert every == verified(lambda table: table)


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        ({"columns": "{time:valid}"}, ["table.parquet", "no column valid"]),
        ({"columns": "3"}, ["columns=3 must be names"]),
        ({"quality__accept": "[2,1]"}, ["accept", "smallest and the largest"]),
        ({"quality__accept": "good"}, ["accept", "smallest and the largest"]),
        ({"observations": "null", "columns": "{time:valid}"}, ["columns= goes with observations="]),
        ({"observations": "null", "quality__accept": "[0,1]"}, ["quality.accept= goes with"]),
    ],
)
def test_verify_refuses(refusal, files, analysis, tmp_path, keys, needed):
    inputs = {"analysis": analysis, "truth": files.truth, "observations": files.table}
    refusal("verify", *needed, out=tmp_path / "report", **(inputs | keys))


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        ("half=maybe", "half=maybe must be one of"),
        ("half=true,2", "half=2"),
        ("overwrite=7", "overwrite=7"),
        ("resume=false,no-such", "resume=no-such must be one of"),
        ("name=a,''", "name='' is empty"),
    ],
)
def test_a_sweep_checks_keys_before_its_first_run(tmp_path, monkeypatch, capfd, more, needed):
    monkeypatch.setenv("SAVE_DIR", str(tmp_path / "saved"))
    keys = ["experiment=kolmogorov64", "trainer.seed=0,1", f"data.path={tmp_path / 'none.nc'}"]
    assert main(["train", "-m", *keys, more]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ddo: ") and needed in lines[0], lines
    assert not (tmp_path / "saved").exists()
