"""A request laid open: what lies where, who sees whom, and what the answers attended to.

The tables are those that attention is given, cut down to one request: nothing is drawn from what
the layout meant to say. T tokens of the request, L layers, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minifuse.answers import Results
from minifuse.config import ModelConfig
from minifuse.executor import PREFILL_BLOCK
from minifuse.layout import PackedPrompt, Part, Span
from minifuse.lint import Remark, lint, name_of
from minifuse.masks import Labels, make_dense_bias, make_tables, write_rules
from minifuse.model import KV_BLOCK
from minifuse.request import AnswerState, Job, Line
from minifuse.tokenizer import Tokenizer

# What a block of the tables is to attention.
SKIPPED, PARTIAL, FULL = range(3)


@dataclass(frozen=True)
class Piece:
    """A part of the request, or what one stream has answered, in consecutive slots.

    kind:   what it is a piece of
    name:   unique in the request, segments counted from 1
    slots:  the request's own; for an answer those of its tokens that were run
    texts:  each token's text
    """

    kind: Part
    name: str
    label: int
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class AttentionOf:
    """What one stream of an answer attended to, while it predicted each of the tokens.

    name:  of the answer, and of the stream where there are several
    texts: of the n tokens that were predicted
    parts: names of the P parts
    mass:  f32[L, n, P], the mean over heads; sums to one over the parts
    """

    name: str
    texts: tuple[str, ...]
    parts: tuple[str, ...]
    mass: Tensor


@dataclass(frozen=True)
class Inspection:
    """A request that was answered, laid open.

    pieces:    in slot order
    bias:      f32[T, T], what is added to the score of a query (row) and a key, -inf where it is
               hidden; tokens in slot order
    near_bias: the same for layers with a sliding window, None where there are none
    key_blocks, num_key_blocks: in which block of the cache each token lies, and how many there are
    remarks:   what is odd about the layout
    results:   what `Fuser.generate` gives, attribution included
    """

    pieces: tuple[Piece, ...]
    bias: Tensor
    near_bias: Tensor | None
    key_blocks: tuple[int, ...]
    num_key_blocks: int
    attention: tuple[AttentionOf, ...]
    remarks: tuple[Remark, ...]
    results: Results

    @property
    def num_tokens(self) -> int:
        return len(self.key_blocks)

    @property
    def tables(self) -> dict[str, Tensor]:
        """`bias`, and `near_bias` where there is one, by the layers that they are for."""
        if self.near_bias is None:
            return {"all layers": self.bias}
        return {
            "layers without a window": self.bias,
            "layers with a sliding window": self.near_bias,
        }

    def blocks(self, query_tokens: int, bias: Tensor) -> Tensor:
        """SKIPPED, PARTIAL or FULL, i64[Q, J]: rows of so many tokens by blocks of the cache.

        Attention skips a block where none of its pairs is visible; it is full where all are. The
        last rows may be fewer.

        bias: one of `tables`
        """
        visible = bias > -torch.inf
        places = torch.tensor(self.key_blocks)
        states = torch.zeros(-(-self.num_tokens // query_tokens), self.num_key_blocks).long()
        for row, queries in enumerate(visible.split(query_tokens)):
            for block in places.unique().tolist():
                pairs = queries[:, places == block]
                # What lies in the block and is not the request's is hidden.
                is_full = bool(pairs.all()) and pairs.shape[1] == KV_BLOCK
                states[row, block] = FULL if is_full else PARTIAL if pairs.any() else SKIPPED
        return states

    def to_json(self) -> dict:
        """All of it in plain values. Hidden pairs are null; blocks are skipped, partly seen or full
        (0, 1, 2), a row for so many queries as a prefill has them."""
        return {
            "pieces": [
                {
                    "part": piece.kind,
                    "name": piece.name,
                    "label": piece.label,
                    "slots": list(piece.slots),
                    "positions": list(piece.positions),
                    "token_ids": list(piece.token_ids),
                    "texts": list(piece.texts),
                }
                for piece in self.pieces
            ],
            "bias": _table(self.bias),
            "near_bias": None if self.near_bias is None else _table(self.near_bias),
            "key_blocks": list(self.key_blocks),
            "num_key_blocks": self.num_key_blocks,
            "blocks": {
                name: self.blocks(PREFILL_BLOCK, bias).tolist()
                for name, bias in self.tables.items()
            },
            "attention": [
                {
                    "answer": found.name,
                    "tokens": list(found.texts),
                    "parts": list(found.parts),
                    "mass": found.mass.tolist(),
                }
                for found in self.attention
            ],
            "remarks": [{"fault": r.fault, "text": r.text} for r in self.remarks],
            "results": [
                result.to_json()
                for value in self.results.values()
                for result in (value if isinstance(value, list) else [value])
            ],
        }


def _table(bias: Tensor) -> list[list[float | None]]:
    return [[None if value == -torch.inf else value for value in row] for row in bias.tolist()]


def inspect_job(
    job: Job, results: Results, tokenizer: Tokenizer, config: ModelConfig, num_slots: int
) -> Inspection:
    """Lay a job open that was answered with attribution.

    num_slots: of the pool that it ran in
    """
    packed, states = job.packed, list(job.states.values())
    pieces = [*_pieces_of(packed, tokenizer), *_answers_of(states, tokenizer)]
    placed = sorted(
        (slot, position, piece.label)
        for piece in pieces
        for slot, position in zip(piece.slots, piece.positions, strict=False)
    )
    slots, positions, labels = map(torch.tensor, zip(*placed, strict=True))
    bias, near_bias = _biases_of(packed, config, slots, positions, labels)
    streams = list(dict.fromkeys(line.stream for state in states for line in state.lines))
    lease_slots = job.held.slots
    return Inspection(
        pieces=tuple(sorted(pieces, key=lambda piece: piece.slots[:1] or (num_slots,))),
        bias=bias,
        near_bias=near_bias,
        key_blocks=tuple(lease_slots[slot] // KV_BLOCK for slot, *_ in placed),
        num_key_blocks=num_slots // KV_BLOCK,
        attention=tuple(
            found for state in states for found in _attention_of(state, job, tokenizer)
        ),
        remarks=tuple(lint(packed, streams, tokenizer.bos_ids)),
        results=results,
    )


def _biases_of(
    packed: PackedPrompt, config: ModelConfig, slots: Tensor, positions: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    tables = make_tables(packed.num_labels, torch.device("cpu"))
    write_rules(tables, packed.sees)
    # Keys of every slot up to the last; those that are empty are dropped again.
    key_labels = torch.zeros(int(slots.max()) + 1, dtype=torch.int32)
    key_positions = torch.zeros(len(key_labels), dtype=torch.long)
    key_labels[slots], key_positions[slots] = labels.int(), positions
    known = Labels(labels.int(), slots, positions, key_labels, key_positions)
    bias = make_dense_bias(known, tables)[:, slots]
    if not config.sliding_layers:
        return bias, None
    return bias, make_dense_bias(known, tables, config.sliding_window)[:, slots]


def _pieces_of(packed: PackedPrompt, tokenizer: Tokenizer) -> list[Piece]:
    suffixes = [span for span in packed.spans if span.part is Part.SUFFIX]
    names: dict[int, str] = {span.label: name_of(span) for span in packed.spans}
    for number, span in enumerate(suffixes, 1):
        if len(suffixes) > 1:
            names[span.label] = f"suffix, view {number}"
    counts: dict[str, int] = {}
    for span in packed.spans:
        name = f"{names[span.label]}, moved" if span.label in packed.copies else names[span.label]
        counts[name] = counts.get(name, 0) + 1
        names[span.label] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return [_piece(span, names[span.label], tokenizer) for span in packed.spans if span.token_ids]


def _piece(span: Span, name: str, tokenizer: Tokenizer) -> Piece:
    return Piece(
        span.part,
        name,
        span.label,
        tuple(span.slots),
        tuple(span.positions),
        span.token_ids,
        _texts_of(span.token_ids, tokenizer),
    )


def _texts_of(token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Each token by itself; one that is a part of a character as the vocabulary writes it."""
    texts = []
    for token_id in token_ids:
        text = tokenizer.decode([token_id])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = tokenizer.token_of(token_id) or f"<{token_id}>"
        texts.append(text)
    return tuple(texts)


