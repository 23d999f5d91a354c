"""The Fuser: one request, or a batch, from text to answers by any number of methods.

A request takes four steps: the prefix (stored, and found again by its token ids), the segments,
the views' suffixes, then one forward per token over all live streams. Each is one or two calls of
the executor; all that differs between methods is which views and streams are asked for.
"""

import time
import warnings
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from minifuse.cache import KVCache, cache_bytes, copy_prefix, snapshot_prefix
from minifuse.config import FusionConfig, GenerationConfig
from minifuse.errors import MinifuseError, UsageError
from minifuse.executor import LABEL_COUNTS, MIN_SLOTS, Executor, Session, Token, round_up
from minifuse.layout import Encoding, PackedPrompt, Part, Prompt, Span, Stream, View
from minifuse.loader import LoadedModel, free_memory, load_model
from minifuse.methods import (
    SPECS,
    Answer,
    FusionMethod,
    Sees,
    SegmentWeights,
    ViewRequest,
    Weighting,
    make_answers,
    needs_weights,
    normalise_weights,
    parse_methods,
    single_view,
)
from minifuse.results import Generation, LayoutEntry, StreamEvent, TextBuilder, pick_winner
from minifuse.sampling import make_generator, pick_token, reduce_logits

STORED_PREFIXES = 4
# Rows of logits held at once while a segment's likelihood is summed up.
LOGIT_ROWS = 64

Results = dict[str, Generation | list[Generation]]


class FusionOptions(TypedDict, total=False):
    """What every call may say about fusion; defaults are those of `FusionConfig`."""

    methods: str | Iterable[str]
    positions: str
    beta: float
    balance: float


