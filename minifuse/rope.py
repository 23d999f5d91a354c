"""Rotary position embedding: frequencies from the config, rotation by position.

Heads are split in halves, as in hub checkpoints: dimension i turns together with i + D/2.
"""

import math

import torch
from torch import Tensor

from minifuse.config import DynamicScaling, LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def make_inv_freq(config: ModelConfig, rope_length: int | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, f32[D/2].

    rope_length: `config.rope_length` of the request; dynamic scaling alone asks for it
    """
    dim, scaling = config.head_dim, config.rope_scaling
    theta = config.rope_theta
    if isinstance(scaling, DynamicScaling) and rope_length is not None:
        # As transformers does: the base grows so that the slowest pair is interpolated.
        stretch = rope_length / scaling.original_max_position_embeddings
        theta *= (scaling.factor * stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if isinstance(scaling, LinearScaling):
        return inv_freq / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = _yarn_kept(config, scaling)
    elif isinstance(scaling, Llama3Scaling):
        # Turns that a frequency makes over the original context tell slow from fast
        # (section 3.4.2 of arXiv:2407.21783).
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        return inv_freq
    return inv_freq * kept + inv_freq / scaling.factor * (1 - kept)


def _yarn_kept(config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """The share of each pair's frequency that YaRN keeps, f32[D/2]: 1 fast, 0 slow, a ramp between.

    The ramp runs over the index of the pair (section 3.2 of arXiv:2309.00071; bounds and the step
    in place of an empty ramp as in transformers).
    """
    dim, original = config.head_dim, scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        """Where the pair would lie that makes so many turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def make_cos_sin(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    inv_freq:  f32[D/2], or f32[B, T, D/2] where tokens differ, or what broadcasts to it
    positions: int[B, T]
    returns:   two of f32[B, T, D/2]; float32 because bfloat16 rounds positions above 256
    """
    angles = positions[..., None].float() * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by its token's position, halves paired as in hub checkpoints.

    x:        float[B, H, T, D]  queries or keys
    cos, sin: f32[B, T, D/2]     one row per token, by position, not by slot
    returns:  float[B, H, T, D]  same dtype as x; the rotation itself is done in f32
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
