"""The static key/value cache: allocated once, written in place, never grown.

A slot is where a key is stored; the position it was rotated by is kept elsewhere. Slot 0 is
reserved: padding tokens write there. Keys and values of each layer are tensors of their own,
because Inductor copies a storage that two attention inputs share, at every step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minifuse.config import ModelConfig
from minifuse.rope import apply_rope, make_cos_sin


class KVCache(NamedTuple):
    """keys, values: per layer float[B, K, S, D]; `write_cache` and `move_keys` change them."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[2]


def cache_bytes(config: ModelConfig, *, rows: int, slots: int, dtype: torch.dtype) -> int:
    """Bytes that `allocate_cache` takes."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return rows * slots * heads * config.head_dim * dtype.itemsize


def allocate_cache(
    config: ModelConfig, *, rows: int, slots: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """An empty cache; zeros, since a masked slot that held NaN would still spoil the output."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in layers),
        values=tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in layers),
    )


def mark_static(value: object) -> None:
    """Promise CUDA graphs that the tensors in `value` stay where they are; nothing on a CPU.

    A graph copies all other inputs into memory of its own before each run: weights would be read
    twice, and keys written into the copy would be lost. Where a tensor has moved all the same, the
    graph is recorded anew.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            torch._dynamo.mark_static_address(leaf, guard=False)


def write_cache(cache: Tensor, slots: Tensor, new_BKTD: Tensor) -> None:
    """Store one layer's new keys or values; `cache` is changed in place.

    cache:    float[B, K, S, D]
    slots:    i64[B, T]  slot of every new token
    new_BKTD: float[B, K, T, D]
    """
    B, K = cache.shape[:2]
    rows = torch.arange(B, device=cache.device)[:, None, None]
    heads = torch.arange(K, device=cache.device)[None, :, None]
    # Not scatter_: Inductor would copy the whole cache to keep the old value.
    cache.index_put_((rows, heads, slots[:, None]), new_BKTD)


def move_keys(
    cache: KVCache, source: Tensor, target: Tensor, turns: Tensor, inv_freq: Tensor
) -> None:
    """Copy keys and values to other slots, keys rotated on; `cache` is changed in place.

    Rotations add up, so a key at position p rotated on by d equals the key at position p + d:
    a segment moves without being encoded again. Values hold no position.

    source, target: i64[B, M]  slots
    turns:          i64[B, M]  positions to move by
    inv_freq:       f32[B, M, D/2], or what broadcasts to it
    """
    cos, sin = make_cos_sin(inv_freq, turns)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        index = source[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        rotated = apply_rope(keys.gather(2, index), cos, sin)
        write_cache(keys, target, rotated)
        write_cache(values, target, values.gather(2, index))


def read_slots(cache: KVCache, slots: Tensor) -> KVCache:
    """A copy of some slots i64[P]: float[B, K, P, D] per layer."""
    return KVCache(
        keys=tuple(layer[:, :, slots] for layer in cache.keys),
        values=tuple(layer[:, :, slots] for layer in cache.values),
    )


def write_slots(cache: KVCache, slots: Tensor, stored: KVCache) -> None:
    """Put what `read_slots` gave into some slots i64[P]; `cache` is changed in place."""
    for old, new in zip(cache.keys + cache.values, stored.keys + stored.values, strict=True):
        old[:, :, slots] = new
