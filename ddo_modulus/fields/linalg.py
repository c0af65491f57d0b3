# SPDX-License-Identifier: Apache-2.0
"""Batched linear algebra: GMRES, Cholesky factors, and products on tensor cores.

Axes: ``B`` batch, ``T`` analyses (the members of each are consecutive in the batch),
``M`` unknowns of a system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError


def gmres(
    apply: Callable[[Float[Tensor, "B M"]], tuple[Float[Tensor, "B M"], Tensor]],
    b: Float[Tensor, "B M"],
    iterations: int,
) -> tuple[Tensor, Float[Tensor, "B M"]]:
    r"""Minimise :math:`\|b - A w\|` over a Krylov space.

    The caller often needs not :math:`w` but a linear image of it, which each product with
    :math:`A` computes as an intermediate result. So ``apply`` returns that image too, and the
    image of the minimiser is combined from these at no further cost.

    Args:
        apply: ``w -> (A w, image of w)``; the image has the batch axis first.
        b: Right-hand sides.
        iterations: Dimension of the Krylov space, which is the number of calls of ``apply``. It is
            fixed, so that all systems of a batch take the same steps and the loop can be captured
            in a CUDA graph.

    Returns:
        Image of the minimiser, and its residual :math:`b - A w`. Further iterations do not change
        a system that is already solved.

    Source: Saad & Schultz (1986), with the Arnoldi basis orthogonalised twice.
    """
    tiny = torch.finfo(b.dtype).tiny ** 0.5
    size = b.norm(dim=1, keepdim=True)
    vectors = [b / size.clamp_min(tiny)]
    images = []
    hessenberg = b.new_zeros(len(b), iterations + 1, iterations)
    for j in range(iterations):
        product, image = apply(vectors[j])
        images.append(image)
        span = torch.stack(vectors, 1)  # B j+1 M
        for _ in range(2):
            overlap = torch.einsum("bjm,bm->bj", span, product)
            hessenberg[:, : j + 1, j] += overlap
            product = product - torch.einsum("bjm,bj->bm", span, overlap)
        rest = product.norm(dim=1, keepdim=True)
        hessenberg[:, j + 1, j] = rest[:, 0]
        # If nothing remains, the system is solved; a zero vector then adds nothing.
        solved = rest <= 1e-6 * hessenberg[:, : j + 1, j].norm(dim=1, keepdim=True)
        vectors.append(torch.where(solved, 0.0, product / rest.clamp_min(tiny)))
    # Small normal equations, in double; the ridge only affects the zero vectors.
    h = hessenberg.double()
    gram = h.mT @ h
    ridge = (1e-12 * gram.diagonal(dim1=1, dim2=2).amax(1)).clamp_min(1e-200)
    gram = gram + ridge[:, None, None] * torch.eye(iterations, dtype=h.dtype, device=h.device)
    y = _eliminate(gram, h[:, 0])
    first = torch.zeros_like(h[:, :, 0])
    first[:, 0] = 1.0
    rest = (first - (h @ y[..., None])[..., 0]).to(b.dtype) * size
    image = torch.stack(images, 1)
    image = torch.einsum("bj,bj...->b...", (y.to(b.dtype) * size).to(image.dtype), image)
    return image, torch.einsum("bj,bjm->bm", rest, torch.stack(vectors, 1))


def _eliminate(matrix: Float[Tensor, "B n n"], right: Float[Tensor, "B n"]) -> Tensor:
    """Solve small positive definite systems by Gauss-Jordan elimination, which needs no pivots.

    A library routine would make the CPU wait for the GPU to report singular matrices.
    """
    rows = torch.cat([matrix, right[..., None]], 2)
    for j in range(matrix.shape[1]):
        pivot = rows[:, j] / rows[:, j, j, None]
        rows = rows - rows[:, :, j, None] * pivot[:, None]
        rows[:, j] = pivot
    return rows[..., -1]


def inverse_factor(matrix: Float[Tensor, "T M M"]) -> Float[Tensor, "T M M"]:
    """Inverse ``P^-1`` of the lower Cholesky factor of positive definite matrices ``P P^T``.

    Factor and inverse are computed in double, so that a product with the inverse is as accurate
    as a triangular solve in the dtype of the matrix; on a GPU it is many times faster. The CPU
    never waits for a GPU: a matrix that cannot be factored there gives NaN.

    Raises:
        InputError: If a matrix on the CPU is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    if matrix.device.type == "cpu" and bool(info.any()):
        raise InputError(
            "the covariance of the innovations is not positive definite: observation errors are "
            "too small beside the standard deviation of the prior, or a value is NaN; raise the "
            "errors, or average the reports of one place (duplicates=average)"
        )
    unit = torch.eye(matrix.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    return torch.where(info[..., None, None] == 0, inverse, math.nan).to(matrix.dtype)


class Rounded(torch.autograd.Function):
    """A linear map in TF32 on a GPU; its derivative is the transpose, in TF32 too.

    Tensor cores round factors to ten bits of mantissa and accumulate in single precision. They are
    some ten times faster, and accurate enough beside a network in half precision.

    Args:
        x: Argument of the map.
        product: The map.
        transpose: Its transpose.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Apply the map."""
        with _tensor_cores():
            return product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ANN401
        """Store the map and its transpose for the derivatives."""
        _, ctx.product, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Apply the transpose."""
        with _tensor_cores():
            return ctx.transpose(*gradients), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:  # noqa: ANN401
        """Apply the map to the tangent."""
        with _tensor_cores():
            return ctx.product(tangents[0])


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Compute matrix products of single precision in TF32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def one_level(level: Float[Tensor, " B"]) -> bool:
    """Whether all noise levels of a batch are equal.

    Those of an expanded tensor are, which its strides show. Comparing values would make the CPU
    wait for the GPU.
    """
    return level.stride(0) == 0 or len(level) == 1 or bool((level == level[0]).all())


def per_member(t: Float[Tensor, "T ..."], batch: int) -> Float[Tensor, "B ..."]:
    """Repeat the entry of each analysis for all of its members.

    Raises:
        InputError: If the batch is not a multiple of the number of analyses.
    """
    if len(t) == 1:  # first, so that a tracer does not constrain a batch of symbolic size
        return t.expand(batch, *t.shape[1:])
    if len(t) == batch:
        return t
    if batch % len(t):
        raise InputError(f"{batch} states cannot be shared out to {len(t)} analyses")
    return t.repeat_interleave(batch // len(t), 0)
