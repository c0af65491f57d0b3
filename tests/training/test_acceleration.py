# SPDX-License-Identifier: Apache-2.0
"""Ways to be quick or small change nothing but time and memory."""

import sys
import types

import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.nn.operator import Block, NeuralOperator
from ddo_modulus.training import TrainerConfig
from ddo_modulus.training.acceleration import build_optimizer
from ddo_modulus.training.averaging import PowerAverage
from ddo_modulus.training.gradients import FlatGradients

CPU = torch.device("cpu")


@pytest.fixture
def finished(trainees):
    """End state of a run in memory."""

    def finished(**options):
        trainer = trainees.build_trainer(**options)
        trainer.run()
        return trainees.end_state(trainer)

    return finished


def test_micro_batches_equal_one_batch(finished, same):
    whole = finished(batch=12)
    same(whole, finished(batch=12, accumulate=3), close=True)
    same(whole, finished(batch=12, accumulate=12), close=True)


def test_recomputed_activations_equal_kept_ones(finished, same, trainees):
    kept, recomputed = finished(), finished(activation_checkpointing=True)
    same(kept, recomputed, close=True)
    calls = []
    trainer = trainees.build_trainer(activation_checkpointing=True, steps=1)
    block = trainer.operator.network.levels[0].down[0]
    block.norm.register_forward_hook(lambda *_: calls.append(1))
    trainer.run()
    assert len(calls) == 2  # once on the way there, once on the way back


def test_the_average_does_not_recompute(trainees):
    trainer = trainees.build_trainer(activation_checkpointing=True)
    assert type(trainer.operator.network.levels[0].down[0]) is not Block
    assert type(trainer.averaged().network.levels[0].down[0]) is Block


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(finished, trainees, precision):
    full, trainer = finished(steps=40), trainees.build_trainer(steps=40, precision=precision)
    if precision == "fp16":  # a scale at which nothing overflows: all runs have as many steps
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**10})
    trainer.run()
    assert trainer.average.count == 40
    half = trainees.end_state(trainer)
    first, last = half["history"][0]["validation"], half["history"][-1]["validation"]
    reached = full["history"][-1]["validation"]
    assert last == pytest.approx(reached, abs=0.1 * (first - reached)) and reached < first
    assert all(half["weights"][key].dtype == value.dtype for key, value in full["weights"].items())


def overflow(trainer):
    """Scale the loss beyond half precision."""
    state = trainer.scaler.state_dict()
    trainer.scaler.load_state_dict(state | {"scale": 2.0**120})


