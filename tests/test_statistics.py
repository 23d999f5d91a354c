"""Statistics of arrays against worked examples, slow twins and simulation."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from minifuse.evaluation.statistics import (
    ALL_ALIKE,
    NO_ITEM,
    ONE_ITEM,
    agreement,
    bootstrap_p,
    calibration,
    count_flips,
    detectable_difference,
    detectable_mean,
    detectable_share,
    holm,
    intervals,
    mcnemar,
    paired,
    resample_means,
    share_of_distance,
)

# ---- Bootstrap


def take(rng: np.random.Generator, size: int, num_resamples: int) -> list[np.ndarray]:
    return [rng.integers(0, size, size=size) for _ in range(num_resamples)]


def slow_resample(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """One resample, one column, one item, one draw at a time."""
    num_items, num_draws, num_columns = values.shape
    items = take(np.random.default_rng(seed), num_items, num_resamples)
    draws = take(np.random.default_rng([seed, 1]), num_draws, num_resamples)
    found = []
    for taken_items, taken_draws in zip(items, draws, strict=True):
        row = []
        for column in range(num_columns):
            cells = [values[item, draw, column] for item in taken_items for draw in taken_draws]
            there = [cell for cell in cells if not np.isnan(cell)]
            row.append(math.fsum(there) / len(there) if there else math.nan)
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize("num_draws", [1, 2, 5])
def test_resampling_against_a_loop(monkeypatch, num_draws):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(7, num_draws, 4))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[1:, :, 3] = values[:, 1:, 3] = np.nan  # many resamples have none of it
    values[0, 0, 3] = 1.5
    expected = slow_resample(values, 50, seed=3)
    assert np.isnan(expected[:, 3]).any()
    assert not np.isnan(expected[:, 3]).all()
    np.testing.assert_allclose(resample_means(values, num_resamples=50, seed=3), expected, 1e-12)
    # In blocks the same.
    monkeypatch.setattr("minifuse.evaluation.statistics._BLOCK_LEN", 20)
    np.testing.assert_allclose(resample_means(values, num_resamples=50, seed=3), expected, 1e-12)
    other = resample_means(values, num_resamples=50, seed=4)
    assert not np.allclose(other, expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(1000, 1, 1), (2, 30, 30)])
def test_resampling_takes_the_memory_of_a_few_blocks(monkeypatch, shape):
    """All at once, a thousand items or 900 cells of an item would take 1.4 MB."""
    monkeypatch.setattr("minifuse.evaluation.statistics._BLOCK_LEN", 4000)
    tracemalloc.start()
    try:
        means = resample_means(np.zeros(shape), num_resamples=200)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < means.nbytes + 8 * 8 * 4000


def test_one_draw_is_the_plain_bootstrap():
    """As it was before there were draws, to the last number."""
    values = np.random.default_rng(5).normal(size=(11, 3))
    rng = np.random.default_rng(8)
    expected = [values[rng.integers(0, 11, size=11)].mean(axis=0) for _ in range(40)]
    found = resample_means(values[:, None], num_resamples=40, seed=8)
    np.testing.assert_allclose(found, expected, 1e-12)


@pytest.mark.parametrize(("sd_of_items", "sd_of_draws"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_both_ways_of_varying_are_seen(sd_of_items, sd_of_draws):
    """Values that are an item's part and a draw's part: the variance of the mean is their sum.

    Of resampled means it is the variance over the given items / I plus that over draws / D; of
    20,000 the estimate has a relative sd of sqrt(2 / 20,000) = 0.01.
    """
    rng = np.random.default_rng(0)
    of_items, of_draws = rng.normal(0, sd_of_items, 40), rng.normal(0, sd_of_draws, 6)
    values = (of_items[:, None] + of_draws)[..., None]
    found = resample_means(values, num_resamples=20_000, seed=1)[:, 0].var()
    wanted = of_items.var() / 40 + of_draws.var() / 6
    assert found == pytest.approx(wanted, rel=0.04)


def test_intervals_are_percentiles_of_the_resampled_means():
    values = np.random.default_rng(2).normal(size=(9, 3, 2))
    values[3, :, 1] = values[4, 0, 1] = np.nan
    expected = slow_resample(values, 200, seed=4)
    for column, found in enumerate(intervals(values, num_resamples=200, seed=4)):
        assert found["mean"] == pytest.approx(np.nanmean(values[..., column]))
        assert found["low"] == pytest.approx(np.percentile(expected[:, column], 2.5))
        assert found["high"] == pytest.approx(np.percentile(expected[:, column], 97.5))
        assert found["num_items"] == 9 - column
        assert "note" not in found


def test_resamples_without_a_cell_are_left_out_of_the_interval():
    """Two of six items are there: of 200 resamples some take neither."""
    values = np.full((6, 1, 2), np.nan)
    values[:2, 0, 0], values[:, 0, 1] = (1.0, 3.0), range(6)
    expected = slow_resample(values, 200, seed=0)
    assert np.isnan(expected[:, 0]).any()
    found, whole = intervals(values, num_resamples=200)
    assert [found["low"], found["high"]] == [1.0, 3.0]
    ends = np.percentile(expected[:, 1], [2.5, 97.5])
    assert [whole["low"], whole["high"]] == pytest.approx(ends)


def test_without_a_seed_the_numbers_are_the_same_every_time():
    """Those of seed 0, which the reports leave out."""
    rng = np.random.default_rng(0)
    first, second, third = rng.normal(size=(3, 8, 2))
    best = np.abs(third) + first
    assert (resample_means(first[..., None]) == resample_means(first[..., None], seed=0)).all()
    assert intervals(first[..., None]) == intervals(first[..., None], seed=0)
    pair = first[..., None], second[..., None], [False]
    assert paired(*pair) == paired(*pair, seed=0) != paired(*pair, seed=1)
    found = share_of_distance(second, first, best)
    assert found == share_of_distance(second, first, best, seed=0)


@pytest.mark.filterwarnings("error")
def test_where_no_interval_can_be_had():
    nan = math.nan
    values = np.array([[1.0, nan, nan, 0.0, 1.0], [0.5, 2.0, nan, 0.0, nan]])[:, None]
    plain, one, none, alike, single = intervals(values, num_resamples=100)
    assert plain["low"] == 0.5
    assert plain["high"] == 1.0
    for found, mean in ((one, 2.0), (single, 1.0)):
        wanted = {"mean": mean, "low": None, "high": None, "num_items": 1, "note": ONE_ITEM}
        assert found == wanted
    assert none == {"mean": None, "low": None, "high": None, "num_items": 0, "note": NO_ITEM}
    assert alike == {"mean": 0.0, "low": 0.0, "high": 0.0, "num_items": 2, "note": ALL_ALIKE}
    assert intervals(values[:1])[0]["note"] == ONE_ITEM
    assert intervals(values[:0])[0]["note"] == NO_ITEM
    # Several draws of one item are still one item.
    [found] = intervals(np.array([[[1.0], [0.0]], [[nan], [nan]]]), num_resamples=100)
    assert found == {"mean": 0.5, "low": None, "high": None, "num_items": 1, "note": ONE_ITEM}


def test_intervals_cover_the_truth():
    """300 samples of 150 items: the share that covers has a standard deviation of 0.0126.

    Allowed are 4 of those, and 0.01 for the percentile method's known want at this size.
    """
    rng = np.random.default_rng(0)
    truth = 0.35
    samples = (rng.random((150, 300)) < truth).astype(float)
    found = intervals(samples[:, None], num_resamples=1000, seed=1)
    covered = np.mean([entry["low"] <= truth <= entry["high"] for entry in found])
    sd = math.sqrt(0.95 * 0.05 / 300)
    assert 0.95 - 4 * sd - 0.01 < covered < 0.95 + 4 * sd


@pytest.mark.parametrize(
    ("num_draws", "sd_of_draws", "sd_of_cells", "wanted"),
    [
        (5, 0.0, 1.0, (0.95, 1.0)),
        (5, 0.05, 1.0, (0.95, 1.0)),  # as much of the mean's variance as the items have
        # Draws alone: 2 * t4(1.96 * sqrt(4 / 5)) - 1, with four df in place of the normal.
        (5, 1.0, 0.0, (0.845, 0.845)),
    ],
)
def test_two_way_intervals_cover_what_the_docstring_says(
    num_draws, sd_of_draws, sd_of_cells, wanted
):
    """400 runs of 200 items; allowed are 4 sd of the share that covers, and 0.02 for percentiles
    of few draws, which are no normal quantiles."""
    rng = np.random.default_rng(0)
    shape = (200, num_draws, 400)
    values = rng.normal(0, sd_of_draws, size=(1, *shape[1:])) + rng.normal(0, sd_of_cells, shape)
    values += rng.normal(0, 1 if sd_of_cells else 0, size=(200, 1, 400))
    found = intervals(values, num_resamples=500, seed=1)
    covered = np.mean([entry["low"] <= 0 <= entry["high"] for entry in found])
    low, high = wanted
    assert low - 4 * math.sqrt(low * (1 - low) / 400) - 0.02 < covered
    assert covered < high + 4 * math.sqrt(high * (1 - high) / 400) + 0.02


# ---- Tests between methods


@pytest.mark.parametrize(
    ("first_only", "second_only", "wanted"),
    [
        (0, 0, Fraction(1)),
        (3, 3, Fraction(1)),
        (0, 5, Fraction(2, 2**5)),
        (1, 9, Fraction(2 * (1 + 10), 2**10)),
        (2, 10, Fraction(2 * (1 + 12 + 66), 2**12)),
        # Agresti's approval ratings of a prime minister, asked twice: 150 changed to, 86 from.
        (150, 86, Fraction(2 * sum(math.comb(236, k) for k in range(87)), 2**236)),
    ],
)
def test_mcnemar_by_hand(first_only, second_only, wanted):
    assert mcnemar(first_only, second_only) == pytest.approx(float(wanted), rel=1e-9)
    assert mcnemar(second_only, first_only) == pytest.approx(float(wanted), rel=1e-9)


def test_holm_by_hand():
    """The worked example of many textbooks: four tests, of which two are found at 0.05."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_decides_as_the_step_down_procedure(p_values, alpha):
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[place] * (len(p_values) - rank) >= alpha:
            break
        rejected.add(place)
    assert {i for i, p in enumerate(holm(p_values)) if p < alpha} == rejected


