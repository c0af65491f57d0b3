# SPDX-License-Identifier: Apache-2.0
"""What is read of real files: every file of a folder as `ddo prepare` and `ddo assimilate` read it.

Each file of fields is opened in canonical form, and all of its values are read and checked. Files
of reports are read whole by the source for their format, and checked as a table of observations.
The tables say which variables a file gives, on which times and grid, what was converted or left
out, or the words in which it was refused. Reports are counted after the source has decoded them:
what a source does not read, as other kinds of report or data without a value, is not counted. A
section is a function that turns a file into a row.

    python benchmarks/real_files.py FOLDER --out benchmarks/results/real_files.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import command, machine, publish

from ddo_modulus.data.source import check_values, open_dataset, reading_notes
from ddo_modulus.earth2.sources import BufrSource, OdbSource
from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table

FIELD_FILES = {".grib", ".grib2", ".grb", ".grb2", ".nc", ".nc4", ".rda", ".zarr"}


REPORT_FILES = {".bufr": BufrSource, ".odb": OdbSource}
TABLE_FILES = {".csv", ".parquet", ".rda"}
MIDDLE, EVER = np.array(["2000-01-01"], "datetime64[ns]"), np.timedelta64(100 * 365, "D")
SHOWN = 8  # names in a cell of the table


@dataclass(frozen=True)
class Row:
    """What became of a file, in the words of the table."""

    variables: str = ""
    sizes: str = ""
    notes: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Section:
    """Files of a kind.

    Attributes:
        title: Heading.
        suffixes: Of the files' names.
        columns: Headings of the columns after the file's name.
        read: Reads a file.
    """

    title: str
    suffixes: set[str]
    columns: tuple[str, ...]
    read: Callable[[Path], Row]

    def table(self, folder: Path) -> list[str]:
        """The section in Markdown."""
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in self.suffixes)
        head = ("file", *self.columns)
        lines = [f"## {self.title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for path in files:
            row = self.read(path)
            cells = (path.name, row.variables, row.sizes, row.notes, row.refused)
            lines.append(f"| {' | '.join(c.replace('|', '/') or '–' for c in cells)} |")
        return [*lines, ""]


def refusal(path: Path, error: InputError) -> Row:
    """The row of a file that was refused, without the folder's name."""
    return Row(refused=" ".join(str(error).replace(f"{path.parent}/", "").split()))


def listed(names: Sequence[str]) -> str:
    """Names, the first of many."""
    few = len(names) < SHOWN
    return ", ".join(names if few else [*names[: SHOWN - 2], f"... ({len(names)})"])


def read_fields(path: Path) -> Row:
    """Read a file of fields as `ddo prepare` does, without writing a store."""
    try:
        dataset = open_dataset(path)
        check_values(dataset, str(path))
    except InputError as error:
        return refusal(path, error)
    shown = listed([str(name) for name in dataset.data_vars])
    grid = f"{dataset.sizes['lat']} x {dataset.sizes['lon']}"
    lead = "".join(
        f"{n} {d} x " for d, n in dataset.sizes.items() if d in ("ensemble", "trajectory")
    )
    notes = "; ".join(note.split(": ", 1)[1] for note in reading_notes(dataset))
    return Row(shown, f"{lead}{dataset.sizes['time']} x {grid}", notes)


def read_reports(path: Path) -> Row:
    """Read a file of reports whole, by its source or as a table, and check it as a table."""
    try:
        if source := REPORT_FILES.get(path.suffix.lower()):
            reader = source(path, time_tolerance=EVER, cache=False)
            table = read_table(reader(MIDDLE, list(reader.variables())))
        else:
            table = read_table(path)
    except InputError as error:
        return refusal(path, error)
    rows, times = table.frame, table.frame["time"]
    counts = [f"{text}: {count}" for text, count in (table.dropped | table.notes).items()]
    sizes = f"{len(rows)}, {times.min():%Y-%m-%d %H:%M} to {times.max():%Y-%m-%d %H:%M}"
    return Row(listed(sorted(rows["variable"].unique())), sizes, "; ".join(counts))


SECTIONS = [
    Section(
        "Fields",
        FIELD_FILES,
        ("variables", "times x grid", "converted or left out", "refused"),
        read_fields,
    ),
    Section(
        "Reports",
        {*REPORT_FILES, *TABLE_FILES},
        ("variables", "reports read, times", "converted or left out (reports)", "refused"),
        read_reports,
    ),
]


def main() -> None:
    """Read the folder and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    lines = ["# Real files", "", f"{command(__file__, ['FOLDER'])} on {machine('xarray')}.", ""]
    for section in SECTIONS:
        lines += section.table(arguments.folder)
    publish(lines[:-1], arguments.out)


if __name__ == "__main__":
    main()
