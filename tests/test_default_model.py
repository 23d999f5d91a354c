"""The default model, compiled, against transformers and the dense reference; and the promises."""

import random
from dataclasses import replace

import pytest
import reference
import torch
from engine_cases import (
    EVERY_METHOD,
    assert_same,
    check_results,
    flat,
    make_case,
    nothing_compiles,
    segment_hidden,
)
from reference import METHODS, count_near_ties
from transformers import AutoModelForCausalLM, AutoTokenizer

import minifuse
from minifuse.engine import Request
from minifuse.executor import DECODE_BLOCKS, PREFILL_SIZES
from minifuse.loader import resolve_model
from minifuse.model import forward_plain
from minifuse.pool import MIN_SLOTS

pytestmark = pytest.mark.model

# What the project promises in float32 (issue 2, section 5); five prompts beside transformers
# differed by at most 7e-5.
TOLERANCE = 1e-3
NEW_TOKENS = 64

FACTS = [
    ("France", "Paris"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Canada", "Ottawa"),
    ("Norway", "Oslo"),
    ("Peru", "Lima"),
    ("Kenya", "Nairobi"),
    ("Italy", "Rome"),
    ("Cuba", "Havana"),
    ("Austria", "Vienna"),
]
PROSE = [
    "The lighthouse keeper had not spoken to anyone for three weeks, and so",
    "To make a simple bread, you need flour, water, salt and",
    "def fibonacci(n):\n    ",
    "In 1969, for the first time in history,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three most important properties of water are",
    "Once upon a time, in a village between two mountains, there lived",
    "Photosynthesis is the process by which",
    "Q: Why is the sky blue?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
]


def five_shots(number: int) -> str:
    """Five questions with answers, each another choice."""
    shots = [FACTS[(number + i) % len(FACTS)] for i in range(1, 6)]
    return "".join(f"Q: What is the capital of {land}?\nA: {city}\n\n" for land, city in shots)


PROMPTS = [
    f"{five_shots(n)}Q: What is the capital of {FACTS[n][0]}?\nA:" for n in range(10)
] + PROSE
REQUEST = {
    "prefix": five_shots(3),
    "segments": [
        "Q: What is the capital of Norway?\n",
        "Q: Norway's capital city is called what?\n",
        "Q: Which city is the seat of government of Norway?\n",
    ],
    "suffix": "A:",
}


@pytest.fixture(scope="module")
def hub_folder(default_fuser):
    """Where the converted default model lies; by then it is in the cache."""
    return resolve_model().folder


@pytest.fixture(scope="module")
def hf_model(hub_folder):
    return AutoModelForCausalLM.from_pretrained(hub_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def truth(default_fuser):
    """In float32: as float64 the weights alone would take 1 GB."""
    model = default_fuser.model
    return reference.Reference(model.config, model.params, torch.float32)


@torch.inference_mode()
def hf_logits(hf_model, prompt_ids, forced) -> torch.Tensor:
    """transformers' logits [n + 1, V] after a prompt and after each forced token."""
    ids = torch.tensor([[*prompt_ids, *forced]])
    return hf_model(ids).logits[0, len(prompt_ids) - 1 :].float()


@pytest.fixture
def endless(monkeypatch):
    """Makes a fuser ignore end tokens, so that every answer has its full length."""

    def apply(fuser):
        monkeypatch.setattr(fuser, "model", replace(fuser.model, eos_token_ids=()))
        return fuser

    return apply


@pytest.mark.parametrize("system", [None, "You answer with one word."])
def test_a_chat_is_the_prompt_that_transformers_renders(
    default_fuser, hf_model, hub_folder, system
):
    """The same token ids as the whole text gives, and the same answer."""
    tokenizer = AutoTokenizer.from_pretrained(hub_folder)
    question = "What is the capital of France?"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"Answer the question.\n{question}"})
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    result = default_fuser.generate(
        prefix="Answer the question.\n",
        segments=[question],
        chat=True,
        system=system,
        methods=["origin", "fused"],
        max_new_tokens=12,
    )
    prompt = [id for e in result["origin"].layout if e.part != "answer" for id in e.token_ids]
    assert prompt == wanted
    for generation in flat(result):
        ids = generation.token_ids
        logprobs = hf_logits(hf_model, wanted, ids).log_softmax(-1)
        count_near_ties(ids, logprobs, TOLERANCE)
        if generation.finish_reason == "stop":
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert int(logprobs[len(ids)].argmax()) == end
    assert "Paris" in result["fused"].text


