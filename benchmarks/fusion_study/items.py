"""Which items are scored, in which half, with which shots."""

import hashlib

from minifuse.errors import UsageError
from minifuse.evaluation.datasets import Dataset, Item
from minifuse.evaluation.prompts import choose_draws, choose_items


def half_of(item_id: str) -> str:
    """Which half of a data set an item belongs to, whatever else is in it."""
    return "confirm" if hashlib.sha256(item_id.encode()).digest()[-1] % 2 else "tune"


def choose_work(
    dataset: Dataset, *, shots: int, draws: int, seed: int, limit: int | None, half: str | None
) -> tuple[list[Item], list[list[Item]]]:
    """The items to score, and the shots of each draw, which are no items of any draw.

    limit: items before the choice of a half, so that both halves of a limit make the limit
    """
    drawn, left_out = choose_draws(dataset, shots, seed, draws)
    items = [item for item in dataset.items if item.id not in left_out]
    if limit is not None and limit < len(items):
        items = choose_items(items, limit, seed)
    if half is not None:
        items = [item for item in items if half_of(item.id) == half]
    if not items:
        raise UsageError(f"{dataset.name} leaves no item to score")
    return items, drawn
