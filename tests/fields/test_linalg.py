# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddo_modulus.compat import lasting
from ddo_modulus.fields.linalg import Rounded, gmres


def systems(batch=3, size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, size, size, generator=g, dtype=torch.float64)
    a = a + 4 * torch.eye(size, dtype=torch.float64)  # neither symmetric nor definite
    return a, torch.randn(batch, size, generator=g, dtype=torch.float64)


def product(a):
    return lambda w: (torch.einsum("bij,bj->bi", a, w), w)


def test_as_many_iterations_as_unknowns_solve_the_system():
    a, b = systems()
    x, _ = gmres(product(a), b, 6)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_the_residual_is_least_over_the_krylov_space(iterations):
    a, b = systems()
    w, rest = gmres(product(a), b, iterations)
    powers = [b]
    for _ in range(iterations - 1):
        powers.append(torch.einsum("bij,bj->bi", a, powers[-1]))
    krylov = torch.stack(powers, -1)
    best = (krylov @ torch.linalg.lstsq(a @ krylov, b[..., None]).solution)[..., 0]
    torch.testing.assert_close(w, best, rtol=1e-7, atol=1e-9)
    residual = b - torch.einsum("bij,bj->bi", a, w)
    torch.testing.assert_close(rest, residual, rtol=1e-7, atol=1e-9)


def test_the_image_may_be_any_linear_map_of_any_shape():
    a, b = systems()
    image = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def apply(w):
        return torch.einsum("bij,bj->bi", a, w), torch.einsum("cdj,bj->bcd", image, w)

    x = torch.linalg.solve(a, b)
    expected = torch.einsum("cdj,bj->bcd", image, x)
    torch.testing.assert_close(gmres(apply, b, 6)[0], expected, rtol=1e-8, atol=1e-8)


def test_solved_and_zero_systems_stay_solved_beside_others():
    a, b = systems()
    a[0] = 2 * torch.eye(6, dtype=torch.float64)  # solved after one iteration
    b[1] = 0.0
    x, rest = gmres(product(a), b, 6)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)
    assert bool((x[1] == 0).all()) and bool((rest[1] == 0).all())
    assert float(rest.abs().max()) < 1e-8


def test_single_precision():
    a, b = systems()
    x, _ = gmres(product(a.float()), b.float(), 6)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linalg.solve(a, b), rtol=1e-3, atol=1e-3)


def test_systems_of_a_batch_do_not_mix():
    a, b = systems()
    together = gmres(product(a), b, 3)
    alone = [gmres(product(a[i : i + 1]), b[i : i + 1], 3) for i in range(3)]
    for many, single in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(many, torch.cat(single))


@pytest.mark.parametrize("around", ["vjp", "jvp", "vmap", "fake", "inference"])
def test_constants_outlast_what_they_are_made_in(around):
    kept = {}

    def make(x):
        with lasting():
            kept["x"] = torch.from_numpy(torch.ones(3).double().numpy())
        return x * kept["x"].sum()

    x = torch.ones(3, dtype=torch.float64)
    if around == "vjp":
        torch.func.vjp(make, x)
    elif around == "jvp":
        torch.func.jvp(make, (x,), (x,))
    elif around == "vmap":
        torch.func.vmap(make)(x)
    elif around == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            make(x)
    else:
        with torch.inference_mode():
            make(x)
    y = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (y * kept["x"]).sum().backward()  # values are there, and gradients pass
    assert torch.equal(y.grad, x)


def rounded(matrix):
    return lambda x: Rounded.apply(x, lambda t: matrix @ t, lambda t: matrix.mT @ t)


def test_a_rounded_map_has_its_transpose_as_derivative():
    a, b = systems()
    assert torch.autograd.gradcheck(rounded(a[0]), (b[:, :, None].requires_grad_(),))
    x = b[:, :, None]
    torch.testing.assert_close(torch.func.vmap(rounded(a[0]))(x), a[0] @ x)
    out, tangent = torch.func.jvp(rounded(a[0]), (x,), (2 * x,))
    torch.testing.assert_close(tangent, 2 * out)


def test_rounding_ends_with_the_product():
    products = torch.backends.cuda.matmul
    seen = []

    def product(t):
        seen.append(products.fp32_precision)
        if len(seen) > 1:
            raise ValueError("no product")
        return t

    before = products.fp32_precision
    Rounded.apply(torch.ones(2), product, product)
    assert products.fp32_precision == before
    with pytest.raises(ValueError, match="no product"):
        Rounded.apply(torch.ones(2), product, product)
    assert seen == ["tf32", "tf32"] and products.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rounded_products_lose_what_half_precision_does_not_tell():
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    x = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(1)).cuda()
    exact = a.double() @ x.double()
    error = float((rounded(a)(x) - exact).norm() / exact.norm())
    assert 1e-5 < error < 1e-3  # half precision: some 3e-3
    assert float((a @ x - exact).norm() / exact.norm()) < 1e-6
