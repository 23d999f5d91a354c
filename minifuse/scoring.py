"""Log-probabilities of given continuations, teacher-forced.

Every target behind every view is a stream of its own, behind the same prefill as the answers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from minifuse.executor import Executor, Token, is_short
from minifuse.layout import PackedPrompt, View
from minifuse.methods import Answer, FusionMethod
from minifuse.pool import LABEL_COUNTS, Pool
from minifuse.request import Job, NotFiniteError
from minifuse.sampling import reduce_logits

# A number per continuation; for `per_prompt` such a list for each segment.
Scores = dict[str, list[float] | list[list[float]]]
T = TypeVar("T")


def score_targets(executor: Executor, pool: Pool, jobs: Sequence[Job]) -> None:
    """Fill `scores`: the log-probability of every target under every answer's distribution.

    raises: NotFiniteError
    """
    for job in jobs:
        job.scores = {answer: [] for answer in job.answers}
    for job, answer, target, logprobs in target_logprobs(executor, pool, jobs):
        index = torch.tensor(target, device=logprobs.device)[:, None]
        score = float(logprobs.gather(1, index).sum())
        if math.isnan(score):
            raise NotFiniteError(answer.method, job.prompt)
        job.scores[answer].append(score)


def target_logprobs(
    executor: Executor, pool: Pool, jobs: Sequence[Job]
) -> Iterator[tuple[Job, Answer, tuple[int, ...], Tensor]]:
    """Every answer's distributions f32[n, V] along every target of n tokens, targets in order.

    Every target behind every view is a stream of its own. As many at once as the tables have labels
    for; afterwards slots and labels are as they were before.
    """
    counts = [_targets_at_once(job) for job in jobs]
    passes = max(-(-len(job.targets) // count) for job, count in zip(jobs, counts, strict=True))
    for i in range(passes):
        groups = [
            job.targets[i * count : (i + 1) * count]
            for job, count in zip(jobs, counts, strict=True)
        ]
        yield from _run_groups(executor, pool, jobs, groups)
        for job in jobs:
            pool.forget_keys(job.held, job.packed.num_slots)


def _run_groups(
    executor: Executor,
    pool: Pool,
    jobs: Sequence[Job],
    groups: Sequence[Sequence[tuple[int, ...]]],
) -> Iterator[tuple[Job, Answer, tuple[int, ...], Tensor]]:
    # Copies: the next group, and the answers, start from the same layouts.
    layouts = [job.packed.copy() for job in jobs]
    groups_of_tokens = [
        (job.held, _place_targets(packed, _answer_views(job), targets))
        for packed, job, targets in zip(layouts, jobs, groups, strict=True)
    ]
    outputs: Sequence[Tensor | None] = [None] * len(jobs)
    has_logits = is_short(groups_of_tokens)
    if any(tokens for _, tokens in groups_of_tokens):
        pool.write_rules(
            [(job.held, packed.sees) for job, packed in zip(jobs, layouts, strict=True)]
        )
        run = executor.decode if has_logits else executor.prefill
        outputs = run(pool, groups_of_tokens)
    for job, targets, output in zip(jobs, groups, outputs, strict=True):
        for answer, target, logprobs in _read(executor, job, targets, output, has_logits):
            yield job, answer, target, logprobs


def _read(
    executor: Executor,
    job: Job,
    targets: Sequence[tuple[int, ...]],
    output: Tensor | None,
    has_logits: bool,
) -> Iterator[tuple[Answer, tuple[int, ...], Tensor]]:
    """Distributions of what came of the tokens that `_place_targets` gives, in its order.

    output: logits f32[n, V], or hidden states float[n, C], which become logits one target at
            a time; None where no token was run
    """
    views = _answer_views(job)
    first_logits = torch.stack([job.view_logits[view.suffix] for view in views])
    start = 0
    for target in targets:
        logits = first_logits[:, None]
        if len(target) > 1:
            assert output is not None, "no token was run"
            end = start + len(views) * (len(target) - 1)
            forced = output[start:end] if has_logits else executor.unembed(output[start:end])
            logits = torch.cat((logits, forced.view(len(views), len(target) - 1, -1)), dim=1)
            start = end
        for answer in job.answers:
            own = logits[[views.index(job.view(r)) for r in answer.views]]
            yield answer, target, reduce_logits(own, answer.reduction, answer.weights)


def _answer_views(job: Job) -> list[View]:
    """What answers start from, each view once."""
    return list(dict.fromkeys(job.view(r) for a in job.answers for r in a.views))


def _place_targets(
    packed: PackedPrompt, views: Sequence[View], targets: Sequence[tuple[int, ...]]
) -> list[Token]:
    """Every target behind every view, but for its last token, which predicts nothing."""
    tokens = []
    for target in targets:
        for view in views:
            stream = packed.stream(view)
            forced = target[:-1]
            slots = packed.take_slots(len(forced))
            for offset, (token_id, slot) in enumerate(zip(forced, slots, strict=True)):
                position = stream.first_position + offset
                tokens.append(Token(token_id, position, slot, stream.label))
    return tokens


def _targets_at_once(job: Job) -> int:
    """How many targets are scored in one pass: what labels are left for, without larger tables."""
    base, views = job.extent.labels, job.extent.views
    spare = next((n for n in LABEL_COUNTS if n >= base + views), LABEL_COUNTS[-1]) - base
    return max(1, spare // views)


def scoring_labels(job: Job) -> int:
    """Labels beyond the prompt's that scoring takes."""
    return job.extent.views * min(len(job.targets), _targets_at_once(job)) if job.targets else 0


def scoring_slots(job: Job) -> int:
    """Slots beyond the prompt's that scoring takes; the answers take them again afterwards."""
    if not job.targets:
        return 0
    longest = sorted(map(len, job.targets))[-_targets_at_once(job) :]
    return job.extent.views * sum(longest)


def scores_of(job: Job, count: int) -> Scores:
    """By method, with the first `count` segments."""
    found = by_method(job, count, job.scores)
    return found  # noqa: RET504  # returned at once, mypy would guess T from the return type


def by_method(job: Job, count: int, found: Mapping[Answer, T]) -> dict[str, T | list[T]]:
    """What was found for each answer, by the methods that read it; `vote` has no distribution."""
    return {
        str(method): [found[answer] for answer in answers]
        if method is FusionMethod.PER_PROMPT
        else found[answers[0]]
        for (own, method), answers in job.consumers.items()
        if own == count and method is not FusionMethod.VOTE
    }