class Options(FusionOptions, total=False):
    """What a call that generates may say besides; defaults are those of `GenerationConfig`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: str | Sequence[str]
    seed: int


@dataclass(frozen=True)
class Request:
    """One question in several phrasings; texts are taken verbatim.

    weights: one number per segment, or the signal to find them by; None for the default
    id:      carried along for the caller
    """

    segments: Sequence[str]
    prefix: str = ""
    suffix: str = ""
    weights: Sequence[float] | str | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Plan:
    """What a call asks for, beside its requests."""

    methods: tuple[FusionMethod, ...]
    fusion: FusionConfig
    generation: GenerationConfig

    @property
    def positions(self) -> Encoding:
        """How fused views find their segments: the setting `restart` reads them in place."""
        return Encoding.ALIGNED if self.fusion.positions == "aligned" else Encoding.ALONE


def make_plan(
    *,
    methods: str | Iterable[str] = (FusionMethod.FUSED,),
    positions: str = FusionConfig.positions,
    beta: float = FusionConfig.beta,
    balance: float = FusionConfig.balance,
    **generation: Unpack[Options],
) -> Plan:
    """Check and sort the options of a call.

    raises: UsageError for a bad value, TypeError for an option that does not exist.
    """
    return Plan(
        parse_methods(methods),
        FusionConfig(positions=positions, beta=beta, balance=balance),
        GenerationConfig(**generation),
    )


@dataclass(frozen=True)
class Size:
    """What a batch takes: cache rows and slots, and labels of the tables."""

    rows: int
    slots: int
    labels: int


@dataclass
class AnswerState:
    """An answer while it is generated.

    slots: per stream, the slots of the answer's tokens that were run through the model
    """

    answer: Answer
    views: tuple[View, ...]
    streams: tuple[Stream, ...]
    builder: TextBuilder
    generator: torch.Generator | None
    slots: list[list[int]]


@dataclass
class Job:
    """One request while it is answered.

    given_weights: normalised; None leaves them to `signal`
    consumers:     for every method the answers that it reads
    """

    prompt: Prompt
    plan: Plan
    given_weights: tuple[float, ...] | None
    signal: str
    packed: PackedPrompt
    weights: SegmentWeights
    view_logits: dict[Span, Tensor] = field(default_factory=dict)
    consumers: dict[FusionMethod, tuple[Answer, ...]] = field(default_factory=dict)
    states: dict[Answer, AnswerState] = field(default_factory=dict)

    @property
    def num_segments(self) -> int:
        return len(self.prompt.segment_ids)

    @property
    def needs_signal(self) -> bool:
        """Whether weights have to be found: given ones serve all methods but `fused_auto`."""
        methods = self.plan.methods
        return needs_weights(methods, Weighting.FOUND) or (
            self.given_weights is None and needs_weights(methods, Weighting.CHOSEN)
        )

    @property
    def live(self) -> list[AnswerState]:
        return [s for s in self.states.values() if s.builder.finish_reason is None]

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Every answer once, whatever the number of methods that read it."""
        return tuple(dict.fromkeys(a for group in self.consumers.values() for a in group))

    def place_segments(self) -> None:
        """Ask for every segment copy that the methods, or the search for weights, will read."""
        for method in self.plan.methods:
            spec = SPECS[method]
            indices = [0] if spec.sees is Sees.FIRST else range(self.num_segments)
            for index in indices:
                self.packed.segment(spec.encoding or self.plan.positions, index)
        if self.needs_signal:
            for index in range(self.num_segments):
                self.packed.segment(Encoding.ALONE, index)

    def place_signal_views(self) -> None:
        """Ask for the plain prompts whose next-token distributions are the signal, if any are."""
        if self.needs_signal and self.signal == "confidence":
            for index in range(self.num_segments):
                self.view(single_view(index))

    def set_weights(self, values: Tensor | None) -> None:
        """Settle all weights; `values` is the signal f32[N], None where it says nothing."""
        uniform = self.weights.uniform
        found = uniform
        if values is not None:
            found = tuple(torch.softmax(self.plan.fusion.beta * values.double(), 0).tolist())
        given = self.given_weights
        self.weights = SegmentWeights(
            uniform=uniform,
            chosen=found if given is None else given,
            found=found,
            chosen_source=self.signal if given is None else "given",
            found_source=self.signal,
        )

    def place_views(self) -> None:
        """Ask for the views of all answers; the weights must be settled."""
        fusion = self.plan.fusion
        self.consumers = {
            method: make_answers(method, self.weights, self.plan.positions, fusion.balance)
            for method in self.plan.methods
        }
        for answer in self.answers:
            for request in answer.views:
                self.view(request)

    def view(self, request: ViewRequest) -> View:
        return self.packed.view(request.encoding, request.indices, request.biases)


def load(
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    compile: bool = True,
) -> "Fuser":
    """Load a model, ready to answer.

    model:    a card's name, a folder in hub layout, a .gguf file; None for the default model
    dtype:    "auto" (the checkpoint's own), "float32", "bfloat16" or "float16"
    device:   "auto" (CUDA where there is one), or a torch device's name
    quantize: None; quantized weights are not implemented yet
    compile:  False runs eagerly: slow, no compiler needed, the same results
    raises:   MinifuseError of one kind or another; see `loader.load_model`
    """
    if quantize not in (None, "none"):
        raise UsageError(f"quantize is {quantize!r}; wanted none: no other scheme is implemented")
    start = time.perf_counter()
    loaded = load_model(model, dtype, device)
    return Fuser(loaded, compile=compile, load_s=time.perf_counter() - start)


