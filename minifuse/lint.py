"""What is odd about a layout and its tables: a line each, with what it does to the answer.

    for remark in lint(packed, streams, bos_ids=tokenizer.bos_ids):
        print(remark)

Layouts of any making are taken, from `layout.PackedPrompt` or changed by hand; nothing here knows
methods. Single prompts come out clean, and so does `fused`. The published recipe (`fused_plain`)
does not: its segments stand where they would not stand alone, and weigh as N prompts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from minifuse.layout import PackedPrompt, Part, Span, Stream, View

# Segments whose weights sum to one but for so much are balanced.
BALANCE_TOLERANCE = 1e-6


class Fault(StrEnum):
    """What a remark is about."""

    LEAK = "leak"
    BLIND = "sees nothing"
    UNREAD = "unread"
    BOS = "BOS"
    JUMP = "jump"
    OVERLAP = "overlap"
    NOT_FUSED = "first token not fused"
    BALANCE = "no balance"


@dataclass(frozen=True)
class Remark:
    """One thing that is odd, and what it does to the answer."""

    fault: Fault
    text: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.text}"


def lint(
    packed: PackedPrompt, streams: Sequence[Stream], bos_ids: Sequence[int] = ()
) -> list[Remark]:
    """Everything that is odd about what the streams read, each thing once.

    bos_ids: what the tokenizer puts before a text
    """
    views = list(dict.fromkeys(stream.view for stream in streams))
    remarks = [
        *_find_leaks(packed),
        *_find_blind(packed, streams),
        *_find_unread(packed, streams),
        *_find_bos(packed, bos_ids),
        *_find_jumps(packed, views),
        *_find_overlaps(packed),
        *(remark for stream in streams for remark in _find_unfused(packed, stream)),
        *(remark for view in views for remark in _find_unbalanced(packed, view)),
    ]
    return list(dict.fromkeys(remarks))


def name_of(span: Span) -> str:
    """What a part is called in messages; segments count from 1."""
    return str(span.part) if span.index is None else f"{span.part} {span.index + 1}"


def _find_leaks(packed: PackedPrompt) -> Iterator[Remark]:
    for span, other in _seen_pairs(packed):
        if span.part is other.part is Part.SEGMENT and span.index != other.index:
            yield Remark(
                Fault.LEAK,
                f"{name_of(span)} sees {name_of(other)}: it is encoded with that text in mind, so "
                "the answer depends on the order of the segments",
            )


def _find_blind(packed: PackedPrompt, streams: Sequence[Stream]) -> Iterator[Remark]:
    rows = {span.label: name_of(span) for span in packed.spans}
    for label, name in {**rows, **{stream.label: "an answer" for stream in streams}}.items():
        if not packed.sees.get(label):
            yield Remark(
                Fault.BLIND,
                f"{name} sees no key, not even its own: its attention is a mean of nothing, and "
                "what reads it reads zeros or NaN",
            )


def _find_unread(packed: PackedPrompt, streams: Sequence[Stream]) -> Iterator[Remark]:
    """Parts that no answer sees, nor what it sees, nor as a moved copy."""
    read: set[int] = set()
    rows = [label for s in streams for label in (s.label, s.view.suffix.label)]
    while rows:
        row = rows.pop()
        # That a row of the suffix sees its own is no reader.
        seen = {key for key in packed.sees.get(row, {}) if key != row} - read
        seen |= {packed.copies[key] for key in seen if key in packed.copies} - read
        read |= seen
        rows += seen
    used = {stream.view.suffix.label for stream in streams}
    for span in packed.spans:
        is_spare = span.part is Part.SUFFIX and span.label not in used
        if span.label not in read and not is_spare:
            yield Remark(
                Fault.UNREAD,
                f"no answer sees {name_of(span)}: it is computed in vain and has no say"
                if span.part is not Part.SUFFIX
                else "the answer does not see the suffix: it has no say behind the first token",
            )


def _find_bos(packed: PackedPrompt, bos_ids: Sequence[int]) -> Iterator[Remark]:
    if not bos_ids or not packed.spans:
        return
    first = packed.spans[0]
    if first.token_ids[: len(bos_ids)] != tuple(bos_ids):
        yield Remark(
            Fault.BOS,
            f"the prompt does not begin with what the tokenizer puts before a text "
            f"({', '.join(map(str, bos_ids))}): the model has hardly seen such texts",
        )
        return
    for span in packed.spans[1:]:
        if first.label not in packed.sees.get(span.label, {}):
            yield Remark(
                Fault.BOS,
                f"{name_of(span)} cannot see the BOS token: attention that would rest there goes "
                "to other tokens",
            )


def _find_jumps(packed: PackedPrompt, views: Sequence[View]) -> Iterator[Remark]:
    for span, seen in _seen_by_span(packed):
        end = max((other.positions.stop for other in seen), default=0)
        if (
            span.part is Part.SEGMENT
            and span.label not in packed.copies
            and span.first_position > end
        ):
            yield Remark(
                Fault.JUMP,
                f"{name_of(span)} is encoded at position {span.first_position}, "
                f"{span.first_position - end} behind all that it sees: not as it would be alone",
            )
    for view in views:
        starts = {span.first_position for span in (*view.segments, view.suffix)}
        for span in view.segments:
            if span.positions.stop not in starts:
                gap = view.suffix.first_position - span.positions.stop
                yield Remark(
                    Fault.JUMP,
                    f"{name_of(span)} ends {gap} positions before the suffix: it counts as further "
                    "away than it would alone",
                )


def _find_overlaps(packed: PackedPrompt) -> Iterator[Remark]:
    for span, other in _seen_pairs(packed):
        shared = range(
            max(span.first_position, other.first_position),
            min(span.positions.stop, other.positions.stop),
        )
        if shared:
            yield Remark(
                Fault.OVERLAP,
                f"{name_of(span)} sees {name_of(other)} at positions of its own ({shared.start} to "
                f"{shared.stop - 1}): the model cannot tell which of the two comes first",
            )


def _find_unfused(packed: PackedPrompt, stream: Stream) -> Iterator[Remark]:
    segments = {span.label for span in packed.spans if span.part is Part.SEGMENT}
    first = segments & packed.sees[stream.view.suffix.label].keys()
    later = segments & packed.sees[stream.label].keys()
    if first != later:
        yield Remark(
            Fault.NOT_FUSED,
            f"the first token is predicted by a row that sees {len(first)} segments, later ones "
            f"by rows that see {len(later)}: for one-word answers nothing else counts",
        )


def _find_unbalanced(packed: PackedPrompt, view: View) -> Iterator[Remark]:
    rule = packed.sees[view.suffix.label]
    seen = [span.label for span in view.segments if span.label in rule]
    total = sum(math.exp(rule[label]) for label in seen)
    if len(seen) > 1 and abs(total - 1) > BALANCE_TOLERANCE:
        yield Remark(
            Fault.BALANCE,
            f"{len(seen)} segments weigh as {total:.3g} prompts: the answer attends to "
            f"the question {total:.3g} times as strongly as behind one",
        )


def _seen_by_span(packed: PackedPrompt) -> Iterator[tuple[Span, list[Span]]]:
    """Every span with the others that it sees."""
    for span in packed.spans:
        rule: Mapping[int, float] = packed.sees.get(span.label, {})
        yield span, [o for o in packed.spans if o.label in rule and o.label != span.label]


def _seen_pairs(packed: PackedPrompt) -> Iterator[tuple[Span, Span]]:
    return ((span, other) for span, seen in _seen_by_span(packed) for other in seen)
