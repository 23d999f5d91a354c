"""Continuations, scored under every method."""

import pytest
import torch
from engine_cases import EVERY_METHOD, REQUEST, SEGMENTS, TOLERANCE, assert_same, make_case
from reference import METHODS

from minifuse.engine import Request
from minifuse.errors import UsageError
from minifuse.pool import LABEL_COUNTS


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("suffix", ["A:", ""])
@pytest.mark.parametrize("weights", [None, (0, 2, 1)], ids=str)
def test_score_is_the_teacher_forced_sum(fuser, truth, positions, suffix, weights):
    segments = [text.strip() + " Z" for text in SEGMENTS]
    request = {"prefix": "def f:\n", "segments": segments, "suffix": suffix, "weights": weights}
    request["positions"] = positions
    continuations = ["Z", " the value of the model", "é日本", "42\n"]
    scores = fuser.score(**request, continuations=continuations, methods="all")
    assert list(scores) == [m for m in scores if m != "vote"]
    assert set(scores) == set(METHODS)
    check_scores(fuser, truth, request, continuations, scores)


def check_scores(fuser, truth, request, continuations, scores):
    case = make_case(fuser, **request)
    encode = fuser.model.tokenizer.encode
    for number, text in enumerate(continuations):
        ids = tuple(encode(text, is_start=False))
        for method, values in scores.items():
            indices = range(case.num_segments) if method == "per_prompt" else [None]
            for index in indices:
                value = values[number] if index is None else values[index][number]
                wanted = truth.score(case, method, ids, index)
                assert value == pytest.approx(wanted, abs=len(ids) * TOLERANCE), (method, text)


def test_score_of_more_continuations_than_a_table_has_labels(fuser, truth):
    continuations = [f" {n} value{'?' * (n % 4)}" for n in range(150)] + ["Z"]
    methods = ["per_prompt", "fused", "prob_max"]
    scores = fuser.score(**REQUEST, continuations=continuations, methods=methods)
    # Four views: more streams than labels, so several groups.
    assert 4 * len(continuations) > LABEL_COUNTS[0]
    assert {len(values) for values in (scores["fused"], *scores["per_prompt"])} == {151}
    few = [0, 1, 61, 62, 63, 64, 123, 124, 149, 150]
    picked = {
        "fused": [scores["fused"][i] for i in few],
        "prob_max": [scores["prob_max"][i] for i in few],
        "per_prompt": [[values[i] for i in few] for values in scores["per_prompt"]],
    }
    check_scores(fuser, truth, REQUEST, [continuations[i] for i in few], picked)
    alone = [fuser.score(**REQUEST, continuations=[continuations[i]])["fused"][0] for i in few]
    torch.testing.assert_close(picked["fused"], alone, atol=4 * TOLERANCE, rtol=0)


def test_generate_and_score_is_both(family_fuser):
    """From one prefill, in a batch of rows with different numbers of continuations."""
    requests = [
        Request(**REQUEST),
        Request(segments=["a key?", "the value of a key?"], suffix="A:", prefix="def f:\n"),
        Request(segments=["Q: Z"], suffix=" ="),
    ]
    texts = [[" val", "éé", "re"], ["éé"], [" Z", "éé"]]
    # As long as an answer may get, so that dynamic frequencies are the same in all calls.
    encode = family_fuser.model.tokenizer.encode
    lengths = [max(len(encode(t, is_start=False)) for t in group) for group in texts]
    options = {"methods": "all", "max_new_tokens": lengths[0]}
    assert len(set(lengths)) == 1 < lengths[0]
    both = dict(family_fuser.generate_and_score(requests, texts, batch_size=2, **options))
    scored = [method for method in EVERY_METHOD if method != "vote"]
    assert sorted(both) == [0, 1, 2]
    for index, by_count in both.items():
        request, continuations = requests[index], texts[index]
        ((count, (results, scores)),) = by_count.items()
        assert count == len(request.segments)
        own = {"segments": request.segments, "prefix": request.prefix, "suffix": request.suffix}
        assert_same(results, family_fuser.generate(**own, **options))
        alone = family_fuser.score(**own, continuations=continuations, methods=scored)
        assert set(scores) == set(alone) == set(scored)
        for method, values in scores.items():
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(alone[method]), atol=TOLERANCE, rtol=0
            )


