# SPDX-License-Identifier: Apache-2.0
from .diffusion.noise import FieldNoiseScheduler
from .diffusion.operator import DiffusionOperator
from .diffusion.package import Package
from .diffusion.posterior_config import PosteriorConfig
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
from .inference.assimilate import assimilate
from .inference.backgrounds import BackgroundConfig
from .inference.generate import generate
from .inference.quality import QualityControl
from .inference.result import AnalysisResult
from .inference.super_resolve import super_resolve
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
    "AnalysisResult",
    "AnalysisSystem",
    "AreaMeanOperator",
    "Background",
    "BackgroundConfig",
    "BoxGrid",
    "Churn",
    "CoarseWindow",
    "CosineBasis",
    "CoupledField",
    "Denoiser",
    "DiffusionOperator",
    "FieldNoiseScheduler",
    "FourierBasis",
    "FunctionPrior",
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
    "PosteriorConfig",
    "Prior",
    "ProfileRadiance",
    "QualityControl",
    "ReportOperators",
    "SphericalBasis",
    "Task",
    "TrajectoryPrior",
    "WhiteField",
    "assimilate",
    "generate",
    "innovation_inflation",
    "sample",
    "super_resolve",
    "wind_direction",
    "wind_speed",
]

__version__: str
