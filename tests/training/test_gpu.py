# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can do: compiled networks, CUDA graphs, NCCL."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def history(trainees, **options):
    trainer = trainees.build_trainer(**{"steps": 20, "batch": 16} | options)
    assert trainer.device.type == "cuda"
    trainer.run()
    return [row["validation"] for row in trainer.history]


@pytest.mark.parametrize(
    "options",
    [
        {"cuda_graph": True},
        {"cuda_graph": True, "accumulate": 2},
        {"cuda_graph": False, "compile": True, "accumulate": 2},
        {"cuda_graph": True, "compile": True, "activation_checkpointing": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_compiled_or_captured_step_learns_the_same(trainees, options):
    """CUDA graphs reuse memory: a gradient that is overwritten would show here."""
    torch._dynamo.reset()
    expected = history(trainees, cuda_graph=False)
    found = history(trainees, **options)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_half_precision(trainees, precision, cuda_graph):
    expected = history(trainees)
    found = history(trainees, precision=precision, cuda_graph=cuda_graph)
    assert found == pytest.approx(expected, rel=5e-3)


def test_an_overflow_is_no_step_of_the_fused_optimiser(trainees, same):
    trainer = trainees.build_trainer(precision="fp16", steps=3)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**120})
    before = {k: v.clone() for k, v in trainer.operator.state_dict().items()}
    trainer.run()
    same(before, trainer.operator.state_dict())
    assert trainer.average.count == 0 and trainer.scheduler.last_epoch == 0


def test_a_resumed_run(trainees, tmp_path):
    whole = history(trainees)
    history(trainees, out=tmp_path, steps=20, checkpoint_every=7, keep_checkpoints=9)
    for step in (20, 14):
        os.rename(tmp_path / "checkpoints" / f"step-{step:08d}", tmp_path / f"step-{step:08d}")
    again = trainees.build_trainer(out=tmp_path, steps=20, batch=16)
    assert again.resume() and again.step == 7
    again.run()
    assert [row["validation"] for row in again.history] == pytest.approx(whole, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_two_gpus_learn_what_one_learns(trainees, free_port, tmp_path, same, cuda_graph):
    run = {"result": str(tmp_path / "two.pt"), "steps": 12, "accumulate": 2}
    run["cuda_graph"] = cuda_graph
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={free_port}", trainees.__file__]
    command = [*launch, "train", json.dumps({"runs": [run]})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one = trainees.build_trainer(steps=12)
    one.run()
    two = torch.load(tmp_path / "two.pt", map_location="cpu")
    same(
        [row["validation"] for row in one.history],
        [row["validation"] for row in two["history"]],
        close=True,
    )
