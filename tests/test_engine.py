"""The engine against the dense reference, and the ten promises of the design on tiny models."""

import inspect
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import METHODS, WEIGHTED, Case, count_near_ties, near_tie, reference_answers
from tiny_files import CONTROLS, make_model, write_hub_folder

import minifuse
from minifuse import chat
from minifuse import engine as engine_module
from minifuse.engine import Request
from minifuse.errors import MinifuseError, UsageError
from minifuse.executor import (
    DECODE_SIZES,
    LABEL_COUNTS,
    MIN_SLOTS,
    PREFILL_SIZES,
    Size,
    Token,
    count_compiled_graphs,
)
from minifuse.layout import Encoding, PackedPrompt, Prompt
from minifuse.loader import load_model

# Float32 against a float64 reference: sums of at most 96 products over 2 layers, 2**-24 relative
# each, on numbers of order 10: estimated at 1e-5, not measured; the bound leaves a factor of ten.
TOLERANCE = 1e-4
EVERY_METHOD = (*METHODS, "vote")
# Methods whose answer does not depend on the order of the segments.
SYMMETRIC = [m for m in EVERY_METHOD if m not in ("origin", "per_prompt", "fused_plain", "concat")]

SEGMENTS = ["Q: value of a key?\n", "Q: which is the key, and why?\n", "Q: key?\n"]
REQUEST = {"prefix": "def answer(question):\n", "segments": SEGMENTS, "suffix": "A:"}


def sharpen(model):
    """Attention far from uniform: what sees too much, or too little, shows."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
            layer.self_attn.k_proj.weight *= 2
    return model


def make_sharp_model():
    return sharpen(make_model("llama", max_position_embeddings=2048))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("engine") / "sharp", make_sharp_model())


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory):
    """The same model; its tokenizer puts <|start|> before a text."""
    path = write_hub_folder(tmp_path_factory.mktemp("engine") / "bos", make_sharp_model())
    raw = json.loads((path / "tokenizer.json").read_text())
    start = CONTROLS[1]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": start, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {start: {"id": start, "ids": [1], "tokens": [start]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def fuser(folder):
    return minifuse.load(folder, compile=False)


@pytest.fixture(scope="module")
def bos_fuser(bos_folder):
    return minifuse.load(bos_folder, compile=False)


@pytest.fixture(scope="module")
def compiled(folder):
    return minifuse.load(folder, compile=True)


@pytest.fixture(scope="module")
def truth(fuser):
    return reference.Reference(fuser.model.config, fuser.model.params)


def make_case(fuser, *, segments, prefix="", suffix="", weights=None, **options) -> Case:
    """A request of `generate` as the reference takes it."""
    tokenizer = fuser.model.tokenizer

    def encode(text, is_start):
        return tuple(tokenizer.encode(text, is_start=is_start))

    return Case(
        prefix_ids=(*tokenizer.bos_ids, *encode(prefix, True)),
        segment_ids=tuple(encode(text, not prefix) for text in segments),
        suffix_ids=encode(suffix, False),
        weights=tuple(weights) if isinstance(weights, list | tuple) else weights,
        **options,
    )


def flat(results) -> list:
    """All generations of a result, `per_prompt`'s one by one."""
    return [
        g for value in results.values() for g in (value if isinstance(value, list) else [value])
    ]


def check_generation(fuser, truth, case, generation, *, max_new_tokens, tolerance=TOLERANCE) -> int:
    """Compare an answer, token by token under its own tokens; returns the number of near ties."""
    ids, index = generation.token_ids, generation.paraphrase_index
    if generation.method == "weighted_max":
        index = next(e.index for e in generation.layout if e.part == "segment")
        weights = truth.weights(case, "weighted_max")
        assert near_tie(torch.tensor(weights), index, 1e-6)
    logprobs = truth.logprobs(case, generation.method, ids, index)
    ties = count_near_ties(ids, logprobs, tolerance)
    wanted = [float(logprobs[step, token]) for step, token in enumerate(ids)]
    torch.testing.assert_close(list(generation.logprobs), wanted, atol=tolerance, rtol=0)
    if generation.finish_reason == "stop":
        ends = [float(logprobs[len(ids), token]) for token in fuser.model.eos_token_ids]
        assert max(ends) >= float(logprobs[len(ids)].max()) - tolerance
    else:
        assert generation.finish_reason == "length"
        assert len(ids) == max_new_tokens
    assert generation.text == fuser.model.tokenizer.decode(ids)
    return ties


def check_results(fuser, truth, results, request, *, max_new_tokens, tolerance=TOLERANCE) -> int:
    """Compare all answers of a call with the reference; returns the number of near ties."""
    case = make_case(fuser, **request)
    ties = 0
    for method, value in results.items():
        if method == "vote":
            continue
        for generation in value if isinstance(value, list) else [value]:
            assert generation.method == method
            ties += check_generation(
                fuser,
                truth,
                case,
                generation,
                max_new_tokens=max_new_tokens,
                tolerance=tolerance,
            )
            if method in WEIGHTED:
                wanted = truth.weights(case, method)
                torch.testing.assert_close(list(generation.weights), wanted, atol=tolerance, rtol=0)
            else:
                assert generation.weights is None
    if "vote" in results and "per_prompt" in results:
        winner = reference.vote(results["per_prompt"])
        assert (results["vote"].text, results["vote"].token_ids) == (winner.text, winner.token_ids)
    return ties


def assert_same(ours, theirs, *, tolerance=TOLERANCE):
    """Two results of the same request: the same answers, logprobs within the tolerance."""
    assert list(ours) == list(theirs)
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        assert (one.method, one.token_ids, one.text) == (other.method, other.token_ids, other.text)
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=tolerance, rtol=0)


def assert_identical(ours, theirs):
    assert_same(ours, theirs, tolerance=0)
    assert [g.layout for g in flat(ours)] == [g.layout for g in flat(theirs)]


# Against the reference

WORDS = [
    "def ",
    "return",
    " value",
    "é",
    "日本",
    " the",
    "Q: ",
    "?",
    "\n",
    " = ",
    "model",
    "42",
    ".",
]


