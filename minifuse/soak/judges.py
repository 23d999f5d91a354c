"""What a soak's answers are held to, and what is noted of them.

- On tiny models the definition (`definition`, in float64), token by token under the answer's own
  tokens (`Definition`);
- on any other model each request alone (`Alone`).

A token has to be the one that the other computation picks from the same noise, or as good as that
one within the rounding of both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minifuse.answers import Results
from minifuse.checks import ROUNDINGS, Bench, flat
from minifuse.config import GenerationConfig
from minifuse.definition import FUSED, METHODS, WEIGHTED, Case, Reference, as_dtype, vote
from minifuse.engine import Fuser
from minifuse.request import Request, encode_prompt, make_plan
from minifuse.results import Generation
from minifuse.sampling import make_generator
from minifuse.soak.calls import SIZES, Call, draw_call, fit_call
from minifuse.soak.watch import Watch

CALIBRATION_CALLS = 12


@dataclass
class Report:
    """What a soak came to.

    divergences: a line for each answer that is wrong
    faults:      what was left over, compiled, or grew
    worst:       largest difference between log-probabilities of the same token, in nats
    tokens, ties: tokens compared, and those among them that the other computation did not pick
    """

    calls: int = 0
    requests: int = 0
    answers: int = 0
    tokens: int = 0
    ties: int = 0
    worst: float = 0.0
    worst_share: float = 0.0
    tolerances: dict[str, float] = field(default_factory=dict)
    divergences: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    graphs: int = 0
    new_graphs: int = 0
    growth_bytes: int | None = None
    resident_bytes: int | None = None

    @property
    def is_passed(self) -> bool:
        return not self.divergences and not self.faults


@dataclass(frozen=True)
class Noise:
    """How an answer's tokens are drawn: the filters, and the times of each step f64[V]."""

    config: GenerationConfig
    generator: torch.Generator | None

    def times(self, steps: int, size: int) -> list[Tensor] | None:
        """The exponential times of the first steps, None for greedy answers."""
        if self.generator is None:
            return None
        each = (torch.empty(size).exponential_(generator=self.generator) for _ in range(steps))
        return [times.double() for times in each]


def shortfall(
    scores: Tensor,
    tokens: Sequence[int],
    config: GenerationConfig,
    times: Tensor | None,
    tolerance: float,
) -> float:
    """How far the best of some tokens is from being picked, in nats; inf where a filter drops them.

    scores:    log-probabilities f64[V], of which each may be off by the tolerance
    times:     f64[V], None for greedy
    tolerance: in nats; tokens that may or may not pass the filters are not held to them
    """
    wanted = torch.tensor(list(tokens))
    if times is None:
        return float(scores.max() - scores[wanted].max())
    may, must = _kept(scores, config, 2 * tolerance)
    keys = scores - config.temperature * times.log()
    best = keys.masked_fill(~must, -math.inf).max()
    own = keys.masked_fill(~may, -math.inf)[wanted].max()
    return math.inf if own == -math.inf else max(0.0, float(best - own))


def _kept(scores: Tensor, config: GenerationConfig, margin: float) -> tuple[Tensor, Tensor]:
    """Tokens that may pass top-k and top-p, and those that must, bool[V] each."""
    may = must = torch.ones_like(scores, dtype=torch.bool)
    if config.top_k and config.top_k < len(scores):
        ordered = scores.sort(descending=True).values
        may = scores >= ordered[config.top_k - 1] - margin
        must = scores > ordered[config.top_k] + margin
    if config.top_p < 1:
        masses = ((scores - scores.max()) / config.temperature).exp()
        order = scores.argsort(descending=True)
        # Mass before a token, without and with all that are as likely within the margin. Of what
        # passes top-k the whole is not known either, but only what it is at least and at most.
        totals = torch.cat([masses.new_zeros(1), masses.masked_fill(~may, 0)[order].cumsum(-1)])
        falling = -scores[order]
        least = totals[torch.searchsorted(falling, -scores - margin)]
        most = totals[torch.searchsorted(falling, -scores + margin, right=True)] - masses
        slack = math.exp(margin / config.temperature)
        smaller, larger = masses[must].sum(), masses[may].sum()
        may = may & (least / slack < config.top_p * larger)
        must = must & (most * slack < config.top_p * smaller)
    must = must.clone()
    must[scores.argmax()] |= not bool(must.any())
    return may | must, must


