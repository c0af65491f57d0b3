# SPDX-License-Identifier: Apache-2.0
r"""The local ensemble transform Kalman filter, all grid points and analyses at once.

Axes: ``T`` analyses, ``E`` members, ``G`` grid points, ``M`` observations.

Hunt, Kostelich and Szunyogh (2007), Physica D 230, 112 (arXiv physics/0511236). With the members'
anomalies :math:`X` and those of their observed values :math:`Y`, every grid point solves its own
analysis in the space of the members,

.. math:: A = (E - 1) I + Y^T R^{-1} Y, \qquad
    w = A^{-1} Y^T R^{-1} (y - \bar y), \qquad W = \sqrt{E - 1}\,A^{-1/2},

where the precisions :math:`R^{-1}` of the observations taper off with their distance from the
point. Members become :math:`\bar x + X (w + W)`.

The analysis equals that of DAPPER's ``LETKF`` (https://github.com/nansencenter/DAPPER) to
round-off: ``tests/benchmarks/test_letkf.py`` holds the two against each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

#: Tapers below this count as zero, as in DAPPER.
CUTOFF = 1e-3


def letkf(
    ensemble: Float[Tensor, "T E G"],
    observed: Float[Tensor, "T E M"],
    values: Float[Tensor, "T M"],
    variance: Float[Tensor, "T M"],
    taper: Float[Tensor, "T G M"],
    *,
    chunk: int = 65536,
) -> Float[Tensor, "T E G"]:
    """Analysis members from forecast members.

    Args:
        ensemble: Forecast members, at least two.
        observed: What would be observed in each.
        values: What was observed.
        variance: Its error variances.
        taper: Weight of each observation at each grid point, 0 to 1.
        chunk: Local analyses solved together; bounds the memory.
    """
    members = ensemble.shape[1]
    mean, centre = ensemble.mean(1, keepdim=True), observed.mean(1, keepdim=True)
    x, y = ensemble - mean, observed - centre
    pairs = (y[:, :, None] * y[:, None]).flatten(1, 2).mT  # T M E*E
    pull = (y * (values[:, None] - centre)).mT  # T M E
    identity = torch.eye(members, dtype=x.dtype, device=x.device)
    parts = []
    step = max(1, chunk // len(x))
    for first in range(0, x.shape[-1], step):
        points = slice(first, first + step)
        precision = taper[:, points] / variance[:, None]
        gram = (precision @ pairs).unflatten(-1, (members, members))
        scale, vectors = torch.linalg.eigh(gram + (members - 1) * identity)
        turned = (vectors.mT @ (precision @ pull)[..., None]) / scale[..., None]
        root = vectors * ((members - 1) / scale).sqrt()[..., None, :]
        weights = root @ vectors.mT + vectors @ turned  # T g E E, the mean's in every column
        parts.append(torch.einsum("tjg,tgji->tig", x[..., points], weights))
    return mean + torch.cat(parts, -1)


def gaspari_cohn(distance: Tensor, radius: Tensor | float) -> Tensor:
    """Compactly supported fifth-order correlation (Gaspari and Cohn 1999, equation 4.10).

    Args:
        distance: Of any shape.
        radius: Distance at which the taper is about exp(-1/2), as Sakov and Bertino (2011) compare
            tapers and DAPPER takes it; zero beyond 3.64 of it.
    """
    r = distance / (1.82 * radius)
    near = 1 - r**2 * (5 / 3) + r**3 * (5 / 8) + r**4 / 2 - r**5 / 4
    far = r.clamp_min(1e-6)
    far = 4 - 5 * r + r**2 * (5 / 3) + r**3 * (5 / 8) - r**4 / 2 + r**5 / 12 - (2 / 3) / far
    taper = torch.where(r <= 1, near, torch.where(r <= 2, far, 0.0))
    return torch.where(taper > CUTOFF, taper, 0.0)


def torus_distance(index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Distances ``(T, G, M)`` from all points of a periodic grid to those of ``index`` (T, M).

    In grid intervals.
    """
    height, width = shape
    here = torch.arange(height * width, device=index.device)

    def apart(one: Tensor, other: Tensor, size: int) -> Tensor:
        step = (one[:, None] - other[:, None, :]).abs()
        return torch.minimum(step, size - step)

    rows = apart(here // width, index // width, height)
    columns = apart(here % width, index % width, width)
    return (rows.square() + columns.square()).double().sqrt()


def inflate(ensemble: Float[Tensor, "T E G"], factor: Float[Tensor, " T"]) -> Tensor:
    """Scale the anomalies about the mean."""
    mean = ensemble.mean(1, keepdim=True)
    return mean + factor.to(ensemble).view(-1, 1, 1) * (ensemble - mean)
