"""The engine against the dense reference, on tiny models of every family."""

import warnings
from dataclasses import replace

import pytest
import reference
import torch
from engine_cases import (
    EVERY_METHOD,
    REQUEST,
    SEGMENTS,
    TOLERANCE,
    assert_same,
    check_results,
    flat,
    make_case,
    nothing_compiles,
    requests,
    truth_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_answers

import minifuse
from minifuse.engine import Request
from minifuse.executor import DECODE_BLOCKS, PREFILL_SIZES
from minifuse.layout import PackedPrompt


@settings(max_examples=60)
@given(request=requests(), with_bos=st.booleans())
def test_every_method_equals_the_reference(fuser, bos_fuser, truth, request, with_bos):
    engine = bos_fuser if with_bos else fuser
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a segment of one token")
        results = engine.generate(**request, methods="all", max_new_tokens=3)
    assert set(results) == set(EVERY_METHOD)
    # Another computation may break a near tie in its own way, but such ties are rare.
    assert check_results(engine, truth, results, request, max_new_tokens=3) <= 1


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("suffix", ["A:", ""])
@pytest.mark.parametrize("weights", [None, "confidence", (3, 1, 2), (0, 2, 1), (1, 0, 0)], ids=str)
def test_greedy_answers_equal_the_reference(fuser, truth, positions, suffix, weights):
    """The plain decode loop of the reference, without a cache, comes to the same texts."""
    segments = [text.strip() + " Z" for text in SEGMENTS]
    request = {"prefix": "def f:\n", "segments": segments, "suffix": suffix, "weights": weights}
    request["positions"] = positions
    stop = ("qqq",)
    ours = fuser.generate(**request, methods="all", max_new_tokens=6, stop=stop)
    theirs = reference_answers(
        truth,
        make_case(fuser, **request),
        fuser.model.tokenizer.decode,
        max_new_tokens=6,
        eos_token_ids=fuser.model.eos_token_ids,
        stop=stop,
    )
    for method in EVERY_METHOD:
        mine, wanted = ours[method], theirs[method]
        if method != "per_prompt":
            mine, wanted = [mine], [wanted]
        for one, other in zip(mine, wanted, strict=True):
            assert list(one.token_ids) == other.token_ids, method
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason), method
            torch.testing.assert_close(
                list(one.logprobs), other.logprobs, atol=TOLERANCE, rtol=0, msg=method
            )


@settings(max_examples=15)
@given(request=requests())
def test_every_method_of_every_family_equals_the_reference(family_fuser, request):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a segment of one token")
        results = family_fuser.generate(**request, methods="all", max_new_tokens=3)
    truth = truth_of(family_fuser, request, 3)
    assert check_results(family_fuser, truth, results, request, max_new_tokens=3) <= 1


def test_families_batched_are_alone_and_stored_prefixes_are_their_own(family_fuser, family_folder):
    """Rows of a batch differ in length, so in the frequencies of dynamic RoPE as well."""
    long = {**REQUEST, "segments": [text * 2 for text in SEGMENTS]}
    requests = [Request(**REQUEST), Request(**long), Request(**REQUEST)]
    options = {"methods": "all", "max_new_tokens": 3}
    batch = family_fuser.generate_batch(requests, **options)
    for request, result in zip((REQUEST, long), batch, strict=False):
        fresh = minifuse.load(family_folder, compile=False)
        assert_same(result, fresh.generate(**request, **options))
        check_results(
            family_fuser, truth_of(family_fuser, request, 3), result, request, max_new_tokens=3
        )
    assert_same(batch[0], batch[2])


def test_families_score_by_the_reference(family_fuser):
    continuations = [" the value", "é", "return the key of 42"]
    lengths = [len(family_fuser.model.tokenizer.encode(c, is_start=False)) for c in continuations]
    methods = ["fused", "prob_avg", "fused_plain"]
    scores = family_fuser.score(**REQUEST, continuations=continuations, methods=methods)
    case = make_case(family_fuser, **REQUEST)
    # `fused_plain` reaches furthest.
    truth = truth_of(family_fuser, REQUEST, max(lengths))
    for method in methods:
        for text, score in zip(continuations, scores[method], strict=True):
            target = family_fuser.model.tokenizer.encode(text, is_start=False)
            wanted = truth.score(case, method, target)
            # A sum of some tokens' log-probabilities, each within the tolerance.
            assert score == pytest.approx(wanted, abs=TOLERANCE * len(target))


@pytest.mark.parametrize("weights", ["likelihood", (1, 3, 2)], ids=str)
def test_the_heaviest_segment_is_measured_wherever_it_stands(family_fuser, weights):
    """Which one is heaviest is not known when the request is measured."""
    long, short = "Q: " + "the value of a key, " * 3, "Q: a key?"
    results = []
    for segments in ([long, short, "Q: Z"], ["Q: Z", short, long]):
        given = (
            weights if isinstance(weights, str) else weights[:: 1 if segments[0] == long else -1]
        )
        request = {"prefix": "def f:\n", "segments": segments, "suffix": "A:", "weights": given}
        for beta in (1.0, -1.0):
            result = family_fuser.generate(
                **request, methods=["weighted_max"], beta=beta, max_new_tokens=2
            )
            results.append((beta, result["weighted_max"].logprobs))
    for (beta, one), (other_beta, other) in zip(results[:2], results[2:], strict=True):
        assert beta == other_beta
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_windows_and_frequencies_matter_here(family_fuser):
    """The comparisons above say something: without the feature the answers' scores differ."""
    config = family_fuser.model.config
    plain = replace(config, sliding_window=None, sliding_layers=(), rope_scaling=None)
    case = make_case(family_fuser, **REQUEST)
    truth = truth_of(family_fuser, REQUEST, 1)
    without = reference.Reference(plain, family_fuser.model.params)
    for method in ("origin", "fused"):
        gap = truth.logprobs(case, method, ()) - without.logprobs(case, method, ())
        assert gap.abs().max() > 100 * TOLERANCE