def _answers_of(states: Sequence[AnswerState], tokenizer: Tokenizer) -> list[Piece]:
    """One for each line; answers that share a line have its tokens in common."""
    users: dict[int, tuple[Line, list[AnswerState]]] = {}
    for state in states:
        for line in state.lines:
            users.setdefault(id(line), (line, []))[1].append(state)
    pieces = []
    for line, sharing in users.values():
        token_ids = max((tuple(s.builder.token_ids) for s in sharing), key=len)
        start = line.stream.first_position
        names = dict.fromkeys(_name_of_answer(state) for state in sharing)
        number = sharing[0].lines.index(line) + 1
        stream = f", stream {number}" if len(sharing[0].lines) > 1 else ""
        pieces.append(
            Piece(
                Part.ANSWER,
                f"answer of {' and '.join(names)}{stream}",
                line.stream.label,
                tuple(line.slots),
                tuple(range(start, start + len(token_ids))),
                token_ids,
                _texts_of(token_ids, tokenizer),
            )
        )
    return pieces


def _name_of_answer(state: AnswerState) -> str:
    """Of a single prompt's answer its segment: methods that need the same one share it."""
    answer = state.answer
    return str(answer.method) if answer.index is None else f"segment {answer.index + 1} alone"


def _attention_of(state: AnswerState, job: Job, tokenizer: Tokenizer) -> list[AttentionOf]:
    parts = ["prefix", "suffix", "answer"]
    segments = [f"segment {number}" for number in range(1, job.num_segments + 1)]
    texts = _texts_of(state.builder.token_ids, tokenizer)
    found = []
    for number, mass in enumerate(state.attention, 1):
        name = _name_of_answer(state)
        if len(state.attention) > 1:
            name = f"{name}, stream {number}"
        # In the order in which they lie: the segments behind the prefix.
        order = [0, *range(3, 3 + len(segments)), 1, 2]
        names = (parts[0], *segments, *parts[1:])
        found.append(AttentionOf(name, texts, names, mass[..., order]))
    return found
