# SPDX-License-Identifier: Apache-2.0
"""Where runs are put, and what their folders record."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from ddo_modulus.cli import main as cli
from ddo_modulus.cli.configuration import compose, differences
from ddo_modulus.cli.environment import environment, package_revision, packages, revision
from ddo_modulus.cli.main import main
from ddo_modulus.cli.run_folder import job_id, requeued, run_folder
from ddo_modulus.errors import InputError

JOB = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


@pytest.fixture(autouse=True)
def no_job(monkeypatch, tmp_path):
    for name in (*JOB, "SAVE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_job_names_the_folder(monkeypatch):
    config = compose("train", ["experiment=uk_t2m", "data.path=x"])
    assert re.fullmatch(r"runs/uk_t2m/\d{8}T\d{6}\.\d{6}Z", str(run_folder(config)))
    assert job_id() != job_id()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SAVE_DIR", "/scratch/me")
    assert run_folder(config) == Path("/scratch/me/uk_t2m/17")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run_folder(config) == Path("/scratch/me/uk_t2m/15_2")
    config = compose("train", ["experiment=uk_t2m", "data.path=x", "name=warm", "out=here"])
    assert run_folder(config) == Path("here")
    config.out = None
    assert run_folder(config) == Path("/scratch/me/warm/15_2")
    config.name = " "
    with pytest.raises(InputError, match="cannot name a folder"):
        run_folder(config)


def test_a_run_records_how_it_came_about(ddo, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JWT", "secret")
    result = ddo("train", **tiny)
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "kolmogorov64" / "17"
    assert (run / "package").is_dir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["name"] == "kolmogorov64" and config["out"] == "runs/kolmogorov64/17"
    assert config["trainer"]["steps"] == 3 and config["trainer"]["learning_rate"] == 2e-3
    overrides = yaml.safe_load((run / "overrides.yaml").read_text())
    assert "experiment=kolmogorov64" in overrides and "trainer.steps=3" in overrides
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["slurm"] == {"SLURM_JOB_ID": "17"}
    assert "secret" not in (run / "environment.json").read_text()
    assert start["ranks"] == 1 and start["devices"][0].endswith("CPU")
    assert not list(run.glob(".*"))


def test_a_requeued_job_goes_on_with_its_own_run_only(ddo, tiny, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert ddo("train", **tiny).status == 0
    run = tmp_path / "runs" / "kolmogorov64" / "17"
    again = ddo("train", **tiny)
    assert again.status == 2 and "overwrite=true" in again.err

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = (run / "package" / "package.json").stat().st_mtime_ns
    assert ddo("train", **tiny).status == 0
    assert "is finished: 3 steps" in caplog.text
    assert (run / "package" / "package.json").stat().st_mtime_ns == before

    for path in sorted((run / "package").iterdir()):
        path.unlink()
    (run / "package").rmdir()
    caplog.clear()
    assert ddo("train", **tiny).status == 0
    assert "requeued: continuing" in caplog.text and "resumed at step 3" in caplog.text
    starts = json.loads((run / "environment.json").read_text())
    assert [start["slurm"].get("SLURM_RESTART_COUNT") for start in starts] == [None, "1"]

    monkeypatch.setenv("SLURM_JOB_ID", "18")
    other = ddo("train", out=run, **tiny)
    assert other.status == 2 and "overwrite=true" in other.err
    assert not requeued(run)


def test_revisions(tmp_path):
    assert revision(tmp_path) is None

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = revision(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "a").write_text("2")
    assert revision(tmp_path) == revision(tmp_path, "a") == f"{clean}-dirty"
    # A package that is merely installed within somebody's repository is not of it.
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "b").write_text("")
    assert revision(tmp_path / "installed", "b") is None
    # What is run now, and the folder that it is run in.
    recorded = environment()["revision"]["working_directory"]
    assert recorded == {"commit": clean, "dirty": True}
    assert package_revision() == revision(Path(cli.__file__).parent)


def test_packages_are_those_that_matter():
    found = packages()
    assert {"ddo-modulus", "torch", "nvidia-physicsnemo", "zarr"} <= set(found)
    assert not {"ruff", "pytest"} & set(found)


def test_differences():
    one = {"a": 1, "b": {"c": [1], "d": None}, "e": 2}
    other = {"a": 1, "b": {"c": [2], "d": None}, "f": 3}
    assert differences(one, other) == {"b.c": ([1], [2]), "e": (2, None), "f": (None, 3)}
    assert differences(one, one) == {}


def test_a_refused_run_leaves_no_folder(tiny, arguments, capsys, tmp_path):
    assert main(["train", *arguments(**tiny), "prior.kind=magic"]) == 2
    assert "prior.kind=magic must be one of" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
