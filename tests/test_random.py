# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch

from ddo_modulus.inference.assimilate import member_generator
from ddo_modulus.random import Purpose, generator


def test_a_key_gives_the_same_numbers_whatever_was_drawn_before():
    first = torch.rand(5, generator=generator(3, Purpose.NOISE, 7))
    torch.manual_seed(1)
    generator(4)
    assert torch.equal(first, torch.rand(5, generator=generator(3, Purpose.NOISE, 7)))


def test_other_keys_give_other_numbers():
    keys = [(seed, purpose, step) for seed in (0, 1) for purpose in Purpose for step in range(20)]
    keys += [(seed, purpose, step, 1) for seed, purpose, step in keys]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)


def test_the_numbers_of_a_member_are_those_of_earlier_versions():
    """Analyses of a seed are reproduced by the packages and versions of other people."""
    time = np.datetime64("2019-03-27T12:00", "ns")
    state = np.random.SeedSequence([5, int(time.astype("int64")), 3]).generate_state(1, np.uint64)
    assert member_generator(5, time, 3).initial_seed() == int(state[0])
    drawn = torch.randn(2, generator=member_generator(5, time, 3))
    torch.testing.assert_close(drawn, torch.tensor([0.30374709, -0.03399565]), rtol=0, atol=1e-6)
