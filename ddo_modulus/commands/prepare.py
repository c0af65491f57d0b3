# SPDX-License-Identifier: Apache-2.0
"""``ddo prepare``: fields of any format to a training store."""

from __future__ import annotations

import pandas as pd
import xarray as xr
from omegaconf import DictConfig

from ddo_modulus.commands.common import flag, progress_bar
from ddo_modulus.data.source import check_values, open_dataset
from ddo_modulus.data.store import check_output, write_store
from ddo_modulus.errors import InputError


def run(config: DictConfig) -> None:
    """Check fields and write them in canonical form; keys in ``conf/prepare.yaml``.

    Raises:
        InputError: If the source cannot be used, or the store exists.
    """
    overwrite = flag(config, "overwrite")
    out = check_output(config.out, overwrite=overwrite)
    names = config.variables
    variables = [names] if isinstance(names, str) else names
    dataset = open_dataset(config.source, None if variables is None else list(variables))
    dataset = select_period(dataset, config.start, config.end, config.source)
    with progress_bar("check") as progress:
        check_values(dataset, str(config.source), progress)
    with progress_bar("write") as progress:
        write_store(dataset, out, overwrite=overwrite, progress=progress)
    sizes = ", ".join(f"{n} {name}" for name, n in dataset.sizes.items())
    print(f"{out}: {', '.join(map(str, dataset.data_vars))}; {sizes}")


def select_period(
    dataset: xr.Dataset, start: str | None, end: str | None, where: str
) -> xr.Dataset:
    """Times from ``start`` to ``end``, both included; a date alone means the whole day.

    Raises:
        InputError: If a bound is no date, or no time is left.
    """
    try:
        chosen = dataset.sel(time=slice(*(None if b is None else str(b) for b in (start, end))))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"start={start}, end={end}: not understood ({error}); write dates, as 2019-03-27T06:00"
        ) from error
    if chosen.sizes["time"] == 0:
        first, last = (pd.Timestamp(dataset["time"].values[i]) for i in (0, -1))
        raise InputError(f"{where}: no times in start={start}, end={end}; has {first} to {last}")
    return chosen
