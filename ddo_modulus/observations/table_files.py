# SPDX-License-Identifier: Apache-2.0
"""Files of observation tables: parquet, and text with the cells of a row separated.

Text is read as spreadsheets and other programs write it: in UTF-8, UTF-16 or a Western European
encoding; separated by commas, semicolons, tabs or bars; with comment lines, blank lines and quoted
cells; compressed by gzip, bzip2 or xz. Cells stay text here: :mod:`.table_columns` reads them.
What is no table is named as what it is.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ddo_modulus.errors import InputError
from ddo_modulus.file_kinds import HEAD_BYTES, described, head_of, kind_of
from ddo_modulus.observations.timestamps import is_time

_PARQUET = (".parquet", ".pq")
_TEXT = (".csv", ".tsv", ".txt")
_COMPRESSED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
_COMPRESSION = (".gz", ".bz2", ".xz")

_MAGIC = b"PAR1"  # at both ends of a parquet file
_MENDS = {
    "PDF": "give a table",
    "HDF4": "write a table of its observations",
    "netCDF": "write a table of its observations",
    "R": "write its table as CSV, e.g. with R's write.csv",
    "NumPy": "write a table with the names of the columns",
    "GRIB": "observations are a table",
    "BUFR": "read it with BufrSource of ddo_modulus.earth2.sources",
    "ODB": "read it with OdbSource of ddo_modulus.earth2.sources",
    "Arrow": "write it as parquet",
    "JSON": "give a table",
}
_READ_HERE = ("parquet", "gzip", "bzip2", "xz", "empty")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS = ",;\t|"
_COMMENT = re.compile(r"^[ \t]*#.*(?:\n|\Z)", re.MULTILINE)
_SHOWN = 60  # characters of a line in a message


@dataclass(frozen=True)
class RawTable:
    """A table as its file has it.

    Attributes:
        frame: Its columns under their own names, which may repeat; those of a text file are text.
        flaw: What is wrong with the cells of each row; empty text where they are as many as those
            of the header, or fewer.
        separator: What separates the cells of a text file; empty for others.
    """

    frame: pd.DataFrame
    flaw: pd.Series
    separator: str = ""

    @classmethod
    def of(cls, frame: pd.DataFrame) -> RawTable:
        """A frame, with rows that are numbered anew."""
        frame = frame.reset_index(drop=True)
        return cls(frame, pd.Series("", frame.index, dtype=object))


def read_file(path: Path) -> RawTable:
    """Read the file of a table.

    Raises:
        InputError: If it is missing, is no parquet or text table, or cannot be decoded.
    """
    if _ADDRESS.match(str(path)):
        raise InputError(f"{path}: is a web address; download the table, and give the file")
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    try:
        head = b"" if path.is_dir() else _start(path)
        _refuse_foreign(path, head, suffix)
        if suffix in _PARQUET:
            return RawTable.of(_read_parquet(path))
        return _read_text(path.read_bytes(), path)
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else "an error of the file system"
        raise InputError(f"{path}: cannot be read: {why}") from error


def _foreign(head: bytes, suffix: str = "") -> str | None:
    """What a file is, if it is no table, and the mend."""
    kind = kind_of(head, suffix)
    if kind is None or kind.name in _READ_HERE:
        return None
    return described(kind, "the table", _MENDS)


def _start(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    return head_of(path)


def _refuse_foreign(path: Path, head: bytes, suffix: str) -> None:
    """Refuse what is no table, or has the name of another kind of table."""
    if (words := _foreign(head, suffix)) is not None:
        raise InputError(f"{path}: is {words}")
    if head.startswith(_MAGIC) and suffix not in _PARQUET:
        raise InputError(f"{path}: is a parquet table; name it .parquet")
    if suffix not in (*_PARQUET, *_TEXT):
        raise InputError(f"{path}: not a .parquet or .csv table; convert it to one")
    if path.is_dir():
        if suffix in _PARQUET:
            return
        raise InputError(f"{path}: is a folder; give the file of the table")
    if not head:
        raise InputError(f"{path}: the file is empty; check how it was made")
    if suffix in _PARQUET and not head.startswith(_MAGIC):
        kind = "text: name it .csv" if _is_text(head) else "no parquet table: write it anew"
        raise InputError(f"{path}: is {kind}")


def _is_text(head: bytes) -> bool:
    return b"\0" not in head and not any(head.startswith(mark) for mark in _COMPRESSED)


def _read_parquet(path: Path) -> pd.DataFrame:
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(_MAGIC)))
            if file.read() != _MAGIC:
                raise InputError(f"{path}: is cut short; copy or download it again")
    try:
        return pd.read_parquet(path)
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow, which has many
        raise InputError(
            f"{path}: cannot be read as parquet ({type(error).__name__}); write it anew"
        ) from error


def _read_text(raw: bytes, path: Path) -> RawTable:
    """Read a table of text, compressed or not."""
    for mark, decompress in _COMPRESSED.items():
        if raw.startswith(mark):
            try:
                raw = decompress(raw)
            except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise InputError(
                    f"{path}: is compressed, and cut short or damaged; copy or download it again"
                ) from error
            if (words := _foreign(raw[:HEAD_BYTES])) is not None:
                raise InputError(f"{path}: holds {words}")
    text = _decoded(raw, path).replace("\r\n", "\n").replace("\r", "\n")
    comments = _COMMENT.findall(text) if "#" in text else []
    text = _COMMENT.sub("", text).lstrip("\n") if comments else text.lstrip("\n")
    if re.match(r"sep=.\n", text):  # a line for Excel
        text = text[text.index("\n") + 1 :].lstrip("\n")
    line, _, body = text.partition("\n")
    if _is_data(line) and comments:  # the header is a comment, as NumPy writes it
        line, body = comments[-1].strip().lstrip("# "), text
    if not line.strip():
        raise InputError(f"{path}: the file is empty; check how it was made")
    separator = max(_SEPARATORS, key=line.count)
    if separator not in line:
        raise InputError(
            f"{path}: the cells of its first line are not separated by commas, semicolons, tabs or "
            f"bars: {line[:_SHOWN]!r}; write a CSV table"
        )
    if _is_data(line):
        raise InputError(
            f"{path}: its first line holds data: {line[:_SHOWN]!r}; put a line with the names of "
            "the columns before it"
        )
    header = _cells(line, separator, path)[0]
    return _rows(body, header, separator, path)


def _decoded(raw: bytes, path: Path) -> str:
    """Decode text, by its byte order mark, as UTF-8, or as Western European."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            try:
                return raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: begins as {encoding.upper()}, but is not in it throughout; save it "
                    "as UTF-8"
                ) from error
    head = raw[:HEAD_BYTES]
    if b"\0" in head:  # UTF-16 without a mark has a zero in each pair of bytes
        for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
            if zeros.count(0) > 0.9 * len(zeros) and b"\0\0" not in head:
                return raw.decode(encoding, errors="replace")
    if b"\0" in raw:
        raise InputError(f"{path}: is no text: it holds bytes of zero; write a CSV table")
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def _is_data(line: str) -> bool:
    """Whether a line holds values, not the names of columns."""
    cells = [cell.strip(" \"'") for cell in re.split(r"[,;\t|]", line)]
    numbers = sum(re.fullmatch(r"[+-]?\d+([.,]\d*)?", cell) is not None for cell in cells)
    return numbers >= 2 or bool(is_time(cells).any())


