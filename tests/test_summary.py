"""Summaries of small runs by hand, and two runs compared."""

import json
import math
import warnings

import numpy as np
import pandas
import pytest

from minifuse.errors import UsageError
from minifuse.evaluation.statistics import (
    ALL_ALIKE,
    ONE_ITEM,
    detectable_mean,
    detectable_share,
    holm,
    intervals,
    mcnemar,
    resample_means,
)
from minifuse.evaluation.summary import (
    ENSEMBLES,
    FUSED,
    MEASURES,
    compare,
    declare_family,
    summarise,
)
from minifuse.evaluation.tables import make_table

ANSWERS = {True: "Paris", False: "Rome"}


def make_records(
    right: dict[str, list],
    logprobs: dict[str, list] | None = None,
    relations: str = "",
    draw: int = 0,
) -> list[dict]:
    """right: by method one flag per item, for per_prompt one list of flags per item."""
    records = []
    for method, flags in right.items():
        for item, flag in enumerate(flags):
            prompts = enumerate(flag) if isinstance(flag, list) else [(None, flag)]
            n = len(right["per_prompt"][item]) if "per_prompt" in right else 2
            for index, is_right in prompts:
                logprob = None if method == "vote" else -1.0 - item % 3 - 0.5 * (index or 0)
                if logprobs and method in logprobs:
                    logprob = logprobs[method][item]
                records.append(
                    {
                        "id": f"q{item:03}",
                        "n": n,
                        "draw": draw,
                        "question": f"question {item}",
                        "relation": relations[item] if relations else None,
                        "paraphrases": ["x"] * n,
                        "answers": ["Paris"],
                        "method": method,
                        "paraphrase_index": index,
                        "positions": None,
                        "prediction": ANSWERS[bool(is_right)],
                        "token_ids": [1],
                        "logprobs": [-0.5],
                        "answer_logprob": logprob,
                        "prompt_tokens": 10 + item,
                        "num_streams": 2,
                        "timings": {"prefill_ms": 4.0, "decode_ms": 1.0},
                    }
                )
    return records


RIGHT = {
    "origin": [1, 1, 0, 0, 1, 0],
    "per_prompt": [[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0]],
    "logit_avg": [1, 0, 0, 0, 1, 0],
    "vote": [1, 1, 0, 0, 1, 0],
    "fused": [1, 1, 1, 0, 0, 1],
}
FAST = {"num_resamples": 200, "seed": 0}


def summary_of(records: list[dict], **config: object) -> dict:
    found = summarise(make_table(records, num_processes=1), FAST | config)
    json.dumps(found, allow_nan=False)
    return found


def test_a_summary_by_hand():
    found = summary_of(make_records(RIGHT, relations="aabbbb"))
    assert (found["num_items"], found["n"], found["rule"]) == (6, 2, "match_lemma")
    assert (found["draws"], found["interval"]) == (1, "95% percentile bootstrap over questions")
    assert found["num_resamples"] == 200
    means = {name: entry["match_lemma"]["mean"] for name, entry in found["methods"].items()}
    wanted = {"origin": 3, "per_prompt": 3, "logit_avg": 2, "vote": 3, "fused": 4}
    assert means == {name: pytest.approx(count / 6) for name, count in wanted.items()}
    assert list(means) == list(wanted)  # the usual order of methods
    assert found["any_of_n"]["match_lemma"] == pytest.approx(4 / 6)
    assert found["all_of_n"]["match_lemma"] == pytest.approx(2 / 6)
    assert found["intervals"]["any_of_n"]["match_lemma"]["low"] < 4 / 6

    single = found["methods"]["per_prompt"]
    assert single["consistency"] == pytest.approx(4 / 6)
    spread = single["spread"]
    assert spread["by_paraphrase"] == pytest.approx([3 / 6, 3 / 6])
    assert spread["sd"] == 0.0
    assert (spread["item_best"], spread["item_worst"]) == pytest.approx((4 / 6, 2 / 6))
    by_logprob = spread["answer_logprob"]
    assert by_logprob["by_paraphrase"] == pytest.approx([-2.0, -2.5])
    assert (by_logprob["best"], by_logprob["worst"]) == (-2.0, -2.5)
    assert by_logprob["mean"] == -2.25
    assert by_logprob["sd"] == pytest.approx(math.sqrt(0.125))

    fused = found["methods"]["fused"]
    assert fused["flips_vs_origin"] == {"right_to_wrong": 1, "wrong_to_right": 2, "num_cells": 6}
    # Items 1 and 2 have half of their prompts right.
    wanted = {"right_to_wrong": 1, "wrong_to_right": 2, "num_cells": 6}
    assert fused["flips_vs_mean_single"] == wanted
    assert found["methods"]["logit_avg"]["flips_vs_mean_single"]["right_to_wrong"] == 1.0
    assert single["flips_vs_mean_single"] is None
    assert found["methods"]["origin"]["flips_vs_origin"] is None
    assert fused["spread"] is None
    assert fused["ece"] == pytest.approx(abs(math.exp(-0.5) - 4 / 6))
    assert sum(entry["count"] for entry in single["calibration"]) == 12
    assert fused["cost"] == {
        "num_streams": 2.0,
        "prompt_tokens": 12.5,
        "num_tokens": 1.0,
        "prefill_ms": 4.0,
        "decode_ms": 1.0,
    }
    vote = found["methods"]["vote"]["answer_logprob"]
    assert (vote["mean"], vote["num_items"]) == (None, 0)

    by_relation = found["by_relation"]
    assert {name: entry["num_items"] for name, entry in by_relation.items()} == {"a": 2, "b": 4}
    assert by_relation["b"]["methods"]["fused"]["match_lemma"]["mean"] == 0.5
    assert by_relation["a"]["methods"]["fused"]["match_lemma"]["note"] == ALL_ALIKE

    assert found["family"] == ["fused - logit_avg", "fused - vote"]
    assert found["by_n"]["2"]["fused"]["match_lemma"] == fused["match_lemma"]
    assert set(found["left_out"].values()) == {0}