def test_an_overflow_is_no_step(trainees, same):
    trainer = trainees.build_trainer(precision="fp16", steps=3)
    overflow(trainer)
    before = {k: v.clone() for k, v in trainer.operator.state_dict().items()}
    trainer.run()
    assert trainer.step == 3 and trainer.scaler.get_scale() == 2.0**117
    same(before, trainer.operator.state_dict())
    assert trainer.average.count == 0 and trainer.scheduler.last_epoch == 0
    assert trainer.history[-1]["validation"] == trainer.history[0]["validation"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_in_half_precision(trainees, same, tmp_path, precision, halt_when_saved):
    options = {"precision": precision, "checkpoint_every": 3, "steps": 9}
    whole = trainees.build_trainer(**options)
    halted = trainees.build_trainer(out=tmp_path, **options)
    if precision == "fp16":
        overflow(whole)
        overflow(halted)
    whole.run()
    halt_when_saved(halted)
    again = trainees.build_trainer(out=tmp_path, **options)
    assert again.resume() and again.step == 3
    again.run()
    same(trainees.end_state(whole), trainees.end_state(again))


def test_divergence_is_told(trainees):
    with pytest.raises(InputError, match="has diverged .* lower trainer.learning_rate"):
        trainees.build_trainer(steps=30, learning_rate=1e30).run()


def test_averages_have_power_function_weights(trainees):
    operator = trainees.build_trainer().operator
    average, parameter = PowerAverage(operator, 0.1), next(operator.parameters())
    expected = None
    for step in range(40):
        with torch.no_grad():
            parameter.fill_(float(step))
        average.update_parameters(operator)
        share = 1.0 if step == 0 else min(1.0, 1 / (0.1 * (step + 1)))
        expected = step if step == 0 else expected + share * (step - expected)
        found = next(average.module.parameters())
        torch.testing.assert_close(found, torch.full_like(found, expected))


def test_flat_gradients_are_the_gradients():
    """Of real and complex weights; added up where they stand."""
    torch.manual_seed(0)
    real = torch.nn.Parameter(torch.randn(3, 2))
    pair = torch.nn.Parameter(torch.randn(4, dtype=torch.cfloat))
    fixed = torch.nn.Parameter(torch.randn(2), requires_grad=False)
    gradients = FlatGradients([real, fixed, pair])
    places = [real.grad.data_ptr(), pair.grad.data_ptr()]
    for _ in range(2):
        (real.square().sum() + pair.abs().square().sum()).backward()
    torch.testing.assert_close(real.grad, 4 * real.detach())
    torch.testing.assert_close(pair.grad, 4 * pair.detach())
    assert len(gradients.values) == 6 + 8 and fixed.grad is None
    assert [real.grad.data_ptr(), pair.grad.data_ptr()] == places
    gradients.zero()
    assert not real.grad.any() and not pair.grad.any()


def test_a_graph_needs_a_gpu(trainees):
    assert not TrainerConfig().captures(torch.device("cpu"))
    with pytest.raises(InputError, match="trainer.cuda_graph=true needs a GPU; choose auto"):
        trainees.build_trainer(cuda_graph=True)


@pytest.mark.parametrize("mode", [False, True, "max-autotune-no-cudagraphs"])
def test_the_network_is_compiled_where_it_stands(trainees, monkeypatch, mode):
    asked = []
    monkeypatch.setattr(NeuralOperator, "compile", lambda self, **kw: asked.append((self, kw)))
    trainer = trainees.build_trainer(compile=mode)
    expected = {"mode": None if mode is True else mode}
    assert asked == ([(trainer.operator.network, expected)] if mode else [])


class FusedAdam(torch.optim.AdamW):
    """What Apex offers, as far as it is used."""

    def __init__(self, parameters, adam_w_mode, **options):
        assert adam_w_mode
        super().__init__(parameters, **options)

    def zero_grad(self):  # Apex's takes no arguments
        super().zero_grad()


def install_apex(monkeypatch, **contents):
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")
    vars(apex.optimizers).update(contents)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)


def test_apex_is_used_where_it_is_chosen(trainees, monkeypatch):
    operator = trainees.build_trainer().operator
    with pytest.raises(InputError, match="optimizer=apex needs NVIDIA Apex .* choose adamw"):
        TrainerConfig(optimizer="apex")
    install_apex(monkeypatch)  # another package of that name
    with pytest.raises(InputError, match="the `apex` of PyPI is another package"):
        TrainerConfig(optimizer="apex")
    install_apex(monkeypatch, FusedAdam=FusedAdam)
    gpu = torch.device("cuda")
    for choice, device, expected in [
        ("apex", gpu, "apex"),
        ("auto", gpu, "apex"),
        ("auto", CPU, "adamw"),
        ("adamw", CPU, "adamw"),
    ]:
        optimizer, name = build_optimizer(operator, TrainerConfig(optimizer=choice), device)
        assert name == expected
        assert isinstance(optimizer, FusedAdam) == (expected == "apex")


def test_apex_on_a_cpu(monkeypatch):
    install_apex(monkeypatch, FusedAdam=FusedAdam)
    with pytest.raises(InputError, match="trainer.optimizer=apex needs a GPU"):
        build_optimizer(torch.nn.Linear(1, 1), TrainerConfig(optimizer="apex"), CPU)
