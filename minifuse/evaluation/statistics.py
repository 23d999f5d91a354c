"""Statistics of a run's table: intervals, paired tests, spread over paraphrases, calibration.

Questions are what is sampled: every interval resamples questions, and every test compares two
methods on the questions that both have answered.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minifuse.errors import UsageError
from minifuse.evaluation.extras import import_extra
from minifuse.evaluation.matching import BINARY_RULES, RULES
from minifuse.methods import FusionMethod
from minifuse.normalize import normalize_answer

if TYPE_CHECKING:
    from pandas import DataFrame

NUM_RESAMPLES = 10_000
NUM_BINS = 10
LEVEL = 0.95
POWER = 0.8
LOGPROB = "answer_logprob"
MEASURES = (*RULES, LOGPROB)
DEFAULT_RULE = "match_lemma"

ORIGIN, PER_PROMPT = FusionMethod.ORIGIN.value, FusionMethod.PER_PROMPT.value
FUSED = ("fused", "fused_weighted", "fused_auto", "fused_plain")
ENSEMBLES = (
    "logit_avg",
    "prob_avg",
    "prob_max",
    "weighted_avg",
    "weighted_prob_avg",
    "weighted_max",
    "vote",
)

# Draws of one block of resamples, 32 MB.
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
    """Means of the columns over items drawn with replacement, the same draws for all columns.

    values:  f64[I, K]  one row per question, NaN where an item is missing
    returns: f64[R, K]  NaN where a draw has no item that is there
    """
    is_there = ~np.isnan(values)
    sums, counts = np.where(is_there, values, 0.0), is_there.astype(float)
    num_items = len(values)
    rng = np.random.default_rng(seed)
    block_len = max(1, _BLOCK_LEN // max(1, num_items))
    means = np.empty((num_resamples, values.shape[1]))
    for start in range(0, num_resamples, block_len):
        num_rows = min(block_len, num_resamples - start)
        draws = rng.integers(0, num_items, size=(num_rows, num_items))
        draws += np.arange(num_rows)[:, None] * num_items
        times = np.bincount(draws.ravel(), minlength=num_rows * num_items)
        times = times.reshape(num_rows, num_items).astype(float)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
            means[start : start + num_rows] = (times @ sums) / (times @ counts)
    return means


def intervals(
    values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean and 95 % percentile bootstrap interval of every column, questions resampled.

    values:  f64[I, K]  one row per question, NaN where an item is missing
    returns: per column mean, low, high and num_items, with a `note` where an interval would
             mislead; low and high are None for fewer than two items
    """
    if len(values) < 2:
        return _entries(values, None)
    return _entries(values, resample_means(values, num_resamples=num_resamples, seed=seed))


def _entries(values: np.ndarray, resampled: np.ndarray | None) -> list[dict[str, Any]]:
    num_items = (~np.isnan(values)).sum(axis=0)
    means = _means(values)
    ends = None if resampled is None else _quantiles(resampled)
    found = []
    for column, count in enumerate(num_items):
        entry = {"mean": means[column], "low": None, "high": None, "num_items": int(count)}
        if count >= 2:
            entry |= {"low": ends[0, column], "high": ends[1, column]}
            if np.ptp(values[~np.isnan(values[:, column]), column]) == 0:
                entry["note"] = ALL_ALIKE
        else:
            entry["note"] = ONE_ITEM if count else NO_ITEM
        found.append(_plain(entry))
    return found


