"""Every method from its definition: what the engine's answers are held to, token by token.

Nothing of the engine but its weights. Every stream is one whole sequence that `dense` runs from the
start: a plain prompt where it sees one segment, and where it sees several a sequence of parts whose
positions, mask, bias and key turns are written down from sections 1 and 2 of the design.
"""

import math
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from minifuse.config import ModelConfig
from minifuse.dense import (
    Passage,
    PassagePart,
    fused_passage,
    lay_out,
    plain_passage,
    read_logits,
    run_passages,
)
from minifuse.model import Params

if TYPE_CHECKING:
    from minifuse.results import Generation

ENSEMBLES = ("logit_avg", "prob_avg", "prob_max", "weighted_avg", "weighted_prob_avg")
FUSED = ("fused", "fused_weighted", "fused_auto", "fused_plain")
SINGLE = ("origin", "per_prompt", "weighted_max")
METHODS = (*SINGLE, *ENSEMBLES, *FUSED, "concat")  # all but `vote`, which has no streams
WEIGHTED = ("weighted_avg", "weighted_prob_avg", "weighted_max", "fused_weighted", "fused_auto")

Tree = TypeVar("Tree")  # of weights: tensors, tuples of them, named or not, None


def passage_logits(
    config: ModelConfig, params: Params, passage: Passage, rope_length: int | None = None
) -> Tensor:
    """Logits float[T, V], in the dtype of the weights."""
    dtype = params.final_norm.dtype
    (hidden,) = run_passages(config, params, [passage], dtype, rope_length)
    return read_logits(params, hidden)


def as_dtype(params: Tree, dtype: torch.dtype) -> Tree:
    """The same weights in another dtype, float64 for a reference without rounding of its own."""

    def convert(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, Tensor):
            return part.to(dtype)
        if isinstance(part, tuple):
            parts = map(convert, part)
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        raise TypeError(type(part))

    return convert(params)


@dataclass(frozen=True)
class Case:
    """A request as token ids, and all that changes its distributions.

    prefix_ids: with BOS, where there is one
    weights:    one number per segment, or a signal, or None
    """

    prefix_ids: tuple[int, ...]
    segment_ids: tuple[tuple[int, ...], ...]
    suffix_ids: tuple[int, ...]
    weights: tuple[float, ...] | str | None = None
    positions: str = "aligned"
    beta: float = 0.5
    balance: float | None = None

    @property
    def num_segments(self) -> int:
        return len(self.segment_ids)

    def prompt(self, index: int) -> tuple[int, ...]:
        """The plain prompt with one segment."""
        return self.prefix_ids + self.segment_ids[index] + self.suffix_ids


def fused_as_a_passage(
    case: Case, method: str, weights: Sequence[float], forced: tuple[int, ...]
) -> Passage:
    """Prefix, segments, and last the suffix with the answer so far, as a fused method sees them."""
    bodies, opening = list(case.segment_ids), case.suffix_ids
    if method == "fused_plain":
        if not opening:
            bodies[-1], opening = bodies[-1][:-1], bodies[-1][-1:]
        parts = [PassagePart(case.prefix_ids, 0, {})]
        end = len(case.prefix_ids)
        for body in bodies:
            parts.append(PassagePart(body, end, {0: (0.0, 0)}))
            end += len(body)
        seen = dict.fromkeys(range(len(parts)), (0.0, 0))
        return lay_out([*parts, PassagePart(opening + forced, end, seen)])
    if not opening:
        opening = bodies[0][-1:]
        assert all(body[-1:] == opening for body in bodies), "no common last token"
        bodies = [body[:-1] for body in bodies]
    balance = case.balance
    if balance is None:
        balance = 0.5 if method == "fused_auto" else 1.0
    lift = case.num_segments ** (1 - balance)
    biases = [math.log(weight * lift) if weight > 0 else -math.inf for weight in weights]
    is_aligned = case.positions == "aligned"
    return fused_passage(case.prefix_ids, bodies, opening, forced, biases, is_aligned=is_aligned)


