# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are cut short, damaged, of another run, or no checkpoints."""

import math
import os
import pickle
import shutil

import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.training import Checkpoints
from ddo_modulus.training.checkpoint import file_sum

RUN = {"operator": {"channels": 1}, "optimizer": "adamw"}
OPERATOR, STATE = "DiffusionOperator.0.2.mdlus", "checkpoint.0.2.pt"


def state(untrained):
    """What a run saves: an operator and its optimiser."""
    operator = untrained().operator.requires_grad_(True)
    return {"models": operator, "optimizer": torch.optim.AdamW(operator.parameters())}


@pytest.fixture(scope="module")
def saved(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(untrained), RUN)
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    return Checkpoints(shutil.copytree(saved, tmp_path / "checkpoints"))


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-50])


def empty(name):
    return lambda path: (path / name).write_bytes(b"")


def removed(name):
    return lambda path: (path / name).unlink()


def older(name):
    """Put the file of the step before in the place of a file."""

    def damage(path):
        before = path.with_name("step-00000001") / name.replace(".2.", ".1.")
        shutil.copyfile(before, path / name)

    return damage


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        *(
            kind(name)
            for name in (OPERATOR, STATE, "run.json", "SHA256SUMS")
            for kind in (cut, empty, removed)
        ),
        older(STATE),
        older("SHA256SUMS"),
        emptied,
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damage, checkpoints, caplog):
    damage(checkpoints.path(2))
    assert checkpoints.newest() == 1
    assert "skipping the damaged checkpoint" in caplog.text and "step-00000002" in caplog.text


@pytest.mark.parametrize("damage", [cut(OPERATOR), emptied])
def test_without_a_sound_one_the_run_cannot_be_continued(damage, checkpoints):
    shutil.rmtree(checkpoints.path(1))
    damage(checkpoints.path(2))
    with pytest.raises(InputError, match="no checkpoint in .* is sound; .* overwrite=true"):
        checkpoints.newest()


def signed(path):
    """Write the sums anew, so that what stands behind them is checked."""
    files = sorted(p for p in path.iterdir() if p.name != "SHA256SUMS")
    (path / "SHA256SUMS").write_text("".join(f"{file_sum(p)}  {p.name}\n" for p in files))


class Payload:
    """Would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran-code",)


@pytest.mark.parametrize("content", [Payload(), {"metadata": Payload()}])
def test_code_does_not_run(content, checkpoints, untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoints.path(2)
    torch.save(content, path / STATE)
    signed(path)
    with pytest.raises(InputError, match="more than tensors and numbers"):
        checkpoints.load(2, state(untrained), RUN, torch.device("cpu"))
    (path / STATE).write_bytes(pickle.dumps(content))
    signed(path)
    with pytest.raises(InputError, match="step-00000002"):
        checkpoints.load(2, state(untrained), RUN, torch.device("cpu"))
    assert not (tmp_path / "ran-code").exists()


@pytest.mark.parametrize("name", ["network", "prior_variance"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(name, value, checkpoints, untrained):
    diverged = state(untrained)
    weights = diverged["models"].state_dict()
    next(v for k, v in weights.items() if k.startswith(name)).view(-1)[0] = value
    before = checkpoints.steps()
    with pytest.raises(InputError, match=f"no checkpoint of step 3 is written: .*{name}"):
        checkpoints.save(3, diverged, RUN)
    assert checkpoints.steps() == before and checkpoints.newest() == 2
    path = checkpoints.path(2)  # one of an earlier version, written all the same
    diverged["models"].save(str(path / OPERATOR))
    signed(path)
    with pytest.raises(InputError, match=f"{name}.* NaN or infinite"):
        checkpoints.load(2, state(untrained), RUN, torch.device("cpu"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"operator": {"channels": 2}}, "another operator (channels is 1 there, 2 here)"),
        ({"optimizer": "apex"}, "another optimizer (adamw there, apex here)"),
    ],
)
def test_a_checkpoint_of_another_run(other, words, checkpoints, untrained):
    with pytest.raises(InputError) as caught:
        checkpoints.load(2, state(untrained), RUN | other, torch.device("cpu"))
    assert words in str(caught.value) and "step-00000002" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"operator": 3}', "\0"])
def test_a_record_that_says_nothing(content, checkpoints, untrained):
    (checkpoints.path(2) / "run.json").write_text(content)
    signed(checkpoints.path(2))
    with pytest.raises(InputError, match="step-00000002"):
        checkpoints.load(2, state(untrained), RUN, torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["step-2", "step-0000000x", ".step-00000009.new", "step-00000003.bak"]
)
def test_other_names_are_no_checkpoints(name, checkpoints):
    (checkpoints.folder / name).mkdir()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_folder_without_a_run(make, refusal, tmp_path):
    make(tmp_path / "run")
    refusal("resume", "run", out=tmp_path / "run")