class Checker:
    """Compares answers of one model with another computation of them; notes what it finds.

    tolerance: of a log-probability, in nats
    """

    def __init__(self, fuser: Fuser, tolerance: float, report: Report):
        self.fuser = fuser
        self.tolerance = tolerance
        self.report = report
        self.watch = Watch(fuser)

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        """What is wrong with a request's answers."""
        raise NotImplementedError

    def noise(self, call: Call, request: Request, answer: Generation) -> Noise:
        """The noise that an answer was drawn with; methods that read one prompt share its own."""
        config = make_plan(**call.options).generation
        if config.temperature == 0:
            return Noise(config, None)
        prompt = encode_prompt(self.fuser.model.tokenizer, request, self.fuser._frame(None))
        index = _index_of(answer)
        method = answer.method if index is None else "per_prompt"
        return Noise(config, make_generator(config.seed, prompt, method, index))

    def note(self, ours: float, theirs: float) -> float:
        """The difference between two log-probabilities of the same token."""
        gap = abs(ours - theirs)
        self.report.worst = max(self.report.worst, gap)
        self.report.worst_share = max(self.report.worst_share, gap / self.tolerance)
        return gap

    def check_text(self, call: Call, answer: Generation) -> Iterator[str]:
        """Text, length and reason to end are those of the tokens."""
        model, ids = self.fuser.model, answer.token_ids
        text = model.tokenizer.decode(ids)
        places = [text.find(stop) for stop in call.options["stop"] if stop in text]
        wanted = text[: min(places)] if places else text
        if answer.text != wanted:
            yield f"text is {answer.text!r}, its tokens say {wanted!r}"
        before = model.tokenizer.decode(ids[:-1])
        if any(stop in before for stop in call.options["stop"]):
            yield f"goes on behind a stop string: {text!r}"
        if set(ids) & set(model.eos_token_ids):
            yield "goes on behind an end token"
        is_full = len(ids) == call.options["max_new_tokens"]
        if answer.finish_reason == "length" and (not is_full or places):
            yield f"ended by its length with {len(ids)} tokens, text {text!r}"
        if len(ids) > call.options["max_new_tokens"]:
            yield f"has {len(ids)} tokens"
        if len(answer.logprobs) != len(ids):
            yield f"has {len(answer.logprobs)} log-probabilities for {len(ids)} tokens"

    def ends_by_token(self, call: Call, answer: Generation) -> bool:
        """Whether one token more was picked, which ended the answer."""
        text = self.fuser.model.tokenizer.decode(answer.token_ids)
        return answer.finish_reason == "stop" and not any(s in text for s in call.options["stop"])


def _index_of(answer: Generation) -> int | None:
    """The segment of a stream that is one prompt alone, None for other answers."""
    if answer.method not in ("origin", "per_prompt", "weighted_max", "vote"):
        return None
    return next(entry.index for entry in answer.layout if entry.part == "segment")


