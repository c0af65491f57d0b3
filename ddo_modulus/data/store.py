# SPDX-License-Identifier: Apache-2.0
"""Writing stores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from ddo_modulus.data.output import STORE, check_output, replacing
from ddo_modulus.data.source import slabs
from ddo_modulus.errors import InputError

#: int64 nanoseconds represent exactly every time, including those appended later.
TIME_ENCODING: dict[str, object] = {"units": "nanoseconds since 1970-01-01", "dtype": "int64"}


def write_store(
    dataset: xr.Dataset,
    path: str | Path,
    *,
    overwrite: bool = False,
    compress: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a dataset as a zarr store (format 3), with one chunk for each field and time.

    Fields are written in pieces along time, so a dataset opened by `open_dataset` may be larger
    than the memory.

    Args:
        dataset: Fields on `(..., time, lat, lon)`.
        path: Folder of the store.
        overwrite: Whether an existing store may be replaced; nothing else is ever replaced.
        compress: Compress the chunks. Without it, training loads them about twice as fast.
        progress: Called with the number of times written and their total.

    Returns:
        The path.

    Raises:
        InputError: If the path exists and may not be replaced, if the dataset has no times, or
            if its values cannot be read.
    """
    path = check_output(path, overwrite=overwrite, kind=STORE)
    if dataset.sizes.get("time", 0) == 0:
        raise InputError(f"{path}: nothing to write, the dataset has no times; select some")
    dataset = dataset.drop_encoding()
    if np.issubdtype(dataset["time"].dtype, np.datetime64):
        # With this encoding, xarray writes times of a coarser unit as NaT.
        dataset = dataset.assign_coords(time=dataset["time"].astype("datetime64[ns]"))
    done = 0
    with replacing(path, overwrite=overwrite, kind=STORE) as new:
        for piece in slabs(dataset, f"the dataset for {path}"):
            if new.exists():
                piece.to_zarr(new, append_dim="time", consolidated=False)
            else:
                encoding = _encoding(piece, compress=compress)
                piece.to_zarr(new, zarr_format=3, consolidated=False, encoding=encoding)
            done += piece.sizes["time"]
            if progress is not None:
                progress(done, dataset.sizes["time"])
    return path


def _encoding(dataset: xr.Dataset, *, compress: bool) -> dict[str, dict[str, object]]:
    encoding: dict[str, dict[str, object]] = {}
    for name, field in dataset.data_vars.items():
        chunks = tuple(n if d in ("lat", "lon") else 1 for d, n in field.sizes.items())
        # A chunk lost later then reads as missing, not as zero.
        encoding[str(name)] = {"chunks": chunks}
        if field.dtype.kind == "f":
            encoding[str(name)]["fill_value"] = np.nan
        if not compress:
            encoding[str(name)]["compressors"] = None
    if np.issubdtype(dataset["time"].dtype, np.datetime64):
        encoding["time"] = TIME_ENCODING
    return encoding
