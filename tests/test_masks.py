"""Masks: the drawings of docstring and design, and block lists against the dense rule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minifuse import masks as masks_module
from minifuse.masks import (
    Labels,
    Tables,
    clear_tables,
    make_dense_bias,
    make_mask,
    make_tables,
    write_rules,
)
from minifuse.model import KV_BLOCK, AttentionMask, BlockLists

CPU = torch.device("cpu")
LABELS = 6


def draw(matrix: str) -> Tensor:
    return torch.tensor([[int(c) for c in line.split()] for line in matrix.strip().splitlines()])


def random_rule(seed: int, tokens: int, blocks: int) -> tuple[Labels, Tables, int | None]:
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
        labels = integers(LABELS, count // run + 1)
        return labels.repeat_interleave(run)[:count].int().contiguous()

    query_slots = integers(slots, tokens)
    if choose(True, True, False):
        start = integers(max(1, slots - tokens), 1)
        query_slots = (start + torch.arange(tokens)).clamp_max(slots - 1)
    visibility = torch.rand(LABELS, LABELS, generator=g) < choose(0.2, 0.5, 0.9, 1.0)
    visibility[0] = visibility[:, 0] = False
    visibility[0, 0] = True
    labels = Labels(
        labels_in_runs(tokens, choose(1, 7, 100)),
        query_slots,
        # Positions near the slots, and not equal to them.
        query_slots - integers(60, tokens),
        labels_in_runs(slots, choose(20, 128, 300)),
        torch.arange(slots) - integers(60, slots),
    )
    tables = Tables(visibility, torch.randn(LABELS, LABELS, generator=g))
    return labels, tables, choose(None, choose(1, 50, 200, 1000))


def naive_bias(labels: Labels, tables: Tables, window: int | None) -> Tensor:
    """The rule, entry by entry."""
    T, S = len(labels.query_labels), len(labels.key_labels)
    dense = torch.full((T, S), -torch.inf)
    for t in range(T):
        for s in range(S):
            pair = int(labels.query_labels[t]), int(labels.key_labels[s])
            may_see = bool(tables.visibility[pair]) and s <= int(labels.query_slots[t])
            if window is not None:
                near = int(labels.query_positions[t]) - window < int(labels.key_positions[s])
                may_see = may_see and near
            if may_see:
                dense[t, s] = tables.bias[pair]
    return dense


def is_seen(labels: Labels, tables: Tables, window: int | None = None) -> Tensor:
    return make_dense_bias(labels, tables, window) > -torch.inf


def small_labels(query_labels: Tensor, query_slots: Tensor, key_labels: Tensor) -> Labels:
    here, there = (torch.zeros(len(part), dtype=torch.long) for part in (query_labels, key_labels))
    return Labels(query_labels, query_slots, here, key_labels, there)


def listed_blocks(lists: BlockLists, query_block: int) -> list[int]:
    """In the one list that the device has them in."""
    on_cuda = lists.full is None
    counts, indices = lists[:2] if on_cuda else lists[2:]
    return indices[0, 0, query_block, : int(counts[0, 0, query_block])].tolist()


def assert_stands_for(mask: AttentionMask, dense: Tensor, tokens: int) -> None:
    """Block lists name every block with a visible pair, once, in order."""
    T, S = dense.shape
    lists = mask.blocks
    on_cuda = lists.full is None
    assert on_cuda or not lists.num_partial.any()
    for counts, indices in (lists[:2],) if on_cuda else (lists[:2], lists[2:]):
        assert counts.shape == (1, 1, T // tokens)
        assert indices.shape == (1, 1, T // tokens, S // KV_BLOCK)
        assert counts.dtype == indices.dtype == torch.int32
        # Indices beyond the counts are read by some kernels: they have to be blocks, too.
        assert ((indices >= 0) & (indices < S // KV_BLOCK)).all()
    for i in range(T // tokens):
        block = dense[i * tokens : (i + 1) * tokens].view(tokens, -1, KV_BLOCK)
        sums = block.sum(dim=(0, 2)).tolist()
        assert listed_blocks(lists, i) == [j for j, n in enumerate(sums) if n > 0]


def test_the_drawing_of_the_module():
    lines = [line for line in masks_module.__doc__.splitlines() if line.startswith("    ")]
    wanted = draw("\n".join(line[11:] for line in lines[1:]))
    assert wanted.shape == (5, 5)
    tables = make_tables(8, CPU)
    rules = {
        1: {1: 0.0},
        2: {1: 0.0, 2: 0.0},
        3: {1: 0.0, 3: 0.0},
        4: dict.fromkeys((1, 2, 3, 4), 0.0),
    }
    write_rules(tables, rules)
    labels = torch.arange(5, dtype=torch.int32)
    found = is_seen(small_labels(labels, torch.arange(5), labels), tables)
    assert torch.equal(found.int(), wanted.int())


def test_causality_comes_on_top_of_the_table():
    tables = make_tables(2, CPU)
    write_rules(tables, {1: {1: 0.0}})
    labels = torch.ones(4, dtype=torch.int32)
    wanted = draw("1 0 0 0\n1 1 0 0\n1 1 1 0\n1 1 1 1").bool()
    assert torch.equal(is_seen(small_labels(labels, torch.arange(4), labels), tables), wanted)


def test_tables_by_hand():
    tables = make_tables(4, CPU)
    write_rules(tables, {1: {1: 0.0}, 2: {1: -0.5, 2: 0.0}})
    assert tables.visibility.dtype == torch.bool
    assert torch.equal(tables.visibility, draw("1 0 0 0\n0 1 0 0\n0 1 1 0\n0 0 0 0").bool())
    assert tables.bias.dtype == torch.float32
    assert tables.bias[2, 1] == -0.5
    assert tables.bias.count_nonzero() == 1


def test_a_label_that_is_used_again_sees_nothing_of_its_former_rule():
    tables = make_tables(4, CPU)
    write_rules(tables, {1: {1: 0.0}, 2: {1: -0.5, 2: 0.0}})
    write_rules(tables, {2: {2: 0.0, 3: 0.25}})
    assert torch.equal(tables.visibility, draw("1 0 0 0\n0 1 0 0\n0 0 1 1\n0 0 0 0").bool())
    assert tables.bias[2, 3] == 0.25


def test_cleared_tables_are_new_ones():
    tables = make_tables(3, CPU)
    write_rules(tables, {0: {1: 0.0}, 1: {0: 0.0}, 2: {1: -0.5, 2: 0.0}})
    clear_tables(tables)
    assert torch.equal(tables.visibility, make_tables(3, CPU).visibility)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_bias_is_float32_whatever_a_program_has_set(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        tables = make_tables(3, CPU)
        write_rules(tables, {1: {1: 0.1}, 2: {1: 1 / 3}})
    finally:
        torch.set_default_dtype(before)
    assert tables.bias.dtype == torch.float32
    assert tables.bias[2, 1] == torch.tensor(1 / 3)


def test_tables_have_the_size_asked_for(device):
    visibility, bias = make_tables(256, device)
    assert visibility.shape == bias.shape == (256, 256)
    assert visibility.device.type == bias.device.type == device.type


def test_tables_and_biases_lie_on_the_device_asked_for():
    """Shown without a second device: a tensor on `meta` has a size and no numbers."""
    meta = torch.device("meta")
    tables = make_tables(2, meta)
    assert {table.device.type for table in tables} == {"meta"}
    labels = Labels(*(torch.zeros(size, dtype=torch.long, device=meta) for size in (2, 2, 2, 4, 4)))
    dense = make_dense_bias(labels, tables)
    assert (dense.shape, dense.device.type) == ((2, 4), "meta")


@pytest.mark.parametrize("seed", range(8))
def test_dense_bias_equals_the_rule(seed):
    rule = random_rule(seed, tokens=9, blocks=1)
    assert torch.equal(make_dense_bias(*rule), naive_bias(*rule))


@pytest.mark.parametrize(
    ("tokens", "block"), [(1, 1), (8, 1), (8, 8), (32, 4), (32, 32), (128, 32), (512, 32)]
)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 6))
def test_lists_stand_for_the_dense_mask(tokens, block, seed, blocks):
    labels, tables, window = random_rule(seed, tokens, blocks)
    mask = make_mask(labels, tables, block, window)
    assert_stands_for(mask, is_seen(labels, tables, window), block)
    assert torch.equal(mask.bias[0], make_dense_bias(labels, tables, window))


def test_compiled_lists_equal_eager_ones():
    """One graph for every rule of a size and window: what differs else lies in tensors."""
    make = torch.compile(make_mask, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    rules = [random_rule(seed, tokens=128, blocks=4) for seed in range(8)]
    for labels, tables, window in rules:
        mask = make(labels, tables, 32, window)
        assert_stands_for(mask, is_seen(labels, tables, window), 32)
        assert torch.equal(mask.bias[0], make_dense_bias(labels, tables, window))
    windows = {window for _, _, window in rules}
    assert 1 < len(windows) < 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(windows)


def test_random_cases_have_blocks_of_every_kind():
    """Else the tests above would show little."""
    full = partial = skipped = 0
    for seed in range(160):
        labels, tables, window = random_rule(seed, tokens=8, blocks=4)
        counts = is_seen(labels, tables, window).view(8, 4, KV_BLOCK).sum(dim=(0, 2))
        full += int((counts == 8 * KV_BLOCK).sum())
        skipped += int((counts == 0).sum())
        partial += int(((counts > 0) & (counts < 8 * KV_BLOCK)).sum())
    assert min(full, partial, skipped) > 10


def test_blocks_that_nobody_sees_are_skipped():
    """Three blocks: the first is another segment's, the second seen whole, the third in part."""
    key_labels = torch.tensor([2, 1, 1]).repeat_interleave(KV_BLOCK).int()
    tables = make_tables(4, CPU)
    write_rules(tables, {1: {1: 0.0}, 2: {2: 0.0}})
    slots = torch.tensor([2 * KV_BLOCK + 5])
    labels = small_labels(torch.ones(1, dtype=torch.int32), slots, key_labels)
    assert listed_blocks(make_mask(labels, tables, 1).blocks, 0) == [1, 2]


