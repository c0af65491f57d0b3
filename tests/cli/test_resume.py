# SPDX-License-Identifier: Apache-2.0
"""``ddo resume``: by the run's own configuration, to the same end."""

import json
import shutil

import pytest
import torch
import yaml

from ddo_modulus.cli import configuration
from ddo_modulus.cli.main import main
from ddo_modulus.diffusion.package import Package


@pytest.fixture(scope="module")
def longer(tiny):
    return tiny | {"trainer__steps": 6, "half": "false"}


@pytest.fixture(scope="module")
def whole(longer, tmp_path_factory, arguments):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *arguments(out=out, **longer)]) == 0
    return out


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run as if it had been stopped after step 4, somewhere else."""
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "package")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    return out


def weights(out):
    return Package.load(out / "package").operator.state_dict()


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_to_the_same_end(ddo, run, whole, caplog):
    result = ddo("resume", out=run)
    assert result.status == 0, result.err
    assert "resumed at step 4" in caplog.text
    assert same(weights(run), weights(whole))
    first, second = json.loads((run / "environment.json").read_text())
    assert second["overrides"] and first["overrides"] != second["overrides"]
    caplog.clear()
    finished = ddo("resume", out=run)
    assert finished.status == 0 and "is finished: 6 steps" in caplog.text
    assert len(json.loads((run / "environment.json").read_text())) == 2


def test_without_a_checkpoint_it_begins_again(ddo, run, whole):
    shutil.rmtree(run / "checkpoints")
    assert ddo("resume", out=run).status == 0
    assert same(weights(run), weights(whole))


def test_the_saved_configuration_is_the_truth(ddo, run, whole, monkeypatch, tmp_path, caplog):
    """Other defaults, an experiment that is gone, a key that is new: nothing of it matters."""
    conf = tmp_path / "conf"
    shutil.copytree(configuration.CONF, conf)
    (conf / "experiment" / "kolmogorov64.yaml").unlink()
    trainer = conf / "trainer" / "default.yaml"
    text = trainer.read_text().replace("learning_rate: 2.0e-3", "learning_rate: 1.0")
    assert "learning_rate: 1.0 " in text
    trainer.write_text(text)
    monkeypatch.setattr(configuration, "CONF", conf)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    del saved["trainer"]["figure"], saved["data"]["prefetch"]  # as if of an older version
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    result = ddo("resume", out=run)
    assert result.status == 0, result.err
    assert "resuming with other settings: figure False -> True" in caplog.text
    assert same(weights(run), weights(whole))


def test_what_may_change(ddo, run, caplog):
    changes = {"trainer__steps": 8, "trainer__checkpoint_every": 1, "data__workers": 1}
    result = ddo("resume", out=run, **changes)
    assert result.status == 0, result.err
    assert "steps 6 -> 8" in caplog.text
    assert Package.load(run / "package").provenance["training"]["step"] == 8
    more = ddo("resume", out=run, trainer__steps=9)
    assert more.status == 2 and "overwrite=true" in more.err
    assert ddo("resume", out=run, trainer__steps=9, overwrite="true").status == 0
    assert Package.load(run / "package").provenance["training"]["step"] == 9
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["steps"] == 9


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"trainer__batch": 8}, "would become another run (trainer.batch is 4 there)"),
        ({"trainer__seed": 1}, "trainer.seed is 0 there"),
        ({"trainer__precision": "bf16"}, "trainer.precision is fp32 there"),
        ({"operator__network__widths": "[8]"}, "operator.network.widths is [4] there"),
        ({"data__variables": "null"}, "data.variables is ['vorticity'] there"),
        ({"condition": "hour_of_day"}, "condition is none there"),
        ({"trainer__steps": 5}, "trainer.steps=5 is below the 6 of"),
        ({"trainer__steps": "many"}, "trainer.steps=many must be a whole number"),
        ({"trainer__pace": 1}, "unknown key 'trainer.pace'"),
        ({"hydra/launcher": "basic"}, "is an option of sweeps"),
    ],
)
def test_what_may_not(ddo, run, keys, match):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = ddo("resume", out=run, **keys)
    assert result.status == 2 and match in result.err, result.err
    assert result.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "has no config.yaml"),
        ("data: [", "config.yaml cannot be read"),
        ("1", "config.yaml cannot be read"),
        ("data: {}\ntrainer: 3\noperator: {}", "config.yaml has no data, trainer, operator"),
        ("", "config.yaml has no data, trainer, operator"),
    ],
)
def test_other_folders_are_refused(ddo, tmp_path, text, match):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    result = ddo("resume", out=tmp_path)
    assert result.status == 2 and match in result.err and result.err.count("\n") == 1
    absent = ddo("resume", out=tmp_path / "nowhere")
    assert absent.status == 2 and "does not exist" in absent.err


def test_a_run_of_a_version_that_knew_more(ddo, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["pace"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = ddo("resume", out=run)
    assert result.status == 2 and "does not know trainer.pace" in result.err
