"""Rotary position embedding: frequencies from the config, rotation by position.

Heads are split in halves, as in hub checkpoints: dimension i turns together with i + D/2.
"""

import math

import torch
from torch import Tensor

from minifuse.config import ModelConfig


def make_inv_freq(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of dimensions, f32[D/2].

    `rope_type: llama3` divides slow frequencies by `factor`, keeps fast ones, and blends between
    (Llama 3.1's own scheme, section 3.4.2 of arXiv:2407.21783).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    # Turns that a frequency makes over the original context tell slow from fast.
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return inv_freq * blend + inv_freq / scaling.factor * (1 - blend)


def make_cos_sin(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    inv_freq:  f32[D/2]
    positions: int[...]
    returns:   two of f32[..., D/2]; float32 because bfloat16 rounds positions above 256
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