class Fuser:
    """A loaded model with its compiled graphs and stored prefixes; made by `minifuse.load`."""

    def __init__(self, model: LoadedModel, *, compile: bool = True, load_s: float = 0.0):
        self.model = model
        self.load_s = load_s
        self.executor = Executor(model.config, model.params, compile=compile)
        self._prefixes: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    def generate(
        self,
        *,
        segments: Sequence[str],
        prefix: str = "",
        suffix: str = "",
        weights: Sequence[float] | str | None = None,
        **options: Unpack[Options],
    ) -> Results:
        """Answer one request by every method; texts are taken verbatim.

        weights: one number per segment, or the signal to find them by ("likelihood" or
                 "confidence")
        options: methods (names, aliases or "all"), positions, beta, balance, max_new_tokens,
                 temperature, top_k, top_p, stop, seed; see FusionConfig and GenerationConfig
        returns: by canonical method name; `per_prompt` gives a list, one for each segment
        raises:  UsageError for input that cannot be run as asked, MinifuseError where memory or
                 the model's numbers do not suffice
        """
        request = Request(segments, prefix, suffix, weights)
        return self.generate_batch([request], **options)[0]

    def stream(
        self,
        *,
        segments: Sequence[str],
        prefix: str = "",
        suffix: str = "",
        weights: Sequence[float] | str | None = None,
        **options: Unpack[Options],
    ) -> Generator[StreamEvent, None, Results]:
        """As `generate`, one event per token and method as they come; closing stops the work.

        The generator's return value is what `generate` returns. Input is checked at the call,
        not at the first event.
        """
        job = self._make_job(Request(segments, prefix, suffix, weights), make_plan(**options))
        size = self._size_of([job])

        def first_result() -> Generator[StreamEvent, None, Results]:
            results = yield from self._run([job], size)
            return results[0]

        return first_result()

    def generate_batch(
        self, requests: Iterable[Request], *, batch_size: int = 8, **options: Unpack[Options]
    ) -> list[Results]:
        """Answer many requests, up to `batch_size` at once; each as if it were alone.

        A prefix that requests share is computed once. All input is checked before the first
        request runs. Options and errors as in `generate`.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; wanted an integer of at least 1")
        plan = make_plan(**options)
        jobs = [self._make_job(request, plan) for request in requests]
        groups = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        sizes = [self._size_of(group) for group in groups]
        return [
            result
            for group, size in zip(groups, sizes, strict=True)
            for result in _drain(self._run(group, size))
        ]

    def score(
        self,
        *,
        segments: Sequence[str],
        continuations: Sequence[str],
        prefix: str = "",
        suffix: str = "",
        weights: Sequence[float] | str | None = None,
        **options: Unpack[FusionOptions],
    ) -> dict[str, list[float] | list[list[float]]]:
        """Log-probability in nats of each continuation under each method, teacher-forced.

        The sum over the continuation's tokens, without an end token; "all" leaves out `vote`,
        which has no distribution.

        returns: a number per continuation; for `per_prompt` such a list for each segment
        raises:  as `generate`
        """
        methods = options.get("methods", (FusionMethod.FUSED,))
        names = [methods] if isinstance(methods, str) else list(methods)
        if FusionMethod.VOTE in names:
            raise UsageError("vote has no probabilities to score by; leave it out of methods")
        parsed = [m for m in parse_methods(names) if m is not FusionMethod.VOTE]
        targets = self._encode_continuations(continuations)
        plan = make_plan(**{**options, "methods": parsed}, max_new_tokens=max(map(len, targets)))
        return self._score(
            self._make_job(Request(segments, prefix, suffix, weights), plan), targets
        )

    # Input

    def _make_job(self, request: Request, plan: Plan) -> Job:
        prompt = self._encode_prompt(request)
        signal = plan.fusion.signal
        given = None
        if isinstance(request.weights, str):
            signal = FusionConfig(signal=request.weights).signal
        elif request.weights is not None:
            given = normalise_weights(request.weights, len(prompt.segment_ids))
        uniform = (1 / len(prompt.segment_ids),) * len(prompt.segment_ids)
        return Job(prompt, plan, given, signal, PackedPrompt(prompt), SegmentWeights(uniform))

    def _encode_prompt(self, request: Request) -> Prompt:
        segments = request.segments
        if isinstance(segments, str) or not isinstance(segments, Sequence):
            raise UsageError(f"segments is {type(segments).__name__}; wanted a list of strings")
        if not segments:
            raise UsageError("segments is empty; wanted at least one paraphrase")
        for name, text in (("prefix", request.prefix), ("suffix", request.suffix)):
            if not isinstance(text, str):
                raise UsageError(f"{name} is {type(text).__name__}; wanted a string")
        encode = self.model.tokenizer.encode
        prefix_ids = (
            *self.model.tokenizer.bos_ids,
            *(encode(request.prefix, is_start=True) if request.prefix else ()),
        )
        segment_ids = []
        for number, text in enumerate(segments, 1):
            if not isinstance(text, str):
                raise UsageError(f"segment {number} is {type(text).__name__}; wanted a string")
            token_ids = tuple(encode(text, is_start=not request.prefix)) if text else ()
            if not token_ids:
                raise UsageError(f"segment {number} is {text!r}, which is empty; wanted text")
            segment_ids.append(token_ids)
        suffix_ids = tuple(encode(request.suffix, is_start=False)) if request.suffix else ()
        return Prompt(prefix_ids, tuple(segment_ids), suffix_ids)

    def _encode_continuations(self, continuations: Sequence[str]) -> list[tuple[int, ...]]:
        if isinstance(continuations, str) or not continuations:
            raise UsageError(
                f"continuations is {continuations!r}; wanted a list of at least one string"
            )
        targets = []
        for number, text in enumerate(continuations, 1):
            if not isinstance(text, str) or not text:
                raise UsageError(f"continuation {number} is {text!r}; wanted text")
            targets.append(tuple(self.model.tokenizer.encode(text, is_start=False)))
        return targets

    def _size_of(self, jobs: Sequence[Job]) -> Size:
        """What the jobs take together.

        raises: UsageError beyond the model's positions or the tables, MinifuseError beyond memory.
        """
        layouts = [self._dry_run(job).packed for job in jobs]
        return self._make_size(
            rows=len(jobs),
            slots=max((layout.num_slots for layout in layouts), default=1),
            labels=max((layout.num_labels for layout in layouts), default=1),
        )

    def _dry_run(self, job: Job) -> Job:
        """A copy of the job laid out to the end, as large as it can get; nothing is computed."""
        count = job.num_segments
        dry = replace(job, packed=PackedPrompt(job.prompt), consumers={}, states={})
        dry.place_segments()
        dry.place_signal_views()
        # Found weights are not known yet. Uneven ones share the fewest views.
        dry.set_weights(torch.arange(1.0, count + 1).log())
        dry.place_views()
        new_tokens = job.plan.generation.max_new_tokens
        longest = self.model.config.max_position_embeddings
        for answer in dry.answers:
            for view in map(dry.view, answer.views):
                dry.packed.stream(view)
                dry.packed.take_slots(new_tokens)
                prompt_end = view.suffix.positions.stop
                if prompt_end + new_tokens > longest:
                    raise UsageError(
                        f"{answer.method} needs {prompt_end + new_tokens} positions: a prompt of "
                        f"{prompt_end} and {new_tokens} new tokens; the model has {longest}: "
                        "shorten one or the other"
                    )
        return dry

    def _make_size(self, *, rows: int, slots: int, labels: int) -> Size:
        if labels > LABEL_COUNTS[-1]:
            raise UsageError(
                f"these methods and segments need {labels} labels and the tables have "
                f"{LABEL_COUNTS[-1]}; ask for fewer methods or segments in one call"
            )
        size = Size(
            round_up(rows, (1,)), round_up(slots, (MIN_SLOTS,)), round_up(labels, LABEL_COUNTS)
        )
        needed = cache_bytes(
            self.model.config, rows=size.rows, slots=size.slots, dtype=self.model.dtype
        )
        free = free_memory(self.executor.device)
        if needed > free:
            raise MinifuseError(
                f"a key/value cache of {size.rows} x {size.slots} slots needs "
                f"{needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are free; use fewer or "
                "shorter prompts at once"
            )
        return size

    # Prefill

    def _prefill(self, session: Session, jobs: Sequence[Job]) -> None:
        """Prefix, segments, weights, views; afterwards `view_logits` has every first token's."""
        for row, job in enumerate(jobs):
            self._fill_prefix(session, row, job)
            job.place_segments()
        segments = [job.packed.take_pending() for job in jobs]
        hidden = self._run_segments(session, jobs, segments)
        self._make_moves(session, jobs)
        for job in jobs:
            job.place_signal_views()
        self._run_views(session, jobs)
        for row, job in enumerate(jobs):
            values = None
            if job.needs_signal and job.signal == "likelihood":
                values = self._likelihood(job, hidden[row], segments[row])
            elif job.needs_signal:
                values = self._confidence(job)
            job.set_weights(values)
            job.place_views()
        self._run_views(session, jobs)

    def _fill_prefix(self, session: Session, row: int, job: Job) -> None:
        span = job.packed.prefix()
        if span is None:
            return
        job.packed.take_pending()
        stored = self._prefix_keys(job.packed, span, session.size)
        copy_prefix(session.cache, row, stored)
        session.key_labels[row, span.slots.start : span.slots.stop] = span.label

    def _prefix_keys(self, packed: PackedPrompt, span: Span, size: tuple) -> KVCache:
        """Keys and values of a prefix, float[1, K, P, D], computed where they are not stored."""
        if span.token_ids not in self._prefixes:
            _, slots, labels = size
            with self.executor.session(rows=1, slots=slots, labels=labels) as session:
                session.set_tables([packed.sees])
                self.executor.prefill(session, [_tokens_of([span])])
                self._prefixes[span.token_ids] = snapshot_prefix(session.cache, len(span.slots))
            if len(self._prefixes) > STORED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(span.token_ids)
        return self._prefixes[span.token_ids]

    def _run_segments(
        self, session: Session, jobs: Sequence[Job], spans: Sequence[Sequence[Span]]
    ) -> Tensor | None:
        """Encode segments; hidden states float[B, n, C], None where there is no token to run."""
        rows = [_tokens_of(row) for row in spans]
        if not any(rows):
            return None
        session.set_tables([job.packed.sees for job in jobs])
        return self.executor.prefill(session, rows)

    def _make_moves(self, session: Session, jobs: Sequence[Job]) -> None:
        rows = [
            [
                (source, target, move.turn, move.target.label)
                for move in job.packed.take_moves()
                for source, target in zip(move.source.slots, move.target.slots, strict=True)
            ]
            for job in jobs
        ]
        if any(rows):
            self.executor.move(session, rows)

    def _run_views(self, session: Session, jobs: Sequence[Job]) -> None:
        """Run the pending suffixes; the logits of each one's last token go to `view_logits`."""
        spans = [job.packed.take_pending() for job in jobs]
        if not any(spans):
            return
        session.set_tables([job.packed.sees for job in jobs])
        ends = [
            (row, sum(len(span.token_ids) for span in row_spans[: i + 1]) - 1)
            for row, row_spans in enumerate(spans)
            for i in range(len(row_spans))
        ]
        logits = iter(self.executor.read(session, [_tokens_of(row) for row in spans], ends))
        for job, row_spans in zip(jobs, spans, strict=True):
            job.view_logits.update((span, next(logits)) for span in row_spans)

    # Weights

    def _likelihood(self, job: Job, hidden: Tensor, spans: Sequence[Span]) -> Tensor | None:
        """Mean log-likelihood of each segment's tokens after its first, f32[N].

        None, with a warning, where a segment has one token only: nothing in it is predicted.

        hidden: float[n, C] of the row's tokens, in the order of `spans`
        """
        if min(map(len, job.prompt.segment_ids)) < 2:
            warnings.warn(
                "a segment of one token has no likelihood; all segments weigh the same",
                stacklevel=2,
            )
            return None
        starts, start = {}, 0
        for span in spans:
            starts[span] = start
            start += len(span.token_ids)
        means = []
        for index, token_ids in enumerate(job.prompt.segment_ids):
            start = starts[job.packed.segment(Encoding.ALONE, index)]
            rows = hidden[start : start + len(token_ids) - 1]
            means.append(self._target_logprobs(rows, token_ids[1:]).mean())
        return torch.stack(means)

    def _target_logprobs(self, hidden: Tensor, targets: Sequence[int]) -> Tensor:
        """Log-probability of one target per row: float[n, C], n ids -> f32[n]."""
        index = torch.tensor(targets, device=hidden.device)[:, None]
        chunks = [
            torch.log_softmax(self.executor.unembed(rows), -1).gather(1, ids)
            for rows, ids in zip(hidden.split(LOGIT_ROWS), index.split(LOGIT_ROWS), strict=True)
        ]
        return torch.cat(chunks)[:, 0]

    def _confidence(self, job: Job) -> Tensor:
        """Negative entropy in nats of each plain prompt's next-token distribution, f32[N]."""
        logits = torch.stack(
            [job.view_logits[job.view(single_view(i)).suffix] for i in range(job.num_segments)]
        )
        logprobs = torch.log_softmax(logits, dim=-1)
        return (logprobs.exp() * logprobs).sum(-1)

    # Decoding

    def _run(self, jobs: Sequence[Job], size: Size) -> Generator[StreamEvent, None, list[Results]]:
        executor = self.executor
        compile_s, recompiles = executor.compile_s, executor.recompiles
        timings = {"load_s": self.load_s, "compile_s": 0.0, "prefill_ms": 0.0, "decode_ms": []}
        with executor.session(rows=size.rows, slots=size.slots, labels=size.labels) as session:
            clock = _Clock(executor)
            with torch.inference_mode():
                self._prefill(session, jobs)
                for job in jobs:
                    self._start_answers(job)
                session.set_tables([job.packed.sees for job in jobs])
                events = self._first_tokens(jobs)
            timings["prefill_ms"] = clock.lap_ms()
            yield from events
            while any(job.live for job in jobs):
                clock.lap_ms()
                with torch.inference_mode():
                    events = self._step(session, jobs)
                timings["decode_ms"].append(clock.lap_ms())
                yield from events
        timings["compile_s"] = executor.compile_s - compile_s
        results = []
        for job in jobs:
            result = self._results(job, timings, executor.recompiles - recompiles)
            results.append(result)
            if FusionMethod.VOTE in result:
                vote = result[FusionMethod.VOTE]
                yield StreamEvent(vote.method, None, None, vote.text, None, vote.finish_reason)
        return results

    def _start_answers(self, job: Job) -> None:
        config = job.plan.generation
        for answer in job.answers:
            views = tuple(map(job.view, answer.views))
            generator = None
            if config.temperature > 0:
                generator = make_generator(
                    config.seed, job.prompt, str(answer.method), answer.index
                )
            job.states[answer] = AnswerState(
                answer=answer,
                views=views,
                streams=tuple(map(job.packed.stream, views)),
                builder=TextBuilder(
                    self.model.tokenizer.stream(),
                    config.stop,
                    self.model.eos_token_ids,
                    config.max_new_tokens,
                ),
                generator=generator,
                slots=[[] for _ in views],
            )

    def _first_tokens(self, jobs: Sequence[Job]) -> list[StreamEvent]:
        events = []
        for job in jobs:
            for state in job.states.values():
                logits = torch.stack([job.view_logits[view.suffix] for view in state.views])
                events += _extend(job, state, logits)
        return events

    def _step(self, session: Session, jobs: Sequence[Job]) -> list[StreamEvent]:
        """One forward over all live streams; every answer gets its next token."""
        logits = self.executor.decode(session, [_next_tokens(job) for job in jobs])
        events = []
        for job, row_logits in zip(jobs, logits, strict=False):
            start = 0
            for state in job.live:
                end = start + len(state.streams)
                events += _extend(job, state, row_logits[start:end])
                start = end
        return events

    # Results

    def _results(self, job: Job, timings: dict, recompiles: int) -> Results:
        results: Results = {}
        for method, answers in job.consumers.items():
            states = [job.states[answer] for answer in answers]
            if method is FusionMethod.VOTE:
                states = [states[pick_winner([state.builder for state in states])]]
            made = [self._generation(job, method, s, timings, recompiles) for s in states]
            results[str(method)] = made if method is FusionMethod.PER_PROMPT else made[0]
        return results

    def _generation(
        self, job: Job, method: FusionMethod, state: AnswerState, timings: dict, recompiles: int
    ) -> Generation:
        weighting = SPECS[method].weighting
        layout = _layout_of(state)
        return Generation(
            method=str(method),
            paraphrase_index=state.answer.index if method is FusionMethod.PER_PROMPT else None,
            text=state.builder.text,
            token_ids=tuple(state.builder.token_ids),
            logprobs=tuple(state.builder.logprobs),
            finish_reason=state.builder.finish_reason,
            prompt_tokens=sum(len(e.token_ids) for e in layout if e.part is not Part.ANSWER),
            weights=None if weighting is Weighting.UNIFORM else job.weights.of(weighting),
            weights_source=job.weights.source_of(weighting),
            model=self.model.name,
            source=self.model.source,
            dtype=str(self.model.dtype).removeprefix("torch."),
            quantize=None,
            positions=job.plan.fusion.positions,
            seed=job.plan.generation.seed,
            layout=layout,
            timings=timings,
            recompiles=recompiles,
        )

    # Scoring

    @torch.inference_mode()
    def _score(
        self, job: Job, targets: Sequence[tuple[int, ...]]
    ) -> dict[str, list[float] | list[list[float]]]:
        """Every target behind every view as a stream of its own, as many at once as have labels."""
        dry = self._dry_run(job)
        views = len({dry.view(r).suffix for answer in dry.answers for r in answer.views})
        base = dry.packed.num_labels
        spare = next((n for n in LABEL_COUNTS if n >= base + views), LABEL_COUNTS[-1]) - base
        group_size = min(len(targets), max(1, spare // views))
        groups = [targets[i : i + group_size] for i in range(0, len(targets), group_size)]
        size = self._make_size(
            rows=1,
            slots=dry.packed.num_slots + views * max(sum(map(len, group)) for group in groups),
            labels=base + views * group_size,
        )
        scores: dict[Answer, list[float]] = {}
        with self.executor.session(rows=size.rows, slots=size.slots, labels=size.labels) as session:
            self._prefill(session, [job])
            for group in groups:
                for answer, values in self._score_group(session, job, group).items():
                    scores.setdefault(answer, []).extend(values)
        return {
            str(method): [scores[answer] for answer in answers]
            if method is FusionMethod.PER_PROMPT
            else scores[answers[0]]
            for method, answers in job.consumers.items()
        }

    def _score_group(
        self, session: Session, job: Job, targets: Sequence[tuple[int, ...]]
    ) -> dict[Answer, list[float]]:
        # Each group starts from the same layout: slots and labels of the last one are free again.
        packed = replace(job.packed, sees=dict(job.packed.sees))
        session.key_labels[:, packed.num_slots :] = 0
        views = list(dict.fromkeys(job.view(r) for a in job.answers for r in a.views))
        tokens = []
        for target in targets:
            for view in views:
                stream = packed.stream(view)
                forced = target[:-1]
                slots = packed.take_slots(len(forced))
                for offset, (token_id, slot) in enumerate(zip(forced, slots, strict=True)):
                    position = stream.first_position + offset
                    tokens.append(Token(token_id, position, slot, stream.label))
        hidden = None
        if tokens:
            session.set_tables([packed.sees])
            hidden = self.executor.prefill(session, [tokens])[0]
        scores: dict[Answer, list[float]] = {answer: [] for answer in job.answers}
        first_logits = torch.stack([job.view_logits[view.suffix] for view in views])
        start = 0
        for target in targets:
            logits = first_logits[:, None]
            if len(target) > 1:
                end = start + len(views) * (len(target) - 1)
                forced_logits = self.executor.unembed(hidden[start:end])
                forced_logits = forced_logits.view(len(views), len(target) - 1, -1)
                logits = torch.cat((logits, forced_logits), dim=1)
                start = end
            index = torch.tensor(target, device=logits.device)[:, None]
            for answer in job.answers:
                own = logits[[views.index(job.view(r)) for r in answer.views]]
                logprobs = reduce_logits(own, answer.reduction, answer.weights)
                scores[answer].append(float(logprobs.gather(1, index).sum()))
        return scores


class _Clock:
    """Milliseconds between laps, less the time spent in compiling."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._start = time.perf_counter()
        self._compile_s = executor.compile_s

    def lap_ms(self) -> float:
        if self._executor.device.type == "cuda":
            torch.cuda.synchronize(self._executor.device)
        now, compile_s = time.perf_counter(), self._executor.compile_s
        elapsed = (now - self._start) - (compile_s - self._compile_s)
        self._start, self._compile_s = now, compile_s
        return 1000 * elapsed


def _tokens_of(spans: Iterable[Span]) -> list[Token]:
    return [
        Token(token_id, position, slot, span.label)
        for span in spans
        for token_id, position, slot in zip(span.token_ids, span.positions, span.slots, strict=True)
    ]


def _next_tokens(job: Job) -> list[Token]:
    """The last token of every live answer, once for each of its streams."""
    tokens = []
    for state in job.live:
        token_ids = state.builder.token_ids
        slots = job.packed.take_slots(len(state.streams))
        for stream, slot, used in zip(state.streams, slots, state.slots, strict=True):
            position = stream.first_position + len(token_ids) - 1
            tokens.append(Token(token_ids[-1], position, slot, stream.label))
            used.append(slot)
    return tokens


def _extend(job: Job, state: AnswerState, logits: Tensor) -> list[StreamEvent]:
    """Reduce the streams' logits f32[R, V], pick a token, and tell every method that reads it.

    raises: MinifuseError where the scores are not finite.
    """
    answer, builder = state.answer, state.builder
    logprobs = reduce_logits(logits, answer.reduction, answer.weights)
    token_id = pick_token(logprobs, job.plan.generation, state.generator)
    logprob = float(logprobs[token_id])
    if not -torch.inf < logprob < torch.inf:
        raise MinifuseError(
            f"{answer.method}: the model's scores are not finite; its weights may be damaged, or "
            "too large for the dtype: try float32"
        )
    text = builder.push(token_id, logprob)
    return [
        StreamEvent(
            method=str(method),
            paraphrase_index=answer.index if method is FusionMethod.PER_PROMPT else None,
            token_id=token_id,
            text=text,
            logprob=logprob,
            finish_reason=builder.finish_reason,
        )
        for method, answers in job.consumers.items()
        if method is not FusionMethod.VOTE and answer in answers
    ]


def _layout_of(state: AnswerState) -> tuple[LayoutEntry, ...]:
    """Prefix, segments and suffixes that an answer sees, then its own tokens, stream by stream."""
    prompt = [span for view in state.views for span in (view.prefix, *view.segments) if span]
    several = len(state.views) > 1
    entries = [
        LayoutEntry(
            span.part,
            span.index,
            tuple(span.slots),
            (span.positions.start, span.positions.stop),
            span.token_ids,
        )
        for span in dict.fromkeys(prompt)
    ]
    for number, view in enumerate(state.views):
        span = view.suffix
        entries.append(
            LayoutEntry(
                span.part,
                number if several else None,
                tuple(span.slots),
                (span.positions.start, span.positions.stop),
                span.token_ids,
            )
        )
    token_ids = tuple(state.builder.token_ids)
    for number, (stream, slots) in enumerate(zip(state.streams, state.slots, strict=True)):
        start = stream.first_position
        entries.append(
            LayoutEntry(
                Part.ANSWER,
                number if several else None,
                tuple(slots),
                (start, start + len(token_ids)),
                token_ids,
            )
        )
    return tuple(entries)


def _drain(events: Generator):
    """Run a generator to its end; its return value."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value
