"""Block lists from labels and tables, and the dense mask that they stand for.

The rule, for a query with label q at slot s and a key with label k at slot t:
visible = visibility[q, k] and t <= s; in a layer with a sliding window their positions have to be
near, too (`model.is_visible`, which every mask here asks). For a prefix, two segments and a view,
labels 1 to 4, one slot each behind the reserved slot 0, that is

    slot     0 1 2 3 4
    pad      1 0 0 0 0
    prefix   0 1 0 0 0
    seg 1    0 1 1 0 0
    seg 2    0 1 0 1 0
    view     0 1 1 1 1
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from minifuse.model import (
    KV_BLOCK,
    AttentionMask,
    AttentionRule,
    BlockLists,
    is_visible,
    query_block_rows,
    query_block_tokens,
)


def make_tables(
    sees: Sequence[dict[int, dict[int, float]]], num_labels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Dense tables of each row's rules; labels without a rule see nothing.

    sees:    per row, for every query label the key labels that it sees, with a finite bias
    returns: visibility bool[B, L, L], bias f32[B, L, L]
    """
    entries = [
        (row, query, key, bias)
        for row, rules in enumerate(sees)
        for query, keys in rules.items()
        for key, bias in keys.items()
    ]
    rows, queries, keys, biases = zip(*entries, strict=True)
    shape = (len(sees), num_labels, num_labels)
    index = tuple(torch.tensor(labels) for labels in (rows, queries, keys))
    visibility = torch.zeros(shape, dtype=torch.bool).index_put_(index, torch.tensor(True))
    bias = torch.zeros(shape).index_put_(index, torch.tensor(biases, dtype=torch.float32))
    return visibility.to(device), bias.to(device)


def make_dense_mask(rule: AttentionRule) -> Tensor:
    """The rule for every query and key, bool[B, T, S]."""
    (B, T), S = rule.query_labels.shape, rule.key_labels.shape[1]
    rows, tokens, slots = (torch.arange(n, device=rule.bias.device) for n in (B, T, S))
    return is_visible(rule, rows[:, None, None], tokens[:, None], slots)


def make_decode_mask(rule: AttentionRule) -> AttentionMask:
    """Block lists by reducing the dense mask: cheapest for the few queries of a decode step."""
    B, T = rule.query_labels.shape
    tokens = query_block_tokens(T, rule.query_labels.device.type)
    dense = make_dense_mask(rule)
    blocks = dense.view(B, T // tokens, tokens, -1, KV_BLOCK)
    visited = blocks.any(dim=4).any(dim=2)
    full = blocks.all(dim=4).all(dim=2)
    if dense.is_cuda:
        # Triton's decode kernel splits its work over the partial blocks alone.
        full = torch.zeros_like(full)
    partial = visited & ~full
    return AttentionMask(rule, BlockLists(*_list_blocks(partial), *_list_blocks(full)))


def _list_blocks(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of the set entries, set ones first: bool[B, Q, J] -> i32[B, 1, Q, ...]."""
    wanted = wanted[:, None].int()
    # A stable sort of the flags keeps the blocks in slot order.
    indices = torch.argsort(wanted, dim=-1, descending=True, stable=True)
    return wanted.sum(dim=-1, dtype=torch.int32), indices.to(torch.int32)


def make_prefill_mask(rule: AttentionRule, group_size: int) -> AttentionMask:
    """Block lists by `create_block_mask`, for queries folded as in `model.attend`."""
    B, T = rule.query_labels.shape

    def mask_mod(b, h, q, k):
        return is_visible(rule, b, q // group_size, k)

    device = rule.query_labels.device
    block_mask = create_block_mask(
        mask_mod,
        B,
        None,
        T * group_size,
        rule.key_labels.shape[1],
        device=device,
        BLOCK_SIZE=(query_block_rows(T, group_size, device.type), KV_BLOCK),
    )
    return AttentionMask(
        rule,
        BlockLists(
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
        ),
    )
