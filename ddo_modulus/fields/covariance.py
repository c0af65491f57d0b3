# SPDX-License-Identifier: Apache-2.0
r"""Covariances from small samples of inhomogeneous fields.

Axes: ``N`` samples, ``T`` hours of the day, ``H W`` grid, ``P = H W`` points.

A month of hourly fields holds some thirty independent states: their sample covariance is rank
deficient and full of spurious long-range correlations. It is shrunk twice, towards locality by a
taper (Schur product) and towards a parametric model fitted to itself,

.. math:: K = (1 - \alpha)\, S \circ \rho(d / \ell) + \alpha\, Q, \qquad
    Q \propto \sum_l (a_l + b_l f_i f_j)\, e^{-d_{ij} / l},

where :math:`f` says how continental a point is (its daily cycle), so that land and sea have
correlations of their own. The idea is hybrid covariances (Hamill & Snyder 2000, Mon. Wea. Rev. 128,
2905).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid


@dataclass(frozen=True)
class HybridCovariance:
    r"""How to shrink a sample covariance.

    Attributes:
        taper_km: Length :math:`\ell` of the taper, a Matérn-3/2 correlation.
        weight: Share :math:`\alpha` of the parametric model, 0 to 1.
        scales_km: Lengths ``l`` of the exponentials on offer; a non-negative fit picks.
        saturation: Amplitude of the daily cycle (in the units of the fields) from which on a point
            counts as wholly continental.
        fit_km: Pairs count by ``exp(-d / fit_km)`` in the fit.
        pairs: Random pairs of points that the model is fitted to.
    """

    taper_km: float = 700.0
    weight: float = 0.35
    scales_km: tuple[float, ...] = (100.0, 200.0, 400.0, 800.0, 1600.0, 4000.0)
    saturation: float = 3.0
    fit_km: float = 1000.0
    pairs: int = 40_000

    def __post_init__(self) -> None:
        lengths = np.array([self.taper_km, self.fit_km, self.saturation, *self.scales_km], float)
        if not (0 <= self.weight <= 1 and np.isfinite(lengths).all() and (lengths > 0).all()):
            raise InputError("a hybrid covariance needs a weight in 0..1 and positive lengths")

    def estimate(
        self, anomalies: np.ndarray, daily_amplitude: np.ndarray, grid: LatLonGrid
    ) -> np.ndarray:
        """Covariance of the anomalies.

        Args:
            anomalies: ``(N, H, W)``, differences from the mean of the hour.
            daily_amplitude: ``(H, W)`` amplitude of the first harmonic of the daily cycle.
            grid: Where they stand.

        Returns:
            ``(P, P)``, positive definite, float64.
        """
        x = anomalies.reshape(len(anomalies), -1).astype(np.float64)
        sample = x.T @ x / len(x)
        distance = distances_km(grid)
        scaled = np.sqrt(3) * distance / self.taper_km
        local = sample * (1 + scaled) * np.exp(-scaled)
        continental = np.clip(daily_amplitude.reshape(-1) / self.saturation, 0, 1)
        model = self._model(sample, distance, continental)
        mixed = (1 - self.weight) * local + self.weight * model
        return (mixed + mixed.T) / 2

    def _model(
        self, sample: np.ndarray, distance: np.ndarray, continental: np.ndarray
    ) -> np.ndarray:
        """Parametric correlation fitted to the sample, with the sample's variances."""
        points = len(sample)
        random = np.random.default_rng(0)
        i, j = random.integers(0, points, (2, self.pairs))
        j[: self.pairs // 10] = i[: self.pairs // 10]  # variances take part in the fit
        near = np.exp(-distance[i, j] / self.fit_km)
        decays = [np.exp(-distance[i, j] / scale) for scale in self.scales_km]
        both = continental[i] * continental[j]
        design = np.stack([*decays, *(both * decay for decay in decays)], 1)
        shares, _ = nnls(design * near[:, None], sample[i, j] * near)
        model = np.zeros_like(sample)
        products = np.outer(continental, continental)
        for k, scale in enumerate(self.scales_km):
            common, land = shares[k], shares[k + len(self.scales_km)]
            if common or land:
                model += np.exp(-distance / scale) * (common + land * products)
        factor = np.sqrt(sample.diagonal() / model.diagonal())
        return model * factor[:, None] * factor


def distances_km(grid: LatLonGrid) -> np.ndarray:
    """Great-circle distances between all grid points, ``(P, P)``."""
    lat, lon = np.radians(np.meshgrid(grid.lat, grid.lon, indexing="ij")).reshape(2, -1)
    unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    chord = np.sqrt(np.maximum(((unit[:, None] - unit) ** 2).sum(-1), 0))
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.clip(chord / 2, 0, 1))
