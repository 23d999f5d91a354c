"""The prompts of new requests: segments, moved copies of their keys, weights, views.

Each step is one or two calls of the executor for all requests together.
"""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minifuse.executor import Copy, Executor, Token, TokenGroups
from minifuse.layout import Encoding, Span
from minifuse.methods import single_view
from minifuse.pool import Pool
from minifuse.request import Job
from minifuse.stages import stage

# Rows of logits held at once while a segment's likelihood is summed up.
LOGIT_ROWS = 64


def prefill(executor: Executor, pool: Pool, jobs: Sequence[Job]) -> None:
    """Run everything but the prefix; afterwards `view_logits` has every first token's scores."""
    for job in jobs:
        job.packed.prefix()
        job.packed.take_pending()
        job.place_segments()
    spans = [job.packed.take_pending() for job in jobs]
    hidden = _run_segments(executor, pool, jobs, spans)
    _run_moves(executor, pool, jobs)
    for job in jobs:
        job.place_signal_views()
    run_views(executor, pool, jobs)
    for job, states, own in zip(jobs, hidden, spans, strict=True):
        values = None
        if job.needs_signal and job.signal == "likelihood":
            values = _likelihood(executor, job, states, own)
        elif job.needs_signal:
            values = _confidence(job)
        job.set_weights(values)
        job.place_views()
    run_views(executor, pool, jobs)


def write_rules(pool: Pool, jobs: Iterable[Job]) -> None:
    """Bring the pool's tables up to date."""
    pool.write_rules([(job.held, job.packed.sees) for job in jobs])


def tokens_of(spans: Iterable[Span]) -> list[Token]:
    return [
        Token(token_id, position, slot, span.label)
        for span in spans
        for token_id, position, slot in zip(span.token_ids, span.positions, span.slots, strict=True)
    ]


@stage("segments")
def _run_segments(
    executor: Executor, pool: Pool, jobs: Sequence[Job], spans: Sequence[Sequence[Span]]
) -> Sequence[Tensor | None]:
    """Encode segments; per job hidden states float[n, C], None where no token is to be run."""
    tokens = [tokens_of(own) for own in spans]
    if not any(tokens):
        return [None] * len(jobs)
    write_rules(pool, jobs)
    return executor.prefill(pool, _for_each(jobs, tokens))


@stage("moves")
def _run_moves(executor: Executor, pool: Pool, jobs: Sequence[Job]) -> None:
    executor.move(pool, [(job.held, _copies_of(job)) for job in jobs])


def _copies_of(job: Job) -> list[Copy]:
    return [
        Copy(source, target, move.turn, move.target.label)
        for move in job.packed.take_moves()
        for source, target in zip(move.source.slots, move.target.slots, strict=True)
    ]


@stage("views")
def run_views(executor: Executor, pool: Pool, jobs: Sequence[Job]) -> None:
    """Run the pending suffixes; the logits of each one's last token go to `view_logits`."""
    spans = [job.packed.take_pending() for job in jobs]
    if not any(spans):
        return
    write_rules(pool, jobs)
    ends = [
        (group, sum(len(span.token_ids) for span in own[: i + 1]) - 1)
        for group, own in enumerate(spans)
        for i in range(len(own))
    ]
    tokens = [tokens_of(own) for own in spans]
    logits = iter(executor.read(pool, _for_each(jobs, tokens), ends))
    for job, own in zip(jobs, spans, strict=True):
        job.view_logits.update((span, next(logits)) for span in own)


def _for_each(jobs: Sequence[Job], tokens: Sequence[list[Token]]) -> TokenGroups:
    return [(job.held, own) for job, own in zip(jobs, tokens, strict=True)]


def _likelihood(
    executor: Executor, job: Job, hidden: Tensor | None, spans: Sequence[Span]
) -> Tensor | None:
    """Mean log-likelihood of each segment's tokens after its first, f32[N].

    None, with a warning, where a segment has one token only: nothing in it is predicted.

    hidden: float[n, C] of the row's tokens, in the order of `spans`
    """
    if min(map(len, job.prompt.segment_ids)) < 2:
        warnings.warn(
            "a segment of one token has no likelihood; all segments weigh the same",
            stacklevel=2,
        )
        return None
    assert hidden is not None, "no segment was run"
    starts, start = {}, 0
    for span in spans:
        starts[span] = start
        start += len(span.token_ids)
    means = []
    for index, token_ids in enumerate(job.prompt.segment_ids):
        start = starts[job.packed.segment(Encoding.ALONE, index)]
        rows = hidden[start : start + len(token_ids) - 1]
        means.append(_target_logprobs(executor, rows, token_ids[1:]).mean())
    return torch.stack(means)


def _target_logprobs(executor: Executor, hidden: Tensor, targets: Sequence[int]) -> Tensor:
    """Log-probability of one target per row: float[n, C], n ids -> f32[n]."""
    index = torch.tensor(targets, device=hidden.device)[:, None]
    chunks = [
        torch.log_softmax(executor.unembed(rows), -1).gather(1, ids)
        for rows, ids in zip(hidden.split(LOGIT_ROWS), index.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(chunks)[:, 0]


def _confidence(job: Job) -> Tensor:
    """Negative entropy in nats of each plain prompt's next-token distribution, f32[N]."""
    logits = torch.stack(
        [job.view_logits[job.view(single_view(i)).suffix] for i in range(job.num_segments)]
    )
    logprobs = torch.log_softmax(logits, dim=-1)
    return (logprobs.exp() * logprobs).sum(-1)
