# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.errors import InputError

CHANNELS = ("t2m", "msl")


def daily(n=480, noise=0.5, every=1, shape=(3, 4)):
    """Samples `every` so many hours, with a daily cycle of amplitude 5 that differs by point."""
    generator = torch.Generator().manual_seed(0)
    hours = torch.arange(0, n * every, every) % 24
    cycle = 5 * torch.cos(2 * torch.pi * hours / 24)[:, None, None, None]
    point = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    level = torch.tensor([280.0, 101325.0])[:, None, None]
    x = level + cycle + point + noise * torch.randn(n, 2, *shape, generator=generator)
    return x, hours


@pytest.mark.parametrize("per_hour", [False, True])
@pytest.mark.parametrize("per_point", [False, True])
def test_fitted_samples_have_zero_mean_and_unit_variance(per_hour, per_point):
    x, hours = daily()
    norm = Normalization.fit(CHANNELS, x, hours, per_hour=per_hour, per_point=per_point)
    assert norm.mean.shape == (24 if per_hour else 1, 2, *((3, 4) if per_point else (1, 1)))
    z = norm.normalize(x, hours).double()
    over = (0,) if per_point else (0, 2, 3)
    # Pressure of 1e5 Pa in float32 has a resolution of 8e-3 Pa; the noise has a std of 0.5 Pa.
    torch.testing.assert_close(z.mean(over), torch.zeros_like(z.mean(over)), atol=1e-2, rtol=0)
    std = z.std(over, correction=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-2, rtol=0)


def test_denormalize_inverts_normalize():
    x, hours = daily()
    norm = Normalization.fit(CHANNELS, x, hours, per_hour=True, per_point=True)
    back = norm.denormalize(norm.normalize(x, hours), hours)
    torch.testing.assert_close(back, x, rtol=2e-7, atol=0)


def test_each_sample_gets_the_statistics_of_its_own_hour():
    mean = torch.arange(24.0).reshape(24, 1, 1, 1)
    norm = Normalization(("t2m",), mean, torch.full_like(mean, 2.0))
    x = norm.denormalize(torch.ones(3, 1, 2, 2), torch.tensor([0, 7, 23]))
    assert x[:, 0, 0, 0].tolist() == [2.0, 9.0, 25.0]


def test_half_precision_input_is_denormalized_in_full():
    norm = Normalization(
        ("msl",), torch.full((1, 1, 1, 1), 101325.0), torch.full((1, 1, 1, 1), 1.0)
    )
    assert norm.denormalize(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).unique() == 101325.0


def test_harmonics_recover_a_smooth_cycle_better_than_raw_hours():
    x, hours = daily(n=240, noise=4.0)
    truth = 5 * torch.cos(2 * torch.pi * torch.arange(24) / 24)

    def error(harmonics):
        norm = Normalization.fit(
            CHANNELS[:1],
            x[:, :1],
            hours,
            per_hour=True,
            per_point=True,
            harmonics=harmonics,
        )
        cycle = norm.mean[:, 0] - norm.mean[:, 0].mean(0)
        return (cycle - truth[:, None, None]).square().mean().sqrt().item()

    assert error(1) < 0.5 * error(None)


def test_harmonics_fill_in_hours_without_samples():
    x, hours = daily(n=400, noise=0.1, every=6)
    norm = Normalization.fit(CHANNELS, x, hours, per_hour=True, harmonics=1)
    truth = 5 * torch.cos(2 * torch.pi * torch.arange(24) / 24)
    cycle = norm.mean[:, 0, 0, 0] - norm.mean[:, 0, 0, 0].mean()
    torch.testing.assert_close(cycle, truth, atol=0.1, rtol=0)


