# SPDX-License-Identifier: Apache-2.0
"""Words, numbers and figures that report a comparison of generated with true fields."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ddo_modulus.cli.verify.inputs import Inputs, describe
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.grid import BoxGrid, Grid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.plots import CurvePanel, curves_figure
from ddo_modulus.verification import Comparison, Curve, basis_of
from ddo_modulus.verification.measures import Measured, Measures


def _unit_wavenumber(basis: Basis) -> float:
    """Angular wavenumber of what a reader counts in: waves, or degrees on the globe."""
    return 1.0 if isinstance(basis, SphericalBasis) else 2 * np.pi


def angular_wavenumber(largest: object, basis: Basis) -> float | None:
    """Convert ``largest_wavenumber=`` from waves, or degrees on the globe.

    Raises:
        InputError: If it is not a positive number.
    """
    if largest is None:
        return None
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not largest > 0:
        raise InputError(f"largest_wavenumber={largest} must be a positive number")
    if isinstance(basis, SphericalBasis):  # the wavenumber of a degree
        return float(np.sqrt(largest * (largest + 1)))
    return 2 * np.pi * float(largest)


def explain(inputs: Inputs, name: str, sides: list[Measured], measures: Measures) -> str:
    """What the table's numbers mean, for this comparison."""
    samples, truth = inputs.samples[name], inputs.truth[name]
    runs, frames = sides[1].size
    drawn = "whole trajectories" if runs > 1 and frames > 1 else "single fields"
    if runs == 1:
        drawn = "blocks of consecutive times"
    like = "single frames"
    if inputs.trajectories:
        like = f"stretches of {min(frames, sides[0].size[1])} frames"
    independent = sides[0].size[0] * sides[0].size[1]
    text = (
        f"Samples: {describe(samples)}. Truth: {describe(truth)}. *Truth's own*: the distance "
        f"between two resamplings of the truth, one of {drawn} and as large as the truth, one of "
        f"{like} and as large as the samples ({independent} fields"
    )
    if inputs.targets is not None and not inputs.trajectories:
        text += ", members of one time counted once"
    text += "). A ratio of about one: as near as samples of the truth's law come."
    if samples.shape[-2:] != truth.shape[-2:]:
        height, width = measures.grid.shape
        text += (
            " Spectra are compared over the shells that both grids fill, F2ID by features that "
            f"know no grid, all else on {height}x{width} points, the finer fields truncated."
        )
    return text


def entries(found: Comparison, sides: list[Measured], measures: Measures) -> dict[str, object]:
    """The comparison as JSON holds it."""
    quantities = {
        q.name: {**{k: v for k, v in asdict(q).items() if k != "name"}, "ratio": _finite(q.ratio)}
        for q in found.quantities
    }
    return {
        "sizes": {"samples": sides[0].size, "truth": sides[1].size},
        "grid": measures.grid.shape,
        "octaves": measures.octaves,
        "quantities": {
            name: {k: _finite(v) if isinstance(v, float) else v for k, v in row.items()}
            for name, row in quantities.items()
        },
        "curves": {
            name: {k: v.tolist() for k, v in vars(curve).items()}
            for name, curve in found.curves.items()
        },
    }


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if np.isfinite(value) else None


def draw(name: str, found: Comparison, grid: Grid, title: str, units: str, folder: Path) -> None:
    """Draw all curves, one file for each subject."""
    basis = basis_of(grid)
    unit = _unit_wavenumber(basis)
    if isinstance(grid, BoxGrid):
        wave, distance = "wavenumber (waves over a unit length)", "distance"
        rows, columns = "along y", "along x"
    else:
        wave, distance = "waves per 1000 km", "distance (km)"
        rows, columns = "along meridians", "along parallels"
        if isinstance(basis, SphericalBasis):
            wave = "degree"
    suffix = "" if units in ("", "1") else f" ({units})"

    def panel(
        key: str, title: str, xlabel: str, *, scale: float = 1.0, x: bool = False, y: bool = False
    ) -> CurvePanel:
        curve: Curve = found.curves[key]
        values = (curve.samples, curve.truth, curve.low, curve.high)
        return CurvePanel(title, xlabel, curve.x / scale, *values, log_x=x, log_y=y)

    sheets = {
        "distribution": [
            panel("spectrum", "power spectrum", wave, scale=unit, x=True, y=True),
            panel("histogram", "probability density", f"{name}{suffix}", y=True),
        ],
        "structure": [
            panel(f"S{p} along {axis}", f"S{p} {label}", distance, x=True, y=True)
            for axis, label in (("rows", rows), ("columns", columns))
            for p in (2, 3, 4)
        ],
        "autocovariance": [
            panel(f"autocovariance along {axis}", f"autocovariance / variance {label}", distance)
            for axis, label in (("rows", rows), ("columns", columns))
        ],
    }
    if "seam" in found.curves:
        lag, spectrum = "temporal autocovariance", "time-difference spectrum"
        sheets["time"] = [
            panel(lag, "autocovariance / variance in time", "lag (frames)"),
            panel("seam", "time-difference energy over its mean", "frame"),
            panel(spectrum, "spectrum of time differences", wave, scale=unit, x=True, y=True),
        ]
    for sheet, panels in sheets.items():
        curves_figure(panels, title=title, path=folder / f"{name}_{sheet}.png")
