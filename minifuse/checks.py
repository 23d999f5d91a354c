"""What `python -m minifuse.verify` checks: a model against its files, its definition, itself.

The second opinion is `dense`: another decoder, which reads the weights another way. What it gives
in float64 is taken for the truth. How far it strays when it computes in the model's own dtype is
what rounding does to this model; an engine that adds up in other orders may stray as far, and
`ROUNDINGS` times that is the tolerance of every check that compares distributions. To it is added
what float32 does, since sums are made in float32 whatever they are stored in, and their order is
where the two differ most. Nothing that is checked has a part in it, so a fault cannot widen its own
tolerance.

Distances between distributions are the root mean square over the vocabulary of the differences of
log-probabilities, in nats; of several distributions the largest.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from minifuse.chat import read_chat_template, render_frame
from minifuse.checkpoint import open_params
from minifuse.config import ModelConfig
from minifuse.dense import Passage, fused_passage, plain_passage, read_logits, run_passages
from minifuse.diagnosis import named_weights, widen
from minifuse.engine import Fuser
from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.executor import count_compiled_graphs
from minifuse.files import read_json
from minifuse.layout import Prompt
from minifuse.methods import FusionMethod
from minifuse.recompiles import count_graph_breaks
from minifuse.request import Request, encode_prompt
from minifuse.results import Generation

T = TypeVar("T")

ROUNDINGS = 4
NEW_TOKENS = 8
POSITIONS = ("aligned", "restart")
# How many things that are wrong a finding names.
MAX_NAMED = 3
# Methods that are generated step by step: one stream, the streams of an ensemble, each alone.
STEPPED = ("fused", "logit_avg", "per_prompt")

# Stories, which run on: a question would be answered in a word.
REQUEST = Request(
    prefix="Stories for children.\n\n",
    segments=(
        "Once upon a time, by the sea,",
        "Long ago, on the coast,",
        "There was once a village at the sea, and in it",
    ),
    suffix=" there lived",
)
# Short, so that what is forced on all streams fits into the smaller graphs.
CONTINUATION = " an old man"
OTHER_SEGMENTS = (
    "In a cave under the mountains,",
    "On the third floor of a grey house, behind a window,",
    "Far away, on the moon,",
)
# Whose answer the order of the segments may not change, and that have a distribution.
SYMMETRIC = tuple(
    method
    for method in FusionMethod
    if method
    not in (
        FusionMethod.ORIGIN,
        FusionMethod.PER_PROMPT,
        FusionMethod.VOTE,
        FusionMethod.FUSED_PLAIN,
        FusionMethod.CONCAT,
    )
)
ALL = tuple(method for method in FusionMethod if method is not FusionMethod.VOTE)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n\treturn a + b  # two spaces, a tab\n",
    "Zürich, naïve, Ελλάδα, Привет, 東京, مرحبا",
    "3.14159 = π, e.g. 1,000,000 and 0x2A",
    "one  two   three\n\nfour",
    "🙂🚀 and 👩‍👩‍👧",
)


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    is_passed: None where it could not be run; `note` says why
    measured, tolerance: in `unit`; None where nothing was
    note:      what was compared, what the tolerance is made of, what is wrong
    name, seconds: of the check, by `run_checks`
    """

    is_passed: bool | None
    measured: float | None = None
    tolerance: float | None = None
    unit: str = ""
    note: str = ""
    name: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict:
        """The fields of a JSON result; JSON has no infinity."""
        is_number = self.measured is not None and math.isfinite(self.measured)
        return {
            "check": self.name,
            "passed": self.is_passed,
            "measured": self.measured if is_number else None,
            "tolerance": self.tolerance,
            "unit": self.unit,
            "note": self.note,
            "seconds": round(self.seconds, 3),
        }


class Skipped(Exception):
    """A check that has nothing to check here; the message says why."""


