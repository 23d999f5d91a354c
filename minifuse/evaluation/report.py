"""The report: a run as one HTML file for a screen, a phone or paper, which fetches nothing.

What is read of the summary (all of it may be missing or null, and is then left out):

    num_items, rule, interval                      of the run; rule: what is right, match_lemma
    left_out.WHAT                                  counts, said where they are not 0
    methods.METHOD.MEASURE.{mean, low, high}       the main table; MEASURES lists the measures
    intervals.{any_of_n, all_of_n}.MEASURE         the same of each item's best, worst paraphrase
    methods.METHOD.{flips_vs_origin, flips_vs_mean_single}.{right_to_wrong, wrong_to_right}
    methods.METHOD.share_of_distance.{reference, share, low, high}
    methods.METHOD.ece, .calibration[].{count, confidence, accuracy}
    methods.METHOD.cost.{num_streams, prompt_tokens, num_tokens, prefill_ms, decode_ms}
    methods.per_prompt.consistency, .spread.{measure, mean, best, worst, sd, item_best,
        item_worst, by_paraphrase}, .spread.answer_logprob (the same keys)
    methods.METHOD.attribution.{num_answers, prefix, segments[], suffix, answer, without[], alone[]}
    by_n.N.METHOD.MEASURE                          accuracy against N
    by_relation.RELATION.{num_items, methods.METHOD.MEASURE}
    comparisons[].{first, second, measure, difference, low, high, p_mcnemar, p_bootstrap, p_holm,
        detectable, by_draw[]}
    family[]                                       how many pairs Holm adjusts over

of the config: dataset, model, dtype, command, and all else as it stands; of the environment: as it
stands. Heat map, agreement and examples come from the table, for the largest n in it, and heat map
and examples for the first draw of shots alone; read are id, n, draw, method, paraphrase_index,
relation, question, paraphrases, answers, prediction, answer_logprob and the rule.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas
from markupsafe import Markup, escape

from minifuse.errors import MinifuseError
from minifuse.evaluation.plots import (
    Point,
    draw_attribution,
    draw_costs,
    draw_curves,
    draw_heat_map,
    draw_matrix,
)
from minifuse.files import write_whole
from minifuse.methods import FusionMethod
from minifuse.normalize import normalize_answer

# The sensitive measure first.
MEASURES = {
    "answer_logprob": "answer log-probability",
    "match_lemma": "lemmas",
    "match_lemma_both": "lemmas, both ways",
    "match_exact": "exact",
    "match_first_word": "first word",
    "f1": "token F1",
}
COSTS = {
    "num_streams": "streams",
    "prompt_tokens": "prompt tokens",
    "num_tokens": "new tokens",
    "prefill_ms": "prefill ms",
    "decode_ms": "decode ms",
}
_DRAWN_COSTS = ("num_streams", "prompt_tokens", "decode_ms")
# The file must open on a phone: what is drawn or listed is bounded, and the page says so.
MAX_HEAT_ITEMS = 100
MAX_EXAMPLES = 200
MAX_RELATIONS = 100
MAX_CHARS = 300  # of one text in an example
_LABEL_CHARS = 46
_HEAT_GROUPS = 5


def write_report(
    path: Path,
    table: pandas.DataFrame,
    summary: Mapping,
    config: Mapping,
    environment: Mapping,
) -> None:
    """Write the report of a run; the same input gives the same bytes.

    table:       one row per record, lists as lists
    summary:     as `summary.summarise` returns it, or as read back from summary.json
    config:      of the run folder; `command` is the command that repeats the run
    environment: of the run folder
    raises:      MinifuseError where the file cannot be written
    """
    counts = sorted({int(count) for count in table["n"]})
    rows = table[table["n"] == counts[-1]] if counts else table
    draws = sorted({int(draw) for draw in rows["draw"]})
    first_draw = rows[rows["draw"] == draws[0]] if draws else rows
    present = set(rows["method"])
    methods = [method.value for method in FusionMethod if method in present]
    rule = _get(summary, "rule") or "match_lemma"
    shown = ("answer_logprob", rule)  # where there is no room for all measures
    template = _jinja().get_template("report.html.jinja")
    page = template.render(
        config=config,
        command=_command(config.get("command")),
        environment=environment,
        summary=summary,
        methods=methods,
        measures=MEASURES,
        costs=COSTS,
        rule=rule,
        shown=shown,
        best=_best(summary, methods),
        counts=counts,
        draws=draws,
        distances=[
            method
            for method in methods
            if _get(summary, "methods", method, "share_of_distance", "share") is not None
        ],
        num_items=_get(summary, "num_items") or rows["id"].nunique(),
        curves=_curves(summary, methods, counts, shown),
        heat_map=_heat_map(first_draw, rule),
        agreement=_agreement(rows, methods),
        attribution=_attribution(summary, methods),
        cost_plot=_cost_plot(summary, methods, rule),
        relations=_relations(summary),
        calibration=_calibration(summary, methods),
        examples=_examples(first_draw, methods, rule),
        get=_get,
    )
    try:
        # Arguments that are not UTF-8 are no reason to lose the report.
        write_whole(Path(path), page, errors="replace")
    except OSError as error:
        raise MinifuseError(
            f"{path} cannot be written: {error.strerror}; make room or choose another --output"
        ) from None


def _jinja() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minifuse.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "plain": _plain,
        "clip": _clip,
        "breakable": lambda name: Markup(str(escape(name)).replace("_", "_<wbr>")),
    }
    return environment


def _get(tree: Any, *keys: object) -> Any:
    """What lies under the keys, None where the way ends early; NaN counts as nothing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        # Counts are keys that JSON turns into text.
        tree = tree.get(key, tree.get(str(key)))
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _number(value: Any, digits: int = 3) -> str:
    """A number for a cell, with a real minus sign; a dash where there is none."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.lstrip("-")


def _plain(value: object) -> str:
    """A setting as text: strings and lists of them as they are, all else as JSON."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _clip(text: str, limit: int = MAX_CHARS) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def _command(command: Iterable[object] | None) -> str | None:
    if command is None or isinstance(command, str):
        return command
    return shlex.join(map(str, command))


