"""A soak: random requests, one after the other, and whatever is wrong with an answer or left over.

A call is drawn from a seed: one request or a batch of them, each with a prefix or none, any number
of segments of any length, weights; and for all of them methods, positions, sampling, stops. What it
answers is held to

- the definition (`definition`, in float64), token by token under the answer's own tokens, on tiny
  models of several families that are drawn here (`Definition`);
- or each request alone, on any other model (`Alone`).

A token has to be the one that the other computation picks from the same noise, or as good as that
one within the rounding of both. After a warm-up that gets every graph ready nothing may compile,
all slots and labels come back, and memory stays.
"""

import contextlib
import ctypes
import gc
import math
import os
import random
import string
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minifuse.answers import Results
from minifuse.checkpoint import expected_tensors, params_from_tensors
from minifuse.checks import ROUNDINGS, Bench, flat
from minifuse.config import GenerationConfig, ModelConfig
from minifuse.definition import FUSED, METHODS, WEIGHTED, Case, Reference, as_dtype, vote
from minifuse.engine import STORED_PREFIXES, Fuser
from minifuse.errors import MinifuseError
from minifuse.executor import MAX_DECODE_TOKENS, PADDING, PREFILL_SIZES, count_compiled_graphs
from minifuse.loader import LoadedModel
from minifuse.model import KV_BLOCK
from minifuse.pool import Lease, Need, Pool, Size
from minifuse.recompiles import count_graph_breaks
from minifuse.request import Options, Request, encode_prompt, make_plan
from minifuse.results import Generation, StreamEvent
from minifuse.sampling import make_generator
from minifuse.tokenizer import Tokenizer

# Pools that calls are drawn to fit into, so that every graph is known before the first of them.
SIZES = (Size(1024, 256), Size(1024, 256, True), Size(2048, 256, True), Size(2048, 1024, True))
MAX_BATCH = 6
MAX_SEGMENTS = 6
# What memory may grow by over all calls behind the warm-up, by a line through what is resident.
GROWTH_BYTES = 32 << 20
# Requests before memory is looked at: this share of all, and so many at least, while torch's own
# caches fill.
WARM_SHARE = 0.25
WARM_REQUESTS = 100
CALIBRATION_CALLS = 12

WORDS = (
    "the of which what city key value answer is in Norway France Zürich 東京 é def return model "
    "42 3.14 = ? , : ( ) Q: A:"
).split()
STOPS = (*string.ascii_letters, *string.digits, *"?.,:\n", " the", "qqq")
COMMON_PREFIXES = ("def answer(question):\n", "Q: capital of Japan?\nA: Tokyo\n\n", "é " * 30)

_SCALED = {"rope_theta": 10000.0, "factor": 3.0}
# What changes who sees whom, or how keys turn. The context of `dynamic` is exceeded on purpose.
FAMILIES: dict[str, dict] = {
    "llama": {"model_type": "llama", "max_position_embeddings": 2048},
    "mistral": {"model_type": "mistral", "max_position_embeddings": 2048, "sliding_window": 19},
    "qwen2": {
        "model_type": "qwen2",
        "max_position_embeddings": 2048,
        "use_sliding_window": True,
        "sliding_window": 19,
        "max_window_layers": 1,
    },
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {**_SCALED, "rope_type": "dynamic", "factor": 32.0},
    },
    "yarn": {
        "model_type": "qwen3",
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            **_SCALED,
            "rope_type": "yarn",
            "original_max_position_embeddings": 64,
        },
    },
}
VOCAB, NUM_EOS = 320, 8


@dataclass(frozen=True)
class Call:
    """What one seed stands for.

    family:   of the tiny models
    options:  for `generate_batch`
    forgets:  stored prefixes are dropped before it
    abandons: events after which a stream of the first request is closed before it, None for none
    streams:  the only request is streamed
    """

    seed: int
    family: str
    requests: tuple[Request, ...]
    batch_size: int
    options: Options
    forgets: bool
    abandons: int | None
    streams: bool


