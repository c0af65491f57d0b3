# SPDX-License-Identifier: Apache-2.0
"""The operator in few kernels is the operator; without a GPU in Triton's interpreter."""

import copy

import pytest
import torch
from tensors import relative

from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.compiled import CompiledEngine
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.nn.operator import NeuralOperator

pytest.importorskip("triton", reason="needs Triton, which comes with torch on Linux")
CUDA = torch.cuda.is_available()
GPU = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
INTERPRETED = pytest.mark.skipif(CUDA, reason="kernels are interpreted where there is no GPU")


@pytest.fixture(scope="module")
def fused():
    from ddo_modulus.engines.fused import FusedOperator

    return FusedOperator


def build(domain, shape, **options):
    defaults = {
        "widths": [20, 24],
        "depths": [1, 1],
        "modes": [7, 5],
        "embedding": 8,
        "coordinates": (2, 1),
        "static_channels": 1,
    }
    network = NeuralOperator(3, 2, {"domain": domain, "shape": shape}, **(defaults | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def states(shape, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *shape, generator=generator)
    v = torch.randn(2, batch, 2, *shape, generator=generator)
    return x, torch.tensor([0.1, 1.0, 10.0])[:batch], v


class Denoising(Differentiable):
    """A network as a denoiser, for its derivative."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x, sigma, condition=None):
        return self.network(x, sigma)


def evaluate(network, x, sigma, v):
    clean, pullback = Denoising(network).value_and_pullback(x, sigma)
    return clean, pullback(v[0]), pullback(v[1])


SINGLE = {"widths": [8], "depths": [1]}
CASES = {
    "torus": ("torus", [10, 12], {}),
    "several tiles a line": ("torus", [6, 70], SINGLE | {"modes": [5]}),
    "lines in parts": ("torus", [70, 6], SINGLE | {"modes": [5]}),
    "modes in pieces": ("torus", [6, 96], SINGLE | {"modes": [45]}),
    "lines in wide pieces": ("torus", [6, 128], {"widths": [8, 8], "modes": [5, 3]}),
    "mirrored": ("box", [9, 11], {}),
    "poles": ("sphere", [7, 16], {}),
    "no poles": ("sphere", [8, 12], {}),
    "hidden in pieces": ("torus", [6, 10], {"widths": [16, 104], "local": 1.0}),
    "no neighbours": ("torus", [6, 10], {"widths": [16, 24], "local": 0.0}),
    "too wide a level": ("torus", [6, 10], {"widths": [16, 136]}),
}


@INTERPRETED
@pytest.mark.filterwarnings("ignore:overflow encountered")  # of what is masked
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_derivatives(fused, case):
    """Both, and the derivative more than once, to round-off: every domain, and all that is cut."""
    domain, shape, options = case
    network = build(domain, shape, **options)
    arguments = states(shape)
    expected = evaluate(network, *arguments)
    found = evaluate(fused(network, torch.float32), *arguments)
    assert max(relative(*pair) for pair in zip(found, expected, strict=True)) < 5e-6


@INTERPRETED
@pytest.mark.parametrize(("domain", "shape"), [("torus", [6, 10]), ("sphere", [5, 8])])
def test_one_state_and_one_level(fused, domain, shape):
    network = build(domain, shape)
    operator = fused(network, torch.float32)
    x, sigma, v = states(shape)
    pairs = [
        (evaluate(f, x[:1], sigma[:1], v[:, :1]), evaluate(f, x, sigma[:1], v))
        for f in (operator, network)
    ]
    for found, expected in zip(*pairs, strict=True):
        assert max(relative(*pair) for pair in zip(found, expected, strict=True)) < 5e-6


@INTERPRETED
def test_without_derivatives_nothing_is_kept(fused, monkeypatch):
    from ddo_modulus.engines.launches import Launch

    kept, tiled = [], Launch.tiled

    def spy(self, *inputs, **sizes):
        kept.append(sizes.get("KEEP"))
        return tiled(self, *inputs, **sizes)

    monkeypatch.setattr(Launch, "tiled", spy)
    network = build("torus", [6, 10], **SINGLE, modes=[5])
    x, sigma, _ = states([6, 10])
    operator = fused(network, torch.float32)
    torch.testing.assert_close(operator(x, sigma), network(x, sigma), rtol=1e-5, atol=1e-5)
    assert kept == [False, False]
    operator(x.requires_grad_(), sigma)
    assert kept[2:] == [True, True]


@INTERPRETED
def test_weights_that_were_being_trained(fused):
    network = build("torus", [6, 10], **SINGLE, modes=[5])
    x, sigma, _ = states([6, 10])
    operator = copy.deepcopy(fused(network.requires_grad_(True), torch.float32))
    assert not operator(x, sigma).requires_grad


@INTERPRETED
def test_second_derivatives_are_refused(fused):
    x, sigma, v = states([6, 10])
    operator = fused(build("torus", [6, 10], **SINGLE, modes=[5]), torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(operator(x, sigma), x, v[0], create_graph=True)


def test_wrong_channels_are_told(fused):
    operator = fused(build("torus", [6, 10], **SINGLE, modes=[5]), torch.float32)
    x, sigma, _ = states([6, 10])
    with pytest.raises(ValueError, match="expected 3 input channels"):
        operator(x[:, :2], sigma)


def test_what_fits(fused):
    from ddo_modulus.engines.fused import fits

    assert fits(build("torus", [6, 10])) and fits(build("torus", [6, 10], widths=[16, 136]))
    assert not fits(build("torus", [6, 10], widths=[136, 16]))
    assert not fits(build("torus", [4, 80], **SINGLE, modes=[79]))
    basis = {"domain": "torus", "shape": [4, 4]}
    assert not fits(NeuralOperator(130, 1, basis, **SINGLE, modes=[3]))


def test_engines_that_cannot_be_had(fused, monkeypatch):
    import triton

    operator = Package.load("uk_t2m").operator
    assert not isinstance(CompiledEngine(operator, precision="bf16").operator.network, fused)
    operator.network = build("box", [33, 49], widths=[136, 16])
    with pytest.raises(InputError, match="not cut for this network"):
        CompiledEngine(operator, fused=True, precision="bf16")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="need a GPU, and the operator is on cpu"):
        CompiledEngine(operator, fused=True)


def test_other_grids_are_left_to_the_network(fused):
    network = build("torus", [6, 10])
    x, sigma, _ = states([8, 12])
    assert torch.equal(fused(network, torch.float32)(x, sigma), network(x, sigma))


@INTERPRETED
def test_the_network_is_copied(fused):
    """What is done to the network afterwards changes nothing: an engine rounds its weights."""
    network = build("torus", [6, 10])
    before = copy.deepcopy(network)
    operator = fused(network, torch.float32)
    assert all(map(torch.equal, network.parameters(), before.parameters()))
    x, sigma, _ = states([6, 10])
    expected = operator(x, sigma)
    for parameter in network.parameters():
        parameter.zero_()
    assert torch.equal(operator(x, sigma), expected)


@INTERPRETED
def test_as_an_engine(fused):
    package = Package.load("uk_t2m")
    engine = CompiledEngine(package.operator, precision="fp32", compile=False, fused=True)
    assert isinstance(engine.operator.network, fused)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, 1, 33, 49, generator=generator)
    condition = package.conditions(["2019-03-27T00"])
    sigma = torch.tensor([0.05])
    clean, pullback = package.operator.value_and_pullback(x, sigma, condition)
    own, own_pullback = engine.value_and_pullback(x, sigma, condition)
    assert max(relative(own, clean), relative(own_pullback(v), pullback(v))) < 1e-5


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["kolmogorov64", "kolmogorov_window", "uk_t2m"])
def test_packages_on_a_gpu(fused, name, precision):
    """As near to full precision as the same network under autocast."""
    operator = Package.load(name, "cuda").operator
    network, shape = operator.network, operator.basis.shape
    generator = torch.Generator().manual_seed(0)
    sizes = (network.in_channels, network.out_channels)
    x, *v = (
        torch.randn(5, c, *shape, generator=generator).cuda() for c in (sizes[0], *2 * sizes[1:])
    )
    sigma = torch.tensor([0.03, 0.1, 0.3, 1.0, 5.0]).cuda()
    exact = evaluate(copy.deepcopy(network).double(), x.double(), sigma, [w.double() for w in v])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    with torch.autocast("cuda", dtype):
        rounded = evaluate(network, x, sigma, v)
    found = evaluate(fused(network, dtype), x, sigma, v)
    for own, other, truth in zip(found, rounded, exact, strict=True):
        assert relative(own, truth) < 1.5 * relative(other, truth) + 1e-3
