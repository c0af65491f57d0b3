# SPDX-License-Identifier: Apache-2.0
"""``ddo train -m``: Hydra's sweeps, each run in a folder of its own."""

import json
import signal

import pytest
import yaml

from ddo_modulus.cli import sweep as sweeps
from ddo_modulus.cli import train
from ddo_modulus.cli.main import main
from ddo_modulus.errors import Stopped


@pytest.fixture
def sweep(tiny, arguments, monkeypatch, tmp_path, capfd):
    """Run a sweep; its status, stdout, stderr and folders."""
    monkeypatch.setenv("SAVE_DIR", str(tmp_path / "saved"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    # Left alone, it would outlive the test.
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")

    def sweep(*more, **keys):
        status = main(["train", "-m", *arguments(**(tiny | keys)), *more])
        output = capfd.readouterr()
        return status, output.out, output.err, sorted((tmp_path / "saved").glob("*/*/[0-9]*"))

    return sweep


def rates(folders):
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    return [config["trainer"]["learning_rate"] for config in configs]


def test_one_after_the_other(sweep, tmp_path):
    status, out, err, folders = sweep("trainer.learning_rate=1e-3,2e-3", "trainer.seed=0,1")
    assert status == 0, err
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert folders[0].parents[1] == tmp_path / "saved" / "kolmogorov64"
    assert rates(folders) == [1e-3, 1e-3, 2e-3, 2e-3]
    for folder in folders:
        assert (folder / "package").is_dir() and not (folder / ".hydra").exists()
    assert "trainer.seed=1" in yaml.safe_load((folders[1] / "overrides.yaml").read_text())
    assert "run 3: trainer.learning_rate=0.002 trainer.seed=1\n" in err
    assert out.count("finished") == 4 and "trainer.learning_rate=0.001 trainer.seed=1" in out
    loss = json.loads((folders[3] / "history.jsonl").read_text().splitlines()[-1])["validation"]
    assert f"{loss:.4f}" in out


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_of_this_machine(sweep, ranks, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = ["hydra/launcher=submitit_local", f"hydra.launcher.tasks_per_node={ranks}"]
    status, out, err, folders = sweep("trainer.learning_rate=1e-3,2e-3", *launcher)
    assert status == 0, err
    assert rates(folders) == [1e-3, 2e-3] and out.count("finished") == 2
    for folder in folders:
        (start,) = json.loads((folder / "environment.json").read_text())
        assert start["ranks"] == ranks and (folder / "package").is_dir()


def test_a_refused_run_does_not_stop_the_others(sweep):
    status, out, err, folders = sweep("trainer.precision=fp8,fp32")
    assert status == 2, err
    assert "1 of 2 runs were refused: run 0: " in err.splitlines()[-1]
    assert "run 0: trainer.precision=fp8\n" in err and out.count("finished") == 1
    assert (folders[1] / "package").is_dir()


def test_a_signal_stops_the_sweep(sweep, monkeypatch):
    ran = []

    def run(config):
        ran.append(config.out)
        raise Stopped("stopped by SIGTERM at step 2 of 3; continue with resume=true")

    monkeypatch.setattr(train, "run", run)
    status, _, err, _ = sweep("trainer.seed=0,1")
    assert status == 75 and len(ran) == 1
    assert f"ddo resume out={ran[0]}" in err


def test_a_defect_keeps_its_traceback(sweep, monkeypatch):
    def run(config):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(ZeroDivisionError):
        sweep("trainer.seed=0,1")


def test_the_same_sweep_again_finishes_what_is_unfinished(sweep, monkeypatch, tmp_path, caplog):
    place = f"hydra.sweep.dir={tmp_path / 'saved' / 'x' / 'y'}"
    assert sweep("trainer.seed=0,1", place)[0] == 0
    folder = tmp_path / "saved" / "x" / "y" / "1"
    for path in (folder / "package").iterdir():
        path.unlink()
    (folder / "package").rmdir()
    caplog.clear()
    status, _, err, folders = sweep("trainer.seed=0,1", place)
    assert status == 0 and len(folders) == 2, err
    assert caplog.text.count("is finished: 3 steps") == 1
    assert caplog.text.count("resumed at step 3") == 1
    status, _, err, _ = sweep("trainer.seed=2,3", place)  # other runs are kept
    assert status == 2 and "2 of 2 runs were refused" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "-m", "experiment=kolmogorov64", "trainer.seed=0,1"], "needs data.path=..."),
        (["train", "-m", "experiment=uk_t2m", "data.path=x", "out=x"], "leave out=... away"),
        (["train", "-m", "experiment=uk_t2m", "data.path=x", "trainer.sed=0,1"], "trainer.sed"),
        (["train", "-m", "experiment=uk_t2m,x", "data.path=x"], "choose one of kolmogorov64"),
        (["train", "-m", "experiment=uk_t2m", "data.path=x", "seed"], "not of the form key=value"),
        (["train", "experiment=uk_t2m", "data.path=x", "hydra.verbose=true"], "option of sweeps"),
        (["simulate", "--multirun", "out=x"], "-m is for `ddo train`"),
        (
            ["train", "-m", "experiment=uk_t2m", "data.path=x", "hydra/launcher=rocket"],
            "Could not find 'hydra/launcher/rocket'; choose one of basic",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, match, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda _: pytest.fail("a run was started"))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and match in shown.err and shown.out == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_launcher_is_named(capsys, monkeypatch, tmp_path):
    """As where the extra is not installed."""
    from hydra.core.config_store import ConfigStore

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddo_modulus.cli.configuration.find_spec", lambda name: None)
    repository = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in ("submitit_slurm.yaml", "submitit_local.yaml"):
        monkeypatch.delitem(repository, name, raising=False)
    keys = ["experiment=uk_t2m", "data.path=x", "hydra/launcher=submitit_slurm"]
    assert main(["train", "-m", *keys]) == 2
    assert "pip install 'ddo-modulus[sweep]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "launched",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_NPROCS": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"},
    ],
)
def test_one_process_starts_a_sweep(launched, monkeypatch, capsys):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "-m", "experiment=uk_t2m", "data.path=x"]) == 2
    assert "a sweep is started by one process" in capsys.readouterr().err


def test_the_trainer_handles_the_signal_that_submitit_sends(sweep, monkeypatch):
    """It saves after SIGUSR1; then submitit's own handler asks for the job again."""
    asked = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))

    def run(config):
        raise Stopped("stopped by SIGUSR1 at step 2 of 3; continue with resume=true")

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(sweeps, "_export_ranks", lambda: None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    try:
        status, _, err, _ = sweep("trainer.seed=0")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == [signal.SIGUSR1] and status == 75 and "1 of 1 runs were stopped" in err
