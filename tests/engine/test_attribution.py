"""What each segment did for an answer: attention by the dense decoder, worth by other requests."""

import math

import pytest
import reference
import torch
from engine_cases import EVERY_METHOD, REQUEST, TOLERANCE, assert_same, flat, make_case

from minifuse.dense import plain_passage, run_passages
from minifuse.engine import Request
from minifuse.errors import UsageError
from minifuse.layout import Encoding
from minifuse.methods import FusionMethod, SegmentWeights, leave_out, make_answers

NEW_TOKENS = 5
COUNT = len(REQUEST["segments"])


@pytest.fixture(scope="module")
def results(fuser):
    return fuser.generate(**REQUEST, methods="all", max_new_tokens=NEW_TOKENS, attribution=True)


def shares_by_hand(fuser, truth, passage, parts: list[int], num_tokens: int) -> list[float]:
    """Mean attention of the last tokens but one to each part, by the dense decoder.

    parts: the number of each token's part
    """
    layers = []
    run_passages(fuser.model.config, truth.params, [passage], attention=layers)
    mean = torch.stack([probs for (probs,) in layers]).mean((0, 1))[-num_tokens:].mean(0)
    found = torch.zeros(max(parts) + 1, dtype=mean.dtype).index_add(0, torch.tensor(parts), mean)
    return found.tolist()


def check_shares(attribution, wanted):
    """wanted: of prefix, every segment, suffix, answer"""
    found = [attribution.prefix, *attribution.segments, attribution.suffix, attribution.answer]
    assert sum(found) == pytest.approx(1, abs=1e-5)
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("method", ["fused", "fused_weighted", "fused_auto", "fused_plain"])
def test_attention_of_fused_streams(fuser, truth, results, method):
    case, answer = make_case(fuser, **REQUEST), results[method]
    forced = answer.token_ids[:-1]
    weights = truth.weights(case, method)
    passage = reference.fused_as_a_passage(case, method, weights, forced)
    parts = [0] * len(case.prefix_ids)
    for number, ids in enumerate(case.segment_ids, 1):
        parts += [number] * len(ids)
    parts += [COUNT + 1] * len(case.suffix_ids) + [COUNT + 2] * len(forced)
    wanted = shares_by_hand(fuser, truth, passage, parts, len(answer.token_ids))
    check_shares(answer.attribution, wanted)


@pytest.mark.parametrize("index", range(COUNT))
def test_attention_of_single_streams(fuser, truth, results, index):
    case, answer = make_case(fuser, **REQUEST), results["per_prompt"][index]
    forced = answer.token_ids[:-1]
    parts = [0] * len(case.prefix_ids) + [1 + index] * len(case.segment_ids[index])
    parts += [COUNT + 1] * len(case.suffix_ids) + [COUNT + 2] * len(forced)
    passage = plain_passage(case.prompt(index) + forced)
    wanted = shares_by_hand(fuser, truth, passage, parts, len(answer.token_ids))
    check_shares(answer.attribution, wanted)


def test_attention_of_an_ensemble_is_the_mean_of_its_streams(fuser, truth, results):
    case, answer = make_case(fuser, **REQUEST), results["logit_avg"]
    forced, wanted = answer.token_ids[:-1], torch.zeros(COUNT + 3)
    for index in range(COUNT):
        parts = [0] * len(case.prefix_ids) + [1 + index] * len(case.segment_ids[index])
        parts += [COUNT + 1] * len(case.suffix_ids) + [COUNT + 2] * len(forced)
        passage = plain_passage(case.prompt(index) + forced)
        wanted += torch.tensor(shares_by_hand(fuser, truth, passage, parts, len(answer.token_ids)))
    check_shares(answer.attribution, (wanted / COUNT).tolist())


def worth(fuser, answer, **changes) -> list | float:
    """The answer's log-probability in a request that is asked another way."""
    request = {**REQUEST, "methods": answer.method, **changes}
    found = fuser.distributions(**request, continuation=answer.token_ids)[request["methods"]]
    picks = torch.tensor(answer.token_ids)[:, None]
    if isinstance(found, list):
        return [float(own.gather(1, picks).sum()) for own in found]
    return float(found.gather(1, picks).sum())


def test_worth_behind_each_segment_alone(fuser, results):
    for answer in flat(results):
        wanted = worth(fuser, answer, methods="per_prompt")
        assert answer.attribution.alone == pytest.approx(wanted, abs=NEW_TOKENS * TOLERANCE)


