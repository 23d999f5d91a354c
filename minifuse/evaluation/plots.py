"""Plots of a run as SVG that stands inside an HTML page.

Ink takes the page's text colour, so that light, dark and print need one file; whatever a colour
says, a marker, a dash pattern or a number says too. The same input gives the same bytes.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from minifuse.methods import SPECS, FusionMethod, Reduction, Sees

_WIDTH = 7.2  # inches
# Each has a contrast of at least 3.5 to white and to the page's dark background.
_COLORS = ("#3b7dd8", "#c9601a", "#2b9a5b", "#a05ac8", "#808080", "#a67c00")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS: dict[str, str] = dict(zip(FusionMethod, "os^vDPX*<>phd8", strict=True))
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_SHADES = (0.08, 0.2, 0.36, 0.54, 0.75)  # opacity of the heat map's groups
_STYLE: list[str | dict[str, Any]] = [
    "default",  # whatever a user's matplotlibrc says
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "minifuse",
        "text.parse_math": False,  # a dollar sign in a question is a dollar sign
        "font.family": "DejaVu Sans",  # measures the text; the page may choose another
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    },
]


@dataclass(frozen=True)
class Point:
    """A value over x, with its interval where there is one; size: of its marker, in points."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    size: float = 4.5


def family_of(method: str) -> str:
    """The group in which a method is drawn: single prompts, ensembles, or one-pass fusion."""
    spec = SPECS[FusionMethod(method)]
    if spec.sees is Sees.ALL:
        return "one-pass fusion"
    is_ensemble = spec.reduction is not Reduction.NONE or method == FusionMethod.VOTE
    return "ensembles" if is_ensemble else "single prompts"


def draw_curves(
    measures: Mapping[str, Mapping[str, Sequence[Point]]],
    *,
    name: str,
    title: str,
    x_label: str,
    is_calibration: bool = False,
) -> Markup:
    """One row of panels a measure and one column a family, a line with its band a method.

    measures: {label of the y axis: {method: its points by rising x}}
    """
    methods = list(dict.fromkeys(method for curves in measures.values() for method in curves))
    families = _by_family(methods)
    with matplotlib.style.context(_STYLE):
        size = (_WIDTH, 1.2 + 2.2 * len(measures))
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(
            len(measures), len(families), squeeze=False, sharex=True, sharey="row"
        )
        for row, (label, curves) in zip(grid, measures.items(), strict=True):
            for axes, members in zip(row, families.values(), strict=True):
                if is_calibration:
                    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.6, alpha=0.5)
                for place, method in enumerate(members):
                    _draw_curve(axes, method, place, curves.get(method, ()))
                axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
                if not is_calibration:
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            row[0].set_ylabel(label)
        for axes, family in zip(grid[0], families, strict=True):
            axes.set_title(family)
        for axes in grid[-1]:
            axes.set_xlabel(x_label)
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24)}
            axes.legend(fontsize=7.5, handlelength=3.2, **below)
        told = [
            f"{method}, {label}: "
            + ", ".join(f"{point.y:.3f} at {point.x:g}" for point in curves.get(method, ()))
            for label, curves in measures.items()
            for method in methods
        ]
        return _to_svg(figure, name, title, "; ".join(told))


def _draw_curve(axes: Axes, method: str, place: int, points: Sequence[Point]) -> None:
    color = _COLORS[place % len(_COLORS)]
    x = [point.x for point in points]
    axes.plot(
        x,
        [point.y for point in points],
        color=color,
        linestyle=_DASHES[place % len(_DASHES)],
        linewidth=1.4,
    )
    for point in points:
        axes.plot(
            point.x, point.y, color=color, marker=_MARKERS[method], markersize=point.size, alpha=0.9
        )
    banded = [
        (point.x, point.low, point.high)
        for point in points
        if point.low is not None and point.high is not None
    ]
    if banded:
        axes.fill_between(
            [x for x, _, _ in banded],
            [low for _, low, _ in banded],
            [high for _, _, high in banded],
            color=color,
            alpha=0.13,
            linewidth=0,
        )
    axes.plot(
        [],
        color=color,
        linestyle=_DASHES[place % len(_DASHES)],
        linewidth=1.4,
        marker=_MARKERS[method],
        label=method,
    )


