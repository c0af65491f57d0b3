# SPDX-License-Identifier: Apache-2.0
"""Denoising diffusion operators as priors for Bayesian data assimilation.

The public names live here and load on first use, so that `import ddo_modulus` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddo_modulus.diffusion.noise import FieldNoiseScheduler as FieldNoiseScheduler
    from ddo_modulus.diffusion.operator import Denoiser as Denoiser
    from ddo_modulus.diffusion.operator import DiffusionOperator as DiffusionOperator
    from ddo_modulus.diffusion.operator import Engine as Engine
    from ddo_modulus.diffusion.package import Package as Package
    from ddo_modulus.diffusion.samplers import Churn as Churn
    from ddo_modulus.diffusion.samplers import sample as sample
    from ddo_modulus.diffusion.task import CoarseWindow as CoarseWindow
    from ddo_modulus.diffusion.task import Task as Task
    from ddo_modulus.diffusion.trajectory import TrajectoryDenoiser as TrajectoryDenoiser
    from ddo_modulus.fields.basis import CosineBasis as CosineBasis
    from ddo_modulus.fields.basis import FourierBasis as FourierBasis
    from ddo_modulus.fields.basis import SphericalBasis as SphericalBasis
    from ddo_modulus.fields.coupled import CoupledField as CoupledField
    from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser as GaussianDenoiser
    from ddo_modulus.fields.gaussian_field import GaussianField as GaussianField
    from ddo_modulus.fields.gaussian_field import Matern as Matern
    from ddo_modulus.fields.gaussian_field import MeasuredSpectrum as MeasuredSpectrum
    from ddo_modulus.fields.gaussian_field import WhiteField as WhiteField
    from ddo_modulus.fields.grid import BoxGrid as BoxGrid
    from ddo_modulus.fields.grid import LatLonGrid as LatLonGrid
    from ddo_modulus.observations import AreaMeanOperator as AreaMeanOperator
    from ddo_modulus.observations import LevelOperator as LevelOperator
    from ddo_modulus.observations import LinearRadiance as LinearRadiance
    from ddo_modulus.observations import ObservationOperator as ObservationOperator
    from ddo_modulus.observations import Observations as Observations
    from ddo_modulus.observations import PointOperator as PointOperator
    from ddo_modulus.observations import ProfileRadiance as ProfileRadiance
    from ddo_modulus.observations import ReportOperators as ReportOperators
    from ddo_modulus.observations import wind_direction as wind_direction
    from ddo_modulus.observations import wind_speed as wind_speed
    from ddo_modulus.posterior import Background as Background
    from ddo_modulus.posterior import Inflated as Inflated
    from ddo_modulus.posterior import MomentMatching as MomentMatching
    from ddo_modulus.posterior import innovation_inflation as innovation_inflation

__version__ = "0.1.0"

_MODULE_OF = {
    "CosineBasis": "basis",
    "FourierBasis": "basis",
    "SphericalBasis": "basis",
    "CoupledField": "coupled",
    "Denoiser": "denoiser",
    "DiffusionOperator": "denoiser",
    "Engine": "denoiser",
    "GaussianDenoiser": "gaussian",
    "GaussianField": "field",
    "Matern": "field",
    "MeasuredSpectrum": "field",
    "WhiteField": "field",
    "BoxGrid": "grid",
    "LatLonGrid": "grid",
    "FieldNoiseScheduler": "noise",
    "AreaMeanOperator": "observations",
    "LevelOperator": "observations",
    "LinearRadiance": "observations",
    "ObservationOperator": "observations",
    "Observations": "observations",
    "PointOperator": "observations",
    "ProfileRadiance": "observations",
    "ReportOperators": "observations",
    "wind_direction": "observations",
    "wind_speed": "observations",
    "Package": "package",
    "Background": "posterior",
    "Inflated": "posterior",
    "MomentMatching": "posterior",
    "innovation_inflation": "posterior",
    "Churn": "sampling",
    "sample": "sampling",
    "CoarseWindow": "task",
    "Task": "task",
    "TrajectoryDenoiser": "trajectory",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