def _best(summary: Mapping, methods: Sequence[str]) -> dict[str, float]:
    """The highest mean of each measure."""
    means = {
        measure: [_get(summary, "methods", method, measure, "mean") for method in methods]
        for measure in MEASURES
    }
    return {
        measure: max((value for value in values if value is not None), default=math.nan)
        for measure, values in means.items()
    }


def _interval(interval: object, x: float, size: float = 4.5) -> Point | None:
    mean = _get(interval, "mean")
    if mean is None:
        return None
    return Point(x, mean, _get(interval, "low"), _get(interval, "high"), size)


def _curves(
    summary: Mapping, methods: Sequence[str], counts: Sequence[int], shown: Sequence[str]
) -> Markup | None:
    if len(counts) < 2:
        return None
    measures = {}
    for measure in shown:
        curves = {}
        for method in methods:
            points = [_interval(_get(summary, "by_n", n, method, measure), n) for n in counts]
            curves[method] = [point for point in points if point]
        measures[_axis_label(measure)] = {
            method: points for method, points in curves.items() if points
        }
    measures = {label: curves for label, curves in measures.items() if curves}
    if not measures:
        return None
    return draw_curves(
        measures,
        name="curves",
        title="Log-probability of the answer and accuracy against the number of paraphrases",
        x_label="paraphrases",
    )


def _axis_label(measure: str) -> str:
    label = MEASURES[measure]
    return label if measure == "answer_logprob" else f"accuracy ({label})"


