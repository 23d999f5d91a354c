"""A request laid open, drawn: as text for a terminal, as SVG or PNG for paper.

Letters as in `inspection`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minifuse.executor import PREFILL_BLOCK
from minifuse.figures import make_figure, save_figure
from minifuse.inspection import FULL, PARTIAL, SKIPPED, AttentionOf, Inspection, Piece
from minifuse.layout import Part
from minifuse.model import KV_BLOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More tokens than that do not fit beside each other in a terminal, nor do their names in a figure.
MAX_TEXT_TOKENS = 160
_MAX_NAMED_TOKENS = 70

_SEEN, _HIDDEN = "■", "·"
_BIASED = "abcdefghijklmnopqrstuvwxyz"
_BLOCKS = {SKIPPED: "·", PARTIAL: "◧", FULL: "■"}
_COLOURS = {Part.PREFIX: "#808080", Part.SUFFIX: "#c9601a", Part.ANSWER: "#2b9a5b"}
_SEGMENT_COLOURS = ("#3b7dd8", "#7fb0ec")


# Text


def format_inspection(inspection: Inspection, *, by_layer: bool = False) -> str:
    """Layout, tables, blocks, attention and remarks as text.

    by_layer: attention of every layer, too
    """
    sections = (
        ("layout", _layout_lines(inspection)),
        ("who sees whom, by part", _part_lines(inspection)),
        ("who sees whom, by token", _token_lines(inspection)),
        ("blocks that attention visits", _block_lines(inspection)),
        ("attention", _attention_lines(inspection, by_layer=by_layer)),
        ("what is odd about it", _remark_lines(inspection)),
    )
    return "\n\n".join("\n".join([name.upper(), *lines]) for name, lines in sections)


def _layout_lines(inspection: Inspection) -> list[str]:
    rows = [["part", "label", "slots", "positions", "text"]]
    for piece in inspection.pieces:
        slots, positions = _span(piece.slots), _span(piece.positions)
        text = visible_text("".join(piece.texts))
        rows.append([piece.name, str(piece.label), slots, positions, _clip(text, 60)])
    return _columns(rows, right=(1,))


def _span(numbers: Sequence[int]) -> str:
    """Runs of numbers, such as 3-5 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"


def _part_lines(inspection: Inspection) -> list[str]:
    """A row for each piece: the bias on its last token's scores with each other piece's first."""
    pieces = [piece for piece in inspection.pieces if piece.slots]
    ends = torch.tensor([len(piece.slots) for piece in pieces]).cumsum(0).tolist()
    order = [slot for piece in pieces for slot in piece.slots]
    places = {slot: place for place, slot in enumerate(sorted(order))}
    lasts = [places[order[end - 1]] for end in ends]
    firsts = [places[piece.slots[0]] for piece in pieces]
    rows = [["", *(str(number) for number in range(1, len(pieces) + 1))]]
    for number, (piece, last) in enumerate(zip(pieces, lasts, strict=True), 1):
        cells = [_bias_cell(float(inspection.bias[last, first])) for first in firsts]
        rows.append([f"{number} {piece.name}", *cells])
    return [
        *_columns(rows, right=range(1, len(pieces) + 1)),
        "rows see columns: what is added to their scores; 0 sees, a dot does not",
    ]


def _bias_cell(bias: float) -> str:
    if bias == -math.inf:
        return _HIDDEN
    return "0" if bias == 0 else f"{bias:.2f}"


def _token_lines(inspection: Inspection) -> Iterator[str]:
    if inspection.num_tokens > MAX_TEXT_TOKENS:
        yield (
            f"{inspection.num_tokens} tokens are too many to draw here (at most "
            f"{MAX_TEXT_TOKENS}); --output FILE.svg draws them"
        )
        return
    glyphs = _glyphs_of(inspection.bias)
    names, ends = _names_of_tokens(inspection)
    for title, bias in inspection.tables.items():
        yield from _titled(inspection, title)
        for place, (name, row) in enumerate(zip(names, bias.tolist(), strict=True)):
            cells = "".join(
                ("|" if column in ends else "") + glyphs[value] for column, value in enumerate(row)
            )
            yield f"{'-' if place in ends else ' '}{name:>24} {cells}"
    legend = [f"{_SEEN} seen", f"{_HIDDEN} hidden"]
    legend += [
        f"{glyph} seen, {value:+.2f} (weighs {math.exp(value):.3g})"
        for value, glyph in glyphs.items()
        if glyph not in (_SEEN, _HIDDEN)
    ]
    yield f"{'':25} {'; '.join(legend)}"


