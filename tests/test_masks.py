"""Masks: the drawings of docstring and design, and block lists against the dense rule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minifuse import masks as masks_module
from minifuse.masks import make_decode_mask, make_dense_mask, make_prefill_mask, make_tables
from minifuse.model import KV_BLOCK, AttentionMask, AttentionRule, query_block_tokens

CPU = torch.device("cpu")
LABELS = 6


def draw(matrix: str) -> Tensor:
    return torch.tensor([[int(c) for c in line.split()] for line in matrix.strip().splitlines()])


def random_rule(seed: int, tokens: int, blocks: int, rows: int = 2) -> AttentionRule:
    """Labels, slots and tables, half of them with a window.

    Labels come in runs and queries mostly in consecutive slots, so that some blocks are full, some
    empty, and some neither.
    """
    g = torch.Generator().manual_seed(seed)
    slots = blocks * KV_BLOCK

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    def choose(*options):
        return options[int(integers(len(options), 1))]

    def labels_in_runs(count: int, run: int) -> Tensor:
        labels = integers(LABELS, rows, count // run + 1)
        return labels.repeat_interleave(run, dim=1)[:, :count].int().contiguous()

    query_slots = integers(slots, rows, tokens)
    if choose(True, True, False):
        start = integers(max(1, slots - tokens), rows, 1)
        query_slots = (start + torch.arange(tokens)).clamp_max(slots - 1)
    visibility = torch.rand(rows, LABELS, LABELS, generator=g) < choose(0.2, 0.5, 0.9, 1.0)
    visibility[:, 0] = visibility[:, :, 0] = False
    visibility[:, 0, 0] = True
    rule = AttentionRule(
        labels_in_runs(tokens, choose(1, 7, 100)),
        query_slots,
        labels_in_runs(slots, choose(20, 128, 300)),
        visibility,
        torch.randn(rows, LABELS, LABELS, generator=g),
    )
    if choose(True, False):
        # Positions near the slots, and not equal to them.
        return rule._replace(
            query_positions=query_slots - integers(60, rows, tokens),
            key_positions=torch.arange(slots) - integers(60, rows, slots),
            window=choose(1, 50, 200, 1000),
        )
    return rule


def naive_mask(rule: AttentionRule) -> Tensor:
    """The rule, entry by entry."""
    B, T = rule.query_labels.shape
    S = rule.key_labels.shape[1]
    dense = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            for s in range(S):
                may_see = bool(
                    rule.visibility[b, rule.query_labels[b, t], rule.key_labels[b, s]]
                ) and s <= int(rule.query_slots[b, t])
                if rule.window is not None:
                    position, other = rule.query_positions[b, t], rule.key_positions[b, s]
                    may_see &= int(position) - rule.window < int(other)
                dense[b, t, s] = may_see
    return dense


def small_rule(query_labels, query_slots, key_labels, visibility) -> AttentionRule:
    return AttentionRule(
        query_labels, query_slots, key_labels, visibility, torch.zeros(visibility.shape)
    )


def listed_blocks(count: Tensor, indices: Tensor, row: int, query_block: int) -> list[int]:
    return indices[row, 0, query_block, : int(count[row, 0, query_block])].tolist()


def assert_stands_for(mask: AttentionMask, dense: Tensor) -> None:
    """Block lists name every block with a visible pair, once; full ones have nothing hidden."""
    B, T, S = dense.shape
    tokens = query_block_tokens(T)
    lists = mask.blocks
    assert lists.num_partial.shape == lists.num_full.shape == (B, 1, T // tokens)
    assert lists.partial.shape == lists.full.shape == (B, 1, T // tokens, S // KV_BLOCK)
    assert {part.dtype for part in lists} == {torch.int32}
    for b in range(B):
        for i in range(T // tokens):
            partial = listed_blocks(lists.num_partial, lists.partial, b, i)
            full = listed_blocks(lists.num_full, lists.full, b, i)
            block = dense[b, i * tokens : (i + 1) * tokens].view(tokens, -1, KV_BLOCK)
            sums = block.sum(dim=(0, 2)).tolist()
            assert sorted(full) == [j for j, n in enumerate(sums) if n == tokens * KV_BLOCK]
            assert sorted(partial) == [j for j, n in enumerate(sums) if 0 < n < tokens * KV_BLOCK]
    # Indices beyond the counts are read by some kernels: they have to be blocks, too.
    for indices in (lists.partial, lists.full):
        assert ((indices >= 0) & (indices < S // KV_BLOCK)).all()


def test_the_drawing_of_the_module():
    lines = [line for line in masks_module.__doc__.splitlines() if line.startswith("    ")]
    wanted = draw("\n".join(line[11:] for line in lines[1:]))
    assert wanted.shape == (5, 5)
    sees = {
        0: {0: 0.0},
        1: {1: 0.0},
        2: {1: 0.0, 2: 0.0},
        3: {1: 0.0, 3: 0.0},
        4: dict.fromkeys((1, 2, 3, 4), 0.0),
    }
    visibility, _ = make_tables([sees], 8, CPU)
    labels = torch.arange(5, dtype=torch.int32)[None]
    assert torch.equal(
        make_dense_mask(small_rule(labels, labels, labels, visibility))[0].int(), wanted.int()
    )


def test_causality_comes_on_top_of_the_table():
    visibility, _ = make_tables([{1: {1: 0.0}}], 2, CPU)
    labels = torch.ones(1, 4, dtype=torch.int32)
    slots = torch.arange(4)[None]
    wanted = draw("1 0 0 0\n1 1 0 0\n1 1 1 0\n1 1 1 1").bool()
    assert torch.equal(make_dense_mask(small_rule(labels, slots, labels, visibility))[0], wanted)


def test_tables_by_hand():
    visibility, bias = make_tables(
        [{0: {0: 0.0}, 1: {1: 0.0}, 2: {1: -0.5, 2: 0.0}}, {0: {0: 0.0}}], 4, CPU
    )
    wanted = torch.stack(
        [
            draw("1 0 0 0\n0 1 0 0\n0 1 1 0\n0 0 0 0"),
            draw("1 0 0 0\n0 0 0 0\n0 0 0 0\n0 0 0 0"),
        ]
    )
    assert visibility.dtype == torch.bool
    assert torch.equal(visibility, wanted.bool())
    assert bias.dtype == torch.float32
    assert bias[0, 2, 1] == -0.5
    assert bias.count_nonzero() == 1


def test_tables_have_the_size_asked_for(device):
    visibility, bias = make_tables([{0: {0: 0.0}}] * 3, 256, device)
    assert visibility.shape == bias.shape == (3, 256, 256)
    assert visibility.device.type == bias.device.type == device.type


@pytest.mark.parametrize("seed", range(8))
def test_dense_mask_equals_the_rule(seed):
    rule = random_rule(seed, tokens=9, blocks=1)
    assert torch.equal(make_dense_mask(rule), naive_mask(rule))


@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 512])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 6))
def test_decode_lists_stand_for_the_dense_mask(tokens, seed, blocks):
    rule = random_rule(seed, tokens, blocks)
    mask = make_decode_mask(rule)
    assert_stands_for(mask, make_dense_mask(rule))
    assert mask.rule is rule


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 512])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 4))
def test_prefill_lists_stand_for_the_dense_mask(tokens, group_size, seed, blocks):
    rule = random_rule(seed, tokens, blocks)
    mask = make_prefill_mask(rule, group_size)
    assert_stands_for(mask, make_dense_mask(rule))
    assert mask.rule is rule


def test_compiled_prefill_lists_equal_eager_ones():
    """One graph for every rule of a size and window: what differs else lies in tensors."""
    make = torch.compile(make_prefill_mask, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    rules = [random_rule(seed, tokens=128, blocks=4) for seed in range(8)]
    for rule in rules:
        assert_stands_for(make(rule, 3), make_dense_mask(rule))
    windows = {rule.window for rule in rules}
    assert 1 < len(windows) < 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(windows)


def test_compiled_decode_lists_equal_eager_ones():
    make = torch.compile(make_decode_mask, fullgraph=True, dynamic=False)
    for seed in range(8):
        rule = random_rule(seed, tokens=8, blocks=4)
        assert_stands_for(make(rule), make_dense_mask(rule))


def test_random_cases_have_blocks_of_every_kind():
    """Else the tests above would show little."""
    full = partial = skipped = 0
    for seed in range(40):
        lists = make_decode_mask(random_rule(seed, tokens=8, blocks=4)).blocks
        listed = lists.num_full + lists.num_partial
        full += int(lists.num_full.sum())
        partial += int(lists.num_partial.sum())
        skipped += int((4 - listed).sum())
    assert min(full, partial, skipped) > 10


def test_blocks_that_nobody_sees_are_skipped():
    """Three blocks: the first is another segment's, the second seen whole, the third in part."""
    key_labels = torch.tensor([2, 1, 1]).repeat_interleave(KV_BLOCK)[None].int()
    visibility, bias = make_tables([{1: {1: 0.0}, 2: {2: 0.0}}], 4, CPU)
    labels = torch.ones(1, 1, dtype=torch.int32)
    slots = torch.tensor([[2 * KV_BLOCK + 5]])
    rule = AttentionRule(labels, slots, key_labels, visibility, bias)
    for mask in (make_decode_mask(rule), make_prefill_mask(rule, 2)):
        lists = mask.blocks
        assert listed_blocks(lists.num_full, lists.full, 0, 0) == [1]
        assert listed_blocks(lists.num_partial, lists.partial, 0, 0) == [2]


