# SPDX-License-Identifier: Apache-2.0
r"""Brightness temperatures.

Axes: ``B`` batch, ``M`` observations, ``N`` points, ``q`` quantities of a profile, ``K`` outputs.

**Weighting functions.** In the microwave the Planck function is linear in temperature
(Rayleigh-Jeans), and a channel on the oxygen band sees

.. math:: T_b = \int T \, d\tau + \tau_s T_s , \qquad
    \tau(p) = \exp\left(-(p / p_{peak})^2\right) :

the optical depth of a well-mixed gas between its pressure-broadened lines grows with :math:`p^2`
(Petty 2006, A First Course in Atmospheric Radiation, ch. 7), and :math:`d\tau / d\ln p`, the
weighting function, is a bell in :math:`\ln p` with its peak at :math:`p_{peak}`, as wide at half
its height (1.22) as a Gaussian of standard deviation 0.52. The profile is linear in :math:`\ln p`
between the prior's levels, which gives each level its weight. This is a linearised approximation:
one profile of absorption for all air, a view straight down, a black surface, no clouds, no rain. It
is not a radiative transfer model, whose errors are some tenths of a kelvin; take the bias of your
data against it into account (:attr:`LinearRadiance.offset`), or give a model.

**A radiative transfer model** is any differentiable function of the profile at a point, such as a
learned emulator of RTTOV (:class:`ProfileRadiance`). It is linearised by ``torch.func`` at the
state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.constants import STANDARD_PRESSURE
from ddo_modulus.errors import InputError
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.observations.algebra import (
    LinearOperator,
    ObservationOperator,
    Tangent,
    _Placed,
)

#: Pressure (hPa) at which those channels of ATMS peak that see the troposphere and the lower
#: stratosphere, by NOAA's table of them (NESDIS MiRS, "NPOESS ATMS Overview").
ATMS_PEAKS: Mapping[int, float] = {6: 700.0, 7: 400.0, 8: 250.0, 9: 180.0, 10: 90.0}
#: AMSU-A has them one number lower, at the same frequencies (53.596, 54.40, 54.94, 55.50 and 57.29
#: GHz).
AMSU_A_PEAKS: Mapping[int, float] = {channel - 1: peak for channel, peak in ATMS_PEAKS.items()}

_NODES = 4001  # of the quadrature


@dataclass(frozen=True)
class LinearRadiance:
    """Brightness temperatures that are weighted sums of a state's channels.

    Attributes:
        weights: For each channel of the sensor, the names of the state's channels and their
            weights, K/K.
        offset: For each channel of the sensor, what is added to the sum, K; zero where missing.

    Raises:
        InputError: If a weight is not finite, or a channel has none.
    """

    weights: Mapping[int, Mapping[str, float]]
    offset: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for channel, weights in self.weights.items():
            if not weights or not np.isfinite(list(weights.values())).all():
                raise InputError(f"the weights of satellite channel {channel} are {dict(weights)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the state's channels that are read."""
        return tuple(dict.fromkeys(name for row in self.weights.values() for name in row))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the sensor."""
        return tuple(self.weights)


@dataclass(frozen=True)
class ProfileRadiance:
    """Brightness temperatures by a differentiable function of the profile at a point.

    Attributes:
        function: From ``(..., q)``, the inputs in physical units and then the columns, to
            ``(..., K)`` kelvin; each profile by itself. A module computes in the precision and on
            the device of its parameters.
        inputs: Names of the state's channels that it takes, in this order.
        channels: Channel of the sensor that each of its outputs is.
        columns: Columns of the table that it takes besides, as ``satellite_za``.
    """

    function: Callable[[Tensor], Tensor]
    inputs: tuple[str, ...]
    channels: tuple[int, ...]
    columns: tuple[str, ...] = ()


Radiance = LinearRadiance | ProfileRadiance


def sounding(
    levels: Mapping[str, float],
    peaks: Mapping[int, float] = AMSU_A_PEAKS,
    *,
    surface: str | None = None,
    surface_pressure: float = STANDARD_PRESSURE / 100,
    offset: Mapping[int, float] | None = None,
    least: float = 0.6,
) -> LinearRadiance:
    """Weighting functions of a temperature sounder on a prior's levels (see the module).

    Args:
        levels: Names of temperature channels and their pressures, hPa.
        peaks: Pressure at which each channel of the sensor peaks, hPa.
        surface: Name of the surface temperature's channel. With one the profile goes on to the
            surface, and what the surface emits is seen.
        surface_pressure: Where the air ends, hPa.
        offset: Added to the brightness temperature of a channel, K.
        least: Channels of which the prior holds less than this share are left out.

    Returns:
        Weights that add up to one for every channel: air of one temperature is seen as that.
    """
    nodes = sorted((p, name) for name, p in levels.items() if p <= surface_pressure)
    if surface is not None:
        nodes = [(p, name) for p, name in nodes if p < surface_pressure]
        nodes.append((surface_pressure, surface))
    weights: dict[int, dict[str, float]] = {}
    for channel, peak in peaks.items() if nodes else ():
        pressure = np.array([p for p, _ in nodes])
        fine = np.geomspace(pressure[0], pressure[-1], _NODES)
        transmittance = np.exp(-((fine / peak) ** 2))
        middle = (np.log(fine[1:]) + np.log(fine[:-1])) / 2
        slab = -np.diff(transmittance)
        hats = np.eye(len(nodes))
        share = [float(slab @ np.interp(middle, np.log(pressure), hat)) for hat in hats]
        if surface is not None:
            share[-1] += float(transmittance[-1])
        total = sum(share)
        if total >= least:
            weights[channel] = {
                name: value / total for (_, name), value in zip(nodes, share, strict=True)
            }
    return LinearRadiance(weights, dict(offset or {}))


class ProfileOperator(ObservationOperator):
    """A function of profiles with several outputs, of which each observation is one.

    Args:
        function: As in :class:`ProfileRadiance`.
        operators: Read the ``q`` inputs at ``N`` points.
        point: ``(M,)`` point of each observation.
        output: ``(M,)`` output of the function that it is.
        constants: ``(N, c)`` further inputs, the same for all states.

    Raises:
        InputError: If operators differ in size, or a point or output cannot be.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        operators: Sequence[LinearOperator],
        point: Int[Tensor, " M"],
        output: Int[Tensor, " M"],
        constants: Float[Tensor, "N c"] | None = None,
    ) -> None:
        sizes = {operator.size for operator in operators}
        if len(sizes) != 1:
            raise InputError("the operators of a profile must read equally many points")
        points = sizes.pop()
        inside = bool(((point >= 0) & (point < points)).all())
        if not len(output) or len(point) != len(output) or not inside:
            raise InputError(f"every observation needs an output, and one of the {points} points")
        if bool((output < 0).any()):
            raise InputError("outputs of a profile's function are counted from zero")
        self.function, self.operators = function, tuple(operators)
        self.point, self.output = point, output
        self.constants = torch.zeros(points, 0) if constants is None else constants
        self.size = len(point)
        used, place = output.unique(return_inverse=True)
        self._outputs = used.tolist()
        self._placed = _Placed(self.constants, point, place, output)
        self._rows = [operator.take(point) for operator in operators]

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M"]:
        """Observed values of the states."""
        _, point, _, output = self._placed(x)
        return self._radiances(self._profiles(x))[:, point, output]

    def linearize(self, x: Float[Tensor, "B C H W"]) -> Tangent:
        """Derivatives of the outputs with respect to the inputs, one pull-back for each output."""
        _, point, place, _ = self._placed(x)
        profiles = self._profiles(x.detach())
        radiances, pullback = torch.func.vjp(self._radiances, profiles)  # type: ignore[misc]
        slopes = []
        for k in self._outputs:
            unit = torch.zeros_like(radiances)
            unit[..., k] = 1
            slopes.append(pullback(unit)[0])  # B N q
        slope = torch.stack(slopes)[place, :, point].movedim(0, 1)  # B M q
        terms = [(slope[..., i], row) for i, row in enumerate(self._rows)]
        return Tangent(terms, linear=False)

    def rescale(self, mean: Tensor, std: Tensor) -> ProfileOperator:
        """The same function of the rescaled operators."""
        operators = [operator.rescale(mean, std) for operator in self.operators]
        return ProfileOperator(self.function, operators, self.point, self.output, self.constants)

    def take(self, rows: Int[Tensor, " R"]) -> ProfileOperator:
        """Some of the outputs, and the profiles that they need."""
        points, point = self.point[rows].unique(return_inverse=True)
        operators = [operator.take(points) for operator in self.operators]
        output, constants = self.output[rows], self.constants[points]
        return ProfileOperator(self.function, operators, point, output, constants)

    def _profiles(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N q"]:
        return torch.stack([operator(x) for operator in self.operators], -1)

    def _radiances(self, profiles: Float[Tensor, "B N q"]) -> Float[Tensor, "B N K"]:
        constants = per_member(self._placed(profiles)[0][None], len(profiles))
        inputs = torch.cat([profiles, constants], -1)
        if isinstance(self.function, torch.nn.Module):
            like = next(self.function.parameters(), None)
            inputs = inputs if like is None else inputs.to(like)
        observed, least = self.function(inputs), self._outputs[-1] + 1
        if observed.shape[:-1] != profiles.shape[:-1] or observed.shape[-1] < least:
            raise InputError(
                f"the function of a profile made {tuple(observed.shape)} of {tuple(inputs.shape)}; "
                f"it has to keep all axes but the last, and to have at least {least} outputs"
            )
        return observed.to(profiles)
