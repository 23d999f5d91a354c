"""Methods: names, the closed list, each one's tables as drawn, and the weights."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minifuse.errors import UsageError
from minifuse.layout import Encoding, PackedPrompt, Part, Prompt
from minifuse.masks import make_tables, write_rules
from minifuse.methods import (
    ALIASES,
    SPECS,
    Answer,
    FusionMethod,
    Reduction,
    Sees,
    SegmentWeights,
    ViewRequest,
    Weighting,
    leave_out,
    make_answers,
    needs_weights,
    normalise_weights,
    parse_methods,
    single_view,
)

M = FusionMethod
CHOSEN = (0.5, 0.2, 0.3)
FOUND = (0.1, 0.8, 0.1)
WEIGHTS = SegmentWeights((1 / 3,) * 3, CHOSEN, FOUND, "given", "likelihood")
# Segments of three lengths: no two encodings of all of them coincide.
PROMPT = Prompt((1,), ((10,), (20, 21), (30, 31, 32)), (2,))
EVERYONE = (0, 1, 2)


def answers_of(method, weights=WEIGHTS, positions=Encoding.ALIGNED, balance=1.0):
    segment_ids = tuple((i,) for i in range(len(weights.uniform)))
    return make_answers(method, weights, segment_ids, positions, balance)


def test_the_closed_list():
    """The names and aliases of the design."""
    assert [str(method) for method in FusionMethod] == (
        "origin per_prompt logit_avg prob_avg prob_max weighted_avg weighted_prob_avg weighted_max "
        "vote fused fused_weighted fused_auto fused_plain concat"
    ).split()
    assert ALIASES == {
        "avg": "logit_avg",
        "max": "prob_max",
        "flex_attention": "fused_plain",
    }
    assert SPECS.keys() == set(FusionMethod)


@pytest.mark.parametrize("method", FusionMethod)
def test_each_method_has_streams_tables_and_a_reduction(method):
    answers = answers_of(method)
    assert answers
    for answer in answers:
        assert isinstance(answer.reduction, Reduction)
        has_several = len(answer.views) > 1
        assert has_several == (answer.reduction is not Reduction.NONE)
        packed = PackedPrompt(PROMPT)
        for request in answer.views:
            view = packed.view(request.encoding, request.indices, request.biases)
            stream = packed.stream(view)
            seen = packed.sees[stream.label]
            assert {packed.prefix().label, view.suffix.label, stream.label} < seen.keys()
        visibility, bias = tables = make_tables(32, torch.device("cpu"))
        write_rules(tables, packed.sees)
        assert visibility[stream.label].any()
        assert bias.isfinite().all()


# What the stream sees: the text of the drawing is the visibility of every label; under it the
# biases of the stream's row. p is the prefix, 1 2 3 the segments, v the view, s its stream.
ISOLATED = """
      p 1 2 3 v s
    p 1 0 0 0 0 0
    1 1 1 0 0 0 0
    2 1 0 1 0 0 0
    3 1 0 0 1 0 0
    v 1 1 1 1 1 0
    s 1 1 1 1 1 1
"""
CONCAT = """
      p 1 2 3 v s
    p 1 0 0 0 0 0
    1 1 1 0 0 0 0
    2 1 1 1 0 0 0
    3 1 1 1 1 0 0
    v 1 1 1 1 1 0
    s 1 1 1 1 1 1