def _glyphs_of(bias: Tensor) -> dict[float, str]:
    values = sorted(set(bias.flatten().tolist()) - {0.0, -math.inf}, reverse=True)
    # More values than letters share the last one.
    found = {value: _BIASED[min(place, len(_BIASED) - 1)] for place, value in enumerate(values)}
    return {0.0: _SEEN, -math.inf: _HIDDEN, **found}


def _names_of_tokens(inspection: Inspection) -> tuple[list[str], set[int]]:
    """A name for every token in slot order, and the places where another piece begins."""
    by_slot = _pieces_by_slot(inspection)
    names, starts, before = [], set(), None
    for place, (slot, (piece, text)) in enumerate(sorted(by_slot.items())):
        if piece is not before and before is not None:
            starts.add(place)
        before = piece
        names.append(f"{slot} {_clip(visible_text(text), 18)}")
    return names, starts


def _pieces_by_slot(inspection: Inspection) -> dict[int, tuple[Piece, str]]:
    return {
        slot: (piece, text)
        for piece in inspection.pieces
        for slot, text in zip(piece.slots, piece.texts, strict=False)
    }


def _block_lines(inspection: Inspection) -> Iterator[str]:
    slots = sorted(_pieces_by_slot(inspection))
    for title, bias in inspection.tables.items():
        yield from _titled(inspection, title)
        blocks = inspection.blocks(PREFILL_BLOCK, bias)
        for row, states in enumerate(blocks.tolist()):
            own = slots[row * PREFILL_BLOCK : (row + 1) * PREFILL_BLOCK]
            yield f" {f'slots {own[0]}-{own[-1]}':>24} {' '.join(_BLOCKS[s] for s in states)}"
        counts = torch.bincount(blocks.flatten(), minlength=3).tolist()
        yield (
            f"{'':25} rows of {PREFILL_BLOCK} tokens by blocks of the cache; "
            f"{_BLOCKS[SKIPPED]} skipped {counts[SKIPPED]}, {_BLOCKS[PARTIAL]} partly seen "
            f"{counts[PARTIAL]}, {_BLOCKS[FULL]} full {counts[FULL]}"
        )


def _titled(inspection: Inspection, title: str) -> list[str]:
    return [title] if len(inspection.tables) > 1 else []


def _attention_lines(inspection: Inspection, *, by_layer: bool) -> Iterator[str]:
    for found in inspection.attention:
        head = [found.name, *found.parts]
        tokens = found.mass.mean(0)
        rows = [
            head,
            *(
                [f"  {_clip(visible_text(text), 24)}", *map(_share, shares)]
                for text, shares in zip(found.texts, tokens.tolist(), strict=True)
            ),
        ]
        if len(found.texts) > 1:
            rows.append(["  all tokens", *map(_share, tokens.mean(0).tolist())])
        if by_layer:
            rows += [
                [f"  layer {layer}", *map(_share, shares)]
                for layer, shares in enumerate(found.mass.mean(1).tolist())
            ]
        yield from _columns(rows, right=range(1, len(head)))
    yield "shares of attention, means over layers and heads, of what predicted each token"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _remark_lines(inspection: Inspection) -> list[str]:
    return [str(remark) for remark in inspection.remarks] or ["nothing"]


def visible_text(text: str) -> str:
    """One line in which spaces and newlines show; what cannot be printed is escaped."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# Figures


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Layout, table and attention as SVG, PNG or PDF; the name's end says which.

    raises: MinifuseError where matplotlib is missing or the file cannot be written
    """
    tables = inspection.tables
    heights = [1.5, *[6.0] * len(tables)]
    heights += [0.9 + 0.17 * _num_rows(found) for found in inspection.attention]
    figure = make_figure(8.5, sum(heights) + 0.5 * (len(heights) - 1), "--output")
    import matplotlib.style

    with matplotlib.style.context(["default", {"font.size": 8, "text.parse_math": False}]):
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        _draw_layout(figure.add_subplot(grid[0, :]), inspection)
        for row, title in enumerate(tables, 1):
            _draw_table(figure.add_subplot(grid[row, :]), inspection, title)
        for row, found in enumerate(inspection.attention, 1 + len(tables)):
            names = [visible_text(text) for text in found.texts]
            _draw_shares(figure.add_subplot(grid[row, 0]), found, names, found.mass.mean(0))
            layers = [f"layer {n}" for n in range(len(found.mass))]
            _draw_shares(figure.add_subplot(grid[row, 1]), found, layers, found.mass.mean(1))
        save_figure(figure, path)


