# SPDX-License-Identifier: Apache-2.0
"""Verification: ensembles against the truth, distributions of fields against each other.

`scores` compares an ensemble with the one state that it aims at, `departures` analyses with the
observations. The other modules compare laws: generated fields with true ones that are not the same
states. `comparison` puts them together.
"""

from ddo_modulus.verification.comparison import Comparison as Comparison
from ddo_modulus.verification.comparison import Curve as Curve
from ddo_modulus.verification.comparison import Quantity as Quantity
from ddo_modulus.verification.comparison import compare as compare
from ddo_modulus.verification.departures import Desroziers as Desroziers
from ddo_modulus.verification.departures import desroziers as desroziers
from ddo_modulus.verification.departures import desroziers_covariances as desroziers_covariances
from ddo_modulus.verification.departures import reduced_chi_square as reduced_chi_square
from ddo_modulus.verification.distribution import wasserstein_distance as wasserstein_distance
from ddo_modulus.verification.scattering import F2ID as F2ID
from ddo_modulus.verification.scattering import Scattering as Scattering
from ddo_modulus.verification.scattering import f2id as f2id
from ddo_modulus.verification.scattering import frechet_distance as frechet_distance
from ddo_modulus.verification.scores import RankHistogram as RankHistogram
from ddo_modulus.verification.scores import Scores as Scores
from ddo_modulus.verification.scores import average as average
from ddo_modulus.verification.scores import fair_crps as fair_crps
from ddo_modulus.verification.scores import gaussian_crps as gaussian_crps
from ddo_modulus.verification.scores import markdown_table as markdown_table
from ddo_modulus.verification.scores import pool as pool
from ddo_modulus.verification.scores import rank_histogram as rank_histogram
from ddo_modulus.verification.scores import rich_table as rich_table
from ddo_modulus.verification.scores import rmse as rmse
from ddo_modulus.verification.scores import score as score
from ddo_modulus.verification.scores import spread as spread
from ddo_modulus.verification.scores import spread_skill_ratio as spread_skill_ratio
from ddo_modulus.verification.structure import autocovariance as autocovariance
from ddo_modulus.verification.structure import basis_of as basis_of
from ddo_modulus.verification.structure import log_spectrum_distance as log_spectrum_distance
from ddo_modulus.verification.structure import shell_power as shell_power
from ddo_modulus.verification.structure import structure_functions as structure_functions
from ddo_modulus.verification.temporal import seam_ratio as seam_ratio
from ddo_modulus.verification.temporal import temporal_autocovariance as temporal_autocovariance
from ddo_modulus.verification.temporal import time_difference_energy as time_difference_energy
