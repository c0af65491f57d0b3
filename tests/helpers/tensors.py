# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a seed, and how far two tensors are apart."""

import math

import torch


def generator(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def relative(one, other):
    """Norm of the difference over that of the second, in double on the CPU."""
    one, other = one.cpu().double(), other.cpu().double()
    return float((one - other).norm() / other.norm())


def autoregressive(draws, phi):
    """Stationary AR(1) along the second axis, from independent draws of its law."""
    x = [draws[:, 0]]
    for t in range(1, draws.shape[1]):
        x.append(phi * x[-1] + math.sqrt(1 - phi**2) * draws[:, t])
    return torch.stack(x, 1)
