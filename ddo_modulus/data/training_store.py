# SPDX-License-Identifier: Apache-2.0
"""Training stores: one array with all variables, one chunk for each time.

A zarr store of format 3 with the array ``fields`` on ``(trajectory | ensemble, time, channel, lat,
lon)`` in float32. A chunk is one time with all channels, so that a sample is one read. The
coordinate ``channel`` holds the variable ids, and the attribute ``variables`` of ``fields`` their
units and names. The group ``statistics`` holds statistics (:mod:`~ddo_modulus.data.statistics`).
:func:`~ddo_modulus.data.source.open_dataset` opens a store in canonical form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from zarr.codecs import BloscCodec

from ddo_modulus.data.formats import FIELDS, LAYOUT
from ddo_modulus.data.output import STORE, check_output, replacing
from ddo_modulus.data.source import check_values, slabs
from ddo_modulus.data.store import TIME_ENCODING


def write_training_store(
    dataset: xr.Dataset,
    path: str | Path,
    where: str,
    *,
    overwrite: bool = False,
    compress: bool = True,
    finish: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Check fields and write them as a training store, in pieces along time.

    Args:
        dataset: Fields in canonical form; may be larger than the memory.
        path: Folder of the store.
        where: Where the fields come from, for messages.
        overwrite: Whether an existing store may be replaced; nothing else is ever replaced.
        compress: Compress the chunks (shuffled bytes, LZ4). Loading is faster without it.
        finish: Called with the folder when all fields are written, to add further data. If it
            raises, no store is written.
        progress: Called with the number of times written and their total.

    Returns:
        The path.

    Raises:
        InputError: If the path exists and may not be replaced, or a value is missing, implausible
            in its units or cannot be read.
    """
    path = check_output(path, overwrite=overwrite, kind=STORE)
    total, done = dataset.sizes["time"], 0
    with replacing(path, overwrite=overwrite, kind=STORE) as new:
        for piece in slabs(dataset.drop_encoding(), where):
            check_values(piece, where)
            fields = _stacked(piece)
            if new.exists():
                # The other coordinates are already in the store.
                fixed = [d for d in fields.coords if d != "time"]
                fields.drop_vars(fixed).to_zarr(new, append_dim="time", consolidated=False)
            else:
                encoding = _encoding(fields, compress=compress)
                fields.to_zarr(new, zarr_format=3, consolidated=False, encoding=encoding)
            done += piece.sizes["time"]
            if progress is not None:
                progress(done, total)
        if finish is not None:
            finish(new)
    return path


def _stacked(piece: xr.Dataset) -> xr.Dataset:
    """Stack the variables of a dataset in canonical form into one array."""
    names = [str(name) for name in piece.data_vars]
    first = piece[names[0]]
    lead = first.dims[:-2]
    values = np.stack([piece[name].values for name in names], len(lead))
    coords = {d: piece[d] for d in first.dims}
    # Strings of variable length: zarr's fixed-length ones are not part of format 3.
    coords["channel"] = xr.DataArray(np.array(names, dtype=object), dims="channel")
    fields = xr.DataArray(
        values.astype(np.float32, copy=False),
        coords,
        (*lead, "channel", *first.dims[-2:]),
        attrs={"variables": {name: dict(piece[name].attrs) for name in names}},
    )
    time = piece["time"].astype("datetime64[ns]")
    return xr.Dataset({FIELDS: fields}, attrs={**piece.attrs, "layout": LAYOUT}).assign_coords(
        time=time
    )


def _encoding(dataset: xr.Dataset, *, compress: bool) -> dict[str, dict[str, object]]:
    state = ("channel", "lat", "lon")
    chunks = tuple(n if d in state else 1 for d, n in dataset[FIELDS].sizes.items())
    # Shuffled bytes with LZ4 are smaller and faster to read than with the default, Zstandard.
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle") if compress else None
    # A chunk lost later then reads as missing, not as zero.
    fields = {"chunks": chunks, "fill_value": np.nan, "compressors": codec}
    return {FIELDS: fields, "time": TIME_ENCODING}