def test_logits_equal_transformers(default_fuser, hf_model):
    model = default_fuser.model
    for prompt in PROMPTS[::4]:
        ids = model.tokenizer.encode(prompt, is_start=True)
        ours = forward_plain(model.config, model.params, torch.tensor([ids]))[0]
        theirs = hf_logits(hf_model, ids[:1], ids[1:])
        print(f"largest logit difference {float((ours - theirs).abs().max()):.1e}")
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_greedy_tokens_equal_transformers(default_fuser, hf_model, endless):
    """transformers gets our tokens: if it would pick each of them, it generates the same text."""
    fuser = endless(default_fuser)
    ties = 0
    for prompt in PROMPTS:
        generation = fuser.generate(segments=[prompt], max_new_tokens=NEW_TOKENS)["fused"]
        ids = generation.token_ids
        assert len(ids) == NEW_TOKENS
        logits = hf_logits(hf_model, fuser.model.tokenizer.encode(prompt, is_start=True), ids)
        # Two scores may each be wrong by the tolerance.
        ties += count_near_ties(ids, logits, 2 * TOLERANCE)
        wanted = logits.log_softmax(-1)[range(NEW_TOKENS), list(ids)]
        torch.testing.assert_close(
            torch.tensor(generation.logprobs), wanted, atol=TOLERANCE, rtol=0
        )
    print(f"{ties} of {NEW_TOKENS * len(PROMPTS)} tokens differ, each at a near tie")
    # Shown, not hidden: over 1280 tokens one or two scores may be as close as rounding.
    assert ties <= 2, f"{ties} tokens differ from transformers, each at a near tie"


def test_generate_of_transformers_is_the_same(default_fuser, hf_model):
    """Once by transformers' own loop, end token included."""
    prompt_ids = default_fuser.model.tokenizer.encode(PROMPTS[0], is_start=True)
    theirs = hf_model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=list(default_fuser.model.eos_token_ids),
        pad_token_id=0,
    )[0, len(prompt_ids) :].tolist()
    ours = default_fuser.generate(segments=[PROMPTS[0]], max_new_tokens=24)["fused"].token_ids
    ends = set(default_fuser.model.eos_token_ids)
    assert list(ours) == [i for i in theirs if i not in ends]


@pytest.mark.parametrize("number", [0, 4, 8])
def test_logit_avg_equals_transformers_on_each_prompt(default_fuser, hf_model, endless, number):
    fuser = endless(default_fuser)
    land = FACTS[number][0]
    request = {
        "prefix": five_shots(number),
        "segments": [
            f"Q: What is the capital of {land}?\n",
            f"Q: {land} has which capital?\n",
            f"Q: Name the city from which {land} is governed.\n",
            f"Q: capital {land}\n",
        ],
        "suffix": "A:",
    }
    generation = fuser.generate(**request, methods="logit_avg", max_new_tokens=16)["logit_avg"]
    case = make_case(fuser, **request)
    ids = generation.token_ids
    mean = torch.stack([hf_logits(hf_model, case.prompt(i), ids) for i in range(4)]).mean(0)
    ties = count_near_ties(ids, mean, 2 * TOLERANCE)
    assert ties == 0, f"{ties} tokens differ, each at a near tie"
    wanted = mean.log_softmax(-1)[range(16), list(ids)]
    torch.testing.assert_close(torch.tensor(generation.logprobs), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("positions", "suffix", "weights"), [("aligned", "A:", None), ("restart", "", [3, 0, 1])]
)
def test_every_method_equals_the_reference(default_fuser, truth, positions, suffix, weights):
    """Promise 3, and promise 6 in that the reference has no cache."""
    request = {**REQUEST, "suffix": suffix, "positions": positions, "weights": weights}
    results = default_fuser.generate(**request, methods="all", max_new_tokens=3)
    assert set(results) == set(EVERY_METHOD)
    check_results(default_fuser, truth, results, request, max_new_tokens=3, tolerance=2 * TOLERANCE)


