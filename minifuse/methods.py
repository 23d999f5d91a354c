"""Every method as data: which segments its streams see, with what bias, and how they are reduced.

An `Answer` is one text to generate: some streams that always receive the same token, and the
reduction of their next-token scores. Answers that must come out equal are one answer: `origin` is
the first of `per_prompt`, `weighted_max` that of the heaviest segment, `vote` reads them all.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from minifuse.config import is_finite
from minifuse.errors import UsageError
from minifuse.layout import Encoding


class Reduction(StrEnum):
    """What makes one next-token distribution of several streams."""

    NONE = "none"
    MEAN_LOGITS = "mean of logits"
    MEAN_PROBS = "mean of probabilities"
    MAX_PROBS = "maximum of probabilities, renormalised"


class Weighting(StrEnum):
    """Where the weights of a method's segments come from."""

    NONE = "none"  # no weights
    UNIFORM = "uniform"  # 1/N each
    CHOSEN = "chosen"  # given by the user, else found per item
    FOUND = "found"  # always found per item


class Sees(StrEnum):
    """Which segments the streams of a method see."""

    FIRST = "one stream: the first segment"
    HEAVIEST = "one stream: the heaviest segment"
    EACH = "N streams: one segment each"
    ALL = "one stream: all segments"


class FusionMethod(StrEnum):
    """The closed list of methods, by canonical name."""

    ORIGIN = "origin"
    PER_PROMPT = "per_prompt"
    LOGIT_AVG = "logit_avg"
    PROB_AVG = "prob_avg"
    PROB_MAX = "prob_max"
    WEIGHTED_AVG = "weighted_avg"
    WEIGHTED_PROB_AVG = "weighted_prob_avg"
    WEIGHTED_MAX = "weighted_max"
    VOTE = "vote"
    FUSED = "fused"
    FUSED_WEIGHTED = "fused_weighted"
    FUSED_AUTO = "fused_auto"
    FUSED_PLAIN = "fused_plain"
    CONCAT = "concat"


ALIASES = {
    "avg": FusionMethod.LOGIT_AVG,
    "max": FusionMethod.PROB_MAX,
    "flex_attention": FusionMethod.FUSED_PLAIN,
}


@dataclass(frozen=True)
class MethodSpec:
    """What a method is made of.

    encoding: None leaves it to the request's `positions` setting
    balance:  where the request says none, see `_biases`
    """

    sees: Sees
    reduction: Reduction = Reduction.NONE
    weighting: Weighting = Weighting.NONE
    encoding: Encoding | None = Encoding.ALONE
    balance: float = 1.0


SPECS = {
    FusionMethod.ORIGIN: MethodSpec(Sees.FIRST),
    FusionMethod.PER_PROMPT: MethodSpec(Sees.EACH),
    FusionMethod.LOGIT_AVG: MethodSpec(Sees.EACH, Reduction.MEAN_LOGITS, Weighting.UNIFORM),
    FusionMethod.PROB_AVG: MethodSpec(Sees.EACH, Reduction.MEAN_PROBS, Weighting.UNIFORM),
    FusionMethod.PROB_MAX: MethodSpec(Sees.EACH, Reduction.MAX_PROBS),
    FusionMethod.WEIGHTED_AVG: MethodSpec(Sees.EACH, Reduction.MEAN_LOGITS, Weighting.CHOSEN),
    FusionMethod.WEIGHTED_PROB_AVG: MethodSpec(Sees.EACH, Reduction.MEAN_PROBS, Weighting.CHOSEN),
    FusionMethod.WEIGHTED_MAX: MethodSpec(Sees.HEAVIEST, weighting=Weighting.CHOSEN),
    FusionMethod.VOTE: MethodSpec(Sees.EACH),
    FusionMethod.FUSED: MethodSpec(Sees.ALL, weighting=Weighting.UNIFORM, encoding=None),
    FusionMethod.FUSED_WEIGHTED: MethodSpec(Sees.ALL, weighting=Weighting.CHOSEN, encoding=None),
    FusionMethod.FUSED_AUTO: MethodSpec(
        Sees.ALL, weighting=Weighting.FOUND, encoding=None, balance=0.5
    ),
    FusionMethod.FUSED_PLAIN: MethodSpec(Sees.ALL, encoding=Encoding.SEQUENTIAL),
    FusionMethod.CONCAT: MethodSpec(Sees.ALL, encoding=Encoding.CAUSAL),
}


def parse_methods(names: str | Iterable[str]) -> tuple[FusionMethod, ...]:
    """Canonical methods of names and aliases, each once, in the order given; `all` is every one.

    raises: UsageError for an unknown name, or no name at all.
    """
    methods: list[FusionMethod] = []
    for name in [names] if isinstance(names, str) else names:
        if name == "all":
            methods.extend(FusionMethod)
        elif name in ALIASES:
            methods.append(ALIASES[name])
        elif name in list(FusionMethod):
            methods.append(FusionMethod(name))
        else:
            known = ", ".join([*FusionMethod, *ALIASES, "all"])
            raise UsageError(f"method is {name!r}; wanted one of {known}")
    if not methods:
        raise UsageError("methods is empty; wanted at least one method, such as fused")
    return tuple(dict.fromkeys(methods))


def needs_weights(methods: Iterable[FusionMethod], weighting: Weighting) -> bool:
    """Whether some method takes its weights from `weighting`."""
    return any(SPECS[method].weighting is weighting for method in methods)


