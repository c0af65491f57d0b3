# SPDX-License-Identifier: Apache-2.0
"""Random numbers that follow from a key: the same on every machine, whatever was drawn before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What training draws random numbers for.

    It is the second part of each of its keys, after the seed. Keys of one purpose have one length,
    so that no two draws share their numbers.
    """

    ORDER = 1
    TRANSFORMATIONS = 2
    NOISE_LEVELS = 3
    NOISE = 4
    VALIDATION_ORDER = 5
    VALIDATION_LEVELS = 6
    VALIDATION_NOISE = 7
    FIGURE = 8


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator whose numbers follow from a key, by NumPy's ``SeedSequence``.

    Args:
        key: Numbers from 0 up: a seed, a purpose, a step. Zeros at its end do not count: keys
            that must differ have the same length or differ before it.
        device: Where the numbers are drawn. A CPU and a GPU draw different ones for a key.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
