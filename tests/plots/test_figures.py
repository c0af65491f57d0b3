# SPDX-License-Identifier: Apache-2.0
"""Figures are written, describe what they are given, and refuse what does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.plots import (
    CurvePanel,
    PointValues,
    analysis_panel,
    curves,
    curves_figure,
    estimate_panel,
    rank_histogram_figure,
    spectra_figure,
)
from ddo_modulus.plots.style import color_scale

LAT, LON = np.linspace(60.0, 50.0, 11), np.linspace(-10.0, 4.0, 15)
POINTS = PointValues([51.0, 55.0], [0.0, 1.0], [0.1, -0.2])


def is_png(path: Path) -> bool:
    """Tell a PNG by its first bytes."""
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("members", [2, 5])
def test_panel_is_drawn_from_tensors_with_descending_latitude(tmp_path: Path, members: int) -> None:
    """Few members, missing values and a folder that is not there yet are no obstacle."""
    ensemble = torch.randn(members, 11, 15, generator=torch.Generator().manual_seed(0))
    truth = ensemble[0].clone()
    truth[0, 0] = torch.nan
    path = analysis_panel(
        truth, POINTS, ensemble, LAT, LON, units="K", title="t", path=tmp_path / "new" / "panel.png"
    )
    assert is_png(path)


def test_an_analysis_without_a_truth_is_drawn(tmp_path: Path) -> None:
    """Mean and spread of at least two members, and where they were observed."""
    ensemble = torch.randn(3, 11, 15, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "estimate.png"
    assert is_png(estimate_panel(POINTS, ensemble, LAT, LON, units="K", title="t", path=path))
    with pytest.raises(InputError):
        estimate_panel(POINTS, ensemble, LAT[:4], LON, units="K", title="t", path=path)
    with pytest.raises(InputError):
        estimate_panel(POINTS, ensemble[:1], LAT, LON, units="K", title="t", path=path)


def test_colours_of_signed_fields_are_centred_at_zero() -> None:
    """Signed fields diverge from zero; temperatures in kelvin do not."""
    x = np.linspace(-3.0, 5.0, 1000).reshape(20, 50)
    scale = color_scale(x, None)
    assert scale["vmin"] == -scale["vmax"]
    assert color_scale(x + 280.0, None)["vmin"] > 270.0
    assert color_scale(x, signed=False)["vmin"] > -3.0
    assert color_scale(np.zeros((4, 4)), signed=True)["vmax"] == 1.0


def test_histogram_and_spectra_are_drawn(tmp_path: Path) -> None:
    """Zero wavenumber and powers of zero are left out of the logarithmic axes."""
    rank = rank_histogram_figure([5, 3, 4], title="t", path=tmp_path / "rank.png", p_value=0.8)
    k = np.arange(5.0)
    power = {"truth": 1.0 / (1.0 + k), "other": np.array([1.0, 1.0, 0.5, 0.0, 0.0])}
    spectra = spectra_figure(k, power, title="t", path=tmp_path / "spectra.png", units="K")
    assert is_png(rank)
    assert is_png(spectra)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """Wrong shapes are named and nothing is written."""
    path = tmp_path / "x.png"
    field, ensemble = np.zeros((11, 15)), np.zeros((3, 11, 15))
    with pytest.raises(InputError, match="truth has shape"):
        analysis_panel(field.T, POINTS, ensemble, LAT, LON, units="K", title="t", path=path)
    with pytest.raises(InputError, match="ensemble has shape"):
        analysis_panel(field, POINTS, ensemble[:1], LAT, LON, units="K", title="t", path=path)
    with pytest.raises(InputError, match="the same length"):
        bad = PointValues([51.0], [0.0, 1.0], [0.1, -0.2])
        analysis_panel(field, bad, ensemble, LAT, LON, units="K", title="t", path=path)
    with pytest.raises(InputError, match="counts"):
        rank_histogram_figure([0, 0], title="t", path=path)
    with pytest.raises(InputError, match="'a' has shape"):
        spectra_figure([1.0, 2.0], {"a": [1.0]}, title="t", path=path)
    with pytest.raises(InputError, match="no positive power"):
        spectra_figure([1.0, 2.0], {"a": [0.0, 0.0]}, title="t", path=path)
    with pytest.raises(InputError, match="no spectrum"):
        spectra_figure([1.0, 2.0], {}, title="t", path=path)
    assert not path.exists()


def test_curves_with_and_without_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithmic panels have a ratio below; what is not positive is left out, not drawn."""
    x = np.arange(6.0)
    samples, truth = np.array([1.0, 2.0, 0.0, 1e-16, 3.0, 2.0]), np.array([1.0, 1, 1, 1, 1, 0])
    panel = CurvePanel("power", "k", x, samples, truth, 0.9 * truth, 1.1 * truth)
    drawn = []
    monkeypatch.setattr(
        curves, "save_figure", lambda figure, path: drawn.append(figure) or Path(path)
    )
    logarithmic = panel._replace(log_x=True, log_y=True)
    curves_figure([panel, logarithmic], title="t", path=tmp_path / "x.png")
    linear, main, ratio = sorted(drawn[0].axes, key=lambda ax: (ax.get_xscale(), ax.get_ylabel()))
    assert (linear.get_yscale(), main.get_yscale(), ratio.get_ylabel()) == (
        "linear",
        "log",
        "ratio",
    )
    lines = {line.get_label(): line.get_xydata() for line in main.lines}
    np.testing.assert_array_equal(lines["samples"][:, 0], x[1:])
    assert np.isnan(lines["samples"][1, 1])
    assert main.get_ylim()[0] >= 1e-10 * 0.999  # not down to 1e-16
    np.testing.assert_allclose(ratio.lines[-1].get_ydata(), samples[1:5])
    monkeypatch.undo()
    assert is_png(curves_figure([logarithmic] * 4, title="t", path=tmp_path / "y.png"))
    with pytest.raises(InputError, match="no curve"):
        curves_figure([], title="t", path=tmp_path / "z.png")


def test_matplotlib_is_imported_late() -> None:
    """Importing the modules costs nothing until a figure is drawn, and pyplot is never loaded."""
    code = (
        "import sys; from ddo_modulus.plots import analysis_panel, curves_figure, write_film; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
