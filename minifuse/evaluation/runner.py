"""Runs a data set through the engine: all methods from one prefill, items in batches.

Nothing here knows how answers are scored: it writes what the model said, and how likely it finds
the gold answers. `tables` and `summary` make sense of that afterwards.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minifuse.command import check_interrupt
from minifuse.engine import Fuser, Results, Scores
from minifuse.evaluation.confidences import weights_of
from minifuse.evaluation.datasets import Item
from minifuse.evaluation.prompts import PromptBuilder, choose_paraphrases, continuation_of
from minifuse.evaluation.records import RunFolder
from minifuse.methods import SPECS, FusionMethod, Reduction
from minifuse.normalize import normalize_answer
from minifuse.request import Request
from minifuse.results import Generation

SORTED_BATCHES = 16


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
    options: Mapping[str, object]


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
        (draw, batch)
        for draw in range(len(builders))
        for batch in _make_batches(items, plan.counts, draw, folder, batch_size)
    ]
    total = len(items) * len(plan.counts) * len(builders)
    left = sum(len(batch) for _, batch in todo)
    hits: dict[str, list[bool]] = {}
    with tqdm.tqdm(
        total=total, initial=total - left, unit="item", file=sys.stderr, smoothing=0.1
    ) as bar:
        for draw, batch in todo:
            for records in _run_batch(fuser, batch, builders[draw], plan, batch_size):
                folder.append([record | {"draw": draw} for record in records])
                _count_hits(hits, records)
                bar.update()
            bar.set_postfix_str(_describe_hits(hits))
            check_interrupt()


def _make_batches(
    items: Sequence[Item], counts: Sequence[int], draw: int, folder: RunFolder, batch_size: int
) -> list[list[tuple[Item, int]]]:
    """What the folder lacks of a draw, each item with its number of paraphrases.

    The items of a few batches go by their length: those of one batch then need little padding.
    """
    todo = [
        (item, count)
        for count in counts
        for item in items
        if (item.id, count, draw) not in folder.done
    ]
    size = SORTED_BATCHES * batch_size
    near = [
        sorted(todo[start : start + size], key=_length_of) for start in range(0, len(todo), size)
    ]
    ordered = [entry for group in near for entry in group]
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _length_of(entry: tuple[Item, int]) -> int:
    item, count = entry
    return sum(map(len, item.paraphrases[:count]))


def _run_batch(
    fuser: Fuser,
    batch: Sequence[tuple[Item, int]],
    builder: PromptBuilder,
    plan: RunPlan,
    batch_size: int,
) -> Iterator[list[dict]]:
    chosen = [choose_paraphrases(item, count, plan.choice, plan.seed) for item, count in batch]
    texts = [
        [item.paraphrases[i] for i in indices]
        for (item, _), indices in zip(batch, chosen, strict=True)
    ]
    requests = [
        _make_request(builder, item, indices, paraphrases, plan)
        for (item, _), indices, paraphrases in zip(batch, chosen, texts, strict=True)
    ]
    is_chat = bool(plan.options.get("chat"))
    continuations = [
        [continuation_of(answer, chat=is_chat) for answer in item.answers] for item, _ in batch
    ]
    answered = fuser.generate_and_score(
        requests,
        continuations,
        batch_size=batch_size,
        methods=list(plan.methods),
        **plan.options,
    )
    for (item, count), indices, paraphrases, (results, scores) in zip(
        batch, chosen, texts, answered, strict=True
    ):
        common = {
            "id": item.id,
            "n": count,
            "question": item.question,
            "relation": item.relation,
            "paraphrases": paraphrases,
            "paraphrase_indices": list(indices),
            "answers": list(item.answers),
        }
        yield _make_records(common, results, scores, num_rows=len(batch))


def _make_request(
    builder: PromptBuilder,
    item: Item,
    indices: Sequence[int],
    paraphrases: Sequence[str],
    plan: RunPlan,
) -> Request:
    prompt = builder.build(item, paraphrases)
    weights = plan.weights
    if isinstance(weights, Mapping):
        weights = weights_of(weights, item.id, indices, len(item.paraphrases))
    return Request(prompt.segments, prompt.prefix, prompt.suffix, weights, id=item.id)


def _make_records(common: dict, results: Results, scores: Scores, *, num_rows: int) -> list[dict]:
    """One record per answer; `lines` says how many there are, so that a torn item shows."""
    records = []
    for method, value in results.items():
        for generation in value if isinstance(value, list) else [value]:
            own = scores.get(method)
            if own is not None and generation.paraphrase_index is not None:
                own = own[generation.paraphrase_index]
            records.append(common | _describe(generation, own, common["n"], num_rows))
    return [record | {"lines": len(records)} for record in records]


def _describe(
    generation: Generation, scores: Sequence[float] | None, count: int, num_rows: int
) -> dict:
    timings = generation.timings
    return {
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
            "prefill_ms": timings["prefill_ms"] / num_rows,
            "decode_ms": sum(timings["decode_ms"]) / num_rows,
            "steps": len(timings["decode_ms"]),
        },
    }


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
    best = sorted(means, key=means.get, reverse=True)[:3]
    return " ".join(f"{method} {means[method]:.3f}" for method in best)
