# SPDX-License-Identifier: Apache-2.0
"""Sets of fields compared: nothing found where there is nothing, and what differs where it does."""

import math

import pytest
import torch
from tensors import autoregressive, generator

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.verification import compare
from ddo_modulus.verification.resampling import resample, resample_in_order

GRID = BoxGrid((16, 16))
PHI = 0.8


def draws(count, seed, size=16):
    field = GaussianField(FourierBasis((16, 16), modes=(15, 15)), Matern(0.2, 1.0))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 1, field.basis.size, generator=generator)
    return field.basis.synthesize(field.root(z) * z, (size, size))[:, 0]


def sequences(runs, frames, seed):
    """AR(1) in time."""
    return autoregressive(draws(runs * frames, seed).view(runs, frames, 16, 16), PHI)


def test_resamplings_have_the_sizes_of_both_sets():
    pairs = resample((6, 5), (20, 3), 8, generator())
    assert pairs.samples.shape == pairs.truth.shape == (8, 30)
    for weights in (pairs.samples, pairs.truth):
        torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))
    counts = pairs.samples * 60  # twenty stretches of three frames
    torch.testing.assert_close(counts, counts.round())
    whole = pairs.truth.view(8, 6, 5)
    assert torch.equal(whole.amin(2), whole.amax(2))  # trajectories stay whole
    torch.testing.assert_close(whole[..., 0] * 30, (whole[..., 0] * 30).round())


def test_variance_of_resampled_means_is_that_of_fresh_sets():
    """The point of it all: resamplings of one set vary as new sets of that size would."""
    x = torch.randn(400, 1, generator=generator(1)).double()
    pairs = resample((400, 1), (100, 1), 2000, generator())
    assert float((pairs.samples @ x).var()) == pytest.approx(1 / 100, rel=0.2)
    assert float((pairs.truth @ x).var()) == pytest.approx(1 / 400, rel=0.2)
    runs = x[:40].repeat_interleave(10, 0)  # forty trajectories of ten equal frames
    pairs = resample((40, 10), (100, 1), 2000, generator())
    assert float((pairs.truth @ runs).var()) == pytest.approx(float(x[:40].var()) / 40, rel=0.2)


def test_one_long_record_is_resampled_in_blocks():
    x = torch.zeros(1000, 1).double()
    noise = torch.randn(1000, generator=generator(1)).double()
    for t in range(1, 1000):
        x[t] = 0.9 * x[t - 1] + math.sqrt(1 - 0.81) * noise[t]
    pairs = resample((1, 1000), (100, 1), 2000, generator())
    exact = 1.9 / 0.1 / 1000  # of the mean of an AR(1) record, to the first order
    assert float((pairs.truth @ x).var()) > 0.4 * exact
    assert float((pairs.samples @ x).var()) == pytest.approx(float(x.var()) / 100, rel=0.2)


def test_frames_in_order_have_no_favourite():
    frames = torch.arange(12.0).view(3, 4)
    drawn = resample_in_order(frames, (5, 10), 200, generator())
    assert drawn.shape == (200, 5, 10)
    steps = drawn[..., 1:4] - drawn[..., :3]
    assert set(steps.flatten().tolist()) == {1.0, -3.0}  # a trajectory, turned
    torch.testing.assert_close(drawn.mean((0, 1)), torch.full((10,), 5.5), rtol=0, atol=0.4)


def test_the_same_law_is_as_near_as_the_truth_to_itself():
    """Over several draws the distances are those of resamplings; few exceed the 95 % quantile."""
    ratios, above = {}, 0
    truth = draws(300, 0)
    for seed in range(1, 6):
        found = compare(draws(150, seed), truth, GRID, resamples=40)
        for quantity in found.quantities:
            ratios.setdefault(quantity.name, []).append(quantity.ratio)
            above += quantity.distance > quantity.own_high
    for name, values in ratios.items():
        if name != "mean":  # the fields have none
            assert 0.3 < sorted(values)[2] < 2.2, name
    assert above <= 0.2 * 5 * len(ratios)