def draw_costs(
    costs: Mapping[str, Mapping[str, Point]], *, name: str, title: str, y_label: str
) -> Markup:
    """A panel for each kind of cost, a marker with its interval for each method.

    costs: {label of the x axis: {method: point}}
    """
    methods = list(dict.fromkeys(method for points in costs.values() for method in points))
    families = list(_by_family(methods))
    with matplotlib.style.context(_STYLE):
        figure = Figure((_WIDTH, 3.6), layout="constrained")
        row = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
        for axes, (label, points) in zip(row, costs.items(), strict=True):
            for method, point in points.items():
                color = _COLORS[families.index(family_of(method))]
                if point.low is not None and point.high is not None:
                    axes.plot(
                        [point.x] * 2, [point.low, point.high], color=color, alpha=0.4, linewidth=1
                    )
                axes.plot(point.x, point.y, color=color, marker=_MARKERS[method], markersize=6.5)
            axes.set_xlabel(label)
            axes.set_xlim(0, 1.1 * max(point.x for point in points.values()) or 1)
            axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        row[0].set_ylabel(y_label)
        handles = [
            Line2D(
                [],
                [],
                color=_COLORS[families.index(family_of(method))],
                marker=_MARKERS[method],
                linestyle="",
                label=method,
            )
            for method in methods
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5)
        told = [
            f"{method}: {point.y:.3f} at {point.x:.4g} {label}"
            for label, points in costs.items()
            for method, point in points.items()
        ]
        return _to_svg(figure, name, title, "; ".join(told))


def draw_attribution(values: Mapping[str, Mapping], *, name: str, title: str) -> Markup:
    """A row for each method: shares of attention as one bar, then by paraphrase its change when
    the paraphrase is left out, and its worth behind that alone, as the paraphrases' numbers.

    values: {method: what the summary has of its attribution}
    """
    with matplotlib.style.context(_STYLE):
        figure = Figure((_WIDTH, 1.4 + 0.36 * len(values)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1.7, 1, 1))
        for row, found in enumerate(values.values()):
            _draw_shares(left, row, found)
            for axes, key in ((middle, "without"), (right, "alone")):
                _draw_numbers(axes, row, found[key])
        left.set_xlim(0, 1)
        left.set_xlabel("share of attention")
        middle.axvline(0, color=_INK, linewidth=0.6, alpha=0.5)
        middle.set_xlabel("nats, when left out")
        right.set_xlabel("nats, alone")
        left.set_yticks(range(len(values)), list(values))
        left.set_ylim(len(values) - 0.4, -0.6)
        for axes in (middle, right):
            axes.margins(x=0.12)
            axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
            axes.tick_params(axis="y", length=0)
        told = [
            f"{method}: prefix {found['prefix']:.3f}, "
            + "".join(
                f"paraphrase {number} {share:.3f}, left out {_told(change)}, alone {_told(alone)}, "
                for number, (share, change, alone) in enumerate(
                    zip(found["segments"], found["without"], found["alone"], strict=True), 1
                )
            )
            + f"suffix {found['suffix']:.3f}, answer {found['answer']:.3f}"
            for method, found in values.items()
        ]
        return _to_svg(figure, name, title, "; ".join(told))


def _draw_shares(axes: Axes, row: int, found: Mapping) -> None:
    numbered = [(str(n), share, _COLORS[0]) for n, share in enumerate(found["segments"], 1)]
    parts = [
        ("pre", found["prefix"], _COLORS[4]),
        *numbered,
        ("suf", found["suffix"], _COLORS[1]),
        ("ans", found["answer"], _COLORS[2]),
    ]
    start = 0.0
    for place, (label, share, color) in enumerate(parts):
        shade = 0.25 + 0.2 * (place % 2)  # neighbours differ without their colours
        axes.barh(row, share, left=start, height=0.7, color=color, alpha=shade, linewidth=0)
        if share > 0.012 * (1 + len(label)):
            axes.text(start + share / 2, row, label, ha="center", va="center_baseline", fontsize=7)
        start += share


