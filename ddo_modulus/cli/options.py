# SPDX-License-Identifier: Apache-2.0
"""Values of a configuration, with their types checked."""

from __future__ import annotations

from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from ddo_modulus.checks import FLAG, Real, Whole
from ddo_modulus.errors import InputError


def integer(config: DictConfig, key: str, least: int = 1) -> int:
    """An integer of a configuration.

    Raises:
        InputError: If it is no integer, or below ``least``.
    """
    value = OmegaConf.select(config, key)
    Whole(least).check(key, value)
    return cast(int, value)


def number(config: DictConfig, key: str) -> float:
    """A number of a configuration.

    Raises:
        InputError: If it is no finite number.
    """
    value = OmegaConf.select(config, key)
    Real().check(key, value)
    return float(value)


def optional_number(config: DictConfig, key: str) -> Any:  # noqa: ANN401 - None where it is null
    """A number of a configuration, or None.

    Raises:
        InputError: If it is something else.
    """
    return None if OmegaConf.select(config, key) is None else number(config, key)


def flag(config: DictConfig, key: str) -> bool:
    """A truth value of a configuration.

    Raises:
        InputError: If it is neither.
    """
    value = OmegaConf.select(config, key)
    FLAG.check(key, value)
    return cast(bool, value)


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def pick_device(name: str) -> torch.device:
    """A device by name; ``"auto"`` is a GPU if there is one.

    Raises:
        InputError: If this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used here; choose auto, cpu or cuda") from error
    return device


def unwrapped(value: object) -> Any:  # noqa: ANN401 - checked by the schema
    """A value of a configuration as a plain dictionary, list or scalar."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
