# SPDX-License-Identifier: Apache-2.0
"""Results on disk: written whole or not at all, and never over older ones unasked."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from ddo_modulus.data.source import slabs
from ddo_modulus.errors import InputError

#: Int64 nanoseconds hold every time exactly, and any later one that is appended.
TIME_ENCODING: dict[str, object] = {"units": "nanoseconds since 1970-01-01", "dtype": "int64"}


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a place where a result cannot be put; call it before the long computation.

    Args:
        path: Where the result shall be: a file or a folder.
        overwrite: Whether an older result there may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If something is there and may not be replaced, or if the parent is no folder.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another place, or replace it by overwrite=true")
    if path.exists() and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{path} holds the working directory; choose another place")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is not a folder; choose another place")
    return path


def check_store_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """As `check_output`; and what is replaced by a store has to be one.

    Raises:
        InputError: See `check_output`, or if something else than a store is there.
    """
    path = check_output(path, overwrite=overwrite)
    if path.exists() and not (path / "zarr.json").exists() and not (path / ".zgroup").exists():
        raise InputError(f"{path} is there and is not a zarr store; choose another place")
    return path


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling to write to, which becomes `path` if all goes well.

    An error or an interruption leaves `path` as it was. A file and a folder serve alike.

    Args:
        path: Where the result shall be.
        overwrite: Whether an older result there may be replaced.

    Yields:
        A path that does not exist yet, in the same folder as `path`.

    Raises:
        InputError: See `check_output`.
    """
    path = check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{tag}-{os.getpid()}") for tag in ("new", "old"))
    _remove(new)
    try:
        yield new
        # A folder cannot be renamed over another one: move the older one aside first.
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
    """Write a dataset as a zarr store (format 3), one chunk a field and time.

    Fields are written along time piece by piece, so that a dataset opened by `open_dataset` may
    be larger than the memory.

    Args:
        dataset: Fields on `(..., time, lat, lon)`.
        path: Folder of the store.
        overwrite: Whether an older store there may be replaced; nothing but a store ever is.
        compress: Compress the chunks. Loading in training is about twice as fast without.
        progress: Called with the number of times written and their total.

    Returns:
        The path.

    Raises:
        InputError: If something is there that may not be replaced, if the dataset has no times,
            or if its values cannot be read.
    """
    path = check_store_output(path, overwrite=overwrite)
    if dataset.sizes.get("time", 0) == 0:
        raise InputError(f"{path}: nothing to write, the dataset has no times")
    dataset = dataset.drop_encoding()
    if np.issubdtype(dataset["time"].dtype, np.datetime64):
        # xarray writes coarser times in the encoding's nanoseconds as not-a-time.
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
        # A chunk that gets lost later reads as missing, not as zero.
        encoding[str(name)] = {"chunks": chunks}
        if field.dtype.kind == "f":
            encoding[str(name)]["fill_value"] = np.nan
        if not compress:
            encoding[str(name)]["compressors"] = None
    if np.issubdtype(dataset["time"].dtype, np.datetime64):
        encoding["time"] = TIME_ENCODING
    return encoding