@dataclass
class Report:
    """What a soak came to.

    divergences: a line for each answer that is wrong
    faults:      what was left over, compiled, or grew
    worst:       largest difference between log-probabilities of the same token, in nats
    tokens, ties: tokens compared, and those among them that the other computation did not pick
    """

    calls: int = 0
    requests: int = 0
    answers: int = 0
    tokens: int = 0
    ties: int = 0
    worst: float = 0.0
    worst_share: float = 0.0
    tolerances: dict[str, float] = field(default_factory=dict)
    divergences: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    graphs: int = 0
    new_graphs: int = 0
    growth_bytes: int | None = None
    resident_bytes: int | None = None

    @property
    def is_passed(self) -> bool:
        return not self.divergences and not self.faults


# Calls


def draw_call(seed: int, *, max_new_tokens: int, is_short: bool = False) -> Call:
    """The call that a seed stands for.

    is_short: prompts that a larger model runs in reasonable time
    """
    rng = random.Random(seed)
    count = rng.choice((1, 1, 2, 3, rng.randint(1, MAX_BATCH)))
    methods = rng.choice(
        (["all"], rng.sample((*METHODS, "vote"), rng.randint(1, 4)), rng.sample(METHODS, 1))
    )
    if is_short and methods == ["all"]:
        methods = rng.sample((*METHODS, "vote"), 3)
    if "vote" in methods:
        methods = list(dict.fromkeys([*methods, "per_prompt"]))
    needs_end = methods == ["all"] or bool(set(FUSED) & set(methods))
    shared = _text(rng, 0, 25)
    requests = tuple(_draw_request(rng, shared, needs_end, is_short) for _ in range(count))
    options: Options = {
        "methods": methods,
        "positions": rng.choice(("aligned", "restart")),
        "beta": rng.choice((0.5, 1.0, 3.0, -1.0)),
        "balance": rng.choice((None, 1.0, 0.5, 0.0)),
        "max_new_tokens": rng.randint(1, max_new_tokens),
        "stop": rng.sample(STOPS, rng.choice((0, 0, 1, 15))),
    }
    if rng.random() < 0.5:
        options |= {
            "temperature": rng.choice((0.1, 0.7, 1.0, 1.8)),
            "top_k": rng.choice((0, 0, 1, 5, 40)),
            "top_p": rng.choice((1.0, 0.95, 0.5)),
            "seed": rng.randrange(2**31),
        }
    return Call(
        seed=seed,
        family=rng.choice(tuple(FAMILIES)),
        requests=requests,
        batch_size=rng.randint(1, count),
        options=options,
        forgets=rng.random() < 0.1,
        abandons=rng.randint(1, 3) if rng.random() < 0.1 else None,
        streams=count == 1 and rng.random() < 0.3,
    )


def _draw_request(rng: random.Random, shared: str, needs_end: bool, is_short: bool) -> Request:
    longest = rng.choice((4, 12, 12, 30 if is_short else 60))
    count = rng.randint(1, MAX_SEGMENTS)
    suffix = rng.choice(("", "A:", " the answer is", _text(rng, 1, 6)))
    segments = [_text(rng, 1, longest) for _ in range(count)]
    if rng.random() < 0.2:  # copies
        segments[-1] = segments[0]
    if needs_end and not suffix:
        # A view of several segments then wants their last tokens to be the same.
        segments = [f"{text} Z" for text in segments]
    prefix = rng.choice(("", shared, *COMMON_PREFIXES, _text(rng, 1, 40)))
    numbers = [rng.choice((0.0, 0.25, 1.0, 2.0, 7.5)) for _ in segments]
    weights = rng.choice((None, "likelihood", "confidence", numbers if any(numbers) else None))
    return Request(segments, prefix, suffix, weights)


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def fit_call(fuser: Fuser, call: Call, sizes: Sequence[Size]) -> Call:
    """The call, with mates and then segments left out until its pools are among those wanted."""
    plan = make_plan(**call.options)
    while True:
        try:
            jobs = [fuser._make_job(request, plan) for request in call.requests]
            batch = fuser._plan_batch(jobs, call.batch_size)
            alone = {fuser._plan_batch([job], 1)[0] for job in jobs}
            if {batch[0], *alone} <= set(sizes):
                return call
        except MinifuseError as error:
            if "shorten" not in str(error):  # more positions than the model has
                raise
        *others, last = call.requests
        if others:
            requests = tuple(others)
        elif len(last.segments) > 1:
            weights = last.weights
            if isinstance(weights, list):
                weights = weights[:-1] if any(weights[:-1]) else None
            requests = (replace(last, segments=last.segments[:-1], weights=weights),)
        else:
            raise MinifuseError(
                f"seed {call.seed}: one request does not fit into {sizes[0].slots} slots; ask for "
                "fewer new tokens"
            )
        call = replace(
            call, requests=requests, batch_size=min(call.batch_size, len(requests)), streams=False
        )


