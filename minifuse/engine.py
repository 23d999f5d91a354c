"""The Fuser: requests from text to answers, by any number of methods.

A request gets a place in the pool behind its prefix (stored, and found again by its token ids);
segments and views' suffixes are run (see `prefill`), then one forward per token over the live
streams of all requests in flight. All that differs between methods is which views and streams are
asked for.
"""

import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from minifuse.answers import (
    CountedResults,
    Results,
    extend_answers,
    make_results,
    start_answers,
    vote_events,
)
from minifuse.attribution import attribute
from minifuse.cache import KVCache, cache_bytes, read_slots, write_slots
from minifuse.chat import read_chat_template, render_frame
from minifuse.config import ChatConfig
from minifuse.diagnosis import explain_lost_scores
from minifuse.errors import MinifuseError, UsageError
from minifuse.executor import MAX_DECODE_TOKENS, Executor
from minifuse.inspection import Inspection, inspect_job
from minifuse.layout import PackedPrompt, Span
from minifuse.loader import LoadedModel, load_model
from minifuse.memory import free_memory
from minifuse.methods import FusionMethod, parse_methods
from minifuse.pool import (
    LABEL_COUNTS,
    MIN_SLOTS,
    Lease,
    Need,
    Pool,
    Size,
    round_up,
    slots_for,
)
from minifuse.prefill import prefill, tokens_of, write_rules
from minifuse.request import (
    Frame,
    FusionOptions,
    Job,
    NotFiniteError,
    Options,
    Plan,
    Request,
    check_token_ids,
    encode_continuations,
    make_frame,
    make_job,
    make_plan,
)
from minifuse.results import StreamEvent
from minifuse.scoring import (
    Scores,
    by_method,
    score_targets,
    scores_of,
    scoring_labels,
    scoring_slots,
    target_logprobs,
)
from minifuse.stages import stage

STORED_PREFIXES = 4

