# SPDX-License-Identifier: Apache-2.0
"""``ddo simulate``: training and test data from a simulator."""

from __future__ import annotations

from dataclasses import fields

import torch
from omegaconf import DictConfig

from ddo_modulus.cli.options import flag, integer, pick_device, plain
from ddo_modulus.console import progress_bar
from ddo_modulus.data.output import STORE, check_output, replacing
from ddo_modulus.data.store import write_store
from ddo_modulus.errors import InputError
from ddo_modulus.simulators import SIMULATORS, Simulator


def run(config: DictConfig) -> None:
    """Simulate trajectories and write them to a zarr store; keys in ``conf/simulate.yaml``.

    A batch of trajectories is appended as soon as it is done: memory does not grow with their
    number, and the store appears when all are there.

    Raises:
        InputError: On a value that is out of range, or if the store exists.
    """
    overwrite = flag(config, "overwrite")
    out = check_output(config.out, overwrite=overwrite, kind=STORE)
    seed, trajectories = integer(config, "seed", 0), integer(config, "trajectories")
    simulator = _simulator(config.simulator)
    with progress_bar("simulate") as progress:
        batches = simulator.simulate(
            trajectories,
            integer(config, "frames"),
            generator=torch.Generator().manual_seed(seed),
            device=pick_device(config.device),
            batch=integer(config, "batch"),
            progress=progress,
        )
        first = 0
        with replacing(out, overwrite=overwrite, kind=STORE) as new:
            for frames in batches:
                dataset = simulator.to_dataset(frames, first=first, seed=seed)
                if first == 0:
                    write_store(dataset, new)
                else:
                    unlabelled = dataset.drop_vars(("time", "lat", "lon"))
                    unlabelled.to_zarr(new, append_dim="trajectory", consolidated=False)
                first += len(frames)
    sizes = {**dataset.sizes, "trajectory": trajectories}
    print(f"{out}: {', '.join(f'{n} {name}' for name, n in sizes.items())}")


def _simulator(config: DictConfig) -> Simulator:
    """The simulator of a configuration.

    Raises:
        InputError: If there is no such simulator, or a parameter is not one of its own or wrong.
    """
    parameters = plain(config)
    equation = parameters.pop("equation", None)
    if equation not in SIMULATORS:
        raise InputError(f"simulator.equation={equation}; choose one of {', '.join(SIMULATORS)}")
    names = {field.name for field in fields(SIMULATORS[equation])}  # type: ignore[arg-type]
    if unknown := sorted(set(parameters) - names):
        raise InputError(f"{equation} has no {', '.join(unknown)}; choose it by simulator=NAME")
    try:
        return SIMULATORS[equation](**parameters)
    except TypeError as error:
        raise InputError(f"simulator: {error}; numbers are needed") from error
