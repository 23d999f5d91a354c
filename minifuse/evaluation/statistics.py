"""Statistics of arrays: intervals, paired tests, detectable differences, calibration, agreement.

A cell is what one question gave in one draw of shots. Questions and draws are both samples: every
interval resamples the questions and, where there are several, the draws.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minifuse.evaluation.extras import import_extra
from minifuse.normalize import normalize_answer

NUM_RESAMPLES = 10_000
NUM_BINS = 10
LEVEL = 0.95
POWER = 0.8

# Numbers in one block of resamples, 32 MB.
_BLOCK_LEN = 4_000_000
# Sums of the same numbers in another order differ by less, and count as equal.
_ROUNDING = 1e-12

NO_ITEM = "no item"
ONE_ITEM = "1 item; an interval needs at least 2"
ALL_ALIKE = "all items alike; resampling them shows no width"


# ---- Intervals


def resample_means(
    values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means of the columns over items and draws taken with replacement, the same for all columns.

    A cell counts as often as its item was taken, times as often as its draw was: the pigeonhole
    bootstrap (Owen, Annals of Applied Statistics 1 (2007) 386-411). It errs on the wide side, but
    for few draws that vary more than the items do: the draws' part is then short by a factor of
    sqrt((D - 1) / D), and of normal instead of t quantiles. With one draw it is the plain
    bootstrap over items.

    values:  f64[I, D, K]  a row for each question, a layer for each draw, NaN where one is missing
    returns: f64[R, K]     NaN where a resample has no cell that is there
    """
    num_items, num_draws, num_columns = values.shape
    is_there = ~np.isnan(values)
    sums = np.where(is_there, values, 0.0).reshape(num_items, -1)
    counts = is_there.astype(float).reshape(num_items, -1)
    # Two streams, so that the items taken do not depend on the number of draws.
    item_rng, draw_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    block_len = max(1, _BLOCK_LEN // max(num_items, num_draws * num_columns))
    means = np.empty((num_resamples, num_columns))
    for start in range(0, num_resamples, block_len):
        num_rows = min(block_len, num_resamples - start)
        item_times = _count_taken(item_rng, num_rows, num_items)
        draw_times = _count_taken(draw_rng, num_rows, num_draws)
        totals, numbers = (
            np.einsum(
                "rd,rdk->rk",
                draw_times,
                (item_times @ cells).reshape(num_rows, num_draws, num_columns),
            )
            for cells in (sums, counts)
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
            means[start : start + num_rows] = totals / numbers
    return means


def _count_taken(rng: np.random.Generator, num_rows: int, size: int) -> np.ndarray:
    """f64[num_rows, size]: how often each of `size` is taken when as many are, with replacement."""
    taken = rng.integers(0, size, size=(num_rows, size))
    taken += np.arange(num_rows)[:, None] * size
    return (
        np.bincount(taken.ravel(), minlength=num_rows * size).reshape(num_rows, size).astype(float)
    )


def intervals(
    values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean over cells and 95 % percentile bootstrap interval of every column.

    values:  f64[I, D, K]  NaN where a cell is missing
    returns: per column mean, low, high and num_items, with a `note` where an interval would
             mislead; low and high are None for fewer than two items
    """
    if len(values) < 2:
        return _entries(values, None)
    return _entries(values, resample_means(values, num_resamples=num_resamples, seed=seed))


def _entries(values: np.ndarray, resampled: np.ndarray | None) -> list[dict[str, Any]]:
    cells = values.reshape(-1, values.shape[-1])
    num_items = (~np.isnan(values)).any(axis=1).sum(axis=0)
    means = mean_of(cells)
    ends = None if resampled is None else _quantiles(resampled)
    found = []
    for column, count in enumerate(num_items):
        entry = {"mean": means[column], "low": None, "high": None, "num_items": int(count)}
        if ends is not None and count >= 2:
            entry |= {"low": ends[0, column], "high": ends[1, column]}
            if np.ptp(cells[~np.isnan(cells[:, column]), column]) == 0:
                entry["note"] = ALL_ALIKE
        else:
            entry["note"] = ONE_ITEM if count else NO_ITEM
        found.append(to_plain(entry))
    return found


def mean_of(values: np.ndarray) -> np.ndarray:
    """Means of the columns, leaving NaN out; NaN for a column of nothing else.

    values: f64[rows, ...]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN has the mean NaN
        return np.asarray(np.nanmean(values, axis=0))


def _quantiles(resampled: np.ndarray) -> np.ndarray:
    """f64[2, ...]: the ends of the percentile interval of each column of f64[R, ...]."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # as above
        return np.asarray(np.nanquantile(resampled, tails, axis=0))


def share_of_distance(
    values: np.ndarray,
    reference: np.ndarray,
    best: np.ndarray,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any] | None:
    """How much of the way from the mean of `reference` to that of `best` the mean of values goes.

    0 at the reference, 1 at the best, below 0 behind the reference. The interval is that of the
    ratio of resampled means.

    values, reference, best: f64[I, D]  cells that one of them lacks are left out
    returns: share, low, high; low and high are None for fewer than two items, or where a resample
             leaves no distance to go. None where there is none at all
    """
    gains = np.stack([values - reference, best - reference], axis=-1)
    gains[np.isnan(gains).any(axis=-1)] = np.nan
    gain, distance = mean_of(gains.reshape(-1, 2))
    if not distance > 0:
        return None
    found = {"share": gain / distance, "low": None, "high": None}
    if (~np.isnan(gains)).any(axis=(1, 2)).sum() > 1:
        resampled = resample_means(gains, num_resamples=num_resamples, seed=seed)
        resampled = resampled[~np.isnan(resampled).any(axis=1)]
        if (resampled[:, 1] > 0).all():
            low, high = _quantiles(resampled[:, 0] / resampled[:, 1])
            found |= {"low": low, "high": high}
    plain: dict[str, Any] = to_plain(found)
    return plain


# ---- Tests


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p that two methods are right equally often (McNemar 1947).

    Of the items on which they differ, each has half, binomially; no such item gives 1.

    first_only, second_only: items that one of them alone has right
    """
    discordant = first_only + second_only
    if discordant == 0:
        return 1.0
    stats = import_extra("scipy.stats")
    return float(stats.binomtest(first_only, discordant, 0.5).pvalue)


def bootstrap_p(resampled: np.ndarray) -> float:
    """Two-sided p that a difference is zero: where the percentile interval touches zero.

    Twice the smaller share of resampled differences on either side, zeros on both; with R
    resamples no p is below 2 / (R + 1).

    resampled: f64[R]  differences in the mean, as `resample_means` gives them
    """
    resampled = resampled[~np.isnan(resampled)]
    scale = np.abs(resampled).max(initial=0.0)
    below = np.count_nonzero(resampled <= _ROUNDING * scale)
    above = np.count_nonzero(resampled >= -_ROUNDING * scale)
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): below alpha means found at a family-wise error of alpha.

    Ascending, the i-th of m (from 0) is multiplied by m - i, capped at 1, never below the one
    before.
    """
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return adjusted


def detectable_difference(standard_error: float) -> float | None:
    """The smallest mean difference that is shown with 80 % power at alpha 0.05.

    (z(1 - alpha/2) + z(power)) * standard error: the normal approximation (Miller, "Adding Error
    Bars to Evals", arXiv:2411.00640, power analysis). None where the differences do not vary.
    """
    if not standard_error > 0:
        return None
    z_alpha, z_power = _z_values()
    return (z_alpha + z_power) * standard_error


def detectable_mean(sd: float, num_items: int) -> float | None:
    """`detectable_difference` of a mean over independent pairs; None for fewer than two.

    sd: of the differences of pairs
    """
    return detectable_difference(sd / math.sqrt(num_items)) if num_items > 1 else None


def detectable_share(discordance: float, num_items: int) -> float | None:
    """The smallest difference in accuracy that McNemar's test shows with 80 % power at alpha 0.05.

    Solves n = (z(1 - alpha/2) * sqrt(psi) + z(power) * sqrt(psi - d^2))^2 / d^2 for d, the
    normal approximation of Connor, Biometrics 43 (1987) 207-211, psi the discordance. Above psi
    it says that no difference could have been shown: none is larger than the discordance. None
    for no discordance, or fewer than 4 items.

    discordance: share of items that exactly one of the two has right
    """
    z_alpha, z_power = _z_values()
    # The larger root of the quadratic in d that the equation squares to.
    under_root = num_items - z_alpha**2 + z_power**2
    if discordance <= 0 or under_root < 0:
        return None
    root = z_alpha * math.sqrt(num_items) + z_power * math.sqrt(under_root)
    return math.sqrt(discordance) * root / (num_items + z_power**2)


def _z_values() -> tuple[float, float]:
    norm = import_extra("scipy.stats").norm
    return float(norm.ppf((1 + LEVEL) / 2)), float(norm.ppf(POWER))


def paired(
    first: np.ndarray,
    second: np.ndarray,
    is_binary: Sequence[bool],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Difference, interval and tests of first less second, column by column.

    Differences are those of single cells. With one draw, what is right or wrong is tested by
    McNemar's test, which knows items alone; all else by the paired bootstrap.

    first, second: f64[I, D, K]  NaN where a cell is missing
    is_binary:     by column, whether its values are right or wrong
    returns:       per column num_items, first_mean, second_mean, difference, low, high, by_draw
                   (the mean difference in each draw), first_only and second_only (cells that one
                   alone has right), p_bootstrap, p_mcnemar, p_value (of `test`) and detectable;
                   None for what there is not
    """
    differences = first - second
    num_draws = differences.shape[1]
    resampled = None
    if len(differences) > 1:
        resampled = resample_means(differences, num_resamples=num_resamples, seed=seed)
    by_draw = mean_of(differences)
    entries = []
    for column, entry in enumerate(_entries(differences, resampled)):
        both = ~np.isnan(differences[..., column])
        a, b = first[both, column], second[both, column]
        num_items = entry["num_items"]
        result: dict[str, Any] = {
            "num_items": num_items,
            "first_mean": a.mean() if num_items else None,
            "second_mean": b.mean() if num_items else None,
            "difference": entry["mean"],
            "low": entry["low"],
            "high": entry["high"],
            "by_draw": by_draw[:, column],
            "p_bootstrap": None,
            "p_mcnemar": None,
            "first_only": None,
            "second_only": None,
            "detectable": None,
        }
        if resampled is not None and num_items > 1:
            result["p_bootstrap"] = bootstrap_p(resampled[:, column])
        if is_binary[column]:
            first_only, second_only = int((a > b).sum()), int((b > a).sum())
            result |= {"first_only": first_only, "second_only": second_only}
        if is_binary[column] and num_draws == 1:
            result["test"] = "McNemar, exact"
            if num_items:
                discordance = (first_only + second_only) / num_items
                result["p_mcnemar"] = mcnemar(first_only, second_only)
                result["detectable"] = detectable_share(discordance, num_items)
            result["p_value"] = result["p_mcnemar"]
        else:
            result["test"] = "paired bootstrap"
            result["p_value"] = result["p_bootstrap"]
            if num_items > 1 and num_draws == 1:
                result["detectable"] = detectable_mean(float(np.std(a - b, ddof=1)), num_items)
            # What does not vary has no error, whatever rounding makes of it.
            elif resampled is not None and num_items > 1 and entry.get("note") != ALL_ALIKE:
                error = float(np.nanstd(resampled[:, column], ddof=1))
                result["detectable"] = detectable_difference(error)
        if "note" in entry:
            result["note"] = entry["note"]
        entries.append(to_plain(result))
    return entries


# ---- What single methods are asked


def calibration(
    confidence: Sequence[float], is_right: Sequence[float], num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Expected calibration error over bins of equal width (Guo et al., arXiv:1706.04599).

    Bins are open below and closed above; the first holds 0 too.

    returns: ece, None without answers; bins with low, high, count, confidence and accuracy
             (means; None where a bin is empty)
    """
    scores, right = np.asarray(confidence, float), np.asarray(is_right, float)
    edges = np.arange(num_bins + 1) / num_bins
    which = np.clip(np.searchsorted(edges, scores, side="left") - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        inside = which == number
        entry = {"low": edges[number], "high": edges[number + 1], "count": int(inside.sum())}
        entry |= {"confidence": None, "accuracy": None}
        if entry["count"]:
            entry["confidence"] = scores[inside].mean()
            entry["accuracy"] = right[inside].mean()
            gap = abs(entry["confidence"] - entry["accuracy"])
            error += entry["count"] / len(scores) * gap
        bins.append(entry)
    plain: dict[str, Any] = to_plain({"ece": error if len(scores) else None, "bins": bins})
    return plain


def agreement(predictions: Sequence[str]) -> float | None:
    """Share of pairs of predictions that are equal after normalisation; None for fewer than two.

    Empty predictions agree with nothing, each other included.
    """
    texts = [normalize_answer(prediction) for prediction in predictions]
    pairs = list(itertools.combinations(texts, 2))
    return sum(bool(a) and a == b for a, b in pairs) / len(pairs) if pairs else None


def count_flips(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Cells that go from right to wrong and from wrong to right between two methods.

    A value between 0 and 1 is a mean over single prompts; its counts are those expected of one
    prompt drawn for each cell. Wrong-to-right less right-to-wrong is then the difference in the
    mean, times the number of cells.

    before, after: f64[I, D]  NaN where a cell is missing
    """
    both = ~(np.isnan(before) | np.isnan(after))
    before, after = before[both], after[both]
    return {
        "right_to_wrong": _count(before * (1 - after)),
        "wrong_to_right": _count((1 - before) * after),
        "num_cells": int(both.sum()),
    }


def _count(shares: np.ndarray) -> int | float:
    total = math.fsum(shares)
    return int(total) if total.is_integer() else total


def to_plain(value: Any) -> Any:
    """The same as JSON knows it: plain lists and numbers, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [to_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
