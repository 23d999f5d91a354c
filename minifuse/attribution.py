"""What each segment did for an answer that is done.

Three answers to that question: how much attention the generated tokens gave to it, what the answer
would be worth had the segment been left out, and what it is worth behind that segment alone. The
latter two are log-probabilities of the answer's own tokens, forced on further streams of one pass.
"""

import torch
from torch import Tensor

from minifuse.executor import Executor, Token
from minifuse.methods import alone_answer, leave_out
from minifuse.pool import Pool
from minifuse.prefill import run_views
from minifuse.request import AnswerState, Job
from minifuse.results import Attribution
from minifuse.scoring import score_targets

# Parts that attention is summed over; the segments follow.
PREFIX, SUFFIX, ANSWER, FIRST_SEGMENT = range(4)


def attribute(executor: Executor, pool: Pool, job: Job) -> None:
    """Fill in the `attribution` of every answer of a job that is done, and still in its place."""
    for state in job.states.values():
        if state.builder.token_ids:
            state.attention = [
                attention_of_stream(executor, pool, job, state, number).cpu()
                for number in range(len(state.lines))
            ]
            shares = _mean_attention(state)
            without, alone = _worth(executor, pool, job, state)
            state.attribution = Attribution(
                prefix=shares[PREFIX],
                segments=tuple(shares[FIRST_SEGMENT:]),
                suffix=shares[SUFFIX],
                answer=shares[ANSWER],
                without=without,
                alone=alone,
            )


def _worth(
    executor: Executor, pool: Pool, job: Job, state: AnswerState
) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
    """Changes of the answer's log-probability without each segment; its log-probability with each
    alone."""
    trial = job.make_trial(state.answer, tuple(state.builder.token_ids))
    run_views(executor, pool, [trial])
    score_targets(executor, pool, [trial])
    pool.forget_keys(job.held, job.packed.num_slots)
    scores = {answer: values[0] for answer, values in trial.scores.items()}
    indices = range(job.num_segments)
    left = [leave_out(state.answer, i) for i in indices]
    whole = scores[state.answer]
    return (
        tuple(None if answer is None else scores[answer] - whole for answer in left),
        tuple(scores[alone_answer(i)] for i in indices),
    )


def _mean_attention(state: AnswerState) -> list[float]:
    """The share of every part: the mean over streams by their weights, layers, heads, tokens."""
    streams = len(state.attention)
    weights = state.answer.weights or (1 / streams,) * streams
    means = torch.stack([attention.mean((0, 1)) for attention in state.attention])
    return (torch.tensor(weights, dtype=means.dtype) @ means).tolist()


def attention_of_stream(
    executor: Executor, pool: Pool, job: Job, state: AnswerState, number: int
) -> Tensor:
    """Attention of the tokens that predicted the answer's, f32[L, n, P], by part."""
    view, line = state.views[number], state.lines[number]
    stream, suffix = line.stream, view.suffix
    token_ids = state.builder.token_ids
    tokens = [
        Token(suffix.token_ids[-1], suffix.positions[-1], suffix.slots[-1], suffix.label),
        *(
            Token(token_id, stream.first_position + i, slot, stream.label)
            for i, (token_id, slot) in enumerate(zip(token_ids[:-1], line.slots, strict=False))
        ),
    ]
    parts = {suffix.label: SUFFIX, stream.label: ANSWER}
    if view.prefix is not None:
        parts[view.prefix.label] = PREFIX
    for span in view.segments:
        assert span.index is not None, "not a segment"
        parts[span.label] = FIRST_SEGMENT + span.index
    return executor.attention_mass(pool, job.held, tokens, parts, FIRST_SEGMENT + job.num_segments)
