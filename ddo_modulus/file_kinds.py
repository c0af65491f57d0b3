# SPDX-License-Identifier: Apache-2.0
"""What a file is by its first bytes, for the messages of readers that expect another kind.

A message is made of two parts: what the file is, which is the same for all readers, and the mend.
Some kinds have one mend for every reader (unpack an archive); for the others each reader states its
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4096  # of a file, to recognise it by


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: Short name, by which readers state their own mends.
        words: What the file is; completes "FILE is ...".
        mend: What to do about it, for all readers; `{wanted}` stands for what a reader expects.
    """

    name: str
    words: str
    mend: str = "give {wanted}"


_UNPACK = "unpack it, and give {wanted} in it"
_ZIP = FileKind("zip", "a zip archive", _UNPACK)
_EXCEL = FileKind("Excel", "a workbook of Excel", "save the sheet as CSV")
_TAR = FileKind("tar", "a tar archive", _UNPACK)
_R = FileKind("R", "a file of R")
_JSON = "JSON, perhaps the error message of a server"
_READ = "read it, and download the data again"
_PAGE = FileKind(
    "page",
    "a web page, which a server sent instead of the data (an error, or a form to log in)",
    "read it in a browser, and download the data again",
)
_EMPTY = FileKind("empty", "empty", "download or write it again")

# The first bytes of a file, and its kind.
_STARTS = (
    (b"PK\x05\x06", FileKind("zip", "an empty zip archive", "make it anew")),
    (b"PK\x03\x04", _ZIP),
    (b"\xd0\xcf\x11\xe0", _EXCEL),
    (b"\x1f\x8b", FileKind("gzip", "compressed by gzip", "unpack it with gunzip")),
    (b"BZh", FileKind("bzip2", "compressed by bzip2", "unpack it with bunzip2")),
    (b"\xfd7zXZ", FileKind("xz", "compressed by xz", "unpack it with unxz")),
    (b"\x28\xb5\x2f\xfd", FileKind("zstd", "compressed by zstd", "unpack it with unzstd")),
    (b"7z\xbc\xaf", FileKind("7z", "a 7z archive", _UNPACK)),
    (b"Rar!", FileKind("rar", "a rar archive", _UNPACK)),
    (b"%PDF", FileKind("PDF", "a PDF document")),
    (b"\x0e\x03\x13\x01", FileKind("HDF4", "an HDF4 file")),
    (b"\x89HDF", FileKind("netCDF", "a netCDF or HDF5 file")),
    (b"CDF", FileKind("netCDF", "a netCDF file")),
    (b"RDX", _R),
    (b"\x93NUMPY", FileKind("NumPy", "an array of numpy without coordinates")),
    (b"PAR1", FileKind("parquet", "a parquet table")),
    (b"ARROW1", FileKind("Arrow", "an Arrow or Feather file")),
    (b"GRIB", FileKind("GRIB", "a GRIB file of fields")),
    (b"BUFR", FileKind("BUFR", "a BUFR file of reports")),
    (b"\xff\xffODA", FileKind("ODB", "an ODB file of reports")),
    (
        b"version https://git-lfs",
        FileKind("git-lfs", "a pointer of Git LFS, not the data", "run git lfs pull"),
    ),
    (
        b"HTTP/",
        FileKind("HTTP", "the answer of a web server, headers included", "download the body only"),
    ),
    (b"{", FileKind("JSON", _JSON, _READ)),
    (b"[", FileKind("JSON", _JSON, _READ)),
)
_PAGE_START = re.compile(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<\?xml|<error)", re.IGNORECASE)
_TAR_MARK = slice(257, 262)
_R_SUFFIXES = (".rda", ".rdata", ".rds")  # their content is compressed, as a rule


def kind_of(head: bytes, suffix: str = "") -> FileKind | None:
    """The kind of a file, or None if it is none of those that are listed.

    Args:
        head: The first `HEAD_BYTES` bytes of the file, or all.
        suffix: Of the file's name. Only files of R need it.
    """
    if not head:
        return _EMPTY
    if suffix.lower() in _R_SUFFIXES:
        return _R
    if _PAGE_START.match(head):
        return _PAGE
    if head[_TAR_MARK] == b"ustar":
        return _TAR
    kind = next((kind for start, kind in _STARTS if head.startswith(start)), None)
    if kind is _ZIP and (b"[Content_Types].xml" in head or b"xl/" in head):
        return _EXCEL
    return kind


def described(kind: FileKind, wanted: str, mends: Mapping[str, str] | None = None) -> str:
    """What a file is and the mend: "a zip archive; unpack it, and give the table in it".

    Args:
        kind: Of the file.
        wanted: What the reader expects, with its article: "the table".
        mends: The reader's own mends, by the name of a kind.
    """
    mend = (mends or {}).get(kind.name, kind.mend)
    return f"{kind.words}; {mend.format(wanted=wanted)}"


def head_of(path: Path) -> bytes:
    """The first `HEAD_BYTES` bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