class Twin:
    """The model as its files have it, run by the second decoder."""

    def __init__(self, fuser: Fuser):
        model = fuser.model
        config = ModelConfig.from_hf(read_json(model.folder / "config.json"))
        quantize = None if config.quantize else model.config.quantize
        self.config = config
        self.params = open_params(model.folder, config, model.dtype, quantize)
        self.own_dtype = model.dtype

    def distributions(
        self, passages: Sequence[Passage], count: int, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """Log-probabilities f64[count, V] of the last tokens of each passage."""
        reach = max(int(passage.positions.max()) for passage in passages) + 1
        length = self.config.rope_length(reach)
        hidden = run_passages(self.config, self.params, passages, dtype, length)
        return [
            read_logits(self.params, states[-count:]).double().log_softmax(-1) for states in hidden
        ]


class Bench:
    """A model on the bench: the engine, its twin, the probe and what its answers are held to."""

    def __init__(self, fuser: Fuser):
        self.fuser = fuser
        self.twin = Twin(fuser)
        self.prompt: Prompt = encode_prompt(fuser.model.tokenizer, REQUEST, fuser._frame(None))
        self.dtype_name = str(fuser.model.dtype).removeprefix("torch.")

    @cached_property
    def forced_ids(self) -> tuple[int, ...]:
        """The tokens that answers are forced to."""
        return tuple(self.fuser.model.tokenizer.encode(CONTINUATION, is_start=False))

    def plain_passages(self, forced: tuple[int, ...]) -> list[Passage]:
        """Each segment's prompt alone."""
        p = self.prompt
        return [plain_passage(p.prefix_ids + ids + p.suffix_ids + forced) for ids in p.segment_ids]

    @cached_property
    def truth(self) -> list[Tensor]:
        """The twin's distributions of each prompt alone, along the forced tokens."""
        count = len(self.forced_ids)
        return self.twin.distributions(self.plain_passages(self.forced_ids[:-1]), count)

    @cached_property
    def rounding(self) -> float:
        """How far the twin's own distributions stray: in the model's dtype, and in float32."""
        count = len(self.forced_ids)
        passages = self.plain_passages(self.forced_ids[:-1])
        strayed = [
            max(map(distance, self.twin.distributions(passages, count, dtype), self.truth))
            for dtype in (self.twin.own_dtype, torch.float32)
        ]
        return sum(strayed)

    @property
    def tolerance(self) -> float:
        return ROUNDINGS * self.rounding

    @property
    def derivation(self) -> str:
        return f"{ROUNDINGS} x {self.rounding:.2g}, what {self.dtype_name} and float32 do to a twin"

    def ask(
        self,
        request: Request = REQUEST,
        methods: Sequence[str] = ALL,
        fuser: Fuser | None = None,
        continuation: Sequence[int] | None = None,
        positions: str = POSITIONS[0],
    ) -> dict[str, Tensor | list[Tensor]]:
        """The engine's distributions along the forced tokens, or other ones."""
        return (fuser or self.fuser).distributions(
            prefix=request.prefix,
            segments=request.segments,
            suffix=request.suffix,
            weights=request.weights,
            continuation=self.forced_ids if continuation is None else continuation,
            methods=methods,
            positions=positions,
        )

    def ask_along(
        self, answer: Generation, token_ids: Sequence[int], request: Request = REQUEST
    ) -> Tensor:
        """The engine's distributions of an answer's own method and stream, along other tokens."""
        found = self.ask(request, [answer.method], continuation=token_ids)[answer.method]
        return found[answer.paraphrase_index or 0] if isinstance(found, list) else found

    def generate(self, request: Request, methods: str | Sequence[str]) -> dict:
        """Greedy answers, not cut short by a stop string."""
        return self.fuser.generate_batch(
            [request], methods=methods, max_new_tokens=NEW_TOKENS, stop=()
        )[0]

    def compare(self, measured: float, what: str) -> Finding:
        """A finding about distributions."""
        is_passed = measured <= self.tolerance
        return Finding(is_passed, measured, self.tolerance, "nats", f"{what}; {self.derivation}")


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of f[n, V] log-probabilities, the largest of n; inf for NaN."""
    worst = float((one.double() - other.double()).square().mean(-1).sqrt().max())
    return math.inf if math.isnan(worst) else worst


def flat(found: Mapping[str, T | list[T]]) -> list[T]:
    """Values by method, `per_prompt`'s one by one."""
    return [v for value in found.values() for v in (value if isinstance(value, list) else [value])]


def furthest(one: dict, other: dict) -> float:
    """The largest distance between the same methods' distributions."""
    return max(map(distance, flat(one), flat(other)))


def half_behind(logprobs: Tensor, token_ids: Sequence[int]) -> float:
    """Half of how far a pick of f[n, V] is behind the best, at most: both may be off."""
    picks = torch.tensor(token_ids, device=logprobs.device)[:, None]
    return float((logprobs.amax(-1) - logprobs.gather(1, picks)[:, 0]).max()) / 2


def gap_of_answers(bench: Bench, request: Request, one: Generation, other: Generation) -> float:
    """How far two greedy answers to a request are apart, in nats, up to where they part.

    There it is how far either pick, or an end, is behind the best, by `half_behind`.
    """
    pairs = zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False)
    shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    worst = max((abs(logprob - again) for *_, logprob, again in shared), default=0.0)
    step = len(shared)
    longer = max(one.token_ids, other.token_ids, key=len)
    if step == len(one.token_ids) == len(other.token_ids):
        return worst
    scores = bench.ask_along(one, longer[: step + 1], request)[step:]
    for answer in (one, other):
        picks = answer.token_ids[step : step + 1] or bench.fuser.model.eos_token_ids
        worst = max(worst, min(half_behind(scores, [pick]) for pick in picks))
    return worst


