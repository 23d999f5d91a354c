"""The decoder, in the order a token travels: embedding, layers, final norm, head.

Pure functions of (params, tokens, positions, slots, cache, mask tensors). Prefill and decode are
the same function at different T, and nothing here knows what a paraphrase is: who sees whom is
said by a bias on every score (see `AttentionMask`; `masks` makes them of labels and two tables).

Letters: B rows, T tokens in this call, S cache slots, H query heads, K key/value heads, G = H/K,
D head size, C hidden size, F MLP size, V vocabulary, Q and J blocks of queries and keys.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from minifuse.cache import KVCache, allocate_cache, write_cache
from minifuse.config import ModelConfig
from minifuse.linear import PackedWeight, Weight, embed, linear
from minifuse.rope import apply_rope, make_cos_sin, make_inv_freq

KV_BLOCK = 128
# Triton's kernels take queries in blocks of a multiple of this; fewer go to its decode kernel.
TRITON_ROWS = 128


# The weights of a layer that may be quantized.
WEIGHT_FIELDS = ("wqkv", "wo", "w_gate_up", "w_down")


class LayerParams(NamedTuple):
    """One layer. Linear weights keep the hub's [out, in] order; absent parts are None."""

    attn_norm: Tensor  # float[C]
    wqkv: Weight  # [(H+2K)*D, C]
    wo: Weight  # [C, H*D]
    mlp_norm: Tensor  # float[C]
    w_gate_up: Weight  # [2F, C]
    w_down: Weight  # [C, F]
    bqkv: Tensor | None = None  # float[(H+2K)*D]
    bo: Tensor | None = None  # float[C]
    q_norm: Tensor | None = None  # float[D]
    k_norm: Tensor | None = None  # float[D]
    b_gate_up: Tensor | None = None  # float[2F]
    b_down: Tensor | None = None  # float[C]


class Params(NamedTuple):
    """All weights. `lm_head` is `embed` itself where the config ties them.

    `final_norm` tells the activations' dtype and device; a quantized weight has others.
    """

    embed: Weight  # [V, C]
    layers: Sequence[LayerParams]  # a tuple, but for what `checkpoint.open_params` reads
    final_norm: Tensor  # float[C]
    lm_head: Weight  # [V, C]


class BlockLists(NamedTuple):
    """The key blocks that a block of queries has to visit.

    Full blocks are spared a mask. None needs one, for hidden pairs have a bias of -inf, so the
    device decides which list all of them are in (see `masks.make_mask`).
    """

    num_partial: Tensor  # i32[B, 1, Q]
    partial: Tensor  # i32[B, 1, Q, J]
    num_full: Tensor | None  # i32[B, 1, Q]
    full: Tensor | None  # i32[B, 1, Q, J]


class AttentionMask(NamedTuple):
    """What is added to every score, and the blocks that are worth a visit.

    A hidden pair's bias is -inf. It is worked out once per call and read by all layers; values in
    it never recompile a graph.
    """

    bias: Tensor  # f32[B, T, S]
    blocks: BlockLists


class LayerMasks(NamedTuple):
    """What layers that see everything, and those with a sliding window, need; None for neither."""

    full: AttentionMask | None
    sliding: AttentionMask | None


class Rotation(NamedTuple):
    """The new tokens' RoPE angles, for keys and for folded queries; the same in every layer."""

    cos: Tensor  # f32[B, T, D/2]
    sin: Tensor  # f32[B, T, D/2]
    query_cos: Tensor  # f32[B, T * G, D/2]
    query_sin: Tensor  # f32[B, T * G, D/2]


def make_rotation(inv_freq: Tensor, positions: Tensor, group_size: int) -> Rotation:
    """Angles of i64[B, T] positions; a token's G folded queries share its angle.

    inv_freq: f32[B, T, D/2], or what broadcasts to it
    """
    cos, sin = make_cos_sin(inv_freq, positions)
    folded = (angles.repeat_interleave(group_size, dim=1) for angles in (cos, sin))
    return Rotation(cos, sin, *folded)


def lookup(table: Tensor, *indices: Tensor) -> Tensor:
    """table[indices], inside a mask_mod or score_mod.

    Written as the operator: the subscript becomes an autograd function there, which
    `nested_compile_region` cannot functionalise (torch 2.13).
    """
    found: Tensor = torch.ops.aten.index.Tensor(table, list(indices))
    return found


def query_block_tokens(num_tokens: int, wanted: int, group_size: int, device: torch.device) -> int:
    """Tokens, a divisor of `num_tokens`, whose folded queries make up a block.

    On the CPU as many as wanted; on CUDA the fewest that Triton's kernels can take, or all.
    """
    if device.type == "cpu":
        return wanted
    least = TRITON_ROWS // math.gcd(TRITON_ROWS, group_size)
    return least if num_tokens % least == 0 else num_tokens