class Reference:
    """Distributions of every method on one model; whole sequences, memorised by their ids."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: torch.dtype = torch.float64,
        rope_length: int | None = None,
    ):
        self.config = config
        self.rope_length = rope_length
        self.params = as_dtype(params, dtype)
        self._plain: dict[tuple[int, ...], Tensor] = {}

    def plain(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, V] of a plain sequence."""
        key = tuple(token_ids)
        if key not in self._plain:
            self._plain[key] = self._logits(plain_passage(key))
        return self._plain[key]

    def _logits(self, passage: Passage) -> Tensor:
        return passage_logits(self.config, self.params, passage, self.rope_length)

    def likelihood(self, case: Case, index: int) -> float:
        """Mean log-likelihood of a segment's tokens after its first, given the prefix."""
        start, ids = len(case.prefix_ids), case.segment_ids[index]
        logprobs = self.plain(case.prefix_ids + ids).log_softmax(-1)
        values = [float(logprobs[start + i - 1, ids[i]]) for i in range(1, len(ids))]
        return sum(values) / len(values)

    def confidence(self, case: Case, index: int) -> float:
        """Negative entropy of the next token after a plain prompt."""
        logprobs = self.plain(case.prompt(index))[-1].log_softmax(-1)
        return float((logprobs.exp() * logprobs).sum())

    def weights(self, case: Case, method: str) -> list[float]:
        """The normalised weights that a method uses."""
        count = case.num_segments
        if method not in WEIGHTED:
            return [1 / count] * count
        if isinstance(case.weights, tuple) and method != "fused_auto":
            return [w / sum(case.weights) for w in case.weights]
        if case.weights == "confidence":
            signal = [self.confidence(case, i) for i in range(count)]
        elif min(map(len, case.segment_ids)) < 2:
            return [1 / count] * count
        else:
            signal = [self.likelihood(case, i) for i in range(count)]
        powers = [math.exp(case.beta * (s - max(signal))) for s in signal]
        return [p / sum(powers) for p in powers]

    def logprobs(
        self, case: Case, method: str, forced: Sequence[int], index: int | None = None
    ) -> Tensor:
        """A method's own distribution after each prefix of `forced`: [len(forced) + 1, V].

        index: the segment, for `per_prompt`
        """
        forced = tuple(forced)
        steps = len(forced) + 1
        weights = self.weights(case, method)
        if method in FUSED:
            logits = self._logits(fused_as_a_passage(case, method, weights, forced))
            return logits[-steps:].log_softmax(-1)
        if method == "concat":
            everything = case.prefix_ids + sum(case.segment_ids, ()) + case.suffix_ids
            return self.plain(everything + forced)[-steps:].log_softmax(-1)
        if method == "origin":
            index = 0
        elif method == "weighted_max":
            # Among equal weights the tokens decide, so that the order of segments does not.
            index = max(range(len(weights)), key=lambda i: (weights[i], case.segment_ids[i]))
        if index is not None:
            return self.plain(case.prompt(index) + forced)[-steps:].log_softmax(-1)
        prompts = [case.prompt(i) + forced for i in range(case.num_segments)]
        streams = [self.plain(ids)[-steps:] for ids in prompts]
        probs = [each.softmax(-1) for each in streams]
        if method in ("logit_avg", "weighted_avg"):
            return _weighted_sum(weights, streams).log_softmax(-1)
        if method == "prob_max":
            best = torch.stack(probs).amax(0)
            return (best / best.sum(-1, keepdim=True)).log()
        assert method in ("prob_avg", "weighted_prob_avg"), method
        return _weighted_sum(weights, probs).log()

    def score(
        self, case: Case, method: str, target: Sequence[int], index: int | None = None
    ) -> float:
        """Log-probability of a continuation, teacher-forced."""
        logprobs = self.logprobs(case, method, target[:-1], index)
        return sum(float(logprobs[i, token]) for i, token in enumerate(target))


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    terms = (w * each for w, each in zip(weights, tensors, strict=True))
    return sum(terms, start=torch.zeros_like(tensors[0]))


def vote(answers: "Sequence[Generation]") -> "Generation":
    """The majority's answer; ties by mean log-probability. An empty one has no say among others."""
    groups: dict[str, list[Generation]] = defaultdict(list)
    for answer in answers:
        groups[normalised(answer.text)].append(answer)
    if len(groups) > 1:
        groups.pop("", None)
    best = max(
        groups.values(),
        key=lambda group: (len(group), sum(mean_logprob(a) for a in group) / len(group)),
    )
    return max(best, key=mean_logprob)


def mean_logprob(answer: "Generation") -> float:
    """Mean log-probability per token, -inf for no token."""
    if not answer.logprobs:
        return -math.inf
    return sum(answer.logprobs) / len(answer.logprobs)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
