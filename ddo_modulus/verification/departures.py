# SPDX-License-Identifier: Apache-2.0
r"""What the departures of observations tell of their errors and of the background's.

Axes: ``N`` analyses, ``M`` observations of each (or any shape, where only sums matter).

With the background's departure :math:`d = y - H(x_b)` (*O-B*) and the analysis' :math:`r = y -
H(x_a)` (*O-A*), observations and background with independent errors of covariances :math:`R` and
:math:`B` have :math:`E[d d^T] = H B H^T + R`, and an analysis made with just these has

.. math:: E[r d^T] = R, \qquad E[(d - r)\,d^T] = H B H^T, \qquad E[(d - r)\,r^T] = H A H^T

(Desroziers, Berre, Chapnik and Poli 2005, Q. J. R. Meteorol. Soc. 131, 3385). Estimates that differ
from what the analysis assumed say that it assumed wrongly. Repeated, they converge to the true
errors if the spatial structures of the two differ enough.

The innovations' chi-square, :math:`d^T (H B H^T + R)^{-1} d / M`, is one in the mean if the assumed
errors are right; above one they are too small (Menard et al. 2000, Mon. Weather Rev. 128, 2654).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError


@dataclass(frozen=True)
class Desroziers:
    """Variances in observation space, in squared units of the observations.

    The mean departures are taken off first. Estimates may be negative: the sample is then too
    small, or the analysis far from what its departures say.

    Attributes:
        count: Departures.
        omb: Mean departure from the background (bias).
        oma: Mean departure from the analysis.
        innovation: Variance of the departures from the background.
        observation: Of the observation errors, ``R``.
        background: Of the background's errors at the observations, ``H B H^T``.
        analysis: Of the analysis' errors there, ``H A H^T``.
    """

    count: int
    omb: float
    oma: float
    innovation: float
    observation: float
    background: float
    analysis: float


def desroziers(omb: Tensor, oma: Tensor) -> Desroziers:
    """Mean error variances from departures that share them.

    Args:
        omb: Observation minus background, any shape.
        oma: Observation minus analysis, same shape and order.

    Raises:
        InputError: If shapes differ, there are fewer than two departures or one is not finite.
    """
    d, r = _departures(omb, oma)
    d, r = d.flatten(), r.flatten()
    first, second = d.mean(), r.mean()
    d, r = d - first, r - second
    freedom = len(d) - 1
    return Desroziers(
        len(d),
        float(first),
        float(second),
        float(d @ d / freedom),
        float(r @ d / freedom),
        float((d - r) @ d / freedom),
        float((d - r) @ r / freedom),
    )


def desroziers_covariances(
    omb: Float[Tensor, "N M"], oma: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, "M M"], Float[Tensor, "M M"]]:
    """Covariances of observation and background errors from those of the same ``M`` observations.

    Args:
        omb: Observation minus background.
        oma: Observation minus analysis.

    Returns:
        Estimates of ``R`` and of ``H B H^T``, float64. Each is the symmetric part: an analysis that
        assumed other errors than the true ones gives products that are not symmetric.

    Raises:
        InputError: As :func:`desroziers`.
    """
    d, r = _departures(omb, oma)
    if d.ndim != 2:
        raise InputError(f"departures must be (analyses, observations), got {tuple(d.shape)}")
    d, r = d - d.mean(0), r - r.mean(0)
    freedom = len(d) - 1
    observation, background = r.mT @ d / freedom, (d - r).mT @ d / freedom
    return (observation + observation.mT) / 2, (background + background.mT) / 2


def reduced_chi_square(omb: Tensor, expected: Tensor, *, covariance: bool = False) -> float:
    """Squared innovations over their expectation, per observation.

    Args:
        omb: Observation minus background, any shape; with ``covariance`` ``(M,)`` or ``(N, M)``.
        expected: What is expected of them: variances ``H B H^T + R`` that broadcast to ``omb``, or
            with ``covariance`` one matrix ``(M, M)``.
        covariance: Whether ``expected`` is a matrix. Variances alone leave correlations out: the
            mean is one for them too, its scatter larger.

    Raises:
        InputError: If shapes do not fit, or the expectation is not positive.
    """
    d, s = torch.as_tensor(omb).double(), torch.as_tensor(expected).double()
    if not d.numel():
        raise InputError("there are no innovations")
    if not covariance:
        if not bool((s > 0).all()):
            raise InputError("expected variances of innovations must be positive")
        try:
            return float((d.square() / s).mean())
        except RuntimeError:
            raise InputError(
                f"variances {tuple(s.shape)} do not fit innovations {tuple(d.shape)}"
            ) from None
    if s.ndim != 2 or s.shape != (d.shape[-1], d.shape[-1]):
        raise InputError(f"a covariance {tuple(s.shape)} does not fit innovations {tuple(d.shape)}")
    factor, failed = torch.linalg.cholesky_ex(s)
    if int(failed):
        raise InputError("the expected covariance of innovations is not positive definite")
    white = torch.linalg.solve_triangular(factor, d.reshape(-1, len(s)).mT, upper=False)
    return float(white.square().mean())


def _departures(omb: Tensor, oma: Tensor) -> tuple[Tensor, Tensor]:
    d, r = torch.as_tensor(omb).double(), torch.as_tensor(oma).double()
    if d.shape != r.shape:
        raise InputError(f"departures {tuple(d.shape)} and {tuple(r.shape)} do not belong together")
    if d.ndim == 0 or len(d) < 2:
        raise InputError("at least two departures are needed")
    if not bool((d.isfinite() & r.isfinite()).all()):
        raise InputError("departures must be finite; leave out what was not assimilated")
    return d, r