def test_bootstrap_p_by_hand():
    # 3 of 99 below zero: 2 * (1 + 3) / 100.
    assert bootstrap_p(np.array([-1.0] * 3 + [1.0] * 96)) == pytest.approx(0.08)
    assert bootstrap_p(np.array([1.0] * 99)) == pytest.approx(0.02)
    assert bootstrap_p(np.array([-1.0] * 99)) == pytest.approx(0.02)
    assert bootstrap_p(np.zeros(99)) == 1.0
    # Zero up to rounding lies on both sides: 30 of 99 are not below.
    assert bootstrap_p(np.array([1e-17] * 15 + [-1e-17] * 15 + [-1.0] * 69)) == 0.62
    assert bootstrap_p(np.array([math.nan] + [1.0] * 99)) == pytest.approx(0.02)
    assert bootstrap_p(np.array([math.nan])) == 1.0


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_bootstrap_p_knows_no_unit(unit):
    """What rounding is depends on how large the differences are."""
    values = np.array([1e-17] * 15 + [-1e-17] * 15 + [1e-9] * 3 + [-1.0] * 66)
    assert bootstrap_p(values * unit) == bootstrap_p(-values * unit) == pytest.approx(0.68)


def test_bootstrap_p_agrees_with_the_t_test():
    """500 differences are close to normal; with 20,000 resamples p has a sd below 0.004."""
    rng = np.random.default_rng(0)
    for shift in (0.02, 0.05, 0.09):
        values = rng.normal(size=(500, 1, 1))
        values += shift - values.mean()
        found = bootstrap_p(resample_means(values, num_resamples=20_000, seed=1)[:, 0])
        wanted = scipy.stats.ttest_1samp(values.ravel(), 0).pvalue
        assert found == pytest.approx(wanted, abs=4 * 0.004 + 0.005)


