# SPDX-License-Identifier: Apache-2.0
"""Observations: the operators that predict them from states, and their values and errors."""

from ddo_modulus.observations.algebra import (
    AreaMeanOperator,
    DerivedOperator,
    LinearOperator,
    ObservationOperator,
    PointOperator,
    StackedOperator,
    Tangent,
    combined,
    joined,
)
from ddo_modulus.observations.observed import Observations
from ddo_modulus.observations.radiance import (
    LinearRadiance,
    ProfileOperator,
    ProfileRadiance,
    sounding,
)
from ddo_modulus.observations.reports import ReportOperators
from ddo_modulus.observations.surface import (
    humidity,
    pressure_at,
    temperature_at,
    wind_direction,
    wind_speed,
)
from ddo_modulus.observations.typical import TYPICAL_ERROR, typical_error
from ddo_modulus.observations.upper_air import LevelOperator

__all__ = [
    "TYPICAL_ERROR",
    "AreaMeanOperator",
    "DerivedOperator",
    "LevelOperator",
    "LinearOperator",
    "LinearRadiance",
    "ObservationOperator",
    "Observations",
    "PointOperator",
    "ProfileOperator",
    "ProfileRadiance",
    "ReportOperators",
    "StackedOperator",
    "Tangent",
    "combined",
    "humidity",
    "joined",
    "pressure_at",
    "sounding",
    "temperature_at",
    "typical_error",
    "wind_direction",
    "wind_speed",
]
