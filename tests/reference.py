"""Slow, dense and obviously right: what the engine is compared with.

Distributions are those of minifuse's `definition` and `dense`, a second decoder without cache,
labels and flex attention; here are the answers that come of them, and what is compared.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minifuse.definition import (
    METHODS,
    WEIGHTED,
    Case,
    Reference,
    as_dtype,
    fused_as_a_passage,
    vote,
)
from minifuse.dense import plain_passage, run_passages

__all__ = ["METHODS", "WEIGHTED", "Case", "Reference", "as_dtype", "fused_as_a_passage", "vote"]

# The model


def plain_hidden(config, params, token_ids: Sequence[int]) -> Tensor:
    """Hidden states float[T, C] of a sequence that is nothing special."""
    return run_passages(config, params, [plain_passage(token_ids)], params.final_norm.dtype)[0]


# Answers


@dataclass
class Answer:
    """A greedy answer; `finish_reason` as in minifuse."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


def reference_answers(
    reference: Reference,
    case: Case,
    decode: Callable[[Sequence[int]], str],
    methods: Sequence[str] = (*METHODS, "vote"),
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    stop: Sequence[str] = (),
) -> dict[str, Answer | list[Answer]]:
    """Greedy answers of every method; a list, one for each segment, for `per_prompt`.

    decode: token ids to text
    """

    def answer(method: str, index: int | None = None) -> Answer:
        return greedy(
            lambda forced: reference.logprobs(case, method, forced, index)[-1],
            decode,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            stop=stop,
        )

    answers: dict[str, Answer | list[Answer]] = {}
    for method in methods:
        if method in ("per_prompt", "vote"):
            singles = [answer("per_prompt", i) for i in range(case.num_segments)]
            answers[method] = singles if method == "per_prompt" else vote(singles)
        else:
            answers[method] = answer(method)
    return answers


def greedy(
    next_logprobs: Callable[[list[int]], Tensor],
    decode: Callable[[Sequence[int]], str],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    stop: Sequence[str] = (),
) -> Answer:
    """The most likely token, again and again, until EOS, a stop string, or the length."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    while len(token_ids) < max_new_tokens:
        distribution = next_logprobs(token_ids)
        token = int(distribution.argmax())
        if token in eos_token_ids:
            return Answer(token_ids, logprobs, decode(token_ids), "stop")
        token_ids.append(token)
        logprobs.append(float(distribution[token]))
        text = decode(token_ids)
        places = [text.find(s) for s in stop if s in text]
        if places:
            return Answer(token_ids, logprobs, text[: min(places)], "stop")
    return Answer(token_ids, logprobs, decode(token_ids), "length")


def near_tie(scores: Tensor, token: int, tolerance: float) -> bool:
    """Whether `token` is the best of scores [V], or as good as the best within the tolerance."""
    return float(scores.max() - scores[token]) <= tolerance


def count_near_ties(ours: Sequence[int], logprobs: Tensor, tolerance: float) -> int:
    """Tokens of ours that another computation would not have picked; fails unless each is a tie.

    ours:     n token ids
    logprobs: [>= n, V], the other computation's, with our tokens forced
    """
    ties = 0
    for step, token in enumerate(ours):
        scores = logprobs[step]
        assert near_tie(scores, token, tolerance), (
            f"step {step}: we pick {token} at {float(scores[token]):.6f}, the reference "
            f"{int(scores.argmax())} at {float(scores.max()):.6f}; tolerance {tolerance}"
        )
        ties += token != int(scores.argmax())
    return ties


# Quantized weights


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """What the two tensors of a quantized matrix in a file stand for, f64[out, in], one by one.

    values, scales: i8[out, in] and bf16[out]; or u8[out, in/2] and bf16[out, in/32, 2]
    """
    rows, numbers = values.tolist(), scales.double().tolist()
    if values.dtype == torch.int8:
        matrix = [[v * scale for v in row] for row, scale in zip(rows, numbers, strict=True)]
        return torch.tensor(matrix, dtype=torch.float64)
    matrix = []
    for row, groups in zip(rows, numbers, strict=True):
        weights = []
        for index, (scale, zero) in enumerate(groups):
            group = row[16 * index : 16 * index + 16]
            nibbles = [byte % 16 for byte in group] + [byte // 16 for byte in group]
            weights += [(nibble - 8) * scale + zero for nibble in nibbles]
        matrix.append(weights)
    return torch.tensor(matrix, dtype=torch.float64)
