# SPDX-License-Identifier: Apache-2.0
r"""Error variances and consistency of an analysis, from innovations and residuals.

Axes: ``N`` analyses, ``M`` observations of each (or any shape, where only sums matter).

The innovation :math:`d = y - H(x_b)` (*O-B*) is the observation minus the background, the residual
:math:`r = y - H(x_a)` (*O-A*) the observation minus the analysis. If the errors of observations
and background are independent, with covariances :math:`R` and :math:`B`, then
:math:`E[d d^T] = H B H^T + R`. An analysis that assumes these two covariances has

.. math:: E[r d^T] = R, \qquad E[(d - r)\,d^T] = H B H^T, \qquad E[(d - r)\,r^T] = H A H^T

(Desroziers, Berre, Chapnik and Poli 2005, Q. J. R. Meteorol. Soc. 131, 3385). Estimates that differ
from what the analysis assumed show that its assumptions are wrong. If the analysis is repeated with
the estimates, they converge to the true covariances, provided that the spatial structures of the
two errors differ enough.

The reduced chi-square of the innovations, :math:`d^T (H B H^T + R)^{-1} d / M`, has the mean one if
the assumed errors are right, and a larger one if they are too small (Menard et al. 2000, Mon.
Weather Rev. 128, 2654).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError


@dataclass(frozen=True)
class Desroziers:
    """Error variances in observation space, in squared units of the observations.

    The means are subtracted first. Estimates may be negative: then the sample is too small, or the
    analysis far from optimal.

    Attributes:
        count: Number of observations.
        mean_innovation: Mean observation minus background, in units of the observations.
        mean_residual: Mean observation minus analysis.
        innovation: Variance of the innovations.
        observation: Variance of the observation errors, ``R``.
        background: Variance of the background's errors at the observations, ``H B H^T``.
        analysis: Variance of the analysis' errors there, ``H A H^T``.
    """

    count: int
    mean_innovation: float
    mean_residual: float
    innovation: float
    observation: float
    background: float
    analysis: float


def desroziers(innovation: Tensor, residual: Tensor) -> Desroziers:
    """Estimate mean error variances, the same for all observations.

    Args:
        innovation: Observation minus background, any shape.
        residual: Observation minus analysis, same shape and order.

    Raises:
        InputError: If shapes differ, there are fewer than two observations or a value is not
            finite.
    """
    d, r = (x.flatten() for x in _checked(innovation, residual))
    means = float(d.mean()), float(r.mean())
    d, r = d - d.mean(), r - r.mean()
    freedom = len(d) - 1
    return Desroziers(
        len(d),
        *means,
        float(d @ d / freedom),
        float(r @ d / freedom),
        float((d - r) @ d / freedom),
        float((d - r) @ r / freedom),
    )


def desroziers_covariances(
    innovation: Float[Tensor, "N M"], residual: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, "M M"], Float[Tensor, "M M"]]:
    """Estimate the error covariances of ``M`` observations that all ``N`` analyses share.

    Args:
        innovation: Observation minus background.
        residual: Observation minus analysis.

    Returns:
        Estimates of ``R`` and of ``H B H^T``, float64. Each is the symmetric part: if an analysis
        assumed wrong covariances, the products are not symmetric.

    Raises:
        InputError: As :func:`desroziers`.
    """
    d, r = _checked(innovation, residual)
    if d.ndim != 2:
        raise InputError(f"innovations must be (analyses, observations), got {tuple(d.shape)}")
    d, r = d - d.mean(0), r - r.mean(0)
    freedom = len(d) - 1
    observation, background = r.mT @ d / freedom, (d - r).mT @ d / freedom
    return (observation + observation.mT) / 2, (background + background.mT) / 2


def reduced_chi_square(innovation: Tensor, expected: Tensor, *, covariance: bool = False) -> float:
    """Chi-square of innovations, divided by their number.

    Args:
        innovation: Observation minus background, any shape; with ``covariance`` ``(M,)`` or
            ``(N, M)``.
        expected: Variances ``H B H^T + R`` that broadcast to the innovations, or with
            ``covariance`` one matrix ``(M, M)``.
        covariance: Whether ``expected`` is a matrix. With variances, correlations are left out:
            the mean is still one, but the scatter is larger.

    Raises:
        InputError: If shapes do not fit, or ``expected`` is not positive.
    """
    d, s = torch.as_tensor(innovation).double(), torch.as_tensor(expected).double()
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


def _checked(innovation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to float64 and raise unless the two belong together."""
    d, r = torch.as_tensor(innovation).double(), torch.as_tensor(residual).double()
    if d.shape != r.shape:
        raise InputError(
            f"innovations {tuple(d.shape)} and residuals {tuple(r.shape)} do not belong together"
        )
    if d.ndim == 0 or len(d) < 2:
        raise InputError("at least two innovations are needed")
    if not bool((d.isfinite() & r.isfinite()).all()):
        raise InputError(
            "innovations and residuals must be finite; leave out what was not assimilated"
        )
    return d, r
