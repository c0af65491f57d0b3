# SPDX-License-Identifier: Apache-2.0
from .comparison import Comparison, Curve, Quantity, compare
from .distribution import wasserstein_distance
from .innovations import Desroziers, desroziers, desroziers_covariances, reduced_chi_square
from .scattering import F2ID, Scattering, f2id, frechet_distance
from .scores import (
    RankHistogram,
    Scores,
    average,
    fair_crps,
    gaussian_crps,
    markdown_table,
    pool,
    rank_histogram,
    rich_table,
    rmse,
    score,
    spread,
    spread_skill_ratio,
)
from .structure import (
    autocovariance,
    basis_of,
    log_spectrum_distance,
    shell_power,
    structure_functions,
)
from .temporal import seam_ratio, temporal_autocovariance, time_difference_energy

__all__ = [
    "Comparison",
    "Curve",
    "Desroziers",
    "F2ID",
    "Quantity",
    "RankHistogram",
    "Scattering",
    "Scores",
    "autocovariance",
    "average",
    "basis_of",
    "compare",
    "desroziers",
    "desroziers_covariances",
    "f2id",
    "fair_crps",
    "frechet_distance",
    "gaussian_crps",
    "log_spectrum_distance",
    "markdown_table",
    "pool",
    "rank_histogram",
    "reduced_chi_square",
    "rich_table",
    "rmse",
    "score",
    "seam_ratio",
    "shell_power",
    "spread",
    "spread_skill_ratio",
    "structure_functions",
    "temporal_autocovariance",
    "time_difference_energy",
    "wasserstein_distance",
]