# The checks


def check_weights(bench: Bench) -> Finding:
    """Finite, shaped as the config says, and those of the files."""
    held, stored = bench.fuser.model.params, bench.twin.params
    wrong: list[str] = []
    values = 0
    if len(held.layers) != len(stored.layers):
        wrong.append(f"{len(held.layers)} layers, the config has {len(stored.layers)}")
    pairs = zip(named_weights(held), named_weights(stored), strict=False)
    for (name, ours), (_, theirs) in pairs:
        found, kept = widen(ours), widen(theirs)
        if found.shape != kept.shape:
            wrong.append(f"{name} is {list(found.shape)}, the config says {list(kept.shape)}")
            continue
        lost = int((~found.isfinite()).sum())
        other = int((found != kept.to(found)).sum())
        values += other
        if lost:
            wrong.append(f"{name} has {lost} values that are not finite")
        elif other:
            wrong.append(f"{name} differs from its file in {other} values")
    note = "; ".join(wrong[:MAX_NAMED]) or "finite, shaped as the config says, as in the files"
    return Finding(not wrong, values, 0, "other values", note)


def check_plain_prompt(bench: Bench) -> Finding:
    """The engine's decoder is the definition's."""
    (truth, *_) = bench.truth
    (found,) = flat(bench.ask(methods=["origin"]))
    return bench.compare(distance(found, truth), "one prompt, dense twin in float64")


def check_isolation(bench: Bench) -> Finding:
    """What the other segments say does not reach a segment."""
    found = flat(bench.ask(methods=["per_prompt"]))
    gaps = []
    for index, text in enumerate(REQUEST.segments):
        others = [*OTHER_SEGMENTS[:index], text, *OTHER_SEGMENTS[index + 1 :]]
        changed = flat(bench.ask(replace(REQUEST, segments=others), ["per_prompt"]))
        gaps.append(distance(changed[index], found[index]))
    return bench.compare(max(gaps), "each segment beside other ones")


def check_one_segment(bench: Bench) -> Finding:
    """With one segment every method is plain decoding."""
    found = bench.ask(replace(REQUEST, segments=REQUEST.segments[:1]))
    gaps = {
        method: max(map(partial(distance, bench.truth[0]), flat({method: own})))
        for method, own in found.items()
    }
    worst = max(gaps, key=gaps.__getitem__)
    return bench.compare(gaps[worst], f"every method, {worst} the furthest")


def check_streams(bench: Bench) -> Finding:
    """Each single-segment stream is that prompt alone."""
    found = flat(bench.ask(methods=["per_prompt"]))
    return bench.compare(max(map(distance, found, bench.truth)), "each prompt, dense twin")


def check_fused(bench: Bench) -> Finding:
    """Fused streams are the definition's, under both settings of positions."""
    prompt, count = bench.prompt, len(bench.forced_ids)
    biases = [-math.log(len(prompt.segment_ids))] * len(prompt.segment_ids)
    passages = [
        fused_passage(
            prompt.prefix_ids,
            prompt.segment_ids,
            prompt.suffix_ids,
            bench.forced_ids[:-1],
            biases,
            is_aligned=positions == "aligned",
        )
        for positions in POSITIONS
    ]
    truth = bench.twin.distributions(passages, count)
    found = [flat(bench.ask(methods=["fused"], positions=name))[0] for name in POSITIONS]
    return bench.compare(max(map(distance, found, truth)), "aligned and restart, dense twin")


def check_copies(bench: Bench) -> Finding:
    """Copies of a segment weigh as one."""
    one = bench.ask(replace(REQUEST, segments=REQUEST.segments[:1]), ["fused"])
    many = bench.ask(replace(REQUEST, segments=[REQUEST.segments[0]] * 3), ["fused"])
    return bench.compare(furthest(one, many), "fused, 3 copies against 1")


