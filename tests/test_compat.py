# SPDX-License-Identifier: Apache-2.0
"""What the private calls of torch must do, so that a release that changes one is noticed here."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ddo_modulus.compat import (
    Rehearsed,
    allow_variants,
    core_decompositions,
    last_recorded,
    lasting,
    move_towards,
    on_gpu,
    recorded,
    repeatable_backward,
    valueless,
)


def test_recorded_under_tracers_and_compilers_only():
    seen = []

    def look(x):
        seen.append(recorded())
        return x + 1

    look(torch.ones(1))
    make_fx(look)(torch.ones(1))
    assert seen == [False, True]
    compiled = torch.compile(lambda x: x + recorded(), backend="eager", fullgraph=True)
    assert float(compiled(torch.zeros(1))) == 1


class Everything(TorchFunctionMode):
    """Sees all calls of torch, as an exporter does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_lasting_tensors_are_plain_whatever_goes_on():
    made = {}

    def make(name):
        with lasting():
            made[name] = torch.arange(3.0) * 2

    def under(name):
        def function(x):
            make(name)
            return x * 1

        return function

    torch.func.jvp(under("jvp"), (torch.ones(1),), (torch.ones(1),))
    torch.func.vmap(under("vmap"))(torch.ones(2, 1))
    make_fx(under("tracer"), tracing_mode="fake")(torch.ones(1))
    with torch.inference_mode():
        make("inference")
    with valueless([(1,)])[0]:
        make("valueless")
    with Everything() as mode:
        make("functions")
    assert not mode.seen
    for name, tensor in made.items():
        assert type(tensor) is torch.Tensor and not tensor.is_inference(), name
        assert torch.equal(tensor, torch.tensor([0.0, 2.0, 4.0])), name
        assert tensor.mul(torch.ones(3, requires_grad=True)).sum().requires_grad, name


class Lazy(nn.Module, Rehearsed):
    """Keeps a constant of its first call, which takes NumPy."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.calls = []

    def constant(self, like):
        key = (like.shape[-1], like.dtype)
        if key not in self.kept:
            with lasting():
                self.kept[key] = torch.from_numpy(torch.arange(key[0]).numpy() * 2).to(like)
        return self.kept[key]

    def forward(self, x, extra=None):
        self.rehearse(x, extra)
        if not torch.compiler.is_dynamo_compiling():
            self.calls.append(tuple(x.shape))
        return x * self.constant(x) + (0 if extra is None else extra)


def test_rehearsed_modules_compile_before_their_first_call():
    model = Lazy()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(4, 3)), torch.tensor([[0.0, 2.0, 4.0]] * 4))
    assert model.calls == [(1, 3)]  # once, a batch of one
    # Another grid and batch, which the compiler takes for symbols, another dtype, an extra input.
    x = torch.full((5, 6), 2.0, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, x), x + x * 2 * torch.arange(6))
    assert all(type(t) is torch.Tensor for t in model.kept.values())


def test_a_rehearsal_is_for_compilers_only():
    model = Lazy()
    model(torch.ones(4, 3))
    assert model.calls == [(4, 3)]


def test_rehearsed_modules_export_before_their_first_call():
    for strict in (False, True):
        program = torch.export.export(Lazy(), (torch.ones(4, 3),), strict=strict)
        assert torch.equal(program.module()(torch.ones(4, 3))[0], torch.tensor([0.0, 2.0, 4.0]))


def test_variants_are_allowed_but_never_fewer():
    config = torch._dynamo.config
    with config.patch(recompile_limit=8):
        allow_variants(20)
        assert config.recompile_limit == 20
        allow_variants(10)
        assert config.recompile_limit == 20


def test_compiled_code_can_go_back_twice():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x.sin() * x.cos()).exp(), backend="aot_eager")
    x = torch.linspace(0, 1, 5, requires_grad=True)
    with repeatable_backward():
        assert not torch._functorch.config.donated_buffer
        y = compiled(x).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_valueless_tensors_have_sizes_of_any_magnitude():
    mode, (huge, number) = valueless([(10**9, 10**6), ()])
    assert huge.shape == (10**9, 10**6) and huge.dtype == torch.float32
    assert number.shape == () and huge.device.type == "cpu"
    with mode:
        assert (huge @ torch.ones(10**6, 1)).shape == (10**9, 1)


def test_decompositions_leave_core_operations():
    table = core_decompositions()

    def operations(decompositions):
        graph = make_fx(lambda x: torch.nn.functional.silu(x), decompositions)(torch.ones(2)).graph
        return {str(n.target) for n in graph.nodes if n.op == "call_function"}

    assert operations(None) == {"aten.silu.default"}
    assert "aten.sigmoid.default" in operations(table)
    table.clear()
    assert core_decompositions()


def test_the_last_recorded_node():
    names = []

    def function(x):
        names.append(last_recorded().op)
        y = x.sin()
        names.append(str(last_recorded().target))
        return y

    make_fx(function)(torch.ones(1))
    assert names == ["placeholder", "aten.sin.default"]
    with pytest.raises(RuntimeError, match="no tracer"):
        last_recorded()


def test_averages_move_in_place():
    averages, values = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    first = averages[0]
    move_towards(averages, values, 0.25)
    assert averages[0] is first
    assert torch.equal(first, torch.full((2,), 0.25))
    assert torch.equal(averages[1], torch.full((3,), 0.75))


def test_profiled_calls_on_the_cpu_are_not_on_a_gpu():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.ones(3).sin()
    assert trace.events() and not any(map(on_gpu, trace.events()))