@given(st.floats(0.001, 1), st.integers(4, 100_000))
def test_detectable_share_solves_its_equation(discordance, num_items):
    found = detectable_share(discordance, num_items)
    z_alpha, z_power = scipy.stats.norm.ppf([0.975, 0.8])
    left = max(0.0, discordance - found**2)
    needed = (z_alpha * math.sqrt(discordance) + z_power * math.sqrt(left)) ** 2 / found**2
    assert needed == pytest.approx(num_items, rel=1e-6)


def test_detectable_differences_are_found_in_four_of_five_runs():
    rng = np.random.default_rng(0)
    num_items, discordance, num_runs = 350, 0.15, 20_000
    share = detectable_share(discordance, num_items)
    # What the field reports for this n: 5.8 points.
    assert share == pytest.approx(0.058, abs=0.001)
    up, down = (discordance + share) / 2, (discordance - share) / 2
    counts = rng.multinomial(num_items, [up, down, 1 - up - down], size=num_runs)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])
    # The share of found ones has a sd of 0.003; the approximation is good to a hundredth.
    assert np.mean(np.abs(z) > scipy.stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.022)

    difference = detectable_mean(2.0, num_items)
    means = rng.normal(difference, 2.0 / math.sqrt(num_items), size=num_runs)
    z = means / (2.0 / math.sqrt(num_items))
    assert np.mean(np.abs(z) > scipy.stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.012)