def _means(values: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN has the mean NaN
        return np.nanmean(values, axis=0) if len(values) else np.full(values.shape[1], np.nan)


def _quantiles(resampled: np.ndarray) -> np.ndarray:
    """f64[2, K]: the ends of the percentile interval of each column."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    if not np.isnan(resampled).any():
        return np.quantile(resampled, tails, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(resampled, tails, axis=0)


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


def detectable_mean(sd: float, num_items: int) -> float | None:
    """The smallest mean difference that this many pairs show with 80 % power at alpha 0.05.

    (z(1 - alpha/2) + z(power)) * sd / sqrt(n): the normal approximation for paired differences
    (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, power analysis). None where the
    differences do not vary.

    sd: of the differences of pairs
    """
    if num_items < 2 or not sd > 0:
        return None
    z_alpha, z_power = _z_values()
    return (z_alpha + z_power) * sd / math.sqrt(num_items)


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


# ---- What single methods are asked


def calibration(
    confidence: Sequence[float], is_right: Sequence[float], num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Expected calibration error over bins of equal width (Guo et al., arXiv:1706.04599).

    Bins are open below and closed above; the first holds 0 too.

    returns: ece, None without answers; bins with low, high, count, confidence and accuracy
             (means; None where a bin is empty)
    """
    confidence, is_right = np.asarray(confidence, float), np.asarray(is_right, float)
    edges = np.arange(num_bins + 1) / num_bins
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        inside = which == number
        entry = {"low": edges[number], "high": edges[number + 1], "count": int(inside.sum())}
        entry |= {"confidence": None, "accuracy": None}
        if entry["count"]:
            entry["confidence"] = confidence[inside].mean()
            entry["accuracy"] = is_right[inside].mean()
            gap = abs(entry["confidence"] - entry["accuracy"])
            error += entry["count"] / len(confidence) * gap
        bins.append(entry)
    return _plain({"ece": error if len(confidence) else None, "bins": bins})


def agreement(predictions: Sequence[str]) -> float | None:
    """Share of pairs of predictions that are equal after normalisation; None for fewer than two.

    Empty predictions agree with nothing, each other included.
    """
    texts = [normalize_answer(prediction) for prediction in predictions]
    pairs = list(itertools.combinations(texts, 2))
    return sum(bool(a) and a == b for a, b in pairs) / len(pairs) if pairs else None


def count_flips(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Items that go from right to wrong and from wrong to right between two methods.

    A value between 0 and 1 is a mean over single prompts; its counts are those expected of one
    prompt drawn for each item. Wrong-to-right less right-to-wrong is then the difference in the
    mean, times the number of items.

    before, after: f64[I]  NaN where an item is missing
    """
    both = ~(np.isnan(before) | np.isnan(after))
    before, after = before[both], after[both]
    return {
        "right_to_wrong": _count(before * (1 - after)),
        "wrong_to_right": _count((1 - before) * after),
        "num_items": int(both.sum()),
    }


def _count(shares: np.ndarray) -> int | float:
    total = math.fsum(shares)
    return int(total) if total.is_integer() else total


def declare_family(methods: Iterable[str]) -> list[list[str]]:
    """Pairs to be compared, to be written down before a run: fused methods by ensembles."""
    methods = set(methods)
    return [
        [first, second]
        for first, second in itertools.product(FUSED, ENSEMBLES)
        if first in methods and second in methods
    ]


# ---- A run


@dataclass(frozen=True)
class _Items:
    """One value per question, method and measure, NaN where it is missing.

    values:      f64[I, M, K]  over ids, methods and MEASURES; per_prompt is the mean of an item's
                 prompts
    single:      f64[I, P, K]  per_prompt by paraphrase index
    consistency: f64[I]
    """

    ids: tuple[str, ...]
    methods: tuple[str, ...]
    n: int
    values: np.ndarray
    single: np.ndarray
    consistency: np.ndarray

    def of(self, method: str) -> np.ndarray:
        """f64[I, K] of a method; `origin` is the first single prompt where it was not run."""
        if method in self.methods:
            return self.values[:, self.methods.index(method)]
        if method == ORIGIN and self.single.size:
            return self.single[:, 0]
        return np.full((len(self.ids), len(MEASURES)), np.nan)

    def take(self, rows: np.ndarray) -> "_Items":
        ids = tuple(np.array(self.ids, dtype=object)[rows])
        parts = (self.values[rows], self.single[rows], self.consistency[rows])
        return _Items(ids, self.methods, self.n, *parts)


def _items_of(table: "DataFrame", n: int, methods: Sequence[str] | None = None) -> _Items:
    """Sorted by id, so that the order of the rows does not matter.

    An item of which some single prompts are missing has no value for per_prompt.
    """
    table = table[table["n"] == n]
    if methods is None:
        methods = _ordered(table["method"].unique())
    ids = sorted(table["id"].unique())
    row_of = {id: row for row, id in enumerate(ids)}
    rows = np.array([row_of[id] for id in table["id"]], dtype=int)
    measured = table[list(MEASURES)].to_numpy(dtype=float, na_value=np.nan)
    measured[~np.isfinite(measured)] = np.nan
    names = table["method"].to_numpy()

    single = np.full((len(ids), n, len(MEASURES)), np.nan)
    consistency = np.full(len(ids), np.nan)
    values = np.full((len(ids), len(methods), len(MEASURES)), np.nan)
    for column, method in enumerate(methods):
        if method != PER_PROMPT:
            is_own = names == method
            values[rows[is_own], column] = measured[is_own]
            continue
        is_own = names == PER_PROMPT
        places = table["paraphrase_index"].to_numpy(dtype=float, na_value=np.nan)[is_own]
        places = places.astype(int)
        single[rows[is_own], places] = measured[is_own]
        whole = np.bincount(rows[is_own], minlength=len(ids)) == n
        single[~whole] = np.nan
        values[:, column] = single.mean(axis=1)  # of all prompts or none
        predictions: dict[int, list[str]] = {}
        for row, text in zip(rows[is_own], table["prediction"][is_own], strict=True):
            predictions.setdefault(row, []).append(text)
        for row, texts in predictions.items():
            share = agreement(texts) if whole[row] else None
            consistency[row] = math.nan if share is None else share
    return _Items(tuple(ids), tuple(methods), n, values, single, consistency)


def summarise(table: "DataFrame", config: Mapping[str, Any]) -> dict[str, Any]:
    """All statistics of a run, fit for JSON; null where there is nothing to say.

    The main part is about the largest number of paraphrases in the table, `n`.

    table:  one row per record, as `tables.make_table` gives it
    config: of the run; read are `seed`, `family` (pairs of methods; `declare_family` of the
            methods by default), `rule` (of flips, spread, calibration and comparisons;
            match_lemma by default) and `num_resamples`
    raises: UsageError for a table or config that does not fit
    """
    _check_table(table, "the table")
    rule = config.get("rule") or DEFAULT_RULE
    if rule not in BINARY_RULES:
        raise UsageError(f"rule is {rule!r}; wanted one of {', '.join(BINARY_RULES)}")
    draw = _draw_options(config)
    n = int(table["n"].max()) if len(table) else 0
    main = table[table["n"] == n]
    items = _items_of(table, n)
    family = _family_of(config, items.methods)
    any_of_n, all_of_n = _of_all_prompts(items, draw)
    spread_of = _spread(items, rule)
    consistency = intervals(items.consistency[:, None], **draw)[0]
    methods = {}
    for method, measured in _measured(items, draw).items():
        rows = main[main["method"] == method]
        calibrated = calibration(rows["confidence"], rows[rule])
        is_single = method == PER_PROMPT
        methods[method] = {
            **measured,
            "num_items": int(rows["id"].nunique()),
            "spread": spread_of if is_single else None,
            "consistency": consistency["mean"] if is_single else None,
            "flips_vs_origin": _flips(items, ORIGIN, method, rule),
            "flips_vs_mean_single": _flips(items, PER_PROMPT, method, rule),
            "ece": calibrated["ece"],
            "calibration": calibrated["bins"],
            "cost": _costs(rows),
        }
    by_n, left_out_of_by_n = _by_n(table, draw)
    pairs = _compare_pairs(items, family, rule, draw)
    return _plain(
        {
            "num_items": len(items.ids),
            "n": n,
            "rule": rule,
            "num_resamples": draw["num_resamples"],
            "seed": draw["seed"],
            "interval": f"{LEVEL:.0%} percentile bootstrap over questions",
            "methods": methods,
            "any_of_n": {name: entry["mean"] for name, entry in any_of_n.items()},
            "all_of_n": {name: entry["mean"] for name, entry in all_of_n.items()},
            "intervals": {
                "any_of_n": any_of_n,
                "all_of_n": all_of_n,
                "consistency": consistency,
            },
            "by_relation": _by_relation(main, items, draw),
            "family": [f"{first} - {second}" for first, second in family],
            "comparisons": pairs,
            "by_n": by_n,
            "left_out": {
                "items_without_n": int(table["id"].nunique()) - len(items.ids),
                "items_of_by_n": left_out_of_by_n,
                "per_prompt_incomplete": _num_incomplete(main, items),
                "non_finite_logprobs": int(np.isinf(_logprobs(main)).sum()),
            },
        }
    )


def compare(
    table_a: "DataFrame",
    table_b: "DataFrame",
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """Two runs, method by method and measure by measure, on the items that both have answered.

    Items are common where id, question and answers are equal; all differences are b less a. Holm
    is over the methods, for each measure by itself.

    returns: num_items, n (the largest that both have), comparisons, and left_out with the counts
             of what could not be compared
    raises:  UsageError where nothing is common
    """
    _check_table(table_a, "the first table")
    _check_table(table_b, "the second table")
    counts_a, counts_b = ({int(n) for n in table["n"]} for table in (table_a, table_b))
    if not counts_a & counts_b:
        raise UsageError(
            f"the runs used {_listed(counts_a)} and {_listed(counts_b)} paraphrases; wanted a "
            "number that both have"
        )
    n = max(counts_a & counts_b)
    table_a, table_b = table_a[table_a["n"] == n], table_b[table_b["n"] == n]
    texts_a, texts_b = _texts_by_id(table_a), _texts_by_id(table_b)
    shared = texts_a.keys() & texts_b.keys()
    common = {id for id in shared if texts_a[id] == texts_b[id]}
    if not common:
        raise UsageError(
            f"the runs share no item: {len(shared)} ids are in both, with other questions or "
            "answers; wanted two runs over one data set"
        )
    methods_a, methods_b = set(table_a["method"]), set(table_b["method"])
    methods = _ordered(methods_a & methods_b)
    if not methods:
        raise UsageError(
            f"the runs share no method: {_listed(methods_a)}, and {_listed(methods_b)}"
        )
    items_a = _items_of(table_a[table_a["id"].isin(common)], n, methods)
    items_b = _items_of(table_b[table_b["id"].isin(common)], n, methods)
    draw = {"num_resamples": num_resamples, "seed": seed}
    columns = [
        (method, column) for column in range(len(MEASURES)) for method in range(len(methods))
    ]
    entries = _paired(
        np.stack([items_b.values[:, method, column] for method, column in columns], axis=1),
        np.stack([items_a.values[:, method, column] for method, column in columns], axis=1),
        [_is_binary(methods[method], MEASURES[column]) for method, column in columns],
        draw,
    )
    comparisons = []
    for (method, column), entry in zip(columns, entries, strict=True):
        named = {"method": methods[method], "measure": MEASURES[column]}
        means = {"a": entry.pop("second_mean"), "b": entry.pop("first_mean")}
        counts = {"a_only": entry.pop("second_only"), "b_only": entry.pop("first_only")}
        comparisons.append({**named, **means, **entry, **counts})
    comparisons = [entry for entry in comparisons if entry["num_items"]]
    _adjust(comparisons)
    return _plain(
        {
            "num_items": len(common),
            "n": n,
            "num_resamples": num_resamples,
            "seed": seed,
            "comparisons": comparisons,
            "left_out": {
                "items_only_in_a": len(texts_a.keys() - shared),
                "items_only_in_b": len(texts_b.keys() - shared),
                "items_that_differ": len(shared) - len(common),
                "methods_only_in_a": _ordered(methods_a - methods_b),
                "methods_only_in_b": _ordered(methods_b - methods_a),
                "n_only_in_a": sorted(counts_a - counts_b),
                "n_only_in_b": sorted(counts_b - counts_a),
            },
        }
    )


# ---- Parts of a summary


def _check_table(table: "DataFrame", name: str) -> None:
    wanted = (
        "id",
        "n",
        "method",
        "paraphrase_index",
        "relation",
        "question",
        "answers",
        "prediction",
        *MEASURES,
        "confidence",
        *_COSTS,
    )
    missing = [column for column in wanted if column not in table]
    if missing:
        raise UsageError(f"{name} has no column {', '.join(missing)}; wanted the table of a run")
    is_single = table["method"] == PER_PROMPT
    key = ["id", "n", "method"]
    repeated = table.duplicated([*key, "paraphrase_index"]) | (~is_single & table.duplicated(key))
    if repeated.any():
        row = table[repeated].iloc[0]
        raise UsageError(
            f"{name} holds id {row['id']!r}, n {row['n']}, method {row['method']} twice; wanted "
            "every record once"
        )
    single = table[is_single]
    if (single["paraphrase_index"].isna() | (single["paraphrase_index"] >= single["n"])).any():
        raise UsageError(f"{name} has per_prompt rows whose paraphrase_index is not below n")


def _draw_options(config: Mapping[str, Any]) -> dict[str, int]:
    options = {"num_resamples": config.get("num_resamples", NUM_RESAMPLES)}
    options["seed"] = config.get("seed") or 0
    for name, smallest in (("num_resamples", 1), ("seed", 0)):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise UsageError(f"{name} is {value!r}; wanted an integer of at least {smallest}")
    return options


def _family_of(config: Mapping[str, Any], methods: Sequence[str]) -> list[list[str]]:
    """The declared pairs of methods that were run."""
    family = config.get("family")
    if family is None:
        return declare_family(methods)
    for pair in family:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UsageError(f"family holds {pair!r}; wanted pairs of methods")
    return [list(pair) for pair in family if set(pair) <= set(methods)]


def _measured(items: _Items, draw: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Intervals of every measure by method."""
    if not items.methods:
        return {}
    found = intervals(items.values.reshape(len(items.ids), -1), **draw)
    return {
        method: dict(
            zip(MEASURES, found[row * len(MEASURES) : (row + 1) * len(MEASURES)], strict=True)
        )
        for row, method in enumerate(items.methods)
    }


def _of_all_prompts(items: _Items, draw: Mapping[str, int]) -> tuple[dict, dict]:
    """By measure: the best and the worst single prompt of every item, averaged over items.

    For a rule that is any-of-N and all-of-N.
    """
    if PER_PROMPT not in items.methods:
        return {}, {}
    best, worst = items.single.max(axis=1), items.single.min(axis=1)
    return tuple(
        dict(zip(MEASURES, intervals(values, **draw), strict=True)) for values in (best, worst)
    )


def _spread(items: _Items, rule: str) -> dict[str, Any] | None:
    """How far the single prompts lie apart, by `rule` and by log-probability.

    best, worst, sd:       over paraphrase positions, each averaged over items
    item_best, item_worst: over the paraphrases of each item, then averaged
    """
    if PER_PROMPT not in items.methods:
        return None

    def spread_by(measure: str) -> dict[str, Any]:
        values = items.single[:, :, MEASURES.index(measure)]
        positions = _means(values)
        there = positions[~np.isnan(positions)]
        return {
            "mean": there.mean() if there.size else None,
            "best": there.max() if there.size else None,
            "worst": there.min() if there.size else None,
            "sd": there.std(ddof=1) if there.size > 1 else None,
            "item_best": _means(values.max(axis=1, keepdims=True))[0],
            "item_worst": _means(values.min(axis=1, keepdims=True))[0],
            "by_paraphrase": positions,
        }

    return {**spread_by(rule), "measure": rule, LOGPROB: spread_by(LOGPROB)}


def _flips(items: _Items, baseline: str, method: str, rule: str) -> dict[str, float] | None:
    if method == baseline:
        return None
    column = MEASURES.index(rule)
    flips = count_flips(items.of(baseline)[:, column], items.of(method)[:, column])
    return flips if flips["num_items"] else None


_COSTS = ("num_streams", "prompt_tokens", "num_tokens", "prefill_ms", "decode_ms")


def _costs(rows: "DataFrame") -> dict[str, float | None]:
    """Means over a method's records."""
    return {name: rows[name].astype(float).mean() for name in _COSTS}


def _by_relation(table: "DataFrame", items: _Items, draw: Mapping[str, int]) -> dict[str, Any]:
    """Intervals by relation and method; items without a relation are in none."""
    relation_of = dict(zip(table["id"], table["relation"], strict=True))
    relations = [relation_of[id] for id in items.ids]
    rows_of: dict[str, list[int]] = {}
    for row, relation in enumerate(relations):
        if isinstance(relation, str):
            rows_of.setdefault(relation, []).append(row)
    return {
        relation: {"num_items": len(rows), "methods": _measured(items.take(rows), draw)}
        for relation, rows in sorted(rows_of.items())
    }


def _by_n(table: "DataFrame", draw: Mapping[str, int]) -> tuple[dict[str, Any], int]:
    """Intervals by n and method on the items that every n has; how many others there are."""
    ids_by_n = {int(n): set(rows["id"]) for n, rows in table.groupby("n")}
    if not ids_by_n:
        return {}, 0
    common = set.intersection(*ids_by_n.values())
    table = table[table["id"].isin(common)]
    found = {str(n): _measured(_items_of(table, n), draw) for n in sorted(ids_by_n)}
    return found, len(set.union(*ids_by_n.values())) - len(common)


def _compare_pairs(
    items: _Items, family: Sequence[Sequence[str]], rule: str, draw: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The family's pairs by `rule` and by log-probability; Holm over the pairs of each measure."""
    columns = [(pair, measure) for measure in (rule, LOGPROB) for pair in family]
    if not columns:
        return []
    first, second = (
        np.stack(
            [items.of(pair[side])[:, MEASURES.index(measure)] for pair, measure in columns], axis=1
        )
        for side in (0, 1)
    )
    is_binary = [all(_is_binary(method, measure) for method in pair) for pair, measure in columns]
    entries = _paired(first, second, is_binary, draw)
    comparisons = [
        {"first": pair[0], "second": pair[1], "measure": measure, **entry}
        for (pair, measure), entry in zip(columns, entries, strict=True)
        if entry["num_items"]  # `vote` has no log-probability
    ]
    _adjust(comparisons)
    return comparisons


def _is_binary(method: str, measure: str) -> bool:
    """Whether each item is right or wrong; per_prompt's is right in part."""
    return measure in BINARY_RULES and method != PER_PROMPT


def _paired(
    first: np.ndarray, second: np.ndarray, is_binary: Sequence[bool], draw: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Difference, interval and tests of first less second, column by column.

    first, second: f64[I, K]  one row per question
    """
    differences = first - second
    resampled = resample_means(differences, **draw) if len(differences) > 1 else None
    entries = []
    for column, entry in enumerate(_entries(differences, resampled)):
        both = ~np.isnan(differences[:, column])
        a, b = first[both, column], second[both, column]
        num_items = len(a)
        result = {
            "num_items": num_items,
            "first_mean": a.mean() if num_items else None,
            "second_mean": b.mean() if num_items else None,
            "difference": entry["mean"],
            "low": entry["low"],
            "high": entry["high"],
            "p_bootstrap": bootstrap_p(resampled[:, column]) if num_items > 1 else None,
            "p_mcnemar": None,
            "first_only": None,
            "second_only": None,
        }
        if is_binary[column]:
            first_only, second_only = int((a > b).sum()), int((b > a).sum())
            result |= {
                "first_only": first_only,
                "second_only": second_only,
                "p_mcnemar": mcnemar(first_only, second_only) if num_items else None,
                "test": "McNemar, exact",
                "detectable": detectable_share((first_only + second_only) / num_items, num_items)
                if num_items
                else None,
            }
            result["p_value"] = result["p_mcnemar"]
        else:
            sd = float(np.std(a - b, ddof=1)) if num_items > 1 else 0.0
            result |= {"test": "paired bootstrap", "detectable": detectable_mean(sd, num_items)}
            result["p_value"] = result["p_bootstrap"]
        if "note" in entry:
            result["note"] = entry["note"]
        entries.append(_plain(result))
    return entries


def _adjust(comparisons: list[dict[str, Any]]) -> None:
    """Fill `p_holm` in, over the comparisons of each measure."""
    for entry in comparisons:
        entry["p_holm"] = None
    for measure in {entry["measure"] for entry in comparisons}:
        tested = [
            entry
            for entry in comparisons
            if entry["measure"] == measure and entry["p_value"] is not None
        ]
        for entry, p_holm in zip(tested, holm([e["p_value"] for e in tested]), strict=True):
            entry["p_holm"] = p_holm


def _num_incomplete(table: "DataFrame", items: _Items) -> int:
    """Items of which only some single prompts are there."""
    num_rows = table[table["method"] == PER_PROMPT].groupby("id").size()
    return int((num_rows < items.n).sum())


def _logprobs(table: "DataFrame") -> np.ndarray:
    return table[LOGPROB].to_numpy(dtype=float, na_value=np.nan)


def _texts_by_id(table: "DataFrame") -> dict[str, tuple[str, tuple[str, ...]]]:
    return {
        id: (question, tuple(answers))
        for id, question, answers in zip(
            table["id"], table["question"], table["answers"], strict=True
        )
    }


def _ordered(methods: Iterable[str]) -> list[str]:
    """Known methods in their usual order, others after them."""
    known = [method.value for method in FusionMethod]
    methods = set(methods)
    return [name for name in known if name in methods] + sorted(methods - set(known))


def _listed(values: Iterable) -> str:
    return ", ".join(map(str, sorted(values))) or "none"


def _plain(value: Any) -> Any:
    """The same as JSON knows it: plain lists and numbers, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