def test_floor_bounds_a_near_constant_point():
    x = torch.randn(100, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0.0
    norm = Normalization.fit(("t2m",), x, per_point=True, floor=0.1)
    expected = 0.1 * x.double().std(correction=0).float()
    torch.testing.assert_close(norm.std[0, 0, 0, 0], expected)


def test_save_and_load_are_exact_and_need_no_pickle(tmp_path):
    x, hours = daily()
    norm = Normalization.fit(CHANNELS, x, hours, per_hour=True, per_point=True)
    norm.save(tmp_path / "statistics.npz")
    loaded = Normalization.load(tmp_path / "statistics.npz")
    assert loaded.channels == CHANNELS
    assert torch.equal(loaded.mean, norm.mean)
    assert torch.equal(loaded.std, norm.std)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_runs_no_code_from_the_file(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, channels=np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(InputError, match="evil.npz: cannot be read"):
        Normalization.load(path)
    assert not (tmp_path / "sprung").exists()


def test_load_names_a_damaged_or_missing_file(tmp_path):
    path = tmp_path / "n.npz"
    with pytest.raises(InputError, match="n.npz"):
        Normalization.load(path)
    x, hours = daily()
    Normalization.fit(CHANNELS, x, hours).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="copy or fit it again"):
        Normalization.load(path)


def one(value):
    return torch.full((1, 1, 1, 1), value)


@pytest.mark.parametrize(
    ("channels", "mean", "std", "message"),
    [
        (("t2m",), torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1), "1 or 24"),
        (CHANNELS, one(0.0), one(1.0), "1 channels; expected 2"),
        (("t2m",), one(float("nan")), one(1.0), "mean is not finite for t2m"),
        (("t2m",), one(0.0), one(0.0), "std is not positive for t2m"),
        (("t2m",), torch.zeros(1, 1, 2, 2), one(1.0), "give both the same"),
    ],
)
def test_constructor_refuses(channels, mean, std, message):
    with pytest.raises(InputError, match=message):
        Normalization(channels, mean, std)


def test_normalize_refuses_what_does_not_fit():
    x, hours = daily()
    norm = Normalization.fit(CHANNELS, x, hours, per_hour=True, per_point=True)
    with pytest.raises(InputError, match="no hours"):
        norm.normalize(x)
    with pytest.raises(InputError, match="for a batch of 480"):
        norm.normalize(x, hours[:3])
    with pytest.raises(InputError, match="from 24 to 47"):
        norm.normalize(x, hours + 24)
    with pytest.raises(InputError, match="on the grid of the statistics"):
        norm.normalize(x[..., :2], hours)
    with pytest.raises(InputError, match="t2m, msl"):
        norm.normalize(x[:, :1], hours)


def test_fit_refuses_unusable_samples():
    x, hours = daily()
    with pytest.raises(InputError, match="needs hours"):
        Normalization.fit(CHANNELS, x, per_hour=True)
    with pytest.raises(InputError, match="per_hour=True"):
        Normalization.fit(CHANNELS, x, hours, harmonics=2)
    with pytest.raises(InputError, match="harmonics is 12"):
        Normalization.fit(CHANNELS, x, hours, per_hour=True, harmonics=12)
    with pytest.raises(InputError, match="at least one sample"):
        Normalization.fit(CHANNELS, x[:0])
    with pytest.raises(InputError, match="msl is constant"):
        Normalization.fit(CHANNELS, torch.stack((x[:, 0], torch.full_like(x[:, 0], 1e5)), 1))
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="t2m is not finite"):
        Normalization.fit(CHANNELS, x)


def test_fit_refuses_hours_that_do_not_determine_the_cycle():
    x, hours = daily(every=6)
    with pytest.raises(InputError, match=r"0, 6, 12, 18 UTC.*each hour of its own"):
        Normalization.fit(CHANNELS, x, hours, per_hour=True)
    with pytest.raises(InputError, match="harmonics=2"):
        Normalization.fit(CHANNELS, x, hours, per_hour=True, harmonics=2)
    with pytest.raises(InputError, match="0, 1, 2 UTC"):  # enough in number, but all at night
        Normalization.fit(CHANNELS, x, torch.arange(480) % 3, per_hour=True, harmonics=1)