def _spread_out(items: Sequence, limit: int) -> list:
    """At most `limit` of the items, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(place * (len(items) - 1) / (limit - 1))] for place in range(limit)]


def _heat_map(rows: pandas.DataFrame, rule: str) -> dict | None:
    single = rows[rows["method"] == FusionMethod.PER_PROMPT]
    single = single.assign(answer_logprob=pandas.to_numeric(single["answer_logprob"]))
    if single["answer_logprob"].isna().all():
        return None
    logprobs = single.pivot(index="id", columns="paraphrase_index", values="answer_logprob")
    is_right = single.pivot(index="id", columns="paraphrase_index", values=rule)
    order = logprobs.mean(axis=1).sort_values(ascending=False, kind="stable").index
    drawn = _spread_out(list(order), MAX_HEAT_ITEMS)
    logprobs, is_right = logprobs.loc[drawn], is_right.loc[drawn].eq(True)
    groups, edges = pandas.qcut(
        logprobs.stack(), _HEAT_GROUPS, labels=False, retbins=True, duplicates="drop"
    )
    groups = groups.unstack().reindex(index=logprobs.index, columns=logprobs.columns)
    questions = single.drop_duplicates("id").set_index("id")["question"]
    labels = [_label(f"{id}: {questions[id]}") for id in drawn]
    means = logprobs.mean(axis=1)
    cells = f"{int(is_right.to_numpy().sum())} of {logprobs.count().sum()} cells are right"
    plot = draw_heat_map(
        [[None if math.isnan(cell) else int(cell) for cell in row] for row in groups.to_numpy()],
        is_right.to_numpy().tolist(),
        labels,
        group_labels=[
            f"{_number(low, 1)} to {_number(high, 1)}" for low, high in itertools.pairwise(edges)
        ],
        name="heat-map",
        title="Log-probability of the answer and correctness of each paraphrase of each item",
        description=f"{len(drawn)} items from the likeliest answers ({means.iloc[0]:.2f} nats) "
        f"to the least likely (mean {means.iloc[-1]:.2f} nats); {cells}",
    )
    return {"plot": plot, "drawn": len(drawn), "of": len(order)}


def _label(text: str) -> str:
    """One short line that XML can hold."""
    text = " ".join(text.split())
    return _clip("".join(char for char in text if char.isprintable()), _LABEL_CHARS)


def _attribution(summary: Mapping, methods: Sequence[str]) -> Markup | None:
    """Of the methods that combine paraphrases; None where nothing is known of them."""
    found = {method: _get(summary, "methods", method, "attribution") for method in methods}
    combining = {
        method: values
        for method, values in found.items()
        if values and sum(share > 0 for share in values["segments"]) > 1
    }
    combining.pop(FusionMethod.PER_PROMPT, None)
    if not combining:
        return None
    return draw_attribution(
        combining,
        name="attribution",
        title="Attention to each paraphrase, change without it, and worth of it alone",
    )


def _agreement(rows: pandas.DataFrame, methods: Sequence[str]) -> Markup | None:
    """How often two methods give the same answer after normalisation; empty ones never agree.

    Over items and draws. `per_prompt` gives several answers: the share of those, and with itself
    the share of its pairs.
    """
    if len(methods) < 2:
        return None
    answers: dict[str, dict[object, list[str]]] = {method: {} for method in methods}
    columns = (rows[name] for name in ("method", "id", "draw", "prediction"))
    for method, id, draw, prediction in zip(*columns, strict=True):
        answers[method].setdefault((id, draw), []).append(normalize_answer(prediction))
    values = [
        [_mean_agreement(answers[first], answers[second]) for second in methods]
        for first in methods
    ]
    return draw_matrix(
        values, methods, name="agreement", title="Share of items on which two methods agree"
    )


def _mean_agreement(first: Mapping, second: Mapping) -> float | None:
    shares = []
    for cell in first.keys() & second.keys():
        pairs = [
            bool(one) and one == other
            for place, one in enumerate(first[cell])
            for other_place, other in enumerate(second[cell])
            # An answer's agreement with itself says something only where it is the only one.
            if first is not second or len(first[cell]) == 1 or place != other_place
        ]
        shares.append(sum(pairs) / len(pairs))
    return math.fsum(shares) / len(shares) if shares else None


def _cost_plot(summary: Mapping, methods: Sequence[str], rule: str) -> Markup | None:
    plotted: dict[str, dict[str, Point]] = {}
    for key in _DRAWN_COSTS:
        for method in methods:
            cost = _get(summary, "methods", method, "cost", key)
            if cost is None:
                continue
            if point := _interval(_get(summary, "methods", method, rule), cost):
                plotted.setdefault(COSTS[key], {})[method] = point
    if not plotted:
        return None
    return draw_costs(
        plotted,
        name="cost",
        title="Accuracy against cost",
        y_label=_axis_label(rule),
    )


def _relations(summary: Mapping) -> dict[str, Mapping]:
    """The largest relations, the larger first."""
    relations = _get(summary, "by_relation") or {}
    by_size = sorted(relations.items(), key=lambda entry: -(_get(entry[1], "num_items") or 0))
    return dict(by_size[:MAX_RELATIONS])


def _calibration(summary: Mapping, methods: Sequence[str]) -> Markup | None:
    curves = {}
    for method in methods:
        bins = _get(summary, "methods", method, "calibration") or []
        filled = [entry for entry in bins if _get(entry, "count")]
        total = sum(entry["count"] for entry in filled)
        curves[method] = [
            # Area by share of the answers, never too small to see.
            Point(
                entry["confidence"],
                entry["accuracy"],
                size=2.5 + 8 * math.sqrt(entry["count"] / total),
            )
            for entry in filled
        ]
    curves = {method: points for method, points in curves.items() if points}
    if not curves:
        return None
    return draw_curves(
        {"share right": curves},
        name="calibration",
        title="Share of right answers against the confidence of the answer",
        x_label="confidence",
        is_calibration=True,
    )


def _examples(rows: pandas.DataFrame, methods: Sequence[str], rule: str) -> dict | None:
    """Items on which some methods are right and others wrong, each answer with its methods.

    Paraphrases that differ among themselves do not count, unless no two other methods were run.
    """
    several = len(set(methods) - {FusionMethod.PER_PROMPT}) > 1
    compared = rows[rows["method"] != FusionMethod.PER_PROMPT] if several else rows
    differs = compared.groupby("id", sort=False)[rule].nunique() > 1
    found = list(differs.index[differs])
    if not found:
        return None
    shown = _spread_out(found, MAX_EXAMPLES)
    rows = rows[rows["id"].isin(shown)]
    rows = rows.assign(place=rows["method"].map(methods.index), is_right=rows[rule].eq(True))
    rows = rows.sort_values(["place", "paraphrase_index"], kind="stable")
    groups = dict(iter(rows.groupby("id")))
    examples = [_example(id, groups[id]) for id in shown]
    return {
        "shown": examples,
        "of": len(found),
        "relations": sorted({example["relation"] for example in examples} - {None}),
        "methods": methods,
    }


def _example(id: object, group: pandas.DataFrame) -> dict:
    labels: dict[tuple[bool, str], list[str]] = {}
    for record in group.itertuples():
        label = record.method
        if label == FusionMethod.PER_PROMPT:
            label = f"{label} {int(record.paraphrase_index)}"
        labels.setdefault((record.is_right, record.prediction), []).append(label)
    first = group.iloc[0]
    return {
        "id": id,
        "question": first["question"],
        "relation": first["relation"] if isinstance(first["relation"], str) else None,
        "answers": list(first["answers"]),
        "paraphrases": list(first["paraphrases"]),
        "predictions": sorted(
            ((is_right, text, names) for (is_right, text), names in labels.items()),
            key=lambda prediction: not prediction[0],
        ),
        "right": _names(group[group["is_right"]]["method"]),
        "wrong": _names(group[~group["is_right"]]["method"]),
    }


def _names(methods: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(methods))