@pytest.mark.parametrize("method", ["logit_avg", "prob_avg", "prob_max", "fused_plain"])
@pytest.mark.parametrize("index", range(COUNT))
def test_worth_without_a_segment_is_that_of_the_others(fuser, results, method, index):
    answer = results[method]
    found = answer.attribution.without[index]
    others = [text for i, text in enumerate(REQUEST["segments"]) if i != index]
    if method == "fused_plain":
        # The others stay where they were: no request without the segment has them there.
        assert math.isfinite(found)
        assert found != 0
        return
    wanted = worth(fuser, answer, segments=others) - sum(answer.logprobs)
    assert found == pytest.approx(wanted, abs=2 * NEW_TOKENS * TOLERANCE)


@pytest.mark.parametrize("index", range(COUNT))
def test_a_segment_left_out_has_no_weight(fuser, results, index):
    answer = results["fused"]
    weights = [float(i != index) for i in range(COUNT)]
    wanted = worth(fuser, answer, methods="fused_weighted", weights=weights)
    found = answer.attribution.without[index] + sum(answer.logprobs)
    assert found == pytest.approx(wanted, abs=2 * NEW_TOKENS * TOLERANCE)


def test_a_single_stream_is_nothing_without_its_segment(results):
    for index, answer in enumerate(results["per_prompt"]):
        wanted = [None if i == index else 0 for i in range(COUNT)]
        assert list(answer.attribution.without) == pytest.approx(wanted)


def test_leaving_out_scales_the_others_up():
    weights = SegmentWeights(uniform=(1 / 3,) * 3, chosen=(0.5, 0.3, 0.2))
    ids = ((5,), (6,), (7,))

    def answer(method, own=weights):
        (made,) = make_answers(FusionMethod(method), own, ids, Encoding.ALIGNED, None)
        return made

    (view,) = leave_out(answer("fused_weighted"), 0).views
    assert view.biases == pytest.approx((-math.inf, math.log(0.6), math.log(0.4)))
    left = leave_out(answer("weighted_prob_avg"), 2)
    assert left.weights == pytest.approx((0.625, 0.375))
    assert [v.indices for v in left.views] == [(0,), (1,)]
    assert leave_out(answer("prob_max"), 1).weights is None
    heavy = SegmentWeights(uniform=(1 / 3,) * 3, chosen=(1.0, 0.0, 0.0))
    assert leave_out(answer("fused_weighted", heavy), 0) is None
    assert leave_out(answer("weighted_avg", heavy), 0) is None


def test_answers_stay_what_they_are(fuser, results):
    plain = fuser.generate(**REQUEST, methods="all", max_new_tokens=NEW_TOKENS)
    assert_same(results, plain)
    assert all(g.attribution is None for g in flat(plain))
    assert "attribution" not in plain["fused"].to_json()
    fields = results["fused"].to_json()["attribution"]
    assert list(fields) == ["attention", "without", "alone"]


@pytest.mark.parametrize("suffix", ["A:", ""])
def test_in_batches(fuser, suffix):
    segments = [text.strip() + " Z" for text in REQUEST["segments"]]
    requests = [
        Request(segments, REQUEST["prefix"], suffix),
        Request(segments[:1], "", suffix),
        Request(segments * 2, REQUEST["prefix"], suffix),
    ]
    options = {"methods": "all", "max_new_tokens": NEW_TOKENS, "attribution": True}
    together = fuser.generate_batch(requests, **options)
    for request, found in zip(requests, together, strict=True):
        (alone,) = fuser.generate_batch([request], **options)
        assert set(found) == set(EVERY_METHOD)
        for one, other in zip(flat(found), flat(alone), strict=True):
            assert one.token_ids == other.token_ids
            ours, theirs = one.attribution.to_json(), other.attribution.to_json()
            assert ours["attention"]["segments"] == pytest.approx(
                theirs["attention"]["segments"], abs=1e-4
            )
            assert ours["without"] == pytest.approx(theirs["without"], abs=1e-3)
            assert ours["alone"] == pytest.approx(theirs["alone"], abs=1e-3)


def test_it_is_yes_or_no(fuser):
    with pytest.raises(UsageError, match="attribution is 'yes'"):
        fuser.generate(**REQUEST, attribution="yes")
