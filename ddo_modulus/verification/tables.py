# SPDX-License-Identifier: Apache-2.0
"""Tables for reports and for the terminal; the first two columns are words, the others numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Cells = Sequence[str]


def markdown(header: Cells, rows: Sequence[Cells]) -> str:
    """Render as a Markdown table, columns aligned."""
    cells = [header, *rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    rule = tuple("-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths))

    def line(values: Cells) -> str:
        padded = (
            value.ljust(w) if i < 2 else value.rjust(w)
            for i, (value, w) in enumerate(zip(values, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    return "\n".join(line(values) for values in (cells[0], rule, *cells[1:]))


def rich(header: Cells, rows: Sequence[Cells], *, title: str | None = None) -> Table:
    """Render as a table for the terminal."""
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table
