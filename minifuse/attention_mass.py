"""How much of its attention a token gives to each part of its prompt, layer by layer.

The decoder once more, eagerly, for tokens whose keys are in the cache already, with attention's
probabilities in the open. Nothing is written.

Letters as in `model`; P parts.
"""

import torch
from torch import Tensor

from minifuse.cache import KVCache
from minifuse.config import ModelConfig
from minifuse.linear import embed, linear
from minifuse.model import (
    Params,
    make_rotation,
    mlp_block,
    project_heads,
    rms_norm,
    unfold_queries,
)


@torch.inference_mode()
def attention_mass(
    params: Params,
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    cache: KVCache,
    full_bias: Tensor,
    sliding_bias: Tensor,
    slot_parts: Tensor,
    num_parts: int,
) -> Tensor:
    """Probability mass on the keys of each part, the mean over the query heads.

    tokens, positions:       i64[T]
    inv_freq:                f32[T, D/2], or what broadcasts to it
    cache:                   of one row, with the keys and values of all that the tokens see
    full_bias, sliding_bias: f32[T, S], the rule of either kind of layer (`masks.make_dense_bias`)
    slot_parts:              i64[S], the part that each slot belongs to, from 0 to P - 1
    returns: f32[L, T, P]; each row sums to one
    """
    x = embed(tokens[None], params.embed)
    rotation = make_rotation(inv_freq, positions[None], config.group_size)
    eps, masses = config.rms_norm_eps, []
    layers = zip(params.layers, cache.keys, cache.values, strict=True)
    for index, (layer, keys, values) in enumerate(layers):
        normed = rms_norm(x, layer.attn_norm, eps)
        q, _, _ = project_heads(normed, layer, keys, rotation, None, eps)
        bias = sliding_bias if index in config.sliding_layers else full_bias
        scores = (q @ keys.transpose(2, 3)).float() * config.attention_scale
        probs = (scores + bias.repeat_interleave(config.group_size, dim=0)).softmax(-1)
        attended = unfold_queries(probs.to(values.dtype) @ values, len(tokens)).to(x.dtype)
        x = x + linear(attended, layer.wo, layer.bo)
        x = x + mlp_block(rms_norm(x, layer.mlp_norm, eps), layer)
        # Folded queries lie token by token, so that a token's heads are K times G rows.
        by_token = probs.view(1, probs.shape[1], len(tokens), -1, probs.shape[-1]).mean((0, 1, 3))
        nothing = by_token.new_zeros(len(tokens), num_parts)
        masses.append(nothing.index_add(1, slot_parts, by_token))
    return torch.stack(masses)