def test_families_compiled_are_eager_and_nothing_recompiles(request, family_folder, family_fuser):
    if request.node.callspec.params["family_folder"] in ("mistral", "dynamic"):
        pytest.skip(
            "its graphs are part of the others': a window in every layer, other frequencies"
        )
    compiled = minifuse.load(family_folder, compile=True)
    # Two streams: one graph for prefill and one for steps, where every graph takes its time.
    options = {"methods": ["fused", "fused_plain"], "max_new_tokens": 4}
    first = compiled.generate(**REQUEST, **options)
    assert_same(first, family_fuser.generate(**REQUEST, **options))
    other = {"prefix": "def g:\n", "segments": ["return 42?", " value Z"], "suffix": " ="}
    with nothing_compiles(compiled):
        found = compiled.generate(**other, **options)
    assert_same(found, family_fuser.generate(**other, **options))


def test_methods_differ(fuser):
    """The comparisons above say something: on this request the methods are not all alike."""
    firsts = fuser.generate(**REQUEST, weights=[5, 1, 1], methods="all", max_new_tokens=1)
    values = {round(g.logprobs[0], 3) for g in flat(firsts)}
    # per_prompt's three (origin, weighted_max and vote are among them), five ensembles, five fused.
    assert len(values) >= 12


def test_prompts_longer_than_a_prefill_chunk(fuser, truth):
    """Prefix, one segment and all segments together are each longer than the largest chunk."""
    request = {"prefix": "é Z" * 140, "segments": [" Z?" * 180, "Q: the value? " * 3]}
    request |= {"suffix": "A:", "positions": "aligned"}
    case = make_case(fuser, **request)
    assert min(len(case.prefix_ids), len(case.segment_ids[0])) > PREFILL_SIZES[-1]
    methods = ["fused", "concat", "prob_avg"]
    results = fuser.generate(**request, methods=methods, max_new_tokens=2)
    check_results(fuser, truth, results, request, max_new_tokens=2)


def test_more_streams_than_the_largest_decode_size(fuser, truth):
    segments = [f"Q: {'the value ' * n}of key {n}?\n" for n in range(8)]
    request = {"prefix": "def f:\n", "segments": segments, "suffix": "A:"}
    results = fuser.generate(**request, methods="all", max_new_tokens=3)
    # Five ensembles of eight, eight single streams and five fused ones: two forwards a step.
    assert max(DECODE_BLOCKS) < 6 * 8 + 5
    check_results(fuser, truth, results, request, max_new_tokens=3)


def test_many_segments_are_laid_out_once(fuser, monkeypatch):
    """`concat` sees all earlier segments: the work must not double with each of them."""
    original = PackedPrompt._encode_segment
    segments = [f"Q{n}" for n in range(40)]
    asked = []

    def encode(self, *args):
        asked.append((self, *args))
        assert len(asked) <= 10 * len(segments)  # forty doublings would never end
        return original(self, *args)

    monkeypatch.setattr(PackedPrompt, "_encode_segment", encode)
    fuser.stream(segments=segments, suffix="A:", methods="concat", max_new_tokens=1).close()
    prompts = {id(self) for self, *_ in asked}
    assert prompts
    assert len(asked) == len(segments) * len(prompts)


def test_layout_and_prompt_tokens(fuser):
    case = make_case(fuser, **REQUEST)
    results = fuser.generate(**REQUEST, methods="all", max_new_tokens=4)
    prefix, suffix = len(case.prefix_ids), len(case.suffix_ids)
    lengths = [len(ids) for ids in case.segment_ids]
    for generation in results["per_prompt"]:
        index = generation.paraphrase_index
        assert generation.prompt_tokens == len(case.prompt(index))
        parts = {entry.part: entry for entry in generation.layout}
        assert parts["prefix"].token_ids == case.prefix_ids
        assert parts["segment"].token_ids == case.segment_ids[index]
        assert parts["segment"].positions == (prefix, prefix + lengths[index])
        assert parts["suffix"].token_ids == case.suffix_ids
        assert parts["answer"].token_ids == generation.token_ids
    assert results["logit_avg"].prompt_tokens == prefix + sum(lengths) + 3 * suffix
    fused = results["fused"]
    assert fused.prompt_tokens == prefix + sum(lengths) + suffix
    ends = {entry.positions[1] for entry in fused.layout if entry.part == "segment"}
    assert ends == {prefix + max(lengths)}  # aligned: all segments end together
    slots = [slot for entry in fused.layout for slot in entry.slots]
    assert len(slots) == len(set(slots))
    assert 0 not in slots
    everything = results["concat"].layout
    positions = [p for e in everything for p in range(*e.positions)]
    assert positions == list(
        range(prefix + sum(lengths) + suffix + len(results["concat"].token_ids))
    )


def test_prompt_tokens_are_those_that_are_seen(fuser):
    """A weight of zero hides its segment: the answer equals that of the others alone."""
    case = make_case(fuser, **REQUEST)
    full = fuser.generate(
        **REQUEST, weights=[1, 0, 1], methods="fused_weighted", positions="restart"
    )
    seen = len(case.prefix_ids) + len(case.suffix_ids)
    seen += len(case.segment_ids[0]) + len(case.segment_ids[2])
    assert full["fused_weighted"].prompt_tokens == seen
