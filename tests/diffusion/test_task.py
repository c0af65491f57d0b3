# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis


@pytest.mark.parametrize("factor", [2, 4])
def test_a_view_is_the_mean_over_blocks(factor):
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    blocks = x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))
    torch.testing.assert_close(CoarseWindow(factor).view(x), blocks)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.3, 4])
def test_a_view_keeps_the_mean_and_a_linear_ramp(factor):
    window, n = CoarseWindow(factor), 12
    ramp = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(1, 1, n, n)
    seen = window.view(ramp)
    few = seen.shape[-1]
    centre = (torch.arange(few, dtype=torch.float64) + 0.5) / few
    torch.testing.assert_close(seen[0, 0, 0].mean(), ramp.mean())
    if factor in (1.0, 4, 1.5):  # whole or half points in a cell: no error but for the cut points
        torch.testing.assert_close(seen[0, 0, 0], centre, atol=0.02, rtol=0)


@pytest.mark.parametrize("basis", [FourierBasis((16, 24)), CosineBasis((16, 24))])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_view_on_the_grid_is_not_shifted(basis, factor):
    """Large waves come back in phase, damped by the mean over a cell, twice."""
    window = CoarseWindow(factor)
    c = torch.zeros(2, basis.size, dtype=torch.float64)
    low = basis.eigenvalues.argsort()[1:3]
    c[torch.arange(2), low] = 1.0
    x = basis.synthesize(c)[:, None]
    back = window.on_grid(window.view(x), basis)
    found = basis.analyze(back)[:, 0]
    assert float(found[torch.arange(2), low].min()) > 0.8
    found[torch.arange(2), low] = 0
    assert float(found.abs().max()) < 1e-9


def test_it_is_the_middle_that_is_drawn_given_all():
    task = Task(2, "coarse", CoarseWindow(2, 1))
    x = torch.randn(3, task.span * 2, 8, 8)
    state, condition = task.split(x, None, FourierBasis((8, 8)))
    assert task.span == 4 and task.channels(2) == 8
    assert torch.equal(state, x[:, 2:6])
    assert condition.shape == (3, 8, 8, 8)
    torch.testing.assert_close(condition.mean((2, 3)), x.mean((2, 3)))
    plain = Task()
    assert plain.split(x, None, FourierBasis((8, 8)))[0] is x and plain.channels(5) == 0


def test_the_hour_is_a_circle():
    times = np.array(["2020-01-01T00", "2020-01-01T06", "2021-05-01T12"], "datetime64[h]")
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(Task(condition="hour_of_day").at(times), expected, atol=1e-6, rtol=0)
    assert Task().at(times) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CoarseWindow(0.5), "from 1 up"),
        (lambda: CoarseWindow(float("nan")), "from 1 up"),
        (lambda: CoarseWindow(2, -1), "from 0 up"),
        (lambda: CoarseWindow(8).shape((8, 8)), "choose a smaller one"),
        (lambda: Task(0), "frames=0"),
        (lambda: Task(1, "weekday"), "unknown condition"),
        (lambda: Task(1, "coarse"), "belongs to condition=coarse"),
        (lambda: Task(1, "none", CoarseWindow(2)), "belongs to condition=coarse"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