def query_block_rows(num_tokens: int, num_blocks: int, group_size: int, device_type: str) -> int:
    """Folded queries in each of the blocks that some tokens make up.

    A single block is filled up to a multiple of 128 on CUDA; of several, the rows of all but the
    first would be those of other tokens.
    """
    rows = num_tokens // num_blocks * group_size
    if device_type == "cpu":
        return rows
    padded = -(-rows // TRITON_ROWS) * TRITON_ROWS
    assert num_blocks == 1 or rows == padded, f"blocks of {rows} queries, not of {padded}"
    return padded


def kernel_options(q_BKTD: Tensor) -> FlexKernelOptions | None:
    """What the kernel is to run with, where its own default is a wrong one.

    Torch (2.13) means Triton's decode kernel to have three stages on Hopper and Blackwell, but an
    `else` behind it takes them back. It makes an exception of wide heads in float32.
    """
    _, _, rows, head_dim = q_BKTD.shape
    if q_BKTD.device.type != "cuda" or rows >= TRITON_ROWS:
        return None
    is_wide = head_dim > 128 and q_BKTD.dtype == torch.float32
    if is_wide or torch.cuda.get_device_properties(q_BKTD.device).major not in (9, 10):
        return None
    return {"num_stages": 3, "num_warps": 2}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in f32 as the hub's models do."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def fold_queries(q_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """Fold the G query heads of a key/value head into the query length.

    Each key is then read once for all of them, and the mask does not depend on the folded index:
    folded query t * G + g belongs to token t.

    float[B, T, H, D] -> float[B, K, T * G, D]
    """
    B, T, H, D = q_BTHD.shape
    grouped = q_BTHD.view(B, T, num_kv_heads, H // num_kv_heads, D)
    return grouped.transpose(1, 2).reshape(B, num_kv_heads, -1, D)


def unfold_queries(out_BKTD: Tensor, num_tokens: int) -> Tensor:
    """Undo `fold_queries` and join the heads: float[B, K, T * G, D] -> float[B, T, H * D]."""
    B, K, _, D = out_BKTD.shape
    grouped = out_BKTD.view(B, K, num_tokens, -1, D)
    return grouped.transpose(1, 2).reshape(B, num_tokens, -1)


def attend(
    q_BKTD: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, scale: float
) -> Tensor:
    """Attention of folded queries over every slot of the cache that they may see.

    q_BKTD:       float[B, K, T * G, D]
    keys, values: float[B, K, S, D]
    returns:      float[B, K, T * G, D]
    """
    bias, blocks = mask
    T = bias.shape[1]
    G = q_BKTD.shape[2] // T
    rows = query_block_rows(T, blocks.num_partial.shape[2], G, keys.device.type)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + lookup(bias, b, q // G, k)

    block_mask = BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=(rows, KV_BLOCK),
        mask_mod=None,
        seq_lengths=(T * G, keys.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(
        q_BKTD,
        keys,
        values,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        kernel_options=kernel_options(q_BKTD),
    )


def attention_block(
    x: Tensor,
    layer: LayerParams,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotation: Rotation,
    mask: AttentionMask,
    live: Tensor | None,
    eps: float,
    scale: float,
) -> Tensor:
    """Project, rotate, write keys and values into the cache (in place), attend, project back.

    Attention runs in the dtype of the cache, which may be wider than x's.
    """
    q, k, v = project_heads(x, layer, keys, rotation, live, eps)
    write_cache(keys, slots, k)
    write_cache(values, slots, v)
    attended = unfold_queries(attend(q, keys, values, mask, scale), x.shape[1]).to(x.dtype)
    return linear(attended, layer.wo, layer.bo, live)


def project_heads(
    x: Tensor,
    layer: LayerParams,
    keys: Tensor,
    rotation: Rotation,
    live: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Folded queries, keys and values of new tokens, rotated, in the cache's dtype.

    keys:    float[B, K, S, D] of the cache, for its shape and dtype alone
    returns: float[B, K, T * G, D], and two of float[B, K, T, D]
    """
    B, T, _ = x.shape
    K, D = keys.shape[1], keys.shape[3]
    qkv = linear(x, layer.wqkv, layer.bqkv, live).view(B, T, -1, D)
    q, k, v = qkv.split((qkv.shape[2] - 2 * K, K, K), dim=2)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = rms_norm(q, layer.q_norm, eps)
        k = rms_norm(k, layer.k_norm, eps)
    q, k, v = (part.to(keys.dtype) for part in (q, k, v))
    # Rotated after the fold: Inductor picks the kernel by the shape that q has in memory, and
    # wants that shape to be the folded one.
    q = apply_rope(fold_queries(q, K), rotation.query_cos, rotation.query_sin)
    return q, apply_rope(k.transpose(1, 2), rotation.cos, rotation.sin), v.transpose(1, 2)


def mlp_block(x: Tensor, layer: LayerParams, live: Tensor | None = None) -> Tensor:
    """Gated SiLU: down(silu(gate(x)) * up(x))."""
    gate, up = linear(x, layer.w_gate_up, layer.b_gate_up, live).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, layer.w_down, layer.b_down, live)


