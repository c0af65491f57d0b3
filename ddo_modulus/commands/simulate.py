# SPDX-License-Identifier: Apache-2.0
"""``ddo simulate``: training and test data from a simulator."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf

from ddo_modulus.commands.common import flag, integer, pick_device, progress_bar
from ddo_modulus.data.simulators import KolmogorovFlow
from ddo_modulus.data.store import check_output, write_store
from ddo_modulus.errors import InputError


def run(config: DictConfig) -> None:
    """Simulate trajectories and write them to a zarr store; keys in ``conf/simulate.yaml``.

    Raises:
        InputError: On a value that is out of range, or if the store exists.
    """
    overwrite = flag(config, "overwrite")
    out = check_output(config.out, overwrite=overwrite)
    seed = integer(config, "seed", 0)
    parameters = OmegaConf.to_container(config.simulator)
    assert isinstance(parameters, dict)
    try:
        flow = KolmogorovFlow(**{str(key): value for key, value in parameters.items()})
    except TypeError as error:
        raise InputError(f"simulator: {error}; numbers are needed") from error
    with progress_bar("simulate") as progress:
        batches = flow.simulate(
            integer(config, "trajectories"),
            integer(config, "frames"),
            generator=torch.Generator().manual_seed(seed),
            device=pick_device(config.device),
            batch=integer(config, "batch"),
            progress=progress,
        )
        dataset = flow.to_dataset(torch.cat(list(batches)), seed=seed)
    write_store(dataset, out, overwrite=overwrite)
    print(f"{out}: {', '.join(f'{n} {name}' for name, n in dataset.sizes.items())}")
