# SPDX-License-Identifier: Apache-2.0
"""What a film shows: scales of colour, panels, frames.

Axes: ``F`` frames, ``H W`` grid of a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.style import color_scale, positive_scale

Array = NDArray[np.floating[Any]]

_GREYS = 40  # of the 256 colours of a GIF, for text, lines and missing values
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Scale(NamedTuple):
    """Colours of some panels.

    Attributes:
        colors: Name of matplotlib's colour map.
        low: Value of the first colour.
        high: Value of the last colour.
        name: Quantity that the colours stand for.
        units: Its units; ``"1"`` for none.
        note: Remark for the label of the colour bar.
        extend: Where values may lie beyond the limits: ``"both"`` or ``"max"``.
    """

    colors: str
    low: float
    high: float
    name: str
    units: str = "1"
    note: str = ""
    extend: str = "both"

    def label(self, power: int) -> str:
        """Label of a colour bar whose numbers are in units of a power of ten."""
        factor = "10" + str(power).translate(_SUPERSCRIPT) if power else ""
        units = " ".join(part for part in (factor, self.units if self.units != "1" else "") if part)
        return (
            self.name + (f" ({units})" if units else "") + (f"; {self.note}" if self.note else "")
        )


def field_scale(values: Array, name: str, units: str, of: str) -> Scale:
    """Colours for a field; 0.5 % of the values at each end may lie beyond the limits.

    Args:
        values: A sample of the field, any shape; values that are not finite are ignored.
        name: Name of the quantity.
        units: Its units; ``"1"`` for none.
        of: What the values were sampled from, for the label of the colour bar.

    Raises:
        InputError: If no value is finite.
    """
    finite = np.asarray(values[np.isfinite(values)], np.float64)
    if not finite.size:
        raise InputError(f"{name}: all values {of} are missing")
    found = color_scale(finite, None)
    low, high = found["vmin"], found["vmax"]
    if not low < high:  # a constant field
        low, high = low - 0.5, high + 0.5
    return Scale(found["cmap"], low, high, name, units, f"limits hold 99 % of the values {of}")


def spread_scale(values: Array, units: str) -> Scale:
    """Colours for ensemble standard deviations; the highest 1 % may lie beyond the limit."""
    values = values[np.isfinite(values)]
    found = positive_scale(float(np.percentile(values, 99.0)) if values.size else 0.0)
    return Scale(found["cmap"], found["vmin"], found["vmax"], "Spread", units, extend="max")


class Edges(NamedTuple):
    """Outer edges of a grid's first and last cells."""

    west: float
    east: float
    south: float
    north: float


@dataclass(frozen=True)
class Panel:
    """A place in a film for one field.

    Attributes:
        title: Title above the panel.
        scale: Its colours; panels with equal scales share a colour bar.
        edges: Edges of its grid; those of the film if None.
    """

    title: str
    scale: Scale
    edges: Edges | None = None


@dataclass(frozen=True)
class Film:
    """Panels in columns, and the fields that they show from frame to frame.

    Attributes:
        columns: Panels of each column from top to bottom; shorter columns are centred.
        read: Returns the fields of frame number ``n``, ``(H, W)`` each, in the order of `panels`.
            Rows run from north to south if ``geographic``, from south to north (y upwards) if
            not. Values that are not finite are drawn in grey.
        stamps: Time of each frame, as text.
        heading: Heading of all frames.
        edges: Edges of the grid.
        geographic: Whether the edges are degrees.
        coastlines: Lines ``(N, 2)`` of longitude and latitude to draw over the fields.
    """

    columns: Sequence[Sequence[Panel]]
    read: Callable[[int], Sequence[Array]]
    stamps: Sequence[str]
    heading: str
    edges: Edges
    geographic: bool = False
    coastlines: Sequence[Array] = field(default_factory=tuple)

    @property
    def panels(self) -> list[Panel]:
        """All panels, column by column."""
        return [panel for column in self.columns for panel in column]

    @property
    def scales(self) -> list[Scale]:
        """The different scales, in the order of the panels."""
        return list(dict.fromkeys(panel.scale for panel in self.panels))

    def palette(self) -> NDArray[np.uint8]:
        """256 colours ``(16, 16, 3)`` that serve all frames: those of the scales, and greys."""
        from matplotlib import colormaps

        colors = [np.repeat(np.linspace(0, 1, _GREYS)[:, None], 3, 1)]
        parts = np.array_split(np.arange(256 - _GREYS), len(self.scales))
        for part, scale in zip(parts, self.scales, strict=True):
            colors.append(colormaps[scale.colors](np.linspace(0, 1, len(part)))[:, :3])
        return (255.0 * np.concatenate(colors)).round().astype(np.uint8).reshape(16, 16, 3)