def check_order(bench: Bench) -> Finding:
    """The order of the segments changes nothing."""
    weights = (0.5, 0.2, 0.3)
    first = bench.ask(replace(REQUEST, weights=weights), SYMMETRIC)
    gaps = []
    for shift in (1, 2):
        segments = (*REQUEST.segments[shift:], *REQUEST.segments[:shift])
        turned = replace(REQUEST, segments=segments, weights=weights[shift:] + weights[:shift])
        gaps.append(furthest(bench.ask(turned, SYMMETRIC), first))
    return bench.compare(max(gaps), f"{len(SYMMETRIC)} methods, all turns")


def check_cached(bench: Bench) -> Finding:
    """Step by step with a cache, answers are what one pass over all their tokens gives."""
    answers = bench.generate(REQUEST, STEPPED)
    worst = 0.0
    for answer in flat(answers):
        if not answer.token_ids:
            continue
        logprobs = bench.ask_along(answer, answer.token_ids)
        picks = torch.tensor(answer.token_ids, device=logprobs.device)[:, None]
        again = logprobs.gather(1, picks)[:, 0]
        own = torch.tensor(answer.logprobs, device=logprobs.device)
        behind = half_behind(logprobs, answer.token_ids)
        worst = max(worst, float((again - own).abs().max()), behind)
    return bench.compare(worst, f"{len(flat(answers))} answers, step by step")


def check_compiled(bench: Bench) -> Finding:
    """Compiled graphs compute what the same code does eagerly."""
    if not bench.fuser.executor.is_compiled:
        raise Skipped("nothing is compiled (--no-compile)")
    eager = Fuser(bench.fuser.model, compile=False)
    gap = furthest(bench.ask(fuser=eager), bench.ask())
    return bench.compare(gap, f"{len(ALL)} methods")


def check_batch(bench: Bench) -> Finding:
    """Requests side by side answer as each alone."""
    requests = [
        REQUEST,
        replace(REQUEST, segments=OTHER_SEGMENTS),
        replace(REQUEST, prefix="", segments=OTHER_SEGMENTS[:1]),
    ]
    together = bench.fuser.generate_batch(
        requests, methods=STEPPED, max_new_tokens=NEW_TOKENS, stop=()
    )
    worst = max(
        gap_of_answers(bench, request, one, other)
        for request, found in zip(requests, together, strict=True)
        for one, other in zip(flat(found), flat(bench.generate(request, STEPPED)), strict=True)
    )
    return bench.compare(worst, f"{len(requests)} requests at once")


def check_prefix(bench: Bench) -> Finding:
    """A stored prefix is as good as one that is computed."""
    bench.fuser.forget_prefixes()
    first, again = bench.ask(), bench.ask()
    return bench.compare(furthest(first, again), f"{len(ALL)} methods")


def check_recompiles(bench: Bench) -> Finding:
    """Other layouts, numbers of segments, weights and methods find their graphs ready."""
    executor = bench.fuser.executor
    if not executor.is_compiled:
        raise Skipped("nothing is compiled (--no-compile)")
    bench.ask(methods=["fused"])

    def count() -> tuple[int, int, int]:
        return len(executor.graphs), count_compiled_graphs(), count_graph_breaks()

    before = count()
    bench.ask(replace(REQUEST, segments=OTHER_SEGMENTS[:2]), ["fused"], positions="restart")
    bench.ask(
        replace(REQUEST, segments=REQUEST.segments[:2], weights=(0.9, 0.1)), ["fused_weighted"]
    )
    bench.ask(replace(REQUEST, segments=OTHER_SEGMENTS[:1]), ["concat"])
    graphs, frames, breaks = (now - then for now, then in zip(count(), before, strict=True))
    found = graphs + frames + breaks + executor.recompiles
    note = f"{len(executor.graphs)} graphs, {breaks} graph breaks, {executor.recompiles} recompiled"
    return Finding(found == 0, found, 0, "graphs", note)


def check_tokenizer(bench: Bench) -> Finding:
    """Text comes back from its tokens, and encodes to the same ones again."""
    tokenizer, wrong = bench.fuser.model.tokenizer, []
    for text in TEXTS:
        token_ids = tokenizer.encode(text, is_start=True)
        back = tokenizer.decode(token_ids)
        is_known = all(0 <= i < bench.fuser.model.config.vocab_size for i in token_ids)
        if not is_known or (back != text and tokenizer.encode(back, is_start=True) != token_ids):
            wrong.append(text)
    note = f"{len(TEXTS)} texts" + "".join(f"; {text!r} does not come back" for text in wrong[:1])
    return Finding(not wrong, len(wrong), 0, "texts", note)


