# SPDX-License-Identifier: Apache-2.0
"""Writing results: complete or not at all, and never over an existing one unless requested."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from ddo_modulus.data.source import slabs
from ddo_modulus.errors import InputError

#: int64 nanoseconds represent exactly every time, including those appended later.
TIME_ENCODING: dict[str, object] = {"units": "nanoseconds since 1970-01-01", "dtype": "int64"}


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a path to which a result cannot be written; call it before a long computation.

    Args:
        path: File or folder of the result.
        overwrite: Whether an existing result may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If the path exists and may not be replaced, holds the working directory, or
            lies below a file.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another path, or replace it by overwrite=true")
    if path.exists() and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{path} holds the working directory; choose another path")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is not a folder; choose another path")
    return path


def check_store_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Like `check_output`, for a zarr store: only a store may be replaced by one.

    Raises:
        InputError: As `check_output`, or if the path exists and is not a zarr store.
    """
    path = check_output(path, overwrite=overwrite)
    if path.exists() and not (path / "zarr.json").exists() and not (path / ".zgroup").exists():
        raise InputError(f"{path} exists and is not a zarr store; choose another path")
    return path


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file or folder to a temporary path that is renamed to `path` at the end.

    An error or an interruption in the block leaves `path` unchanged.

    Args:
        path: File or folder of the result.
        overwrite: Whether an existing result may be replaced.

    Yields:
        A path in the same folder as `path` that does not exist yet.

    Raises:
        InputError: As `check_output`.
    """
    path = check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{tag}-{os.getpid()}") for tag in ("new", "old"))
    _remove(new)
    try:
        yield new
        # A folder cannot be renamed over another one, so the existing one is moved aside first.
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        _remove(new)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    path = check_store_output(path, overwrite=overwrite)
    if dataset.sizes.get("time", 0) == 0:
        raise InputError(f"{path}: nothing to write, the dataset has no times; select some")
    dataset = dataset.drop_encoding()
    if np.issubdtype(dataset["time"].dtype, np.datetime64):
        # With this encoding, xarray writes times of a coarser unit as NaT.
        dataset = dataset.assign_coords(time=dataset["time"].astype("datetime64[ns]"))
    done = 0
    with replacing(path, overwrite=overwrite) as new:
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
