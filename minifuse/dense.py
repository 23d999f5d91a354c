"""A second decoder, slow and plain: what `verify` and the tests hold the engine to.

No cache, no labels, no blocks, no kernel: a stream is one whole sequence, run from its start under
a dense mask, in any dtype. What a fused stream sees is written down from the definition, not from
`layout`. Layers are widened one at a time, for all sequences together, so that no second copy of
the model is held.

Letters as in `model`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)
from minifuse.linear import Weight
from minifuse.model import LayerParams, Params


class Passage(NamedTuple):
    """One sequence, and who sees whom in it.

    turns: how far key j is rotated on where query i sees it
    """

    token_ids: Tensor  # i64[T]
    positions: Tensor  # i64[T]
    visible: Tensor  # bool[T, T]
    bias: Tensor  # f64[T, T]
    turns: Tensor  # i64[T, T]


class PassagePart(NamedTuple):
    """Tokens that see each other causally, and before that whole other parts.

    sees: number of another part -> (bias on its keys, how far they are rotated on)
    """

    token_ids: tuple[int, ...]
    first_position: int
    sees: dict[int, tuple[float, int]]


def plain_passage(token_ids: Sequence[int]) -> Passage:
    """A sequence that is nothing special."""
    return lay_out([PassagePart(tuple(token_ids), 0, {})])


def lay_out(parts: Sequence[PassagePart]) -> Passage:
    """Parts, one after the other."""
    token_ids = torch.tensor([i for part in parts for i in part.token_ids])
    positions = torch.tensor(
        [part.first_position + i for part in parts for i in range(len(part.token_ids))]
    )
    T = len(token_ids)
    visible = torch.zeros(T, T, dtype=torch.bool)
    bias = torch.zeros(T, T, dtype=torch.float64)
    turns = torch.zeros(T, T, dtype=torch.long)
    ends = torch.tensor([len(part.token_ids) for part in parts]).cumsum(0).tolist()
    slices = [slice(e - len(p.token_ids), e) for p, e in zip(parts, ends, strict=True)]
    for part, rows in zip(parts, slices, strict=True):
        visible[rows, rows] = torch.ones(T, T, dtype=torch.bool).tril()[rows, rows]
        for other, (amount, turn) in part.sees.items():
            visible[rows, slices[other]] = True
            bias[rows, slices[other]] = amount
            turns[rows, slices[other]] = turn
    return Passage(token_ids, positions, visible, bias, turns)


def fused_passage(
    prefix_ids: tuple[int, ...],
    segment_ids: Sequence[tuple[int, ...]],
    suffix_ids: tuple[int, ...],
    forced_ids: tuple[int, ...],
    biases: Sequence[float],
    *,
    is_aligned: bool,
) -> Passage:
    """Prefix, segments, and last the suffix with the answer so far, as a fused stream sees them.

    biases: one for each segment, -inf hides it
    """
    start, longest = len(prefix_ids), max(map(len, segment_ids))
    seen = {0: (0.0, 0)}
    for number, (ids, bias) in enumerate(zip(segment_ids, biases, strict=True), 1):
        if bias > -math.inf:
            seen[number] = (bias, longest - len(ids) if is_aligned else 0)
    return lay_out(
        [
            PassagePart(prefix_ids, 0, {}),
            *(PassagePart(ids, start, {0: (0.0, 0)}) for ids in segment_ids),
            PassagePart(suffix_ids + forced_ids, start + longest, seen),
        ]
    )


@torch.inference_mode()
def run_passages(
    config: ModelConfig,
    params: Params,
    passages: Sequence[Passage],
    dtype: torch.dtype = torch.float64,
    rope_length: int | None = None,
    attention: list[list[Tensor]] | None = None,
    hidden: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Normed hidden states float[T, C] of each passage.

    params:      floats, no quantized weights; layers are asked for once, in order
    dtype:       of all that is computed
    rope_length: positions that the request reaches, for dynamic RoPE
    attention:   a list to which each layer's probabilities float[H, T, T] go, by passage
    hidden:      the same for each layer's output float[T, C]
    """
    frequencies, factor = rope_by_hand(config, rope_length)
    embed = _as_floats(params.embed)
    states = [embed[p.token_ids.to(embed.device)].to(dtype) for p in passages]
    for index, stored in enumerate(params.layers):
        layer = LayerParams._make(
            None if part is None else _as_floats(part).to(dtype) for part in stored
        )
        window = config.sliding_window if index in config.sliding_layers else None
        done = [
            _run_layer(config, layer, x, passage, window, frequencies, factor)
            for x, passage in zip(states, passages, strict=True)
        ]
        states = [x for x, _ in done]
        if attention is not None:
            attention.append([probs for _, probs in done])
        if hidden is not None:
            hidden.append(states)
    return [_norm(x, params.final_norm.to(dtype), config.rms_norm_eps) for x in states]


