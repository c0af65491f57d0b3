# SPDX-License-Identifier: Apache-2.0
"""``ddo generate``: samples of a prior, of trajectories, or of states given coarse fields.

Axes: ``T`` times, ``P`` frames around each, ``C`` variables, ``H W`` grid, ``h w`` coarse grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from ddo_modulus.cli.assimilate import parse_time
from ddo_modulus.cli.options import flag, integer, number, optional_number, pick_device, plain
from ddo_modulus.console import progress_bar
from ddo_modulus.data.output import STORE, check_output
from ddo_modulus.data.source import check_values, open_dataset
from ddo_modulus.data.store import write_store
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.samplers import Churn
from ddo_modulus.diffusion.task import CoarseWindow
from ddo_modulus.errors import InputError
from ddo_modulus.inference.generate import generate
from ddo_modulus.inference.result import coordinates

_EPOCH = np.datetime64("2000-01-01", "ns")


def run(config: DictConfig) -> None:
    """Draw fields and write them to a zarr store; the keys are those of ``conf/generate.yaml``.

    Raises:
        InputError: On a value that is out of range or does not fit the package, or if the store
            exists.
    """
    overwrite = flag(config, "overwrite")
    inputs = [config.package, config.data.path]
    out = check_output(config.out, overwrite=overwrite, kind=STORE, inputs=inputs)
    posterior = posterior_of(config)
    package = Package.load(config.package, pick_device(config.device))
    resolution = _resolution(config.resolution)
    frames = None
    if package.task.coarse is None:
        if config.data.path is not None:
            raise InputError(
                f"the package's condition is {package.task.condition!r}: it takes no data; leave "
                "data.path out"
            )
        times, coarse = drawn_times(config, package), None
    else:
        frames = open_frames(config, package)
        times, coarse = frames.times, frames.coarse
    with progress_bar("generate") as progress:
        dataset = generate(
            package,
            times,
            ensemble=integer(config, "ensemble"),
            coarse=coarse,
            resolution=resolution,
            seed=integer(config, "seed", 0),
            frozen=flag(config, "frozen"),
            posterior=posterior,
            progress=progress,
        )
    if frames is not None:
        dataset = dataset.assign(frames.variables(package))
        dataset.attrs |= {k: v for k, v in frames.attributes.items() if k not in dataset.attrs}
    dataset.attrs["package"] = str(config.package)
    write_store(dataset, out, overwrite=overwrite)
    print(f"{out}: {', '.join(f'{n} {name}' for name, n in dataset.sizes.items())}")


def posterior_of(config: DictConfig) -> PosteriorConfig:
    """How to sample; what is null in the configuration is left to the package.

    Raises:
        InputError: On a value that is out of range.
    """
    values = plain(config.churn)
    churn = Churn(
        **{k: v if k == "high" else number(config, f"churn.{k}") for k, v in values.items()}
    )
    return PosteriorConfig(
        steps=config.steps,
        solver=config.solver,
        sigma_min=optional_number(config, "sigma_min"),
        sigma_max=optional_number(config, "sigma_max"),
        rho=optional_number(config, "rho"),
        discretization=str(config.discretization),
        churn=churn if churn.amount > 0 else None,
        batch=integer(config, "batch"),
    )


def drawn_times(config: DictConfig, package: Package) -> np.ndarray:
    """Times of fields that are drawn without data: those of the configuration, or frame numbers.

    Frames are the package's interval apart (a second if it has none) and start at 2000-01-01.

    Raises:
        InputError: If the package needs times and there are none, or keys contradict each other.
    """
    if config.time is not None:
        if config.frames is not None:
            raise InputError("give either time or frames")
        listed = config.time if OmegaConf.is_list(config.time) else [config.time]
        return np.array([parse_time(value, "time") for value in listed], "datetime64[ns]")
    if package.task.condition == "hour_of_day":
        raise InputError(
            "the package's prior depends on the hour of the day: give time=2019-03-27T12, or a list"
        )
    count = package.task.frames if config.frames is None else integer(config, "frames")
    interval = 1.0 if package.interval is None else package.interval
    return _EPOCH + np.round(np.arange(count) * interval * 1e9).astype("timedelta64[ns]")


@dataclass(frozen=True)
class CoarseFrames:
    """Coarse fields as the condition of a package, and where they come from.

    Attributes:
        times: ``(T,)`` times of the states to draw.
        coarse: Coarse views of the ``P`` frames around each time, in physical units.
        truth: The fine fields of the data, if there are any.
        attributes: Attributes of the data.
    """

    times: np.ndarray
    coarse: Float[Tensor, "T P C h w"]
    truth: xr.Dataset | None
    attributes: dict[str, Any]

    def variables(self, package: Package) -> dict[str, Any]:
        """``<variable>_lowres`` and ``<variable>_truth``, for the dataset of the samples.

        The coarse axes ``lat_lowres`` and ``lon_lowres`` hold the centres of cells. The truth is
        left out if its grid is not that of the samples.
        """
        middle = self.coarse[:, self.coarse.shape[1] // 2].numpy()
        assert package.task.coarse is not None
        grid = coordinates(package.grid)
        places = torch.from_numpy(
            np.stack(np.meshgrid(grid["lat"][1], grid["lon"][1], indexing="ij"))
        )
        centres = package.task.coarse.view(places[None])[0].numpy()
        axes = {"lat": centres[0, :, 0], "lon": centres[1, 0]}
        data: dict[str, Any] = {
            f"{name}_lowres": (f"{name}_lowres", values, grid[name][2])
            for name, values in axes.items()
        }
        for i, (name, unit) in enumerate(zip(package.channels, package.units, strict=True)):
            dims = ("time", "lat_lowres", "lon_lowres")
            data[f"{name}_lowres"] = (dims, middle[:, i], {"units": unit})
            if self.truth is not None:
                values = self.truth[name].values
                data[f"{name}_truth"] = (("time", "lat", "lon"), values, {"units": unit})
        return data


def open_frames(config: DictConfig, package: Package) -> CoarseFrames:
    """Coarse fields of the data that a configuration names.

    Fine data are on the package's grid, or on that of the samples; their coarse view is taken.
    Coarse data are on the grid of that view.

    Raises:
        InputError: If the data cannot be read, are on another grid or have too few times.
    """
    coarse = package.task.coarse
    assert coarse is not None
    if config.data.path is None:
        raise InputError(
            "the package draws states that belong to a coarse view: give data.path=..."
        )
    if config.time is not None:
        raise InputError("times come from the data; choose how many by frames=")
    path = str(config.data.path)
    dataset = _one_run(open_dataset(path, package.channels), config, path)
    fine, small = package.grid.shape, coarse.shape(package.grid.shape)
    drawn = _resolution(config.resolution) or fine
    shape = (dataset.sizes["lat"], dataset.sizes["lon"])
    if shape not in (fine, drawn, small):
        raise InputError(
            f"{path} is on {shape[0]}x{shape[1]} points; the package takes fine fields on "
            f"{fine[0]}x{fine[1]} points, or coarse ones on {small[0]}x{small[1]}"
        )
    span, reach = package.task.span, package.task.span // 2
    count = dataset.sizes["time"] - span + 1
    wanted = count if config.frames is None else integer(config, "frames")
    if count < 1 or wanted > count:
        raise InputError(
            f"{path} has {dataset.sizes['time']} times, and {span - 1} more than frames are needed "
            f"for their neighbours: at most frames={max(count, 0)}"
        )
    dataset = dataset.isel(time=slice(0, wanted + span - 1)).load()
    check_values(dataset, path)
    steps = np.diff(dataset["time"].values) / np.timedelta64(1, "s")
    if package.interval is not None and not np.allclose(steps, package.interval, rtol=1e-3):
        raise InputError(
            f"{path} has frames every {steps.min():g} s, the package is for frames every "
            f"{package.interval:g} s"
        )
    fields = np.stack([dataset[name].values for name in package.channels], 1)
    x = torch.from_numpy(fields.astype(np.float32))
    view = x if shape == small else CoarseWindow(shape[0] / small[0]).view(x)
    frames = torch.arange(wanted)[:, None] + torch.arange(span)
    middle = dataset.isel(time=slice(reach, reach + wanted))
    return CoarseFrames(
        middle["time"].values,
        view[frames],
        middle if shape == drawn else None,
        dict(dataset.attrs),
    )


def _one_run(dataset: xr.Dataset, config: DictConfig, path: str) -> xr.Dataset:
    count = dataset.sizes.get("trajectory", 1)
    chosen = config.data.trajectory
    if chosen is None and count > 1:
        raise InputError(f"{path} has {count} trajectories; choose one by data.trajectory=0")
    index = 0 if chosen is None else integer(config, "data.trajectory", 0)
    if index >= count:
        raise InputError(f"data.trajectory={index} is not one of the {count} in {path}")
    return dataset.isel(trajectory=index, drop=True) if "trajectory" in dataset.dims else dataset


def _resolution(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    both = value if isinstance(value, ListConfig) else [value, value]
    sizes = [n for n in both if isinstance(n, int) and not isinstance(n, bool) and n > 1]
    if len(both) != 2 or len(sizes) != 2:
        raise InputError(f"resolution={value} must be a whole number from 2 up, or [rows, columns]")
    return sizes[0], sizes[1]
