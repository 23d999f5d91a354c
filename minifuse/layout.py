"""Where every token of a request lies: slots, positions, labels, and which label sees which.

A slot is where a key is stored, a position the angle it was rotated by: slots count up from 1,
positions restart for every segment. Slot 0 and label 0 belong to padding. A label is one line of
the tables that say who sees whom. With a prefix of two tokens, segments of one and two, a suffix
of one, and one fused view that finds its segments aligned:

    part       prefix  seg 0  seg 0'  seg 1  suffix
    slot       1 2     3      4       5 6    7
    position   0 1     2      3       2 3    4
    label      1 1     2      3       4 4    5

seg 0' is seg 0 moved on by one position, so that both segments end right before the suffix.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from minifuse.errors import UsageError


class Encoding(StrEnum):
    """How the segments of a view are encoded and where the view finds them."""

    ALONE = "alone"  # right behind the prefix, seeing prefix and itself; read where it is
    ALIGNED = "aligned"  # the same keys, moved on so that all segments end together
    SEQUENTIAL = "sequential"  # isolated, but at positions that run on from segment to segment
    CAUSAL = "causal"  # one after the other, each seeing all before it


class Part(StrEnum):
    PREFIX = "prefix"
    SEGMENT = "segment"
    SUFFIX = "suffix"
    ANSWER = "answer"


@dataclass(frozen=True)
class Prompt:
    """A request as token ids; `prefix_ids` holds the BOS token where the tokenizer adds one."""

    prefix_ids: tuple[int, ...]
    segment_ids: tuple[tuple[int, ...], ...]
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Tokens that share a label, in consecutive slots and at consecutive positions.

    index: the segment's number, None for other parts.
    """

    part: Part
    index: int | None
    label: int
    first_slot: int
    first_position: int
    token_ids: tuple[int, ...]

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + len(self.token_ids))

    @property
    def positions(self) -> range:
        return range(self.first_position, self.first_position + len(self.token_ids))


@dataclass(frozen=True)
class Move:
    """A segment whose keys are copied to another span, rotated on by `turn` positions."""

    source: Span
    target: Span
    turn: int


@dataclass(frozen=True)
class View:
    """One copy of the suffix, and what it sees; segments with a weight of zero are left out."""

    suffix: Span
    prefix: Span | None
    segments: tuple[Span, ...]


@dataclass(frozen=True)
class Stream:
    """One line of generation behind a view: its label, and the position of its first token."""

    view: View
    label: int
    first_position: int