def test_where_nothing_can_be_detected():
    assert detectable_share(0.0, 100) is None
    assert detectable_share(0.9, 2) is None
    assert detectable_share(1.0, 3) is None
    assert 0 < detectable_share(1.0, 4) < 1
    assert detectable_mean(0.0, 100) is None
    assert detectable_mean(1.0, 1) is None
    assert detectable_mean(1.0, 2) == pytest.approx(detectable_difference(math.sqrt(1 / 2)))
    assert detectable_mean(math.nan, 5) is None
    assert detectable_difference(0.0) is None
    assert detectable_difference(math.nan) is None


# ---- Paired


def test_pairs_of_several_draws_by_hand():
    nan = math.nan
    first = np.array([[1, 1, 0], [0, 1, 1], [1, 0, nan], [1, 1, 1]])[..., None]
    second = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, nan, 0]])[..., None]
    [found] = paired(first, second, [True], num_resamples=300, seed=2)
    # Both are there in 10 of 12 cells; +1 in five of them, -1 in one.
    assert found["num_items"] == 4
    assert found["difference"] == pytest.approx((4 + 1 - 1) / 10)
    assert found["first_mean"] == pytest.approx(7 / 10)
    assert found["second_mean"] == pytest.approx(3 / 10)
    assert found["by_draw"] == pytest.approx([1 / 4, 1 / 3, 2 / 3])
    assert (found["first_only"], found["second_only"]) == (5, 1)
    resampled = slow_resample(first - second, 300, seed=2)[:, 0]
    assert found["low"] == pytest.approx(np.nanpercentile(resampled, 2.5))
    assert found["high"] == pytest.approx(np.nanpercentile(resampled, 97.5))
    # McNemar's test knows no draws.
    assert found["p_mcnemar"] is None
    assert found["test"] == "paired bootstrap"
    assert found["p_value"] == found["p_bootstrap"] == bootstrap_p(resampled)
    z_alpha, z_power = scipy.stats.norm.ppf([0.975, 0.8])
    wanted = (z_alpha + z_power) * np.nanstd(resampled, ddof=1)
    assert found["detectable"] == pytest.approx(wanted)


def test_pairs_of_one_draw_are_tested_by_their_kind():
    first, second = np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 1, 0])
    columns = (np.stack([side, side], axis=-1)[:, None] for side in (first, second))
    binary, other = paired(*columns, [True, False], num_resamples=100)
    assert binary["p_value"] == mcnemar(2, 1)
    assert binary["detectable"] == detectable_share(3 / 4, 4)
    assert other["p_mcnemar"] is other["first_only"] is None
    assert other["p_value"] == other["p_bootstrap"] == binary["p_bootstrap"]
    assert other["detectable"] == detectable_mean((first - second).std(ddof=1), 4)
    assert binary["by_draw"] == other["by_draw"] == [0.25]