@st.composite
def requests(draw):
    """Any number of segments of any length, with or without prefix and suffix."""

    def text(low, high):
        return "".join(draw(st.lists(st.sampled_from(WORDS), min_size=low, max_size=high)))

    count = draw(st.integers(1, 5))
    request = {
        "prefix": text(0, 12),
        "segments": [text(1, 10) for _ in range(count)],
        "suffix": text(0, 4),
        "positions": draw(st.sampled_from(["aligned", "restart"])),
        "beta": draw(st.sampled_from([1.0, 0.5, 3.0, -1.0])),
        "balance": draw(st.sampled_from([None, 1.0, 0.5, 0.0])),
    }
    if not request["suffix"]:
        # A view of several segments then needs their last tokens to be the same.
        request["segments"] = [segment + " Z" for segment in request["segments"]]
    number = st.sampled_from([0.0, 0.25, 1.0, 2.0, 7.5])
    given_weights = st.lists(number, min_size=count, max_size=count).filter(any)
    request["weights"] = draw(
        st.one_of(st.none(), st.just("likelihood"), st.just("confidence"), given_weights)
    )
    return request


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


SCALED = {"rope_theta": 10000.0, "factor": 3.0}
# What changes who sees whom, or how keys turn: family, config, and whether frequencies depend on
# the request (its context is exceeded on purpose).
FAMILIES = {
    "mistral": ("mistral", {"sliding_window": 19}),
    "qwen2, one layer slides": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {**SCALED, "rope_type": "dynamic", "factor": 8.0},
            "max_position_embeddings": 40,
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                **SCALED,
                "rope_type": "yarn",
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    family, changes = FAMILIES[request.param]
    model = sharpen(make_model(family, **changes))
    return write_hub_folder(tmp_path_factory.mktemp("engine") / family, model)


@pytest.fixture(scope="module")
def family_fuser(family_folder):
    return minifuse.load(family_folder, compile=False)


def truth_of(fuser, request, max_new_tokens) -> reference.Reference:
    """A reference that knows how far the longest answer of a request with all methods reaches."""
    case = make_case(fuser, **request)
    everything = case.prefix_ids + sum(case.segment_ids, ()) + case.suffix_ids
    length = fuser.model.config.rope_length(len(everything) + max_new_tokens)
    return reference.Reference(fuser.model.config, fuser.model.params, rope_length=length)


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


def test_families_compiled_are_eager_and_nothing_recompiles(family_folder, family_fuser):
    compiled = minifuse.load(family_folder, compile=True)
    options = {"methods": ["fused", "logit_avg", "fused_plain"], "max_new_tokens": 4}
    first = compiled.generate(**REQUEST, **options)
    assert_same(first, family_fuser.generate(**REQUEST, **options))
    other = {"prefix": "def g:\n", "segments": ["return 42?", " value Z"], "suffix": " ="}
    before = count_compiled_graphs()
    assert_same(compiled.generate(**other, **options), family_fuser.generate(**other, **options))
    assert count_compiled_graphs() == before


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
    assert DECODE_SIZES[-1] < 6 * 8 + 5
    check_results(fuser, truth, results, request, max_new_tokens=3)


def test_many_segments_are_laid_out_at_once(fuser):
    """`concat` sees all earlier segments: time must not double with each of them."""
    segments = [f"Q{n}" for n in range(40)]
    start = time.perf_counter()
    stream = fuser.stream(segments=segments, suffix="A:", methods="concat", max_new_tokens=1)
    # Forty doublings would never end; what is left is far below a second.
    assert time.perf_counter() - start < 2
    stream.close()


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


# The promises


def run_spans(fuser, session, packed) -> tuple[list, torch.Tensor | None]:
    """Run what is pending, as the engine does: its spans, and hidden states float[n, C]."""
    spans = packed.take_pending()
    session.set_tables([packed.sees])
    tokens = [
        Token(id, position, slot, span.label)
        for span in spans
        for id, position, slot in zip(span.token_ids, span.positions, span.slots, strict=True)
    ]
    return spans, fuser.executor.prefill(session, [tokens])[0] if tokens else None


def segment_hidden(fuser, case, index) -> torch.Tensor:
    """Hidden states of one segment in a prefill of all of them."""
    packed = PackedPrompt(Prompt(case.prefix_ids, case.segment_ids, case.suffix_ids))
    packed.prefix()
    with fuser.executor.session(Size(rows=1, slots=1024, labels=LABEL_COUNTS[0])) as session:
        run_spans(fuser, session, packed)
        wanted = [packed.segment(Encoding.ALONE, i) for i in range(case.num_segments)][index]
        spans, hidden = run_spans(fuser, session, packed)
    start = sum(len(span.token_ids) for span in spans[: spans.index(wanted)])
    return hidden[start : start + len(wanted.token_ids)]


@settings(max_examples=25)
@given(request=requests(), others=requests())
def test_promise_1_segments_are_encoded_as_if_alone(fuser, truth, request, others):
    case = make_case(fuser, prefix=request["prefix"], segments=request["segments"], suffix="A:")
    other = make_case(fuser, segments=others["segments"], prefix=request["prefix"])
    for index, ids in enumerate(case.segment_ids):
        alone = reference.plain_hidden(fuser.model.config, truth.params, case.prefix_ids + ids)
        wanted = alone[len(case.prefix_ids) :].float()
        # Hidden states behind the final norm are of the size of its weights, about 1.
        torch.testing.assert_close(segment_hidden(fuser, case, index), wanted, atol=1e-4, rtol=0)
        changed = replace(
            case,
            segment_ids=tuple(
                own if i == index else other.segment_ids[i % other.num_segments]
                for i, own in enumerate(case.segment_ids)
            ),
        )
        torch.testing.assert_close(segment_hidden(fuser, changed, index), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", ["A:", ""])
@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("weights", [None, [0.3], "confidence"], ids=str)
def test_promise_2_one_segment_is_plain_decoding(fuser, truth, suffix, positions, weights):
    request = {"prefix": "def f:\n", "segments": ["Q: the value?\n"], "suffix": suffix}
    ids = make_case(fuser, **request).prompt(0)
    plain = reference.greedy(
        lambda forced: truth.plain(ids + tuple(forced))[-1].log_softmax(-1),
        fuser.model.tokenizer.decode,
        max_new_tokens=8,
        eos_token_ids=fuser.model.eos_token_ids,
    )
    options = {"weights": weights, "positions": positions}
    results = fuser.generate(**request, **options, methods="all", max_new_tokens=8)
    assert set(results) == set(EVERY_METHOD)
    for generation in flat(results):
        assert list(generation.token_ids) == plain.token_ids, generation.method
        torch.testing.assert_close(
            list(generation.logprobs), plain.logprobs, atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("suffix", ["A:", ""])
def test_promise_3_single_streams_are_their_prompts_alone(fuser, truth, suffix):
    """Under the ensemble's tokens: score forces tokens on streams that run beside all others."""
    segments = [text.strip() + " Z" for text in SEGMENTS]
    request = {"prefix": "def f:\n", "segments": segments, "suffix": suffix}
    case = make_case(fuser, **request)
    continuations = [" the value of 42", "\n\nQ: key", "é"]
    scores = fuser.score(**request, continuations=continuations, methods="all")
    for index, text in itertools.product(range(3), range(3)):
        ids = tuple(fuser.model.tokenizer.encode(continuations[text], is_start=False))
        prompt = case.prompt(index)
        logprobs = truth.plain(prompt + ids).log_softmax(-1)
        wanted = sum(float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(ids))
        assert scores["per_prompt"][index][text] == pytest.approx(wanted, abs=len(ids) * TOLERANCE)
    # Alone, in a call of its own, each prompt gets the same numbers.
    for index, segment in enumerate(segments):
        alone = fuser.score(
            **{**request, "segments": [segment]}, continuations=continuations, methods="origin"
        )
        torch.testing.assert_close(
            alone["origin"], scores["per_prompt"][index], atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_promise_4_copies_weigh_as_one(fuser, positions, count):
    request = {"prefix": "def f:\n", "suffix": "A:"}
    options = {"methods": "fused", "positions": positions}
    one = fuser.generate(**request, segments=SEGMENTS[:1], **options, max_new_tokens=6)
    many = fuser.generate(**request, segments=SEGMENTS[:1] * count, **options, max_new_tokens=6)
    assert_same(many, one)
    # The whole distribution, not the best tokens alone.
    everything = [chr(code) for code in range(33, 127)]
    one = fuser.score(**request, segments=SEGMENTS[:1], **options, continuations=everything)
    many = fuser.score(
        **request, segments=SEGMENTS[:1] * count, **options, continuations=everything
    )
    torch.testing.assert_close(many["fused"], one["fused"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("weights", [None, "confidence", (3, 1, 2), (0, 2, 1)], ids=str)
def test_promise_5_order_does_not_matter(fuser, positions, weights):
    options = {"methods": SYMMETRIC, "positions": positions, "max_new_tokens": 5}
    continuations = [" the value", "42", "\n"]
    scored = [m for m in SYMMETRIC if m != "vote"]
    first = first_scores = None
    for order in itertools.permutations(range(3)):
        request = {**REQUEST, "segments": [SEGMENTS[i] for i in order], "weights": weights}
        if isinstance(weights, tuple):
            request["weights"] = [weights[i] for i in order]
        results = fuser.generate(**request, **options)
        scores = fuser.score(
            **request, continuations=continuations, methods=scored, positions=positions
        )
        first, first_scores = first or results, first_scores or scores
        assert_same(results, first)
        torch.testing.assert_close(scores, first_scores, atol=3 * TOLERANCE, rtol=0)
        for method in set(WEIGHTED) & set(results):
            back = [results[method].weights[order.index(i)] for i in range(3)]
            torch.testing.assert_close(back, list(first[method].weights), atol=TOLERANCE, rtol=0)


def test_promise_5_order_does_not_matter_among_equal_weights(fuser):
    """Two segments are the heaviest: which of them weighted_max reads is not a matter of order."""
    options = {"weights": [1, 1, 1], "methods": "weighted_max", "max_new_tokens": 5}
    one = fuser.generate(**REQUEST, **options)
    assert_same(fuser.generate(**{**REQUEST, "segments": SEGMENTS[::-1]}, **options), one)


def test_order_matters_where_it_should(fuser):
    options = {"methods": ["origin", "fused_plain", "concat"], "max_new_tokens": 1}
    one = fuser.generate(**REQUEST, **options)
    other = fuser.generate(**{**REQUEST, "segments": SEGMENTS[::-1]}, **options)
    for method in one:
        assert abs(one[method].logprobs[0] - other[method].logprobs[0]) > 10 * TOLERANCE


def test_promise_6_compiled_is_eager(fuser, compiled):
    eager = fuser.generate(**REQUEST, methods="all", max_new_tokens=6)
    results = compiled.generate(**REQUEST, methods="all", max_new_tokens=6)
    assert_same(results, eager)
    assert flat(results)[0].recompiles == 0
    continuations = [" the value", "42"]
    torch.testing.assert_close(
        compiled.score(**REQUEST, continuations=continuations, methods="all"),
        fuser.score(**REQUEST, continuations=continuations, methods="all"),
        atol=2 * TOLERANCE,
        rtol=0,
    )


def make_batch(count: int) -> list[dict]:
    """Requests that have little in common."""
    draw = random.Random(7)
    prefixes = ["", "def f:\n", "def f:\n", "return value of the model\n" * 9]
    batch = []
    for number in range(count):
        size = 1 + number % 5
        batch.append(
            {
                "prefix": prefixes[number % 4],
                "segments": [
                    "".join(draw.choices(WORDS, k=draw.randint(1, 20))) + " Z" for _ in range(size)
                ],
                "suffix": draw.choice(["A:", "", " answer:\n"]),
                "weights": draw.choice(
                    [None, "likelihood", "confidence", [1 + n for n in range(size)]]
                ),
            }
        )
    return batch


@pytest.mark.parametrize("temperature", [0, 0.1])
def test_answers_share_what_they_have_in_common(fuser, monkeypatch, temperature):
    """A step runs one token for every view and different beginning of an answer, no more."""
    rows = []
    decode = fuser.executor.decode
    monkeypatch.setattr(
        fuser.executor, "decode", lambda session, r: rows.append(len(r[0])) or decode(session, r)
    )
    names = ["per_prompt", "logit_avg", "prob_avg", "prob_max", "weighted_avg"]
    results = fuser.generate(**REQUEST, methods=names, max_new_tokens=8, temperature=temperature)
    everyone = range(len(SEGMENTS))
    answers = [([g.paraphrase_index], g.token_ids) for g in results["per_prompt"]]
    answers += [(everyone, results[name].token_ids) for name in names[1:]]
    # One call for the suffixes, then one for each token that is fed back.
    wanted = [len(SEGMENTS) * len(make_case(fuser, **REQUEST).suffix_ids)]
    for length in range(1, 8):
        live = [(views, ids[:length]) for views, ids in answers if len(ids) > length]
        wanted.append(len({(view, ids) for views, ids in live for view in views}))
    assert rows == wanted
    unshared = len(SEGMENTS) * len(names)
    assert rows[1] < unshared, "nothing was shared"
    assert len(set(rows[1:])) > 1, "no answers parted"
    for generation in flat(results):
        for entry in generation.layout:
            if entry.part == "answer":
                assert len(entry.slots) == len(set(entry.slots)) == len(entry.token_ids) - 1


@pytest.mark.parametrize("positions", ["aligned", "restart"])
def test_promise_6_batched_is_alone(folder, fuser, positions):
    batch = make_batch(7)
    options = {"methods": "all", "max_new_tokens": 5, "positions": positions}
    together = minifuse.load(folder, compile=False).generate_batch(
        [Request(**request) for request in batch], batch_size=3, **options
    )
    assert len(together) == len(batch)
    for results, request in zip(together, batch, strict=True):
        assert_same(results, fuser.generate(**request, **options))


def test_promise_6_rows_that_end_early_leave_the_others_alone(fuser):
    """One request's answer stops at once, the other's goes on for long."""
    first = fuser.generate(**REQUEST, max_new_tokens=1)["fused"].text
    other = {**REQUEST, "segments": ["return the model"]}
    options = {"stop": [first], "max_new_tokens": 12, "methods": ["fused", "logit_avg", "concat"]}
    requests = [Request(**REQUEST), Request(**other)]
    for ordered in (requests, requests[::-1]):
        together = fuser.generate_batch(ordered, **options)
        for request, results in zip(ordered, together, strict=True):
            texts = {"prefix": request.prefix, "segments": request.segments}
            assert_same(results, fuser.generate(**texts, suffix=request.suffix, **options))


def test_promise_6_prefix_reused_is_prefix_recomputed(folder, fuser, truth):
    options = {"methods": "all", "max_new_tokens": 5}
    fresh = minifuse.load(folder, compile=False)
    first = fresh.generate(**REQUEST, **options)
    assert len(fresh._prefixes) == 1
    assert_identical(fresh.generate(**REQUEST, **options), first)
    # More prefixes than are kept, one of them an extension of the first, then the first again.
    prefixes = [REQUEST["prefix"] + "# more\n", "def", "return\n", "value", "model " * 30]
    for prefix in prefixes:
        request = {**REQUEST, "prefix": prefix}
        results = fresh.generate(**request, **options)
        check_results(fuser, truth, results, request, max_new_tokens=5)
    assert_identical(fresh.generate(**REQUEST, **options), first)


def test_promise_6_nothing_is_left_over_from_earlier_requests(folder, fuser):
    """A cache that is used again holds another request's keys in every slot."""
    options = {"methods": "all", "max_new_tokens": 5}
    wanted = minifuse.load(folder, compile=False).generate(**REQUEST, **options)
    busy = {"prefix": "x" * 99, "segments": ["model = 42 " * 4] * 4, "suffix": "é" * 9}
    fuser.generate(**busy, methods="all", max_new_tokens=6)
    assert_identical(fuser.generate(**REQUEST, **options), wanted)
    with torch.inference_mode():
        for cache in fuser.executor._free_caches:
            for layer in (*cache.keys, *cache.values):
                layer.fill_(1e4)
    assert_identical(fuser.generate(**REQUEST, **options), wanted)


@contextmanager
def nothing_compiles():
    """Dynamo raises where it would compile, and its own count of graphs stays."""
    before, breaks = count_compiled_graphs(), dict(torch._dynamo.utils.counters["graph_break"])
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
    assert count_compiled_graphs() == before
    assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks


def test_promise_7_nothing_recompiles(compiled, truth):
    """Thirty layouts with all methods after one call for each size that occurs."""
    draw = random.Random(0)

    def make_request():
        def text(low, high):
            return "".join(draw.choices(WORDS, k=draw.randint(low, high)))

        count = draw.randint(1, 5)
        suffix = text(0, 3)
        return {
            "prefix": text(0, 15),
            "segments": [text(2, 8) + ("" if suffix else " Z") for _ in range(count)],
            "suffix": suffix,
            "weights": draw.choice(
                [None, "likelihood", "confidence", [draw.uniform(0.1, 1) for _ in range(count)]]
            ),
            "positions": draw.choice(["aligned", "restart"]),
            "beta": draw.uniform(0, 2),
            "balance": draw.uniform(0, 1),
        }

    def make_methods():
        return draw.sample(EVERY_METHOD, draw.randint(1, len(EVERY_METHOD)))

    long = [" Z" * 225]  # 450 tokens
    compiled.generate(segments=long, methods="origin", max_new_tokens=2)  # prefill 512, decode 1
    compiled.generate(**REQUEST, methods="per_prompt", max_new_tokens=2)  # prefill 128, decode 8
    compiled.generate(**REQUEST, methods="all", max_new_tokens=2)  # decode 32
    sizes = {
        key[:2]
        for key in compiled.executor._compiled
        if (key[2].rows, key[2].slots) == (1, MIN_SLOTS)
    }
    assert sizes == {("prefill", n) for n in PREFILL_SIZES} | {("decode", n) for n in DECODE_SIZES}
    with nothing_compiles():
        for number in range(30):
            request = make_request()
            methods = "all" if number % 2 else make_methods()
            results = compiled.generate(**request, methods=methods, max_new_tokens=3)
            check_results(compiled, truth, results, request, max_new_tokens=3)
            assert {g.recompiles for g in flat(results)} == {0}
            assert {g.timings["compile_s"] for g in flat(results)} == {0}
        scores = compiled.score(**REQUEST, continuations=["42", " value of"], methods="all")
    assert set(scores) == set(METHODS)


def test_promise_7_the_guard_can_fail(compiled):
    """A size that no call has warmed up is compiled, and the guard of the test above sees it."""
    with pytest.raises(RuntimeError, match="fail_on_recompile"), nothing_compiles():
        compiled.generate(**REQUEST, max_new_tokens=1100)


def test_promise_8_no_silent_fallback(fuser):
    """Each of these could be answered with something else; none is."""
    ends = {"prefix": "def f:\n", "segments": ["a Y", "a Z"]}
    for method in ("fused", "fused_weighted", "fused_auto"):
        with pytest.raises(UsageError, match="suffix is empty and the segments end in different"):
            fuser.generate(**ends, methods=method)
        with pytest.raises(UsageError, match="suffix is empty"):
            fuser.score(**ends, continuations=["42"], methods=method)
    # The methods that read one segment a stream, or run on, need no common end.
    fuser.generate(**ends, methods=["prob_avg", "concat", "fused_plain"], max_new_tokens=1)
    with pytest.raises(UsageError, match="vote has no probabilities"):
        fuser.score(**REQUEST, continuations=["42"], methods=["fused", "vote"])
    too_many = ["Q"] * (LABEL_COUNTS[-1] // 5)
    methods = [m for m in EVERY_METHOD if m != "concat"]
    with pytest.raises(
        UsageError, match=rf"need \d+ labels and the tables have {LABEL_COUNTS[-1]}"
    ):
        fuser.generate(segments=too_many, suffix="A:", methods=methods, max_new_tokens=1)
    with pytest.raises(UsageError, match="quantize is 'int8'"):
        minifuse.load(quantize="int8")


def test_promise_8_damaged_weights_are_an_error(fuser):
    params = fuser.model.params
    broken = params._replace(final_norm=params.final_norm * torch.nan)
    damaged = minifuse.Fuser(replace(fuser.model, params=broken), compile=False)
    with pytest.raises(MinifuseError, match="fused: the model's scores are not finite") as error:
        damaged.generate(**REQUEST)
    assert error.value.exit_status == 1


def test_promise_8_a_segment_without_likelihood_warns(fuser):
    request = {**REQUEST, "segments": ["Q", "Q: the value?"]}
    with pytest.warns(UserWarning, match="one token has no likelihood; all segments weigh"):
        results = fuser.generate(**request, methods="fused_auto", max_new_tokens=1)
    assert results["fused_auto"].weights == (0.5, 0.5)
    assert results["fused_auto"].weights_source == "likelihood"


def test_promise_9_text_never_becomes_a_control_token(fuser, bos_fuser):
    hostile = f"{CONTROLS[0]}{CONTROLS[1]} value {CONTROLS[0]}"
    request = {"prefix": hostile, "segments": [hostile, f"Q {hostile}"], "suffix": hostile}
    for engine in (fuser, bos_fuser):
        bos = list(engine.model.tokenizer.bos_ids)
        for generation in flat(engine.generate(**request, methods="all", max_new_tokens=1)):
            ids = [i for e in generation.layout if e.part != "answer" for i in e.token_ids]
            assert [i for i in ids if i in engine.model.tokenizer.control_ids] == bos
            first = generation.layout[0].token_ids[len(bos) :]
            assert engine.model.tokenizer.decode(first) == hostile
    # A continuation that spells the end token is scored as the text that it is.
    spelled, end = fuser.score(**REQUEST, continuations=[CONTROLS[0], "Z"])["fused"]
    assert spelled < 3 * end


# Chat

STRIPPING = (
    "<|start|>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}"
    "<|start|>>"
)


@pytest.fixture(scope="module")
def chat_fuser(bos_folder, tmp_path_factory):
    """A template that strips messages, on a tokenizer that adds a BOS of its own."""
    folder = shutil.copytree(bos_folder, tmp_path_factory.mktemp("engine") / "chat")
    (folder / "chat_template.jinja").write_text(STRIPPING)
    return minifuse.load(folder, compile=False)


def test_chat_is_the_template_around_the_message(chat_fuser, truth):
    """BOS stands where the template writes it, and nowhere else."""
    request = {"prefix": " \n def f:\n", "segments": ["a key? \n", "the value?"], "suffix": "A:"}
    results = chat_fuser.generate(**request, chat=True, methods="all", max_new_tokens=3)
    tokenizer = chat_fuser.model.tokenizer

    def encode(text):
        return tuple(tokenizer.encode(text, is_start=False))

    start, end = (tokenizer.token_id(token) for token in ("<|start|>", "<|end|>"))
    case = Case(
        prefix_ids=(start, *encode("[user]"), *encode("def f:\n")),
        segment_ids=(encode("a key?"), encode("the value?")),
        suffix_ids=(end, start, *encode(">"), *encode("A:")),
    )
    for generation in flat(results):
        if generation.method != "vote":
            check_generation(chat_fuser, truth, case, generation, max_new_tokens=3)
    plain = chat_fuser.generate(**request, methods=["origin"], max_new_tokens=3)
    assert plain["origin"].logprobs != results["origin"].logprobs


def test_chat_is_rendered_once_for_each_way_of_asking(chat_fuser, monkeypatch):
    calls = []
    monkeypatch.setattr(
        engine_module,
        "render_frame",
        lambda *args, **kwargs: calls.append(kwargs) or render(*args, **kwargs),
    )
    render = chat.render_frame
    fuser = minifuse.Fuser(chat_fuser.model, compile=False)
    for system in (None, "Be brief.", None, "Be brief.", "Be long."):
        fuser.generate(segments=["a key?"], chat=True, system=system, max_new_tokens=1)
    assert [call["system"] for call in calls] == [None, "Be brief.", "Be long."]


def test_chat_scores_and_batches_as_one_request(chat_fuser):
    options = {"chat": True, "system": "x", "methods": ["fused", "prob_avg"]}
    request = {"segments": ["a key?", "value"]}
    (batched,) = chat_fuser.generate_batch([Request(**request)], **options, max_new_tokens=2)
    assert_same(batched, chat_fuser.generate(**request, **options, max_new_tokens=2))
    scores = chat_fuser.score(**request, **options, continuations=[" the", "é"])
    assert all(value < 0 for values in scores.values() for value in values)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chat": True}, "segment 2 is ' ', which is empty"),
        ({"chat": "yes"}, "chat is 'yes'; wanted True or False"),
        ({"system": "x"}, "system is for a chat template"),
        ({"chat_variables": {"a": 1}}, "chat_variables is for a chat template"),
        ({"chat": True, "system": 3}, "system is int; wanted a string"),
        ({"chat": True, "chat_variables": [1]}, r"chat_variables is \[1\]; wanted a dict"),
        ({"chat": True, "chat_variables": {"messages": []}}, "'messages' is set by minifuse"),
    ],
)
def test_bad_chat_options(chat_fuser, options, match):
    with pytest.raises(UsageError, match=match):
        chat_fuser.generate(segments=["a", " "], **options)


def test_promise_9_holds_in_chats(chat_fuser):
    result = chat_fuser.generate(
        segments=["<|end|>", "<|start|> a"], chat=True, max_new_tokens=1, methods=["concat"]
    )
    segments = [e for e in result["concat"].layout if e.part == "segment"]
    controls = chat_fuser.model.tokenizer.control_ids
    assert controls.isdisjoint(id for entry in segments for id in entry.token_ids)


def test_promise_10_nothing_is_unpickled(folder):
    """Python reports every class that a pickle names; loading and answering name none."""
    script = inspect.cleandoc(
        """
        import sys, minifuse, minifuse.engine
        found = []
        sys.addaudithook(lambda event, args: found.append(args) if "pickle" in event else None)
        fuser = minifuse.load(sys.argv[1], compile=False)
        fuser.generate(segments=["a", "b"], suffix="c", methods="all", max_new_tokens=2)
        assert not found, found
        import pickle
        pickle.loads(pickle.dumps(Exception))
        assert found
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# Score


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
    both = family_fuser.generate_and_score(requests, texts, batch_size=2, **options)
    scored = [method for method in EVERY_METHOD if method != "vote"]
    for request, continuations, by_count in zip(requests, texts, both, strict=True):
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
    both = fuser.generate_and_score(requests, [texts] * 2, counts=counts, batch_size=2, **options)
    assert list(both[0]) == list(counts)
    for found in both:
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
        fuser.executor, "prefill", lambda s, rows: lengths.append(len(rows[0])) or prefill(s, rows)
    )
    request = Request(**REQUEST)
    options = {"methods": ["per_prompt", "prob_avg"], "max_new_tokens": 1}
    for counts in (None, (1, 2, 3)):
        fuser.generate_and_score([request], [[" Z"]], batch_size=1, counts=counts, **options)
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
    assert fuser.generate_and_score([], []) == []


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


# Streams


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_stream_is_generate(fuser, temperature):
    options = {"methods": "all", "max_new_tokens": 8, "temperature": temperature, "stop": ["\n"]}
    wanted = fuser.generate(**REQUEST, **options)
    events = []
    stream = fuser.stream(**REQUEST, **options)
    while True:
        try:
            events.append(next(stream))
        except StopIteration as stop:
            assert_identical(stop.value, wanted)
            break
    for generation in flat(wanted):
        own = [
            e
            for e in events
            if (e.method, e.paraphrase_index) == (generation.method, generation.paraphrase_index)
        ]
        assert "".join(e.text for e in own) == generation.text
        assert [e.finish_reason for e in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == generation.finish_reason
        if generation.method == "vote":
            assert len(own) == 1
            continue
        ids = [e.token_id for e in own if e.token_id not in fuser.model.eos_token_ids]
        assert tuple(ids) == generation.token_ids
        assert tuple(e.logprob for e in own[: len(ids)]) == generation.logprobs


def count_calls(fuser, monkeypatch) -> Counter:
    """Counts the forwards that a fuser really runs."""
    calls = Counter()

    def counted(kind, step):
        def run(*args):
            calls[kind] += 1
            return step(*args)

        return run

    steps = {kind: counted(kind, step) for kind, step in fuser.executor._steps.items()}
    monkeypatch.setattr(fuser.executor, "_steps", steps)
    return calls


def test_closing_a_stream_stops_the_work(fuser, monkeypatch):
    wanted = fuser.generate(**REQUEST, max_new_tokens=5)
    calls = count_calls(fuser, monkeypatch)
    stream = fuser.stream(**REQUEST, max_new_tokens=500)
    assert not calls, "nothing runs before the first event is asked for"
    for _ in range(3):
        next(stream)
    before = calls.copy()
    assert before["decode"] <= 4  # the suffix, then one for each further token
    stream.close()
    assert calls == before
    with pytest.raises(StopIteration):
        next(stream)
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)


def test_a_stream_that_is_abandoned_or_fails_leaves_the_fuser_usable(fuser):
    wanted = fuser.generate(**REQUEST, max_new_tokens=5)
    stream = fuser.stream(**REQUEST, max_new_tokens=50)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)
    abandoned = fuser.stream(**REQUEST, max_new_tokens=50)
    next(abandoned)
    del abandoned
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)


def test_two_interleaved_streams_do_not_disturb_each_other(fuser):
    other = {**REQUEST, "segments": ["return 42", "def model"], "suffix": " ="}
    options = {"methods": ["fused", "logit_avg", "concat"], "max_new_tokens": 10}
    wanted = [fuser.generate(**REQUEST, **options), fuser.generate(**other, **options)]
    streams = [fuser.stream(**REQUEST, **options), fuser.stream(**other, **options)]
    results = [None, None]
    while None in results:
        for number in (0, 1):
            try:
                if results[number] is None:
                    next(streams[number])
            except StopIteration as stop:
                results[number] = stop.value
        fuser.score(**REQUEST, continuations=["42"])  # and a third caller in between
    for ours, theirs in zip(results, wanted, strict=True):
        assert_identical(ours, theirs)


def test_stream_checks_its_input_at_the_call(fuser):
    with pytest.raises(UsageError, match="segments is empty"):
        fuser.stream(segments=[])


# Sampling

SAMPLED = {"temperature": 1.3, "max_new_tokens": 8}


def test_a_seed_repeats(fuser):
    one = fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=3)
    assert_identical(fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=3), one)
    other = fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=4)
    assert one["fused"].token_ids != other["fused"].token_ids
    # Within a call, too, methods and paraphrases draw apart.
    assert len({g.token_ids for g in flat(one)}) >= 10


def test_other_methods_in_the_call_change_nothing(fuser):
    together = fuser.generate(**REQUEST, **SAMPLED, methods="all")
    for method in EVERY_METHOD:
        alone = fuser.generate(**REQUEST, **SAMPLED, methods=[method])
        assert_same(alone, {method: together[method]})


def test_the_place_in_a_batch_changes_nothing(fuser):
    batch = [Request(**REQUEST), Request(["return 42"]), Request(**REQUEST)]
    options = {"methods": ["fused", "per_prompt", "prob_avg"], **SAMPLED}
    results = fuser.generate_batch(batch, **options)
    assert_same(results[0], results[2])
    assert_same(results[0], fuser.generate(**REQUEST, **options))
    assert_same(results[1], fuser.generate(segments=["return 42"], **options))


def test_sampled_logprobs_are_those_of_the_method(fuser, truth):
    """All streams of an ensemble got the tokens that were drawn, and logprobs are unfiltered."""
    results = fuser.generate(**REQUEST, **SAMPLED, top_k=20, top_p=0.9, methods="all")
    case = make_case(fuser, **REQUEST)
    for generation in flat(results):
        if generation.method == "vote":
            continue
        logprobs = truth.logprobs(
            case, generation.method, generation.token_ids, generation.paraphrase_index
        )
        wanted = [float(logprobs[i, t]) for i, t in enumerate(generation.token_ids)]
        torch.testing.assert_close(list(generation.logprobs), wanted, atol=TOLERANCE, rtol=0)


def test_filters_keep_what_they_should(fuser, truth):
    case = make_case(fuser, **REQUEST)
    best = truth.logprobs(case, "fused", ())[0].argsort(descending=True).tolist()
    greedy = fuser.generate(**REQUEST, max_new_tokens=4)
    options = {"temperature": 2.0, "max_new_tokens": 4}
    assert_same(fuser.generate(**REQUEST, **options, top_k=1), greedy)
    assert_same(fuser.generate(**REQUEST, **options, top_p=1e-9), greedy)
    assert_same(fuser.generate(**REQUEST, temperature=1e-6, max_new_tokens=4), greedy)
    options["max_new_tokens"] = 1
    drawn = {
        fuser.generate(**REQUEST, **options, top_k=3, seed=seed)["fused"].token_ids[0]
        for seed in range(40)
    }
    # Nearly equal probabilities: each of the three is missed with (2/3)**40 = 1e-7 or so.
    assert drawn == set(best[:3])


# Where answers end


def first_texts(fuser, length=12):
    return fuser.generate(**REQUEST, max_new_tokens=length)["fused"]


def test_stop_strings_within_and_across_tokens(fuser):
    full = first_texts(fuser)
    pieces = [fuser.model.tokenizer.decode([i]) for i in full.token_ids]
    # The end of one token with the start of the next, where both are whole characters.
    at = next(i for i in range(2, 11) if "\ufffd" not in pieces[i] + pieces[i + 1])
    across = pieces[at][-1] + pieces[at + 1][0]
    place = full.text.index(across)
    for stop in (across, [across], ["never there", across]):
        result = fuser.generate(**REQUEST, max_new_tokens=12, stop=stop)["fused"]
        assert result.text == full.text[:place]
        assert result.finish_reason == "stop"
        assert result.token_ids == full.token_ids[: len(result.token_ids)]
        assert across in fuser.model.tokenizer.decode(result.token_ids)
        assert across not in fuser.model.tokenizer.decode(result.token_ids[:-1])
        assert len(result.logprobs) == len(result.token_ids)
    first_of_two = fuser.generate(**REQUEST, max_new_tokens=12, stop=[full.text[-1], full.text[:1]])
    assert first_of_two["fused"].text == ""
    unmet = fuser.generate(**REQUEST, max_new_tokens=12, stop="never there")["fused"]
    assert (unmet.text, unmet.finish_reason) == (full.text, "length")


def test_end_tokens_end_an_answer_and_stay_out_of_it(fuser):
    full = first_texts(fuser)
    end = full.token_ids[4]
    model = replace(fuser.model, eos_token_ids=(9999, end))
    cut = minifuse.Fuser(model, compile=False).generate(**REQUEST, max_new_tokens=12)["fused"]
    length = full.token_ids.index(end)
    assert cut.token_ids == full.token_ids[:length]
    assert cut.logprobs == full.logprobs[:length]
    assert cut.finish_reason == "stop"
    assert cut.text == fuser.model.tokenizer.decode(cut.token_ids)


def test_an_answer_may_be_empty(fuser):
    first = first_texts(fuser).token_ids[0]
    model = replace(fuser.model, eos_token_ids=(first,))
    results = minifuse.Fuser(model, compile=False).generate(**REQUEST, methods="all")
    fused = results["fused"]
    assert (fused.text, fused.token_ids, fused.logprobs) == ("", (), ())
    assert fused.finish_reason == "stop"


def test_answers_of_one_call_end_at_different_steps(fuser, truth):
    """The streams that are left go on with their own slots and positions."""
    results = fuser.generate(**REQUEST, methods="all", max_new_tokens=10)
    end = results["per_prompt"][0].token_ids[3]
    model = replace(fuser.model, eos_token_ids=(end,))
    short = minifuse.Fuser(model, compile=False)
    results = short.generate(**REQUEST, methods="all", max_new_tokens=10)
    assert len({len(g.token_ids) for g in flat(results)}) > 1
    check_results(short, truth, results, REQUEST, max_new_tokens=10)


# Bad input


def bad(match, status=2, **changes):
    return pytest.param({**REQUEST, **changes}, match, status, id=match[:40])


@pytest.mark.parametrize(
    ("request_", "match", "status"),
    [
        bad("segments is empty; wanted at least one", segments=[]),
        bad("segments is str; wanted a list of strings", segments="one"),
        bad("segments is NoneType; wanted a list", segments=None),
        bad("segment 2 is '', which is empty", segments=["a", ""]),
        bad("segment 1 is int; wanted a string", segments=[3]),
        bad("prefix is NoneType; wanted a string", prefix=None),
        bad("suffix is list; wanted a string", suffix=["A"]),
        bad("lone surrogate U\\+D800", segments=["a\ud800"]),
        bad("got 2 weights for 3 segments", weights=[1, 2]),
        bad("got 0 weights for 3 segments", weights=[]),
        bad("a weight is -1; wanted finite", weights=[-1, 1, 1]),
        bad("a weight is nan; wanted finite", weights=[1, float("nan"), 1]),
        bad("a weight is inf; wanted finite", weights=[1, float("inf"), 1]),
        bad("a weight is '1'; wanted finite", weights=["1", 1, 1]),
        bad("a weight is True; wanted finite", weights=[True, 1, 1]),
        bad("all weights are 0; wanted at least one", weights=[0, 0, 0]),
        bad("weights are 'entropy'; wanted numbers or one of", weights="entropy"),
        bad("method is 'fuse'; wanted one of origin", methods="fuse"),
        bad("method is 'FUSED'; wanted one of origin", methods=["fused", "FUSED"]),
        bad("methods is empty; wanted at least one", methods=[]),
        bad("positions is 'sequential'; wanted one of", positions="sequential"),
        bad("beta is nan; wanted a finite number", beta=float("nan")),
        bad("balance is '1'; wanted a finite number", balance="1"),
        bad("max_new_tokens is 0; wanted an integer", max_new_tokens=0),
        bad("max_new_tokens is -3; wanted an integer", max_new_tokens=-3),
        bad("max_new_tokens is 1.5; wanted an integer", max_new_tokens=1.5),
        bad("temperature is -0.1; wanted a finite", temperature=-0.1),
        bad("top_k is -1; wanted an integer of at", top_k=-1),
        bad("top_p is 0; wanted a number above 0", top_p=0),
        bad("top_p is 1.1; wanted a finite number", top_p=1.1),
        bad("seed is -1; wanted an integer of at", seed=-1),
        bad("stop holds ''; wanted strings that are", stop=[""]),
        bad("stop holds 3; wanted strings that are", stop=[3]),
    ],
)
def test_bad_input(fuser, request_, match, status):
    for call in (fuser.generate, fuser.stream):
        with pytest.raises(MinifuseError, match=match) as error:
            call(**request_)
        assert error.value.exit_status == status
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"continuations": []}, "continuations is \\[\\]; wanted a list of at least one"),
        ({"continuations": "Paris"}, "continuations is 'Paris'; wanted a list"),
        ({"continuations": ["a", ""]}, "continuation 2 is ''; wanted text"),
        ({"continuations": [3]}, "continuation 1 is 3; wanted text"),
        ({"continuations": ["a"], "methods": "vote"}, "vote has no probabilities"),
        ({"continuations": ["a"], "segments": []}, "segments is empty"),
    ],
)
def test_bad_input_to_score(fuser, changes, match):
    with pytest.raises(UsageError, match=match) as error:
        fuser.score(**{**REQUEST, **changes})
    assert error.value.exit_status == 2


def test_bad_input_to_a_batch_stops_it_before_anything_runs(fuser, monkeypatch):
    calls = count_calls(fuser, monkeypatch)
    with pytest.raises(UsageError, match="segments is empty"):
        fuser.generate_batch([Request(["a"])] * 9 + [Request([])])
    assert not calls
    for size in (0, -1, 1.5):
        with pytest.raises(UsageError, match=f"batch_size is {size}"):
            fuser.generate_batch([Request(["a"])], batch_size=size)
    assert fuser.generate_batch([]) == []


def test_a_misspelled_option_is_a_type_error(fuser):
    for call in (fuser.generate, fuser.stream):
        with pytest.raises(TypeError, match="max_tokens"):
            call(**REQUEST, max_tokens=3)
    with pytest.raises(TypeError, match="max_tokens"):
        fuser.generate_batch([Request(**REQUEST)], max_tokens=3)
    with pytest.raises(TypeError, match="temprature"):
        fuser.score(**REQUEST, continuations=["a"], temprature=1)
    with pytest.raises(TypeError, match="sufix"):
        fuser.generate(segments=["a"], sufix="b")


def test_a_prompt_beyond_the_context_is_an_error_with_both_numbers(fuser):
    case = make_case(fuser, **REQUEST)
    prompt = len(case.prompt(0))
    longest = fuser.model.config.max_position_embeddings
    exactly = longest - prompt
    with pytest.raises(UsageError) as error:
        fuser.generate(**REQUEST, methods="origin", max_new_tokens=exactly + 1)
    assert f"needs {longest + 1} positions: a prompt of {prompt}" in str(error.value)
    assert f"the model has {longest}" in str(error.value)
    assert error.value.exit_status == 2
    next(fuser.stream(**REQUEST, methods="origin", max_new_tokens=exactly))  # what fits, runs
    # Segments share positions: only the methods that lay them end to end run out of them.
    many = {"segments": ["the value of the model? " * 20] * 12, "suffix": "A:"}
    fuser.generate(**many, methods="fused", max_new_tokens=1)
    for method in ("concat", "fused_plain"):
        with pytest.raises(UsageError, match=f"{method} needs .* the model has {longest}"):
            fuser.generate(**many, methods=["fused", method], max_new_tokens=1)
    with pytest.raises(UsageError, match=f"the model has {longest}"):
        fuser.score(**REQUEST, continuations=["Z" * longest])


@pytest.mark.parametrize("beta", [1.0, -1.0])
def test_the_longest_segment_counts_wherever_it_stands(fuser, beta):
    """Any segment may turn out heaviest."""
    config = replace(fuser.model.config, max_position_embeddings=40)
    small = minifuse.Fuser(replace(fuser.model, config=config), compile=False)
    for segments in (["Q: Z " * 20, "Q: Z"], ["Q: Z", "Q: Z " * 20]):
        with pytest.raises(UsageError, match="the model has 40"):
            small.generate(segments=segments, suffix="A:", methods=["weighted_max"], beta=beta)


def test_the_last_position_is_as_good_as_any(folder, truth):
    """A context of which a request takes every position."""
    model = load_model(folder)
    case_fuser = minifuse.Fuser(model, compile=False)
    prompt = len(make_case(case_fuser, **REQUEST).prompt(1))
    config = replace(model.config, max_position_embeddings=prompt + 4)
    small = minifuse.Fuser(replace(model, config=config), compile=False)
    results = small.generate(**REQUEST, methods="fused", max_new_tokens=4)
    check_results(small, truth, results, REQUEST, max_new_tokens=4)


def test_a_request_beyond_memory_is_an_error_with_both_numbers(fuser):
    config = replace(fuser.model.config, max_position_embeddings=10**12)
    endless = minifuse.Fuser(replace(fuser.model, config=config), compile=False)
    slots = 2**34
    # Keys and values of 2 layers, 2 heads and 16 numbers of 4 bytes.
    needed = slots * 2 * 2 * 2 * 16 * 4
    wanted = rf"1 x {slots} slots needs {needed / 1e9:.2f} GB and \d+\.\d\d GB of memory are free"
    for call in (endless.generate, endless.stream):
        with pytest.raises(MinifuseError, match=wanted) as error:
            call(**REQUEST, max_new_tokens=10**10)
        assert error.value.exit_status == 1


def test_segments_of_one_token_without_suffix(fuser):
    """Their views take the only token over, so that there is no segment left to encode."""
    ids = fuser.model.tokenizer.encode("Z", is_start=False)
    assert len(ids) == 1
    with pytest.warns(UserWarning, match="a segment of one token has no likelihood"):
        results = fuser.generate(
            prefix="def f:", segments=["Z", "Z"], methods="all", max_new_tokens=2
        )
    plain = results["origin"]
    assert plain.prompt_tokens == len(fuser.model.tokenizer.encode("def f:", is_start=True)) + 1
    assert all(
        g.token_ids == plain.token_ids
        for g in flat(results)
        if g.method not in ("concat", "fused_plain")
    )
