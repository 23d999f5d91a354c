"""The answers of requests in flight: started behind their views, extended token by token, told.

Nothing here runs the model: logits come from the engine, and go to every method that reads the
answer they belong to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minifuse.layout import Part
from minifuse.loader import LoadedModel
from minifuse.methods import SPECS, FusionMethod, SegmentWeights, Weighting
from minifuse.request import AnswerState, Job, NotFiniteError
from minifuse.results import Generation, StreamEvent, TextBuilder, pick_winner
from minifuse.sampling import make_generator, pick_token, reduce_logits

Results = dict[str, Generation | list[Generation]]
# By the number of segments that were asked with.
CountedResults = dict[int, Results]


def start_answers(job: Job, model: LoadedModel) -> None:
    """Give every answer of a job its streams, behind views that have been run."""
    config, device = job.plan.generation, model.params.final_norm.device
    for answer in job.answers:
        views = tuple(map(job.view, answer.views))
        generator, weights = None, None
        if config.temperature > 0:
            identity = (job.prompt, str(answer.method), answer.index)
            generator = make_generator(config.seed, *identity, device=device)
        if answer.weights is not None:
            # Once per answer: on a GPU every upload of a step would cost a wait.
            weights = torch.tensor(answer.weights, dtype=torch.float32, device=device)
        job.states[answer] = AnswerState(
            answer=answer,
            views=views,
            lines=job.start_lines(views),
            builder=TextBuilder(
                model.tokenizer.stream(), config.stop, model.eos_token_ids, config.max_new_tokens
            ),
            generator=generator,
            weights=weights,
        )


def extend_answers(
    answers: Sequence[tuple[int, Job, AnswerState, list[Tensor]]],
) -> dict[int, list[StreamEvent]]:
    """Pick each answer's next token, and tell every method that reads it.

    answers: a job's index, the job, one of its answers, and its streams' logits f32[V]
    returns: by the job's index
    raises:  NotFiniteError
    """
    picked, scores = [], []
    for _, job, state, logits in answers:
        logprobs = reduce_logits(torch.stack(logits), state.answer.reduction, state.weights)
        picked.append(pick_token(logprobs, job.plan.generation, state.generator))
        scores.append(logprobs.gather(0, picked[-1]))
    # All at once: whoever reads from a GPU waits for everything that it was asked before.
    numbers = torch.stack([torch.cat(picked).double(), torch.cat(scores).double()], dim=1).tolist()
    events: dict[int, list[StreamEvent]] = {}
    for (index, job, state, _), (token_id, logprob) in zip(answers, numbers, strict=True):
        events.setdefault(index, []).extend(_push(job, state, int(token_id), logprob))
    return events


def _push(job: Job, state: AnswerState, token_id: int, logprob: float) -> list[StreamEvent]:
    answer, builder = state.answer, state.builder
    if not -torch.inf < logprob < torch.inf:
        raise NotFiniteError(answer.method, job.prompt)
    text = builder.push(token_id, logprob)
    return [
        StreamEvent(
            method=str(method),
            paraphrase_index=answer.index if method is FusionMethod.PER_PROMPT else None,
            token_id=token_id,
            text=text,
            logprob=logprob,
            finish_reason=builder.finish_reason,
        )
        for (_, method), answers in job.consumers.items()
        if method is not FusionMethod.VOTE and answer in answers
    ]


def vote_events(results: CountedResults) -> list[StreamEvent]:
    """Votes are known at the end alone."""
    votes = [found.get(FusionMethod.VOTE) for found in results.values()]
    return [
        StreamEvent(vote.method, None, None, vote.text, None, vote.finish_reason)
        for vote in votes
        if isinstance(vote, Generation)  # one for all, not a list
    ]


def make_results(
    job: Job, model: LoadedModel, timings: dict[str, object], recompiles: int
) -> CountedResults:
    """What every method of a job came to, all of its answers being done."""
    results: CountedResults = {count: {} for count in job.counts}
    for (count, method), answers in job.consumers.items():
        weights = job.weights[count]
        states = [job.states[answer] for answer in answers]
        if method is FusionMethod.VOTE:
            states = [states[pick_winner([state.builder for state in states])]]
        made = [_generation(job, model, method, weights, s, timings, recompiles) for s in states]
        is_list = method is FusionMethod.PER_PROMPT
        results[count][str(method)] = made if is_list else made[0]
    return results


def _generation(
    job: Job,
    model: LoadedModel,
    method: FusionMethod,
    weights: SegmentWeights,
    state: AnswerState,
    timings: dict[str, object],
    recompiles: int,
) -> Generation:
    weighting = SPECS[method].weighting
    layout = state.layout()
    assert state.builder.finish_reason is not None, "not done"
    return Generation(
        method=str(method),
        paraphrase_index=state.answer.index if method is FusionMethod.PER_PROMPT else None,
        text=state.builder.text,
        token_ids=tuple(state.builder.token_ids),
        logprobs=tuple(state.builder.logprobs),
        finish_reason=state.builder.finish_reason,
        prompt_tokens=sum(len(e.token_ids) for e in layout if e.part is not Part.ANSWER),
        weights=None if weighting is Weighting.UNIFORM else weights.of(weighting),
        weights_source=weights.source_of(weighting),
        model=model.name,
        source=model.source,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=model.config.quantize,
        positions=job.plan.fusion.positions,
        seed=job.plan.generation.seed,
        layout=layout,
        timings=timings,
        recompiles=recompiles,
        attribution=state.attribution,
    )
