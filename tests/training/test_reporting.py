# SPDX-License-Identifier: Apache-2.0
"""What a run tells, and to whom."""

import json

import matplotlib.image
import pytest
from physicsnemo.core.version_check import check_version_spec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddo_modulus.errors import InputError
from ddo_modulus.training import TrainerConfig, trainer
from ddo_modulus.training.reporting import line


def events(folder):
    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def test_tensorboard_has_curves_and_samples(trainees, tmp_path):
    options = {"out": tmp_path, "loggers": ["tensorboard"], "figure": True, "checkpoint_every": 4}
    first = trainees.build_trainer(**options)
    first.run()
    again = trainees.build_trainer(**options | {"steps": 12})
    assert again.resume()
    again.run()
    read = events(tmp_path / "tensorboard")
    curve = {e.step: e.value for e in read.Scalars("validation/validation")}
    assert list(curve) == [0, 4, 8, 12]
    assert curve == pytest.approx({row["step"]: row["validation"] for row in again.history})
    assert [e.step for e in read.Scalars("train/train")] == [3, 6, 8, 9, 12]
    tags = {"train/learning_rate", "train/gradient_norm", "train/samples_per_second"}
    assert tags <= set(read.Tags()["scalars"])
    assert [e.step for e in read.Images("samples")] == [0, 4, 8, 12]
    drawn = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert drawn == [f"step-{step:08d}.png" for step in (0, 4, 8, 12)]
    image = matplotlib.image.imread(tmp_path / "samples" / drawn[0])
    assert image.std() > 0.05


def test_figures_can_be_left_out_and_may_fail(trainees, tmp_path, monkeypatch, caplog):
    trainees.build_trainer(out=tmp_path / "a").run()
    assert not (tmp_path / "a" / "samples").exists()

    def fails(*_):
        raise MemoryError("no room to draw")

    monkeypatch.setattr(trainer, "draw_samples", fails)
    run = trainees.build_trainer(out=tmp_path / "b", figure=True)
    run.run()
    assert run.step == 8
    assert "no figure at step 4: no room to draw" in caplog.text


def test_the_training_loss_is_the_mean_over_the_steps(trainees, monkeypatch):
    run = trainees.build_trainer(log_every=2)
    points = []
    monkeypatch.setattr(run.reporter, "curves", lambda step, values: points.append(values["train"]))
    run.run()
    assert run.history[1]["train"] == pytest.approx(sum(points[:2]) / 2)
    assert run.history[2]["train"] == pytest.approx(sum(points[2:]) / 2)


def test_a_logger_that_fails_costs_no_run(trainees, tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OSError(28, "No space left on device")

    run = trainees.build_trainer(out=tmp_path, loggers=["tensorboard"])
    (tmp_path / "history.jsonl").mkdir()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fails)
    run.run()
    assert run.step == 8
    assert "history.jsonl: nothing written" in caplog.text
    assert "tensorboard: nothing written (OSError: [Errno 28] No space left" in caplog.text


def test_a_logger_that_does_not_start_is_told(trainees, tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(InputError, match="cannot be started .*File exists"):
        trainees.build_trainer(out=tmp_path, loggers=["tensorboard"]).run()


def test_lines():
    row = {"step": 500, "train": 0.51, "samples_per_second": 3300.4, "validation": 0.4321}
    assert line(row) == "step 500  train 0.5100  validation 0.4321  3,300 samples/s"


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(
        "ddo_modulus.training.config.check_version_spec", lambda module, *_, **__: module != name
    )
    with pytest.raises(InputError, match=f"loggers={name} needs a package: pip install '{name}>="):
        TrainerConfig(loggers=[name])


@pytest.fixture
def launch_logger(monkeypatch):
    """PhysicsNeMo's logger as it was, afterwards."""
    from physicsnemo.utils.logging import LaunchLogger

    for name in ("wandb_backend", "mlflow_backend", "mlflow_run", "mlflow_client"):
        monkeypatch.setattr(LaunchLogger, name, getattr(LaunchLogger, name))
    monkeypatch.setattr(LaunchLogger, "_instances", {})


@pytest.mark.skipif(not check_version_spec("wandb", hard_fail=False), reason="needs wandb")
def test_weights_and_biases_offline(trainees, tmp_path, monkeypatch, launch_logger):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    curves = []

    class Listener:
        def __getattr__(self, name):
            return getattr(wandb, name)

        def log(self, values):
            curves.append(dict(values))
            wandb.log(values)

    monkeypatch.setattr("physicsnemo.utils.logging.launch._wandb", Listener())
    run = trainees.build_trainer(out=tmp_path, loggers=["wandb"])
    run.run()
    assert wandb.run is None
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    curve = {
        row["epoch"]: row["validation/validation"]
        for row in curves
        if "validation/validation" in row
    }
    assert curve == {row["step"]: row["validation"] for row in run.history}


@pytest.mark.skipif(not check_version_spec("mlflow", hard_fail=False), reason="needs mlflow")
def test_mlflow_in_a_file(trainees, tmp_path, launch_logger):
    from physicsnemo.utils.logging import LaunchLogger

    run = trainees.build_trainer(out=tmp_path, loggers=["mlflow"])
    run.run()
    assert (tmp_path / "mlflow.db").is_file()
    client, number = LaunchLogger.mlflow_client, LaunchLogger.mlflow_run.info.run_id
    curve = client.get_metric_history(number, "validation/validation")
    assert {point.step: point.value for point in curve} == {
        row["step"]: row["validation"] for row in run.history
    }


def test_the_caller_gets_the_rows(trainees):
    rows = []
    run = trainees.build_trainer()
    run.reporter.log = rows.append
    run.run()
    assert rows == run.history
    assert json.dumps(rows)