def test_what_differs_is_found_and_what_does_not_is_not():
    truth = draws(300, 0)
    louder = compare(1.2 * draws(300, 1), truth, GRID, resamples=40)
    assert louder["log-spectrum distance"].distance == pytest.approx(2 * math.log(1.2), rel=0.1)
    assert louder["structure function S4"].distance == pytest.approx(4 * math.log(1.2), rel=0.15)
    expected = 0.2 * math.sqrt(2 / math.pi) * louder["standard deviation"].truth
    assert louder["Wasserstein-1 distance"].distance == pytest.approx(expected, rel=0.15)
    # 0.44 times the root-mean-square correlation.
    assert 0.1 < louder["spatial autocovariance"].distance < 0.44
    for name in ("log-spectrum distance", "standard deviation", "quantile 99 %", "F2ID"):
        assert louder[name].distance > 1.5 * louder[name].own_high, name
    assert louder["skewness"].distance < 2 * louder["skewness"].own_high

    cubed = draws(300, 1)
    cubed = cubed + 0.2 * (cubed.square() - 1)
    skewed = compare(cubed, truth, GRID, resamples=40)
    assert skewed["skewness"].samples == pytest.approx(
        (6 * 0.2 + 8 * 0.2**3) / (1 + 2 * 0.2**2) ** 1.5, abs=0.1
    )
    assert skewed["skewness"].distance > 5 * skewed["skewness"].own_high
    # For equal laws the curve is in the band of nine in ten, mostly.
    same = compare(draws(300, 2), truth, GRID, resamples=40).curves["spectrum"]
    inside = (same.samples >= same.low) & (same.samples <= same.high)
    assert float(inside.double().mean()) > 0.6


def test_trajectories_and_their_seams():
    truth = sequences(24, 20, 0)
    same = compare(sequences(12, 30, 1), truth, GRID, resamples=40)
    assert same["time-difference energy"].truth == pytest.approx(
        2 * (1 - PHI) * same["standard deviation"].truth ** 2, rel=0.1
    )
    for name in ("temporal autocovariance", "time-difference energy"):
        assert same[name].distance < 2 * same[name].own_high, name
    seam = "seam: largest |frame/mean - 1|"
    assert same[seam].distance < 1.5 * same[seam].own_high

    windows = torch.cat([sequences(12, 15, 2), sequences(12, 15, 3)], 1)
    jump = compare(windows, truth, GRID, resamples=40)
    assert jump[seam].distance > 5 * jump[seam].own_high
    curve = jump.curves["seam"]
    assert int(curve.samples.argmax()) == 14
    assert bool(curve.samples[14] > curve.high[14])

    white = compare(draws(360, 4).view(12, 30, 16, 16), truth, GRID, resamples=40)
    expected = math.sqrt((PHI ** (2 * torch.arange(1, 11)).double()).sum() / 11)
    assert white["temporal autocovariance"].distance == pytest.approx(expected, rel=0.15)
    unordered = compare(white_fields(), truth, GRID, resamples=2)
    assert "seam" not in unordered.curves


def white_fields():
    return draws(60, 5)


def test_a_finer_grid_is_the_same_law():
    """Functions on 32 x 32 points, and the same on 16 x 16, against others on 16 x 16."""
    truth = draws(200, 0)
    coarse, fine = draws(100, 1), draws(100, 1, size=32)
    one = compare(coarse, truth, GRID, resamples=10)
    other = compare(fine, truth, GRID, resamples=10)
    for a, b in zip(one.quantities, other.quantities, strict=True):
        assert b.distance == pytest.approx(a.distance, rel=1e-3, abs=1e-5), a.name
        assert b.own_median == pytest.approx(a.own_median, rel=1e-6), a.name
    swapped = compare(truth, fine, BoxGrid((32, 32)), resamples=10)
    assert swapped["log-spectrum distance"].distance == pytest.approx(
        one["log-spectrum distance"].distance, rel=1e-3
    )


def test_mistakes():
    x = draws(4, 0)
    with pytest.raises(InputError, match="samples of shape .* must be finite"):
        compare(torch.where(x > 0, x, math.nan), x, GRID)
    with pytest.raises(InputError, match="need an axis of frames"):
        compare(x, x, GRID, trajectories=True)
    with pytest.raises(InputError, match="two frames or more"):
        compare(x[:, None], x[:, None], GRID)
