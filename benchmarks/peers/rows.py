"""Measurements: who ran what, how long each repeat took, and how two of them compare.

All contestants of a race run turn about, so that a noisy machine slows all of them, and ratios
are taken repeat by repeat.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# Engines by their letters in the report; the same words stand in the table of targets.
PROTOTYPE = "(a) prototype"
BATCHED = "(b) transformers, one batch"
GENERATE = "(c) transformers, N times"
TRANSFORMERS = "transformers"
LLAMA = "(d) llama.cpp"
LLAMA_TIMES = "(d) llama.cpp, N times"
LLAMA_SHARED = "(d) llama.cpp, shared prefix"
LLAMA_BATCH = "(d) llama.cpp, shared prefix, one batch"
OURS = "(e) minifuse"
MEMORY = "memory read"
COLD, CACHED = "prefix cold", "prefix cached"

Runner = Callable[[], float | None]


@dataclass(frozen=True)
class Key:
    """Names a row: scenario (S1 ...), case within it, engine, and dtype of its weights."""

    scenario: str
    case: str
    engine: str
    dtype: str


@dataclass(frozen=True)
class Row:
    """One line of the table.

    values: one per repeat, in `unit`, of what the case counts (a question, a token, a call)
    chosen: which of the engine's settings was the fastest, where there was a choice
    x:      where the row stands in a plot of growth
    """

    key: Key
    unit: str
    values: tuple[float, ...]
    chosen: str = ""
    x: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict:
        return {
            "scenario": self.key.scenario,
            "case": self.key.case,
            "engine": self.key.engine,
            "dtype": self.key.dtype,
            "unit": self.unit,
            "median": self.median,
            "values": list(self.values),
            "chosen": self.chosen,
            "x": self.x,
        }


@dataclass
class Contestant:
    """One engine in a race.

    variants: by name, ways to do the work; the fastest in the warm-up is taken. Each does all of
              the work, and returns seconds where it takes the time itself, None where its whole
              run counts.
    count:    what the run's time is divided by: questions, tokens or bytes
    prepare:  runs before every repeat, outside of the time
    unit:     what `values` come in once divided; "s", or "ms" for a thousandth
    """

    key: Key
    variants: Mapping[str, Runner]
    count: float = 1
    prepare: Callable[[], object] = lambda: None
    unit: str = "ms"
    x: float | None = None
    chosen: str = field(default="", init=False)

    def time(self, name: str) -> float:
        self.prepare()
        start = time.perf_counter()
        own = self.variants[name]()
        return time.perf_counter() - start if own is None else own

    def warm_up(self) -> None:
        """Compile, fill caches, and choose the fastest variant by one more run of each.

        Two variants so close that one run does not tell them apart are equally good.
        """
        for name in self.variants:
            self.time(name)
        names = list(self.variants)
        self.chosen = min(names, key=self.time) if len(names) > 1 else names[0]


def race(contestants: Sequence[Contestant], repeats: int, what: str) -> list[Row]:
    """Warm up all, then time all turn about; whoever began comes last in the next repeat."""
    for contestant in contestants:
        say(f"{what}: warming up {contestant.key.engine}, {contestant.key.dtype}")
        contestant.warm_up()
    seconds: dict[Key, list[float]] = {contestant.key: [] for contestant in contestants}
    assert len(seconds) == len(contestants)
    before = _count_graphs()
    for repeat in range(repeats):
        say(f"{what}: repeat {repeat + 1} of {repeats}")
        first = repeat % max(1, len(contestants))
        for contestant in [*contestants[first:], *contestants[:first]]:
            seconds[contestant.key].append(contestant.time(contestant.chosen))
    compiled = _count_graphs() - before
    if compiled:
        say(f"{what}: {compiled} graphs were compiled while the time was taken; do not use it")
    return [_make_row(contestant, seconds[contestant.key]) for contestant in contestants]


def _count_graphs() -> int:
    """Graphs compiled in this process; a warm-up leaves none to compile."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _make_row(contestant: Contestant, seconds: Sequence[float]) -> Row:
    scale = {"s": 1, "ms": 1000}[contestant.unit] / contestant.count
    values = tuple(scale * value for value in seconds)
    return Row(contestant.key, contestant.unit, values, contestant.chosen, contestant.x)


def ratio(over: Row, under: Row) -> float:
    """The median over repeats of how many times `over` is as slow as `under`, of one race."""
    assert over.unit == under.unit
    return statistics.median(a / b for a, b in zip(over.values, under.values, strict=True))


def say(line: str) -> None:
    """Progress; standard output is for results."""
    print(line, file=sys.stderr, flush=True)
