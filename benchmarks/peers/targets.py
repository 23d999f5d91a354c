"""The targets of the race, as data, and whether rows meet them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.rows import (
    BATCHED,
    CACHED,
    COLD,
    LLAMA,
    LLAMA_TIMES,
    MEMORY,
    OURS,
    PROTOTYPE,
    TRANSFORMERS,
    Key,
    Row,
    ratio,
)
from minifuse.methods import FusionMethod

FP32, BF16, INT4 = "float32", "bfloat16", "int4"
# What the default model's file is, and llama.cpp reads as it is.
Q4_1 = "q4_1"
ALL = f"all {len(FusionMethod)}"


@dataclass(frozen=True)
class Target:
    """A ratio of two rows, or a time in seconds where `under` is None, and what is wanted of it.

    is_limit: the ratio may be at most, not at least, `target`
    """

    name: str
    over: Key
    under: Key | None
    target: float
    is_limit: bool = False


@dataclass(frozen=True)
class Outcome:
    """ratio and met are None where a row is missing."""

    name: str
    ratio: float | None
    target: float
    met: bool | None

    def to_json(self) -> dict:
        return {"name": self.name, "ratio": self.ratio, "target": self.target, "met": self.met}


def ours(method: str, *details: str) -> str:
    """How rows call minifuse by a method."""
    return ", ".join((f"{OURS} {method}", *details))


def _first_answer() -> Iterable[Target]:
    for dtype, state, target in (
        (FP32, COLD, 20.0),
        (FP32, CACHED, 35.0),
        (BF16, COLD, 22.0),
        (BF16, CACHED, 32.0),
    ):
        yield Target(
            f"S1 fused {dtype}, {state}, against (a) {dtype}",
            Key("S1", "", PROTOTYPE, dtype),
            Key("S1", "", ours("fused", state), dtype),
            target,
        )
    yield Target(
        f"S1 fused int4, {CACHED}, against (a) bfloat16",
        Key("S1", "", PROTOTYPE, BF16),
        Key("S1", "", ours("fused", CACHED), INT4),
        45.0,
    )
    for state, target in ((COLD, 3.0), (CACHED, 4.5)):
        yield Target(
            f"S1 fused bfloat16, {state}, against (b) bfloat16",
            Key("S1", "", BATCHED, BF16),
            Key("S1", "", ours("fused", state), BF16),
            target,
        )
    for state in (COLD, CACHED):
        yield Target(
            f"S1 fused int4, {state}, against (d) N times",
            Key("S1", "", LLAMA_TIMES, Q4_1),
            Key("S1", "", ours("fused", state), INT4),
            6.0,
        )


def _data_set() -> Iterable[Target]:
    for engine, target in ((PROTOTYPE, 80.0), (BATCHED, 9.0)):
        yield Target(
            f"S2 fused bfloat16 against {engine[:3]} bfloat16",
            Key("S2", "", engine, BF16),
            Key("S2", "", ours("fused"), BF16),
            target,
        )


def _decoding() -> Iterable[Target]:
    for live, target in (("200", 1.2), ("3500", 1.3)):
        yield Target(
            f"S3 int4 against (d), {live} live tokens",
            Key("S3", live, LLAMA, Q4_1),
            Key("S3", live, OURS, INT4),
            target,
        )
    for dtype, target in ((BF16, 5.0), (FP32, 3.8)):
        yield Target(
            f"S3 {dtype} against transformers, 200 live tokens",
            Key("S3", "200", TRANSFORMERS, dtype),
            Key("S3", "200", OURS, dtype),
            target,
        )
    for live in ("200", "3500"):
        for dtype, target in ((BF16, 0.7), (INT4, 0.4)):
            yield Target(
                f"decode {dtype}, {live} live tokens: share of a measured memory read",
                Key("S3 bytes", live, MEMORY, ""),
                Key("S3 bytes", live, OURS, dtype),
                target,
            )


def _prefill() -> Iterable[Target]:
    for length in ("200", "1000", "3500"):
        for name, engine, dtype, target in (
            ("(d)", LLAMA, Q4_1, 4.0),
            ("transformers", TRANSFORMERS, BF16, 1.2),
        ):
            yield Target(
                f"S4 bfloat16 against {name}, {length} tokens",
                Key("S4", length, engine, dtype),
                Key("S4", length, OURS, BF16),
                target,
            )


def _growth() -> Iterable[Target]:
    for dtype in (FP32, BF16):
        yield Target(
            f"S5 one fused step {dtype}, N = 16 against N = 1, equal live tokens",
            Key("S5", "one step by N", ours("fused", "N = 16"), dtype),
            Key("S5", "one step by N", ours("fused", "N = 1"), dtype),
            1.1,
            is_limit=True,
        )
        yield Target(
            f"S5 all methods {dtype} against logit_avg alone, N = 5",
            Key("S5", "methods", ours(ALL), dtype),
            Key("S5", "methods", ours("logit_avg"), dtype),
            2.5,
            is_limit=True,
        )


def _start_up() -> Iterable[Target]:
    for cache, target in (("empty", 25.0), ("warm", 6.0)):
        yield Target(
            f"S6 first answer, {cache} compile cache, in seconds (an aim)",
            Key("S6", cache, ours("fused"), BF16),
            None,
            target,
            is_limit=True,
        )


TARGETS: tuple[Target, ...] = (
    *_first_answer(),
    *_data_set(),
    *_decoding(),
    *_prefill(),
    *_growth(),
    *_start_up(),
)


def judge(
    rows: Sequence[Row], scenarios: Iterable[str], targets: Iterable[Target] = TARGETS
) -> list[Outcome]:
    """What became of the targets of these scenarios."""
    wanted = set(scenarios)
    found = {row.key: row for row in rows}
    return [_judge(target, found) for target in targets if target.over.scenario[:2] in wanted]


def _judge(target: Target, rows: dict[Key, Row]) -> Outcome:
    over = rows.get(target.over)
    under = rows.get(target.under) if target.under else None
    if over is None or (target.under is not None and under is None):
        return Outcome(target.name, None, target.target, None)
    value = over.median if under is None else ratio(over, under)
    met = value <= target.target if target.is_limit else value >= target.target
    return Outcome(target.name, value, target.target, met)