NOTHING = dict.fromkeys(("low", "high", "p_bootstrap", "p_mcnemar", "p_value", "detectable"))
NOTHING |= {"first_only": None, "second_only": None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_draws", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_pairs_of_one_item_and_of_none(num_rows, num_draws):
    """With rows of other columns beside them or not; two items are the first with an interval."""
    first, second = np.full((2, num_rows, num_draws, 4), np.nan)
    differences = [1.0, 0.0][:num_draws]
    first[0, :, 0] = first[0, :, 1] = differences
    second[0, :, :2] = 0.0
    binary, other, *none = paired(first, second, [True, False] * 2, num_resamples=50)
    one = {"num_items": 1, "by_draw": differences, "note": ONE_ITEM}
    one |= {"first_mean": 1 / num_draws, "second_mean": 0, "difference": 1 / num_draws}
    of_draws = NOTHING | {"test": "paired bootstrap"}
    of_items = NOTHING | {"test": "McNemar, exact"} if num_draws == 1 else of_draws
    assert other == of_draws | one
    counts = {"first_only": 1, "second_only": 0}
    tested = {"p_mcnemar": 1.0, "p_value": 1.0} if num_draws == 1 else {}
    assert binary == of_items | one | counts | tested
    empty = dict.fromkeys(("first_mean", "second_mean", "difference"))
    empty |= {"num_items": 0, "note": NO_ITEM, "by_draw": [None] * num_draws}
    assert none == [of_items | empty | {"first_only": 0, "second_only": 0}, of_draws | empty]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_draws", [1, 2])
def test_pairs_of_two_items(num_draws):
    first, second = np.zeros((2, 2, num_draws, 1))
    first[:, 0, 0] = (1.0, 3.0)
    [found] = paired(first, second, [False], num_resamples=100, seed=1)
    resampled = slow_resample(first, 100, seed=1)[:, 0]
    assert found["p_value"] == found["p_bootstrap"] == bootstrap_p(resampled)
    assert found["low"] == np.percentile(resampled, 2.5)
    error = resampled.std(ddof=1) if num_draws > 1 else 1.0  # sd sqrt(2), of two
    assert found["detectable"] == pytest.approx(detectable_difference(error))
    assert "note" not in found


def test_differences_that_do_not_vary_say_nothing_of_what_could_be_shown():
    """0.3 - 0.2 is not 0.1; resampled means differ by rounding."""
    first, second = np.full((5, 3, 1), 0.3), np.full((5, 3, 1), 0.2)
    [found] = paired(first, second, [False], num_resamples=100)
    assert found["detectable"] is None
    assert found["note"] == ALL_ALIKE


def test_draws_of_opposite_signs_widen_the_interval():
    """Within every draw the items agree; the draws do not."""
    items = np.random.default_rng(0).normal(0, 0.1, size=(50, 1))
    alike, apart = (
        (items + np.array(by_draw))[..., None] for by_draw in ([0.3] * 5, [-0.7, 1.3, 0, 0.6, 0.3])
    )
    zero = np.zeros_like(alike)
    [calm], [torn] = (paired(values, zero, [False]) for values in (alike, apart))
    assert calm["difference"] == pytest.approx(torn["difference"])
    assert calm["low"] > 0
    assert torn["low"] < 0 < torn["high"]
    assert torn["detectable"] > 5 * calm["detectable"]


# ---- Shares of a distance


def test_shares_of_a_distance_by_hand():
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(6, 2))
    best = reference + rng.uniform(0.5, 1, size=(6, 2))
    values = reference + rng.normal(0.2, 0.1, size=(6, 2))
    values[2, 1] = best[4, 0] = math.nan
    there = np.ones((6, 2), dtype=bool)
    there[2, 1] = there[4, 0] = False
    found = share_of_distance(values, reference, best, num_resamples=200, seed=1)
    gain, distance = (values - reference)[there].mean(), (best - reference)[there].mean()
    assert found["share"] == pytest.approx(gain / distance)
    gains = np.stack([np.where(there, x - reference, math.nan) for x in (values, best)], axis=-1)
    resampled = slow_resample(gains, 200, seed=1)
    wanted = np.percentile(resampled[:, 0] / resampled[:, 1], [2.5, 97.5])
    assert [found["low"], found["high"]] == pytest.approx(wanted)
    assert share_of_distance(best, reference, best)["share"] == 1.0
    assert share_of_distance(reference, reference, best)["share"] == 0.0


