"""The Fuser: one request, or a batch, from text to answers by any number of methods.

A request takes four steps: the prefix (stored, and found again by its token ids), the segments,
the views' suffixes, then one forward per token over all live streams. Each is one or two calls of
the executor; all that differs between methods is which views and streams are asked for.
"""

import contextlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from minifuse.cache import KVCache, cache_bytes, copy_prefix, snapshot_prefix
from minifuse.chat import read_chat_template, render_frame
from minifuse.config import ChatConfig
from minifuse.errors import MinifuseError, UsageError
from minifuse.executor import (
    LABEL_COUNTS,
    MIN_SLOTS,
    Copy,
    Executor,
    Session,
    Size,
    Token,
    round_up,
)
from minifuse.layout import Encoding, Part, Span
from minifuse.loader import LoadedModel, free_memory, load_model
from minifuse.methods import (
    SPECS,
    FusionMethod,
    SegmentWeights,
    Weighting,
    parse_methods,
    single_view,
)
from minifuse.request import (
    AnswerState,
    Frame,
    FusionOptions,
    Job,
    Options,
    Plan,
    Request,
    encode_continuations,
    make_frame,
    make_job,
    make_plan,
)
from minifuse.results import Generation, StreamEvent, TextBuilder, pick_winner
from minifuse.sampling import make_generator, pick_token, reduce_logits
from minifuse.scoring import Scores, score_targets, scores_of, scoring_labels, scoring_slots

STORED_PREFIXES = 4
# Rows of logits held at once while a segment's likelihood is summed up.
LOGIT_ROWS = 64

