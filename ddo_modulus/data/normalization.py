# SPDX-License-Identifier: Apache-2.0
r"""Normalization of physical fields: :math:`(x - m) / s`, by channel, grid point and hour.

Models and priors work in normalized units only; this module converts to and from physical units.

Axes: ``B`` batch, ``N`` samples, ``T`` hours of the day (1 or 24), ``C`` channel, ``H W`` grid.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ddo_modulus.errors import InputError

HOURS = 24

# Largest factor by which a daily cycle may amplify errors at hours without samples.
_MAX_AMPLIFICATION = 3.0

# Data whose standard deviation is below this fraction of their mean are constant, but for rounding.
_CONSTANT = 1e-12


def hours_of(times: np.ndarray) -> np.ndarray:
    """Hour of the day (UTC) nearest to ``datetime64`` times; the earlier one of two as near."""
    almost_half = np.timedelta64(30 * 60 * 10**9 - 1, "ns")
    nearest = (times.astype("datetime64[ns]") + almost_half).astype("datetime64[h]")
    return nearest.astype("int64") % HOURS


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of samples, from which a normalization with any options can be fitted.

    Attributes:
        count: ``(T,)`` number of samples at each hour of the day, or of all samples.
        mean: ``(T, C, H, W)`` float64, physical units; undefined at hours without samples.
        variance: Like `mean`, in physical units squared; about the mean of the hour, without
            Bessel's correction.
    """

    count: Float[Tensor, " T"]
    mean: Float[Tensor, "T C H W"]
    variance: Float[Tensor, "T C H W"]

    @classmethod
    def of(
        cls, fields: Float[Tensor, "N C H W"], hours: Integer[Tensor, " N"] | None = None
    ) -> "Moments":
        """Moments of samples in memory; by hour of the day if `hours` is not None.

        Raises:
            InputError: If an hour is not within 0 to 23.
        """
        x = fields.double()
        if hours is None:
            groups = [x]
        else:
            _check_hours(hours)
            groups = [x[hours.to(x.device) == h] for h in range(HOURS)]
        count = torch.tensor([len(g) for g in groups], dtype=torch.float64, device=x.device)
        nothing = x.new_zeros(x.shape[1:])
        mean = torch.stack([g.mean(0) if len(g) else nothing for g in groups])
        variance = torch.stack([g.var(0, correction=0) if len(g) else nothing for g in groups])
        return cls(count, mean, variance)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Climatological mean to subtract and standard deviation to divide by.

    Attributes:
        channels: Variable ids, ``C`` of them.
        mean: ``(T, C, H|1, W|1)`` float32, physical units; for 24 hours (UTC), or one for all.
        std: Like `mean`; positive.

    Raises:
        InputError: If the shapes differ, a value is not finite, or a standard deviation is not
            positive.
    """

    channels: tuple[str, ...]
    mean: Float[Tensor, "T C H W"]
    std: Float[Tensor, "T C H W"]

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.ndim != 4 or value.shape[0] not in (1, HOURS):
                raise InputError(
                    f"normalization: {name} has shape {tuple(value.shape)}; "
                    f"expected (1 or {HOURS}, C, H or 1, W or 1)"
                )
            if value.shape[1] != len(self.channels):
                raise InputError(
                    f"normalization: {name} has {value.shape[1]} channels; expected "
                    f"{len(self.channels)}: {', '.join(self.channels)}"
                )
            self._check(name, "not finite", ~torch.isfinite(value))
        self._check("std", "not positive", self.std <= 0)
        if self.mean.shape != self.std.shape:
            raise InputError(
                f"normalization: mean has shape {tuple(self.mean.shape)}, "
                f"std {tuple(self.std.shape)}; give both the same shape"
            )

    def _check(self, name: str, fault: str, bad: Tensor) -> None:
        """Raise an error that names the channels if any of `bad` ``(T, C, H, W)`` is true."""
        if bad.any():
            names = [c for c, b in zip(self.channels, bad.any(dim=(0, 2, 3)), strict=True) if b]
            raise InputError(
                f"normalization: {name} is {fault} for {', '.join(names)}; "
                "check the data that it was fitted to"
            )

    @property
    def per_hour(self) -> bool:
        """Whether the statistics depend on the hour of the day."""
        return self.mean.shape[0] == HOURS

    def to(self, device: torch.device | str) -> "Normalization":
        """Copy to a device, which saves a transfer in each call."""
        return Normalization(self.channels, self.mean.to(device), self.std.to(device))

    def normalize(
        self, x: Float[Tensor, "B C H W"], hour: Integer[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Convert from physical to normalized units.

        Args:
            x: Fields in physical units, on any device.
            hour: Hour of the day, UTC, 0 to 23; needed if `per_hour`.

        Returns:
            Fields of about zero mean and unit variance, in float32, or the dtype of `x` if that
            is wider.

        Raises:
            InputError: If a shape does not fit, or the hour is missing or out of range.
        """
        mean, std = self._at(x, hour)
        return (x - mean) / std

    def denormalize(
        self, x: Float[Tensor, "B C H W"], hour: Integer[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Convert from normalized to physical units; arguments and errors as in `normalize`."""
        mean, std = self._at(x, hour)
        return x * std + mean

    def _at(self, x: Tensor, hour: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and std at the hours of `x`, on its device, each ``(B|1, C, H|1, W|1)``."""
        fits = x.ndim == 4 and all(
            mine in (1, theirs)
            for mine, theirs in zip(self.mean.shape[2:], x.shape[2:], strict=True)
        )
        if not fits or x.shape[1] != len(self.channels):
            raise InputError(
                f"fields of shape {tuple(x.shape)} do not fit a normalization of shape "
                f"{tuple(self.mean.shape[1:])} for {', '.join(self.channels)}; give these "
                "channels, on the grid of the statistics if those are by point"
            )
        if not self.per_hour:
            return self.mean.to(x.device), self.std.to(x.device)
        if hour is None or hour.shape != x.shape[:1]:
            got = "no hours" if hour is None else f"hours of shape {tuple(hour.shape)}"
            raise InputError(
                f"this normalization depends on the hour of the day; got {got} for a batch of "
                f"{x.shape[0]}: give hour (B,), 0 to {HOURS - 1} UTC"
            )
        _check_hours(hour)
        index = hour.to(self.mean.device, torch.long)
        return self.mean[index].to(x.device), self.std[index].to(x.device)

    @classmethod
    def fit(
        cls,
        channels: Sequence[str],
        fields: Float[Tensor, "N C H W"],
        hours: Integer[Tensor, " N"] | None = None,
        *,
        per_hour: bool = False,
        per_point: bool = False,
        harmonics: int | None = None,
        floor: float = 1e-2,
    ) -> "Normalization":
        """Estimate mean and standard deviation from samples.

        Args:
            channels: Variable ids, ``C`` of them.
            fields: Samples in physical units.
            hours: Hour of the day (UTC) of each sample; needed if `per_hour`.
            per_hour: Estimate separate statistics for each hour of the day.
            per_point: Estimate separate statistics for each grid point; otherwise for the grid.
            harmonics: With `per_hour`, fit this many harmonics to the daily cycle of mean and
                variance, which reduces sampling noise and fills in hours without samples. None
                keeps the statistics of each hour.
            floor: Smallest standard deviation, as a fraction of the channel's standard deviation
                over all samples and points. It keeps a nearly constant point from dominating a
                loss.

        Returns:
            The normalization, in float32.

        Raises:
            InputError: If samples are missing, not finite or constant in a channel, if `per_hour`
                is set without hours or with too few different ones, or if a shape does not fit.
        """
        if fields.ndim != 4 or fields.shape[0] == 0 or fields.shape[1] != len(channels):
            raise InputError(
                f"fields have shape {tuple(fields.shape)}; expected (N, {len(channels)}, H, W) "
                f"for {', '.join(channels)} with at least one sample"
            )
        if per_hour and (hours is None or hours.shape != fields.shape[:1]):
            raise InputError("per_hour=True needs hours (N,), one for each sample")
        return cls.from_moments(
            channels,
            Moments.of(fields, hours if per_hour else None),
            per_hour=per_hour,
            per_point=per_point,
            harmonics=harmonics,
            floor=floor,
        )

    @classmethod
    def from_moments(
        cls,
        channels: Sequence[str],
        moments: "Moments",
        *,
        per_hour: bool = False,
        per_point: bool = False,
        harmonics: int | None = None,
        floor: float = 1e-2,
    ) -> "Normalization":
        """Like `fit`, from the moments of samples, which need not fit in memory.

        Raises:
            InputError: As `fit`, or if `per_hour` is set and the moments are not by hour.
        """
        if harmonics is not None and not per_hour:
            raise InputError("harmonics fit the daily cycle: they need per_hour=True")
        if per_hour and len(moments.count) != HOURS:
            raise InputError("per_hour=True needs moments by hour of the day")
        share = (moments.count / moments.count.sum())[:, None, None, None]
        present = moments.count.nonzero().flatten().tolist()
        over = (0,) if per_point else (0, 2, 3)

        def average(values: Tensor) -> Tensor:
            """Average over all samples, and over the grid unless `per_point`: (1, C, H|1, W|1)."""
            values = (share * values)[present].sum(0, keepdim=True)
            return values if per_point else values.mean((2, 3), keepdim=True)

        def variance_about(mean: Tensor) -> Tensor:
            """Mean square deviation of the samples of each hour from `mean`."""
            return moments.variance + (moments.mean - mean) ** 2

        centre = average(moments.mean).mean((2, 3), keepdim=True)
        overall = average(variance_about(centre)).mean((0, 2, 3)).sqrt()
        scale = centre.flatten().abs()
        for channel, value, size in zip(channels, overall.tolist(), scale.tolist(), strict=True):
            if not _CONSTANT * size < value < float("inf"):  # NaN fails as well
                fault = "constant" if value <= _CONSTANT * size else "not finite"
                raise InputError(
                    f"{channel} is {fault} in the samples: leave it out or correct the data"
                )

        if per_hour:
            cycle = _DailyCycle(torch.tensor(present, device=share.device), harmonics)

            def by_hour(values: Tensor) -> list[Tensor]:
                return [values[[h]].mean(over, keepdim=True) for h in present]

            mean = cycle.fit(by_hour(moments.mean))
            variance = cycle.fit(by_hour(variance_about(mean)))
        else:
            mean = average(moments.mean)
            variance = average(variance_about(mean))
        std = variance.clamp_min(0).sqrt().maximum(floor * overall[:, None, None])
        return cls(tuple(channels), mean.float(), std.float())

    def window(self, rows: slice, columns: slice) -> "Normalization":
        """Crop statistics by point to a part of the grid; others are returned unchanged."""
        if self.mean.shape[-2:] == (1, 1):
            return self
        mean, std = (v[..., rows, columns].contiguous() for v in (self.mean, self.std))
        return Normalization(self.channels, mean, std)

    def save(self, path: str | Path) -> None:
        """Write a compressed ``.npz``, in float32: exactly the values used in training.

        Half precision would round the mean of a temperature to 0.25 K.
        """
        with Path(path).open("wb") as file:  # numpy would append a suffix to a file name
            np.savez_compressed(
                file,
                channels=np.array(self.channels),
                mean=self.mean.float().cpu().numpy(),
                std=self.std.float().cpu().numpy(),
            )

    @classmethod
    def load(cls, path: str | Path) -> "Normalization":
        """Read a file written by `save`; runs no code from the file.

        Raises:
            InputError: If the file is missing, damaged or not a normalization.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                channels = tuple(str(c) for c in file["channels"])
                mean, std = (torch.from_numpy(file[k]).float() for k in ("mean", "std"))
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: cannot be read as a normalization ({error}); copy or fit it again"
            ) from error
        return cls(channels, mean, std)


def _check_hours(hours: Tensor) -> None:
    if hours.min() < 0 or hours.max() >= HOURS:
        raise InputError(
            f"hours run from {int(hours.min())} to {int(hours.max())}; expected 0 to "
            f"{HOURS - 1} UTC"
        )


class _DailyCycle:
    """Least-squares fit of a daily cycle to the hours that have samples.

    Attributes:
        present: Hours that have samples, in ascending order.
    """

    def __init__(self, hours: Tensor, harmonics: int | None) -> None:
        """Prepare the fit for samples at `hours` ``(N,)``.

        Raises:
            InputError: If `harmonics` is out of range, or the hours do not determine the cycle.
        """
        self.present: list[int] = sorted(set(hours.tolist()))
        if harmonics is None:
            basis = torch.eye(HOURS, dtype=torch.float64)
        elif 0 <= harmonics < HOURS // 2:
            angle = 2 * torch.pi * torch.arange(HOURS, dtype=torch.float64) / HOURS
            order = torch.arange(harmonics + 1)
            cos, sin = torch.cos(angle[:, None] * order), torch.sin(angle[:, None] * order[1:])
            basis = torch.cat((cos, sin), dim=1)
        else:
            raise InputError(f"harmonics is {harmonics}; expected 0 to {HOURS // 2 - 1}, or None")
        # Values at the hours present -> coefficients -> values at all hours.
        to_all = basis @ torch.linalg.pinv(basis[self.present])
        if len(self.present) < basis.shape[1] or to_all.abs().sum(dim=1).max() > _MAX_AMPLIFICATION:
            raise InputError(
                f"the hours of the day that have samples ({', '.join(map(str, self.present))} UTC) "
                f"do not determine a daily cycle with "
                f"{'each hour of its own' if harmonics is None else f'harmonics={harmonics}'}: "
                "use fewer harmonics, or per_hour=False"
            )
        self._filter = to_all.to(hours.device)

    def fit(self, values: list[Tensor]) -> Tensor:
        """Fit the cycle ``(24, C, H|1, W|1)`` to a ``(1, C, H|1, W|1)`` for each hour present."""
        return torch.tensordot(self._filter, torch.cat(values), dims=1)
