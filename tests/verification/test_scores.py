# SPDX-License-Identifier: Apache-2.0
"""Scores against closed forms, brute force and the properties that define them."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import generator, randn

from ddo_modulus.errors import InputError
from ddo_modulus.verification import (
    average,
    fair_crps,
    gaussian_crps,
    markdown_table,
    rank_histogram,
    rich_table,
    rmse,
    score,
    spread,
    spread_skill_ratio,
)


def test_fair_crps_equals_the_double_loop() -> None:
    """The sorted form is the mean over pairs."""
    ensemble, truth = randn(7, 2, 3, 4), randn(2, 3, 4, seed=1)
    expected = (ensemble - truth).abs().mean(0)
    for i in range(7):
        for j in range(7):
            expected = expected - (ensemble[i] - ensemble[j]).abs() / (2 * 7 * 6)
    torch.testing.assert_close(fair_crps(ensemble, truth), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_fair_crps_is_physicsnemos() -> None:
    """An independent implementation gives the same, and missing values stay where they are."""
    from physicsnemo.metrics.general.crps import kcrps

    ensemble, truth = randn(9, 2, 3, 4), randn(2, 3, 4, seed=1)
    torch.testing.assert_close(fair_crps(ensemble, truth), kcrps(ensemble, truth, biased=False))
    ensemble[4, 1, 2, 3] = truth[0, 0, 0] = math.nan
    missing = torch.zeros(2, 3, 4, dtype=torch.bool)
    missing[1, 2, 3] = missing[0, 0, 0] = True
    assert torch.equal(fair_crps(ensemble, truth).isnan(), missing)


def test_fair_crps_does_not_depend_on_the_number_of_members() -> None:
    """The expected score of 2 and of 32 members is that of the distribution itself."""
    truth = randn(200, 200, seed=1)
    exact = 1.0 / math.sqrt(math.pi)  # of N(0, 1) against itself
    for members in (2, 3, 32):
        crps = average(fair_crps(randn(members, 200, 200), truth))
        assert float(crps) == pytest.approx(exact, abs=0.012)


def test_gaussian_crps_is_the_limit_of_a_large_ensemble() -> None:
    """Closed form against a hundred thousand members."""
    truth = torch.tensor([[-2.0, 0.3, 4.0]], dtype=torch.float64)
    ensemble = 0.5 + 1.7 * randn(100_000, 1, 1).expand(-1, 1, 3)
    mean, std = torch.tensor(0.5).double(), torch.tensor(1.7).double()
    torch.testing.assert_close(
        gaussian_crps(mean, std, truth), fair_crps(ensemble, truth), rtol=0.02, atol=0.0
    )


def test_gaussian_crps_without_spread_is_the_absolute_error() -> None:
    """A certain analysis is scored by its distance."""
    result = gaussian_crps(torch.tensor(1.0), torch.tensor(0.0), torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(result, torch.tensor([2.0, 0.5]))


def test_scores_keep_their_precision_far_from_zero() -> None:
    """A temperature of 280 K in single precision costs the scores nothing."""
    ensemble, truth = 0.1 * randn(8, 16, 16), 0.1 * randn(16, 16, seed=1)
    exact = average(fair_crps(ensemble.float() + 280.0, truth.float() + 280.0))
    assert float(exact) == pytest.approx(float(average(fair_crps(ensemble, truth))), rel=1e-3)
    warm = float(spread(ensemble.float() + 280.0))
    assert warm == pytest.approx(float(spread(ensemble)), rel=1e-3)


@pytest.mark.parametrize("members", [2, 5, 50])
def test_spread_skill_ratio_is_one_for_a_calibrated_ensemble(members: int) -> None:
    """The correction removes the dependence on the ensemble's size."""
    ratio = spread_skill_ratio(randn(members, 200, 200), randn(200, 200, seed=1))
    assert float(ratio) == pytest.approx(1.0, abs=0.02)


def test_rmse_and_spread_by_hand() -> None:
    """Two members at 0 and 2, truth at 4: error 3, variance 2."""
    ensemble = torch.tensor([0.0, 2.0])[:, None, None].expand(2, 3, 4)
    truth = torch.full((3, 4), 4.0)
    assert float(rmse(ensemble, truth)) == pytest.approx(3.0)
    assert float(spread(ensemble)) == pytest.approx(math.sqrt(2.0))