"""
THIRD = math.log(1 / 3)
DRAWN = {
    M.FUSED: (ISOLATED, (THIRD,) * 3, Encoding.ALIGNED),
    M.FUSED_WEIGHTED: (ISOLATED, tuple(map(math.log, CHOSEN)), Encoding.ALIGNED),
    M.FUSED_AUTO: (ISOLATED, tuple(map(math.log, FOUND)), Encoding.ALIGNED),
    M.FUSED_PLAIN: (ISOLATED, (0.0,) * 3, Encoding.SEQUENTIAL),
    M.CONCAT: (CONCAT, (0.0,) * 3, Encoding.CAUSAL),
}


def tables_of(request: ViewRequest):
    """Labels in the drawing's order, and the rules of a request with this one view.

    A moved copy is read in place of its segment; as a query it is the segment itself.
    """
    packed = PackedPrompt(PROMPT)
    view = packed.view(request.encoding, request.indices, request.biases)
    stream = packed.stream(view)
    sources = {move.target.label: move.source.label for move in packed.moves}
    keys = [packed.prefix().label, *(s.label for s in view.segments), view.suffix.label]
    keys.append(stream.label)
    queries = [sources.get(label, label) for label in keys]
    return packed.sees, queries, keys, sources


@pytest.mark.parametrize("method", DRAWN)
def test_tables_of_a_view_of_all_segments(method):
    drawing, biases, encoding = DRAWN[method]
    (answer,) = answers_of(method)
    assert answer == Answer(method, None, answer.views, Reduction.NONE)
    (request,) = answer.views
    assert request.encoding is encoding
    assert request.indices == EVERYONE
    assert request.biases == pytest.approx(biases)
    sees, queries, keys, sources = tables_of(request)
    visibility, bias = tables = make_tables(32, torch.device("cpu"))
    write_rules(tables, sees)
    wanted = [[int(c) for c in line.split()[1:]] for line in drawing.strip().splitlines()[1:]]
    found = []
    for query in queries:
        row = [int(visibility[query, key]) for key in keys]
        if query in sources.values():  # it sees itself where it was encoded, not its copy
            own = keys.index(next(copy for copy, s in sources.items() if s == query))
            row[own] = int(visibility[query, query])
        found.append(row)
    assert found == wanted
    for label in (queries[-2], queries[-1]):
        own = torch.zeros(len(keys))
        own[1:4] = torch.tensor(biases)
        torch.testing.assert_close(bias[label, keys], own)


SINGLES = tuple(single_view(i) for i in EVERYONE)
ENSEMBLES = {
    M.LOGIT_AVG: (Reduction.MEAN_LOGITS, (1 / 3,) * 3),
    M.PROB_AVG: (Reduction.MEAN_PROBS, (1 / 3,) * 3),
    M.PROB_MAX: (Reduction.MAX_PROBS, None),
    M.WEIGHTED_AVG: (Reduction.MEAN_LOGITS, CHOSEN),
    M.WEIGHTED_PROB_AVG: (Reduction.MEAN_PROBS, CHOSEN),
}


@pytest.mark.parametrize("method", ENSEMBLES)
def test_ensembles_have_a_stream_per_segment(method):
    reduction, weights = ENSEMBLES[method]
    assert answers_of(method) == (Answer(method, None, SINGLES, reduction, weights),)


@pytest.mark.parametrize(
    ("method", "indices"),
    [(M.ORIGIN, (0,)), (M.WEIGHTED_MAX, (0,)), (M.PER_PROMPT, EVERYONE), (M.VOTE, EVERYONE)],
)
def test_streams_that_must_come_out_equal_exist_once(method, indices):
    wanted = [Answer(M.PER_PROMPT, i, (single_view(i),), Reduction.NONE) for i in indices]
    assert list(answers_of(method)) == wanted


def test_every_method_is_one_of_the_three_kinds():
    singles = {M.ORIGIN, M.PER_PROMPT, M.WEIGHTED_MAX, M.VOTE}
    assert set(DRAWN) | set(ENSEMBLES) | singles == set(FusionMethod)


@pytest.mark.parametrize("index", EVERYONE)
def test_a_single_view_sees_prefix_segment_and_itself(index):
    sees, queries, keys, sources = tables_of(single_view(index))
    assert not sources
    prefix, segment, view, stream = keys
    assert queries == keys
    assert sees[segment] == {prefix: 0.0, segment: 0.0}
    assert sees[view] == {prefix: 0.0, segment: 0.0, view: 0.0}
    assert sees[stream] == {prefix: 0.0, segment: 0.0, view: 0.0, stream: 0.0}


def test_heaviest_is_by_chosen_weights_and_by_tokens_among_equals():
    def heaviest(*chosen):
        (answer,) = answers_of(M.WEIGHTED_MAX, SegmentWeights((1 / 3,) * 3, chosen))
        return answer.index

    assert heaviest(0.1, 0.2, 0.7) == 2
    # The later one has the larger token ids, wherever it stands.
    assert heaviest(0.4, 0.4, 0.2) == 1


BALANCED = (M.FUSED, M.FUSED_WEIGHTED, M.FUSED_AUTO)
OTHERS = tuple(method for method in FusionMethod if method not in BALANCED)


@pytest.mark.parametrize("method", BALANCED)
def test_the_position_setting_moves_fused_views_alone(method):
    for positions in (Encoding.ALIGNED, Encoding.ALONE):
        (answer,) = answers_of(method, positions=positions)
        assert answer.views[0].encoding is positions


@pytest.mark.parametrize("method", OTHERS)
def test_the_position_setting_changes_no_other_method(method):
    assert answers_of(method, positions=Encoding.ALONE) == answers_of(method)


def test_balance_says_how_much_the_segments_weigh_together():
    for balance, total in ((0.0, 3), (0.5, math.sqrt(3)), (1.0, 1), (2.0, 1 / 3)):
        (answer,) = answers_of(M.FUSED_WEIGHTED, balance=balance)
        weights = [math.exp(bias) for bias in answer.views[0].biases]
        assert sum(weights) == pytest.approx(total)
        assert [w / total for w in weights] == pytest.approx(CHOSEN)
        for method in OTHERS:
            assert answers_of(method, balance=balance) == answers_of(method)


def test_without_a_balance_each_method_has_its_own():
    for method, own in ((M.FUSED, 1.0), (M.FUSED_WEIGHTED, 1.0), (M.FUSED_AUTO, 0.5)):
        assert answers_of(method, balance=None) == answers_of(method, balance=own)
        assert answers_of(method, balance=None) != answers_of(method, balance=0.7)


@pytest.mark.parametrize("balance", [0.0, 1.0, -1.0])
def test_a_weight_of_zero_hides_its_segment_whatever_the_balance(balance):
    weights = SegmentWeights((1 / 3,) * 3, (0.5, 0.0, 0.5))
    (answer,) = answers_of(M.FUSED_WEIGHTED, weights, balance=balance)
    packed = PackedPrompt(PROMPT)
    request = answer.views[0]
    view = packed.view(request.encoding, request.indices, request.biases)
    first, hidden, last = (packed.segment(request.encoding, i).label for i in range(3))
    for label in (view.suffix.label, packed.stream(view).label):
        assert hidden not in packed.sees[label]
        assert {first, last} < packed.sees[label].keys()
    assert [segment.label for segment in view.segments] == [first, last]


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("index", EVERYONE)
def test_a_segment_left_out_is_one_of_weight_zero(index, balance):
    """The others keep their proportions, and weigh together what all of them did."""
    (whole,) = answers_of(M.FUSED_WEIGHTED, balance=balance)
    left = leave_out(whole, index)
    shares = [0.0 if i == index else share for i, share in enumerate(CHOSEN)]
    weights = SegmentWeights((1 / 3,) * 3, normalise_weights(shares, 3))
    (wanted,) = answers_of(M.FUSED_WEIGHTED, weights, balance=balance)
    assert left.views[0].biases == pytest.approx(wanted.views[0].biases)
    assert replace(left, views=wanted.views) == wanted


@pytest.mark.parametrize("method", [M.FUSED_PLAIN, M.CONCAT])
def test_without_weights_a_segment_left_out_changes_no_other(method):
    (whole,) = answers_of(method)
    (view,) = whole.views
    wanted = replace(view, biases=(0.0, -math.inf, 0.0))
    assert leave_out(whole, 1) == replace(whole, views=(wanted,))


@pytest.mark.parametrize("method", ENSEMBLES)
def test_an_ensemble_loses_the_stream_of_a_segment_left_out(method):
    (whole,) = answers_of(method, WEIGHTS)
    left = leave_out(whole, 1)
    assert left.views == (SINGLES[0], SINGLES[2])
    if whole.weights is None:
        assert left.weights is None
    else:
        first, _, third = whole.weights
        assert left.weights == pytest.approx((first / (first + third), third / (first + third)))
    assert replace(left, views=whole.views, weights=whole.weights) == whole


@pytest.mark.parametrize("method", [M.LOGIT_AVG, M.FUSED])
def test_of_two_segments_the_other_is_left(method):
    (whole,) = answers_of(method, SegmentWeights((0.5, 0.5)))
    left = leave_out(whole, 0)
    if method is M.FUSED:
        (view,) = left.views
        assert view.biases == pytest.approx((-math.inf, 0.0))
    else:
        assert (left.views, left.weights) == ((single_view(1),), (1.0,))


def test_nothing_is_left_without_the_only_segment_that_weighs():
    weights = SegmentWeights((1 / 3,) * 3, (0.0, 1.0, 0.0))
    for method in (M.FUSED_WEIGHTED, M.WEIGHTED_AVG, M.WEIGHTED_MAX):
        (whole,) = answers_of(method, weights)
        assert leave_out(whole, 1) is None
        assert leave_out(whole, 0) is not None


@pytest.mark.parametrize("method", FusionMethod)
def test_permuting_segments_permutes_the_tables(method):
    """Promise 5, as far as tables go: each segment keeps its weight, its sight and its place."""
    order = (2, 0, 1)

    def permuted(values):
        return tuple(values[i] for i in order)

    weights = SegmentWeights((1 / 3,) * 3, permuted(CHOSEN), permuted(FOUND), "given", "likelihood")
    prompt = Prompt(PROMPT.prefix_ids, permuted(PROMPT.segment_ids), PROMPT.suffix_ids)

    def seen_by_streams(prompt, weights):
        rows = set()
        for answer in answers_of(method, weights):
            shares = answer.weights or (None,) * len(answer.views)
            for request, share in zip(answer.views, shares, strict=True):
                packed = PackedPrompt(prompt)
                view = packed.view(request.encoding, request.indices, request.biases)
                sight = packed.sees[packed.stream(view).label]
                rows |= {
                    (s.token_ids, s.first_position, sight[s.label], share, view.suffix.positions)
                    for s in view.segments
                }
        return rows

    same = seen_by_streams(prompt, weights) == seen_by_streams(PROMPT, WEIGHTS)
    # `origin` is the first segment by definition; the last two keep the order on purpose.
    assert same == (method not in (M.ORIGIN, M.FUSED_PLAIN, M.CONCAT))


def test_one_segment_is_one_view_for_every_isolating_method():
    weights = SegmentWeights((1.0,), (1.0,), (1.0,))
    packed = PackedPrompt(Prompt((1,), ((5, 6),), (2,)))
    for method in FusionMethod:
        for answer in answers_of(method, weights):
            for request in answer.views:
                packed.view(request.encoding, request.indices, request.biases)
    # All encodings of a first segment are one, and so are all views of it.
    assert [span.part for span in packed.pending] == [Part.PREFIX, Part.SEGMENT, Part.SUFFIX]


@pytest.mark.parametrize("method", FusionMethod)
def test_parse_names(method):
    assert parse_methods(str(method)) == parse_methods([method]) == (method,)


def test_parse_aliases_all_and_repeats():
    assert parse_methods("avg") == (M.LOGIT_AVG,)
    assert parse_methods(["max", "flex_attention"]) == (M.PROB_MAX, M.FUSED_PLAIN)
    assert parse_methods("all") == tuple(FusionMethod)
    assert parse_methods(["vote", "avg", "logit_avg", "vote"]) == (M.VOTE, M.LOGIT_AVG)
    assert parse_methods(["vote", "all"])[0] is M.VOTE
    assert len(parse_methods(["vote", "all"])) == len(FusionMethod)
    assert parse_methods(iter(["fused"])) == (M.FUSED,)


@pytest.mark.parametrize("name", ["", "Fused", "fusion", "fused,avg", None, 3])
def test_unknown_names_list_the_known_ones(name):
    known = "origin, per_prompt, .*concat, avg, max, flex_attention, all"
    with pytest.raises(UsageError, match=rf"^method is .*; wanted one of {known}$"):
        parse_methods([name])


def test_no_method_at_all():
    with pytest.raises(UsageError, match=r"^methods is empty; wanted at least one"):
        parse_methods([])


def test_who_needs_weights():
    chosen = {M.WEIGHTED_AVG, M.WEIGHTED_PROB_AVG, M.WEIGHTED_MAX, M.FUSED_WEIGHTED}
    for method in FusionMethod:
        assert needs_weights([method], Weighting.CHOSEN) == (method in chosen)
        assert needs_weights([method], Weighting.FOUND) == (method is M.FUSED_AUTO)
        assert WEIGHTS.source_of(SPECS[method].weighting) == (
            "given" if method in chosen else "likelihood" if method is M.FUSED_AUTO else None
        )
    assert WEIGHTS.of(Weighting.NONE) is None
    assert set(Sees) == {spec.sees for spec in SPECS.values()}


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=20).filter(any))
def test_weights_are_scaled_to_a_sum_of_one(values):
    weights = normalise_weights(values, len(values))
    assert all(0 <= w <= 1 for w in weights)
    # One rounding per weight and per addition.
    assert sum(weights) == pytest.approx(1.0, abs=len(values) * 2.3e-16)
    largest = max(values)
    for value, weight in zip(values, weights, strict=True):
        assert weight == pytest.approx(value / largest * max(weights), rel=1e-15)


def test_weights_at_the_ends_of_the_range():
    assert normalise_weights([1.7e308, 1.7e308], 2) == (0.5, 0.5)
    assert normalise_weights([5e-324, 5e-324], 2) == (0.5, 0.5)
    assert normalise_weights([0, 3], 2) == (0.0, 1.0)
    assert normalise_weights(iter([1, 1, 2]), 3) == (0.25, 0.25, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"^got 0 weights for 2 segments; wanted one each, or the name of a signal$"),
        ([1.0], r"got 1 weights for 2 segments"),
        ([1.0, 2.0, 3.0], r"got 3 weights for 2 segments"),
        ([1.0, -0.1], r"a weight is -0\.1; wanted finite numbers of at least 0"),
        ([math.nan, 1.0], r"a weight is nan"),
        ([1.0, math.inf], r"a weight is inf"),
        ([True, 1.0], r"a weight is True"),
        (["1", 1.0], r"a weight is '1'"),
        ([None, 1.0], r"a weight is None"),
        ([0, 0.0], r"^all weights are 0; wanted at least one above 0$"),
        ([10**400, 1.0], r"a weight is 1000"),
    ],
)
def test_weights_that_are_none(values, message):
    with pytest.raises(UsageError, match=message):
        normalise_weights(values, 2)