def test_a_window_cuts_by_position_and_not_by_slot():
    """Two segments at the same positions, one after the other in slots: both are as near.

    A window of 3 at position 4 sees positions 2, 3 and 4: the last two tokens of each segment.
    """
    key_positions = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4]])
    key_positions = F.pad(key_positions, (0, KV_BLOCK - 8))
    visibility, bias = make_tables([{0: {0: 0.0}}], 1, CPU)
    labels = torch.zeros(1, 1, dtype=torch.int32)
    slots = torch.tensor([[7]])
    key_labels = torch.zeros(1, KV_BLOCK, dtype=torch.int32)
    rule = AttentionRule(labels, slots, key_labels, visibility, bias)
    windowed = rule._replace(
        query_positions=torch.tensor([[4]]), key_positions=key_positions, window=3
    )
    assert (
        make_dense_mask(windowed)[0, 0, :8].tolist() == draw("0 0 1 1 0 1 1 1").bool()[0].tolist()
    )


def test_decode_lists_on_each_device(device):
    """Triton's decode kernel shares its work out over partial blocks: on CUDA all are partial."""
    rule = random_rule(1, tokens=8, blocks=4)
    rule = AttentionRule(*(part.to(device) if isinstance(part, Tensor) else part for part in rule))
    mask = make_decode_mask(rule)
    dense = make_dense_mask(rule).cpu()
    if device.type == "cpu":
        return assert_stands_for(mask, dense)
    lists = mask.blocks
    assert not lists.num_full.any()
    visible = dense.view(2, 8, -1, KV_BLOCK).any(dim=3).any(dim=1)
    for row in range(2):
        listed = listed_blocks(lists.num_partial, lists.partial, row, 0)
        assert listed == visible[row].nonzero().flatten().tolist()
    return None


def test_padding_sees_slot_0_alone():
    """Label 0 sees label 0, yet later empty slots lie behind slot 0 and stay unseen."""
    visibility, _ = make_tables([{0: {0: 0.0}, 1: {1: 0.0}}], 2, CPU)
    labels = torch.zeros(1, 3, dtype=torch.int32)
    key_labels = torch.zeros(1, KV_BLOCK, dtype=torch.int32)
    dense = make_dense_mask(small_rule(labels, labels, key_labels, visibility))
    assert dense[:, :, 0].all()
    assert dense.sum() == 3
