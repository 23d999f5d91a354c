"""Slow, dense and obviously right: what the engine is compared with.

No cache, no labels, no flex attention, nothing of minifuse but its weights. Every stream is one
whole sequence that is run from the start: a plain prompt where it sees one segment, and where it
sees several a sequence of parts whose positions, mask, bias and key turns are written down here
from sections 1 and 2 of the design.
"""

import math
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ENSEMBLES = ("logit_avg", "prob_avg", "prob_max", "weighted_avg", "weighted_prob_avg")
FUSED = ("fused", "fused_weighted", "fused_auto", "fused_plain")
SINGLE = ("origin", "per_prompt", "weighted_max")
METHODS = (*SINGLE, *ENSEMBLES, *FUSED, "concat")  # all but `vote`, which has no streams
WEIGHTED = ("weighted_avg", "weighted_prob_avg", "weighted_max", "fused_weighted", "fused_auto")


# The model


def dense_hidden(
    config,
    params,
    token_ids: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    mask: Tensor,
    bias: Tensor,
    turns: Tensor | None = None,
    rope_length: int | None = None,
) -> Tensor:
    """Normed hidden states of one sequence, in the dtype of the weights.

    token_ids, positions: i64[T]
    mask:    bool[T, T]   may query i see key j
    bias:    float[T, T]  added to that score
    turns:   i64[T, T]    how far key j is rotated on where query i sees it; None for not at all
    rope_length: positions that the request reaches, for dynamic RoPE
    returns: float[T, C]
    """
    token_ids, positions = torch.as_tensor(token_ids), torch.as_tensor(positions)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    T = len(token_ids)
    turns = torch.zeros(T, T, dtype=torch.long) if turns is None else turns
    frequencies, factor = rope_by_hand(config, rope_length)
    distances = positions[:, None] - (positions + turns)
    x = params.embed[token_ids]
    for index, layer in enumerate(params.layers):
        normed = _norm(x, layer.attn_norm, config.rms_norm_eps)
        qkv = _linear(normed, layer.wqkv, layer.bqkv).view(T, H + 2 * K, D)
        q, k, v = qkv.split([H, K, K], dim=1)
        if layer.q_norm is not None:
            q = _norm(q, layer.q_norm, config.rms_norm_eps)
            k = _norm(k, layer.k_norm, config.rms_norm_eps)
        q = factor * _rotate(q, positions, frequencies)
        scores = torch.zeros(H, T, T, dtype=x.dtype)
        for turn in turns.unique().tolist():
            turned = factor * _rotate(k, positions + turn, frequencies)
            turned = turned.repeat_interleave(H // K, dim=1)
            scores = torch.where(turns == turn, torch.einsum("qhd,khd->hqk", q, turned), scores)
        scores = scores / math.sqrt(D) + bias.to(x.dtype)
        seen = (
            mask & (distances < config.sliding_window) if index in config.sliding_layers else mask
        )
        probs = scores.masked_fill(~seen, -math.inf).softmax(-1)
        heads = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(H // K, dim=1))
        x = x + _linear(heads.reshape(T, H * D), layer.wo, layer.bo)
        normed = _norm(x, layer.mlp_norm, config.rms_norm_eps)
        gate, up = _linear(normed, layer.w_gate_up, layer.b_gate_up).chunk(2, dim=-1)
        x = x + _linear(torch.nn.functional.silu(gate) * up, layer.w_down, layer.b_down)
    return _norm(x, params.final_norm, config.rms_norm_eps)


def dense_forward(
    config,
    params,
    token_ids: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    mask: Tensor,
    bias: Tensor,
    turns: Tensor | None = None,
    rope_length: int | None = None,
) -> Tensor:
    """Logits float[T, V]; arguments as in `dense_hidden`."""
    hidden = dense_hidden(config, params, token_ids, positions, mask, bias, turns, rope_length)
    return hidden @ params.lm_head.T


def plain_hidden(config, params, token_ids: Sequence[int]) -> Tensor:
    """Hidden states float[T, C] of a sequence that is nothing special."""
    return dense_hidden(config, params, token_ids, range(len(token_ids)), *_causal(token_ids))


def plain_forward(
    config, params, token_ids: Sequence[int], rope_length: int | None = None
) -> Tensor:
    """Logits float[T, V] of a sequence that is nothing special."""
    positions = range(len(token_ids))
    mask, bias = _causal(token_ids)
    return dense_forward(config, params, token_ids, positions, mask, bias, None, rope_length)


def as_dtype(params, dtype: torch.dtype):
    """The same weights in another dtype, float64 for a reference without rounding of its own."""
    if isinstance(params, Tensor):
        return params.to(dtype)
    if isinstance(params, tuple):
        parts = [None if part is None else as_dtype(part, dtype) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    raise TypeError(type(params))


def _causal(token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    T = len(token_ids)
    return torch.ones(T, T, dtype=torch.bool).tril(), torch.zeros(T, T)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _rotate(x: Tensor, positions: Tensor, frequencies: Sequence[float]) -> Tensor:
    """RoPE of float[T, H, D], dimension i paired with i + D/2."""
    half = len(frequencies)
    angles = positions[:, None, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_by_hand(config, rope_length: int | None = None) -> tuple[list[float], float]:
    """Radians per position of each pair, and what rotated heads are multiplied by.

    Pair by pair in plain Python, from the papers' formulas.
    """
    dim, scaling = config.head_dim, config.rope_scaling
    kind = type(scaling).__name__
    theta, factor = config.rope_theta, 1.0
    if kind == "DynamicScaling" and rope_length is not None:
        ratio = max(1.0, rope_length / config.max_position_embeddings)
        theta *= (scaling.factor * ratio - scaling.factor + 1) ** (dim / (dim - 2))
    frequencies = []
    for pair in range(dim // 2):
        plain = theta ** (-2 * pair / dim)
        if kind == "LinearScaling":
            kept = 0.0
        elif kind == "Llama3Scaling":
            turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
            width = scaling.high_freq_factor - scaling.low_freq_factor
            kept = min(max((turns - scaling.low_freq_factor) / width, 0.0), 1.0)
        elif kind == "YarnScaling":
            factor = scaling.attention_factor

            def place(turns: float) -> float:
                # Where theta ** (-2 place / dim) makes so many turns over the original context.
                context = scaling.original_max_position_embeddings
                return dim / 2 * math.log(context / (2 * math.pi * turns)) / math.log(theta)

            low, high = place(scaling.beta_fast), place(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            kept = 1 - min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        else:
            kept = 1.0
        scale = scaling.factor if kept < 1 else 1.0
        frequencies.append(plain * (kept + (1 - kept) / scale))
    return frequencies, factor


# The request


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


class Part(NamedTuple):
    """Tokens that see each other causally, and before that whole other parts.

    sees: number of another part -> (bias on its keys, how far they are rotated on)
    """

    token_ids: tuple[int, ...]
    first_position: int
    sees: dict[int, tuple[float, int]]


def lay_out(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Parts, one after the other, as the arguments of `dense_forward`."""
    token_ids = torch.tensor([i for part in parts for i in part.token_ids])
    positions = torch.tensor(
        [part.first_position + i for part in parts for i in range(len(part.token_ids))]
    )
    T = len(token_ids)
    mask = torch.zeros(T, T, dtype=torch.bool)
    bias = torch.zeros(T, T, dtype=torch.float64)
    turns = torch.zeros(T, T, dtype=torch.long)
    ends = torch.tensor([len(part.token_ids) for part in parts]).cumsum(0).tolist()
    slices = [slice(e - len(p.token_ids), e) for p, e in zip(parts, ends, strict=True)]
    for part, rows in zip(parts, slices, strict=True):
        mask[rows, rows] = torch.ones(T, T, dtype=torch.bool).tril()[rows, rows]
        for other, (amount, turn) in part.sees.items():
            mask[rows, slices[other]] = True
            bias[rows, slices[other]] = amount
            turns[rows, slices[other]] = turn
    return token_ids, positions, mask, bias, turns


def fused_parts(
    case: Case, method: str, weights: Sequence[float], forced: tuple[int, ...]
) -> list[Part]:
    """Prefix, segments, and last the suffix with the answer so far, as a fused method sees them."""
    start, count = len(case.prefix_ids), case.num_segments
    bodies, opening = list(case.segment_ids), case.suffix_ids
    if not opening and method == "fused_plain":
        bodies[-1], opening = bodies[-1][:-1], bodies[-1][-1:]
    elif not opening:
        opening = bodies[0][-1:]
        assert all(body[-1:] == opening for body in bodies), "no common last token"
        bodies = [body[:-1] for body in bodies]
    lengths = [len(body) for body in bodies]
    seen = {0: (0.0, 0)}
    if method == "fused_plain":
        starts = [start + sum(lengths[:i]) for i in range(count)]
        view_start = start + sum(lengths)
        seen |= {i + 1: (0.0, 0) for i in range(count)}
    else:
        starts = [start] * count
        view_start = start + max(lengths)
        is_aligned = case.positions == "aligned"
        balance = case.balance
        if balance is None:
            balance = 0.5 if method == "fused_auto" else 1.0
        for i, weight in enumerate(weights):
            turn = max(lengths) - lengths[i] if is_aligned else 0
            if weight > 0:
                seen[i + 1] = (math.log(weight * count ** (1 - balance)), turn)
    segments = [Part(b, s, {0: (0.0, 0)}) for b, s in zip(bodies, starts, strict=True)]
    return [Part(case.prefix_ids, 0, {}), *segments, Part(opening + forced, view_start, seen)]


class Reference:
    """Distributions of every method on one model; whole sequences, memorised by their ids."""

    def __init__(
        self,
        config,
        params,
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
            self._plain[key] = plain_forward(self.config, self.params, key, self.rope_length)
        return self._plain[key]

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
        is_given = case.weights is not None and not isinstance(case.weights, str)
        if is_given and method != "fused_auto":
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
            tables = lay_out(fused_parts(case, method, weights, forced))
            logits = dense_forward(self.config, self.params, *tables, self.rope_length)
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
        logits = [self.plain(ids)[-steps:] for ids in prompts]
        probs = [each.softmax(-1) for each in logits]
        if method in ("logit_avg", "weighted_avg"):
            mean = sum(w * each for w, each in zip(weights, logits, strict=True))
            return mean.log_softmax(-1)
        if method == "prob_max":
            best = torch.stack(probs).amax(0)
            return (best / best.sum(-1, keepdim=True)).log()
        assert method in ("prob_avg", "weighted_prob_avg"), method
        return sum(w * each for w, each in zip(weights, probs, strict=True)).log()

    def score(
        self, case: Case, method: str, target: Sequence[int], index: int | None = None
    ) -> float:
        """Log-probability of a continuation, teacher-forced."""
        logprobs = self.logprobs(case, method, target[:-1], index)
        return sum(float(logprobs[i, token]) for i, token in enumerate(target))


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


def vote(answers: Sequence[Answer]) -> Answer:
    """The majority's answer; ties by mean log-probability. An empty one has no say among others."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[normalised(answer.text)].append(answer)
    if len(groups) > 1:
        groups.pop("", None)
    best = max(
        groups.values(),
        key=lambda group: (len(group), sum(mean_logprob(a) for a in group) / len(group)),
    )
    return max(best, key=mean_logprob)


def mean_logprob(answer) -> float:
    """Mean log-probability per token, -inf for no token."""
    if not answer.logprobs:
        return -math.inf
    return sum(answer.logprobs) / len(answer.logprobs)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


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
