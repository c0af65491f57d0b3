# SPDX-License-Identifier: Apache-2.0
"""Signals: the step is finished, the state saved, the status says that there is more to do."""

import signal
import subprocess
import sys
import time

import pytest

from ddo_modulus.training import Checkpoints
from ddo_modulus.training.signals import StopSignals

STEPS = 80


@pytest.fixture(scope="module")
def arguments(torus):
    def arguments(out, **keys):
        given = {
            "experiment": "kolmogorov64",
            "data.path": torus,
            "data.validation.trajectories": 1,
            "symmetry.roll": "[4,1]",
            "symmetry.glide": 2,
            "operator.network.widths": "[4]",
            "operator.network.depths": "[1]",
            "operator.network.modes": "[5]",
            "operator.network.embedding": 8,
            "operator.network.coordinates": "[2,0]",
            "trainer.steps": STEPS,
            "trainer.batch": 4,
            "trainer.precision": "fp32",
            "trainer.compile": "false",
            "trainer.validate_every": 20,
            "trainer.checkpoint_every": 10,
            "trainer.loggers": "[]",
            "trainer.figure": "false",
            "out": out,
        } | keys
        return ["train", *(f"{key}={value}" for key, value in given.items())]

    return arguments


@pytest.fixture(scope="module")
def whole(server, arguments, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trainee = server.start(out.with_name("log"), "command", arguments=arguments(out))
    assert trainee.wait() == 0, trainee.said()
    return out


def last(out):
    return out / "checkpoints" / f"step-{STEPS:08d}"


def await_step(out, step, running):
    while max(Checkpoints(out / "checkpoints").steps(), default=0) < step:
        assert running() is None
        time.sleep(0.002)


def test_sigterm_to_ddo_train(arguments, start, whole, same, state_of, tmp_path, environment):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ddo_modulus.cli", *arguments(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    await_step(out, 10, process.poll)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told
    assert "ddo: stopped by SIGTERM at step" in told and "resume=true" in told
    assert not (out / "package").exists()

    refused = start("command", arguments=arguments(out))
    assert refused.wait() == 2
    assert "resume=true" in refused.said() and "overwrite=true" in refused.said()
    assert refused.said().count("\n") == 1

    again = start("command", arguments=arguments(out, resume="true"))
    assert again.wait() == 0, again.said()
    assert "resumed at step" in again.said()
    same(state_of(last(whole)), state_of(last(out)))
    assert (out / "package").is_dir()


def test_sigusr1_to_one_of_two_ranks(arguments, start_ranks, same, state_of, whole, tmp_path):
    out = tmp_path / "run"
    ranks = start_ranks("command", arguments=arguments(out))
    await_step(out, 10, ranks[0].status)
    ranks[1].send(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].said() + ranks[1].said()
    assert "ddo: stopped by SIGUSR1" in ranks[0].said() and ranks[1].said() == ""
    ranks = start_ranks("command", arguments=arguments(out, resume="true"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()
    same(state_of(last(whole)), state_of(last(out)), close=True)


def test_a_run_may_start_anew(arguments, start, whole, same, state_of, tmp_path):
    """Interrupted by Ctrl-C, then overwritten."""
    out = tmp_path / "run"
    trainee = start("command", arguments=arguments(out, **{"trainer.seed": 1}))
    await_step(out, 10, trainee.status)
    trainee.send(signal.SIGINT)
    assert trainee.wait() == 130, trainee.said()
    anew = start("command", arguments=arguments(out, overwrite="true"))
    assert anew.wait() == 0, anew.said()
    same(state_of(last(whole)), state_of(last(out)))


def test_handlers_are_put_back_and_the_second_signal_is_theirs(monkeypatch):
    seen = []
    monkeypatch.setattr("ddo_modulus.training.signals._ECHO", 0.05)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)  # a launcher's echo
            assert signals.received == signal.SIGUSR1 and seen == []
            time.sleep(0.1)
            signal.raise_signal(signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
