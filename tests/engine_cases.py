"""What the tests of the engine share: requests, and comparison with the dense reference."""

from collections import Counter
from contextlib import contextmanager

import reference
import torch
from hypothesis import strategies as st
from reference import METHODS, WEIGHTED, Case, count_near_ties, near_tie
from tiny_files import make_model

from minifuse import engine
from minifuse.executor import Executor, count_compiled_graphs
from minifuse.layout import Encoding, PackedPrompt, Prompt
from minifuse.linear import PackedWeight, dequantize
from minifuse.pool import LABEL_COUNTS, Need, Size
from minifuse.prefill import tokens_of

# Float32 against a float64 reference: sums of at most 96 products over 2 layers, 2**-24 relative
# each, on numbers of order 10: estimated at 1e-5, not measured; the bound leaves a factor of ten.
TOLERANCE = 1e-4
EVERY_METHOD = (*METHODS, "vote")
# Methods whose answer does not depend on the order of the segments.
SYMMETRIC = [m for m in EVERY_METHOD if m not in ("origin", "per_prompt", "fused_plain", "concat")]

SEGMENTS = ["Q: value of a key?\n", "Q: which is the key, and why?\n", "Q: key?\n"]
REQUEST = {"prefix": "def answer(question):\n", "segments": SEGMENTS, "suffix": "A:"}

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


def sharpen(model):
    """Attention far from uniform: what sees too much, or too little, shows."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
            layer.self_attn.k_proj.weight *= 2
    return model


def floats_of(params):
    """The same Params, each quantized weight as the f32 matrix that it stands for."""
    if isinstance(params, PackedWeight):
        return dequantize(params, torch.float32)
    if isinstance(params, tuple):
        parts = [floats_of(part) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    return params


def make_sharp_model():
    return sharpen(make_model("llama", max_position_embeddings=2048))


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


def truth_of(fuser, request, max_new_tokens) -> reference.Reference:
    """A reference that knows how far the longest answer of a request with all methods reaches."""
    case = make_case(fuser, **request)
    everything = case.prefix_ids + sum(case.segment_ids, ()) + case.suffix_ids
    length = fuser.model.config.rope_length(len(everything) + max_new_tokens)
    return reference.Reference(fuser.model.config, fuser.model.params, rope_length=length)


@contextmanager
def nothing_compiles(fuser):
    """No graph is added to those of the fuser, and the compiler itself counts none either."""
    graphs, counted = list(fuser.executor.graphs), count_compiled_graphs()
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
    assert list(fuser.executor.graphs) == graphs, "a graph was added"
    assert count_compiled_graphs() == counted
    assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks


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


def segment_hidden(fuser, case, index) -> torch.Tensor:
    """Hidden states of one segment in a prefill of all of them."""
    executor = fuser.executor
    packed = PackedPrompt(Prompt(case.prefix_ids, case.segment_ids, case.suffix_ids))
    packed.prefix()
    wanted = [packed.segment(Encoding.ALONE, i) for i in range(case.num_segments)][index]
    spans = packed.take_pending()
    with executor.pool(Size(slots=1024, labels=LABEL_COUNTS[0])) as pool:
        need = Need(packed.num_slots, packed.num_labels)
        lease = pool.lease(need, executor.make_inv_freq(None))
        pool.write_rules([(lease, packed.sees)])
        (hidden,) = executor.prefill(pool, [(lease, tokens_of(spans))])
    start = sum(len(span.token_ids) for span in spans[: spans.index(wanted)])
    return hidden[start : start + len(wanted.token_ids)]


def keep_a_stale_slot(fuser, monkeypatch):
    """A fault: after a step the first request's newest key is the one that lay there before."""
    decode = Executor.decode

    def forget_a_key(self, own, groups):
        if not all(0 < len(tokens) < 8 for _, tokens in groups):
            return decode(self, own, groups)
        (lease, tokens), *_ = groups
        slot = lease.slots[tokens[-1].slot]
        before = [keys[:, :, slot].clone() for keys in own.cache.keys]
        logits = decode(self, own, groups)
        for keys, key in zip(own.cache.keys, before, strict=True):
            keys[:, :, slot] = key
        return logits

    monkeypatch.setattr(Executor, "decode", forget_a_key)


def lose_a_stored_prefix(fuser, monkeypatch):
    """A fault: a prefix that was stored comes back as zeros."""

    def write_zeros(cache, slots, stored):
        for layer in cache.keys:
            layer[:, :, slots] = 0

    monkeypatch.setattr(engine, "write_slots", write_zeros)