@pytest.mark.parametrize("suffix", ["A:", ""])
@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("weights", [None, "confidence", (3, 1, 2, 4)], ids=str)
def test_several_numbers_of_segments_at_once_are_each_alone(fuser, suffix, positions, weights):
    segments = [*SEGMENTS, "Q: what is the value of this long key, and why not? Why?\n"]
    request = {"prefix": REQUEST["prefix"], "segments": segments, "suffix": suffix}
    texts, counts = [" val", "éé"], (2, 4, 1, 3)
    options = {"methods": "all", "max_new_tokens": 4, "positions": positions}
    requests = [Request(**request, weights=weights)] * 2
    both = dict(
        fuser.generate_and_score(requests, [texts] * 2, counts=counts, batch_size=2, **options)
    )
    assert sorted(both) == [0, 1]
    for found in both.values():
        assert list(found) == list(counts)
        for count, (results, scores) in found.items():
            own = request | {"segments": segments[:count]}
            own["weights"] = weights[:count] if isinstance(weights, tuple) else weights
            assert_same(results, fuser.generate(**own, **options))
            alone = fuser.score(**own, continuations=texts, methods=METHODS, positions=positions)
            torch.testing.assert_close(scores, alone, atol=TOLERANCE, rtol=0)


def test_several_numbers_of_segments_share_what_they_can(fuser, monkeypatch):
    """Each segment is encoded once, and each single prompt is run once."""
    lengths = []
    prefill = fuser.executor.prefill
    monkeypatch.setattr(
        fuser.executor,
        "prefill",
        lambda pool, groups: lengths.append(len(groups[0][1])) or prefill(pool, groups),
    )
    request = Request(**REQUEST)
    options = {"methods": ["per_prompt", "prob_avg"], "max_new_tokens": 1}
    for counts in (None, (1, 2, 3)):
        list(fuser.generate_and_score([request], [[" Z"]], counts=counts, **options))
    assert lengths[-1] == lengths[-2] == sum(map(len, make_case(fuser, **REQUEST).segment_ids))


def test_numbers_of_segments_are_checked(fuser):
    for counts in ((0, 1), (2, 4), (-1,)):
        with pytest.raises(UsageError, match=r"a count is .*wanted 1 to 3, the segments there"):
            fuser.generate_and_score([Request(**REQUEST)], [["a"]], counts=counts)
    with pytest.raises(UsageError, match="counts are for greedy answers"):
        fuser.generate_and_score([Request(**REQUEST)], [["a"]], counts=(1, 2), temperature=1.0)


def test_generate_and_score_checks_its_input(fuser):
    request = Request(segments=["a"])
    with pytest.raises(UsageError, match="1 requests but 0 lists of continuations"):
        fuser.generate_and_score([request], [])
    with pytest.raises(UsageError, match="wanted a list of at least one string"):
        fuser.generate_and_score([request], [[]])
    assert list(fuser.generate_and_score([], [])) == []


def test_score_agrees_with_generate(fuser):
    """A generated token, encoded again to the same id, scores its own log-probability."""
    results = fuser.generate(**REQUEST, methods="all", max_new_tokens=1)
    for method, generation in results.items():
        if method in ("per_prompt", "vote"):
            continue
        ids = list(generation.token_ids)
        if fuser.model.tokenizer.encode(generation.text, is_start=False) != ids:
            continue
        scores = fuser.score(**REQUEST, continuations=[generation.text], methods=method)
        assert scores[method][0] == pytest.approx(sum(generation.logprobs), abs=TOLERANCE)


def test_score_is_normalised(fuser):
    """Over all tokens that text can spell, probabilities sum to at most one, and nearly to it."""
    tokenizer = fuser.model.tokenizer
    texts = [tokenizer.decode([i]) for i in range(fuser.model.config.vocab_size)]
    texts = [t for i, t in enumerate(texts) if t and tokenizer.encode(t, is_start=False) == [i]]
    scores = fuser.score(**REQUEST, continuations=texts, methods="all")
    for method in ("fused", "prob_max", "prob_avg", "logit_avg", "concat"):
        total = torch.tensor(scores[method]).exp().sum()
        # Half the vocabulary is lone bytes, which no text spells.
        assert 0.1 < total < 1
