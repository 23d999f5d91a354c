"""What is asked of a run: its summary, and the comparison of two runs.

Questions are what is sampled, and draws of shots where there are several; methods are compared on
the cells (a question in a draw) that both have answered.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minifuse.errors import UsageError
from minifuse.evaluation.matching import BINARY_RULES, RULES
from minifuse.evaluation.statistics import (
    LEVEL,
    NUM_RESAMPLES,
    agreement,
    calibration,
    count_flips,
    holm,
    intervals,
    mean_of,
    paired,
    share_of_distance,
    to_plain,
)
from minifuse.methods import FusionMethod

if TYPE_CHECKING:
    from pandas import DataFrame

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


def declare_family(methods: Iterable[str]) -> list[list[str]]:
    """Pairs to be compared, to be written down before a run: fused methods by ensembles."""
    methods = set(methods)
    return [
        [first, second]
        for first, second in itertools.product(FUSED, ENSEMBLES)
        if first in methods and second in methods
    ]


@dataclass(frozen=True)
class _Items:
    """One value per question, draw, method and measure, NaN where it is missing.

    values:      f64[I, D, M, K]  over ids, draws, methods and MEASURES; per_prompt is the mean of
                 an item's prompts
    single:      f64[I, D, P, K]  per_prompt by paraphrase index
    consistency: f64[I, D]
    """

    ids: tuple[str, ...]
    draws: tuple[int, ...]
    methods: tuple[str, ...]
    n: int
    values: np.ndarray
    single: np.ndarray
    consistency: np.ndarray

    def of(self, method: str) -> np.ndarray:
        """f64[I, D, K] of a method; `origin` is the first single prompt where it was not run."""
        if method in self.methods:
            return self.values[:, :, self.methods.index(method)]
        if method == ORIGIN and self.single.size:
            return self.single[:, :, 0]
        return np.full((len(self.ids), len(self.draws), len(MEASURES)), np.nan)

    def take(self, rows: np.ndarray) -> "_Items":
        ids = tuple(np.array(self.ids, dtype=object)[rows])
        parts = (self.values[rows], self.single[rows], self.consistency[rows])
        return _Items(ids, self.draws, self.methods, self.n, *parts)


def _items_of(
    table: "DataFrame",
    n: int,
    methods: Sequence[str] | None = None,
    draws: Iterable[int] | None = None,
) -> _Items:
    """Sorted by id and draw, so that the order of the rows does not matter.

    A cell of which some single prompts are missing has no value for per_prompt.
    """
    table = table[table["n"] == n]
    if methods is None:
        methods = _ordered(table["method"].unique())
    ids, rows = np.unique(table["id"].to_numpy(dtype=object), return_inverse=True)
    draw_of = table["draw"].to_numpy(dtype=int)
    draws = np.unique(draw_of if draws is None else list(draws))
    cells = rows * len(draws) + np.searchsorted(draws, draw_of)
    num_cells = len(ids) * len(draws)
    measured = table[list(MEASURES)].to_numpy(dtype=float, na_value=np.nan)
    measured[~np.isfinite(measured)] = np.nan
    names = table["method"].to_numpy()

    is_single = names == PER_PROMPT
    single_cells = cells[is_single]
    places = table["paraphrase_index"][is_single].to_numpy(dtype=int)
    single = np.full((num_cells, n, len(MEASURES)), np.nan)
    single[single_cells, places] = measured[is_single]
    is_whole = np.bincount(single_cells, minlength=num_cells) == n
    single[~is_whole] = np.nan
    consistency = np.full(num_cells, np.nan)
    for cell, texts in table["prediction"][is_single].groupby(single_cells):
        if is_whole[cell] and n > 1:
            consistency[cell] = agreement(list(texts))

    values = np.full((num_cells, len(methods), len(MEASURES)), np.nan)
    for column, method in enumerate(methods):
        is_own = names == method
        values[cells[is_own], column] = measured[is_own]
    if PER_PROMPT in methods:
        values[:, methods.index(PER_PROMPT)] = single.mean(axis=1)  # of all prompts or none
    parts = (
        part.reshape(len(ids), len(draws), *part.shape[1:])
        for part in (values, single, consistency)
    )
    return _Items(tuple(ids), tuple(draws), tuple(methods), n, *parts)


def _attribution(rows: "DataFrame") -> dict[str, Any] | None:
    """Means over the answers that have one, segments by their place; None where none has."""
    if "attention" not in rows or not rows["attention"].notna().any():
        return None
    rows = rows[rows["attention"].notna()]
    attention, without, alone = (
        np.array([list(numbers) for numbers in rows[name]], dtype=float)
        for name in ("attention", "without", "alone")
    )
    shares = attention.mean(axis=0)
    return {
        "num_answers": len(rows),
        "prefix": shares[0],
        "segments": list(shares[1:-2]),
        "suffix": shares[-2],
        "answer": shares[-1],
        "without": mean_of(without),
        "alone": mean_of(alone),
    }


def summarise(table: "DataFrame", config: Mapping[str, Any]) -> dict[str, Any]:
    """All statistics of a run, fit for JSON; null where there is nothing to say.

    The main part is about the largest number of paraphrases in the table, `n`. Means are over
    items and draws of shots, and so are counts of flips and the bins of calibration.

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
    how = _resampling(config)
    n = int(table["n"].max()) if len(table) else 0
    main = table[table["n"] == n]
    items = _items_of(table, n)
    family = _family_of(config, items.methods)
    any_of_n, all_of_n = _of_all_prompts(items, how)
    shares = _shares_of_distance(items, how)
    spread_of = _spread(items, rule)
    consistency = intervals(items.consistency[..., None], **how)[0]
    methods = {}
    for method, measured in _measured(items, how).items():
        rows = main[main["method"] == method]
        calibrated = calibration(rows["confidence"], rows[rule])
        is_single = method == PER_PROMPT
        methods[method] = {
            **measured,
            "num_items": int(rows["id"].nunique()),
            "spread": spread_of if is_single else None,
            "consistency": consistency["mean"] if is_single else None,
            "share_of_distance": shares.get(method),
            "flips_vs_origin": _flips(items, ORIGIN, method, rule),
            "flips_vs_mean_single": _flips(items, PER_PROMPT, method, rule),
            "ece": calibrated["ece"],
            "calibration": calibrated["bins"],
            "cost": _costs(rows),
            "attribution": _attribution(rows),
        }
    by_n, left_out_of_by_n = _by_n(table, how)
    pairs = _compare_pairs(items, family, rule, how)
    return to_plain(
        {
            "num_items": len(items.ids),
            "n": n,
            "draws": len(items.draws),
            "rule": rule,
            "num_resamples": how["num_resamples"],
            "seed": how["seed"],
            "interval": _describe_intervals(len(items.draws)),
            "methods": methods,
            "best_single": any_of_n,
            "any_of_n": {name: entry["mean"] for name, entry in any_of_n.items()},
            "all_of_n": {name: entry["mean"] for name, entry in all_of_n.items()},
            "intervals": {
                "any_of_n": any_of_n,
                "all_of_n": all_of_n,
                "consistency": consistency,
            },
            "by_relation": _by_relation(main, items, how),
            "family": [f"{first} - {second}" for first, second in family],
            "comparisons": pairs,
            "by_n": by_n,
            "left_out": {
                "items_without_n": int(table["id"].nunique()) - len(items.ids),
                "items_of_by_n": left_out_of_by_n,
                "items_without_draw": _num_without_draw(main, items),
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
    """Two runs, method by method and measure by measure, on the cells that both have answered.

    Items are common where id, question and answers are equal, draws where their numbers are; all
    differences are b less a. Holm is over the methods, for each measure by itself.

    returns: num_items, n (the largest that both have), draws (how many both have), comparisons,
             and left_out with the counts of what could not be compared
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
    draws_a, draws_b = ({int(draw) for draw in table["draw"]} for table in (table_a, table_b))
    draws = draws_a & draws_b
    if not draws:
        raise UsageError(
            f"the runs used the draws {_listed(draws_a)} and {_listed(draws_b)}; wanted a draw "
            "that both have"
        )
    table_a, table_b = (table[table["draw"].isin(draws)] for table in (table_a, table_b))
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
    items_a, items_b = (
        _items_of(table[table["id"].isin(common)], n, methods, draws)
        for table in (table_a, table_b)
    )
    how = {"num_resamples": num_resamples, "seed": seed}
    columns = [
        (method, column) for column in range(len(MEASURES)) for method in range(len(methods))
    ]
    values_b, values_a = (
        np.stack([items.values[:, :, method, column] for method, column in columns], axis=-1)
        for items in (items_b, items_a)
    )
    is_binary = [_is_binary(methods[method], MEASURES[column]) for method, column in columns]
    entries = paired(values_b, values_a, is_binary, **how)
    comparisons = []
    for (method, column), entry in zip(columns, entries, strict=True):
        named = {"method": methods[method], "measure": MEASURES[column]}
        means = {"a": entry.pop("second_mean"), "b": entry.pop("first_mean")}
        counts = {"a_only": entry.pop("second_only"), "b_only": entry.pop("first_only")}
        comparisons.append({**named, **means, **entry, **counts})
    comparisons = [entry for entry in comparisons if entry["num_items"]]
    _adjust(comparisons)
    return to_plain(
        {
            "num_items": len(common),
            "n": n,
            "draws": len(draws),
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
                "draws_only_in_a": sorted(draws_a - draws),
                "draws_only_in_b": sorted(draws_b - draws),
            },
        }
    )


# ---- Parts of a summary


def _describe_intervals(num_draws: int) -> str:
    over = "questions" if num_draws < 2 else f"questions and {num_draws} draws of shots"
    return f"{LEVEL:.0%} percentile bootstrap over {over}"


def _check_table(table: "DataFrame", name: str) -> None:
    wanted = (
        "id",
        "n",
        "draw",
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
    key = ["id", "n", "draw", "method"]
    repeated = table.duplicated([*key, "paraphrase_index"]) | (~is_single & table.duplicated(key))
    if repeated.any():
        row = table[repeated].iloc[0]
        raise UsageError(
            f"{name} holds id {row['id']!r}, n {row['n']}, draw {row['draw']}, method "
            f"{row['method']} twice; wanted every record once"
        )
    single = table[is_single]
    if (single["paraphrase_index"].isna() | (single["paraphrase_index"] >= single["n"])).any():
        raise UsageError(f"{name} has per_prompt rows whose paraphrase_index is not below n")


def _resampling(config: Mapping[str, Any]) -> dict[str, int]:
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


def _measured(items: _Items, how: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Intervals of every measure by method."""
    if not items.methods:
        return {}
    num_columns = len(items.methods) * len(MEASURES)
    values = items.values.reshape(len(items.ids), len(items.draws), num_columns)
    found = intervals(values, **how)
    return {
        method: dict(
            zip(MEASURES, found[row * len(MEASURES) : (row + 1) * len(MEASURES)], strict=True)
        )
        for row, method in enumerate(items.methods)
    }


def _of_all_prompts(items: _Items, how: Mapping[str, int]) -> tuple[dict, dict]:
    """By measure: the best and the worst single prompt of every cell, averaged over cells.

    For a rule that is any-of-N and all-of-N.
    """
    if PER_PROMPT not in items.methods:
        return {}, {}
    best, worst = items.single.max(axis=2), items.single.min(axis=2)
    of_best, of_worst = (
        dict(zip(MEASURES, intervals(values, **how), strict=True)) for values in (best, worst)
    )
    return of_best, of_worst


def _shares_of_distance(items: _Items, how: Mapping[str, int]) -> dict[str, dict[str, Any] | None]:
    """How much of the way from the best ensemble to the best single prompt of each cell is gone.

    By fused method, and by log-probability, as is which ensemble of the run is the best; None
    where there is no such way.
    """
    column = MEASURES.index(LOGPROB)
    means = {
        method: mean_of(items.of(method)[..., column].ravel())
        for method in ENSEMBLES
        if method in items.methods
    }
    means = {method: mean for method, mean in means.items() if not np.isnan(mean)}
    if not means or PER_PROMPT not in items.methods:
        return {}
    reference = max(means, key=means.__getitem__)
    best_single = items.single[..., column].max(axis=2)
    shares: dict[str, dict[str, Any] | None] = {}
    for method in FUSED:
        if method in items.methods:
            values, baseline = (items.of(name)[..., column] for name in (method, reference))
            share = share_of_distance(values, baseline, best_single, **how)
            shares[method] = share and {"reference": reference, **share}
    return shares


def _spread(items: _Items, rule: str) -> dict[str, Any] | None:
    """How far the single prompts lie apart, by `rule` and by log-probability.

    best, worst, sd:       over paraphrase positions, each averaged over cells
    item_best, item_worst: over the paraphrases of each cell, then averaged
    """
    if PER_PROMPT not in items.methods:
        return None

    def spread_by(measure: str) -> dict[str, Any]:
        values = items.single[..., MEASURES.index(measure)].reshape(-1, items.n)
        positions = mean_of(values)
        there = positions[~np.isnan(positions)]
        return {
            "mean": there.mean() if there.size else None,
            "best": there.max() if there.size else None,
            "worst": there.min() if there.size else None,
            "sd": there.std(ddof=1) if there.size > 1 else None,
            "item_best": mean_of(values.max(axis=1, keepdims=True))[0],
            "item_worst": mean_of(values.min(axis=1, keepdims=True))[0],
            "by_paraphrase": positions,
        }

    return {**spread_by(rule), "measure": rule, LOGPROB: spread_by(LOGPROB)}


def _flips(items: _Items, baseline: str, method: str, rule: str) -> dict[str, float] | None:
    if method == baseline:
        return None
    column = MEASURES.index(rule)
    flips = count_flips(items.of(baseline)[..., column], items.of(method)[..., column])
    return flips if flips["num_cells"] else None


_COSTS = ("num_streams", "prompt_tokens", "num_tokens", "prefill_ms", "decode_ms")


def _costs(rows: "DataFrame") -> dict[str, float | None]:
    """Means over a method's records."""
    return {name: rows[name].astype(float).mean() for name in _COSTS}


def _by_relation(table: "DataFrame", items: _Items, how: Mapping[str, int]) -> dict[str, Any]:
    """Intervals by relation and method; items without a relation are in none."""
    relation_of = dict(zip(table["id"], table["relation"], strict=True))
    relations = [relation_of[id] for id in items.ids]
    rows_of: dict[str, list[int]] = {}
    for row, relation in enumerate(relations):
        if isinstance(relation, str):
            rows_of.setdefault(relation, []).append(row)
    return {
        relation: {"num_items": len(rows), "methods": _measured(items.take(np.array(rows)), how)}
        for relation, rows in sorted(rows_of.items())
    }


def _by_n(table: "DataFrame", how: Mapping[str, int]) -> tuple[dict[str, Any], int]:
    """Intervals by n and method on the items that every n has; how many others there are."""
    ids_by_n = {int(n): set(rows["id"]) for n, rows in table.groupby("n")}
    if not ids_by_n:
        return {}, 0
    common = set.intersection(*ids_by_n.values())
    table = table[table["id"].isin(common)]
    found = {str(n): _measured(_items_of(table, n), how) for n in sorted(ids_by_n)}
    return found, len(set.union(*ids_by_n.values())) - len(common)


def _compare_pairs(
    items: _Items, family: Sequence[Sequence[str]], rule: str, how: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The family's pairs by `rule` and by log-probability; Holm over the pairs of each measure."""
    columns = [(pair, measure) for measure in (rule, LOGPROB) for pair in family]
    if not columns:
        return []
    first, second = (
        np.stack(
            [items.of(pair[side])[..., MEASURES.index(measure)] for pair, measure in columns],
            axis=-1,
        )
        for side in (0, 1)
    )
    is_binary = [all(_is_binary(method, measure) for method in pair) for pair, measure in columns]
    entries = paired(first, second, is_binary, **how)
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
    """Cells of which only some single prompts are there."""
    num_rows = table[table["method"] == PER_PROMPT].groupby(["id", "draw"]).size()
    return int((num_rows < items.n).sum())


def _num_without_draw(table: "DataFrame", items: _Items) -> int:
    """Items that some draw of shots lacks; they count in the others."""
    return int((table.groupby("id")["draw"].nunique() < len(items.draws)).sum())


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
