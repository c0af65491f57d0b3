# SPDX-License-Identifier: Apache-2.0
"""Several processes do what one does."""

import json
import subprocess
import sys

import pytest
import torch

from ddo_modulus.training.config import TrainerConfig
from ddo_modulus.training.distributed import agree, gather, together, vote
from ddo_modulus.training.loss import white_noise

CPU = torch.device("cpu")


def test_torchrun_learns_what_one_process_learns(
    start, same, tmp_path, trainees, free_port, environment
):
    """Two ranks, with and without micro-batches, beside one rank at the same global batch."""
    runs = [
        {"result": str(tmp_path / f"{name}.pt"), "steps": 12, "accumulate": parts}
        for name, parts in [("two", 1), ("four", 2)]
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={free_port}", trainees.__file__]
    done = subprocess.run(
        [*launch, "train", json.dumps({"runs": runs})],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    alone = start("train", result=str(tmp_path / "one.pt"), steps=12)
    assert alone.wait() == 0, alone.said()
    one, two, four = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two", "four"))
    assert len(one["history"]) == 4
    # The untrained operator is the same for all, and so must its validation be, to the last bit.
    assert one["history"][0] == two["history"][0] == four["history"][0]
    assert one["history"][0] != one["history"][-1]
    same(one, two, close=True)
    same(one, four, close=True)


@pytest.mark.parametrize(("launcher", "method"), [("srun", "slurm"), ("mpirun", "openmpi")])
def test_ranks_of_batch_systems_find_each_other(start_ranks, tmp_path, launcher, method):
    ranks = start_ranks("meet", launcher, result=str(tmp_path / "rank"))
    for number, rank in enumerate(ranks):
        assert rank.wait() == 0, rank.said()
        found = json.loads((tmp_path / f"rank{number}").read_text())
        assert found == [number, 2, method, 3.0]


def test_a_batch_script_of_slurm_is_one_process(start, tmp_path):
    """A batch script has a task number and a number of tasks, but no others to wait for."""
    variables = {"SLURM_PROCID": "0", "SLURM_NPROCS": "4", "SLURM_LOCALID": "0"}
    alone = start("train", variables, result=str(tmp_path / "one.pt"))
    assert alone.wait() == 0, alone.said()


def test_a_mistake_that_one_rank_finds_ends_all(start_ranks):
    ranks = start_ranks("train", fails_on=1)
    for rank in ranks:
        assert rank.wait() == 2, rank.said()
        assert rank.said() == "InputError: sample 17 is damaged (rank 1)\n"


def test_a_defect_on_one_rank_leaves_no_other_waiting(start_ranks):
    ranks = start_ranks("train", fails_on=1, defect=True)
    assert [rank.wait(20) for rank in ranks] == [1, 1]
    assert "ZeroDivisionError: sample 17" in ranks[1].said()


def test_a_mistake_is_told_once(start_ranks, tmp_path):
    keys = [f"out={tmp_path / 'run'}", f"data.path={tmp_path / 'none.nc'}"]
    ranks = start_ranks("command", arguments=["train", "experiment=kolmogorov64", *keys])
    assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].said()
    first, second = (rank.said() for rank in ranks)
    assert first.startswith("ddo: ") and "none.nc" in first and first.count("\n") == 1
    assert second == ""
    keys = ["experiment=kolmogorov64", "trainer.speed=9", *keys]
    ranks = start_ranks("command", "srun", arguments=["train", *keys])
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "trainer.speed" in ranks[0].said() and ranks[1].said() == ""


def test_a_batch_that_cannot_be_shared_out():
    config = TrainerConfig(batch=12, accumulate=2)
    assert config.share(3) == 4
    with pytest.raises(Exception, match=r"batch=12 cannot .* 4 ranks .* a multiple of 8"):
        config.share(4)


@pytest.mark.parametrize("batch", [1, 5, 16, 37, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_noise_belongs_to_a_place_in_the_batch(batch, ranks):
    whole = white_noise(3, 5, batch=batch, size=4, device=CPU)
    assert whole.shape == (batch, 4) and len(whole.unique()) == whole.numel()
    for rank in range(min(ranks, batch)):
        part = white_noise(3, 5, batch=batch, size=4, device=CPU, rank=rank, ranks=ranks)
        assert torch.equal(part, whole[rank::ranks])
    assert not torch.equal(whole, white_noise(3, 6, batch=batch, size=4, device=CPU))


def test_noise_is_white():
    z = torch.cat([white_noise(0, step, batch=40, size=50, device=CPU) for step in range(50)])
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01
    assert z.flatten().unique().numel() > 0.995 * z.numel()  # single precision repeats a few


def test_a_single_process_has_nobody_to_ask():
    assert vote(7)() == 7 and gather("x") == ["x"]
    agree()
    with pytest.raises(ValueError, match="mine"), together():
        raise ValueError("mine")