def test_weights_and_mask_choose_what_counts() -> None:
    """Weights multiply, excluded points do not matter even when they hold NaN."""
    x = torch.tensor([[1.0, 2.0], [5.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    assert float(average(x, mask=mask)) == pytest.approx(8.0 / 3.0)
    weights = torch.tensor([[3.0], [1.0]])
    assert float(average(x, mask=mask, weights=weights)) == pytest.approx(14.0 / 7.0)
    ensemble = randn(4, 3, 5, 6)
    truth = randn(3, 5, 6, seed=1)
    mask = randn(5, 6, seed=2) > 0
    holed = torch.where(mask, truth, math.nan)
    for metric in (rmse, spread_skill_ratio):
        torch.testing.assert_close(
            metric(ensemble, holed, mask=mask), metric(ensemble, truth, mask=mask)
        )


def test_rank_histogram_is_flat_only_if_calibrated() -> None:
    """Independent points: a plausible p-value if calibrated, a bowl if over-confident."""
    truth = randn(100, 100, seed=1)
    calibrated = rank_histogram(randn(9, 100, 100), truth, generator=generator())
    assert calibrated.counts.shape == (10,)
    assert int(calibrated.counts.sum()) == 10_000
    assert calibrated.p_value > 0.01
    narrow = rank_histogram(0.7 * randn(9, 100, 100), truth, generator=generator())
    assert narrow.p_value < 1e-6
    assert narrow.counts[0] > 1.3 * narrow.counts[5]
    assert narrow.counts[-1] > 1.3 * narrow.counts[5]


def test_rank_histogram_p_values_are_uniform() -> None:
    """Over many calibrated ensembles a tenth of the p-values lies below a tenth."""
    p = [
        rank_histogram(
            randn(4, 10, 20, seed=2 * i), randn(10, 20, seed=2 * i + 1), generator=generator(i)
        ).p_value
        for i in range(400)
    ]
    assert sum(value < 0.1 for value in p) / len(p) == pytest.approx(0.1, abs=0.05)
    assert sum(value < 0.5 for value in p) / len(p) == pytest.approx(0.5, abs=0.08)


def test_rank_histogram_breaks_ties_at_random() -> None:
    """Constant members and truth (rain: mostly zero) fill all ranks evenly."""
    histogram = rank_histogram(
        torch.zeros(3, 100, 100), torch.zeros(100, 100), generator=generator()
    )
    assert histogram.p_value > 0.01


def test_rank_histogram_draws_points_that_count() -> None:
    """Drawn points are inside the mask, as many a field as asked for."""
    truth = torch.zeros(5, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2, 3:6] = True
    truth[:, mask] = 1.0
    ensemble = torch.full((4, 5, 8, 8), 0.5)
    one = rank_histogram(ensemble, truth, generator=generator(), mask=mask, points_per_field=1)
    assert one.counts.tolist() == [0, 0, 0, 0, 5]
    many = rank_histogram(ensemble, truth, generator=generator(), mask=mask, points_per_field=50)
    assert many.counts.tolist() == [0, 0, 0, 0, 15]


def test_score_collects_the_scores_and_tables_show_them() -> None:
    """The row holds what the functions return; both tables print it."""
    ensemble, truth = randn(4, 3, 5, 6), randn(3, 5, 6, seed=1)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[0] = False
    row = score(ensemble, truth, label="prior", units="K", mask=mask)
    assert row.points == 3 * 24
    assert row.rmse == pytest.approx(float(rmse(ensemble, truth, mask=mask)))
    assert row.ratio == pytest.approx(float(spread_skill_ratio(ensemble, truth, mask=mask)))
    lines = markdown_table([row, row]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "| prior | K " in lines[2]
    assert rich_table([row]).row_count == 1


def test_what_does_not_fit_is_an_error() -> None:
    """Shapes, sizes and empty masks are named."""
    ensemble, truth = randn(1, 5, 6), randn(5, 6, seed=1)
    with pytest.raises(InputError, match="do not fit"):
        rmse(ensemble, truth[:4])
    with pytest.raises(InputError, match="needs 2"):
        fair_crps(ensemble, truth)
    with pytest.raises(InputError, match="members first"):
        spread(truth)
    with pytest.raises(InputError, match="no point is left"):
        rmse(ensemble, truth, mask=torch.zeros(5, 6, dtype=torch.bool))
    with pytest.raises(InputError, match="weights of shape"):
        rmse(ensemble, truth, weights=torch.ones(6, 5))
    with pytest.raises(InputError, match="no point is left"):
        rank_histogram(ensemble, truth, generator=generator(), mask=torch.tensor(False))
    with pytest.raises(InputError, match="not finite"):
        rank_histogram(ensemble, truth * math.nan, generator=generator())
    with pytest.raises(InputError, match="points_per_field=0"):
        rank_histogram(ensemble, truth, generator=generator(), points_per_field=0)