def read_logits(params: Params, hidden: Tensor) -> Tensor:
    """Logits float[..., V] of hidden states float[..., C]."""
    return hidden @ _as_floats(params.lm_head).to(hidden.dtype).T


def _as_floats(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "a quantized weight"
    return weight


def _run_layer(
    config: ModelConfig,
    layer: LayerParams,
    x: Tensor,
    passage: Passage,
    window: int | None,
    frequencies: Sequence[float],
    factor: float,
) -> tuple[Tensor, Tensor]:
    """The layer's output float[T, C], and its attention float[H, T, T]."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    T, eps = len(x), config.rms_norm_eps
    _, positions, visible, bias, turns = (part.to(x.device) for part in passage)
    qkv = _linear(_norm(x, layer.attn_norm, eps), layer.wqkv, layer.bqkv).view(T, H + 2 * K, D)
    q, k, v = qkv.split([H, K, K], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = _norm(q, layer.q_norm, eps), _norm(k, layer.k_norm, eps)
    q = factor * _rotate(q, positions, frequencies)
    scores = x.new_zeros(H, T, T)
    for turn in turns.unique().tolist():
        turned = factor * _rotate(k, positions + turn, frequencies)
        turned = turned.repeat_interleave(H // K, dim=1)
        scores = torch.where(turns == turn, torch.einsum("qhd,khd->hqk", q, turned), scores)
    scores = scores / math.sqrt(D) + bias.to(x.dtype)
    if window is not None:
        visible = visible & (positions[:, None] - (positions + turns) < window)
    probs = scores.masked_fill(~visible, -math.inf).softmax(-1)
    heads = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(H // K, dim=1))
    x = x + _linear(heads.reshape(T, H * D), layer.wo, layer.bo)
    gate_up = _linear(_norm(x, layer.mlp_norm, eps), layer.w_gate_up, layer.b_gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return x + _linear(F.silu(gate) * up, layer.w_down, layer.b_down), probs


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    y = x @ _as_floats(weight).T
    return y if bias is None else y + bias


def _rotate(x: Tensor, positions: Tensor, frequencies: Sequence[float]) -> Tensor:
    """RoPE of float[T, H, D], dimension i paired with i + D/2."""
    half = len(frequencies)
    each = torch.tensor(frequencies, dtype=torch.float64, device=x.device)
    angles = positions[:, None, None].double() * each
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_by_hand(config: ModelConfig, rope_length: int | None = None) -> tuple[list[float], float]:
    """Radians per position of each pair, and what rotated heads are multiplied by.

    Pair by pair in plain Python, from the papers' formulas.
    """
    dim, scaling = config.head_dim, config.rope_scaling
    theta, factor = config.rope_theta, 1.0
    if isinstance(scaling, DynamicScaling) and rope_length is not None:
        ratio = max(1.0, rope_length / config.max_position_embeddings)
        theta *= (scaling.factor * ratio - scaling.factor + 1) ** (dim / (dim - 2))
    frequencies = []
    for pair in range(dim // 2):
        plain = theta ** (-2 * pair / dim)
        if isinstance(scaling, LinearScaling):
            kept = 0.0
        elif isinstance(scaling, Llama3Scaling):
            turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
            width = scaling.high_freq_factor - scaling.low_freq_factor
            kept = min(max((turns - scaling.low_freq_factor) / width, 0.0), 1.0)
        elif isinstance(scaling, YarnScaling):
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
        scale = scaling.factor if scaling is not None and kept < 1 else 1.0
        frequencies.append(plain * (kept + (1 - kept) / scale))
    return frequencies, factor
