"""Statistics against worked examples, slow twins and simulation; summaries of small runs."""

import json
import math
import warnings
from fractions import Fraction

import numpy as np
import pandas
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from minifuse.errors import UsageError
from minifuse.evaluation.statistics import (
    ALL_ALIKE,
    ENSEMBLES,
    FUSED,
    MEASURES,
    NO_ITEM,
    ONE_ITEM,
    agreement,
    bootstrap_p,
    calibration,
    compare,
    count_flips,
    declare_family,
    detectable_mean,
    detectable_share,
    holm,
    intervals,
    mcnemar,
    resample_means,
    summarise,
)
from minifuse.evaluation.tables import make_table

# ---- Bootstrap


def slow_resample(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """One draw, one column, one item at a time."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_resamples):
        drawn = rng.integers(0, len(values), size=len(values))
        row = []
        for column in range(values.shape[1]):
            there = [values[item, column] for item in drawn if not np.isnan(values[item, column])]
            row.append(math.fsum(there) / len(there) if there else math.nan)
        found.append(row)
    return np.array(found)


def test_resampling_against_a_loop(monkeypatch):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(7, 4))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[1:, 3] = np.nan  # many draws have none of it
    expected = slow_resample(values, 50, seed=3)
    assert np.isnan(expected[:, 3]).any()
    np.testing.assert_allclose(resample_means(values, num_resamples=50, seed=3), expected, 1e-12)
    # In blocks the same draws.
    monkeypatch.setattr("minifuse.evaluation.statistics._BLOCK_LEN", 20)
    np.testing.assert_allclose(resample_means(values, num_resamples=50, seed=3), expected, 1e-12)
    other = resample_means(values, num_resamples=50, seed=4)
    assert not np.allclose(other, expected, equal_nan=True)


def test_intervals_are_percentiles_of_the_resampled_means():
    values = np.random.default_rng(2).normal(size=(9, 2))
    values[3, 1] = np.nan
    expected = slow_resample(values, 200, seed=0)
    for column, found in enumerate(intervals(values, num_resamples=200, seed=0)):
        assert found["mean"] == pytest.approx(np.nanmean(values[:, column]))
        assert found["low"] == pytest.approx(np.percentile(expected[:, column], 2.5))
        assert found["high"] == pytest.approx(np.percentile(expected[:, column], 97.5))
        assert found["num_items"] == 9 - column
        assert "note" not in found


def test_where_no_interval_can_be_had():
    nan = math.nan
    values = np.array([[1.0, nan, nan, 0.0, 1.0], [0.5, 2.0, nan, 0.0, nan]])
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


def test_intervals_cover_the_truth():
    """300 samples of 150 items: the share that covers has a standard deviation of 0.0126.

    Allowed are 4 of those, and 0.01 for the percentile method's known want at this size.
    """
    rng = np.random.default_rng(0)
    truth = 0.35
    samples = (rng.random((150, 300)) < truth).astype(float)
    found = intervals(samples, num_resamples=1000, seed=1)
    covered = np.mean([entry["low"] <= truth <= entry["high"] for entry in found])
    sd = math.sqrt(0.95 * 0.05 / 300)
    assert 0.95 - 4 * sd - 0.01 < covered < 0.95 + 4 * sd


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


def test_bootstrap_p_agrees_with_the_t_test():
    """500 differences are close to normal; with 20,000 resamples p has a sd below 0.004."""
    rng = np.random.default_rng(0)
    for shift in (0.02, 0.05, 0.09):
        values = rng.normal(size=(500, 1))
        values += shift - values.mean()
        found = bootstrap_p(resample_means(values, num_resamples=20_000, seed=1)[:, 0])
        wanted = scipy.stats.ttest_1samp(values[:, 0], 0).pvalue
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
    assert detectable_mean(math.nan, 5) is None


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
    assert found["bins"][1]["accuracy"] is None
    gaps = (abs(0.05 - 1 / 3), abs(0.275 - 1 / 2), abs(2.95 / 3 - 2 / 3))
    assert found["ece"] == pytest.approx((3 * gaps[0] + 2 * gaps[1] + 3 * gaps[2]) / 8)
    assert calibration([], [])["ece"] is None
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
    assert count_flips(before, after) == {"right_to_wrong": 1, "wrong_to_right": 2, "num_items": 5}
    # Shares: of the four prompts of an item one is right.
    found = count_flips(np.array([0.25, 0.5]), np.array([1.0, 0.0]))
    assert found == {"right_to_wrong": 0.5, "wrong_to_right": 0.75, "num_items": 2}


# ---- A run

ANSWERS = {True: "Paris", False: "Rome"}


def make_records(
    right: dict[str, list], logprobs: dict[str, list] | None = None, relations: str = ""
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
    assert fused["flips_vs_origin"] == {"right_to_wrong": 1, "wrong_to_right": 2, "num_items": 6}
    # Items 1 and 2 have half of their prompts right.
    wanted = {"right_to_wrong": 1, "wrong_to_right": 2, "num_items": 6}
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
    resampled = slow_resample(differences[:, None], 200, seed=0)[:, 0]
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
    with pytest.raises(UsageError, match="id 'q005', n 2, method fused twice"):
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