def test_comparisons_by_hand():
    logprobs = {"fused": [-1, -2, -3, -4, -5, -6], "logit_avg": [-2, -2, -4, -4, -6, -7.5]}
    found = summary_of(make_records(RIGHT, logprobs))["comparisons"]
    pairs = [(entry["first"], entry["second"], entry["measure"]) for entry in found]
    assert pairs == [
        ("fused", "logit_avg", "match_lemma"),
        ("fused", "vote", "match_lemma"),
        ("fused", "logit_avg", "answer_logprob"),  # vote has no log-probability
    ]
    accuracy, vote, logprob = found
    assert (accuracy["first_only"], accuracy["second_only"]) == (3, 1)
    assert accuracy["difference"] == pytest.approx(2 / 6)
    assert accuracy["p_value"] == accuracy["p_mcnemar"] == mcnemar(3, 1)
    assert vote["p_value"] == mcnemar(2, 1)
    assert [accuracy["p_holm"], vote["p_holm"]] == holm([accuracy["p_value"], vote["p_value"]])
    assert accuracy["detectable"] == detectable_share(4 / 6, 6)

    differences = np.array([1, 0, 1, 0, 1, 1.5])
    resampled = resample_means(differences[:, None, None], num_resamples=200, seed=0)[:, 0]
    assert logprob["difference"] == 0.75
    assert logprob["low"] == pytest.approx(np.percentile(resampled, 2.5))
    assert logprob["high"] == pytest.approx(np.percentile(resampled, 97.5))
    below = sum(value <= 1e-15 for value in resampled)
    assert logprob["p_value"] == pytest.approx(2 * (1 + below) / 201)
    assert logprob["p_holm"] == logprob["p_value"]
    assert logprob["p_mcnemar"] is None
    assert logprob["detectable"] == pytest.approx(detectable_mean(differences.std(ddof=1), 6))


def test_the_family_is_declared_before_the_run():
    assert declare_family(["fused", "origin", "vote", "fused_auto", "prob_avg"]) == [
        ["fused", "prob_avg"],
        ["fused", "vote"],
        ["fused_auto", "prob_avg"],
        ["fused_auto", "vote"],
    ]
    everything = declare_family([*FUSED, *ENSEMBLES])
    assert len(everything) == 4 * 7
    own = [["fused", "per_prompt"], ["fused", "concat"]]
    found = summary_of(make_records(RIGHT), family=own)
    assert found["family"] == ["fused - per_prompt"]  # concat was not run
    accuracy = found["comparisons"][0]
    # A mean over prompts is not right or wrong.
    assert accuracy["p_mcnemar"] is None
    assert accuracy["p_value"] == accuracy["p_bootstrap"]
    with pytest.raises(UsageError, match="family holds 'fused'; wanted pairs of methods"):
        summary_of(make_records(RIGHT), family=["fused"])