# Tiny models


def make_tiny(family: str) -> LoadedModel:
    """A model of a family with drawn weights in float32, and a byte-level vocabulary.

    Attention is far from uniform, so that what sees too much, or too little, shows. Several tokens
    end an answer, so that some do.
    """
    raw = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
    }
    config = ModelConfig.from_hf(raw | FAMILIES[family])
    generator = torch.Generator().manual_seed(0)

    def draw() -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected_tensors(config).items():
            weight = 0.1 * torch.randn(shape, generator=generator)
            if name.endswith("norm.weight"):
                weight += 1
            yield name, weight * (2 if "q_proj" in name or "k_proj" in name else 1)

    return LoadedModel(
        config=config,
        params=params_from_tensors(draw(), config, torch.float32),
        tokenizer=_make_tokenizer(),
        eos_token_ids=(0, *range(VOCAB - NUM_EOS + 1, VOCAB)),
        name=f"tiny {family}",
        source="drawn",
        dtype=torch.float32,
        folder=Path(),
    )


def _make_tokenizer() -> Tokenizer:
    import json

    from tokenizers import Tokenizer as Whole
    from tokenizers import decoders, models, pre_tokenizers, trainers

    whole = Whole(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    return Tokenizer(json.loads(whole.to_str()))


# What answers are held to


@dataclass(frozen=True)
class Noise:
    """How an answer's tokens are drawn: the filters, and the times of each step f64[V]."""

    config: GenerationConfig
    generator: torch.Generator | None

    def times(self, steps: int, size: int) -> list[Tensor] | None:
        """The exponential times of the first steps, None for greedy answers."""
        if self.generator is None:
            return None
        each = (torch.empty(size).exponential_(generator=self.generator) for _ in range(steps))
        return [times.double() for times in each]


def shortfall(
    scores: Tensor,
    tokens: Sequence[int],
    config: GenerationConfig,
    times: Tensor | None,
    tolerance: float,
) -> float:
    """How far the best of some tokens is from being picked, in nats; inf where a filter drops them.

    scores:    log-probabilities f64[V], of which each may be off by the tolerance
    times:     f64[V], None for greedy
    tolerance: in nats; tokens that may or may not pass the filters are not held to them
    """
    wanted = torch.tensor(list(tokens))
    if times is None:
        return float(scores.max() - scores[wanted].max())
    may, must = _kept(scores, config, 2 * tolerance)
    keys = scores - config.temperature * times.log()
    best = keys.masked_fill(~must, -math.inf).max()
    own = keys.masked_fill(~may, -math.inf)[wanted].max()
    return math.inf if own == -math.inf else max(0.0, float(best - own))


def _kept(scores: Tensor, config: GenerationConfig, margin: float) -> tuple[Tensor, Tensor]:
    """Tokens that may pass top-k and top-p, and those that must, bool[V] each."""
    may = must = torch.ones_like(scores, dtype=torch.bool)
    if config.top_k and config.top_k < len(scores):
        ordered = scores.sort(descending=True).values
        may = scores >= ordered[config.top_k - 1] - margin
        must = scores > ordered[config.top_k] + margin
    if config.top_p < 1:
        scaled = (scores - scores.max()) / config.temperature
        probs = scaled.masked_fill(~may, -math.inf).softmax(-1)
        order = scores.argsort(descending=True)
        # Mass before a token, without and with all that are as likely within the margin.
        totals = torch.cat([probs.new_zeros(1), probs[order].cumsum(-1)])
        falling = -scores[order]
        least = totals[torch.searchsorted(falling, -scores - margin)]
        most = totals[torch.searchsorted(falling, -scores + margin, right=True)] - probs
        slack = math.exp(margin / config.temperature)
        may = may & (least / slack < config.top_p)
        must = must & (most * slack < config.top_p)
    must = must.clone()
    must[scores.argmax()] |= not bool(must.any())
    return may | must, must


class Checker:
    """Compares answers of one model with another computation of them; notes what it finds.

    tolerance: of a log-probability, in nats
    """

    def __init__(self, fuser: Fuser, tolerance: float, report: Report):
        self.fuser = fuser
        self.tolerance = tolerance
        self.report = report
        self.watch = Watch(fuser)

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        """What is wrong with a request's answers."""
        raise NotImplementedError

    def noise(self, call: Call, request: Request, answer: Generation) -> Noise:
        """The noise that an answer was drawn with; methods that read one prompt share its own."""
        config = make_plan(**call.options).generation
        if config.temperature == 0:
            return Noise(config, None)
        prompt = encode_prompt(self.fuser.model.tokenizer, request, self.fuser._frame(None))
        index = _index_of(answer)
        method = answer.method if index is None else "per_prompt"
        return Noise(config, make_generator(config.seed, prompt, method, index))

    def note(self, ours: float, theirs: float) -> float:
        """The difference between two log-probabilities of the same token."""
        gap = abs(ours - theirs)
        self.report.worst = max(self.report.worst, gap)
        self.report.worst_share = max(self.report.worst_share, gap / self.tolerance)
        return gap

    def check_text(self, call: Call, answer: Generation) -> Iterator[str]:
        """Text, length and reason to end are those of the tokens."""
        model, ids = self.fuser.model, answer.token_ids
        text = model.tokenizer.decode(ids)
        places = [text.find(stop) for stop in call.options["stop"] if stop in text]
        wanted = text[: min(places)] if places else text
        if answer.text != wanted:
            yield f"text is {answer.text!r}, its tokens say {wanted!r}"
        before = model.tokenizer.decode(ids[:-1])
        if any(stop in before for stop in call.options["stop"]):
            yield f"goes on behind a stop string: {text!r}"
        if set(ids) & set(model.eos_token_ids):
            yield "goes on behind an end token"
        is_full = len(ids) == call.options["max_new_tokens"]
        if answer.finish_reason == "length" and (not is_full or places):
            yield f"ended by its length with {len(ids)} tokens, text {text!r}"
        if len(ids) > call.options["max_new_tokens"]:
            yield f"has {len(ids)} tokens"
        if len(answer.logprobs) != len(ids):
            yield f"has {len(answer.logprobs)} log-probabilities for {len(ids)} tokens"

    def ends_by_token(self, call: Call, answer: Generation) -> bool:
        """Whether one token more was picked, which ended the answer."""
        text = self.fuser.model.tokenizer.decode(answer.token_ids)
        return answer.finish_reason == "stop" and not any(s in text for s in call.options["stop"])


def _index_of(answer: Generation) -> int | None:
    """The segment of a stream that is one prompt alone, None for other answers."""
    if answer.method not in ("origin", "per_prompt", "weighted_max", "vote"):
        return None
    return next(entry.index for entry in answer.layout if entry.part == "segment")


class Definition(Checker):
    """Holds answers to the definition, in float64."""

    def __init__(self, fuser: Fuser, report: Report):
        params = fuser.model.params
        self.params = {dtype: as_dtype(params, dtype) for dtype in (torch.float32, torch.float64)}
        super().__init__(fuser, 0.0, report)
        self.tolerance = ROUNDINGS * self._rounding()

    def _rounding(self) -> float:
        """How far the definition's own log-probabilities stray in float32, at most."""
        worst = 0.0
        for seed in range(CALIBRATION_CALLS):
            call = fit_call(self.fuser, draw_call(-1 - seed, max_new_tokens=8), SIZES)
            request = call.requests[0]
            case = self._case(call, request)
            forced = case.segment_ids[0][:8]
            for method in METHODS:
                if method in FUSED and not case.suffix_ids and request.segments[0][-2:] != " Z":
                    continue
                index = 0 if method in ("per_prompt", "weighted_max") else None
                found = [
                    self._reference(call, request, dtype).logprobs(case, method, forced, index)
                    for dtype in self.params
                ]
                worst = max(worst, float((found[0].double() - found[1]).abs().max()))
        return worst

    def _case(self, call: Call, request: Request) -> Case:
        prompt = encode_prompt(self.fuser.model.tokenizer, request, self.fuser._frame(None))
        weights = request.weights
        return Case(
            prompt.prefix_ids,
            prompt.segment_ids,
            prompt.suffix_ids,
            weights if weights is None or isinstance(weights, str) else tuple(weights),
            call.options["positions"],
            call.options["beta"],
            call.options["balance"],
        )

    def _reference(self, call: Call, request: Request, dtype: torch.dtype) -> Reference:
        reach = self._reach(call, request)
        config = self.fuser.model.config
        return Reference(config, self.params[dtype], dtype, config.rope_length(reach))

    def _reach(self, call: Call, request: Request) -> int:
        """Positions that a request reaches by its longest answer, which dynamic RoPE goes by."""
        case = self._case(call, request)
        methods = list(METHODS) if "all" in call.options["methods"] else call.options["methods"]
        lengths = [len(ids) for ids in case.segment_ids]
        bodies = []
        for method in methods:
            if method in ("concat", "fused_plain"):
                bodies.append(sum(lengths))
            elif method == "origin":
                bodies.append(lengths[0])
            elif method == "weighted_max" and isinstance(case.weights, tuple):
                pairs = list(zip(case.weights, case.segment_ids, strict=True))
                bodies.append(len(max(pairs)[1]))
            else:
                bodies.append(max(lengths))
        outside = len(case.prefix_ids) + len(case.suffix_ids)
        return outside + max(bodies) + call.options["max_new_tokens"]

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        request = call.requests[number]
        case = self._case(call, request)
        truth = self._reference(call, request, torch.float64)
        for answer in flat(results):
            for problem in self._check_answer(call, request, case, truth, answer):
                yield f"{answer.method}: {problem}"
        if "vote" in results:
            voted, answers = results["vote"], results["per_prompt"]
            assert isinstance(voted, Generation)
            assert isinstance(answers, list)
            winner = vote(answers)
            if voted.text != winner.text:
                yield f"vote: is {voted.text!r}, the majority says {winner.text!r}"

    def _check_answer(
        self, call: Call, request: Request, case: Case, truth: Reference, answer: Generation
    ) -> Iterator[str]:
        yield from self.check_text(call, answer)
        index, ids, tolerance = _index_of(answer), answer.token_ids, self.tolerance
        method = "per_prompt" if index is not None else answer.method
        wanted = truth.weights(case, answer.method)
        weights = answer.weights
        if answer.method in WEIGHTED:
            assert weights is not None, f"{answer.method} has no weights"
            gap = max(abs(a - b) for a, b in zip(weights, wanted, strict=True))
            # Each weight turns beta times what the signal is off by into its own share of that.
            if gap > 2 * (1 + abs(case.beta)) * tolerance:
                yield f"weights are {weights}, the definition says {wanted}"
        if answer.method == "weighted_max":
            assert weights is not None
            assert index is not None
            heaviest, _ = max(
                enumerate(zip(weights, case.segment_ids, strict=True)), key=lambda each: each[1]
            )
            if case.segment_ids[index] != case.segment_ids[heaviest]:
                yield f"reads segment {index + 1}, the heaviest is {heaviest + 1}"
        logprobs = truth.logprobs(case, method, ids, index)
        noise = self.noise(call, request, answer)
        times = noise.times(len(ids) + 1, logprobs.shape[-1])
        steps: list[tuple[int, Sequence[int]]] = [(n, [token]) for n, token in enumerate(ids)]
        if self.ends_by_token(call, answer):
            steps.append((len(ids), self.fuser.model.eos_token_ids))
        for step, tokens in steps:
            own_times = None if times is None else times[step]
            behind = shortfall(logprobs[step], tokens, noise.config, own_times, tolerance)
            self.report.tokens += 1
            self.report.ties += behind > 0
            if behind > 2 * tolerance:
                yield (
                    f"token {step + 1} is {tokens[0]}, {behind:.3g} nats behind the definition's "
                    f"pick; tolerance {2 * tolerance:.2g}"
                )
            if step < len(ids):
                gap = self.note(answer.logprobs[step], float(logprobs[step, tokens[0]]))
                if gap > tolerance:
                    yield (
                        f"token {step + 1} has log-probability {answer.logprobs[step]:.6f}, "
                        f"{gap:.3g} nats off; tolerance {tolerance:.2g}"
                    )


class Alone(Checker):
    """Holds the answers of requests in a batch to those of each alone."""

    def __init__(self, fuser: Fuser, report: Report):
        super().__init__(fuser, Bench(fuser).tolerance, report)

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        request = call.requests[number]
        alone = self.fuser.generate_batch([request], **call.options)[0]
        for one, other in zip(flat(results), flat(alone), strict=True):
            for problem in self.check_text(call, one):
                yield f"{one.method}: {problem}"
            for problem in self._compare(call, request, one, other):
                yield f"{one.method}: {problem}"

    def _compare(
        self, call: Call, request: Request, one: Generation, other: Generation
    ) -> Iterator[str]:
        length = max(len(one.token_ids), len(other.token_ids)) + 1
        picks = [(*g.token_ids, *[None] * (length - len(g.token_ids))) for g in (one, other)]
        for step, (token, wanted) in enumerate(zip(*picks, strict=True)):
            if token is None and wanted is None:
                break
            self.report.tokens += 1
            if token == wanted:
                gap = self.note(one.logprobs[step], other.logprobs[step])
                if gap > self.tolerance:
                    yield (
                        f"token {step + 1} has log-probability {one.logprobs[step]:.6f}, alone "
                        f"{other.logprobs[step]:.6f}; tolerance {self.tolerance:.2g}"
                    )
                continue
            self.report.ties += 1
            yield from self._check_parting(call, request, one, other, step)
            return  # from here on they are other texts
        if (one.text, one.finish_reason) != (other.text, other.finish_reason):
            yield f"same tokens, but {one.text!r} is alone {other.text!r}"

    def _check_parting(
        self, call: Call, request: Request, one: Generation, other: Generation, step: int
    ) -> Iterator[str]:
        """Where two answers part, either token has to be as good as the best."""
        if one.method == "vote" and _index_of(one) != _index_of(other):
            return  # other votes, each compared by itself
        index = _index_of(one)
        method = "per_prompt" if index is not None else one.method
        longer = max(one.token_ids, other.token_ids, key=len)
        self.watch.is_off = True  # a pool that scores goes as a whole
        found = self.fuser.distributions(
            segments=request.segments,
            prefix=request.prefix,
            suffix=request.suffix,
            weights=request.weights,
            continuation=longer[: step + 1],
            methods=method,
            positions=call.options["positions"],
            beta=call.options["beta"],
            balance=call.options["balance"],
        )[method]
        self.watch.is_off = False
        scores = (found if index is None else found[index])[step].double()
        noise = self.noise(call, request, one)
        times = noise.times(step + 1, len(scores))
        for answer, name in ((one, "in the batch"), (other, "alone")):
            tokens = answer.token_ids[step : step + 1] or self.fuser.model.eos_token_ids
            own_times = None if times is None else times[-1]
            behind = shortfall(scores, tokens, noise.config, own_times, self.tolerance)
            if behind > 2 * self.tolerance:
                yield (
                    f"token {step + 1} is {tokens[0]} {name}, {behind:.3g} nats behind the best; "
                    f"tolerance {2 * self.tolerance:.2g}"
                )


# Running


def warm_up(fuser: Fuser, sizes: Sequence[Size]) -> None:
    """Get every graph ready that pools of these sizes need."""
    executor = fuser.executor
    inv_freq = executor.make_inv_freq(fuser.model.config.rope_length(1))
    for size in sizes:
        blocks = executor._blocks_of("decode", size)
        with executor.pool(size) as pool:
            lease = Lease([0], [0], inv_freq)
            for count in PREFILL_SIZES:
                executor.prefill(pool, [(lease, [PADDING] * count)])
            for count in blocks:
                assert count <= MAX_DECODE_TOKENS
                executor.decode(pool, [(lease, [PADDING] * count)])


class Watch:
    """Looks at what is left over: pools, buffers, prefixes, graphs, memory."""

    def __init__(self, fuser: Fuser):
        self.fuser = fuser
        self.lines: list[str] = []
        self.is_off = False
        make_pool = fuser.executor.pool

        @contextlib.contextmanager
        def watched(size: Size) -> Iterator[Pool]:
            with make_pool(size) as pool:
                yield pool
                # Not where it was abandoned; at once, since the next pool has the same memory.
                if not self.is_off:
                    self.lines += _left_in(pool)

        fuser.executor.pool = watched  # type: ignore[method-assign]  # of this one alone
        self.counts = self._count()

    def _count(self) -> tuple[int, int, int, int]:
        executor = self.fuser.executor
        graphs = len(executor.graphs)
        return graphs, count_compiled_graphs(), count_graph_breaks(), executor.recompiles

    def start(self) -> None:
        """What has been compiled so far is right."""
        self.counts = self._count()
        self.lines.clear()

    def new_graphs(self) -> int:
        """Graphs, graph breaks and recompilations since then; 0 where nothing is compiled ahead."""
        if not self.fuser.executor.is_compiled:
            return 0
        now = self._count()
        found = sum(b - a for a, b in zip(self.counts, now, strict=True))
        self.counts = now
        return found

    def left_over(self) -> Iterator[str]:
        """What the calls since the last look did not give back."""
        yield from self.lines
        self.lines.clear()
        if len(self.fuser._prefixes) > STORED_PREFIXES:
            yield f"{len(self.fuser._prefixes)} prefixes are stored"


def _left_in(pool: Pool) -> Iterator[str]:
    """What a pool whose requests are done still holds, beside prefixes."""
    if pool.num_requests:
        yield f"{pool.num_requests} leases were not given back"
    users = sum(lease.users for lease in pool.prefixes.values())
    if users:
        yield f"prefixes have {users} users that are gone"
    pool.release_prefixes()
    whole = Need(pool.size.slots - KV_BLOCK, pool.size.labels - 1)
    if pool.lease(whole, torch.empty(0)) is None or bool(pool.key_labels.any()):
        yield "slots or labels of a pool were not given back"


def resident_bytes() -> int:
    """Memory of this process that is resident, what is freed given back before; 0 if unknown."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth_of(samples: Sequence[tuple[int, int]]) -> int | None:
    """What a line through (requests, bytes) rises by from first to last; None for too few."""
    if len(samples) < 4:
        return None
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return int(slope * (x[-1] - x[0]))


def soak(
    open_checker: Callable[[str, Report], Checker],
    *,
    seed: int,
    requests: int,
    max_new_tokens: int,
    is_short: bool = False,
    sizes: Sequence[Size] = SIZES,
    is_single: bool = False,
    families: Sequence[str] | None = tuple(FAMILIES),
    say: Callable[[Report, Sequence[str]], None] = lambda report, lines: None,
) -> Report:
    """Run calls from a seed on until so many requests have been answered.

    open_checker: the model of a family, and what its answers are held to; asked for once each
    is_single:    one call alone, without a look at memory
    families:     of the tiny models; None where there is one model, whatever the family
    say:          told after every call, with the lines that it added
    """
    report = Report()
    models: dict[str, tuple[Checker, Watch]] = {}

    def model_of(family: str) -> tuple[Checker, Watch]:
        if family not in models:
            checker = open_checker(family, report)
            report.tolerances[checker.fuser.model.name] = checker.tolerance
            watch = checker.watch
            if checker.fuser.executor.is_compiled and not is_single:
                warm_up(checker.fuser, sizes)
            models[family] = checker, watch
        for _, watch in models.values():
            watch.start()  # the compiler counts for all models together
        return models[family]

    for family in () if is_single else families or ("",):
        model_of(family)
    samples: list[tuple[int, int]] = []
    while report.requests < requests and not (is_single and report.calls):
        call = draw_call(seed + report.calls, max_new_tokens=max_new_tokens, is_short=is_short)
        family = ""
        if families:
            is_wanted = call.family in families
            family = call.family if is_wanted else families[call.seed % len(families)]
        checker, watch = models.get(family) or model_of(family)
        call = fit_call(checker.fuser, call, sizes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a segment of one token")
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            found = list(_run_call(checker, call, report))
        wrong = [f"seed {call.seed}, {line}" for line in found]
        faults = [f"seed {call.seed}: {line}" for line in watch.left_over()]
        new = watch.new_graphs()
        for _, other in models.values():
            other.new_graphs()
        if new and not is_single:
            report.new_graphs += new
            faults.append(f"seed {call.seed}: {new} graphs were compiled, or recompiled")
        report.divergences += wrong
        report.faults += faults
        report.calls += 1
        report.requests += len(call.requests)
        if report.requests >= max(WARM_SHARE * requests, WARM_REQUESTS) and not is_single:
            samples.append((report.requests, resident_bytes()))
        say(report, wrong + faults)
    report.graphs = sum(len(checker.fuser.executor.graphs) for checker, _ in models.values())
    report.growth_bytes = growth_of(samples)
    report.resident_bytes = samples[-1][1] if samples else None
    if report.growth_bytes is not None and report.growth_bytes > GROWTH_BYTES:
        line = (
            f"memory grew by {report.growth_bytes / 1e6:.0f} MB behind the warm-up; "
            f"at most {GROWTH_BYTES / 1e6:.0f} MB"
        )
        report.faults.append(line)
        say(report, [line])
    return report


def _run_call(checker: Checker, call: Call, report: Report) -> Iterator[str]:
    """Answer a call; what is wrong with its answers, request by request."""
    fuser = checker.fuser
    if call.forgets:
        fuser.forget_prefixes()
    first = call.requests[0]

    def stream() -> Generator[StreamEvent, None, Results]:
        return fuser.stream(
            segments=first.segments,
            prefix=first.prefix,
            suffix=first.suffix,
            weights=first.weights,
            **call.options,
        )

    if call.abandons is not None:
        events = stream()
        for _ in zip(range(call.abandons), events, strict=False):
            pass
        events.close()
    try:
        if call.streams:
            answers = [_streamed(stream())]
        else:
            answers = fuser.generate_batch(
                call.requests, batch_size=call.batch_size, **call.options
            )
    except MinifuseError as error:
        yield f"no answer: {error}"
        return
    for number, results in enumerate(answers):
        report.answers += len(flat(results))
        for problem in checker.check(call, number, results):
            yield f"request {number + 1}, {problem}"


def _streamed(events: Generator[StreamEvent, None, Results]) -> Results:
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value


def open_tiny(family: str, report: Report, *, compile: bool = True) -> Definition:
    """A tiny model, held to the definition."""
    return Definition(Fuser(make_tiny(family), compile=compile), report)
