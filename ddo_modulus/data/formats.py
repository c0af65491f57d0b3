# SPDX-License-Identifier: Apache-2.0
"""Files and stores as xarray datasets, decoded, whatever their format.

The first bytes identify the format, not the file's name. What is no file of fields is named as what
it is: an archive, a web page that a server sent instead, a file of reports.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr
from scipy.io import netcdf_file

import ddo_modulus.data.grib_libraries  # noqa: F401 - lets ecCodes and pygrib share a process
from ddo_modulus.errors import InputError
from ddo_modulus.file_kinds import described, head_of, kind_of

# The attribute `layout` of a training store (see `training_store`), and its array of fields.
LAYOUT = "ddo training store 1"
FIELDS = "fields"

_AS_OBSERVATIONS = "these are not fields on a grid: give it as observations"
_MENDS = {
    "R": "write its fields as netCDF, e.g. with R's package ncdf4",
    "HDF4": "convert it to netCDF, e.g. with h4toh5 or GDAL",
    "NumPy": "write it as netCDF with xarray",
    "Excel": "give it as observations, saved as CSV, or write fields as netCDF",
    "parquet": "give it as observations, or write fields as netCDF",
    "Arrow": "write fields as netCDF",
    "BUFR": _AS_OBSERVATIONS,
    "ODB": _AS_OBSERVATIONS,
}

_UNEVEN_UNITS = re.compile(r"\s*(mon(th)?s?|years?|common_years?|calendar_\w+)\s+since", re.I)
# Where a library's message turns from the fault to advice about the library.
_ADVICE = re.compile(r"(?i)\W*\b(try |consider |please |see |did you mean|to proceed|if you |use )")
_DAMAGE = re.compile(
    r"(?i)hdf error|truncat|end of (file|resource)|premature|wrong (message )?length|checksum|crc"
    r"|decompress|blosc|corrupt|cut short|no end|chunk is missing|buffer size"
)


def open_parts(path: str | Path) -> list[xr.Dataset]:
    """Open a file or store with the library for its format; GRIB may need several datasets.

    Args:
        path: A GRIB or netCDF file, a zarr folder (format 2 or 3), or the URL of a zarr store.

    Raises:
        InputError: If `path` is missing, damaged or of another format, or its times cannot be
            decoded.
    """
    if "://" in str(path):
        return [_open_url(str(path))]
    path = Path(path)
    if path.is_dir():
        return [_open_zarr(path)]
    with reading(path):
        kind = _format(path)
        if kind == "GRIB":
            return _open_grib(path)
        if kind == "classic netCDF":
            _check_length(path)
        raw = xr.open_dataset(path, engine="netcdf4", decode_cf=False)
    return [_decoded(raw, str(path))]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the errors of format libraries into one `InputError`, which claims damage if it is sure.

    Args:
        path: What is read, for the message.

    Raises:
        InputError: If the block raises anything but `MemoryError`.
    """
    try:
        yield
    except (MemoryError, InputError):
        raise
    except ImportError as error:
        raise InputError(f"{path}: reading it needs a package ({error}); install it") from error
    except Exception as error:  # each library has its own
        raise InputError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error of a library means, in words of our own as far as they go."""
    number = getattr(error, "errno", None)  # negative for the netCDF library's own errors
    if isinstance(number, int) and number in errno.errorcode and not _is_damage(error):
        return f"cannot be read: {os.strerror(number).lower()}"
    if _is_damage(error):
        return f"cannot be read, damaged or cut short ({said(error)}); copy or download it again"
    return (
        f"cannot be read ({said(error)}); if other programs read it, write it anew as netCDF with "
        "xarray"
    )


def _is_damage(error: Exception) -> bool:
    """Whether an error of a library certainly means that the file is damaged or cut short."""
    if isinstance(error, (EOFError, zlib.error, FileNotFoundError)):
        return True
    return _DAMAGE.search(f"{type(error).__name__} {error}") is not None


def said(error: Exception) -> str:
    """The error of a library on one line, without its advice."""
    text = _ADVICE.split(" ".join(str(error).split()))[0].rstrip(" .")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _format(path: Path) -> str:
    """`GRIB`, `netCDF` or `classic netCDF`.

    Raises:
        InputError: If the file is missing or of another format.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    head = head_of(path)
    if head.startswith((b"CDF\x01", b"CDF\x02")):
        return "classic netCDF"
    kind = kind_of(head, path.suffix)
    if kind is not None and kind.name in ("netCDF", "GRIB"):
        return kind.name
    if kind is not None:
        raise InputError(f"{path}: is {described(kind, 'the file of fields', _MENDS)}")
    # A message may follow the header of a bulletin.
    if b"BUFR" in head and b"GRIB" not in head:
        raise InputError(f"{path}: is a BUFR file of reports; {_AS_OBSERVATIONS}")
    if b"GRIB" in head:
        return "GRIB"
    raise InputError(f"{path}: not a GRIB or netCDF file, nor a zarr folder; convert it to one")


