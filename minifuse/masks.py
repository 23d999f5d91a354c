"""Attention masks from labels and tables: what is added to every score, and the blocks to visit.

The rule, for a query with label q at slot s and a key with label k at slot t:
visible = visibility[q, k] and t <= s; in a layer with a sliding window their positions have to be
near, too. Visible pairs get bias[q, k] on their score. For a prefix, two segments and a view,
labels 1 to 4, one slot each behind the reserved slot 0, that is

    slot     0 1 2 3 4
    pad      1 0 0 0 0
    prefix   0 1 0 0 0
    seg 1    0 1 1 0 0
    seg 2    0 1 0 1 0
    view     0 1 1 1 1

T tokens in this call, S slots, L labels, Q and J blocks of queries and keys.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minifuse.model import KV_BLOCK, AttentionMask, BlockLists

# What a query label sees: key labels, each with the finite bias on those scores.
Rule = Mapping[int, float]


class Tables(NamedTuple):
    """Which label sees which, and what is added to those scores; `write_rules` changes them."""

    visibility: Tensor  # bool[L, L]
    bias: Tensor  # f32[L, L]


class Labels(NamedTuple):
    """Queries and keys as the rule knows them: tensors alone, so that no value recompiles."""

    query_labels: Tensor  # i32[T]
    query_slots: Tensor  # i64[T]
    query_positions: Tensor  # i64[T]
    key_labels: Tensor  # i32[S], 0 where nothing is written
    key_positions: Tensor  # i64[S]


def table_bytes(num_labels: int) -> int:
    """Bytes that `make_tables` takes: one for what is seen, four for its bias."""
    return 5 * num_labels**2


def make_tables(num_labels: int, device: torch.device) -> Tables:
    """Tables in which padding sees itself, and nothing else sees anything."""
    visibility = torch.zeros(num_labels, num_labels, dtype=torch.bool, device=device)
    visibility[0, 0] = True
    bias = torch.zeros(num_labels, num_labels, dtype=torch.float32, device=device)
    return Tables(visibility, bias)


def clear_tables(tables: Tables) -> None:
    """Tables as `make_tables` gives them, in place; the bias of what nobody sees may be any."""
    tables.visibility.zero_()
    tables.visibility[0, 0] = True


def write_rules(tables: Tables, rules: Mapping[int, Rule]) -> None:
    """Say anew what some query labels see; the tables are changed in place."""
    device = tables.bias.device
    entries = [(query, key, bias) for query, rule in rules.items() for key, bias in rule.items()]
    queries, keys, biases = zip(*entries, strict=True)
    index = tuple(torch.tensor(labels, device=device) for labels in (queries, keys))
    tables.visibility[list(rules)] = False
    tables.visibility.index_put_(index, torch.tensor(True, device=device))
    tables.bias.index_put_(index, torch.tensor(biases, dtype=torch.float32, device=device))


def make_dense_bias(labels: Labels, tables: Tables, window: int | None = None) -> Tensor:
    """The rule for every query and key, f32[T, S]: the bias of visible pairs, -inf elsewhere.

    window: how many of the last positions are visible, None for all
    """
    query, key = labels.query_labels[:, None], labels.key_labels
    slots = torch.arange(key.shape[0], device=key.device)
    visible = tables.visibility[query, key] & (slots <= labels.query_slots[:, None])
    if window is not None:
        visible &= labels.query_positions[:, None] - labels.key_positions < window
    return torch.where(visible, tables.bias[query, key], -torch.inf)


def make_mask(
    labels: Labels, tables: Tables, block_tokens: int, window: int | None = None
) -> AttentionMask:
    """The rule as attention takes it, for one row.

    block_tokens: tokens, a divisor of T, whose queries share one row of the block lists: they
                  visit every block that one of them sees
    """
    bias = make_dense_bias(labels, tables, window)
    visible = (bias > -torch.inf).view(-1, block_tokens, bias.shape[1] // KV_BLOCK, KV_BLOCK)
    visited = _list_blocks(visible.any(dim=3).any(dim=1))
    # Triton's decode kernel shares its work out evenly over partial blocks, where there is no list
    # of full ones. The CPU's kernels want both lists, each in memory of its own.
    none = tuple(map(torch.zeros_like, visited))
    lists = (*visited, None, None) if bias.is_cuda else (*none, *visited)
    return AttentionMask(bias[None], BlockLists(*lists))


def _list_blocks(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Counts i32[1, 1, Q] and indices i32[1, 1, Q, J] of the set entries of bool[Q, J].

    Set entries come first, in slot order.
    """
    wanted = wanted[None, None].int()
    # A stable sort of the flags keeps the blocks in slot order.
    indices = torch.argsort(wanted, dim=-1, descending=True, stable=True)
    return wanted.sum(dim=-1, dtype=torch.int32), indices.to(torch.int32)
