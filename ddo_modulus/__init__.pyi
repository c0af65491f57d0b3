# SPDX-License-Identifier: Apache-2.0
from .diffusion.noise import FieldNoiseScheduler
from .diffusion.operator import DiffusionOperator
from .diffusion.package import Package
from .diffusion.prior import Denoiser, FunctionPrior, Prior
from .diffusion.samplers import Churn, sample
from .diffusion.task import CoarseWindow, Task
from .diffusion.trajectory import TrajectoryPrior
from .fields.basis import CosineBasis, FourierBasis
from .fields.coupled import CoupledField
from .fields.gaussian_denoiser import GaussianDenoiser
from .fields.gaussian_field import GaussianField, Matern, MeasuredSpectrum, WhiteField
from .fields.grid import BoxGrid, LatLonGrid
from .fields.spherical_basis import SphericalBasis
from .observations import (
    AreaMeanOperator,
    LevelOperator,
    LinearRadiance,
    ObservationOperator,
    Observations,
    PointOperator,
    ProfileRadiance,
    ReportOperators,
    wind_direction,
    wind_speed,
)
from .posterior import (
    AnalysisSystem,
    Background,
    Inflated,
    MomentMatching,
    innovation_inflation,
)

__all__ = [
    "AnalysisSystem",
    "AreaMeanOperator",
    "Background",
    "BoxGrid",
    "Churn",
    "CoarseWindow",
    "CosineBasis",
    "CoupledField",
    "Denoiser",
    "DiffusionOperator",
    "FunctionPrior",
    "FieldNoiseScheduler",
    "FourierBasis",
    "GaussianDenoiser",
    "GaussianField",
    "Inflated",
    "LatLonGrid",
    "LevelOperator",
    "LinearRadiance",
    "Matern",
    "MeasuredSpectrum",
    "MomentMatching",
    "ObservationOperator",
    "Observations",
    "Package",
    "PointOperator",
    "Prior",
    "ProfileRadiance",
    "ReportOperators",
    "SphericalBasis",
    "Task",
    "TrajectoryPrior",
    "WhiteField",
    "innovation_inflation",
    "sample",
    "wind_direction",
    "wind_speed",
]

__version__: str
