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
def training(tiny, arguments):
    """Command line of a training run."""
    more = {"steps": STEPS, "validate_every": 20, "checkpoint_every": 10}
    changed = {f"trainer__{key}": value for key, value in more.items()}
    return lambda out, **keys: ["train", *arguments(**tiny | changed | {"out": out} | keys)]


@pytest.fixture(scope="module")
def whole(server, training, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trainee = server.start(out.with_name("log"), "command", arguments=training(out))
    assert trainee.wait() == 0, trainee.said()
    return out


def last(out):
    return out / "checkpoints" / f"step-{STEPS:08d}"


def await_step(out, step, running):
    while max(Checkpoints(out / "checkpoints").steps(), default=0) < step:
        assert running() is None
        time.sleep(0.002)


def test_sigterm_to_ddo_train(training, start, whole, same, state_of, tmp_path, environment):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ddo_modulus.cli", *training(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    await_step(out, 10, process.poll)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75, stderr
    assert "ddo: stopped by SIGTERM at step" in stderr and "resume=true" in stderr
    assert not (out / "package").exists()

    refused = start("command", arguments=training(out))
    assert refused.wait() == 2
    assert "resume=true" in refused.said() and "overwrite=true" in refused.said()
    assert refused.said().count("\n") == 1

    again = start("command", arguments=training(out, resume="true"))
    assert again.wait() == 0, again.said()
    assert "resumed at step" in again.said()
    same(state_of(last(whole)), state_of(last(out)))
    assert (out / "package").is_dir()


def test_sigusr1_to_one_of_two_ranks(training, start_ranks, same, state_of, whole, tmp_path):
    out = tmp_path / "run"
    ranks = start_ranks("command", arguments=training(out))
    await_step(out, 10, ranks[0].status)
    ranks[1].send(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].said() + ranks[1].said()
    assert "ddo: stopped by SIGUSR1" in ranks[0].said() and ranks[1].said() == ""
    ranks = start_ranks("command", arguments=training(out, resume="true"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()
    same(state_of(last(whole)), state_of(last(out)), close=True)


def test_a_run_may_start_anew(training, start, whole, same, state_of, tmp_path):
    """Interrupted by Ctrl-C, then overwritten."""
    out = tmp_path / "run"
    trainee = start("command", arguments=training(out, **{"trainer.seed": 1}))
    await_step(out, 10, trainee.status)
    trainee.send(signal.SIGINT)
    assert trainee.wait() == 130, trainee.said()
    anew = start("command", arguments=training(out, overwrite="true"))
    assert anew.wait() == 0, anew.said()
    same(state_of(last(whole)), state_of(last(out)))


def test_handlers_are_put_back_and_the_second_signal_is_theirs(monkeypatch):
    seen = []
    monkeypatch.setattr("ddo_modulus.training.signals._ECHO", 0.05)
    interrupt = signal.getsignal(signal.SIGINT)  # ignored by processes in the background
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
    assert signal.getsignal(signal.SIGINT) is interrupt
