# SPDX-License-Identifier: Apache-2.0
"""What is read of real files: every file of a folder through the reading of `ddo prepare`.

Each file is opened in canonical form, and all of its values are read and checked. The table says
which variables it gives, on which times and grid, what was converted or left out, or the words in
which it was refused. A section is a function that turns a file into a row; files of reports get one
of their own beside `read_fields`.

    python benchmarks/real_files.py FOLDER --out benchmarks/results/real_files.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from report import command, machine, publish

from ddo_modulus.data.source import check_values, open_dataset, reading_notes
from ddo_modulus.errors import InputError

FIELD_FILES = {".grib", ".grib2", ".grb", ".grb2", ".nc", ".nc4", ".rda", ".zarr"}


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


def read_fields(path: Path) -> Row:
    """Read a file of fields as `ddo prepare` does, without writing a store."""
    try:
        dataset = open_dataset(path)
        check_values(dataset, str(path))
    except InputError as error:
        return Row(refused=" ".join(str(error).replace(f"{path.parent}/", "").split()))
    names = [str(name) for name in dataset.data_vars]
    shown = ", ".join(names if len(names) < 8 else [*names[:6], f"... ({len(names)})"])
    grid = f"{dataset.sizes['lat']} x {dataset.sizes['lon']}"
    lead = "".join(
        f"{n} {d} x " for d, n in dataset.sizes.items() if d in ("ensemble", "trajectory")
    )
    notes = "; ".join(note.split(": ", 1)[1] for note in reading_notes(dataset))
    return Row(shown, f"{lead}{dataset.sizes['time']} x {grid}", notes)


SECTIONS = [
    Section(
        "Fields",
        FIELD_FILES,
        ("variables", "times x grid", "converted or left out", "refused"),
        read_fields,
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