def check_controls(bench: Bench) -> Finding:
    """A control token that a user writes is plain text."""
    tokenizer, through = bench.fuser.model.tokenizer, []
    if not tokenizer.control_ids:
        raise Skipped("the tokenizer has no control tokens")
    for token_id in sorted(tokenizer.control_ids):
        token = tokenizer.token_of(token_id)
        try:
            token_ids = tokenizer.encode(f"a {token} b", is_start=False)
        except UsageError:
            continue  # refused, which is as safe
        if not tokenizer.control_ids.isdisjoint(token_ids):
            through.append(token)
    note = f"{len(tokenizer.control_ids)} control tokens" + "".join(f"; {t}" for t in through[:1])
    return Finding(not through, len(through), 0, "tokens", note)


def check_chat(bench: Bench) -> Finding:
    """The chat template renders, and hands the user's message on."""
    template = read_chat_template(bench.fuser.model.folder)
    if template is None:
        raise Skipped("the model has no chat template")
    frame = render_frame(template)
    note = f"{len(frame.head)} characters before a message, {len(frame.tail)} after it"
    return Finding(True, note=note)


def check_transformers(bench: Bench) -> Finding:
    """The hub's own implementation gives the same distributions and picks the same tokens."""
    if find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    if bench.twin.config.quantize is not None:
        raise Skipped("transformers does not read minifuse's quantized weights")
    if bench.fuser.model.config.quantize is not None:
        raise Skipped("weights were quantized as they were loaded; those of transformers are not")
    answer = bench.generate(REQUEST, "origin")["origin"]
    token_ids = answer.token_ids or bench.forced_ids  # where the model stops at once
    (passage, *_) = bench.plain_passages(token_ids[:-1])
    version, theirs = _ask_transformers(bench, passage.token_ids, len(token_ids))
    (ours,) = flat(bench.ask(methods=["origin"], continuation=token_ids))
    measured = distance(ours.cpu(), theirs)
    if answer.token_ids:
        measured = max(measured, half_behind(theirs, token_ids))
    return bench.compare(measured, f"transformers {version}, {len(token_ids)} tokens")


def _ask_transformers(bench: Bench, token_ids: Tensor, count: int) -> tuple[str, Tensor]:
    """Their version, and log-probabilities f64[count, V] of the last tokens.

    raises: Skipped where it cannot run the model, which says nothing about minifuse
    """
    transformers = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            bench.fuser.model.folder, dtype=bench.fuser.model.dtype
        ).eval()
        with torch.inference_mode():
            logits = model(token_ids[None]).logits[0, -count:]
    except Exception as error:  # of a library that may be any version
        raise Skipped(
            f"transformers {transformers.__version__} cannot run the model: {one_line(error)}"
        ) from error
    return transformers.__version__, logits.double().log_softmax(-1)


CHECKS: Mapping[str, Callable[[Bench], Finding]] = {
    "weights": check_weights,
    "tokenizer round trips": check_tokenizer,
    "text is no control token": check_controls,
    "chat template renders": check_chat,
    "plain decoding": check_plain_prompt,
    "streams are prompts alone": check_streams,
    "segments isolated": check_isolation,
    "one segment is plain decoding": check_one_segment,
    "fused is as defined": check_fused,
    "copies weigh as one": check_copies,
    "order changes nothing": check_order,
    "cached is uncached": check_cached,
    "prefix reused is recomputed": check_prefix,
    "batched is alone": check_batch,
    "compiled is eager": check_compiled,
    "no recompilation": check_recompiles,
    "as transformers": check_transformers,
}


def run_checks(fuser: Fuser, names: Iterable[str] = CHECKS) -> Iterator[Finding]:
    """The finding of each check named as it is there; what fails in another way fails its check."""
    bench = Bench(fuser)
    for name in names:
        start = time.perf_counter()
        try:
            finding = CHECKS[name](bench)
        except Skipped as reason:
            finding = Finding(None, note=str(reason))
        except MinifuseError as error:
            finding = Finding(False, note=str(error))
        yield replace(finding, name=name, seconds=time.perf_counter() - start)
