"""Whether engines that must agree give the same tokens; where two scores tie, either will do.

The reference is (a) in float32. An answer is compared up to its first difference: behind it, two
engines read different texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.peers.engines import Averaged, MinifuseEngine
from benchmarks.peers.questions import Question
from benchmarks.peers.rows import BATCHED, CACHED, COLD, GENERATE, PROTOTYPE, say
from benchmarks.peers.scenarios import Bench
from benchmarks.peers.targets import BF16, FP32, ours
from minifuse.errors import MinifuseError

# What the project promises for logits in float32.
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """One answer beside the reference.

    same, of:  tokens before the first difference, and tokens compared
    gap:       by how much the reference prefers its own token there; None without a difference
    tolerance: up to which a gap is a near tie; None for engines that need not agree
    """

    engine: str
    dtype: str
    same: int
    of: int
    gap: float | None
    tolerance: float | None

    @property
    def agrees(self) -> bool | None:
        if self.tolerance is None:
            return None
        return self.gap is None or self.gap <= self.tolerance

    def to_json(self) -> dict:
        return {"scenario": "agreement", **asdict(self), "agrees": self.agrees}


def compare(
    engine: str,
    dtype: str,
    token_ids: Sequence[int],
    reference: Averaged,
    tolerance: float | None,
) -> Agreement:
    """Compare an answer with the reference's, token by token."""
    count = len(reference.token_ids)
    assert len(token_ids) == count
    for step, (own, wanted) in enumerate(zip(token_ids, reference.token_ids, strict=True)):
        if own != wanted:
            logits = reference.logits[step]
            gap = float(logits[wanted] - logits[own])
            return Agreement(engine, dtype, step, count, gap, tolerance)
    return Agreement(engine, dtype, count, count, None, tolerance)


def check_agreement(bench: Bench) -> list[Agreement]:
    """Ask all engines the question of S1.

    The averages of logits must agree in float32; in bfloat16 too, but for gaps within the rounding
    that (a) itself shows. `generate` and minifuse's separate answers must agree in float32.
    Quantized weights need not: how far they do is shown.
    """
    say("agreement: the reference, (a) in float32")
    (question,) = bench.questions(1)
    tokens = bench.sizes.new_tokens
    plain = bench.engines.transformers(FP32)
    reference = plain.prototype(question.prompts, tokens)
    found = [
        compare(
            BATCHED,
            FP32,
            plain.batched(question.prompts, tokens).token_ids,
            reference,
            FLOAT32_TOLERANCE,
        )
    ]
    tolerances = {FP32: FLOAT32_TOLERANCE}
    if BF16 in bench.dtypes:
        rounded = bench.engines.transformers(BF16)
        prototype = rounded.prototype(question.prompts, tokens)
        tolerances[BF16] = 2 * _rounding(prototype, reference)
        for name, answer in (
            (PROTOTYPE, prototype),
            (BATCHED, rounded.batched(question.prompts, tokens)),
        ):
            found.append(compare(name, BF16, answer.token_ids, reference, tolerances[BF16]))
    for dtype, engine in bench.minifuse():
        found += _compare_ours(engine, dtype, question, reference, tolerances.get(dtype))
    exact = dict(bench.minifuse()).get(FP32)
    if exact is not None:
        found += _compare_separate(bench, exact, question)
    return found


def raise_disagreements(agreements: Iterable[Agreement]) -> None:
    """raises: MinifuseError that names who should agree and does not."""
    wrong = [
        f"{a.engine} in {a.dtype}, token {a.same + 1} (gap {a.gap:.3g}, allowed {a.tolerance:.3g})"
        for a in agreements
        if a.agrees is False
    ]
    if wrong:
        raise MinifuseError(
            f"engines that must give the same tokens do not: {'; '.join(wrong)}; "
            "wanted equal tokens or near ties, so the times compare different work"
        )


def _rounding(rounded: Averaged, exact: Averaged) -> float:
    """The largest difference of logits, as far as both have read the same tokens."""
    pairs = zip(rounded.token_ids, exact.token_ids, strict=True)
    same = next((i for i, (own, wanted) in enumerate(pairs) if own != wanted), None)
    steps = slice(None if same is None else same + 1)
    return float((rounded.logits[steps] - exact.logits[steps]).abs().max())


def _compare_ours(
    engine: MinifuseEngine,
    dtype: str,
    question: Question,
    reference: Averaged,
    tolerance: float | None,
) -> list[Agreement]:
    engine.fuser.forget_prefixes()
    found = []
    for state in (COLD, CACHED):
        answer = engine.answer(question, "logit_avg", len(reference.token_ids))["logit_avg"]
        name = ours("logit_avg", state)
        found.append(compare(name, dtype, answer, reference, tolerance))
    return found


def _compare_separate(bench: Bench, engine: MinifuseEngine, question: Question) -> list[Agreement]:
    """(c), and minifuse's `per_prompt`, against each prompt's own reference."""
    tokens = bench.sizes.new_tokens
    plain = bench.engines.transformers(FP32)
    references = [plain.batched([prompt], tokens) for prompt in question.prompts]
    found = []
    for name, answers in (
        (GENERATE, plain.separate(question.prompts, tokens)),
        (ours("per_prompt"), engine.answer(question, "per_prompt", tokens)["per_prompt"]),
    ):
        for number, (answer, reference) in enumerate(zip(answers, references, strict=True), 1):
            label = f"{name}, prompt {number}"
            found.append(compare(label, FP32, answer, reference, FLOAT32_TOLERANCE))
    return found
