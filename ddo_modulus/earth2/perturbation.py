# SPDX-License-Identifier: Apache-2.0
r"""Correlated Gaussian perturbations of initial states, isotropic on the sphere.

Axes: ``N`` fields (all leading dimensions of a state), ``L`` lead times, ``H W`` grid, ``K``
coefficients.

A field is :math:`\sum_{lm} \sqrt{s_l}\, z_{lm} Y_{lm}` with real orthonormal harmonics and

.. math:: s_l \propto \left(\frac{2\nu}{\ell^2} + l(l+1)\right)^{-(\nu + 1)}, \qquad
    \sum_l (2l + 1)\, s_l = 1,

the Matérn field on the sphere (Lindgren, Rue & Lindström 2011, J. R. Stat. Soc. B 73, 423). By the
addition theorem the covariance of two points depends only on their distance, and the variance is
one everywhere. The harmonics are evaluated at the points of the state, so a region shows a part of
the same global field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.spherical_basis import SphericalBasis

with needs_earth2studio():
    from earth2studio.utils import handshake_dim
    from earth2studio.utils.checkpoint import bind_checkpoint_state

if TYPE_CHECKING:
    from earth2studio.utils.type import CoordSystem

# Share of the variance that may be omitted at the smallest scales.
_LEFT_OUT = 1e-3

# Fields synthesised together, which bounds the memory.
_TOGETHER = 32


@dataclass
class _GaussianFieldState:
    """What Earth2Studio keeps in a checkpoint of a forecast."""

    generator_state: torch.Tensor | None = None


class GaussianFieldPerturbation:
    """Adds Matérn random fields to a state; a perturbation of Earth2Studio.

    Fields of different variables, times, members and other leading dimensions are independent;
    those of different lead times are correlated if `time_scale` is set. The last two dimensions
    must be a one-dimensional ``lat`` and ``lon``, of the globe or a region: latitudes in either
    direction, with or without the poles, longitudes from -180 to 180 or from 0 to 360.

    The random numbers are drawn on the CPU, so a seed gives the same fields on every device. Scales
    that the grid does not resolve are omitted, and so are the smallest scales with a thousandth of
    the variance; the field is rescaled to a variance of one. The harmonics are evaluated in the
    first call and kept. Their memory grows with the number of rows times the square of the largest
    degree, ``max_degree`` at most. On the globe at 0.25 degrees, a length of 500 km and a
    smoothness of 1.5 need degree 220 and .3 GiB (1.4 GiB while they are computed).

    Args:
        noise_amplitude: Standard deviation of the perturbation, in the units of the state: a
            number, or a tensor that broadcasts with the state, such as ``(C, 1, 1)`` for a value
            for each variable.
        length_scale: Correlation length in km: at this distance the correlation is about .48 for
            a smoothness of 1.5.
        smoothness: 1/2 for an exponential covariance; larger is smoother.
        time_scale: Hours between lead times at which their fields have a correlation of 1/e; None
            for independent fields.
        max_degree: Largest degree of the harmonics.
        seed: Seed of the sequence of draws; a random one if None.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        noise_amplitude: float | Tensor = 0.05,
        length_scale: float = 500.0,
        smoothness: float = 1.5,
        time_scale: float | None = None,
        max_degree: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.noise_amplitude = torch.as_tensor(noise_amplitude)
        if not bool(self.noise_amplitude.isfinite().all()):
            raise InputError("noise_amplitude has values that are not finite")
        self.spectrum = Matern(length_scale / EARTH_RADIUS_KM, smoothness)
        if time_scale is not None and not (math.isfinite(time_scale) and time_scale > 0):
            raise InputError(f"time_scale must be positive hours or None, got {time_scale}")
        if max_degree is not None and max_degree < 1:
            raise InputError(f"max_degree must be at least 1, got {max_degree}")
        self.time_scale, self.max_degree, self.seed = time_scale, max_degree, seed
        self.generator: torch.Generator | None = None
        self.checkpoint = bind_checkpoint_state(_GaussianFieldState())
        self._field: GaussianField | None = None
        self._places: tuple[bytes, bytes] | None = None

    @torch.inference_mode()
    def __call__(self, x: Tensor, coords: CoordSystem) -> tuple[Tensor, CoordSystem]:
        """Perturb a state.

        Args:
            x: ``(..., H, W)``.
            coords: Its coordinates, the last two ``lat`` and ``lon`` in degrees.

        Returns:
            The perturbed state, and the coordinates.

        Raises:
            KeyError: If there is no ``lat`` or ``lon``.
            ValueError: If they are not last; and an InputError, which is a ValueError, if they are
                not one-dimensional, or they or the amplitude do not fit the state.
        """
        handshake_dim(coords, "lat", -2)
        handshake_dim(coords, "lon", -1)
        lat, lon = (np.asarray(coords[name], np.float64) for name in ("lat", "lon"))
        self._check(x, coords, lat, lon)
        generator = self._get_generator()
        before = generator.get_state()
        field = self._field_at(lat, lon)
        z = torch.randn(*x.shape[:-2], field.basis.size, generator=generator)
        if self.time_scale is not None and "lead_time" in coords:
            z = self._correlate(z, list(coords).index("lead_time"), coords["lead_time"])
        lots = z.reshape(-1, 1, z.shape[-1]).split(_TOGETHER)
        noise = torch.cat([field.color(lot.to(x.device)) for lot in lots]).reshape(x.shape)
        self._keep(before, generator.get_state())
        return x + (self.noise_amplitude.to(x.device) * noise).to(x.dtype), coords

    def _check(self, x: Tensor, coords: CoordSystem, lat: np.ndarray, lon: np.ndarray) -> None:
        if lat.ndim != 1 or lon.ndim != 1 or (len(lat), len(lon)) != tuple(x.shape[-2:]):
            raise InputError(
                f"lat {lat.shape} and lon {lon.shape} do not fit a state {tuple(x.shape)}; they "
                "must be the two axes of its grid"
            )
        if len(coords) != x.ndim:
            raise InputError(f"{len(coords)} coordinates do not fit a state {tuple(x.shape)}")
        if not (np.isfinite(lat).all() and np.isfinite(lon).all() and np.abs(lat).max() <= 90):
            raise InputError("lat must be from -90 to 90 degrees, and lon finite")
        try:
            fits = torch.broadcast_shapes(self.noise_amplitude.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"noise_amplitude {tuple(self.noise_amplitude.shape)} does not broadcast with a "
                f"state {tuple(x.shape)}; for one of each variable take (variables, 1, 1)"
            )

    def _field_at(self, lat: np.ndarray, lon: np.ndarray) -> GaussianField:
        """The random field at the points of a grid; cached for the last grid."""
        places = lat.tobytes(), lon.tobytes()
        if self._field is None or places != self._places:
            basis = _HarmonicsAt(lat, lon, self._degree(lat, lon))
            self._field, self._places = GaussianField(basis, self.spectrum), places
        return self._field

    def _degree(self, lat: np.ndarray, lon: np.ndarray) -> int:
        """Largest degree of the harmonics."""
        nu = self.spectrum.smoothness
        kappa2 = 2 * nu / self.spectrum.length_scale**2
        # Beyond this degree, u = l (l + 1), is a share of _LEFT_OUT of the integral of
        # (1 + u / kappa2)^-(nu + 1).
        needed = math.sqrt(kappa2 * math.expm1(-math.log(_LEFT_OUT) / nu))
        steps = [np.abs(np.diff(axis)).min() for axis in (lat, lon) if len(axis) > 1]
        shown = 180.0 / max(min(steps, default=180.0), 1e-3)
        most = math.inf if self.max_degree is None else self.max_degree
        return max(1, math.ceil(min(needed, shown, most)))

    def _correlate(self, z: Tensor, axis: int, lead_time: np.ndarray) -> Tensor:
        """Correlate the white coefficients of different lead times."""
        assert self.time_scale is not None
        hours = np.asarray(lead_time) / np.timedelta64(1, "h")
        if len(np.unique(hours)) != len(hours):
            raise InputError("lead times occur more than once; leave time_scale out")
        apart = np.abs(hours[:, None] - hours) / self.time_scale
        root = torch.from_numpy(np.linalg.cholesky(np.exp(-apart))).to(z)
        return torch.tensordot(root, z, ([1], [axis])).movedim(0, axis)

    def _get_generator(self) -> torch.Generator:
        if self.generator is None:
            self.generator = torch.Generator()
            saved = self.checkpoint.generator_state
            if self.checkpoint.checkpoint_state_loaded and saved is not None:
                self.generator.set_state(saved.cpu())
            elif self.seed is not None:
                self.generator.manual_seed(self.seed)
            else:
                self.generator.seed()
        return self.generator

    def _keep(self, before: Tensor, after: Tensor) -> None:
        """Keep the state of the generator for a restart, as Earth2Studio's perturbations do.

        A restarted ensemble member (level 1) draws the same perturbation again, a resumed rollout
        (level 2) the next one.
        """
        if self.checkpoint.checkpoint_enabled:
            state = {1: before, 2: after}.get(self.checkpoint.checkpoint_level)
            self.checkpoint.generator_state = (
                None if state is None else state.to(self.checkpoint.device).clone()
            )


class _HarmonicsAt(SphericalBasis):
    """Harmonics up to a degree at the points of any latitude-longitude grid, for synthesis only.

    Args:
        lat: ``(H,)`` degrees north, in any order.
        lon: ``(W,)`` degrees east.
        lmax: Largest degree, which the grid need not resolve.
    """

    def __init__(self, lat: np.ndarray, lon: np.ndarray, lmax: int) -> None:
        self._lon, self._degree = lon, lmax
        super().__init__((len(lat), len(lon)), lmax, lat)

    def _full_band(self, shape: tuple[int, int]) -> int:
        return self._degree

    def _columns(self, width: int) -> np.ndarray:
        angle = np.deg2rad(self._lon)[:, None] * self._order()
        cosine = np.arange(2 * self.lmax + 1) % 2 == 1
        values = math.sqrt(2) * np.where(cosine, np.cos(angle), np.sin(angle))
        values[:, 0] = 1.0
        return values

    def mean_square(self) -> Float[Tensor, " K"]:
        """Ones, as on the whole sphere, so that the variance is the same on every region."""
        return torch.ones_like(self.eigenvalues)

    def resolves(self, shape: Sequence[int]) -> bool:
        """False: on a part of the sphere the functions are not linearly independent."""
        return False