def test_questions_are_what_is_resampled():
    """Five equal prompts of a question say no more than one of them."""
    flags = [1, 0, 0, 1, 0, 1, 1, 0]
    records = make_records({"origin": flags, "per_prompt": [[flag] * 5 for flag in flags]})
    methods = summary_of(records)["methods"]
    assert methods["per_prompt"]["match_lemma"] == methods["origin"]["match_lemma"]
    assert methods["per_prompt"]["consistency"] == 1.0


def test_the_order_of_rows_does_not_matter():
    table = make_table(make_records(RIGHT, relations="aabbbb"))
    expected = summarise(table, FAST)
    for seed in range(3):
        assert summarise(table.sample(frac=1, random_state=seed), FAST) == expected
    assert summarise(table, FAST | {"seed": 1}) != expected


def test_origin_is_the_first_single_prompt():
    without = {name: flags for name, flags in RIGHT.items() if name != "origin"}
    with_origin, found = summary_of(make_records(RIGHT)), summary_of(make_records(without))
    for method in without:
        flips = found["methods"][method]["flips_vs_origin"]
        assert flips == with_origin["methods"][method]["flips_vs_origin"]
        assert flips


@pytest.mark.parametrize(
    ("right", "word"),
    [
        ({"fused": [1]}, ONE_ITEM),
        ({"fused": [1], "per_prompt": [[1]], "logit_avg": [0]}, ONE_ITEM),
        ({"fused": [1], "vote": [0]}, ONE_ITEM),
        ({"fused": [0, 0, 0]}, ALL_ALIKE),
        ({}, None),
    ],
)
def test_hardly_anything(right, word):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary_of(make_records(right))
    assert set(found["methods"]) == set(right)
    for entry in found["methods"].values():
        assert entry["match_lemma"]["note"] == word
        assert (entry["match_lemma"]["low"] is None) == (word == ONE_ITEM)
    for entry in found["comparisons"]:
        assert entry["low"] is None
        assert entry["note"] == ONE_ITEM
    if "per_prompt" in right:
        assert found["methods"]["per_prompt"]["consistency"] is None
        assert found["methods"]["per_prompt"]["spread"]["sd"] is None
        assert found["any_of_n"]["match_lemma"] == 1.0


def test_items_without_paraphrases_do_no_harm():
    records = [
        record | {"n": 0, "paraphrases": []} for record in make_records({"fused": [1, 0, 1]})
    ]
    found = summary_of(records)
    assert found["methods"]["fused"]["match_lemma"]["mean"] == pytest.approx(2 / 3)
    assert found["any_of_n"] == {}


def test_what_is_missing_is_counted():
    """As after a crash: an item without one of its prompts, one without `fused`; and infinities."""
    records = make_records(RIGHT)
    gone = {("q001", "per_prompt", 1), ("q004", "fused", None)}
    records = [r for r in records if (r["id"], r["method"], r["paraphrase_index"]) not in gone]
    for record in records:
        if record["id"] == "q000" and record["method"] == "logit_avg":
            record["answer_logprob"] = -math.inf
    found = summary_of(records)
    assert found["left_out"]["per_prompt_incomplete"] == 1
    assert found["left_out"]["non_finite_logprobs"] == 1
    assert found["methods"]["per_prompt"]["match_lemma"]["num_items"] == 5
    assert found["methods"]["per_prompt"]["match_lemma"]["mean"] == pytest.approx(2.5 / 5)
    # The prompt that is left of the incomplete item counts nowhere.
    by_paraphrase = found["methods"]["per_prompt"]["spread"]["by_paraphrase"]
    assert by_paraphrase == pytest.approx([2 / 5, 3 / 5])
    assert found["methods"]["fused"]["match_lemma"]["num_items"] == 5
    assert found["methods"]["logit_avg"]["answer_logprob"]["num_items"] == 5
    counts = {(e["second"], e["measure"]): e["num_items"] for e in found["comparisons"]}
    assert counts[("logit_avg", "match_lemma")] == 5
    assert counts[("logit_avg", "answer_logprob")] == 4