class Definition(Checker):
    """Holds answers to the definition, in float64."""

    def __init__(self, fuser: Fuser, report: Report):
        params = fuser.model.params
        self.params = {dtype: as_dtype(params, dtype) for dtype in (torch.float32, torch.float64)}
        super().__init__(fuser, 0.0, report)
        self.tolerance = ROUNDINGS * self._rounding()

    def _rounding(self) -> float:
        """How far the definition's own log-probabilities stray in float32, at most."""
        worst = 0.0
        for seed in range(CALIBRATION_CALLS):
            call = fit_call(self.fuser, draw_call(-1 - seed, max_new_tokens=8), SIZES)
            request = call.requests[0]
            case = self._case(call, request)
            forced = case.segment_ids[0][:8]
            for method in METHODS:
                if method in FUSED and not case.suffix_ids and request.segments[0][-2:] != " Z":
                    continue
                index = 0 if method in ("per_prompt", "weighted_max") else None
                found = [
                    self._reference(call, request, dtype).logprobs(case, method, forced, index)
                    for dtype in self.params
                ]
                worst = max(worst, float((found[0].double() - found[1]).abs().max()))
        return worst

    def _case(self, call: Call, request: Request) -> Case:
        prompt = encode_prompt(self.fuser.model.tokenizer, request, self.fuser._frame(None))
        weights = request.weights
        return Case(
            prompt.prefix_ids,
            prompt.segment_ids,
            prompt.suffix_ids,
            weights if weights is None or isinstance(weights, str) else tuple(weights),
            call.options["positions"],
            call.options["beta"],
            call.options["balance"],
        )

    def _reference(self, call: Call, request: Request, dtype: torch.dtype) -> Reference:
        reach = self._reach(call, request)
        config = self.fuser.model.config
        return Reference(config, self.params[dtype], dtype, config.rope_length(reach))

    def _reach(self, call: Call, request: Request) -> int:
        """Positions that a request reaches by its longest answer, which dynamic RoPE goes by."""
        case = self._case(call, request)
        methods = list(METHODS) if "all" in call.options["methods"] else call.options["methods"]
        lengths = [len(ids) for ids in case.segment_ids]
        bodies = []
        for method in methods:
            if method in ("concat", "fused_plain"):
                bodies.append(sum(lengths))
            elif method == "origin":
                bodies.append(lengths[0])
            elif method == "weighted_max" and isinstance(case.weights, tuple):
                pairs = list(zip(case.weights, case.segment_ids, strict=True))
                bodies.append(len(max(pairs)[1]))
            else:
                bodies.append(max(lengths))
        outside = len(case.prefix_ids) + len(case.suffix_ids)
        return outside + max(bodies) + call.options["max_new_tokens"]

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        request = call.requests[number]
        case = self._case(call, request)
        truth = self._reference(call, request, torch.float64)
        for answer in flat(results):
            for problem in self._check_answer(call, request, case, truth, answer):
                yield f"{answer.method}: {problem}"
        if "vote" in results:
            voted, answers = results["vote"], results["per_prompt"]
            assert isinstance(voted, Generation)
            assert isinstance(answers, list)
            winner = vote(answers)
            if voted.text != winner.text:
                yield f"vote: is {voted.text!r}, the majority says {winner.text!r}"

    def _check_answer(
        self, call: Call, request: Request, case: Case, truth: Reference, answer: Generation
    ) -> Iterator[str]:
        yield from self.check_text(call, answer)
        index, ids, tolerance = _index_of(answer), answer.token_ids, self.tolerance
        method = "per_prompt" if index is not None else answer.method
        wanted = truth.weights(case, answer.method)
        weights = answer.weights
        if answer.method in WEIGHTED:
            assert weights is not None, f"{answer.method} has no weights"
            gap = max(abs(a - b) for a, b in zip(weights, wanted, strict=True))
            # Each weight turns beta times what the signal is off by into its own share of that.
            if gap > 2 * (1 + abs(case.beta)) * tolerance:
                yield f"weights are {weights}, the definition says {wanted}"
        if answer.method == "weighted_max":
            assert weights is not None
            assert index is not None
            heaviest, _ = max(
                enumerate(zip(weights, case.segment_ids, strict=True)), key=lambda each: each[1]
            )
            if case.segment_ids[index] != case.segment_ids[heaviest]:
                yield f"reads segment {index + 1}, the heaviest is {heaviest + 1}"
        logprobs = truth.logprobs(case, method, ids, index)
        noise = self.noise(call, request, answer)
        times = noise.times(len(ids) + 1, logprobs.shape[-1])
        steps: list[tuple[int, Sequence[int]]] = [(n, [token]) for n, token in enumerate(ids)]
        if self.ends_by_token(call, answer):
            steps.append((len(ids), self.fuser.model.eos_token_ids))
        for step, tokens in steps:
            own_times = None if times is None else times[step]
            behind = shortfall(logprobs[step], tokens, noise.config, own_times, tolerance)
            self.report.tokens += 1
            self.report.ties += behind > 0
            if behind > 2 * tolerance:
                yield (
                    f"token {step + 1} is {tokens[0]}, {behind:.3g} nats behind the definition's "
                    f"pick; tolerance {2 * tolerance:.2g}"
                )
            if step < len(ids):
                gap = self.note(answer.logprobs[step], float(logprobs[step, tokens[0]]))
                if gap > tolerance:
                    yield (
                        f"token {step + 1} has log-probability {answer.logprobs[step]:.6f}, "
                        f"{gap:.3g} nats off; tolerance {tolerance:.2g}"
                    )


