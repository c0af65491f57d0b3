# SPDX-License-Identifier: Apache-2.0
import json
import zipfile

import pytest
import torch
from physicsnemo.core.module import Module
from torch.fx.experimental.proxy_tensor import make_fx

from ddo_modulus.fields.domains import build_basis
from ddo_modulus.nn.operator import NeuralOperator

TINY = {"widths": [6, 8], "depths": [1, 1], "modes": [5, 5], "embedding": 8}
SHAPES = {"torus": [10, 12], "box": [9, 12], "sphere": [9, 16]}
domains = pytest.mark.parametrize("domain", SHAPES)


def build(domain, *, scale=0.0, seed=0, **options):
    """A tiny operator, every weight disturbed by ``scale``."""
    torch.manual_seed(seed)
    operator = NeuralOperator(3, 2, {"domain": domain, "shape": SHAPES[domain]}, **TINY | options)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return operator


def inputs(domain, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *SHAPES[domain], generator=generator)
    return x, torch.tensor([0.05, 7.0])[:batch]


@domains
def test_it_is_zero_before_training(domain):
    assert not build(domain)(*inputs(domain)).any()


@domains
def test_gradients_reach_every_parameter(domain):
    operator = build(domain, scale=0.1, coordinates=[2, 3], static_channels=2)
    operator(*inputs(domain)).square().sum().backward()
    for name, parameter in operator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@domains
def test_it_takes_its_noise_level_and_condition_state_by_state(domain):
    operator = build(domain, scale=0.1)
    x, sigma = inputs(domain)
    together = operator(x, sigma)
    for i in range(2):
        alone = operator(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(operator(x, sigma.flip(0)), together, atol=1e-3)


@pytest.mark.parametrize("domain", ["torus", "box"])
def test_it_is_the_same_operator_on_a_finer_grid(domain):
    """Smooth input, so that pointwise maps alias on neither grid."""
    shape = [36, 30]
    torch.manual_seed(0)
    basis = {"domain": domain, "shape": shape}
    operator = NeuralOperator(3, 2, basis, **TINY, coordinates=[2, 2], static_channels=2)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    smooth = build_basis(domain, shape).truncate(3)
    c = torch.randn(2, 3, smooth.size, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.05, 7.0])
    coarse = operator(smooth.synthesize(c), sigma)
    fine = operator(smooth.synthesize(c, [2 * n for n in shape]), sigma)
    band = operator.basis.truncate(15)
    difference = band.analyze(fine) - band.analyze(coarse)
    assert coarse.std() > 0.01
    assert difference.norm() < 0.02 * band.analyze(coarse).norm()


def test_coordinates_tell_places_apart():
    operator = build("torus", scale=0.1, coordinates=[2, 0])
    constant = torch.ones(1, 3, *SHAPES["torus"])
    found = operator(constant, torch.ones(1))
    assert found.std(2).min() > 1e-3
    plain = build("torus", scale=0.1)(constant, torch.ones(1))
    assert plain.std((2, 3)).max() < 1e-5


def test_coarse_levels_of_a_sphere_resolve_what_they_are_given():
    basis = {"domain": "sphere", "shape": [31, 60]}
    operator = NeuralOperator(1, 1, basis, widths=[4] * 4, depths=[1] * 4, modes=[5] * 4)
    for bridge in operator.bridges:
        assert bridge.transform.basis.resolves(bridge.transform.coarse)


@pytest.mark.parametrize("domain", ["torus", "sphere"])
def test_it_and_its_pullback_are_made_of_products_and_pointwise_functions(domain):
    """No convolution, no FFT, nothing complex: what exporters and engines take."""
    operator = build(domain, scale=0.1, coordinates=[1, 1], static_channels=1)
    operator.requires_grad_(False)
    x, sigma = inputs(domain)

    def both(x, sigma, v):
        y, pullback = torch.func.vjp(lambda x: operator(x, sigma), x)
        return y, pullback(v)[0]

    v = torch.randn(operator(x, sigma).shape)
    graph = make_fx(both)(x, sigma, v)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    names = {str(n.target) for n in nodes}
    forbidden = ("conv", "fft", "complex", "index_put", "scatter", "linalg", "pad")
    assert not [n for n in names for word in forbidden if word in n]
    assert any("mm" in n for n in names)
    values = [n.meta.get("val") for n in nodes] + [n.meta.get("tensor_meta") for n in nodes]
    assert not [v for v in values if getattr(v, "dtype", None) in (torch.cfloat, torch.cdouble)]
    torch.testing.assert_close(graph(x, sigma, v)[0], operator(x, sigma))


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"expected 3 input channels, got \(2, 4, 10, 12\)"):
        build("torus")(torch.zeros(2, 4, 10, 12), torch.ones(2))


@domains
def test_checkpoints(domain, tmp_path):
    operator = build(domain, scale=0.1, coordinates=[1, 2], static_channels=1)
    operator.save(str(tmp_path / "x.mdlus"))
    with zipfile.ZipFile(tmp_path / "x.mdlus") as archive:
        stored = json.loads(archive.read("args.json"))
    assert stored["__name__"] == "NeuralOperator"
    assert stored["__args__"]["basis"] == {"domain": domain, "shape": SHAPES[domain]}
    again = Module.from_checkpoint(str(tmp_path / "x.mdlus"))
    assert type(again) is NeuralOperator
    assert torch.equal(again(*inputs(domain)), operator(*inputs(domain)))


@domains
def test_bfloat16(domain):
    operator = build(domain, scale=0.05)
    x, sigma = inputs(domain)
    exact = operator(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        rough = operator(x, sigma)
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


def test_compiled():
    operator = build("torus", scale=0.1, widths=[6], depths=[1], modes=[5])
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    x, sigma = inputs("torus")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, sigma), operator(x, sigma))