# Token ids, and the length that dynamic RoPE goes by.
PrefixKey = tuple[tuple[int, ...], int | None]


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
    quantize: "int8" or "int4" weights; None or "none" as they are stored
    compile:  False runs eagerly: slow, no compiler needed, the same results
    raises:   MinifuseError of one kind or another; see `loader.load_model`
    """
    start = time.perf_counter()
    loaded = load_model(model, dtype, device, quantize)
    return Fuser(loaded, compile=compile, load_s=time.perf_counter() - start)


class Fuser:
    """A loaded model with its compiled graphs and stored prefixes; made by `minifuse.load`."""

    def __init__(self, model: LoadedModel, *, compile: bool = True, load_s: float = 0.0):
        self.model = model
        self.load_s = load_s
        self.executor = Executor(model.config, model.params, compile=compile)
        self._frames: dict[str | None, Frame] = {}
        self._prefixes: OrderedDict[PrefixKey, KVCache] = OrderedDict()

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
        size, batch_size = self._plan_batch([job], 1)

        def events() -> Generator[StreamEvent, None, Results]:
            results: CountedResults = {}
            for _, new, found in self._serve([job], size, batch_size):
                yield from new
                results = found or results
            return results[job.num_segments]

        return events()

    def generate_batch(
        self, requests: Iterable[Request], *, batch_size: int = 8, **options: Unpack[Options]
    ) -> list[Results]:
        """Answer many requests, up to `batch_size` at once; each as if it were alone.

        A request that is done makes room for the next. A prefix that requests share is computed
        and stored once. All input is checked before the first request runs; a batch that does not
        fit into memory is made smaller, with a warning. Options and errors as in `generate`.
        """
        plan = make_plan(**options)
        jobs = [self._make_job(request, plan) for request in requests]
        results: list[Results] = [{} for _ in jobs]
        for index, found in self._run_batch(jobs, batch_size):
            results[index] = found[jobs[index].num_segments]
        return results

    def generate_and_score(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        counts: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, dict[int, tuple[Results, Scores]]]]:
        """What `generate_batch` gives, and `score` besides, from the same prefill.

        Input is checked at the call, not at the first result.

        continuations: texts to score for each request, at least one
        counts:        numbers of segments, from the first one on, to ask with: each as if there
                       were no others (but for dynamic RoPE, which goes by the longest), and what
                       they have in common is run once; None for all segments alone
        returns:       as they are done, a request's index, and a pair by number of segments;
                       `vote` has no scores
        """
        if len(requests) != len(continuations):
            raise UsageError(
                f"there are {len(requests)} requests but {len(continuations)} lists of "
                "continuations; wanted one for each request"
            )
        plan = make_plan(**options)
        if counts is not None and plan.generation.temperature > 0:
            raise UsageError("counts are for greedy answers: draws would depend on the segments")
        if counts is not None and plan.attribution:
            raise UsageError("attribution is for all segments; leave out counts")
        jobs = [
            self._make_job(request, plan, encode_continuations(self.model.tokenizer, texts), counts)
            for request, texts in zip(requests, continuations, strict=True)
        ]
        return (
            (index, {n: (found[n], scores_of(jobs[index], n)) for n in jobs[index].counts})
            for index, found in self._run_batch(jobs, batch_size)
        )

    def _run_batch(
        self, jobs: Sequence[Job], batch_size: int
    ) -> Iterator[tuple[int, CountedResults]]:
        """Results by the job's index, as they are done."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; wanted an integer of at least 1")
        if not jobs:
            return iter(())
        size, batch_size = self._plan_batch(jobs, batch_size)
        served = self._serve(jobs, size, batch_size)
        return ((index, results) for index, _, results in served if results)

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
        targets = encode_continuations(self.model.tokenizer, continuations)
        request = Request(segments, prefix, suffix, weights)
        with self._run_prompt(request, targets, options) as (pool, job):
            score_targets(self.executor, pool, [job])
        return scores_of(job, job.num_segments)

    def distributions(
        self,
        *,
        segments: Sequence[str],
        continuation: str | Sequence[int],
        prefix: str = "",
        suffix: str = "",
        weights: Sequence[float] | str | None = None,
        **options: Unpack[FusionOptions],
    ) -> dict[str, Tensor | list[Tensor]]:
        """Each method's whole next-token distributions along a continuation, teacher-forced.

        continuation: text, or its n token ids
        returns: natural log-probabilities f32[n, V] before each of its tokens; for `per_prompt` a
                 list, one for each segment
        raises:  as `score`
        """
        if isinstance(continuation, str):
            (token_ids,) = encode_continuations(self.model.tokenizer, [continuation])
        else:
            token_ids = check_token_ids(continuation, self.model.config.vocab_size)
        request = Request(segments, prefix, suffix, weights)
        with self._run_prompt(request, [token_ids], options) as (pool, job):
            forced = target_logprobs(self.executor, pool, [job])
            found = {answer: logprobs for _, answer, _, logprobs in forced}
        return by_method(job, job.num_segments, found)

    @contextmanager
    def _run_prompt(
        self, request: Request, targets: Sequence[tuple[int, ...]], options: FusionOptions
    ) -> Iterator[tuple[Pool, Job]]:
        """A request whose prompt has been run, for tokens to be forced on.

        raises: UsageError where its methods have no distribution
        """
        methods = options.get("methods", (FusionMethod.FUSED,))
        names = [methods] if isinstance(methods, str) else list(methods)
        if FusionMethod.VOTE in names:
            raise UsageError("vote has no probabilities to score by; leave it out of methods")
        parsed = [m for m in parse_methods(names) if m is not FusionMethod.VOTE]
        wanted: FusionOptions = {**options, "methods": parsed}
        plan = make_plan(**wanted, max_new_tokens=1)
        job = self._make_job(request, plan, targets)
        size, _ = self._plan_batch([job], 1)
        with (
            self.executor.pool(size) as pool,
            torch.inference_mode(),
            self._explained(pool),
        ):
            self._admit(pool, deque([(0, job)]), 1)
            prefill(self.executor, pool, [job])
            yield pool, job

    def inspect(
        self,
        *,
        segments: Sequence[str],
        prefix: str = "",
        suffix: str = "",
        weights: Sequence[float] | str | None = None,
        **options: Unpack[Options],
    ) -> Inspection:
        """Answer a request, and lay open what lay where, who saw whom, and what was attended to.

        Options and errors as in `generate`; attribution is always found.
        """
        plan = replace(make_plan(**options), attribution=True)
        job = self._make_job(Request(segments, prefix, suffix, weights), plan)
        size, batch_size = self._plan_batch([job], 1)
        found: CountedResults = {}
        for _, _, results in self._serve([job], size, batch_size):
            found = results or found
        return inspect_job(
            job, found[job.num_segments], self.model.tokenizer, self.model.config, size.slots
        )

    def forget_prefixes(self) -> None:
        """Drop the stored prefixes: the next request computes its own anew."""
        self._prefixes.clear()

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

    def _rope_length(self, job: Job) -> int | None:
        return self.model.config.rope_length(job.extent.positions)

    def _prefix_key(self, job: Job) -> PrefixKey:
        """Dynamic RoPE turns the same tokens by other angles in a longer request."""
        return job.prompt.prefix_ids, self._rope_length(job)

    def _plan_batch(self, jobs: Sequence[Job], batch_size: int) -> tuple[Size, int]:
        """The pool in which any `batch_size` of the jobs fit at once, or as many as memory allows.

        returns: its size, and how many jobs are to be in flight
        raises:  UsageError beyond the tables, MinifuseError beyond memory.
        """
        free = free_memory(self.executor.device)
        wanted = min(batch_size, len(jobs))
        for count in range(wanted, 0, -1):
            size = self._size_of(jobs, count)
            needed = self._bytes_for(jobs, count, size)
            if needed <= free:
                break
        else:
            raise MinifuseError(
                f"{size.slots} slots of keys and values, their tables and one call of the model "
                f"need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free; use "
                "fewer or shorter prompts at once, or fewer new tokens"
            )
        if count < wanted:
            warnings.warn(
                f"{count} requests are run at once, not {wanted}: more would not fit into the "
                f"{free / 1e9:.2f} GB of memory that are free",
                stacklevel=4,
            )
        return size, count

    def _bytes_for(self, jobs: Sequence[Job], count: int, size: Size) -> int:
        """What it takes to answer any `count` of the jobs at once, beside the weights, at most.

        The pool and a call; what is kept of each prompt: hidden states, a view's logits and what
        is made of them; and copies of prefixes that are stored.
        """
        config = self.model.config
        lengths = sorted(len(ids) for ids in {job.prompt.prefix_ids for job in jobs})
        stored = cache_bytes(
            config,
            rows=1,
            slots=sum(lengths[-STORED_PREFIXES:]),
            dtype=self.executor.cache_dtype,
        )
        views = sum(sorted(job.extent.views for job in jobs)[-count:])
        scored = max(job.extent.views * max(map(len, job.targets), default=0) for job in jobs)
        logits = 3 * 4 * config.vocab_size * (max(views, MAX_DECODE_TOKENS) + scored)
        hidden = 2 * 4 * config.hidden_size * size.slots
        return self.executor.bytes_for(size) + stored + logits + hidden

    def _size_of(self, jobs: Sequence[Job], count: int) -> Size:
        """The pool in which any `count` of the jobs fit at once.

        raises: UsageError where one job alone has more labels than the tables.
        """
        needs = [own_need(job) for job in jobs]
        prefixes = {self._prefix_key(job): prefix_need(job) for job in jobs}
        slots = sorted(needs, key=lambda need: need.blocks)[-count:]
        slots += sorted(prefixes.values(), key=lambda need: need.blocks)[-count:]
        labels = sorted(need.labels + 1 for need in needs)
        if 1 + labels[-1] > LABEL_COUNTS[-1]:
            raise UsageError(
                f"these methods and segments need {1 + labels[-1]} labels and the tables have "
                f"{LABEL_COUNTS[-1]}; ask for fewer methods or segments in one call"
            )
        # Where labels run out before slots do, requests wait for each other.
        num_labels = min(1 + sum(labels[-count:]), LABEL_COUNTS[-1])
        return Size(
            slots=round_up(slots_for(slots), (MIN_SLOTS,)),
            labels=round_up(num_labels, LABEL_COUNTS),
            is_shared=count > 1,
        )

    # Serving

    def _serve(
        self, jobs: Sequence[Job], size: Size, batch_size: int
    ) -> Generator[tuple[int, list[StreamEvent], CountedResults | None], None, None]:
        """Answer jobs, up to `batch_size` at once; whoever is done makes room for who waits.

        yields: a job's index, what a step gave it, and its results with the last step
        """
        executor = self.executor
        compile_s, recompiles = executor.compile_s, executor.recompiles
        waiting = deque(enumerate(jobs))
        live: dict[int, Job] = {}
        with executor.pool(size) as pool:
            clock = _Clock(executor)
            while waiting or live:
                clock.lap_ms()
                # Prefill runs best with many tokens: places are filled again by the half.
                room = batch_size - len(live) if 2 * len(live) <= batch_size else 0
                with torch.inference_mode(), self._explained(pool):
                    new = self._admit(pool, waiting, room)
                    events = self._start(pool, new) if new else self._step(pool, live)
                share = clock.lap_ms() / len(events)
                live |= new
                for index, found in events.items():
                    job, results = live[index], None
                    if new:
                        job.prefill_ms = share
                    else:
                        job.decode_ms.append(share)
                    if not job.live:
                        if job.plan.attribution:
                            attribute(executor, pool, job)
                            clock.lap_ms()
                        timings = {
                            "load_s": self.load_s,
                            "compile_s": executor.compile_s - compile_s,
                            "prefill_ms": job.prefill_ms,
                            "decode_ms": job.decode_ms,
                        }
                        results = make_results(
                            job, self.model, timings, executor.recompiles - recompiles
                        )
                        found += vote_events(results)
                        pool.release(job.held)
                        del live[index]
                    yield index, found, results

    @contextmanager
    def _explained(self, pool: Pool) -> Iterator[None]:
        """Say where scores that are not finite come from, and leave none of them behind.

        The cache is in use again later, and what is hidden is multiplied by zero, which a number
        that is not finite survives.
        """
        try:
            yield
        except NotFiniteError as error:
            for layer in (*pool.cache.keys, *pool.cache.values):
                layer.zero_()
            self.forget_prefixes()
            executor = self.executor
            why = explain_lost_scores(
                executor.params, self.model.config, executor.dtype, error.prompts
            )
            raise MinifuseError(f"{error}; {why}") from None

    def _admit(self, pool: Pool, waiting: deque[tuple[int, Job]], count: int) -> dict[int, Job]:
        """Give the first jobs that wait their places, as long as they fit, at most to `count`."""
        admitted: dict[int, Job] = {}
        while waiting and len(admitted) < count:
            index, job = waiting[0]
            lease = self._lease(pool, job)
            if lease is None and pool.is_idle:
                pool.release_prefixes()  # one that nobody uses lies in the way
                lease = self._lease(pool, job)
            if lease is None:
                break
            job.lease = lease
            admitted[index] = job
            waiting.popleft()
        return admitted

    def _lease(self, pool: Pool, job: Job) -> Lease | None:
        """Slots and labels for a job, its prefix in place; None where too few are free."""
        inv_freq = self.executor.make_inv_freq(self._rope_length(job))
        prefix, packed = None, PackedPrompt(job.prompt)
        span = packed.prefix()
        if span is not None:
            key = self._prefix_key(job)
            prefix = pool.prefixes.get(key) or pool.lease_prefix(key, prefix_need(job), inv_freq)
            if prefix is None:
                return None
            if not prefix.rules:
                pool.write_rules([(prefix, packed.sees)])
                self._fill_prefix(pool, key, prefix, span)
        return pool.lease(own_need(job), inv_freq, prefix)

    @stage("prefix")
    def _fill_prefix(self, pool: Pool, key: PrefixKey, lease: Lease, span: Span) -> None:
        """Put a prefix into its slots, computed where it is not stored."""
        slots = torch.tensor(lease.slots[1:], device=self.executor.device)
        if key in self._prefixes:
            write_slots(pool.cache, slots, self._prefixes[key])
            pool.place_keys(lease, span.slots, span.label, span.first_position)
        else:
            self.executor.prefill(pool, [(lease, tokens_of([span]))])
            self._prefixes[key] = read_slots(pool.cache, slots)
            if len(self._prefixes) > STORED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)

    def _start(self, pool: Pool, jobs: Mapping[int, Job]) -> dict[int, list[StreamEvent]]:
        """Run the prompts of new jobs, score what is to be scored; each answer's first token."""
        prefill(self.executor, pool, list(jobs.values()))
        score_targets(self.executor, pool, list(jobs.values()))
        answers = []
        for index, job in jobs.items():
            start_answers(job, self.model)
            for state in job.states.values():
                logits = [job.view_logits[view.suffix] for view in state.views]
                answers.append((index, job, state, logits))
            if not job.plan.attribution:
                # Megabytes, while a job stays until the last of them is done.
                job.view_logits.clear()
        return extend_answers(answers)

    @stage("step")
    def _step(self, pool: Pool, jobs: Mapping[int, Job]) -> dict[int, list[StreamEvent]]:
        """One forward over all live streams; every answer gets its next token."""
        steps = [job.next_step() for job in jobs.values()]
        write_rules(pool, jobs.values())  # where answers part
        leases = [job.held for job in jobs.values()]
        self.executor.move(
            pool, [(lease, copies) for lease, (_, copies) in zip(leases, steps, strict=True)]
        )
        logits = self.executor.decode(
            pool, [(lease, tokens) for lease, (tokens, _) in zip(leases, steps, strict=True)]
        )
        return extend_answers(
            [
                (index, job, state, [own[row] for row in state.rows])
                for (index, job), own in zip(jobs.items(), logits, strict=True)
                for state in job.live
            ]
        )


class _Clock:
    """Milliseconds between laps, less the time spent in compiling.

    A lap ends with tokens that were read from the device, and so with all that made them.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._start = time.perf_counter()
        self._compile_s = executor.compile_s

    def lap_ms(self) -> float:
        now, compile_s = time.perf_counter(), self._executor.compile_s
        elapsed = (now - self._start) - (compile_s - self._compile_s)
        self._start, self._compile_s = now, compile_s
        return 1000 * elapsed


def own_need(job: Job) -> Need:
    """What a job takes in the pool beside its prefix, scoring included."""
    num_prefix = len(job.prompt.prefix_ids)
    return Need(
        slots=job.extent.slots + scoring_slots(job) - 1 - num_prefix,
        labels=job.extent.labels + scoring_labels(job) - 1 - bool(num_prefix),
    )


def prefix_need(job: Job) -> Need:
    num_prefix = len(job.prompt.prefix_ids)
    return Need(num_prefix, int(num_prefix > 0))
