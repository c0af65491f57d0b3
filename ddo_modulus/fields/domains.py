# SPDX-License-Identifier: Apache-2.0
"""Domains by the names that configurations give them."""

from __future__ import annotations

from collections.abc import Sequence

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, CosineBasis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis

#: Domains that :func:`build_basis` builds.
DOMAINS = ("torus", "box", "sphere")


def build_basis(domain: str, shape: Sequence[int], lengths: Sequence[float] = (1.0, 1.0)) -> Basis:
    """Full-band basis of a domain named as configurations name it.

    Raises:
        InputError: On an unknown domain.
    """
    if domain == "sphere":
        return SphericalBasis(shape)
    if domain == "torus":
        return FourierBasis(shape, lengths)
    if domain == "box":
        return CosineBasis(shape, lengths)
    raise InputError(f"unknown domain {domain!r}; choose 'torus', 'box' or 'sphere'")
