"""How a pass is cut into calls of compiled sizes."""

import itertools

import pytest
import torch

from minifuse.executor import (
    CALL_COST,
    DECODE_BLOCKS,
    PADDING_COST,
    PREFILL_BLOCK,
    PREFILL_SIZES,
    SHARED_DECODE_BLOCKS,
    SINGLE_COST,
    _compile,
    decode_step,
    plan_calls,
)
from minifuse.model import query_block_rows, query_block_tokens


def cost(sizes, length: int) -> float:
    """Calls are filled one after the other."""
    total = 0.0
    for size in sizes:
        live = min(size, length)
        total += SINGLE_COST if size == 1 else CALL_COST + live + PADDING_COST * (size - live)
        length -= live
    return total


def cheapest(length: int, graph_sizes: tuple[int, ...]) -> int:
    """By trying every number of calls of every size."""
    numbers = [range(-(-length // size) + 1) for size in graph_sizes]
    plans = (
        [size for size, n in zip(graph_sizes, counts, strict=True) for _ in range(n)]
        for counts in itertools.product(*numbers)
    )
    return min(cost(plan, length) for plan in plans if sum(plan) >= length)


@pytest.mark.parametrize("graph_sizes", [tuple(DECODE_BLOCKS), PREFILL_SIZES])
def test_no_other_plan_is_cheaper(graph_sizes):
    step = max(1, graph_sizes[0] // 3)
    for length in range(0, 2 * graph_sizes[-1] + 1, step):
        plan = plan_calls(length, graph_sizes)
        assert set(plan) <= set(graph_sizes)
        assert sum(plan) >= length
        assert cost(plan, length) == pytest.approx(cheapest(length, graph_sizes)), (length, plan)


def test_long_passes_take_the_largest_size():
    assert plan_calls(5000, PREFILL_SIZES) == (512,) * 10
    assert plan_calls(100_000, tuple(DECODE_BLOCKS)) == (32,) * 3125


@pytest.mark.parametrize(
    ("length", "plan"), [(1, (1,)), (2, (1, 1)), (3, (8,)), (33, (32, 1)), (36, (32, 8))]
)
def test_a_few_tokens_go_in_few_calls(length, plan):
    assert plan_calls(length, tuple(DECODE_BLOCKS)) == plan


def test_blocks_divide_every_size():
    prefill = dict.fromkeys(PREFILL_SIZES, PREFILL_BLOCK)
    for blocks in (DECODE_BLOCKS, SHARED_DECODE_BLOCKS, prefill):
        assert all(size % block == 0 for size, block in blocks.items())
        assert list(blocks) == sorted(blocks)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_blocks_on_cuda_are_what_triton_takes(group_size):
    """A multiple of 128 folded queries, unless all are in one block; short calls always are."""
    device = torch.device("cuda")
    for tokens in (*DECODE_BLOCKS, *SHARED_DECODE_BLOCKS, *PREFILL_SIZES):
        block = query_block_tokens(tokens, 1, group_size, device)
        assert tokens % block == 0
        rows = query_block_rows(tokens, tokens // block, group_size, "cuda")
        assert rows % 128 == 0
        assert rows == block * group_size or (block == tokens and rows < tokens * group_size + 128)
        assert tokens * group_size >= 128 or block == tokens


def test_blocks_whose_rows_would_be_those_of_others_are_refused():
    assert query_block_rows(128, 4, 3, "cpu") == 96
    assert query_block_rows(32, 1, 3, "cuda") == 128
    with pytest.raises(AssertionError, match="blocks of 96 queries"):
        query_block_rows(128, 4, 3, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_are_ones_that_torch_knows(device):
    """It looks at their names and types at once, and compiles at the first call."""
    assert callable(_compile(decode_step, torch.device(device)))
