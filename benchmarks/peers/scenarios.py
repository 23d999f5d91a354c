"""The scenarios S1 to S6: who runs what, on which inputs; each gives rows.

Engines without a stored prefix stand once in S1, beside both states of minifuse. Decoding is the
difference between a long and a short answer behind the same held context, over the tokens between
them. What an engine can do in several ways is tried in its warm-up, and the fastest taken.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers.engines import Engines, LlamaEngine, MinifuseEngine, read_seconds
from benchmarks.peers.questions import Question, make_passage, make_questions, split_passage
from benchmarks.peers.rows import (
    BATCHED,
    CACHED,
    COLD,
    GENERATE,
    LLAMA,
    LLAMA_BATCH,
    LLAMA_SHARED,
    LLAMA_TIMES,
    MEMORY,
    OURS,
    PROTOTYPE,
    TRANSFORMERS,
    Contestant,
    Key,
    Row,
    race,
    say,
)
from benchmarks.peers.targets import ALL, BF16, FP32, Q4_1, ours
from minifuse.methods import FusionMethod

FLOATS = (FP32, BF16)


@dataclass(frozen=True)
class Sizes:
    """How much is run; the defaults are those of the targets.

    few:           questions of S2 for engines that are slow
    decode_tokens: tokens between the long and the short answer of S3
    step_tokens:   the same for growth
    step_live:     tokens of all paraphrases together in the steps by N
    read_bytes:    of the tensor that the memory's speed is measured on
    """

    new_tokens: int = 10
    num_segments: int = 5
    questions: int = 64
    few: int = 8
    batch_sizes: tuple[int, ...] = (8, 32)
    decode_lengths: tuple[int, ...] = (200, 1000, 3500)
    prefill_lengths: tuple[int, ...] = (200, 1000, 3500)
    decode_tokens: int = 64
    step_tokens: int = 32
    step_live: int = 480
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    read_bytes: int = 1 << 29


@dataclass(frozen=True)
class Bench:
    """What every scenario needs."""

    engines: Engines
    dtypes: tuple[str, ...]
    repeats: int
    sizes: Sizes

    @property
    def floats(self) -> list[str]:
        return [dtype for dtype in self.dtypes if dtype in FLOATS]

    def minifuse(self) -> list[tuple[str, MinifuseEngine]]:
        """By dtype; those that cannot be loaded are left out."""
        found = [(dtype, self.engines.minifuse(dtype)) for dtype in self.dtypes]
        return [(dtype, engine) for dtype, engine in found if engine is not None]

    def questions(self, count: int, num_segments: int | None = None) -> list[Question]:
        wanted = self.sizes.num_segments if num_segments is None else num_segments
        return make_questions(self.engines.tokenizer, count, wanted)

    def passage(self, num_tokens: int) -> list[int]:
        text = make_passage(self.engines.tokenizer, num_tokens)
        return self.engines.tokenizer.encode(text, is_start=True)

    def main_dtype(self) -> str:
        """Growth is shown in one dtype."""
        return BF16 if BF16 in self.dtypes else self.dtypes[0]


def one_question(bench: Bench) -> list[Row]:
    """S1: five paraphrases, behind a prefix that is stored already, or not."""
    (question,) = bench.questions(1)
    tokens = bench.sizes.new_tokens
    contestants = _question_peers("S1", bench, [question], [question], bench.floats)
    for state in (COLD, CACHED):
        contestants += _sharing_llamas("S1", "", bench, [question], state)
    for dtype, engine in bench.minifuse():
        for label, methods in (("fused", "fused"), ("logit_avg", "logit_avg"), (ALL, "all")):
            run = functools.partial(engine.answer, question, methods, tokens)
            for state in (COLD, CACHED):
                prepare = engine.fuser.forget_prefixes if state == COLD else _nothing
                key = Key("S1", "", ours(label, state), dtype)
                contestants.append(_contestant(key, run, prepare=prepare))
    return race(contestants, bench.repeats, "S1")


def data_set(bench: Bench) -> list[Row]:
    """S2: many questions behind one prefix, by time per question."""
    questions = bench.questions(bench.sizes.questions)
    few = questions[: bench.sizes.few]
    tokens = bench.sizes.new_tokens
    dtype = bench.main_dtype()
    peers = [dtype] if dtype in FLOATS else []
    contestants = _question_peers("S2", bench, few, questions, peers)
    contestants += _sharing_llamas("S2", "", bench, few, COLD)
    for own_dtype, engine in bench.minifuse():
        for method in ("fused", "logit_avg"):
            variants = {
                f"batch_size {size}": functools.partial(
                    _drop_result, engine.answer_all, questions, method, tokens, size
                )
                for size in bench.sizes.batch_sizes
            }
            contestants.append(
                Contestant(
                    Key("S2", "", ours(method), own_dtype),
                    variants,
                    count=len(questions),
                    prepare=engine.fuser.forget_prefixes,
                )
            )
    return race(contestants, bench.repeats, "S2")


def decoding(bench: Bench) -> list[Row]:
    """S3: one stream, by live tokens; and the bytes of a step against a read of memory."""
    rows = []
    for live in bench.sizes.decode_lengths:
        contestants = _decoders(bench, "S3", live, bench.sizes.decode_tokens, bench.dtypes)
        numbers = torch.ones(bench.sizes.read_bytes // 4)
        reader = Contestant(
            Key("S3 bytes", str(live), MEMORY, ""),
            {"": functools.partial(read_seconds, numbers)},
            count=numbers.nbytes,
        )
        timed = race([*contestants, reader], bench.repeats, f"S3, {live} live tokens")
        rows += timed
        engines = dict(bench.minifuse())
        for row in timed:
            if row.key.engine == OURS:
                num_bytes = engines[row.key.dtype].bytes_per_step(live)
                key = Key("S3 bytes", str(live), OURS, row.key.dtype)
                values = tuple(value / num_bytes for value in row.values)
                rows.append(Row(key, row.unit, values, f"{num_bytes / 1e6:.1f} MB a step"))
        del numbers, reader
    return rows


def prefill(bench: Bench) -> list[Row]:
    """S4: from a prompt to its first token, nothing stored."""
    rows = []
    for length in bench.sizes.prefill_lengths:
        case = str(length)
        token_ids = bench.passage(length)
        contestants = [
            _contestant(
                Key("S4", case, TRANSFORMERS, dtype),
                functools.partial(bench.engines.transformers(dtype).prefill, token_ids),
            )
            for dtype in bench.floats
        ]
        key = Key("S4", case, LLAMA, Q4_1)
        contestants += _llama(bench, key, lambda llama, ids=token_ids: llama.prefill(ids))
        text = make_passage(bench.engines.tokenizer, length)
        question = Question(bench.engines.tokenizer, (text,), prefix="", suffix="")
        for dtype, engine in bench.minifuse():
            run = functools.partial(engine.answer, question, "origin", 1)
            contestants.append(_contestant(Key("S4", case, OURS, dtype), run))
        rows += race(contestants, bench.repeats, f"S4, {length} tokens")
    return rows


def growth(bench: Bench) -> list[Row]:
    """S5: by paraphrases, context, batch and methods."""
    return [
        *_growth_of_step(bench),
        *_growth_by_paraphrases(bench),
        *_growth_by_context(bench),
        *_growth_by_batch(bench),
        *_growth_by_methods(bench),
    ]


def start_up(bench: Bench) -> list[Row]:
    """S6: a new process each, from launch to exit, the model converted on disk."""
    (question,) = bench.questions(1)
    command = [sys.executable, "-m", "minifuse.generate", "--method=fused", "--template={}"]
    command += [f"--prefix={question.prefix}", f"--suffix={question.suffix}", "--stop=none"]
    command += [f"--max-new-tokens={bench.sizes.new_tokens}", f"--dtype={BF16}"]
    if bench.engines.model is not None:
        command.append(f"--model={bench.engines.model}")
    if not bench.engines.is_compiled:
        command.append("--no-compile")
    command += ["--", *question.segments]
    values: dict[str, list[float]] = {"empty": [], "warm": []}
    for repeat in range(bench.repeats):
        with tempfile.TemporaryDirectory() as folder:
            threads = str(torch.get_num_threads())
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            environment["TORCHINDUCTOR_CACHE_DIR"] = folder
            for cache in values:
                say(f"S6: repeat {repeat + 1} of {bench.repeats}, {cache} compile cache")
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                values[cache].append(time.perf_counter() - start)
    return [
        Row(Key("S6", cache, ours("fused"), BF16), "s", tuple(found))
        for cache, found in values.items()
    ]


SCENARIOS: dict[str, Callable[[Bench], list[Row]]] = {
    "S1": one_question,
    "S2": data_set,
    "S3": decoding,
    "S4": prefill,
    "S5": growth,
    "S6": start_up,
}


def _growth_of_step(bench: Bench) -> list[Row]:
    """One fused step by N, with as many live tokens whatever N is."""
    dtype, tokenizer = bench.main_dtype(), bench.engines.tokenizer
    engine = bench.engines.minifuse(dtype)
    if engine is None:
        return []
    contestants = []
    for count in bench.sizes.counts:
        segments = split_passage(tokenizer, bench.sizes.step_live, count)
        question = Question(tokenizer, segments)
        run = functools.partial(engine.step_seconds, question, "fused", bench.sizes.step_tokens + 1)
        key = Key("S5", "one step by N", ours("fused", f"N = {count}"), dtype)
        contestants.append(Contestant(key, {"": run}, x=count))
    return race(contestants, bench.repeats, "S5, one step by N")


def _growth_by_paraphrases(bench: Bench) -> list[Row]:
    """The whole time of one question by N, the prefix stored where an engine can."""
    dtype, tokens = bench.main_dtype(), bench.sizes.new_tokens
    engine = bench.engines.minifuse(dtype)
    rows = []
    for count in bench.sizes.counts:
        (question,) = bench.questions(1, count)
        case = f"one question, N = {count}"
        contestants = []
        if dtype in FLOATS:
            run = functools.partial(
                bench.engines.transformers(dtype).batched, question.prompts, tokens
            )
            contestants.append(_contestant(Key("S5", case, BATCHED, dtype), run, x=count))
        contestants += _sharing_llamas("S5", case, bench, [question], CACHED, x=count)
        if engine is not None:
            for method in ("fused", "logit_avg"):
                run = functools.partial(engine.answer, question, method, tokens)
                key = Key("S5", case, ours(method), dtype)
                contestants.append(_contestant(key, run, x=count))
        rows += race(contestants, bench.repeats, f"S5, one question, N = {count}")
    return rows


def _growth_by_context(bench: Bench) -> list[Row]:
    """Decoding by live tokens."""
    rows = []
    for live in bench.sizes.contexts:
        contestants = _decoders(
            bench, "S5", live, bench.sizes.step_tokens, [bench.main_dtype()], "decode, live = {}"
        )
        rows += race(contestants, bench.repeats, f"S5, decode, {live} live tokens")
    return rows


def _growth_by_batch(bench: Bench) -> list[Row]:
    """Time per question by how many are answered at once, the prefix stored."""
    dtype, tokens = bench.main_dtype(), bench.sizes.new_tokens
    engine = bench.engines.minifuse(dtype)
    if engine is None:
        return []
    rows = []
    for size in bench.sizes.batches:
        questions = bench.questions(size)
        contestants = [
            _contestant(
                Key("S5", f"batch of {size}", ours(method), dtype),
                functools.partial(engine.answer_all, questions, method, tokens, size),
                count=size,
                x=size,
            )
            for method in ("fused", "logit_avg")
        ]
        rows += race(contestants, bench.repeats, f"S5, batch of {size}")
    return rows


def _growth_by_methods(bench: Bench) -> list[Row]:
    """One question by ever more methods at once, N = 5, the prefix stored."""
    dtype = bench.main_dtype()
    engine = bench.engines.minifuse(dtype)
    if engine is None:
        return []
    (question,) = bench.questions(1)
    # The one that the target compares with first, then in the order of the list.
    first = FusionMethod.LOGIT_AVG
    order = [str(first), *(str(method) for method in FusionMethod if method is not first)]
    contestants = []
    for count in (1, 2, 4, 8, len(order)):
        label = ALL if count == len(order) else f"{count} methods" if count > 1 else order[0]
        run = functools.partial(engine.answer, question, order[:count], bench.sizes.new_tokens)
        key = Key("S5", "methods", ours(label), dtype)
        contestants.append(_contestant(key, run, x=count))
    return race(contestants, bench.repeats, "S5, methods")


def _question_peers(
    scenario: str,
    bench: Bench,
    few: Sequence[Question],
    questions: Sequence[Question],
    dtypes: Iterable[str],
) -> list[Contestant]:
    """(a) to (d) on whole prompts; all but (b) on the few."""
    tokens = bench.sizes.new_tokens
    contestants = []
    for dtype in dtypes:
        engine = bench.engines.transformers(dtype)
        for name, call, asked in (
            (PROTOTYPE, engine.prototype, few),
            (BATCHED, engine.batched, questions),
            (GENERATE, engine.separate, few),
        ):
            run = functools.partial(_for_each, call, asked, tokens)
            key = Key(scenario, "", name, dtype)
            contestants.append(_contestant(key, run, count=len(asked)))
    contestants += _llama(
        bench,
        Key(scenario, "", LLAMA_TIMES, Q4_1),
        lambda llama: _for_each(llama.separate, few, tokens),
        count=len(few),
    )
    return contestants


def _decoders(
    bench: Bench,
    scenario: str,
    live: int,
    num_tokens: int,
    dtypes: Sequence[str],
    case: str = "{}",
) -> list[Contestant]:
    """All engines behind a held context, with `live` tokens at the middle of what is timed."""
    case = case.format(live)
    longest = bench.engines.context_length - num_tokens - 2
    context = min(live - (num_tokens + 1) // 2, longest)
    token_ids = bench.passage(context)
    contestants = []

    def add(key: Key, ways: dict[str, Callable[[int], object]], prepare=_nothing) -> None:
        variants = {
            name: functools.partial(_seconds_between, way, num_tokens) for name, way in ways.items()
        }
        contestants.append(Contestant(key, variants, prepare=prepare, x=live))

    for dtype in dtypes:
        if dtype not in FLOATS:
            continue
        engine = bench.engines.transformers(dtype)
        add(
            Key(scenario, case, TRANSFORMERS, dtype),
            {"own loop": engine.decode, "generate": engine.decode_by_generate},
            functools.partial(engine.hold, token_ids),
        )
    llamas = bench.engines.llama()
    if llamas:
        add(
            Key(scenario, case, LLAMA, Q4_1),
            {name: llama.decode for name, llama in llamas.items()},
            lambda: [llama.hold(token_ids) for llama in llamas.values()],
        )
    text = make_passage(bench.engines.tokenizer, context)
    # The last word is the paraphrase; what stands before it is a stored prefix.
    end = text.rfind(" ")
    question = Question(bench.engines.tokenizer, (text[end:],), prefix=text[:end], suffix="")
    for dtype, engine in bench.minifuse():
        if dtype in dtypes:
            way = functools.partial(engine.answer, question, "origin")
            add(Key(scenario, case, OURS, dtype), {"": way})
    return contestants


def _seconds_between(way: Callable[[int], object], num_tokens: int) -> float:
    """Seconds per token by the difference between a long and a short answer."""
    seconds = []
    for count in (1, 1 + num_tokens):
        start = time.perf_counter()
        way(count)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / num_tokens


def _sharing_llamas(
    scenario: str,
    case: str,
    bench: Bench,
    questions: Sequence[Question],
    state: str,
    x: float | None = None,
) -> list[Contestant]:
    """(d) behind one prefix, which is stored before the time starts, or not."""
    tokens = bench.sizes.new_tokens
    prefix_ids = questions[0].prefix_ids
    is_cold = state == COLD
    contestants = []
    for name, call in (
        (LLAMA_SHARED, lambda llama: [llama.shared(q, tokens) for q in questions]),
        (LLAMA_BATCH, lambda llama: [llama.batched(q, tokens) for q in questions]),
    ):
        contestants += _llama(
            bench,
            Key(scenario, case, f"{name}, {state}", Q4_1),
            call,
            prepare=lambda llama: llama.forget() if is_cold else llama.hold(prefix_ids),
            count=len(questions),
            x=x,
        )
    return contestants


def _llama(
    bench: Bench,
    key: Key,
    call: Callable[[LlamaEngine], object],
    *,
    prepare: Callable[[LlamaEngine], object] = lambda llama: None,
    count: int = 1,
    x: float | None = None,
) -> list[Contestant]:
    """A contestant with both attention kernels, or none where llama.cpp is missing."""
    llamas = bench.engines.llama()
    if not llamas:
        return []
    variants = {
        name: functools.partial(_drop_result, call, llama) for name, llama in llamas.items()
    }
    return [
        Contestant(
            key,
            variants,
            count=count,
            prepare=lambda: [prepare(llama) for llama in llamas.values()],
            x=x,
        )
    ]


def _contestant(key: Key, run: Callable[[], object], **options: object) -> Contestant:
    """One that has a single way to do its work."""
    return Contestant(key, {"": functools.partial(_drop_result, run)}, **options)


def _drop_result(run: Callable, *args: object) -> None:
    run(*args)


def _for_each(call: Callable, questions: Iterable[Question], num_tokens: int) -> None:
    for question in questions:
        call(question.prompts, num_tokens)


def _nothing() -> None:
    pass
