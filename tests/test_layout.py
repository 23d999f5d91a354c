"""Layouts: the drawing in `layout.py`, positions per encoding, sharing, and the empty suffix."""

import math
import re
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifuse import layout as layout_module
from minifuse.errors import UsageError
from minifuse.layout import Encoding, PackedPrompt, Part, Prompt, Span

ALONE, ALIGNED, SEQUENTIAL, CAUSAL = Encoding


def make_packed(prefix: int, segments: tuple[int, ...], suffix: int) -> PackedPrompt:
    """A request of these lengths; every token has an id of its own, unless the suffix is empty:
    then all segments end in token 7."""
    ids = iter(range(100, 100_000))

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(ids) for _ in range(count))

    segment_ids = [take(length) for length in segments]
    if not suffix:
        segment_ids = [(*token_ids[:-1], 7) for token_ids in segment_ids]
    return PackedPrompt(Prompt(take(prefix), tuple(segment_ids), take(suffix)))


def fuse(packed: PackedPrompt, encoding: Encoding, bias: float = 0.0):
    """The view of all segments."""
    count = len(packed.prompt.segment_ids)
    return packed.view(encoding, tuple(range(count)), (bias,) * count)


def rows_of(spans: dict[str, Span]) -> list[list[str]]:
    """The drawing of some spans: per line a name, then a cell for each span."""

    def cells(values_of) -> list[str]:
        return [" ".join(map(str, values_of(span))) for span in spans.values()]

    return [
        ["part", *spans],
        ["slot", *cells(lambda span: span.slots)],
        ["position", *cells(lambda span: span.positions)],
        ["label", *cells(lambda span: [span.label] * len(span.token_ids))],
    ]


