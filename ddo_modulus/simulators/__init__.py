# SPDX-License-Identifier: Apache-2.0
"""Simulators that make training and test data.

`Simulator` is what all of them share; `TorusFlow` what the two-dimensional flows on a torus share.
"""

from ddo_modulus.simulators.kolmogorov import KolmogorovFlow
from ddo_modulus.simulators.navier_stokes import NavierStokes
from ddo_modulus.simulators.shallow_water import ShallowWater
from ddo_modulus.simulators.simulator import Simulator
from ddo_modulus.simulators.torus import TorusFlow

#: Simulators by their names.
SIMULATORS: dict[str, type[Simulator]] = {
    simulator.name: simulator for simulator in (KolmogorovFlow, NavierStokes, ShallowWater)
}

__all__ = [
    "SIMULATORS",
    "KolmogorovFlow",
    "NavierStokes",
    "ShallowWater",
    "Simulator",
    "TorusFlow",
]