def _num_rows(found: AttentionOf) -> int:
    return max(found.mass.shape[:2])


def _colour_of(piece: Piece, segments: dict[int, int]) -> str:
    """Segments take turns, so that neighbours differ."""
    if piece.kind is not Part.SEGMENT:
        return _COLOURS[piece.kind]
    number = segments.setdefault(piece.label, len(segments))
    return _SEGMENT_COLOURS[number % len(_SEGMENT_COLOURS)]


def _draw_layout(axes: "Axes", inspection: Inspection) -> None:
    """Tokens as squares: where they are stored, and the position they have there."""
    segments: dict[int, int] = {}
    for piece in inspection.pieces:
        pairs = list(zip(piece.slots, piece.positions, strict=False))
        if not pairs:
            continue
        colour = _colour_of(piece, segments)
        hatch = "////" if piece.name.partition(" (")[0].endswith("moved") else None
        axes.bar(
            [slot for slot, _ in pairs],
            [1] * len(pairs),
            bottom=[position for _, position in pairs],
            width=1,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3,
        )
        slot, position = pairs[len(pairs) // 2]
        axes.annotate(
            _short(piece.name),
            (slot, position + 1),
            xytext=(0, 6),
            textcoords="offset points",
            rotation=60,
            fontsize=6.5,
        )
    axes.set_xlabel("slot")
    axes.set_ylabel("position")
    axes.margins(y=0.6)
    axes.set_title("Where tokens are stored, and the positions they have", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name.replace("segment ", "seg ").replace("answer of ", "")


def _draw_table(axes: "Axes", inspection: Inspection, title: str) -> None:
    bias = inspection.tables[title]
    weights = torch.where(bias > -torch.inf, bias.exp(), torch.tensor(torch.nan))
    most = float(weights.nan_to_num().max())
    image = axes.imshow(
        weights.numpy(),
        cmap="Blues",
        vmin=-0.35 * most,  # the smallest weight is still seen
        vmax=most,
        interpolation="nearest",
        aspect="auto",
    )
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("weight, exp(bias); white: hidden")
    bar.ax.set_ylim(0, most)
    names, starts = _names_of_tokens(inspection)
    for start in starts:
        axes.axhline(start - 0.5, color="#888888", linewidth=0.5)
        axes.axvline(start - 0.5, color="#888888", linewidth=0.5)
    _draw_blocks(axes, inspection, bias)
    if len(names) <= _MAX_NAMED_TOKENS:
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_title(
        f"Who sees whom, {title}; hatched: blocks ({PREFILL_BLOCK} queries by {KV_BLOCK} slots) "
        "that attention skips",
        fontsize=9,
    )


def _draw_blocks(axes: "Axes", inspection: Inspection, bias: Tensor) -> None:
    from matplotlib.patches import Rectangle

    places = torch.tensor(inspection.key_blocks)
    changes = [0, *((places.diff() != 0).nonzero().flatten() + 1).tolist(), len(places)]
    for row, states in enumerate(inspection.blocks(PREFILL_BLOCK, bias).tolist()):
        top = row * PREFILL_BLOCK
        height = min(PREFILL_BLOCK, len(places) - top)
        for start, end in itertools.pairwise(changes):
            if states[inspection.key_blocks[start]] == SKIPPED:
                axes.add_patch(
                    Rectangle(
                        (start - 0.5, top - 0.5),
                        end - start,
                        height,
                        fill=False,
                        hatch="...",
                        edgecolor="#bbbbbb",
                        linewidth=0.4,
                    )
                )


def _draw_shares(axes: "Axes", found: AttentionOf, names: list[str], shares: Tensor) -> None:
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares.tolist()):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_xticks(range(len(found.parts)), [_short(part) for part in found.parts], fontsize=6.5)
    axes.set_ylim(_num_rows(found) - 0.5, -0.5)  # rows of one height on both sides
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title(f"{found.name}: % of attention", fontsize=8)