def test_promise_1_segments_are_encoded_as_if_alone(default_fuser, truth):
    case = make_case(default_fuser, **REQUEST)
    other = make_case(default_fuser, segments=PROSE[:2])
    for index, ids in enumerate(case.segment_ids[:2]):
        alone = reference.plain_hidden(
            default_fuser.model.config, truth.params, case.prefix_ids + ids
        )
        wanted = alone[len(case.prefix_ids) :]
        changed = replace(
            case,
            segment_ids=tuple(
                own if i == index else other.segment_ids[i % 2]
                for i, own in enumerate(case.segment_ids)
            ),
        )
        for variant in (case, changed):
            torch.testing.assert_close(
                segment_hidden(default_fuser, variant, index), wanted, atol=TOLERANCE, rtol=1e-4
            )


def test_promise_2_one_segment_is_plain_decoding(default_fuser, hf_model):
    request = {**REQUEST, "segments": REQUEST["segments"][:1]}
    ids = make_case(default_fuser, **request).prompt(0)
    results = default_fuser.generate(**request, methods="all", max_new_tokens=6)
    for generation in flat(results):
        logits = hf_logits(hf_model, ids, generation.token_ids)
        count_near_ties(generation.token_ids, logits, 2 * TOLERANCE)
        assert generation.token_ids == results["origin"].token_ids, generation.method


@pytest.mark.parametrize("positions", ["aligned", "restart"])
def test_promise_4_copies_weigh_as_one(default_fuser, positions):
    options = {"methods": "fused", "positions": positions}
    segments = REQUEST["segments"][:1]
    texts = {"prefix": REQUEST["prefix"], "suffix": REQUEST["suffix"]}
    one = default_fuser.generate(**texts, segments=segments, **options, max_new_tokens=6)
    many = default_fuser.generate(**texts, segments=segments * 5, **options, max_new_tokens=6)
    assert_same(many, one, tolerance=TOLERANCE)


@pytest.mark.parametrize("positions", ["aligned", "restart"])
def test_promise_5_order_does_not_matter(default_fuser, positions):
    methods = [m for m in METHODS if m not in ("origin", "per_prompt", "fused_plain", "concat")]
    options = {"methods": [*methods, "vote"], "positions": positions, "max_new_tokens": 4}
    one = default_fuser.generate(**REQUEST, weights=[3, 1, 2], **options)
    order = (2, 0, 1)
    permuted = {**REQUEST, "segments": [REQUEST["segments"][i] for i in order]}
    other = default_fuser.generate(**permuted, weights=[2, 3, 1], **options)
    assert_same(other, one, tolerance=TOLERANCE)


def test_promise_6_compiled_is_eager(default_fuser):
    eager = minifuse.Fuser(default_fuser.model, compile=False)
    options = {"methods": "all", "max_new_tokens": 3}
    assert_same(
        default_fuser.generate(**REQUEST, **options),
        eager.generate(**REQUEST, **options),
        tolerance=TOLERANCE,
    )


