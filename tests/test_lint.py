"""Layouts and tables that are odd are named; those of the methods come out as expected."""

import pytest

from minifuse.layout import Encoding, PackedPrompt, Prompt
from minifuse.lint import Fault, lint
from minifuse.methods import FusionMethod, SegmentWeights, make_answers

PROMPT = Prompt((1, 10, 11), ((20, 21, 22, 23), (30, 31), (40, 41, 42)), (50, 51))
WEIGHTS = SegmentWeights(uniform=(1 / 3,) * 3, chosen=(0.5, 0.3, 0.2), found=(0.2, 0.2, 0.6))


def lay_out(method: str, positions=Encoding.ALIGNED, prompt=PROMPT, weights=WEIGHTS):
    """A method's layout, and its streams."""
    packed = PackedPrompt(prompt)
    packed.prefix()
    answers = make_answers(FusionMethod(method), weights, prompt.segment_ids, positions, None)
    views = [packed.view(v.encoding, v.indices, v.biases) for a in answers for v in a.views]
    return packed, [packed.stream(view) for view in dict.fromkeys(views)]


def faults(packed, streams, bos_ids=(1,)) -> set[Fault]:
    return {remark.fault for remark in lint(packed, streams, bos_ids)}


EXPECTED = {
    "origin": set(),
    "per_prompt": set(),
    "logit_avg": set(),
    "prob_avg": set(),
    "prob_max": set(),
    "weighted_avg": set(),
    "weighted_prob_avg": set(),
    "weighted_max": set(),
    "vote": set(),
    "fused": set(),
    "fused_weighted": set(),
    "fused_auto": {Fault.BALANCE},
    "fused_plain": {Fault.JUMP, Fault.BALANCE},
    "concat": {Fault.LEAK, Fault.BALANCE},
}


@pytest.mark.parametrize("method", FusionMethod)
def test_methods_come_out_as_expected(method):
    assert faults(*lay_out(method)) == EXPECTED[method]


def test_restart_has_gaps():
    remarks = lint(*lay_out("fused", Encoding.ALONE))
    assert {remark.fault for remark in remarks} == {Fault.JUMP}
    assert [str(remark).split(": ")[1].split(",")[0] for remark in remarks] == [
        "segment 2 ends 2 positions before the suffix",
        "segment 3 ends 1 positions before the suffix",
    ]


def test_the_published_recipe_is_named():
    texts = [str(remark) for remark in lint(*lay_out("fused_plain"))]
    assert any("segment 2 is encoded at position 7, 4 behind" in text for text in texts)
    assert any("3 segments weigh as 3 prompts" in text for text in texts)


def test_a_leak():
    packed, streams = lay_out("fused")
    second = next(span for span in packed.spans if span.index == 1)
    first = next(span for span in packed.spans if span.index == 0)
    packed.sees[second.label] = {**packed.sees[second.label], first.label: 0.0}
    remarks = lint(packed, streams)
    assert Fault.LEAK in {remark.fault for remark in remarks}
    assert "segment 2 sees segment 1" in str(remarks[0])


def test_a_row_that_sees_nothing():
    packed, streams = lay_out("origin")
    packed.sees[packed.spans[1].label] = {}
    assert Fault.BLIND in faults(packed, streams)


def test_a_segment_that_nobody_sees():
    weights = SegmentWeights(uniform=(1 / 3,) * 3, chosen=(0.5, 0.0, 0.5))
    remarks = lint(*lay_out("fused_weighted", weights=weights))
    assert [remark.fault for remark in remarks] == [Fault.UNREAD]
    assert "no answer sees segment 2" in str(remarks[0])


def test_a_prefix_that_nobody_sees():
    """Without a BOS token there would be no other remark on it."""
    packed, streams = lay_out("fused")
    (prefix, *_) = packed.spans
    for label, rule in packed.sees.items():
        packed.sees[label] = {k: b for k, b in rule.items() if k != prefix.label or k == label}
    unread, *others = lint(packed, streams)
    assert str(unread).startswith("unread: no answer sees prefix")
    # Segments stand behind nothing that they see.
    assert {remark.fault for remark in others} == {Fault.JUMP}


def test_a_prefix_that_segments_alone_see_is_read():
    packed, (stream,) = lay_out("fused")
    (prefix, *_) = packed.spans
    for label in (stream.label, stream.view.suffix.label):
        packed.sees[label] = {k: b for k, b in packed.sees[label].items() if k != prefix.label}
    assert Fault.UNREAD not in faults(packed, [stream])


def test_an_answer_that_does_not_see_the_suffix():
    packed, (stream,) = lay_out("fused")
    suffix = stream.view.suffix.label
    packed.sees[stream.label] = {k: b for k, b in packed.sees[stream.label].items() if k != suffix}
    (remark,) = lint(packed, [stream])
    assert remark.fault is Fault.UNREAD
    assert "the answer does not see the suffix" in str(remark)


def test_an_answer_that_sees_nothing():
    packed, (stream,) = lay_out("fused")
    packed.sees[stream.label] = {}
    assert "sees nothing: an answer sees no key" in str(lint(packed, [stream])[0])


def test_bos():
    assert Fault.BOS in faults(*lay_out("fused"), bos_ids=(2,))
    assert faults(*lay_out("fused"), bos_ids=()) == set()
    packed, streams = lay_out("fused")
    (prefix, *_) = packed.spans
    third = next(span for span in packed.spans if span.index == 2)
    rule = packed.sees[third.label]
    packed.sees[third.label] = {k: b for k, b in rule.items() if k != prefix.label}
    remarks = lint(packed, streams, (1,))
    assert "segment 3 cannot see the BOS token" in str(remarks[0])


def test_a_suffix_over_its_segment():
    packed, streams = lay_out("origin")
    prompt = PackedPrompt(PROMPT)
    prefix, segment = prompt.prefix(), prompt.segment(Encoding.ALONE, 0)
    view = prompt.view(Encoding.ALONE, (0,), (0.0,))
    moved = [
        span if span is not view.suffix else type(span)(**{**vars(span), "first_position": 5})
        for span in prompt.spans
    ]
    prompt.spans[:] = moved
    found = [r for r in lint(prompt, [prompt.stream(view)]) if r.fault is Fault.OVERLAP]
    assert ["suffix sees segment 1" in str(remark) for remark in found] == [True]
    assert prefix
    assert segment
    assert faults(packed, streams) == set()


def test_a_first_token_that_is_not_fused():
    packed, (stream,) = lay_out("fused")
    suffix = stream.view.suffix.label
    first = next(span for span in packed.spans if span.index == 0)
    packed.sees[suffix] = {1: 0.0, first.label: 0.0, suffix: 0.0}
    assert Fault.NOT_FUSED in faults(packed, [stream])
