# SPDX-License-Identifier: Apache-2.0
"""What all figures and films share: colours, colour scales, and how a figure is made and saved.

Figures are made without ``pyplot``, so they leave no global state and need no display. Matplotlib
is imported when the first figure is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours ("Color Universal Design", 2008) for lines, without yellow and black.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#595959"

_DPI = 160


def color_scale(field: NDArray[np.floating[Any]], signed: bool | None) -> dict[str, Any]:
    """Choose the colour map of a field and its limits, which cut off 0.5 % of values at each end.

    Args:
        field: Any shape; NaN is ignored.
        signed: True for red-white-blue centred at zero, False for viridis; if None, the former
            is chosen when the values extend well to both sides of zero.

    Returns:
        Keywords ``cmap``, ``vmin`` and ``vmax`` of matplotlib's functions.
    """
    low, high = np.nanpercentile(field, [0.5, 99.5])
    if signed is None:
        signed = low < 0 < high and min(-low, high) > 0.2 * max(-low, high)
    if signed:
        limit = float(max(-low, high)) or 1.0
        return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return {"cmap": "viridis", "vmin": float(low), "vmax": float(high)}


def positive_scale(top: float) -> dict[str, Any]:
    """Colour map and limits for errors and standard deviations: pale at zero, dark at ``top``."""
    return {"cmap": "magma_r", "vmin": 0.0, "vmax": top if top > 0 else 1.0}


def in_units(name: str, units: str) -> str:
    """Label with units in brackets, or without where there are none (``"1"``)."""
    return name if units in ("", "1") else f"{name} ({units})"


def new_figure(size: tuple[float, float], pad: float = 0.04) -> Figure:
    """Make an empty figure with constrained layout; size and padding in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=pad, w_pad=0.04))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format of the file's ending; its folder is made if need be."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=_DPI)
    return target


def unframe(ax: Axes) -> None:
    """Hide the top and right spines."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def grid_lines(ax: Axes) -> None:
    """Draw pale lines at the major ticks."""
    ax.grid(which="major", color="#dddddd", lw=0.6)


def as_array(x: ArrayLike) -> NDArray[np.float64]:
    """Convert an array, or a tensor in CPU memory, to float64."""
    return np.asarray(x, dtype=np.float64)