@dataclass
class PackedPrompt:
    """Hands out slots and labels as the parts of a request are asked for; equal parts are shared.

    sees:    for every label the labels that it sees, each with the bias on those scores
    spans:   every span that has been placed, in slot order
    pending: those not yet run through the model
    moves:   segment copies not yet made
    copies:  for the label of every such copy, made or not, that of its source
    """

    prompt: Prompt
    sees: dict[int, dict[int, float]] = field(default_factory=lambda: {0: {0: 0.0}})
    spans: list[Span] = field(default_factory=list)
    pending: list[Span] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)
    num_slots: int = 1
    num_labels: int = 1
    _shared: dict[tuple[object, ...], Span] = field(default_factory=dict)

    def copy(self) -> "PackedPrompt":
        """The same layout, to be gone on with in another way."""
        return replace(
            self,
            sees=dict(self.sees),
            spans=list(self.spans),
            pending=list(self.pending),
            moves=list(self.moves),
            copies=dict(self.copies),
            _shared=dict(self._shared),
        )

    def prefix(self) -> Span | None:
        """The shared prefix, None where it is empty."""
        if not self.prompt.prefix_ids:
            return None
        return self._encode(Part.PREFIX, None, self.prompt.prefix_ids, 0, {})

    def segment(self, encoding: Encoding, index: int, count: int | None = None) -> Span:
        """Segment `index` as `encoding` wants it; encoded, moved or shared.

        count: how many segments, from the first one on, are in sight; None for all
        """
        count = count or len(self.prompt.segment_ids)
        # Kept by name too: causal segments ask for all earlier ones.
        if (encoding, index, count) not in self._shared:
            make = self._move_segment if encoding is Encoding.ALIGNED else self._encode_segment
            self._shared[encoding, index, count] = make(encoding, index, count)
        return self._shared[encoding, index, count]

    def view(self, encoding: Encoding, indices: tuple[int, ...], biases: tuple[float, ...]) -> View:
        """The suffix behind some segments; a bias of -inf hides its segment.

        raises: UsageError where the suffix is empty and the segments end in different tokens.
        """
        segments = [self.segment(encoding, i, indices[-1] + 1) for i in indices]
        # Hidden segments keep their place: a weight of zero is the limit of a small one.
        start = max(span.positions.stop for span in segments)
        seen = {
            segment: bias
            for segment, bias in zip(segments, biases, strict=True)
            if bias > float("-inf")
        }
        sees = self._prefix_rule() | {segment.label: bias for segment, bias in seen.items()}
        token_ids = self._view_ids(encoding, indices)
        suffix = self._encode(Part.SUFFIX, None, token_ids, start, sees)
        return View(suffix, self.prefix(), tuple(seen))

    def stream(self, view: View) -> Stream:
        """A new line of generation behind a view: sees what the view sees, the view, itself."""
        label = self._new_label(self.sees[view.suffix.label])
        return Stream(view, label, view.suffix.positions.stop)

    def take_slots(self, count: int) -> range:
        """The next free slots, for generated tokens."""
        self.num_slots += count
        return range(self.num_slots - count, self.num_slots)

    def take_pending(self) -> list[Span]:
        """The spans to run now; they are no longer pending afterwards."""
        spans, self.pending = self.pending, []
        return spans

    def take_moves(self) -> list[Move]:
        """The copies to make now; they are no longer pending afterwards."""
        moves, self.moves = self.moves, []
        return moves

    def _prefix_rule(self) -> dict[int, float]:
        prefix = self.prefix()
        return {prefix.label: 0.0} if prefix else {}

    def _segment_ids(self, encoding: Encoding, index: int, count: int) -> tuple[int, ...]:
        """A segment's tokens, less those that its view takes over (see `_view_ids`)."""
        token_ids = self.prompt.segment_ids[index]
        if self.prompt.suffix_ids:
            return token_ids
        runs_on = encoding in (Encoding.SEQUENTIAL, Encoding.CAUSAL)
        is_last = index == count - 1
        return token_ids if runs_on and not is_last else token_ids[:-1]

    def _view_ids(self, encoding: Encoding, indices: tuple[int, ...]) -> tuple[int, ...]:
        """The suffix; where it is empty, the last token of the segments in front of it."""
        if self.prompt.suffix_ids:
            return self.prompt.suffix_ids
        if encoding in (Encoding.SEQUENTIAL, Encoding.CAUSAL):
            indices = indices[-1:]
        last = {self.prompt.segment_ids[i][-1] for i in indices}
        if len(last) > 1:
            raise UsageError(
                "the suffix is empty and the segments end in different tokens "
                f"({', '.join(map(str, sorted(last)))}); wanted a suffix, or segments with a "
                "common end, so that fusion has one token to answer from"
            )
        return (last.pop(),)

    def _encode_segment(self, encoding: Encoding, index: int, count: int) -> Span:
        start = len(self.prompt.prefix_ids)
        sees = self._prefix_rule()
        if encoding is not Encoding.ALONE:
            start += sum(len(self._segment_ids(encoding, i, count)) for i in range(index))
        if encoding is Encoding.CAUSAL:
            sees |= {self.segment(encoding, i, count).label: 0.0 for i in range(index)}
        token_ids = self._segment_ids(encoding, index, count)
        return self._encode(Part.SEGMENT, index, token_ids, start, sees)

    def _move_segment(self, _: Encoding, index: int, count: int) -> Span:
        alone = self.segment(Encoding.ALONE, index)
        lengths = [len(self._segment_ids(Encoding.ALONE, i, count)) for i in range(count)]
        turn = max(lengths) - len(alone.token_ids)
        if turn == 0 or not alone.token_ids:
            return alone
        if (Move, index, turn) not in self._shared:
            label = self._new_label(self._prefix_rule())
            position = alone.first_position + turn
            target = self._place(Part.SEGMENT, index, label, alone.token_ids, position)
            self.moves.append(Move(alone, target, turn))
            self.copies[label] = alone.label
            self._shared[Move, index, turn] = target
        return self._shared[Move, index, turn]

    def _encode(
        self,
        part: Part,
        index: int | None,
        token_ids: tuple[int, ...],
        position: int,
        sees: dict[int, float],
    ) -> Span:
        """A span that the model has to run; one for equal tokens in equal sight."""
        key = (part, index, token_ids, position, tuple(sees.items()))
        if key not in self._shared:
            span = self._place(part, index, self._new_label(sees), token_ids, position)
            self.pending.append(span)
            self._shared[key] = span
        return self._shared[key]

    def _place(
        self, part: Part, index: int | None, label: int, token_ids: tuple[int, ...], position: int
    ) -> Span:
        slots = self.take_slots(len(token_ids))
        span = Span(part, index, label, slots.start, position, token_ids)
        self.spans.append(span)
        return span

    def _new_label(self, sees: dict[int, float]) -> int:
        label = self.num_labels
        self.num_labels += 1
        self.sees[label] = {**sees, label: 0.0}
        return label