def test_a_window_cuts_by_position_and_not_by_slot():
    """Two segments at the same positions, one after the other in slots: both are as near.

    A window of 3 at position 4 sees positions 2, 3 and 4: the last two tokens of each segment.
    """
    key_positions = F.pad(torch.tensor([0, 1, 2, 3, 1, 2, 3, 4]), (0, KV_BLOCK - 8))
    labels = Labels(
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([7]),
        torch.tensor([4]),
        torch.zeros(KV_BLOCK, dtype=torch.int32),
        key_positions,
    )
    seen = is_seen(labels, make_tables(1, CPU), 3)
    assert seen[0, :8].tolist() == draw("0 0 1 1 0 1 1 1").bool()[0].tolist()


def test_lists_on_each_device(device):
    """On CUDA all blocks are partial, elsewhere all are full."""
    labels, tables, window = random_rule(1, tokens=8, blocks=4)
    dense = is_seen(labels, tables, window)
    labels = Labels(*(part.to(device) for part in labels))
    tables = Tables(*(part.to(device) for part in tables))
    mask = make_mask(labels, tables, 8, window)
    assert (mask.blocks.full is None) == (device.type == "cuda")
    assert_stands_for(mask, dense, 8)


def test_padding_sees_slot_0_alone():
    """Label 0 sees label 0, yet later empty slots lie behind slot 0 and stay unseen."""
    labels = torch.zeros(3, dtype=torch.int32)
    key_labels = torch.zeros(KV_BLOCK, dtype=torch.int32)
    dense = is_seen(small_labels(labels, torch.zeros(3).long(), key_labels), make_tables(2, CPU))
    assert dense[:, 0].all()
    assert dense.sum() == 3
