# SPDX-License-Identifier: Apache-2.0
from .curves import CurvePanel, curves_figure, rank_histogram_figure, spectra_figure
from .film import Edges, Film, Panel, Scale, field_scale, spread_scale
from .films import check_rate, write_film
from .maps import PointValues, analysis_panel, estimate_panel, samples_figure

__all__ = [
    "CurvePanel",
    "Edges",
    "Film",
    "Panel",
    "PointValues",
    "Scale",
    "analysis_panel",
    "check_rate",
    "curves_figure",
    "estimate_panel",
    "field_scale",
    "rank_histogram_figure",
    "samples_figure",
    "spectra_figure",
    "spread_scale",
    "write_film",
]
