# SPDX-License-Identifier: Apache-2.0
r"""How trajectories vary in time: energy of time differences, autocovariance, seams.

.. math::
    e_t = \mathrm{E} |x_{t+1} - x_t|^2, \qquad
    C(\tau) = \mathrm{E}\, (x_{t+\tau} - m) (x_t - m).

In a stationary law :math:`e_t` is one number. Trajectories composed of windows may jump where two
of them meet: then :math:`e_t` stands out at those frames.

Axes: ``M`` trajectories, ``T`` frames, ``H W`` grid, ``L`` lags.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError


def time_difference_energy(
    x: Float[Tensor, "*M T H W"], weights: Float[Tensor, "H W"] | None = None
) -> Float[Tensor, "*M T1"]:
    """Domain mean of the squared difference of consecutive frames.

    Args:
        x: Trajectories of at least two frames.
        weights: Areas of the points; equal if None.

    Returns:
        ``(..., T-1)`` float64, by index of the earlier frame, in the fields' units squared.

    Raises:
        InputError: If there is one frame only.
    """
    _check(x, 2)
    square = (x[..., 1:, :, :].double() - x[..., :-1, :, :].double()).square()
    return _domain_mean(square, weights)


def seam_ratio(energy: Float[Tensor, "M T1"]) -> Float[Tensor, " T1"]:
    """Energy of time differences at each frame over its mean over all frames.

    Args:
        energy: Of `time_difference_energy`.

    Returns:
        ``(T-1,)`` of mean one. Peaks are seams.
    """
    by_frame = energy.mean(0)
    return by_frame / by_frame.mean()


def lagged_products(
    x: Float[Tensor, "T H W"], lags: int, weights: Float[Tensor, "H W"] | None = None
) -> Float[Tensor, "T L"]:
    """Domain mean of the product of each frame with those ``0 ... lags`` later.

    Args:
        x: One trajectory of deviations from the mean.
        lags: Largest lag.
        weights: Areas of the points; equal if None.

    Returns:
        ``(T, lags + 1)`` float64; NaN where the later frame lies beyond the end.
    """
    values = x.double()
    result = values.new_full((len(values), lags + 1), torch.nan)
    for lag in range(min(lags, len(values) - 1) + 1):
        product = values[lag:] * values[: len(values) - lag]
        result[: len(values) - lag, lag] = _domain_mean(product, weights)
    return result


def temporal_autocovariance(
    x: Float[Tensor, "*M T H W"],
    *,
    lags: int,
    mean: float | None = None,
    weights: Float[Tensor, "H W"] | None = None,
) -> Float[Tensor, " L"]:
    """Autocovariance in time, mean over trajectories, frames and domain.

    Args:
        x: Trajectories.
        lags: Largest lag in frames, below ``T``.
        mean: Origin of the deviations; the mean of all values if None.
        weights: Areas of the points; equal if None.

    Returns:
        ``(lags + 1,)`` in the fields' units squared.

    Raises:
        InputError: If there are not so many frames.
    """
    _check(x, lags + 1)
    origin = float(_domain_mean(x.double(), weights).mean()) if mean is None else mean
    runs = (x.double() - origin).reshape(-1, *x.shape[-3:])
    return torch.stack([lagged_products(run, lags, weights) for run in runs]).nanmean((0, 1))


def _domain_mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the last two axes."""
    if weights is None:
        return x.mean((-2, -1))
    share = (weights / weights.sum()).to(x)
    return (x * share).sum((-2, -1))


def _check(x: Tensor, frames: int) -> None:
    if x.ndim < 3 or x.shape[-3] < frames:
        raise InputError(
            f"trajectories of shape {tuple(x.shape)}; expected (..., T, H, W) with T of at least "
            f"{frames}"
        )
