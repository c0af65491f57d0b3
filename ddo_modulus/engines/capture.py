# SPDX-License-Identifier: Apache-2.0
"""Priors and posteriors as CUDA graphs (:mod:`ddo_modulus.cuda_graphs`).

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.cuda_graphs import Replay
from ddo_modulus.diffusion.prior import Denoiser, Prior, Scheduled
from ddo_modulus.fields.derivative import Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import one_level

if TYPE_CHECKING:
    from ddo_modulus.compat import GraphPool


class Captured:
    """A prior or posterior that is recorded as a CUDA graph, with its derivative and solver.

    There is one recording for each shape of states. The sampler itself is not recorded: between two
    calls it needs only a few kernels, which the CPU launches while the graph runs. On other devices
    calls go to the prior. A prior that cannot be recorded runs without a graph, after a warning
    with the reason. Examples are posteriors with nonlinear operators, which factor matrices at each
    call, and denoisers that read values of their arguments.

    Args:
        prior: Prior or posterior to record; its state must not change afterwards.
        pool: Memory to share with other graphs (:class:`Replay`).
    """

    def __init__(self, prior: Prior, pool: GraphPool | None = None) -> None:
        self.prior = prior
        self._failure: str | None = None
        self._replay: Replay | None = None
        self._pool = pool
        self._scheduled: tuple[Mapping[float, Prior], dict[float, Captured]] | None = None

    @property
    def failure(self) -> str | None:
        """Reason why recording failed; None if it has not."""
        parts = [] if self._scheduled is None else self._scheduled[1].values()
        return next((p.failure for p in parts if p.failure is not None), self._failure)

    @property
    def noise(self) -> GaussianField:
        """Noise field of the prior."""
        return self.prior.noise

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of the prior."""
        return self.prior.linear

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and ``v -> J^T v``; not recorded."""
        return self.prior.value_and_pullback(x, sigma, condition)

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states."""
        if x.device.type != "cuda" or self._failure is not None:
            return self.prior(x, sigma, condition)
        one = one_level(sigma)
        like = None if condition is None else (condition.shape, condition.dtype)
        key = (one, x.shape, x.dtype, like)
        try:
            if self._replay is None:
                self._replay = Replay(
                    _function(self.prior), warm_up=2, watched=True, pool=self._pool
                )
            return self._replay(key, x, sigma[:1] if one else sigma, condition)
        except RuntimeError as error:
            self._failure = str(error).strip().splitlines()[0]
            self._replay = None
            warnings.warn(
                f"no CUDA graph of {type(self.prior).__name__}, which runs without: "
                f"{self._failure}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.prior(x, sigma, condition)

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Prior]:
        """The priors that the recorded one schedules (:class:`.Scheduled`), each recorded."""
        if not isinstance(self.prior, Scheduled):
            return {}
        prepared = self.prior.scheduled(levels, like)
        if self._scheduled is None or self._scheduled[0] is not prepared:
            pool = torch.cuda.graph_pool_handle() if like.is_cuda else None
            own = {id(d): Captured(d, pool) for d in prepared.values()}
            self._scheduled = prepared, {level: own[id(d)] for level, d in prepared.items()}
        return self._scheduled[1]


def _function(denoiser: Denoiser) -> Callable[..., Tensor]:
    """The function to record; the first entry of its key is True if states share a level."""

    def call(key: tuple, x: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        return denoiser(x, level.expand(len(x)) if key[0] else level, condition)

    return call