def _cells(text: str, separator: str, path: Path) -> list[list[str]]:
    """The cells of the rows of a text with quoted cells; blank lines are left out."""
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        return [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(
            f"{path}: near line {reader.line_num + 1}, a quotation mark is out of place or is "
            "never closed; correct it"
        ) from error


def _rows(body: str, header: Sequence[str], separator: str, path: Path) -> RawTable:
    """The rows as text, each with as many cells as the header."""
    count = len(header)
    if '"' in body:
        cells = _cells(body, separator, path)
        widths = [_width(row) for row in cells]
        padded = [(row + [""] * count)[:count] for row in cells]
        frame = pd.DataFrame(padded, columns=range(count), dtype=object)
    else:
        lines = [line for line in body.split("\n") if line.strip(f" {separator}")]
        widths = [line.count(separator) + 1 for line in lines]
        if lines and max(widths) > count:
            widths = [_width(line.split(separator)) for line in lines]
            lines = [separator.join(line.split(separator, count)[:count]) for line in lines]
        frame = _parsed(lines, count, separator)
    width = pd.Series(widths, frame.index, dtype=int)
    many = width > count
    if len(width) and many.mean() > 0.5:
        raise InputError(
            f"{path}: most rows have more cells than the header ({width.max()}, not {count}); if "
            "their numbers have decimal commas, write points, or separate the cells by semicolons"
        )
    frame.columns = pd.Index([name.strip() for name in header])
    flaw = many.map({True: "too many cells", False: ""}).astype(object)
    return RawTable(frame, flaw, separator)


def _width(row: Sequence[str]) -> int:
    """Number of cells without the empty ones at the end, which spreadsheets write."""
    return next((i + 1 for i in reversed(range(len(row))) if row[i].strip()), 0)


def _parsed(lines: Sequence[str], count: int, separator: str) -> pd.DataFrame:
    """Lines without quoted cells as a frame of text."""
    if not lines:
        return pd.DataFrame({i: pd.Series(dtype=str) for i in range(count)})
    return pd.read_csv(
        io.StringIO("\n".join(lines)),
        sep=separator,
        header=None,
        names=list(range(count)),
        dtype=str,
        index_col=False,
        skipinitialspace=True,
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
    )