def _check_length(path: Path) -> None:
    """Refuse a file of netCDF's classic formats that is cut short.

    The netCDF library reads zeros for what is not there; scipy compares the header with the size.
    """
    try:
        with netcdf_file(path, mmap=True):
            pass
    except (ValueError, TypeError, IndexError) as error:
        raise EOFError("it is shorter than its header says") from error


def _open_url(url: str) -> xr.Dataset:
    """Open a zarr store at a URL."""
    if re.search(r"\.(nc4?|grib2?|grb2?|h5|hdf5?|zip|gz)$", url.split("?")[0], re.IGNORECASE):
        raise InputError(f"{url}: is the URL of a file; download it, and give its path")
    try:
        raw = xr.open_zarr(url, chunks=None, decode_cf=False)
    except MemoryError:
        raise
    except Exception as error:  # of the file system, the server or zarr
        raise InputError(
            f"{url}: the URL cannot be opened as a zarr store ({said(error)}); "
            "check it and the connection, or download the data"
        ) from error
    return _unstacked(_decoded(raw, url))


def _open_zarr(path: Path) -> xr.Dataset:
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        raise InputError(
            f"{path}: a folder, but not a zarr store (no zarr.json or .zgroup in it); give the "
            "store's own folder, and copy it again if it should be one"
        )
    with reading(path):
        raw = xr.open_zarr(path, chunks=None, consolidated=False, decode_cf=False)
    decoded = _decoded(raw, str(path))
    with reading(path):
        return _unstacked(decoded)


def _decoded(raw: xr.Dataset, where: str) -> xr.Dataset:
    """Apply the conventions of CF: times, scale factors, missing values.

    Raises:
        InputError: If they cannot be applied.
    """
    for name in ("time", "valid_time"):
        units = str(raw[name].attrs.get("units", "")) if name in raw.variables else ""
        if _UNEVEN_UNITS.match(units):
            raise InputError(
                f"{where}: {name} is in {units!r}, but months and years have no fixed length; "
                "write dates or 'days since', e.g. with cdo setreftime"
            )
        if "%Y" in units:
            raise InputError(
                f"{where}: {name} is in {units!r}, the absolute times of CDO; write relative ones "
                "with cdo -r copy"
            )
    with reading(where):
        try:
            return xr.decode_cf(raw, decode_timedelta=False)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise InputError(
                f"{where}: its attributes do not follow the CF conventions ({said(error)}); "
                "correct them"
            ) from error


def _unstacked(dataset: xr.Dataset) -> xr.Dataset:
    """Split the array of a training store into variables; return any other dataset unchanged."""
    if dataset.attrs.get("layout") != LAYOUT:
        return dataset
    fields = dataset[FIELDS]
    variables = {
        name: fields.isel(channel=i, drop=True)
        for i, name in enumerate(dataset["channel"].values.tolist())
    }
    for name, field in variables.items():
        field.attrs = dict(fields.attrs["variables"][name])
    return xr.Dataset(variables, attrs=dataset.attrs)


def _open_grib(path: Path) -> list[xr.Dataset]:
    """Open a GRIB file as the fewest datasets that hold all of its messages."""
    extents = _messages(path)
    import cfgrib

    with warnings.catch_warnings(), xr.set_options(use_new_combine_kwarg_defaults=True):
        warnings.simplefilter("ignore")  # cfgrib's own calls to xarray warn
        # No index file: cfgrib would write it beside the user's data, and unpickle one it finds.
        parts = list(cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": ""}))
    read = sum(
        field.size // field.attrs["GRIB_numberOfPoints"]
        for part in parts
        for field in part.data_vars.values()
    )
    if read < len(extents) and read < (distinct := _distinct(path, extents)):
        raise InputError(
            f"{path}: only {read} of its {distinct} GRIB messages can be read; others are of the "
            "same variable, time and level, or of a kind that cfgrib does not know: select the "
            "messages with grib_copy"
        )
    return parts


def _messages(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each GRIB message.

    A part of a message is refused: cfgrib would leave it out in silence. What else stands between
    messages, as the headers of bulletins of the GTS do, is no fault.
    """
    import eccodes

    try:
        with silent_library():
            extents = list(
                eccodes.codes_extract_offsets_sizes(str(path), eccodes.CODES_PRODUCT_GRIB, True)
            )
    except eccodes.CodesInternalError as error:
        raise EOFError(f"a GRIB message is not whole: {error}") from error
    ends = [0, *(offset + size for offset, size in extents)]
    starts = [*(offset for offset, _ in extents), path.stat().st_size]
    with path.open("rb") as file:
        for end, start in zip(ends, starts, strict=True):
            file.seek(end)
            if b"7777" in (left := file.read(start - end)) or b"GRIB" in left:
                raise EOFError(f"a GRIB message is not whole: its part begins at byte {end}")
    return extents


def _distinct(path: Path, extents: list[tuple[int, int]]) -> int:
    """Number of different messages; some servers send one twice."""
    hashes = set()
    with path.open("rb") as file:
        for offset, size in extents:
            file.seek(offset)
            hashes.add(hashlib.sha256(file.read(size)).digest())
    return len(hashes)


@contextmanager
def silent_library() -> Iterator[None]:
    """Keep the messages of a C library off stderr; its errors are raised as well."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