class Alone(Checker):
    """Holds the answers of requests in a batch to those of each alone."""

    def __init__(self, fuser: Fuser, report: Report):
        super().__init__(fuser, Bench(fuser).tolerance, report)

    def check(self, call: Call, number: int, results: Results) -> Iterator[str]:
        request = call.requests[number]
        alone = self.fuser.generate_batch([request], **call.options)[0]
        for one, other in zip(flat(results), flat(alone), strict=True):
            for problem in self.check_text(call, one):
                yield f"{one.method}: {problem}"
            for problem in self._compare(call, request, one, other):
                yield f"{one.method}: {problem}"

    def _compare(
        self, call: Call, request: Request, one: Generation, other: Generation
    ) -> Iterator[str]:
        length = max(len(one.token_ids), len(other.token_ids)) + 1
        picks = [(*g.token_ids, *[None] * (length - len(g.token_ids))) for g in (one, other)]
        for step, (token, wanted) in enumerate(zip(*picks, strict=True)):
            if token is None and wanted is None:
                break
            self.report.tokens += 1
            if token == wanted:
                gap = self.note(one.logprobs[step], other.logprobs[step])
                if gap > self.tolerance:
                    yield (
                        f"token {step + 1} has log-probability {one.logprobs[step]:.6f}, alone "
                        f"{other.logprobs[step]:.6f}; tolerance {self.tolerance:.2g}"
                    )
                continue
            self.report.ties += 1
            yield from self._check_parting(call, request, one, other, step)
            return  # from here on they are other texts
        if (one.text, one.finish_reason) != (other.text, other.finish_reason):
            yield f"same tokens, but {one.text!r} is alone {other.text!r}"

    def _check_parting(
        self, call: Call, request: Request, one: Generation, other: Generation, step: int
    ) -> Iterator[str]:
        """Where two answers part, either token has to be as good as the best."""
        if one.method == "vote" and _index_of(one) != _index_of(other):
            return  # other votes, each compared by itself
        index = _index_of(one)
        method = "per_prompt" if index is not None else one.method
        longer = max(one.token_ids, other.token_ids, key=len)
        self.watch.is_off = True  # a pool that scores goes as a whole
        found = self.fuser.distributions(
            segments=request.segments,
            prefix=request.prefix,
            suffix=request.suffix,
            weights=request.weights,
            continuation=longer[: step + 1],
            methods=method,
            positions=call.options["positions"],
            beta=call.options["beta"],
            balance=call.options["balance"],
        )[method]
        self.watch.is_off = False
        scores = (found if index is None else found[index])[step].double()
        noise = self.noise(call, request, one)
        times = noise.times(step + 1, len(scores))
        for answer, name in ((one, "in the batch"), (other, "alone")):
            tokens = answer.token_ids[step : step + 1] or self.fuser.model.eos_token_ids
            own_times = None if times is None else times[-1]
            behind = shortfall(scores, tokens, noise.config, own_times, self.tolerance)
            if behind > 2 * self.tolerance:
                yield (
                    f"token {step + 1} is {tokens[0]} {name}, {behind:.3g} nats behind the best; "
                    f"tolerance {2 * self.tolerance:.2g}"
                )