def test_by_n_is_on_the_items_that_every_n_has():
    two = make_records({"fused": [1, 0, 1, 0]})
    five = [record | {"n": 5} for record in make_records({"fused": [1, 1, 0]})]
    found = summary_of(two + five)
    assert (found["n"], found["num_items"]) == (5, 3)
    assert found["left_out"] == {
        "items_without_n": 1,
        "items_of_by_n": 1,
        "items_without_draw": 0,
        "per_prompt_incomplete": 0,
        "non_finite_logprobs": 0,
    }
    means = {n: entry["fused"]["match_lemma"]["mean"] for n, entry in found["by_n"].items()}
    assert means == {"2": pytest.approx(2 / 3), "5": pytest.approx(2 / 3)}
    assert list(found["by_n"]) == ["2", "5"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "f1"}, "rule is 'f1'; wanted one of match_lemma, match_lemma_both"),
        ({"num_resamples": 0}, "num_resamples is 0; wanted an integer of at least 1"),
        ({"seed": -1}, "seed is -1; wanted an integer of at least 0"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(UsageError, match=message):
        summary_of(make_records(RIGHT), **config)


def test_bad_tables():
    table = make_table(make_records(RIGHT))
    with pytest.raises(UsageError, match="no column f1, confidence; wanted the table of a run"):
        summarise(table.drop(columns=["f1", "confidence"]), FAST)
    twice = pandas.concat([table, table.tail(1)])
    with pytest.raises(UsageError, match="id 'q005', n 2, draw 0, method fused twice"):
        summarise(twice, FAST)
    with pytest.raises(UsageError, match="paraphrase_index is not below n"):
        summarise(table.assign(n=1), FAST)


def test_other_rules_can_lead():
    records = make_records({"fused": [1, 1, 0], "vote": [0, 1, 0]})
    for record in records:
        record["prediction"] = f"{record['prediction']} or so"
    found = summary_of(records, rule="match_exact")
    assert found["methods"]["fused"]["match_lemma"]["mean"] == pytest.approx(2 / 3)
    assert [entry["measure"] for entry in found["comparisons"]] == ["match_exact"]
    assert found["comparisons"][0]["difference"] == 0


# ---- Several draws of shots


def test_an_equal_draw_changes_no_mean():
    """All counts double; of two draws that are alike, resampling the items alone has the width."""
    one = summary_of(make_records(RIGHT, relations="aabbbb"))
    two = summary_of(
        [r for draw in (0, 3) for r in make_records(RIGHT, relations="aabbbb", draw=draw)]
    )
    assert (two["draws"], two["num_items"]) == (2, 6)
    assert two["interval"] == "95% percentile bootstrap over questions and 2 draws of shots"
    for method, entry in one["methods"].items():
        other = two["methods"][method]
        for key in (*MEASURES, "num_items", "spread", "consistency", "cost"):
            assert other[key] == almost(entry[key]), (method, key)
        for key in ("flips_vs_origin", "flips_vs_mean_single"):
            doubled = entry[key] and {name: 2 * count for name, count in entry[key].items()}
            assert other[key] == doubled
    for key in ("any_of_n", "all_of_n", "best_single", "by_relation", "by_n"):
        assert two[key] == almost(one[key])
    for entry, other in zip(one["comparisons"], two["comparisons"], strict=True):
        for key in ("difference", "low", "high", "p_bootstrap", "num_items"):
            assert other[key] == almost(entry[key])
        assert other["by_draw"] == almost([entry["difference"]] * 2)
    assert set(two["left_out"].values()) == {0}


def almost(tree: object) -> object:
    """The same tree with numbers that may differ by rounding."""
    if isinstance(tree, dict):
        return {key: almost(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [almost(value) for value in tree]
    return pytest.approx(tree, rel=1e-9, abs=1e-12) if isinstance(tree, float) else tree


OTHER_RIGHT = {
    "origin": [1, 1, 1, 1, 1, 0],
    "per_prompt": [[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1]],
    "logit_avg": [1, 1, 1, 1, 1, 1],
    "vote": [1, 1, 1, 1, 1, 0],
    "fused": [1, 0, 0, 0, 0, 1],
}


def test_draws_of_opposite_signs_by_hand():
    records = make_records(RIGHT) + make_records(OTHER_RIGHT, draw=1)
    found = summary_of(records)
    # `fused` has 4 of 6 right and then 2; `logit_avg` 2 and then 6.
    assert found["methods"]["fused"]["match_lemma"]["mean"] == pytest.approx(6 / 12)
    assert found["methods"]["logit_avg"]["match_lemma"]["mean"] == pytest.approx(8 / 12)
    accuracy = found["comparisons"][0]
    assert (accuracy["first"], accuracy["second"]) == ("fused", "logit_avg")
    assert accuracy["difference"] == pytest.approx(-2 / 12)
    assert accuracy["by_draw"] == pytest.approx([2 / 6, -4 / 6])
    assert (accuracy["first_only"], accuracy["second_only"]) == (3, 5)
    assert accuracy["p_mcnemar"] is None
    assert accuracy["p_value"] == accuracy["p_bootstrap"]
    fused = found["methods"]["fused"]
    # The first draw's and the second's.
    flips = {"right_to_wrong": 1 + 4, "wrong_to_right": 2 + 1, "num_cells": 12}
    assert fused["flips_vs_origin"] == flips
    single = found["methods"]["per_prompt"]
    assert single["consistency"] == pytest.approx((4 + 5) / 12)
    assert single["spread"]["by_paraphrase"] == pytest.approx([(3 + 5) / 12, (3 + 6) / 12])
    assert found["any_of_n"]["match_lemma"] == pytest.approx((4 + 6) / 12)
    assert found["all_of_n"]["match_lemma"] == pytest.approx((2 + 5) / 12)
    assert fused["ece"] == pytest.approx(abs(math.exp(-0.5) - 6 / 12))


def test_a_difference_of_cells_is_resampled_both_ways():
    """The interval is that of the item by draw array of differences, made by hand."""
    records = make_records(RIGHT) + make_records(OTHER_RIGHT, draw=1)
    accuracy = summary_of(records)["comparisons"][0]
    differences = np.array(
        [
            [right["fused"][item] - right["logit_avg"][item] for right in (RIGHT, OTHER_RIGHT)]
            for item in range(6)
        ]
    )
    [wanted] = intervals(differences[..., None].astype(float), num_resamples=200, seed=0)
    assert (accuracy["low"], accuracy["high"]) == (wanted["low"], wanted["high"])


def test_an_item_that_lacks_a_draw_counts_in_the_other():
    records = make_records(RIGHT) + make_records(OTHER_RIGHT, draw=1)
    gone = [r for r in records if (r["id"], r["draw"]) != ("q005", 1)]
    found = summary_of(gone)
    assert found["left_out"]["items_without_draw"] == 1
    fused = found["methods"]["fused"]["match_lemma"]
    assert fused["mean"] == pytest.approx(5 / 11)
    assert fused["num_items"] == 6


def test_the_way_to_the_best_single_prompt():
    """Best of an item's two prompts is the first: -1, -2 or -3 nats by item, as in `make_records`.

    The best ensemble is prob_avg, 1 nat behind; fused goes a quarter of the way.
    """
    best = [-1.0 - item % 3 for item in range(6)]
    right = RIGHT | {"prob_avg": [0] * 6}
    logprobs = {
        "fused": [value - 0.75 for value in best],
        "prob_avg": [value - 1 for value in best],
        "logit_avg": [value - 2 for value in best],
    }
    found = summary_of(make_records(right, logprobs))
    assert found["best_single"]["answer_logprob"]["mean"] == pytest.approx(-2.0)
    assert found["best_single"]["match_lemma"]["mean"] == pytest.approx(4 / 6)
    assert found["best_single"]["answer_logprob"]["low"] < -2.0
    share = found["methods"]["fused"]["share_of_distance"]
    assert share.pop("reference") == "prob_avg"
    assert share == pytest.approx({"share": 0.25, "low": 0.25, "high": 0.25})
    assert found["methods"]["prob_avg"]["share_of_distance"] is None
    # vote has no log-probability, so that there may be no ensemble to start from.
    for gone in (["per_prompt"], ["prob_avg", "logit_avg"]):
        left = {name: flags for name, flags in right.items() if name not in gone}
        found = summary_of(make_records(left, logprobs))
        assert found["methods"]["fused"]["share_of_distance"] is None
    assert found["best_single"]
    # Ensembles that are ahead of every single prompt leave no way to go.
    ahead = logprobs | {"prob_avg": [0.0] * 6}
    found = summary_of(make_records(right, ahead))
    assert found["methods"]["fused"]["share_of_distance"] is None


# ---- Two runs


def test_two_runs_on_common_items():
    first = make_table(make_records({"fused": [1, 0, 0, 1, 0], "origin": [1] * 5}))
    records = make_records({"fused": [1, 1, 1, 0, 1, 1], "vote": [1] * 6})
    for record in records:
        if record["id"] == "q004":
            record["question"] = "another"
    second = make_table(records)
    found = compare(first, second, num_resamples=200)
    json.dumps(found, allow_nan=False)
    assert (found["num_items"], found["n"]) == (4, 2)
    assert found["left_out"] == {
        "items_only_in_a": 0,
        "items_only_in_b": 1,
        "items_that_differ": 1,
        "methods_only_in_a": ["origin"],
        "methods_only_in_b": ["vote"],
        "n_only_in_a": [],
        "n_only_in_b": [],
        "draws_only_in_a": [],
        "draws_only_in_b": [],
    }
    entries = {entry["measure"]: entry for entry in found["comparisons"]}
    assert list(entries) == list(MEASURES)
    exact = entries["match_exact"]
    assert (exact["method"], exact["a"], exact["b"]) == ("fused", 0.5, 0.75)
    assert (exact["a_only"], exact["b_only"], exact["difference"]) == (1, 2, 0.25)
    assert exact["p_value"] == mcnemar(1, 2)
    assert entries["f1"]["p_mcnemar"] is None
    assert entries["answer_logprob"]["difference"] == 0
    assert entries["answer_logprob"]["p_value"] == 1

    turned = {e["measure"]: e for e in compare(second, first, num_resamples=200)["comparisons"]}
    for measure, entry in entries.items():
        assert turned[measure]["difference"] == pytest.approx(-entry["difference"])
        assert turned[measure]["p_value"] == pytest.approx(entry["p_value"])
        assert turned[measure]["low"] == pytest.approx(-entry["high"])


def test_runs_with_nothing_in_common():
    records = make_records({"fused": [1, 0]})
    table = make_table(records)
    with pytest.raises(UsageError, match="the runs used 2 and 5 paraphrases"):
        compare(table, make_table([record | {"n": 5} for record in records]))
    with pytest.raises(UsageError, match="share no item: 0 ids are in both"):
        compare(table, make_table([record | {"id": record["id"] + "x"} for record in records]))
    with pytest.raises(UsageError, match="share no item: 2 ids are in both"):
        compare(table, make_table([record | {"answers": ["?"]} for record in records]))
    with pytest.raises(UsageError, match="share no method: fused, and vote"):
        compare(table, make_table([record | {"method": "vote"} for record in records]))


def test_holm_is_over_the_methods_of_each_measure():
    flags = {
        "fused": [1] * 8 + [0] * 8,
        "concat": [1] * 5 + [0] * 11,
        "prob_avg": [0] * 16,
    }
    first = make_table(make_records({method: [0] * 16 for method in flags}))
    found = compare(first, make_table(make_records(flags)), num_resamples=200)["comparisons"]
    for measure in ("match_exact", "f1"):
        own = [entry for entry in found if entry["measure"] == measure]
        assert len(own) == 3
        wanted = holm([entry["p_value"] for entry in own])
        assert [entry["p_holm"] for entry in own] == pytest.approx(wanted)


def test_two_runs_pair_by_item_and_draw():
    first = make_records({"fused": [1, 0, 0]}) + make_records({"fused": [0, 0, 0]}, draw=1)
    second = make_records({"fused": [1, 1, 0]}, draw=1) + make_records({"fused": [1, 0, 0]}, draw=2)
    found = compare(make_table(first), make_table(second), num_resamples=200)
    assert (found["draws"], found["num_items"]) == (1, 3)
    assert found["left_out"]["draws_only_in_a"] == [0]
    assert found["left_out"]["draws_only_in_b"] == [2]
    exact = next(e for e in found["comparisons"] if e["measure"] == "match_exact")
    assert (exact["a"], exact["b"]) == (0, pytest.approx(2 / 3))
    assert exact["p_value"] == mcnemar(0, 2)  # one draw is left

    both = [record | {"draw": 0} for record in second if record["draw"] == 2]
    both += [record for record in second if record["draw"] == 1]
    found = compare(make_table(first), make_table(both), num_resamples=200)
    exact = next(e for e in found["comparisons"] if e["measure"] == "match_exact")
    assert exact["by_draw"] == pytest.approx([0, 2 / 3])
    assert exact["difference"] == pytest.approx(2 / 6)
    assert exact["p_mcnemar"] is None

    with pytest.raises(UsageError, match="the runs used the draws 0, 1 and 7; wanted a draw"):
        compare(make_table(first), make_table([record | {"draw": 7} for record in second[:3]]))
