# SPDX-License-Identifier: Apache-2.0
"""What ``ddo verify samples=`` compares: generated and true fields that fit together.

Axes: ``E`` members, ``T`` times, ``H W`` grid.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import xarray as xr
from omegaconf import DictConfig

from ddo_modulus.cli.options import flag
from ddo_modulus.cli.verify.domain import nearest, same_domain
from ddo_modulus.data.source import check_values, open_dataset
from ddo_modulus.errors import InputError

log = logging.getLogger(__name__)

_TRUTH, _LOWRES = "_truth", "_lowres"
_FEW = 10  # true fields, below which their own variability is a guess


@dataclass(frozen=True)
class Inputs:
    """What is compared.

    Attributes:
        samples: Generated variables.
        truth: The same variables, true, on the same domain.
        targets: What each sample should have been, at the samples' times, if conditional.
        trajectories: Whether the samples' frames follow each other in time.
    """

    samples: xr.Dataset
    truth: xr.Dataset
    targets: xr.Dataset | None
    trajectories: bool


def open_inputs(config: DictConfig) -> Inputs:
    """Open samples and truth and see that they fit together.

    Raises:
        InputError: If they do not, or if a value is missing.
    """
    path = str(config.samples)
    names, targeted = generated_variables(path)
    samples = open_dataset(path, names)
    names = [str(name) for name in samples.data_vars]
    if samples.sizes.get("trajectory", 1) > 1 and "ensemble" in samples.sizes:
        raise InputError(f"{path} has trajectories and members; select one trajectory")
    targets = None
    if targeted:
        targets = open_dataset(path, [name + _TRUTH for name in names])
        targets = targets.rename({name + _TRUTH: name for name in names})
    if config.truth is None and targets is None:
        raise InputError(
            f"{path} holds no <variable>{_TRUTH}; give truth=...: true fields to compare with"
        )
    truth = targets if config.truth is None else open_dataset(str(config.truth), names)
    assert truth is not None
    where = path if config.truth is None else str(config.truth)
    truth = same_domain(truth, samples, where)
    if targets is not None:
        targets = _at_samples(targets, samples, path)
    _check_units(samples, truth, where)
    check_values(samples, path)
    check_values(truth, where)
    if targets is not None and targets is not truth:
        check_values(targets, path)
    count = min(field.size // points(field) for field in truth.values())
    if count < 2:
        raise InputError(f"{where} holds one true field; its law takes several, ten or more")
    if count < _FEW:
        log.warning("%s: %d true fields are too few to show their own variability", where, count)
    chosen = config.trajectories
    if chosen is not None:
        chosen = flag(config, "trajectories")
    else:
        chosen = str(samples.attrs.get("trajectory", False)).lower() in ("true", "1")
    if chosen:
        _check_steps(samples, truth, path, where)
    return Inputs(samples, truth, targets, chosen)


def generated_variables(path: str) -> tuple[list[str] | None, bool]:
    """Generated variables of a store, and whether it holds the truth of each.

    A conditional store has ``<variable>_truth`` and ``<variable>_lowres`` beside a variable, on
    other dimensions. Of anything else than such a store the answer is None: all variables.
    """
    try:
        names = {str(name) for name in xr.open_zarr(path, chunks=None, consolidated=False)}
    except Exception:  # no zarr store; whoever opens it says what is wrong with it
        return None, False
    beside = {n + tail for n in names for tail in (_TRUTH, _LOWRES)} & names
    if not beside:
        return None, False
    variables = sorted(names - beside)
    return variables, all(name + _TRUTH in names for name in variables)


def _at_samples(targets: xr.Dataset, samples: xr.Dataset, path: str) -> xr.Dataset:
    """The targets, once it is clear that they are at the samples' times and points."""
    for axis in ("time", "lat", "lon"):
        if targets.sizes[axis] != samples.sizes[axis]:
            raise InputError(
                f"{path}: the samples have {samples.sizes[axis]} of {axis}, their truth "
                f"{targets.sizes[axis]}; scores need both on one grid"
            )
    for axis in ("lat", "lon"):
        nearest(targets[axis].values, samples[axis].values, None, f"{path}: {axis}")
    return targets


def _check_units(samples: xr.Dataset, truth: xr.Dataset, path: str) -> None:
    for name in samples.data_vars:
        units = [side[name].attrs.get("units") for side in (samples, truth)]
        if None not in units and units[0] != units[1]:
            raise InputError(f"{name}: the samples are in {units[0]}, {path} in {units[1]}")


def _check_steps(samples: xr.Dataset, truth: xr.Dataset, path: str, where: str) -> None:
    """Refuse trajectories whose frames do not follow each other at the same even interval."""
    steps = []
    for dataset, label in ((samples, path), (truth, where)):
        if dataset.sizes["time"] < 2:
            raise InputError(f"{label} has one time, which is no trajectory; trajectories=false")
        seconds = np.diff(dataset["time"].values) / np.timedelta64(1, "ns") * 1e-9
        if np.ptp(seconds) > 1e-3 * seconds.mean():
            raise InputError(
                f"{label}: its times are not evenly spaced, {seconds.min():g} to "
                f"{seconds.max():g} s; select an even stretch, or trajectories=false"
            )
        steps.append(float(seconds.mean()))
    if abs(steps[0] - steps[1]) > 1e-3 * steps[1]:
        raise InputError(
            f"frames of the samples are {steps[0]:g} s apart, those of {where} {steps[1]:g} s; "
            "thin the finer ones, or compare without time: trajectories=false"
        )


def runs(field: xr.DataArray) -> tuple[int, int]:
    """Number of trajectories or members, and times."""
    frames = field.sizes["time"]
    return field.size // points(field) // frames, frames


def independent_size(inputs: Inputs, field: xr.DataArray) -> tuple[int, int]:
    """Independent runs of the samples and frames in each.

    Members that share a condition are not independent: each time then counts once.
    """
    count, frames = runs(field)
    if inputs.trajectories:
        return count, frames
    return (frames if inputs.targets is not None else count * frames), 1


def points(field: xr.DataArray) -> int:
    """Points of the grid."""
    return field.sizes["lat"] * field.sizes["lon"]


def describe(field: xr.DataArray) -> str:
    """Sizes in words, as `20 trajectory x 10 time at 16x16`."""
    sizes = [f"{n} {d}" for d, n in field.sizes.items() if d not in ("lat", "lon")]
    return f"{' x '.join(sizes)} at {field.sizes['lat']}x{field.sizes['lon']}"
