# SPDX-License-Identifier: Apache-2.0
r"""Statistics of stores that do not fit into memory, and their place in a training store.

The group ``statistics`` of a training store holds, by hour of the day (UTC) and grid point,
``hour_count (hour)``, ``hour_mean`` and ``hour_std (hour, channel, lat, lon)``; derived from these,
``point_mean``, ``point_std (channel, lat, lon)`` and ``channel_mean``, ``channel_std (channel)``;
and ``spectrum (channel, coefficient)``. All are float64 in physical units. Standard deviations
divide by the number of samples. The group's attributes name the samples that were used.

The spectrum is the mean square of the basis' coefficients :math:`a_k` of anomalies from the mean
of their hour and point, :math:`x - m_h`. Training may subtract another climatology :math:`c_h`
(smoothed, the same at all hours or all points). Over the same samples

.. math:: E\,a_k(x - c)^2 = E\,a_k(x - m)^2 + E_h\,a_k(m_h - c_h)^2

so that one spectrum serves every climatology.

Axes: ``N`` samples, ``T`` hours, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.core
import numpy as np
import torch
import xarray as xr
import zarr
from dask.delayed import delayed
from torch import Tensor

from ddo_modulus.data.normalization import HOURS, Moments, Normalization, hours_of
from ddo_modulus.data.reader import StateReader
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.domains import build_basis

GROUP = "statistics"

_BLOCK_BYTES = 2**24  # of states that are reduced together
_THREADS = 4

Progress = Callable[[int, int], None]


def random_subset(size: int, count: int) -> np.ndarray:
    """Indices of at most ``count`` of ``size`` samples, ascending, the same ones at every call.

    They are drawn at random: equal distances could fall on the same hour of every day.
    """
    if size <= count:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, count, replace=False))


def hourly_moments(
    reader: StateReader, progress: Progress | None = None
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Mean and variance of a reader's states, hour by hour of the day, block by block of states.

    The memory needed depends on the size of a state, not on the number of states. Blocks are
    summed in float64 and merged by their means and squared deviations (Chan, Golub & LeVeque
    1983), so that a small variance about a large mean (0.01 K about 280 K) is not lost.

    Args:
        reader: The samples.
        progress: Called with the number of states read and their total.

    Yields:
        Hour, number of samples, mean and variance ``(C, H, W)`` float64.

    Raises:
        InputError: If a state cannot be read.
    """
    shape = (len(reader.channels), *reader.shape)
    length = max(1, _BLOCK_BYTES // (4 * int(np.prod(shape))))
    hours, done = hours_of(reader.times), 0

    def block(numbers: np.ndarray) -> np.ndarray:
        return np.stack([reader.read(int(n)) for n in numbers])

    for hour in sorted(set(hours.tolist())):
        numbers = np.flatnonzero(hours == hour)
        parts = [numbers[i : i + length] for i in range(0, len(numbers), length)]
        states = da.concatenate(
            [
                da.from_delayed(delayed(block)(part), (len(part), *shape), np.float32)
                for part in parts
            ]
        )
        reduced = da.reduction(
            states,
            chunk=_summary,
            combine=_merged,
            aggregate=_mean_and_variance,
            axis=0,
            dtype=np.float64,
            keepdims=True,
            output_size=2,
            concatenate=False,
        )
        with dask.config.set(scheduler="threads", num_workers=_THREADS):
            mean, variance = reduced.compute()
        done += len(numbers)
        if progress is not None:
            progress(done, len(reader))
        yield hour, len(numbers), mean, variance


# A block is reduced to its number of states, their mean and their squared deviations. Dask calls
# each of these functions once with an empty array, to learn the type of the result.
def _summary(block: np.ndarray, computing_meta: bool = False, **_: object) -> Any:  # noqa: ANN401
    if computing_meta:
        return block
    mean = block.mean(0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for state in block:
        squares += (state - mean) ** 2
    return {"number": len(block), "mean": mean, "squares": squares}


def _merged(parts: Any, computing_meta: bool = False, **_: object) -> Any:  # noqa: ANN401
    if computing_meta:
        return parts
    first, *others = dask.core.flatten([parts])
    number, mean, squares = first["number"], first["mean"], first["squares"]
    for other in others:
        total = number + other["number"]
        shift = other["mean"] - mean
        mean = mean + shift * (other["number"] / total)
        squares = squares + other["squares"] + shift**2 * (number * other["number"] / total)
        number = total
    return {"number": number, "mean": mean, "squares": squares}


def _mean_and_variance(parts: Any, computing_meta: bool = False, **_: object) -> np.ndarray:  # noqa: ANN401
    if computing_meta:
        return np.empty((0,) * 4)
    whole = _merged(parts)
    return np.stack([whole["mean"], whole["squares"] / whole["number"]])


def moments(reader: StateReader, progress: Progress | None = None) -> Moments:
    """Moments by the hour of a reader's states; memory as `hourly_moments`, plus the result."""
    shape = (HOURS, len(reader.channels), *reader.shape)
    count, mean, variance = np.zeros(HOURS), np.zeros(shape), np.zeros(shape)
    for hour, number, m, v in hourly_moments(reader, progress):
        count[hour], mean[hour], variance[hour] = number, m, v
    return Moments(*(torch.from_numpy(a) for a in (count, mean, variance)))


def write_statistics(
    path: Path,
    reader: StateReader,
    *,
    spectrum: tuple[str, tuple[float, float]] | None = None,
    fields: int = 256,
    progress: Progress | None = None,
) -> None:
    """Compute the statistics of a training store and add them to it.

    Args:
        path: Folder of the store.
        reader: The samples of the store to use.
        spectrum: Domain and lengths of the basis of the spectrum; None writes none.
        fields: Largest number of samples that the spectrum is measured on.
        progress: Called with the number of states read and their total.

    Raises:
        InputError: If a state cannot be read.
    """
    chosen = None if spectrum is None else reader[random_subset(len(reader), fields)]
    total = len(reader) + (0 if chosen is None else len(chosen))

    def advanced(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    group = zarr.open_group(path, mode="a").create_group(GROUP)
    _write_hourly(group, reader, advanced)
    first, last = (np.datetime_as_string(t, unit="s") for t in reader.times[[0, -1]])
    group.attrs.update({"first": str(first), "last": str(last), "samples": len(reader)})
    if spectrum is not None and chosen is not None:
        _write_spectrum(group, chosen, spectrum, lambda n: advanced(len(reader) + n, total))


def _write_hourly(group: zarr.Group, reader: StateReader, progress: Progress) -> None:
    """Statistics by hour and point, by point, and by channel."""
    axes = (len(reader.channels), *reader.shape)
    names = ("channel", "lat", "lon")
    count = np.zeros(HOURS)
    means, stds = (
        _create(group, f"hour_{k}", (HOURS, *axes), ("hour", *names)) for k in ("mean", "std")
    )
    for hour, number, mean, variance in hourly_moments(reader, progress):
        count[hour], means[hour], stds[hour] = number, mean, np.sqrt(variance)
    _create(group, "hour_count", (HOURS,), ("hour",))[:] = count
    _coarser(group, count, axes)


def _write_spectrum(
    group: zarr.Group,
    reader: StateReader,
    spectrum: tuple[str, tuple[float, float]],
    read: Callable[[int], None],
) -> None:
    """Mean square of the coefficients of the anomalies from the hourly means in the group."""
    domain, lengths = spectrum
    basis = build_basis(domain, reader.shape, lengths)
    square = torch.zeros(len(reader.channels), basis.size, dtype=torch.float64)
    for n, hour in enumerate(hours_of(reader.times).tolist()):
        anomaly = reader.read(n) - np.asarray(_read(group, "hour_mean")[hour])
        square += basis.analyze(torch.from_numpy(anomaly)).square()
        read(n + 1)
    array = _create(group, "spectrum", tuple(square.shape), ("channel", "coefficient"))
    array[:] = (square / len(reader)).numpy()
    array.attrs.update({"domain": domain, "lengths": list(lengths), "samples": len(reader)})


def _create(
    group: zarr.Group, name: str, shape: tuple[int, ...], dims: tuple[str, ...]
) -> zarr.Array:
    """An empty array, in chunks of one hour and channel."""
    chunks = tuple(1 if d in ("hour", "channel") else n for d, n in zip(dims, shape, strict=True))
    return group.create_array(
        name, shape=shape, dtype="f8", chunks=chunks, dimension_names=dims, fill_value=np.nan
    )


def _coarser(group: zarr.Group, count: np.ndarray, axes: tuple[int, ...]) -> None:
    """Statistics by point and by channel, from those by hour and point."""
    names = ("channel", "lat", "lon")
    of_point = [_create(group, f"point_{k}", axes, names) for k in ("mean", "std")]
    of_channel = [_create(group, f"channel_{k}", axes[:1], names[:1]) for k in ("mean", "std")]
    present = np.flatnonzero(count)
    share = (count[present] / count.sum())[:, None, None]
    for channel in range(axes[0]):
        mean, std = (
            np.asarray(_read(group, f"hour_{k}")[:, channel])[present] for k in ("mean", "std")
        )
        centre = (share * mean).sum(0)
        variance = (share * (std**2 + (mean - centre) ** 2)).sum(0)
        of_point[0][channel], of_point[1][channel] = centre, np.sqrt(variance)
        of_channel[0][channel] = centre.mean()
        of_channel[1][channel] = np.sqrt((variance + (centre - centre.mean()) ** 2).mean())


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics that a training store holds.

    Attributes:
        path: The store.
        first: Time of the first sample used.
        last: Time of the last one.
        samples: Number of samples used.
        channels: All variable ids of the store.
    """

    path: str
    first: np.datetime64
    last: np.datetime64
    samples: int
    channels: tuple[str, ...]

    @classmethod
    def of(cls, path: str) -> StoredStatistics | None:
        """Statistics of the store at `path`; None if it has none or is no training store."""
        if "://" in path or not (Path(path) / GROUP / "zarr.json").exists():
            return None
        attributes = zarr.open_group(path, path=GROUP, mode="r").attrs
        with xr.open_zarr(path, chunks=None, consolidated=False) as dataset:
            channels = tuple(dataset["channel"].values.tolist())
        first, last = (np.datetime64(str(attributes[k]), "ns") for k in ("first", "last"))
        return cls(path, first, last, int(str(attributes["samples"])), channels)

    def are_of(self, times: np.ndarray) -> bool:
        """Whether they were computed from samples at these times, and from no others."""
        inside = (times >= self.first) & (times <= self.last)
        return bool(inside.all()) and len(times) == self.samples

    def moments(self, channels: tuple[str, ...], rows: slice, columns: slice) -> Moments:
        """Moments by the hour of some channels on a part of the grid."""
        group = zarr.open_group(self.path, path=GROUP, mode="r")
        index = [self.channels.index(name) for name in channels]
        mean, std = (
            torch.from_numpy(np.nan_to_num(np.stack([_read(group, name)[:, i] for i in index], 1)))
            for name in ("hour_mean", "hour_std")
        )
        count = torch.from_numpy(np.asarray(_read(group, "hour_count")[:]))
        return Moments(
            count, mean[..., rows, columns].contiguous(), std[..., rows, columns].square()
        )

    def power(self, basis: Basis, normalization: Normalization) -> Tensor | None:
        """Mean square ``(C, K)`` of the coefficients of normalised samples.

        None if the statistics do not determine it: the store has no spectrum in this basis, or
        the scale of the normalization depends on hour or point.
        """
        group = zarr.open_group(self.path, path=GROUP, mode="r")
        if "spectrum" not in group:
            return None
        attributes = group["spectrum"].attrs
        measured_in = build_basis(
            str(attributes["domain"]),
            basis.shape,
            np.asarray(attributes["lengths"], float).tolist(),
        )
        scale = normalization.std[:1, :, :1, :1]
        if (
            type(measured_in) is not type(basis)
            or measured_in.size != basis.size
            or not torch.allclose(measured_in.eigenvalues, basis.eigenvalues)
            or not torch.equal(normalization.std, scale.expand_as(normalization.std))
        ):
            return None
        index = [self.channels.index(name) for name in normalization.channels]
        spectrum = torch.from_numpy(np.asarray(_read(group, "spectrum")[:])[index])
        if spectrum.shape[-1] != basis.size:
            return None
        stored = self.moments(normalization.channels, slice(None), slice(None))
        share = stored.count / stored.count.sum()
        offset = stored.mean - normalization.mean.double()
        for hour in stored.count.nonzero().flatten().tolist():
            spectrum = spectrum + share[hour] * basis.analyze(offset[hour]).square()
        return spectrum / scale.double().square()[0, :, :, 0]


def _read(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
