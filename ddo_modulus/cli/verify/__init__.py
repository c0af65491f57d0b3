# SPDX-License-Identifier: Apache-2.0
"""``ddo verify``: analyses against the truth, or generated fields against true ones."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from ddo_modulus.cli.verify import analyses, samples
from ddo_modulus.errors import InputError

_ONLY = {
    "analysis": ("observations", "columns", "quality.accept", "trajectory"),
    "samples": ("trajectories", "largest_wavenumber", "octaves"),
}


def run(config: DictConfig) -> None:
    """Score what ``analysis=`` or ``samples=`` names; keys in ``conf/verify.yaml``.

    Raises:
        InputError: If not exactly one of them is given, with keys that belong to it, or if it
            does not fit the truth.
    """
    chosen = [key for key in _ONLY if config[key] is not None]
    if len(chosen) != 1:
        raise InputError(
            "verify needs either analysis=... (ensembles at given times) or samples=... (generated "
            "fields)" + (", not both" if chosen else "")
        )
    for other, keys in _ONLY.items():
        wrong = [key for key in keys if OmegaConf.select(config, key) is not None]
        if other != chosen[0] and wrong:
            raise InputError(f"{wrong[0]}= goes with {other}=, not with {chosen[0]}=")
    for key in ("columns", "quality.accept"):
        if OmegaConf.select(config, key) is not None and config.observations is None:
            raise InputError(f"{key}= goes with observations=; give the table that was assimilated")
    (analyses if chosen[0] == "analysis" else samples).run(config)