Results = dict[str, Generation | list[Generation]]
# By the number of segments that were asked with.
CountedResults = dict[int, Results]


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
        self._frames: dict[str | None, Frame] = {}
        self._prefixes: OrderedDict[tuple[tuple[int, ...], int | None], KVCache] = OrderedDict()

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
        options: methods (names, aliases or "all"), positions, beta, balance, chat, system,
                 chat_variables, max_new_tokens, temperature, top_k, top_p, stop, seed; see
                 FusionConfig, ChatConfig and GenerationConfig
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
        request = Request(segments, prefix, suffix, weights)
        job = self._make_job(request, make_plan(**options))
        size = self._size_of([job])

        def first_result() -> Generator[StreamEvent, None, Results]:
            (results,) = yield from self._run([job], size)
            return results[job.num_segments]

        return first_result()

    def generate_batch(
        self, requests: Iterable[Request], *, batch_size: int = 8, **options: Unpack[Options]
    ) -> list[Results]:
        """Answer many requests, up to `batch_size` at once; each as if it were alone.

        A prefix that requests share is computed once. All input is checked before the first
        request runs. Options and errors as in `generate`.
        """
        plan = make_plan(**options)
        jobs = [self._make_job(request, plan) for request in requests]
        results = self._run_batches(jobs, batch_size)
        return [result[job.num_segments] for result, job in zip(results, jobs, strict=True)]

    def generate_and_score(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        counts: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> list[dict[int, tuple[Results, Scores]]]:
        """What `generate_batch` gives, and `score` besides, from the same prefill.

        continuations: texts to score for each request, at least one
        counts:        numbers of segments, from the first one on, to ask with: each as if there
                       were no others (but for dynamic RoPE, which goes by the longest), and what
                       they have in common is run once; None for all segments alone
        batch_size:    rows of every batch; what requests leave empty is padding, so that one set
                       of graphs serves all batches
        returns:       for each request a pair by number of segments; `vote` has no scores
        """
        if len(requests) != len(continuations):
            raise UsageError(
                f"there are {len(requests)} requests but {len(continuations)} lists of "
                "continuations; wanted one for each request"
            )
        plan = make_plan(**options)
        if counts is not None and plan.generation.temperature > 0:
            raise UsageError("counts are for greedy answers: draws would depend on the segments")
        jobs = [
            self._make_job(request, plan, encode_continuations(self.model.tokenizer, texts), counts)
            for request, texts in zip(requests, continuations, strict=True)
        ]
        batches = self._run_batches(jobs, batch_size, is_padded=True)
        return [
            {count: (results[count], scores_of(job, count)) for count in job.counts}
            for results, job in zip(batches, jobs, strict=True)
        ]

    def _run_batches(
        self, jobs: Sequence[Job], batch_size: int, *, is_padded: bool = False
    ) -> list[CountedResults]:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; wanted an integer of at least 1")
        groups = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        sizes = [
            self._size_of(group, rows=batch_size if is_padded else len(group)) for group in groups
        ]
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
    ) -> Scores:
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
        targets = encode_continuations(self.model.tokenizer, continuations)
        plan = make_plan(**{**options, "methods": parsed}, max_new_tokens=1)
        job = self._make_job(Request(segments, prefix, suffix, weights), plan, targets)
        size = self._size_of([job])
        with self._session([job], size) as session, torch.inference_mode():
            self._prefill(session, [job])
            score_targets(self.executor, session, [job])
        return scores_of(job, job.num_segments)

    # Size

    def _make_job(
        self,
        request: Request,
        plan: Plan,
        targets: Sequence[tuple[int, ...]] = (),
        counts: Sequence[int] | None = None,
    ) -> Job:
        """Check, encode and measure a request.

        targets: token ids of continuations to score
        counts:  numbers of segments to ask with
        raises:  UsageError for what cannot be run, or needs more positions than the model has; it
                 names the request where that has an id.
        """
        frame = self._frame(plan.chat)
        try:
            job = make_job(self.model.tokenizer, request, plan, frame, counts)
            job.targets = tuple(targets)
            job.measure(self.model.config.context_length)
        except UsageError as error:
            if request.id is None:
                raise
            raise UsageError(f"request {request.id!r}: {error}") from None
        return job

    def _frame(self, chat: ChatConfig | None) -> Frame:
        """What stands around messages; a chat template is rendered once for each way of asking.

        raises: UsageError where there is no template or it refuses what is asked, CheckpointError
                where it is faulty.
        """
        key = None if chat is None else repr((chat.system, sorted(chat.variables.items())))
        if key not in self._frames:
            rendered = None
            if chat is not None:
                template = read_chat_template(self.model.folder)
                rendered = render_frame(template, system=chat.system, variables=chat.variables)
            self._frames[key] = make_frame(self.model.tokenizer, rendered)
        return self._frames[key]

    def _size_of(self, jobs: Sequence[Job], rows: int = 1) -> Size:
        """What the jobs take together, in at least so many rows.

        raises: UsageError beyond the tables, MinifuseError beyond memory.
        """
        return self._make_size(
            rows=max(rows, len(jobs)),
            slots=max((job.extent.slots + scoring_slots(job) for job in jobs), default=1),
            labels=max((job.extent.labels + scoring_labels(job) for job in jobs), default=1),
        )

    def _rope_length(self, job: Job) -> int | None:
        return self.model.config.rope_length(job.extent.positions)

    def _session(
        self, jobs: Sequence[Job], size: Size
    ) -> contextlib.AbstractContextManager[Session]:
        return self.executor.session(size, [self._rope_length(job) for job in jobs])

    def _make_size(self, *, rows: int, slots: int, labels: int) -> Size:
        if labels > LABEL_COUNTS[-1]:
            raise UsageError(
                f"these methods and segments need {labels} labels and the tables have "
                f"{LABEL_COUNTS[-1]}; ask for fewer methods or segments in one call"
            )
        size = Size(
            round_up(rows, (1,)), round_up(slots, (MIN_SLOTS,)), round_up(labels, LABEL_COUNTS)
        )
        # A batch borrows one more row for prefixes.
        needed = cache_bytes(
            self.model.config,
            rows=size.rows + (size.rows > 1),
            slots=size.slots,
            dtype=self.model.dtype,
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
        """Put the prefix into a row of the cache, computed where it is not stored."""
        span = job.packed.prefix()
        if span is None:
            return
        job.packed.take_pending()
        # Dynamic RoPE turns the same tokens by other angles in a longer request.
        key = (span.token_ids, self._rope_length(job))
        if key not in self._prefixes:
            self._prefixes[key] = self._compute_prefix(session, job, span)
            if len(self._prefixes) > STORED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        copy_prefix(session.cache, row, self._prefixes[key])
        session.place_keys(row, span.slots, span.label, span.first_position)

    def _compute_prefix(self, session: Session, job: Job, span: Span) -> KVCache:
        """Keys and values of a prefix, float[1, K, P, D]; a batch borrows a row for it."""
        size = session.size
        with contextlib.ExitStack() as stack:
            if size.rows > 1:
                session = stack.enter_context(self._session([job], replace(size, rows=1)))
            session.set_tables([job.packed.sees])
            self.executor.prefill(session, [_tokens_of([span])])
            return snapshot_prefix(session.cache, len(span.slots))

    def _run_segments(
        self, session: Session, jobs: Sequence[Job], spans: Sequence[Sequence[Span]]
    ) -> Sequence[Tensor | None]:
        """Encode segments; per job hidden states float[n, C], None where no token is to be run."""
        rows = [_tokens_of(row) for row in spans]
        if not any(rows):
            return [None] * len(jobs)
        session.set_tables([job.packed.sees for job in jobs])
        return self.executor.prefill(session, rows).unbind()

    def _make_moves(self, session: Session, jobs: Sequence[Job]) -> None:
        rows = [
            [
                Copy(source, target, move.turn, move.target.label)
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

    def _likelihood(self, job: Job, hidden: Tensor | None, spans: Sequence[Span]) -> Tensor | None:
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

    def _run(
        self, jobs: Sequence[Job], size: Size
    ) -> Generator[StreamEvent, None, list[CountedResults]]:
        executor = self.executor
        compile_s, recompiles = executor.compile_s, executor.recompiles
        timings = {"load_s": self.load_s, "compile_s": 0.0, "prefill_ms": 0.0, "decode_ms": []}
        with self._session(jobs, size) as session:
            clock = _Clock(executor)
            with torch.inference_mode():
                self._prefill(session, jobs)
                score_targets(self.executor, session, jobs)
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
            for found in result.values():
                if FusionMethod.VOTE in found:
                    vote = found[FusionMethod.VOTE]
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
                lines=job.start_lines(views),
                builder=TextBuilder(
                    self.model.tokenizer.stream(),
                    config.stop,
                    self.model.eos_token_ids,
                    config.max_new_tokens,
                ),
                generator=generator,
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
        num_labels = [job.packed.num_labels for job in jobs]
        steps = [job.next_step() for job in jobs]
        if num_labels != [job.packed.num_labels for job in jobs]:  # some answers part
            session.set_tables([job.packed.sees for job in jobs])
        copies = [row_copies for _, row_copies in steps]
        if any(copies):
            self.executor.move(session, copies)
        logits = self.executor.decode(session, [tokens for tokens, _ in steps])
        return [
            event
            for job, row_logits in zip(jobs, logits, strict=False)
            for state in job.live
            for event in _extend(job, state, row_logits[state.rows])
        ]

    # Results

    def _results(self, job: Job, timings: dict, recompiles: int) -> CountedResults:
        results: CountedResults = {count: {} for count in job.counts}
        for (count, method), answers in job.consumers.items():
            weights = job.weights[count]
            states = [job.states[answer] for answer in answers]
            if method is FusionMethod.VOTE:
                states = [states[pick_winner([state.builder for state in states])]]
            made = [self._generation(job, method, weights, s, timings, recompiles) for s in states]
            is_list = method is FusionMethod.PER_PROMPT
            results[count][str(method)] = made if is_list else made[0]
        return results

    def _generation(
        self,
        job: Job,
        method: FusionMethod,
        weights: SegmentWeights,
        state: AnswerState,
        timings: dict,
        recompiles: int,
    ) -> Generation:
        weighting = SPECS[method].weighting
        layout = state.layout()
        return Generation(
            method=str(method),
            paraphrase_index=state.answer.index if method is FusionMethod.PER_PROMPT else None,
            text=state.builder.text,
            token_ids=tuple(state.builder.token_ids),
            logprobs=tuple(state.builder.logprobs),
            finish_reason=state.builder.finish_reason,
            prompt_tokens=sum(len(e.token_ids) for e in layout if e.part is not Part.ANSWER),
            weights=None if weighting is Weighting.UNIFORM else weights.of(weighting),
            weights_source=weights.source_of(weighting),
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
        for (_, method), answers in job.consumers.items()
        if method is not FusionMethod.VOTE and answer in answers
    ]


def _drain(events: Generator):
    """Run a generator to its end; its return value."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value
