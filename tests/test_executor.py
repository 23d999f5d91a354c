"""How a pass is cut into calls of compiled sizes."""

import itertools

import pytest

from minifuse.executor import (
    BATCH_PREFILL_SIZES,
    CALL_COST,
    DECODE_SIZES,
    PREFILL_SIZES,
    SINGLE_COST,
    plan_calls,
)


def cost(sizes, rows: int) -> int:
    return sum(SINGLE_COST if size * rows == 1 else CALL_COST + size * rows for size in sizes)


def cheapest(length: int, rows: int, graph_sizes: tuple[int, ...]) -> int:
    """By trying every number of calls of every size."""
    numbers = [range(-(-length // size) + 1) for size in graph_sizes]
    plans = (
        [size for size, n in zip(graph_sizes, counts, strict=True) for _ in range(n)]
        for counts in itertools.product(*numbers)
    )
    return min(cost(plan, rows) for plan in plans if sum(plan) >= length)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("graph_sizes", [DECODE_SIZES, PREFILL_SIZES, BATCH_PREFILL_SIZES])
def test_no_other_plan_is_cheaper(graph_sizes, rows):
    step = max(1, graph_sizes[0] // 3)
    for length in range(0, 2 * graph_sizes[-1] + 1, step):
        plan = plan_calls(length, rows, graph_sizes)
        assert set(plan) <= set(graph_sizes)
        assert sum(plan) >= length
        assert cost(plan, rows) == cheapest(length, rows, graph_sizes), (length, plan)


def test_long_passes_take_the_largest_size():
    assert plan_calls(5000, 1, PREFILL_SIZES) == (512,) * 10
    assert plan_calls(100_000, 8, DECODE_SIZES) == (32,) * 3125


@pytest.mark.parametrize(
    ("length", "plan"), [(1, (1,)), (3, (1, 1, 1)), (4, (8,)), (9, (8, 1)), (25, (32,))]
)
def test_a_row_alone_takes_a_few_tokens_one_by_one(length, plan):
    assert plan_calls(length, 1, DECODE_SIZES) == plan