def test_promise_6_batched_is_alone_and_a_prefix_may_be_reused(default_fuser):
    first = {**REQUEST, "segments": REQUEST["segments"][:2]}
    second = {"prefix": "", "segments": ["Q: Who wrote Hamlet?\n"], "suffix": "A:"}
    options = {"methods": ["fused", "logit_avg"], "max_new_tokens": 5}
    together = default_fuser.generate_batch([Request(**first), Request(**second)], **options)
    default_fuser._prefixes.clear()
    for request, results in zip((first, second), together, strict=True):
        alone = default_fuser.generate(**request, **options)
        assert_same(alone, results, tolerance=TOLERANCE)
        # The second time its prefix is a stored one.
        assert_same(default_fuser.generate(**request, **options), alone, tolerance=0)


def test_promise_7_nothing_recompiles(default_fuser):
    """Thirty-two random layouts with all methods, after a call for each size that occurs."""
    fuser, draw = default_fuser, random.Random(5)
    words = " ".join(PROSE).split()

    def text(low, high):
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    fuser.generate(segments=["Z " * 420], methods="origin", max_new_tokens=2)
    fuser.generate(**REQUEST, methods="per_prompt", max_new_tokens=2)
    fuser.score(**REQUEST, continuations=[" one two three four five"], methods="all")
    sizes = {
        graph[:2]
        for graph in fuser.executor.graphs
        if graph.size.slots == MIN_SLOTS and not graph.size.is_shared
    }
    assert sizes == {("prefill", n) for n in PREFILL_SIZES} | {("decode", n) for n in DECODE_BLOCKS}
    prefixes = ["", *(text(1, 30) for _ in range(6))]
    with nothing_compiles(fuser):
        for number in range(32):
            count = draw.randint(1, 5)
            suffix = draw.choice(["A:", " So", ""])
            given = [draw.uniform(0, 1) for _ in range(count)]
            # Every method runs in the half of the calls that can afford it.
            everything = draw.sample(EVERY_METHOD, len(EVERY_METHOD))
            results = fuser.generate(
                prefix=draw.choice(prefixes),
                segments=[text(2, 20) + ("" if suffix else " Z") for _ in range(count)],
                suffix=suffix,
                weights=draw.choice([None, "likelihood", "confidence", given]),
                methods=everything if number % 2 else everything[: draw.randint(1, 13)],
                positions=draw.choice(["aligned", "restart"]),
                beta=draw.uniform(0, 2),
                balance=draw.uniform(0, 1),
                max_new_tokens=2,
            )
            for generation in flat(results):
                assert generation.recompiles == 0
                assert generation.timings["compile_s"] == 0
        scores = fuser.score(**REQUEST, continuations=[" Oslo", " Lima"], methods="all")
    assert set(scores) == set(METHODS)
    for method in ("fused", "logit_avg", "fused_auto", "concat"):
        assert scores[method][0] > scores[method][1] + 1


def test_bfloat16_differs_at_near_ties_alone(default_fuser_bf16, hub_folder, hf_model, endless):
    """What bfloat16 picks is, in float32, within the error that bfloat16 has in transformers.

    That error E is measured here on the same tokens; two scores may each be wrong by 2 E.
    """
    fuser = endless(default_fuser_bf16)
    rounded = AutoModelForCausalLM.from_pretrained(hub_folder, dtype=torch.bfloat16).eval()
    tokens = differing = 0
    for prompt in PROMPTS[::4]:
        ids = fuser.model.tokenizer.encode(prompt, is_start=True)
        ours = fuser.generate(segments=[prompt], max_new_tokens=24)["fused"]
        exact = hf_logits(hf_model, ids, ours.token_ids)
        error = float((hf_logits(rounded, ids, ours.token_ids) - exact).abs().max())
        differing += count_near_ties(ours.token_ids, exact, 4 * error)
        tokens += len(ours.token_ids)
        wanted = exact.log_softmax(-1)[range(24), list(ours.token_ids)]
        torch.testing.assert_close(torch.tensor(ours.logprobs), wanted, atol=2 * error, rtol=0)
    print(f"bfloat16: {differing} of {tokens} tokens differ from float32, each at a near tie")
    assert differing <= tokens // 10