def _draw_numbers(axes: Axes, row: int, values: Sequence[float | None]) -> None:
    """Numbers of paraphrases where their values lie, every other one higher up."""
    known = [(value, number) for number, value in enumerate(values, 1) if value is not None]
    for place, (value, number) in enumerate(sorted(known)):
        y = row + (0.2 if place % 2 else -0.16)
        axes.plot(value, row, color=_COLORS[0], marker="|", markersize=5)
        axes.text(value, y, str(number), ha="center", va="center_baseline", fontsize=7)


def _told(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.3f}"


def draw_matrix(
    values: Sequence[Sequence[float | None]], labels: Sequence[str], *, name: str, title: str
) -> Markup:
    """A square of shares in [0, 1], each shaded and written out."""
    count = len(labels)
    with matplotlib.style.context(_STYLE):
        side = 0.42 * count
        figure = Figure((min(side + 1.5, 8), min(side + 1.3, 7.8)), layout="constrained")
        axes = figure.subplots()
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if value is None:
                    continue
                axes.add_patch(_square(column, row, facecolor=_COLORS[0], alpha=0.75 * value))
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center_baseline", fontsize=7.5
                )
        _as_grid(axes, count, count)
        axes.set_xticks(range(count), labels, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), labels)
        axes.set_aspect("equal")
        told = [
            f"{first} and {second}: {values[row][column]:.2f}"
            for row, first in enumerate(labels)
            for column, second in enumerate(labels[:row])
            if values[row][column] is not None
        ]
        return _to_svg(figure, name, title, "; ".join(told))


def draw_heat_map(
    groups: Sequence[Sequence[int | None]],
    is_right: Sequence[Sequence[bool]],
    labels: Sequence[str],
    *,
    group_labels: Sequence[str],
    name: str,
    title: str,
    description: str,
) -> Markup:
    """Items down, paraphrases across: a cell's shade is its group, a dot says that it is right.

    groups: from 0, the faintest; at most five. None leaves a cell empty
    """
    columns = max(map(len, groups))
    with matplotlib.style.context(_STYLE):
        figure = Figure((_WIDTH, 1.1 + 0.16 * len(groups)), layout="constrained")
        axes = figure.subplots()
        for group, _ in enumerate(group_labels):
            places = [
                (column, row)
                for row, cells in enumerate(groups)
                for column, cell in enumerate(cells)
                if cell == group
            ]
            # One path a group: hundreds of squares take little room.
            if places:
                squares = [_square(x, y) for x, y in places]
                paths = [
                    square.get_patch_transform().transform_path(square.get_path())
                    for square in squares
                ]
                axes.add_patch(
                    PathPatch(
                        Path.make_compound_path(*paths),
                        facecolor=_COLORS[0],
                        alpha=_SHADES[group],
                        linewidth=0,
                    )
                )
        dots = [
            (column, row)
            for row, cells in enumerate(is_right)
            for column, cell in enumerate(cells)
            if cell
        ]
        axes.plot([x for x, _ in dots], [y for _, y in dots], color=_INK, marker=".", linestyle="")
        _as_grid(axes, columns, len(groups))
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
        axes.set_xticks(range(columns))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("paraphrase")
        handles: list[Patch | Line2D] = [
            Patch(facecolor=_COLORS[0], alpha=shade, label=label)
            for shade, label in zip(_SHADES, group_labels, strict=False)
        ]
        handles.append(Line2D([], [], color=_INK, marker=".", linestyle="", label="right"))
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7.5)
        return _to_svg(figure, name, title, description)


def _by_family(methods: Sequence[str]) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(family_of(method), []).append(method)
    return families


def _square(x: float, y: float, **look: Any) -> Rectangle:
    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, linewidth=0, **look)


def _as_grid(axes: Axes, columns: int, rows: int) -> None:
    """Cells around whole numbers, the first row at the top, no frame."""
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element.

    name: goes before each id, since ids are unique in a page
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The page's own fonts draw the text; matplotlib's need not have each letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        # A style of the figure's would be one of the whole page.
        if child.find("{*}style") is not None:
            root.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                value = f"{name}-{value}"
            elif key.endswith("href"):
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
            element.set(key.rpartition("}")[2], value)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("aria-describedby", f"{name}-description")
    texts = [ElementTree.Element("title"), ElementTree.Element("desc", id=f"{name}-description")]
    texts[0].text, texts[1].text = title, description
    root[:0] = texts
    return Markup(ElementTree.tostring(root, encoding="unicode"))
