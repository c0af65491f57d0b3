# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any moment come to the same end."""

import random
import signal
import time

import torch

from ddo_modulus.training import Checkpoints

OPTIONS = {
    "steps": 100,
    "validate_every": 10,
    "checkpoint_every": 1,
    "keep_best": True,
}


def newest(folder):
    return max(Checkpoints(folder).steps(), default=0)


def test_twenty_kills_change_nothing(start, same, tmp_path):
    whole = start("train", out=str(tmp_path / "whole"), result=str(tmp_path / "a.pt"), **OPTIONS)
    out, result = tmp_path / "run", tmp_path / "b.pt"
    folder = out / "checkpoints"
    choose, caught = random.Random(5), 0
    for _ in range(20):
        trainee = start("train", out=str(out), result=str(result), **OPTIONS)
        target = newest(folder) + choose.randint(1, 4)
        while newest(folder) < target:
            assert trainee.status() is None, trainee.said()
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.04))
        trainee.send(signal.SIGKILL)
        assert trainee.wait() == -signal.SIGKILL
        caught += any(folder.glob(".step-*"))
        steps = Checkpoints(folder).steps()
        assert 1 <= len(steps) <= 3
        assert Checkpoints(folder).newest() == steps[-1]  # none is damaged
    assert caught, "no process was killed while it wrote"
    last = start("train", out=str(out), result=str(result), **OPTIONS)
    assert last.wait() == 0, last.said()
    assert "damaged" not in last.said()
    assert whole.wait() == 0, whole.said()
    same(torch.load(tmp_path / "a.pt"), torch.load(result))
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000099", "step-00000100"]
