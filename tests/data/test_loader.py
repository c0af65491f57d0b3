# SPDX-License-Identifier: Apache-2.0
from itertools import islice

import pytest
import torch
from tensors import generator

from ddo_modulus.data.loader import BatchOptions, Order, Symmetry, TensorLoader, move
from ddo_modulus.errors import InputError
from ddo_modulus.simulators import KolmogorovFlow


def loader_of(fields, condition=None, frames=None, **options):
    return TensorLoader(fields, BatchOptions(**options), condition, frames)


def numbered(count):
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_every_sample_comes_once_in_an_epoch():
    loader = loader_of(numbered(10), numbered(10)[:, 0, 0, :1], batch=4, seed=1)
    batches = list(islice(loader.batches(), 10))
    drawn = torch.cat([x[:, 0, 0, 0] for x, _ in batches])
    for epoch in drawn.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])
    assert all(torch.equal(x[:, 0, 0, 0], condition[:, 0]) for x, condition in batches)


def test_ranks_share_the_batch():
    def rank(rank, ranks):
        loader = loader_of(numbered(10), batch=6, rank=rank, ranks=ranks)
        return [x for x, _ in islice(loader.batches(), 5)]

    for whole, *parts in zip(rank(0, 1), rank(0, 3), rank(1, 3), rank(2, 3), strict=True):
        assert torch.equal(whole, torch.stack(parts, 1).flatten(0, 1))


def test_a_later_start_skips_batches():
    x = torch.randn(9, 1, 8, 8, generator=generator())
    loader = loader_of(x, batch=4, symmetry=Symmetry((1, 1), True, 2))
    whole = [x for x, _ in islice(loader.batches(), 8)]
    for start in (1, 3, 7):
        later = next(loader_of(x, batch=4, symmetry=Symmetry((1, 1), True, 2)).batches(start))[0]
        assert torch.equal(later, whole[start])


def test_what_is_random_does_not_depend_on_the_number_of_ranks():
    def rank(rank, ranks):
        symmetry = Symmetry((1, 1), True, 2)
        order = Order(BatchOptions(6, 0, symmetry, (4, 3), rank, ranks), 10, (8, 8))
        return [order(step) for step in (0, 1, 7)]

    for whole, *parts in zip(rank(0, 1), rank(0, 2), rank(1, 2), strict=True):
        for name in ("samples", "corners", "moves"):
            for place, part in enumerate(parts):
                assert torch.equal(getattr(whole, name)[place::2], getattr(part, name))


def test_crops_lie_inside_and_everywhere():
    x = torch.arange(40.0).view(1, 1, 5, 8)
    loader = loader_of(x, batch=64, crop=(4, 6))
    crops, _ = next(loader.batches())
    corners = crops[:, 0, 0, 0].long()
    assert set(corners.tolist()) == {row * 8 + column for row in (0, 1) for column in (0, 1, 2)}
    steps = crops - crops[:, :, :1, :1]
    assert torch.equal(steps, x[:, :, :4, :6].expand(64, -1, -1, -1))


def test_moves_are_what_they_say():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    for moved, expected in (
        ([1, 1, 1, 2, 1], torch.roll(x, (-1, -2), (2, 3))),
        ([-1, -1, -1, -1, 1], x.flip(2, 3)),
        ([1, 2, -1, -1, -1], -torch.roll(x, -2, 2).flip(3)),
    ):
        assert torch.equal(move(x, torch.tensor([moved])), expected)


def test_batches_larger_than_the_data():
    x, _ = next(loader_of(numbered(3), batch=7).batches())
    drawn = x[:, 0, 0, 0]
    assert sorted(drawn[:3].tolist()) == sorted(drawn[3:6].tolist()) == [0.0, 1.0, 2.0]


def test_mistakes_in_the_loader():
    with pytest.raises(InputError, match="a batch of 5 cannot be shared out to 2 ranks"):
        loader_of(numbered(10), batch=5, ranks=2)
    with pytest.raises(InputError, match="no samples"):
        loader_of(numbered(0), batch=5)
    with pytest.raises(InputError, match=r"data.crop=\[3, 2\] does not fit into the grid of 2x2"):
        loader_of(numbered(4), batch=2, crop=(3, 2))


@pytest.mark.parametrize(
    "symmetry",
    [
        Symmetry(roll=(8, 1)),
        Symmetry(rotate=True),
        Symmetry(glide=4),
        Symmetry(roll=(8, 1), rotate=True, glide=4),
    ],
    ids=["roll", "rotate", "glide", "all"],
)
def test_kolmogorov_flow_commutes_with_its_symmetries(symmetry):
    """16 rows and two waves of the force: a period is 8 rows."""
    flow = KolmogorovFlow(
        reynolds=50.0, forcing_wavenumber=2, resolution=16, output_resolution=16, dt=0.02
    )
    w = flow.initial(6, generator=generator(), dtype=torch.float64)
    later = flow.advance(w, 0.4)
    moved = symmetry(w[:, None], generator(3))[:, 0]
    assert not torch.allclose(moved, w)
    expected = symmetry(later[:, None], generator(3))[:, 0]
    torch.testing.assert_close(flow.advance(moved, 0.4), expected, rtol=1e-9, atol=1e-9)


def test_the_force_breaks_other_shifts():
    flow = KolmogorovFlow(
        reynolds=50.0, forcing_wavenumber=2, resolution=16, output_resolution=16, dt=0.02
    )
    w = flow.initial(2, generator=generator(), dtype=torch.float64)
    shifted = flow.advance(torch.roll(w, 3, 1), 0.4)
    assert not torch.allclose(shifted, torch.roll(flow.advance(w, 0.4), 3, 1), atol=1e-2)


def test_a_window_has_the_frames_in_order_and_one_move_for_all():
    x = torch.randn(12, 2, 8, 8, generator=generator())
    frames = torch.arange(10)[:, None] + torch.arange(3)
    plain = loader_of(x, frames=frames, batch=5, seed=2)
    moved = loader_of(x, frames=frames, batch=5, seed=2, symmetry=Symmetry((1, 1), True, 2))
    draw = moved.order(4)
    found, _ = next(plain.batches(4))
    turned, _ = next(moved.batches(4))
    for number, sample, other, one in zip(draw.samples, found, turned, draw.moves, strict=True):
        expected = x[int(number) : int(number) + 3]
        assert torch.equal(sample.unflatten(0, (3, 2)), expected)
        assert torch.equal(other.unflatten(0, (3, 2)), move(expected, one.expand(3, -1)))