@dataclass(frozen=True)
class SegmentWeights:
    """Normalised weights of the segments, by where a method takes them from.

    chosen, found: None as long as no method asked for them; `*_source` says where they come from.
    """

    uniform: tuple[float, ...]
    chosen: tuple[float, ...] | None = None
    found: tuple[float, ...] | None = None
    chosen_source: str | None = None
    found_source: str | None = None

    def of(self, weighting: Weighting) -> tuple[float, ...] | None:
        """The weights themselves, None for methods without any."""
        return {
            Weighting.NONE: None,
            Weighting.UNIFORM: self.uniform,
            Weighting.CHOSEN: self.chosen,
            Weighting.FOUND: self.found,
        }[weighting]

    def source_of(self, weighting: Weighting) -> str | None:
        """`given`, or the signal that they were found by; None for methods without weights."""
        sources = {Weighting.CHOSEN: self.chosen_source, Weighting.FOUND: self.found_source}
        return sources.get(weighting)


@dataclass(frozen=True)
class ViewRequest:
    """Which view a stream wants; see `layout.PackedPrompt.view`."""

    encoding: Encoding
    indices: tuple[int, ...]
    biases: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """One text to generate: the views of its streams, and how their scores become one.

    index:   the paraphrase's number for an answer of `per_prompt`, else None
    weights: one per stream, for the means; None for the other reductions
    """

    method: FusionMethod
    index: int | None
    views: tuple[ViewRequest, ...]
    reduction: Reduction
    weights: tuple[float, ...] | None = None


def single_view(index: int) -> ViewRequest:
    """The plain prompt: prefix, one segment, suffix."""
    return ViewRequest(Encoding.ALONE, (index,), (0.0,))


def make_answers(
    method: FusionMethod,
    weights: SegmentWeights,
    segment_ids: Sequence[tuple[int, ...]],
    positions: Encoding,
    balance: float | None,
) -> tuple[Answer, ...]:
    """The answers that a method reads: N for `per_prompt` and `vote`, else one.

    segment_ids: the segments' tokens; they break ties between weights, so that the order of the
                 segments never matters
    positions:   where fused views find their segments
    balance:     of the fused methods, see `_biases`; None for each one's own
    """
    spec = SPECS[method]
    own = weights.of(spec.weighting)
    everyone = tuple(range(len(segment_ids)))
    if spec.sees is Sees.ALL:
        biases = (0.0,) * len(everyone)
        if own is not None:
            biases = _biases(own, spec.balance if balance is None else balance)
        view = ViewRequest(spec.encoding or positions, everyone, biases)
        return (Answer(method, None, (view,), spec.reduction),)
    if spec.reduction is not Reduction.NONE:
        views = tuple(single_view(i) for i in everyone)
        return (Answer(method, None, views, spec.reduction, own),)
    indices = everyone
    if spec.sees is Sees.FIRST:
        indices = (0,)
    elif spec.sees is Sees.HEAVIEST:
        assert own is not None  # a method that looks for the heaviest has a weighting
        indices = (max(everyone, key=lambda i: (own[i], segment_ids[i])),)
    return tuple(map(alone_answer, indices))


def alone_answer(index: int) -> Answer:
    """The answer behind one segment's plain prompt."""
    return Answer(FusionMethod.PER_PROMPT, index, (single_view(index),), Reduction.NONE)


def leave_out(answer: Answer, index: int) -> Answer | None:
    """The same answer without a segment, the weights of the others scaled up.

    Streams that see it alone are left out, others see the rest of theirs; None where nothing is
    left. What was encoded stays: the later segments of `concat` have read the one left out.
    """
    if len(answer.views) > 1:
        kept = [i for i, view in enumerate(answer.views) if view.indices != (index,)]
        weights = answer.weights
        if weights is not None:
            total = sum(weights[i] for i in kept)
            if total == 0:
                return None
            weights = tuple(weights[i] / total for i in kept)
        return replace(answer, views=tuple(answer.views[i] for i in kept), weights=weights)
    (view,) = answer.views
    shares = [
        0.0 if i == index else math.exp(bias)
        for i, bias in zip(view.indices, view.biases, strict=True)
    ]
    if sum(shares) == 0:
        return None
    lift = 0.0
    if SPECS[answer.method].weighting is not Weighting.NONE:
        lift = math.log(sum(map(math.exp, view.biases)) / sum(shares))
    biases = tuple(math.log(share) + lift if share else -math.inf for share in shares)
    return replace(answer, views=(replace(view, biases=biases),))


def _biases(weights: tuple[float, ...], balance: float) -> tuple[float, ...]:
    """log(w) + (1 - balance) * log(N): together, N segments weigh as N ** (1 - balance) prompts.

    At a balance of 1 copies weigh as one, at 0 each as itself: the answer then attends to the
    question N times as strongly as behind a single prompt. A weight of zero hides its segment.
    """
    lift = (1 - balance) * math.log(len(weights))
    return tuple(math.log(w) + lift if w > 0 else -math.inf for w in weights)


def normalise_weights(weights: Iterable[float], num_segments: int) -> tuple[float, ...]:
    """Weights given by a user, checked, and scaled to a sum of one.

    raises: UsageError for a wrong count, for negative or non-finite numbers, for a sum of zero.
    """
    values = tuple(weights)
    if len(values) != num_segments:
        raise UsageError(
            f"got {len(values)} weights for {num_segments} segments; wanted one each, or the name "
            "of a signal"
        )
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not is_finite(value) or value < 0:
            raise UsageError(f"a weight is {value!r}; wanted finite numbers of at least 0")
    # Scaled by the largest first, so that neither tiny nor huge numbers overflow the sum.
    largest = max(values)
    if largest == 0:
        raise UsageError("all weights are 0; wanted at least one above 0")
    scaled = [value / largest for value in values]
    return tuple(value / sum(scaled) for value in scaled)