def drawn_rows() -> list[list[str]]:
    """The indented lines of the module's docstring, cut at the columns where parts begin."""
    lines = [line for line in layout_module.__doc__.splitlines() if line.startswith("    ")]
    starts = [match.start() for match in re.finditer(r"(?:(?<=  )|^)\S", lines[0])]
    return [
        [line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines
    ]


def test_the_drawing():
    packed = make_packed(2, (1, 2), 1)
    view = packed.view(ALIGNED, (0, 1), (0.0, 0.0))
    spans = {
        "prefix": packed.prefix(),
        "seg 0": packed.segment(ALONE, 0),
        "seg 0'": packed.segment(ALIGNED, 0),
        "seg 1": packed.segment(ALONE, 1),
        "suffix": view.suffix,
    }
    assert rows_of(spans) == drawn_rows()
    assert view.segments == (spans["seg 0'"], spans["seg 1"])
    assert view.prefix == spans["prefix"]
    assert packed.take_pending() == [spans[n] for n in ("prefix", "seg 0", "seg 1", "suffix")]
    prefix, seg_0, copy, seg_1, suffix = (span.label for span in spans.values())
    assert packed.sees == {
        0: {0: 0.0},
        prefix: {prefix: 0.0},
        seg_0: {prefix: 0.0, seg_0: 0.0},
        copy: {prefix: 0.0, copy: 0.0},
        seg_1: {prefix: 0.0, seg_1: 0.0},
        suffix: {prefix: 0.0, copy: 0.0, seg_1: 0.0, suffix: 0.0},
    }
    (move,) = packed.take_moves()
    assert (move.source, move.target, move.turn) == (spans["seg 0"], spans["seg 0'"], 1)
    assert packed.num_slots == 8
    assert packed.num_labels == 6


@pytest.mark.parametrize(
    ("encoding", "starts", "suffix_start"),
    [
        # A prefix of 3, segments of 4, 2 and 5.
        (ALONE, (3, 3, 3), 8),
        (ALIGNED, (4, 6, 3), 8),
        (SEQUENTIAL, (3, 7, 9), 14),
        (CAUSAL, (3, 7, 9), 14),
    ],
)
def test_positions_of_each_encoding(encoding, starts, suffix_start):
    packed = make_packed(3, (4, 2, 5), 2)
    view = fuse(packed, encoding)
    assert tuple(span.first_position for span in view.segments) == starts
    assert view.suffix.positions == range(suffix_start, suffix_start + 2)
    stream = packed.stream(view)
    assert stream.first_position == suffix_start + 2


def test_a_single_view_is_the_plain_prompt():
    packed = make_packed(3, (4, 2), 2)
    view = packed.view(ALONE, (1,), (0.0,))
    positions = [*view.prefix.positions, *view.segments[0].positions, *view.suffix.positions]
    assert positions == list(range(3 + 2 + 2))


def test_who_sees_whom_in_each_encoding():
    for encoding in Encoding:
        packed = make_packed(1, (2, 2, 3), 1)
        view = fuse(packed, encoding, bias=-1.5)
        prefix = packed.prefix().label
        labels = [span.label for span in view.segments]
        moved = {move.target.label for move in packed.moves}
        for number, label in enumerate(labels):
            if label in moved:
                continue
            earlier = labels[:number] if encoding is CAUSAL else []
            assert packed.sees[label] == dict.fromkeys([prefix, *earlier, label], 0.0)
        own = view.suffix.label
        biases = dict.fromkeys(labels, -1.5)
        assert packed.sees[own] == {prefix: 0.0, **biases, own: 0.0}
        stream = packed.stream(view)
        assert packed.sees[stream.label] == {
            prefix: 0.0,
            **biases,
            own: 0.0,
            stream.label: 0.0,
        }


def test_a_bias_of_minus_infinity_hides_its_segment():
    packed = make_packed(1, (2, 2), 1)
    view = packed.view(ALONE, (0, 1), (-math.inf, 0.0))
    (seen,) = (span.label for span in view.segments)
    hidden = packed.segment(ALONE, 0).label
    for label in (view.suffix.label, packed.stream(view).label):
        assert hidden not in packed.sees[label]
        assert packed.sees[label][seen] == 0.0
    assert all(math.isfinite(b) for rule in packed.sees.values() for b in rule.values())


def test_nothing_is_placed_twice():
    packed = make_packed(2, (3, 5), 1)
    for _ in range(2):
        for encoding in Encoding:
            fuse(packed, encoding)
        for index in range(2):
            packed.view(ALONE, (index,), (0.0,))
    # Prefix; two segments alone, one moved; the sequential ones: the first is where it is alone;
    # the causal ones: the first is that same one too; six views.
    parts = [span.part for span in packed.pending]
    assert parts.count(Part.PREFIX) == 1
    assert parts.count(Part.SEGMENT) == 2 + 1 + 1
    assert parts.count(Part.SUFFIX) == 4 + 2
    assert len(packed.moves) == 1
    placed = sum(len(span.token_ids) for span in packed.pending) + 3
    assert packed.num_slots == 1 + placed


def test_equal_views_are_one_and_streams_never_are():
    packed = make_packed(2, (3, 3), 1)
    single = packed.view(ALONE, (0,), (0.0,))
    assert packed.view(ALONE, (0,), (0.0,)) == single
    # All segments are as long: aligned ones are where they are, and so is the view of them.
    assert fuse(packed, ALIGNED) == fuse(packed, ALONE)
    assert fuse(packed, ALONE, bias=-0.5).suffix != fuse(packed, ALONE).suffix
    assert packed.stream(single).label != packed.stream(single).label
    assert not packed.moves


def test_copies_of_one_segment_are_told_apart():
    """Equal texts at different indices have labels of their own: each has a weight of its own."""
    packed = PackedPrompt(Prompt((1,), ((5, 6), (5, 6)), (9,)))
    first, second = (packed.segment(ALONE, i) for i in range(2))
    assert first.label != second.label
    assert not set(first.slots) & set(second.slots)


def test_the_suffix_belongs_to_the_view():
    packed = make_packed(1, (2, 3), 2)
    for view in (fuse(packed, ALONE), packed.view(ALONE, (0,), (0.0,))):
        assert view.suffix.token_ids == packed.prompt.suffix_ids
        assert [s.token_ids for s in view.segments] == list(
            packed.prompt.segment_ids[: len(view.segments)]
        )


@pytest.mark.parametrize("encoding", [ALONE, ALIGNED])
def test_an_empty_suffix_takes_the_last_token_of_every_segment(encoding):
    packed = make_packed(2, (4, 2), 0)
    view = fuse(packed, encoding)
    assert view.suffix.token_ids == (7,)
    assert [len(span.token_ids) for span in view.segments] == [3, 1]
    # Behind the longest: the plain prompt of the longest segment, to the last position.
    assert view.suffix.positions == range(2 + 3, 2 + 4)
    single = packed.view(encoding, (1,), (0.0,))
    assert single.suffix.token_ids == (7,)
    if encoding is ALONE:
        assert single.suffix.positions == range(2 + 1, 2 + 2)


@pytest.mark.parametrize("encoding", [SEQUENTIAL, CAUSAL])
def test_an_empty_suffix_of_segments_in_a_row_takes_the_last_ones_last_token(encoding):
    segments = ((11, 12, 13), (21, 22))
    packed = PackedPrompt(Prompt((1,), segments, ()))
    view = fuse(packed, encoding)
    assert [span.token_ids for span in view.segments] == [(11, 12, 13), (21,)]
    assert view.suffix.token_ids == (22,)
    assert view.suffix.positions == range(5, 6)


@pytest.mark.parametrize("encoding", [ALONE, ALIGNED])
def test_an_empty_suffix_behind_different_ends_is_an_error(encoding):
    packed = PackedPrompt(Prompt((1,), ((5, 6), (5, 8)), ()))
    wanted = r"different tokens \(6, 8\); wanted a suffix, .* one token to answer from$"
    with pytest.raises(UsageError, match=wanted):
        fuse(packed, encoding)
    assert packed.view(encoding, (0,), (0.0,)).suffix.token_ids == (6,)


def test_an_empty_suffix_and_segments_of_one_token():
    packed = PackedPrompt(Prompt((1, 2), ((7,), (5, 7)), ()))
    for encoding in Encoding:
        view = fuse(packed, encoding)
        assert view.suffix.token_ids == (7,)
    single = packed.view(ALONE, (0,), (0.0,))
    assert single.segments[0].token_ids == ()
    assert single.suffix.positions == range(2, 3)


def test_an_empty_prefix():
    packed = make_packed(0, (2, 1), 1)
    assert packed.prefix() is None
    view = fuse(packed, ALIGNED)
    assert view.prefix is None
    assert [span.first_position for span in view.segments] == [0, 1]
    assert view.segments[0].first_slot == 1


def test_pending_and_moves_are_taken_once():
    packed = make_packed(1, (1, 2), 1)
    fuse(packed, ALIGNED)
    assert packed.take_pending()
    assert packed.take_moves()
    assert packed.take_pending() == []
    assert packed.take_moves() == []
    fuse(packed, ALIGNED)
    assert packed.take_pending() == []


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("suffix", [0, 2])
def test_segments_behind_those_of_a_view_do_not_count(encoding, suffix):
    """A view of the first ones is that of a request with no others."""
    segments = (4, 2, 5)
    packed, fewer = make_packed(3, segments, suffix), make_packed(3, segments[:2], suffix)
    fuse(packed, encoding)  # nor what was placed for a view of all
    found = packed.view(encoding, (0, 1), (0.0, 0.0))
    wanted = fuse(fewer, encoding)
    assert [s.positions for s in found.segments] == [s.positions for s in wanted.segments]
    assert [s.token_ids for s in found.segments] == [s.token_ids for s in wanted.segments]
    assert found.suffix.positions == wanted.suffix.positions
    first, second = (span.label for span in found.segments)
    assert (first in packed.sees[second]) == (encoding is CAUSAL)


def test_a_copy_goes_on_alone():
    """What it places afterwards is not in the original; what was there before is in both."""
    packed = make_packed(1, (1, 2, 3), 1)
    packed.view(ALIGNED, (0, 1), (0.0, 0.0))
    before, again = deepcopy(packed), packed.copy()
    assert again == packed
    fuse(again, ALIGNED)
    fuse(again, CAUSAL)
    changed = [name for name, value in vars(packed).items() if getattr(again, name) != value]
    assert changed == [name for name in vars(packed) if name != "prompt"]
    assert packed == before
    fuse(packed, ALIGNED)
    fuse(packed, CAUSAL)
    assert packed == again


LENGTHS = st.integers(1, 6)


@given(
    prefix=st.integers(0, 4),
    segments=st.lists(LENGTHS, min_size=1, max_size=5).map(tuple),
    suffix=st.integers(0, 3),
    encodings=st.lists(st.sampled_from(list(Encoding)), min_size=1, max_size=4, unique=True),
)
def test_any_layout(prefix, segments, suffix, encodings):
    packed = make_packed(prefix, segments, suffix)
    views = {encoding: fuse(packed, encoding, bias=-1.0) for encoding in encodings}
    singles = [packed.view(ALONE, (i,), (0.0,)) for i in range(len(segments))]
    moved = [move.target for move in packed.moves]
    spans = packed.pending + moved

    # Slots are used once, and count up from 1 without a gap.
    slots = sorted(slot for span in spans for slot in span.slots)
    assert slots == list(range(1, packed.num_slots))
    assert sorted(packed.sees) == list(range(packed.num_labels))
    assert len({span.label for span in spans}) == len(spans)
    # What runs now runs in slot order, so that everything it sees is there before it.
    assert [span.first_slot for span in packed.pending] == sorted(
        span.first_slot for span in packed.pending
    )

    by_label = {span.label: span for span in spans}
    for span in spans:
        for label in packed.sees[span.label]:
            # Nobody sees a label that lies behind it, and nobody sees padding.
            assert label != 0
            assert by_label[label].first_slot <= span.first_slot
        if span.part is Part.SEGMENT:
            seen = [by_label[label] for label in packed.sees[span.label]]
            others = [o.index for o in seen if o.part is Part.SEGMENT and o.index != span.index]
            # Segments see each other in `concat` alone, and then the earlier ones.
            assert not others or (CAUSAL in encodings and others == list(range(span.index)))
    assert packed.sees[0] == {0: 0.0}

    for encoding, view in views.items():
        end = view.suffix.first_position
        assert max(span.positions.stop for span in view.segments) == end
        for span in view.segments:
            if encoding is ALIGNED and span.token_ids:
                assert span.positions.stop == end
            if encoding is ALONE:
                assert span.first_position == prefix
    for index, view in enumerate(singles):
        plain = [*packed.prompt.prefix_ids, *packed.prompt.segment_ids[index]]
        plain += packed.prompt.suffix_ids
        parts = [span for span in (view.prefix, *view.segments, view.suffix) if span]
        assert [token for span in parts for token in span.token_ids] == plain
        assert [p for span in parts for p in span.positions] == list(range(len(plain)))


def test_generated_tokens_take_the_next_slots():
    packed = make_packed(1, (1,), 1)
    packed.stream(fuse(packed, ALONE))
    start = packed.num_slots
    assert packed.take_slots(3) == range(start, start + 3)
    assert packed.take_slots(2) == range(start + 3, start + 5)
    assert packed.num_slots == start + 5
