# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole, sound and of this run, or not loaded."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess

import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.training import Checkpoints

OPTIONS = {"steps": 12, "checkpoint_every": 4, "keep_checkpoints": 3, "keep_best": True}


@pytest.fixture(scope="module")
def run(trainees, tmp_path_factory):
    """A finished run with the checkpoints of steps 4, 8 and 12; read only."""
    out = tmp_path_factory.mktemp("run")
    trainer = trainees.build_trainer(out=out, **OPTIONS)
    trainer.run()
    return out, trainees.end_state(trainer)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def flip(path, position=None):
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 4
    path.write_bytes(data)


def test_what_a_checkpoint_is(run):
    folder = Checkpoints(run[0] / "checkpoints")
    assert folder.steps() == [4, 8, 12] and folder.newest() == 12
    files = sorted(path.name for path in folder.path(8).iterdir())
    assert files == [
        "DiffusionOperator0.0.8.mdlus",
        "DiffusionOperator1.0.8.mdlus",
        "SHA256SUMS",
        "checkpoint.0.8.pt",
        "run.json",
    ]
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder.path(8)).returncode == 0
    torch.load(folder.path(8) / "checkpoint.0.8.pt", weights_only=True)


@pytest.mark.parametrize("file", ["DiffusionOperator1.0.12.mdlus", "checkpoint.0.12.pt"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_checkpoint_is_passed_over(trainees, same, copy, run, caplog, file, damage):
    path = copy / "checkpoints" / "step-00000012" / file
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    trainer = trainees.build_trainer(out=copy, **OPTIONS)
    assert trainer.resume() and trainer.step == 8
    (warning,) = caplog.messages
    assert "step-00000012" in warning and file in warning
    trainer.run()
    same(run[1], trainees.end_state(trainer))
    assert Checkpoints(copy / "checkpoints").newest() == 12  # replaced by a sound one


@pytest.mark.parametrize("file", ["SHA256SUMS", "run.json"])
def test_a_damaged_list_is_noticed_too(copy, caplog, file):
    folder = Checkpoints(copy / "checkpoints")
    flip(folder.path(12) / file, 70)
    assert folder.newest() == 8
    (folder.path(8) / file).unlink()
    (folder.path(4) / "SHA256SUMS").write_text("")
    with pytest.raises(InputError, match="no checkpoint .* is sound; .* overwrite=true"):
        folder.newest()
    assert Checkpoints(copy / "none").newest() is None


def test_what_killed_processes_leave_is_removed(trainees, copy):
    folder = Checkpoints(copy / "checkpoints", keep=1)
    shutil.copytree(folder.path(12), folder.folder / ".step-00000013.new")
    assert folder.steps() == [4, 8, 12]
    trainer = trainees.build_trainer(out=copy, **OPTIONS | {"steps": 13, "keep_checkpoints": 1})
    assert trainer.resume() and trainer.step == 12
    trainer.run()
    assert [path.name for path in folder.folder.iterdir()] == ["step-00000013"]


@pytest.fixture
def full_disk():
    """Files may grow no larger than 8 KiB: writing further fails inside of torch."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_older_checkpoint(trainees, same, copy, run, caplog, full_disk):
    trainer = trainees.build_trainer(out=copy, **OPTIONS)
    (copy / "checkpoints" / "step-00000012" / "SHA256SUMS").unlink()
    assert trainer.resume() and trainer.step == 8
    caplog.clear()
    with caplog.at_level(logging.INFO, "ddo_modulus.training"):
        full_disk()
        trainer.run()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "no checkpoint at step 12" in warnings[0] and "File too large" in warnings[0]
    assert not list((copy / "checkpoints").glob(".*"))
    assert Checkpoints(copy / "checkpoints").newest() == 8
    same(run[1], trainees.end_state(trainer))  # training has gone on


def test_no_space_left(trainees, copy, monkeypatch):
    """The state is needed before the run is left: no checkpoint, no claim that there is one."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = trainees.build_trainer(out=copy, **OPTIONS | {"steps": 20})
    assert trainer.resume()
    trainer.step = 13
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="step 13: .*No space left .* step 12 is there; .*resume"):
        trainer._save(needed=True)
    assert Checkpoints(copy / "checkpoints").newest() == 12
    assert not list((copy / "checkpoints").glob(".*"))


def test_another_run(trainees, copy):
    with pytest.raises(InputError, match=r"another operator \(network is .*\[8\].*\[4\]"):
        trainees.build_trainer(out=copy, **OPTIONS, width=4).resume()
    with pytest.raises(InputError, match="at step 12: continue it with resume=true"):
        trainees.build_trainer(out=copy, **OPTIONS).run()
    path = copy / "checkpoints" / "step-00000012"
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text.replace('"adamw"', '"apex"'))
    trainer = trainees.build_trainer(out=copy, **OPTIONS)
    with pytest.raises(InputError, match=r"another optimizer \(apex there, adamw here\)"):
        trainer.checkpoints.load(12, trainer._state(), trainer._run(), torch.device("cpu"))


def test_other_weights_than_the_description_says(trainees, copy):
    """Written by another version of the code, say."""
    path = copy / "checkpoints" / "step-00000012"
    other = trainees.build_trainer(width=4)
    other.operator.save(str(path / "DiffusionOperator0.0.12.mdlus"))
    trainer = trainees.build_trainer(out=copy, **OPTIONS)
    with pytest.raises(InputError, match="cannot be continued from"):
        trainer.checkpoints.load(12, trainer._state(), trainer._run(), torch.device("cpu"))


def test_a_checkpoint_runs_no_code(trainees, copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = copy / "checkpoints" / "step-00000012" / "checkpoint.0.12.pt"
    torch.save({"metadata": Payload()}, path)
    trainer = trainees.build_trainer(out=copy, **OPTIONS)
    with pytest.raises(InputError, match="more than tensors and numbers: .*mkdir"):
        trainer.checkpoints.load(12, trainer._state(), trainer._run(), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_what_is_asked_for_now_holds(trainees, copy, caplog):
    changed = OPTIONS | {"steps": 20, "learning_rate": 1e-3, "weight_decay": 0.5}
    trainer = trainees.build_trainer(out=copy, **changed)
    with caplog.at_level(logging.INFO, "ddo_modulus.training"):
        assert trainer.resume()
    assert "steps 12 -> 20" in caplog.text and "learning_rate 0.005 -> 0.001" in caplog.text
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == 1e-3 * trainer._rate(12) and group["weight_decay"] == 0.5
    trainer.run()
    assert trainer.step == 20 and trainer.history[-1]["step"] == 20


def test_lines_of_the_history(run):
    rows = [json.loads(row) for row in (run[0] / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("samples_per_second", None)
    assert rows == run[1]["history"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