def test_where_there_is_no_distance():
    zero, one = np.zeros((4, 1)), np.ones((4, 1))
    assert share_of_distance(one, zero, zero) is None
    assert share_of_distance(one, one, zero) is None
    assert share_of_distance(one[:0], zero[:0], one[:0]) is None
    alone = {"share": 1.0, "low": None, "high": None}
    assert share_of_distance(one[:1], zero[:1], one[:1]) == alone
    # One item in four carries all of the distance: a resample without it has none.
    best = np.array([[1.0], [0], [0], [0]])
    assert share_of_distance(one, zero, best, num_resamples=200) == alone | {"share": 4.0}


def test_a_share_has_an_interval_from_two_items_on():
    """However many others lack a cell, and none where the others lack it."""
    nan = math.nan
    zero, values, best = np.zeros((4, 1)), np.full((4, 1), 0.5), np.ones((4, 1))
    assert share_of_distance(values[:2], zero[:2], best[:2]) == dict.fromkeys(
        ("share", "low", "high"), 0.5
    )
    one = np.array([[0.5], [nan], [nan], [nan]])
    assert share_of_distance(one, zero, best) == {"share": 0.5, "low": None, "high": None}


# ---- Calibration, agreement, flips


def test_calibration_by_hand():
    confidence = [0.0, 0.05, 0.1, 0.3, 0.25, 0.95, 1.0, 1.0]
    is_right = [0, 0, 1, 1, 0, 1, 1, 0]
    found = calibration(confidence, is_right)
    counts = {entry["low"]: entry["count"] for entry in found["bins"] if entry["count"]}
    assert counts == {0.0: 3, 0.2: 2, 0.9: 3}
    first = found["bins"][0]
    assert first["accuracy"] == pytest.approx(1 / 3)
    assert first["confidence"] == pytest.approx(0.05)
    empty = {"low": 0.1, "high": 0.2, "count": 0, "confidence": None, "accuracy": None}
    assert found["bins"][1] == empty
    assert [entry["high"] for entry in found["bins"]] == [i / 10 for i in range(1, 11)]
    gaps = (abs(0.05 - 1 / 3), abs(0.275 - 1 / 2), abs(2.95 / 3 - 2 / 3))
    assert found["ece"] == pytest.approx((3 * gaps[0] + 2 * gaps[1] + 3 * gaps[2]) / 8)
    assert calibration([], [])["ece"] is None
    # Rounding up of what is certain.
    assert calibration([1.0, 1 + 1e-7], [1, 1])["bins"][-1]["count"] == 2
    assert len(calibration([0.5], [1], num_bins=4)["bins"]) == 4


@pytest.mark.parametrize(
    ("predictions", "wanted"),
    [
        (["Paris", "paris.", "Rome"], 1 / 3),
        (["Paris", "the Paris"], 1),
        (["", "", "..."], 0),
        (["Paris", "", "Paris"], 1 / 3),
        (["Paris"], None),
        ([], None),
    ],
)
def test_agreement_by_hand(predictions, wanted):
    assert agreement(predictions) == (None if wanted is None else pytest.approx(wanted))


def test_flips_by_hand():
    nan = math.nan
    before = np.array([1, 1, 0, 0, 0, 1, nan])
    after = np.array([1, 0, 1, 1, 0, nan, 1])
    assert count_flips(before, after) == {"right_to_wrong": 1, "wrong_to_right": 2, "num_cells": 5}
    # Counts are whole numbers, in JSON too.
    assert all(type(number) is int for number in count_flips(before, after).values())
    # Shares: of the four prompts of an item one is right.
    found = count_flips(np.array([0.25, 0.5]), np.array([1.0, 0.0]))
    assert found == {"right_to_wrong": 0.5, "wrong_to_right": 0.75, "num_cells": 2}
    assert count_flips(before.reshape(7, 1), after.reshape(7, 1))["num_cells"] == 5