def flatten_layer(layer: LayerParams) -> list[Tensor | None]:
    """A layer's fields; a weight takes two places, the second for the scales of a quantized one."""
    parts: list[Tensor | None] = []
    for name, part in zip(LayerParams._fields, layer, strict=True):
        if isinstance(part, PackedWeight):
            parts += part
        else:
            parts += (part, None) if name in WEIGHT_FIELDS else (part,)
    return parts


def unflatten_layer(parts: Iterator[Any]) -> LayerParams:
    """Undo `flatten_layer`."""

    def take(name: str) -> Any:  # what the field of that name holds
        values = next(parts)
        scales = next(parts) if name in WEIGHT_FIELDS else None
        return values if scales is None else PackedWeight(values, scales)

    return LayerParams(*[take(name) for name in LayerParams._fields])


@torch.compiler.nested_compile_region
def decoder_layer(
    eps: float,
    scale: float,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    bias: Tensor,
    live: Tensor | None,
    *parts: Tensor | None,
) -> Tensor:
    """One layer; a region that the compiler traces once however many layers there are.

    Torch 2.13 traces it anew for every layer unless each argument is a tensor or a constant, so
    `parts` are the fields of Rotation and BlockLists, in this order, and a layer as `flatten_layer`
    lays it out.
    """
    fields: Iterator[Any] = iter(parts)
    rotation = Rotation(*islice(fields, len(Rotation._fields)))
    blocks = BlockLists(*islice(fields, len(BlockLists._fields)))
    layer = unflatten_layer(fields)
    mask = AttentionMask(bias, blocks)
    normed = rms_norm(x, layer.attn_norm, eps)
    x = x + attention_block(normed, layer, keys, values, slots, rotation, mask, live, eps, scale)
    return x + mlp_block(rms_norm(x, layer.mlp_norm, eps), layer, live)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    cache: KVCache,
    masks: LayerMasks,
    live: Tensor | None = None,
) -> Tensor:
    """Run new tokens through all layers; their keys and values are written into `cache`.

    tokens, positions, slots: i64[B, T]
    inv_freq: f32[B, T, D/2], or what broadcasts to it
    live:     i64[] on the CPU, how many of the leading tokens (of a single row) are wanted; None
              for all
    returns:  float[B, T, C], normed hidden states; `unembed` turns those asked for into logits
    """
    x = embed(tokens, params.embed)
    rotation = make_rotation(inv_freq, positions, config.group_size)
    eps, scale = config.rms_norm_eps, config.attention_scale
    layers = zip(params.layers, cache.keys, cache.values, strict=True)
    for index, (layer, keys, values) in enumerate(layers):
        mask = masks.sliding if index in config.sliding_layers else masks.full
        assert mask is not None, "layers of a kind that has no mask"
        parts = flatten_layer(layer)
        x = decoder_layer(
            eps, scale, x, keys, values, slots, mask.bias, live, *rotation, *mask.blocks, *parts
        )
    return rms_norm(x, params.final_norm, eps)


def unembed(params: Params, hidden: Tensor, live: Tensor | None = None) -> Tensor:
    """Logits of hidden states: float[B, T, C] -> f32[B, T, V]; `live` as in `forward`."""
    return linear(hidden, params.lm_head, live=live).float()


@torch.inference_mode()
def forward_plain(config: ModelConfig, params: Params, tokens: Tensor) -> Tensor:
    """Plain causal decoding of whole sequences, eagerly, with a cache of its own: for checks.

    tokens:  i64[B, T]
    returns: f32[B, T, V]
    """
    B, T = tokens.shape
    device = tokens.device
    num_blocks = -(-T // KV_BLOCK)
    cache = allocate_cache(
        config, rows=B, slots=num_blocks * KV_BLOCK, dtype=params.final_norm.dtype, device=device
    )
    places = torch.arange(T, device=device).expand(B, T)
    slots = torch.arange(cache.num_slots, device=device)
    distance = places[..., None] - slots
    count = torch.zeros(B, 1, 1, dtype=torch.int32, device=device)
    listed = torch.arange(num_blocks, dtype=torch.int32, device=device).expand(B, 1, 1, -1)
    blocks = BlockLists(count, listed, count + num_blocks, listed)

    def make_mask(window: int) -> AttentionMask:
        visible = (distance >= 0) & (distance < window)
        return AttentionMask(torch.where(visible, 0.0, -torch.inf), blocks)

    masks = LayerMasks(full=make_mask(T), sliding=make_mask(config.sliding_window or T))
    inv_freq = make_inv_freq(config, config.rope_length(T)).to(device)
    hidden = forward(params, config, tokens, places, places, inv_freq, cache, masks)
    return unembed(params, hidden)
