"""Runs a data set through the engine: all methods from one prefill, several items in flight.

Nothing here knows how answers are scored: it writes what the model said, and how likely it finds
the gold answers. `tables` and `summary` make sense of that afterwards.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minifuse.answers import Results
from minifuse.command import check_interrupt
from minifuse.engine import Fuser
from minifuse.evaluation.confidences import weights_of
from minifuse.evaluation.datasets import Item
from minifuse.evaluation.prompts import PromptBuilder, choose_paraphrases, continuation_of
from minifuse.evaluation.records import RunFolder
from minifuse.methods import SPECS, FusionMethod, Reduction
from minifuse.normalize import normalize_answer
from minifuse.request import Request
from minifuse.results import Generation
from minifuse.scoring import Scores


@dataclass(frozen=True)
class RunPlan:
    """What is asked of every item.

    counts:  numbers of paraphrases, N
    choice:  how paraphrases are chosen, see `choose_paraphrases`
    weights: of each item's paraphrases by its id; or the signal to find them by, or None
    options: keyword arguments of `Fuser.generate_and_score`
    """

    methods: tuple[str, ...]
    counts: tuple[int, ...]
    choice: str
    seed: int
    weights: Mapping[str, tuple[float, ...]] | str | None
    options: Mapping[str, Any]


def run_items(
    fuser: Fuser,
    items: Sequence[Item],
    builders: Sequence[PromptBuilder],
    plan: RunPlan,
    folder: RunFolder,
    *,
    batch_size: int,
) -> None:
    """Answer and score every item that the folder lacks; each is written as soon as it is there.

    builders: one for every draw of shots. A draw's items stay together, so that its prefix is
              computed once
    raises: UsageError where an item has too few paraphrases, or a prompt does not fit;
            MinifuseError where the folder cannot be written
    """
    import tqdm

    todo = [
        (draw, asks)
        for draw, builder in enumerate(builders)
        for asks in _group_asks(items, builder, plan, draw, folder)
    ]
    total = len(items) * len(plan.counts) * len(builders)
    left = sum(len(ask.counts) for _, asks in todo for ask in asks)
    hits: dict[str, list[bool]] = {}
    with tqdm.tqdm(
        total=total, initial=total - left, unit="item", file=sys.stderr, smoothing=0.1
    ) as bar:
        for draw, asks in todo:
            for records in _run_asks(fuser, asks, plan, batch_size):
                folder.append([record | {"draw": draw} for record in records])
                _count_hits(hits, records)
                bar.set_postfix_str(_describe_hits(hits), refresh=False)
                bar.update()
                check_interrupt()


@dataclass(frozen=True)
class _Ask:
    """An item, to be asked with several numbers of its paraphrases at once.

    counts:  what is missing of the plan's
    indices: of the paraphrases, as many as the largest count
    """

    item: Item
    counts: tuple[int, ...]
    indices: tuple[int, ...]
    request: Request

    @property
    def paraphrases(self) -> list[str]:
        return [self.item.paraphrases[i] for i in self.indices]


def _group_asks(
    items: Sequence[Item],
    builder: PromptBuilder,
    plan: RunPlan,
    draw: int,
    folder: RunFolder,
) -> Iterable[list[_Ask]]:
    """What the folder lacks of a draw, by the numbers of paraphrases that are asked with."""
    groups: dict[tuple[int, ...], list[_Ask]] = {}
    for item in items:
        missing = [n for n in plan.counts if (item.id, n, draw) not in folder.done]
        for ask in _ask_for(item, missing, builder, plan):
            groups.setdefault(ask.counts, []).append(ask)
    return groups.values()


def _ask_for(
    item: Item, counts: Sequence[int], builder: PromptBuilder, plan: RunPlan
) -> list[_Ask]:
    """One for all counts where the prompts with fewer paraphrases begin those with more."""
    asks = [_make_ask(item, count, builder, plan) for count in counts]
    if len(asks) < 2:
        return asks
    longest = max(asks, key=lambda ask: len(ask.indices))
    whole = longest.request
    is_nested = all(
        replace(whole, segments=whole.segments[: len(ask.indices)], weights=None)
        == replace(ask.request, weights=None)
        for ask in asks
    )
    return [replace(longest, counts=tuple(counts))] if is_nested else asks


def _make_ask(item: Item, count: int, builder: PromptBuilder, plan: RunPlan) -> _Ask:
    indices = choose_paraphrases(item, count, plan.choice, plan.seed)
    prompt = builder.build(item, [item.paraphrases[i] for i in indices])
    weights: tuple[float, ...] | str | None
    if isinstance(plan.weights, Mapping):
        weights = weights_of(plan.weights, item.id, indices, len(item.paraphrases))
    else:
        weights = plan.weights
    request = Request(list(prompt.segments), prompt.prefix, prompt.suffix, weights, id=item.id)
    return _Ask(item, (count,), indices, request)


def _run_asks(
    fuser: Fuser, asks: Sequence[_Ask], plan: RunPlan, batch_size: int
) -> Iterator[list[dict]]:
    """The records of each item and count, in the order in which items are done."""
    is_chat = bool(plan.options.get("chat"))
    continuations = [
        [continuation_of(answer, chat=is_chat) for answer in ask.item.answers] for ask in asks
    ]
    counts = asks[0].counts
    answered = fuser.generate_and_score(
        [ask.request for ask in asks],
        continuations,
        batch_size=batch_size,
        counts=counts if len(counts) > 1 else None,
        methods=list(plan.methods),
        **plan.options,
    )
    for index, by_count in answered:
        ask = asks[index]
        pairs = zip(counts, by_count.values(), strict=True)
        for count, (results, scores) in pairs:
            common = {
                "id": ask.item.id,
                "n": count,
                "question": ask.item.question,
                "relation": ask.item.relation,
                "paraphrases": ask.paraphrases[:count],
                "paraphrase_indices": list(ask.indices[:count]),
                "answers": list(ask.item.answers),
            }
            yield _make_records(common, results, scores, shares=len(counts))


def _make_records(common: dict, results: Results, scores: Scores, *, shares: int) -> list[dict]:
    """One record per answer; `lines` says how many there are, so that a torn item shows.

    shares: how many counts an item's time is divided by
    """
    records = []
    for method, value in results.items():
        for generation in value if isinstance(value, list) else [value]:
            own: Any = scores.get(method)
            if own is not None and generation.paraphrase_index is not None:
                own = own[generation.paraphrase_index]
            records.append(common | _describe(generation, own, common["n"], shares))
    return [record | {"lines": len(records)} for record in records]


def _describe(
    generation: Generation, scores: Sequence[float] | None, count: int, shares: int
) -> dict:
    timings, attribution = generation.timings, generation.attribution
    described = {
        "method": generation.method,
        "paraphrase_index": generation.paraphrase_index,
        "positions": generation.positions,
        "text": generation.text,
        "prediction": predict(generation.text),
        "token_ids": list(generation.token_ids),
        "logprobs": list(generation.logprobs),
        "finish_reason": generation.finish_reason,
        "answer_logprobs": None if scores is None else list(scores),
        "answer_logprob": None if scores is None else max(scores),
        "weights": None if generation.weights is None else list(generation.weights),
        "weights_source": generation.weights_source,
        "prompt_tokens": generation.prompt_tokens,
        "num_streams": count_streams(generation.method, count),
        "timings": {
            "prefill_ms": timings["prefill_ms"] / shares,
            "decode_ms": sum(timings["decode_ms"]) / shares,
            "steps": len(timings["decode_ms"]),
        },
    }
    return described | ({} if attribution is None else {"attribution": attribution.to_json()})


def predict(text: str) -> str:
    """The answer in a generation: its first line that is not empty, without white space around."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def count_streams(method: str, count: int) -> int:
    """Streams that a method needs by itself for one answer from `count` paraphrases."""
    spec = SPECS[FusionMethod(method)]
    is_ensemble = spec.reduction is not Reduction.NONE or method == FusionMethod.VOTE
    return count if is_ensemble else 1


def _count_hits(hits: dict[str, list[bool]], records: Sequence[dict]) -> None:
    for record in records:
        if record["paraphrase_index"] is None:
            wanted = {normalize_answer(answer) for answer in record["answers"]}
            is_hit = normalize_answer(record["prediction"]) in wanted - {""}
            hits.setdefault(record["method"], []).append(is_hit)


def _describe_hits(hits: Mapping[str, Sequence[bool]]) -> str:
    """Running exact-match accuracy of the best three methods."""
    means = {method: sum(values) / len(values) for method, values in hits.items()}
    best = sorted(means, key=means.__getitem__, reverse=True)[:3]
    return " ".join(f"{method} {means[method]:.3f}" for method in best)
