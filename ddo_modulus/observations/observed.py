# SPDX-License-Identifier: Apache-2.0
"""Observed values and their errors, of one analysis or of several.

Axes: ``T`` analyses, ``M`` observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.observations.algebra import LinearOperator, ObservationOperator


@dataclass(frozen=True)
class Observations:
    """Observed values and their error statistics.

    Attributes:
        operator: What they observe.
        values: ``(M,)``, or ``(T, M)`` for several analyses (:meth:`batch`).
        variance: Error variances: a number, ``(M,)`` or ``(T, M)``; None with ``covariance``.
        covariance: ``(M, M)`` full error covariance instead.

    Raises:
        InputError: On sizes that do not match, values that are not finite, errors not positive.
    """

    operator: ObservationOperator
    values: Tensor
    variance: Tensor | float | None = None
    covariance: Float[Tensor, "M M"] | None = None

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values)
        values = values if values.is_floating_point() else values.float()
        size = self.operator.size
        if size == 0:
            raise InputError("there are no observations")
        if values.shape[-1] != size:
            raise InputError(f"{values.shape[-1]} values do not fit an operator of {size}")
        if not bool(values.isfinite().all()):
            raise InputError(
                f"{int((~values.isfinite()).sum())} observed values are NaN or infinite; "
                "drop them before assimilation"
            )
        object.__setattr__(self, "values", values)
        if (self.variance is None) == (self.covariance is None):
            raise InputError("give either the variance or the covariance of observation errors")
        if self.covariance is not None:
            covariance = torch.as_tensor(self.covariance).to(values)
            if covariance.shape != (size, size):
                raise InputError(f"the error covariance must be {size}x{size}")
            if int(torch.linalg.cholesky_ex(covariance).info) or not torch.allclose(
                covariance, covariance.mT
            ):
                raise InputError("the error covariance is not symmetric positive definite")
            object.__setattr__(self, "covariance", covariance)
            return
        variance = torch.as_tensor(self.variance).to(values)
        if not bool((variance > 0).all() and variance.isfinite().all()):
            raise InputError("observation error variances must be positive and finite")
        try:
            variance = variance.expand(torch.broadcast_shapes(variance.shape, (size,)))
        except RuntimeError:
            raise InputError(
                f"error variances of shape {tuple(variance.shape)} do not fit {size} observations"
            ) from None
        object.__setattr__(self, "variance", variance)

    def error_covariance(self, like: Tensor) -> Float[Tensor, "T M M"]:
        """``R`` as matrices, in the dtype and on the device of ``like``."""
        if self.covariance is not None:
            return self.covariance.to(like)[None]
        assert isinstance(self.variance, Tensor)
        return torch.diag_embed(self.variance.to(like).reshape(-1, self.operator.size))

    def rescale(self, mean: Tensor, std: Tensor) -> Observations:
        """The same observations of normalised states (:meth:`ObservationOperator.rescale`)."""
        return Observations(
            self.operator.rescale(mean, std), self.values, self.variance, self.covariance
        )

    def take(self, rows: Int[Tensor, " R"]) -> Observations:
        """Some of the observations of one analysis.

        Args:
            rows: Their numbers, ascending.
        """
        operator, values = self.operator.take(rows), self.values[..., rows]
        if self.covariance is not None:
            return Observations(operator, values, covariance=self.covariance[rows][:, rows])
        assert isinstance(self.variance, Tensor)
        return Observations(operator, values, self.variance[..., rows])

    @staticmethod
    def batch(parts: Sequence[Observations]) -> Observations:
        """Observations of several analyses as one object with a leading axis ``T``.

        Analyses may differ in number and place of observations; shorter ones are padded with rows
        that observe nothing.

        Args:
            parts: One for each analysis, of point, area or other linear operators, values ``(M,)``.

        Raises:
            InputError: If there are no parts, one is itself a batch, an operator is not linear or
                an error covariance is full.
        """
        if not parts:
            raise InputError("there are no analyses to batch")
        linear: list[tuple[LinearOperator, Tensor, Tensor]] = []
        for p in parts:
            if not isinstance(p.operator, LinearOperator) or not isinstance(p.variance, Tensor):
                raise InputError(
                    "only linear operators with diagonal errors batch; assimilate others singly"
                )
            if len(p.operator.index) > 1 or p.values.ndim > 1 or p.variance.ndim > 1:
                raise InputError("these observations are of several analyses already")
            linear.append((p.operator, p.values, p.variance))
        size = max(operator.size for operator, _, _ in linear)
        width = max(operator.index.shape[-1] for operator, _, _ in linear)
        padded = []
        pad = torch.nn.functional.pad
        for operator, values, variance in linear:
            rows, more = size - operator.size, width - operator.index.shape[-1]
            padded.append(
                (
                    pad(operator.index[0], (0, more, 0, rows)),
                    pad(operator.weight[0], (0, more, 0, rows)),
                    pad(operator.offset[0], (0, rows)),
                    pad(values, (0, rows)),
                    pad(variance, (0, rows), value=1.0),
                )
            )
        stacked = [torch.stack(column) for column in zip(*padded, strict=True)]
        return Observations(LinearOperator(*stacked[:3]), stacked[3], stacked[4])
