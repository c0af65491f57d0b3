# SPDX-License-Identifier: Apache-2.0
"""PhysicsNeMo's EDM noise schedule, with noise drawn from a Gaussian random field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from jaxtyping import Bool, Float
from physicsnemo.diffusion.noise_schedulers import (
    EDMNoiseScheduler,
    VENoiseScheduler,
    VPNoiseScheduler,
)
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField

_ROUND_OFF = 1e-6  # relative; a few times that of noise levels in single precision


class FieldNoiseScheduler(EDMNoiseScheduler):
    r"""Noise :math:`x_\sigma = x_0 + \sigma L z` instead of white noise.

    It replaces PhysicsNeMo's scheduler wherever noise is drawn by :meth:`add_noise` and
    :meth:`init_latents`: in losses and deterministic samplers. PhysicsNeMo's stochastic solvers
    bypass the scheduler and draw white noise; :func:`ddo_modulus.sample` draws noise of the field.

    Args:
        field: Gaussian field ``L z``. For states on another grid, noise is drawn from
            :meth:`GaussianField.at` of that grid.
        sigma_min: Smallest noise level of a sampling schedule.
        sigma_max: Largest noise level.
        rho: Exponent of the schedule (Karras et al. 2022, eq. 5). The default is nearly uniform in
            log sigma, so that all scales of a spectrum are resolved alike: each mode is determined
            around its own noise level, and these levels cover decades. With a Gaussian prior, 32
            steps of ``dpmpp_2m`` then give standard deviations .9 % too large. The usual value of
            7 has most levels near ``sigma_min`` and gives 1.7 %.
        sigma_data: Standard deviation of the data, for the EDM loss weight.
        P_mean: Mean of the logarithm of the noise levels in training.
        P_std: Standard deviation of that logarithm.
        discretization: Spacing of the levels of a sampling schedule: ``"edm"`` (by ``rho``), or
            that of an earlier sampler scaled to the same range (Karras et al. 2022, table 1):
            ``"vp"``, ``"ve"`` (even in the logarithm) or ``"iddpm"``.
        generator: Source of all draws; None for torch's default generator.

    Raises:
        InputError: If ``discretization`` is unknown, or a level or ``rho`` is out of range.
    """

    def __init__(
        self,
        field: GaussianField,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 20.0,
        sigma_data: float | Float[Tensor, " C"] = 1.0,
        P_mean: float = -1.2,  # noqa: N803 - PhysicsNeMo's names
        P_std: float = 1.2,  # noqa: N803
        discretization: str = "edm",
        generator: torch.Generator | None = None,
    ) -> None:
        if discretization not in DISCRETIZATIONS:
            raise InputError(
                f"unknown discretization {discretization!r}; choose {', '.join(DISCRETIZATIONS)}"
            )
        finite = math.isfinite(sigma_max) and math.isfinite(rho)
        if not (finite and 0 < sigma_min < sigma_max and rho > 0):
            raise InputError(
                f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}, rho={rho:g}: noise levels must "
                "be positive and ascend, rho must be positive, and all must be finite"
            )
        super().__init__(sigma_min, sigma_max, rho, sigma_data, P_mean, P_std)
        self.field = field
        self.discretization = discretization
        self.generator = generator

    def draw(
        self,
        like: Float[Tensor, "B C H W"],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Draw noise of level one.

        Args:
            like: Tensor with the shape, dtype and device of the noise.
            generator: Source of the noise. With a sequence, the batch is divided into equal parts,
                one for each generator, so that the noise of a part does not depend on the others. A
                generator on another device draws there, and the noise is copied.

        Raises:
            InputError: If the batch is not a multiple of the number of generators.
        """
        field = self.field.at(like.shape[-2:])
        generator = self.generator if generator is None else generator
        sources = generator if isinstance(generator, Sequence) else [generator]
        if len(like) % len(sources):
            raise InputError(
                f"{len(like)} states cannot be shared out to {len(sources)} generators"
            )
        size = (len(like) // len(sources), field.channels, field.basis.size)
        parts = []
        for source in sources:
            device = like.device if source is None else source.device
            parts.append(torch.randn(size, generator=source, dtype=like.dtype, device=device))
        return field.color(torch.cat(parts).to(like.device))

    def add_noise(
        self, x0: Float[Tensor, "B C H W"], time: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C H W"]:
        """States plus noise of level ``time``."""
        return x0 + time.view(-1, 1, 1, 1) * self.draw(x0)

    def init_latents(
        self,
        spatial_shape: tuple[int, ...],
        tN: Float[Tensor, " B"],  # noqa: N803
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Pure noise at the first level of a schedule; ``spatial_shape`` is ``(C, H, W)``."""
        device = tN.device if device is None else device
        dtype = tN.dtype if dtype is None else dtype
        like = torch.empty((len(tN), *spatial_shape), device=device, dtype=dtype)
        return tN.to(like).view(-1, 1, 1, 1) * self.draw(like)

    def timesteps(
        self,
        num_steps: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, " N+1"]:
        """Noise levels from ``sigma_max`` to ``sigma_min``, then zero.

        A single step goes from ``sigma_max`` to zero.
        """
        if num_steps == 1:  # PhysicsNeMo divides by num_steps - 1
            return torch.tensor([self.sigma_max, 0.0], device=device, dtype=dtype)
        if self.discretization == "edm":
            return super().timesteps(num_steps, device=device, dtype=dtype)
        space = DISCRETIZATIONS[self.discretization]
        assert space is not None
        levels = [*space(num_steps, float(self.sigma_min), float(self.sigma_max)), 0.0]
        return torch.tensor(levels, device=device, dtype=dtype)


def level_range(levels: Sequence[float] | None, name: str) -> tuple[float, float] | None:
    """Check a range of noise levels, the smallest and the largest; None stays None.

    Args:
        levels: The range.
        name: Name of the option, for the message.

    Raises:
        InputError: If it is not a range.
    """
    if levels is None:
        return None
    ends = list(levels) if isinstance(levels, (list, tuple, np.ndarray)) else []
    if len(ends) == 2 and all(isinstance(v, Real) and not isinstance(v, bool) for v in ends):
        low, high = float(ends[0]), float(ends[1])
        if 0 <= low <= high and low < math.inf:
            return low, high
    raise InputError(f"{name}={levels!r} must be two noise levels, the smallest and the largest")


def within(levels: Float[Tensor, " S"], bounds: tuple[float, float] | None) -> Bool[Tensor, " S"]:
    """Which noise levels are in a range; all are, if it is None.

    The ends belong to it, also if a level of a schedule differs from an end by round-off.
    """
    low, high = (0.0, math.inf) if bounds is None else bounds
    return (levels >= low * (1 - _ROUND_OFF)) & (levels <= high * (1 + _ROUND_OFF))


def _variance_preserving(steps: int, low: float, high: float) -> list[float]:
    """Levels at evenly spaced times of the VP process that has the range ``low`` to ``high``."""
    first = 1e-3  # smallest time of the process
    bottom, top = math.log1p(low**2), math.log1p(high**2)
    slope = 2 * (bottom / first - top) / (first - 1)
    process = VPNoiseScheduler(beta_min=top - slope / 2, beta_d=slope, epsilon_s=first)
    times = process.timesteps(steps, dtype=torch.float64)[:-1]
    return (process.sigma(times) / process.alpha(times)).tolist()


def _variance_exploding(steps: int, low: float, high: float) -> list[float]:
    """Levels with evenly spaced logarithms."""
    process = VENoiseScheduler(low, high)
    return process.sigma(process.timesteps(steps, dtype=torch.float64)[:-1]).tolist()


def _improved_ddpm(steps: int, low: float, high: float) -> list[float]:
    """A selection of the levels of the cosine schedule with a thousand steps.

    PhysicsNeMo computes them in single precision, with errors of .1 %, and repeats levels if the
    range holds fewer than ``steps``.

    Raises:
        InputError: If the range holds fewer than ``steps`` levels.
    """
    many = 1000

    def alpha_bar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (many * 1.008)) ** 2

    levels = [0.0]
    for j in range(many, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), 1e-3)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    inside = [v for v in reversed(levels) if low <= v <= high]
    if len(inside) < steps:
        raise InputError(
            f"discretization=iddpm has {len(inside)} levels from {low:g} to {high:g}, too few for "
            f"{steps} steps; widen the range or take fewer steps"
        )
    return [inside[math.floor((len(inside) - 1) / (steps - 1) * i + 0.5)] for i in range(steps)]


#: Spacings of noise levels by name; the base class implements ``"edm"``.
DISCRETIZATIONS: dict[str, Callable[[int, float, float], list[float]] | None] = {
    "edm": None,
    "vp": _variance_preserving,
    "ve": _variance_exploding,
    "iddpm": _improved_ddpm,
}
