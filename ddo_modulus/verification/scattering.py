# SPDX-License-Identifier: Apache-2.0
r"""Functional F2ID: a Fréchet distance between laws of functions.

The Fréchet inception distance compares images by Gaussians fitted to features of a network that
was trained on photographs of one size. For functions the features have to be functionals, the same
on every grid (Rahman et al., "Generative Adversarial Neural Operators", arXiv 2205.03017, and Lim
et al., arXiv 2302.07400, take those of a trained neural operator). Here they are those of a
scattering transform (Mallat, Commun. Pure Appl. Math. 65, 2012), which needs no training: fixed,
the same for every user, and different for distributions that share their spectrum.

**Features.** Band-passes :math:`\psi_j`, an octave each, act on the coefficients in the domain's
basis by their Laplacian wavenumber :math:`k` alone,

.. math::
    \hat\psi_j(k) = \cos\bigl(\tfrac\pi2 \log_2 (k / k_j)\bigr), \quad |\log_2 (k / k_j)| < 1,
    \qquad k_j = 2^j k_1,

with :math:`k_1` the domain's smallest wavenumber; :math:`\sum_j \hat\psi_j^2 = 1` inside the band.
With :math:`u_j = \psi_j x` and the domain's mean :math:`\langle\cdot\rangle` a field gives

.. math::
    \langle x \rangle, \quad \langle u_j^2 \rangle^{1/2}, \quad \langle |u_j| \rangle, \quad
    \frac{\langle u_j |u_j| \rangle}{\langle u_j^2 \rangle^{1/2}}, \quad
    \langle (\psi_l |u_j|)^2 \rangle^{1/2} \ (l < j):

mean, energy, sparsity and asymmetry of every scale, and how the activity of one scale is organised
on a larger one. All are of degree one in ``x``. A phase-randomised field keeps the energies and
changes the rest.

**The same on every grid.** The coefficients are those of a truncated basis, and moduli are averaged
on grids of their own, four points to the shortest wave of a band: the input's grid enters nowhere
but in the analysis, which is exact for functions that it resolves.

**Distance.** Features are centred and whitened by the true fields' mean and covariance (of the
correlation's eigenvalues none is taken below `FLOOR`, no standard deviation below `SMALLEST` of the
largest feature), so that no unit and no scale counts more
than the truth's own variation of it; then

.. math::
    d^2 = |\mu_s - \mu_t|^2 + \mathrm{tr}\bigl(\Sigma_s + \Sigma_t
          - 2 (\Sigma_t^{1/2} \Sigma_s \Sigma_t^{1/2})^{1/2}\bigr).

1 is a shift of the mean feature by one standard deviation of single true fields along one
direction. It is biased: two finite sets of one law are a positive distance apart, growing as
:math:`1/n_s + 1/n_t`. Read it against the truth's own value at equal numbers
(:attr:`F2ID.own_median`).

Axes: ``N`` fields, ``H W`` grid, ``K`` coefficients, ``F`` features, ``R`` resamplings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, CosineBasis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.verification.resampling import Resampling, resample

#: Octaves from the domain's smallest wavenumber on; 64 points an axis resolve five.
OCTAVES = 5

#: Smallest eigenvalue of the features' correlation that whitening resolves.
FLOOR = 1e-2

#: Smallest standard deviation of a feature, as a fraction of the largest feature.
SMALLEST = 1e-3


class Scattering:
    """Scattering features of functions on a domain.

    Args:
        basis: Basis of the domain, of any grid.
        octaves: Number of band-passes.

    Raises:
        InputError: If there is no band-pass.

    Attributes:
        names: What each feature is, ``F`` of them.
    """

    def __init__(self, basis: Basis, octaves: int = OCTAVES) -> None:
        if octaves < 1:
            raise InputError(f"octaves={octaves} must be at least 1")
        self.octaves = octaves
        self._first = _first_wavenumber(basis)
        self._bands = [_band(basis, octave + 1) for octave in range(octaves)]
        self._bases = {basis.shape: basis}
        self.names = (
            "mean",
            *(f"{kind} {j}" for kind in ("energy", "modulus", "asymmetry") for j in range(octaves)),
            *(f"modulus {j} at {k}" for j in range(octaves) for k in range(j)),
        )

    def __call__(self, x: Float[Tensor, "N H W"]) -> Float[Tensor, "N F"]:
        """Features of fields on any grid of the domain that resolves the octaves, float64.

        Raises:
            InputError: If the grid does not.
        """
        coefficients = self._analyze(x)
        energy, modulus, asymmetry, organised = [], [], [], []
        for j, band in enumerate(self._bands):
            here, there = (i.to(x.device) for i in self._bands[-1].shared(band))
            part = coefficients.new_zeros(len(x), band.size)
            part[:, there] = coefficients[:, here]
            u = band.synthesize(part * self._filter(band, j).to(x.device))
            size, weights = u.abs(), band.weights().to(x.device)
            root = (u.square() * weights).sum((-2, -1)).sqrt()
            signed = (u * size * weights).sum((-2, -1))
            energy.append(root)
            modulus.append((size * weights).sum((-2, -1)))
            asymmetry.append(signed / torch.where(root > 0, root, 1.0))
            if j:
                envelope = self._bands[j - 1].analyze(size)
                for k in range(j):
                    larger = envelope * self._filter(self._bands[j - 1], k).to(x.device)
                    organised.append(larger.square().sum(-1).sqrt())
        constant = int((self._bands[-1].eigenvalues == 0).nonzero())
        columns = [coefficients[:, constant], *energy, *modulus, *asymmetry, *organised]
        return torch.stack(columns, 1)

    def _analyze(self, x: Tensor) -> Tensor:
        """Coefficients in the widest band."""
        shape, band = (x.shape[-2], x.shape[-1]), self._bands[-1]
        if shape not in self._bases:
            self._bases[shape] = next(iter(self._bases.values())).at(shape)
        check_octaves(self._bases[shape], self.octaves)
        here, there = self._bases[shape].shared(band)
        whole = self._bases[shape].analyze(x.double())
        coefficients = whole.new_zeros(len(x), band.size)
        coefficients[:, there.to(x.device)] = whole[:, here.to(x.device)]
        return coefficients

    def _filter(self, basis: Basis, octave: int) -> Float[Tensor, " K"]:
        wavenumber = basis.eigenvalues.sqrt() / self._first
        place = torch.log2(wavenumber.clamp_min(1e-9)) - octave
        return torch.where(place.abs() < 1, torch.cos(0.5 * torch.pi * place), 0.0)


def resolved_octaves(*bases: Basis, most: int = OCTAVES) -> int:
    """Octaves that all of these bases of a domain resolve, up to a number."""
    count = 0
    while count < most:
        band = _band(bases[0], count + 1)
        if any(len(basis.shared(band)[1]) < band.size for basis in bases):
            break
        count += 1
    return count


def check_octaves(basis: Basis, octaves: int) -> None:
    """Refuse features of scales that a grid does not have.

    Raises:
        InputError: If the basis does not resolve so many octaves.
    """
    resolved = resolved_octaves(basis, most=octaves)
    if resolved < octaves:
        height, width = basis.shape
        raise InputError(
            f"a {height}x{width} grid resolves {resolved} octaves, not octaves={octaves}"
        )


def _first_wavenumber(basis: Basis) -> float:
    return float(basis.eigenvalues[basis.eigenvalues > 0].min().sqrt())


def _band(basis: Basis, octaves: int) -> Basis:
    """Functions of the first octaves, on a grid with four points to the shortest wave.

    It depends on the domain alone, not on the grid of ``basis``. The filters vanish at the band's
    end, which therefore is not part of it.
    """
    end = _first_wavenumber(basis) * 2.0**octaves * (1 - 1e-9)
    if isinstance(basis, SphericalBasis):
        degree = int(math.sqrt(end**2 + 0.25) - 0.5)
        return SphericalBasis((2 * degree + 2, 4 * degree + 4), degree)
    assert isinstance(basis, FourierBasis | CosineBasis)
    waves = [int(end * length / math.pi) for length in basis.lengths]  # half waves
    periodic = isinstance(basis, FourierBasis)
    modes = [2 * (n // 2) + 1 if periodic else n + 1 for n in waves]
    return type(basis)([2 * n for n in modes], basis.lengths, modes)


# ---- distance ---------------------------------------------------------------------------------


class Whitening:
    """Coordinates in which the true fields' features have mean zero and unit covariance.

    Args:
        features: Of true fields.

    Raises:
        InputError: If there are fewer than two fields.
    """

    def __init__(self, features: Float[Tensor, "N F"]) -> None:
        if len(features) < 2:
            raise InputError("features of one field have no covariance; give more true fields")
        self.mean = features.mean(0)
        # A feature that hardly varies (the mean of a field that conserves it) has no scale of its
        # own to judge by, and its round-off would be one: it counts as varying by a least amount.
        smallest = SMALLEST * features.abs().amax().clamp_min(torch.finfo(features.dtype).tiny)
        scale = 1.0 / torch.maximum(features.std(0), smallest)
        correlation = scale[:, None] * features.T.cov() * scale
        correlation.fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(correlation)
        self.matrix = scale[:, None] * vectors / values.clamp_min(FLOOR).sqrt()

    def __call__(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        """Whitened features."""
        return (features - self.mean) @ self.matrix


def frechet_distance(
    one: Float[Tensor, "N F"],
    other: Float[Tensor, "M F"],
    weights: tuple[Float[Tensor, " N"], Float[Tensor, " M"]] | None = None,
) -> float:
    """Squared Fréchet (Wasserstein-2) distance of Gaussians fitted to two sets of features.

    Dowson and Landau, J. Multivar. Anal. 12, 1982, equation 16.

    Args:
        one: Features.
        other: Features.
        weights: Weights of the fields; equal ones if None.
    """
    moments = []
    for features, share in zip((one, other), weights or (None, None), strict=True):
        x = features.double()
        p = x.new_ones(len(x)) if share is None else share.to(x)
        p = p / p.sum()
        mean = p @ x
        centred = x - mean
        moments.append((mean, centred.T @ (p[:, None] * centred)))
    (mean, cov), (mean2, cov2) = moments
    values, vectors = torch.linalg.eigh(cov2)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(0).sqrt().sum()
    return float((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * cross)


@dataclass(frozen=True)
class F2ID:
    """Functional F2ID with the truth's own.

    Attributes:
        distance: Squared Fréchet distance of whitened features (see the module).
        own_median: Median distance of two resamplings of the truth, of equal numbers of fields.
        own_high: Their 95 % quantile.
        octaves: Band-passes used.
    """

    distance: float
    own_median: float
    own_high: float
    octaves: int

    @property
    def excess(self) -> float:
        """Distance less the truth's own: zero for samples of the truth's law, in the median."""
        return self.distance - self.own_median


def f2id(
    samples: Float[Tensor, "*N H W"],
    truth: Float[Tensor, "*M H2 W2"],
    basis: Basis,
    *,
    octaves: int | None = None,
    resamples: int = 100,
    seed: int = 0,
    batch: int = 64,
) -> F2ID:
    """Functional F2ID of generated fields, with its sampling floor.

    Args:
        samples: ``(N, H, W)`` fields or ``(N, T, H, W)`` trajectories, on any grid of the domain.
        truth: True ones likewise; whole trajectories are resampled.
        basis: Basis of the domain, of any grid.
        octaves: Band-passes; `OCTAVES`, or what the coarser grid resolves, if None.
        resamples: Pairs of resamplings of the truth.
        seed: Of the resamplings.
        batch: Fields at a time.

    Raises:
        InputError: If a grid does not resolve the octaves, or there is one true field.
    """
    sets = [x if x.ndim == 4 else x[:, None] for x in (samples, truth)]
    if octaves is None:
        octaves = resolved_octaves(*(basis.at((x.shape[-2], x.shape[-1])) for x in sets))
    scattering = Scattering(basis, octaves)

    def features(x: Tensor) -> Tensor:
        return torch.cat([scattering(part) for part in x.flatten(0, 1).split(batch)]).cpu()

    size, own = ((x.shape[0], x.shape[1]) for x in sets)
    pairs = resample(own, size, resamples, torch.Generator().manual_seed(seed))
    return f2id_of_features(features(sets[0]), features(sets[1]), pairs, octaves)


def f2id_of_features(
    samples: Float[Tensor, "N F"],
    truth: Float[Tensor, "M F"],
    pairs: Resampling,
    octaves: int,
) -> F2ID:
    """As `f2id`, from the features of all fields."""
    whiten = Whitening(truth)
    own, generated = whiten(truth), whiten(samples)
    floor = torch.tensor(
        [frechet_distance(own, own, pair) for pair in zip(pairs.samples, pairs.truth, strict=True)]
    )
    return F2ID(
        frechet_distance(generated, own),
        float(floor.median()),
        float(floor.quantile(0.95)),
        octaves,
    )
