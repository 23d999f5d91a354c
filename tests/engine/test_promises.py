"""The ten promises of the design, on tiny models."""

import inspect
import itertools
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import reference
import torch
from engine_cases import (
    EVERY_METHOD,
    REQUEST,
    SEGMENTS,
    SYMMETRIC,
    TOLERANCE,
    WORDS,
    assert_identical,
    assert_same,
    check_results,
    flat,
    make_case,
    nothing_compiles,
    requests,
    segment_hidden,
)
from hypothesis import given, settings
from reference import METHODS, WEIGHTED
from tiny_files import CONTROLS

import minifuse
from minifuse.engine import Request
from minifuse.errors import UsageError
from minifuse.executor import DECODE_BLOCKS, PREFILL_SIZES
from minifuse.pool import LABEL_COUNTS, MIN_SLOTS


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

    def note(pool, groups):
        rows.append(len(groups[0][1]))
        return decode(pool, groups)

    monkeypatch.setattr(fuser.executor, "decode", note)
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
        for buffers in fuser.executor._free_buffers:
            for layer in (*buffers.cache.keys, *buffers.cache.values):
                layer.fill_(1e4)
    assert_identical(fuser.generate(**REQUEST, **options), wanted)


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
    sizes = {g[:2] for g in compiled.executor.graphs if g.size.slots == MIN_SLOTS}
    assert sizes == {("prefill", n) for n in PREFILL_SIZES} | {("decode", n) for n in DECODE_BLOCKS}
    with nothing_compiles(compiled):
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
    with pytest.raises(AssertionError, match="a graph was added"), nothing_compiles(compiled):
        next(compiled.stream(**REQUEST, max_new_tokens=1100))


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
    with pytest.raises(UsageError, match="quantize is 'int3'"):
        minifuse.load(quantize="int3")


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
