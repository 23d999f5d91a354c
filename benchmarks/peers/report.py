"""Rows, targets and agreements as text for people, one JSON line, and plots of growth."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.peers.agreement import Agreement
from benchmarks.peers.rows import BATCHED, CACHED, GENERATE, OURS, PROTOTYPE, Row, ratio
from benchmarks.peers.targets import BF16, Outcome

# Columns of ratios: how a row of minifuse compares with the fastest row of each kind.
_PEERS = {
    "(a)": PROTOTYPE,
    "(b)": BATCHED,
    "(c)": GENERATE,
    "transf.": "transformers",
    "(d)": "(d)",
}
_TITLES = {
    "S1": "S1 one question",
    "S2": "S2 data set, per question",
    "S3": "S3 decode, per token, live tokens:",
    "S3 bytes": "S3 decode, per byte of weights and live keys, live tokens:",
    "S4": "S4 prefill, tokens:",
    "S5": "S5 growth:",
    "S6": "S6 first answer, compile cache:",
}


def table_lines(rows: Sequence[Row]) -> list[str]:
    """One table; ratios say how many times minifuse is as fast as the fastest of each peer."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.key.scenario, row.key.case].append(row)
    header = f"{'':62} {'dtype':9} {'median':>10} {'from':>10} {'to':>10}"
    lines = [header + "".join(f" {name:>7}" for name in _PEERS) + "  chosen"]
    for (scenario, case), members in groups.items():
        lines.append(" ".join((_TITLES[scenario], case)).rstrip())
        for row in members:
            numbers = (row.median, min(row.values), max(row.values))
            cells = "".join(f" {_number(value):>10}" for value in numbers)
            ratios = "".join(f" {_ratio_cell(row, members, p):>7}" for p in _PEERS.values())
            name = f"  {row.key.engine}, {row.unit}"
            lines.append(f"{name:62} {row.key.dtype:9}{cells}{ratios}  {row.chosen}".rstrip())
    return lines


def target_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """What was wanted, what came out."""
    lines = [f"{'target':72} {'ratio':>8} {'wanted':>8}"]
    for outcome in outcomes:
        found = "-" if outcome.ratio is None else f"{outcome.ratio:.2f}"
        word = {True: "met", False: "missed", None: "not measured"}[outcome.met]
        lines.append(f"{outcome.name:72} {found:>8} {outcome.target:>8.2f}  {word}")
    return lines


def agreement_lines(agreements: Sequence[Agreement]) -> list[str]:
    """Who gives the reference's tokens, (a) in float32."""
    lines = [f"{'same tokens as the reference':58} {'dtype':9} {'same':>8}"] if agreements else []
    for a in agreements:
        word = {True: "agrees", False: "DISAGREES", None: "need not agree"}[a.agrees]
        if a.gap is not None:
            allowed = "" if a.tolerance is None else f", near tie up to {a.tolerance:.3g}"
            word += f" (gap {a.gap:.3g}{allowed})"
        lines.append(f"  {a.engine:56} {a.dtype:9} {f'{a.same} of {a.of}':>8}  {word}")
    return lines


def json_line(
    conditions: dict,
    outcomes: Iterable[Outcome],
    rows: Iterable[Row],
    agreements: Iterable[Agreement] = (),
) -> str:
    """Everything, on one line; agreements are rows too."""
    return json.dumps(
        {
            "conditions": conditions,
            "targets": [outcome.to_json() for outcome in outcomes],
            "rows": [part.to_json() for part in (*rows, *agreements)],
        }
    )


def write_plots(rows: Iterable[Row], folder: Path, title: str) -> list[Path]:
    """One PNG for each way to grow; none without rows of S5.

    title: the conditions in short
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves: dict[str, dict[str, list[tuple[float, Row]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.key.scenario == "S5" and row.x is not None:
            kind = _kind(row)
            # Steps by N and numbers of methods are one engine's; its name holds the number.
            is_one = kind in ("one step by N", "methods")
            curves[kind][OURS if is_one else f"{row.key.engine}, {row.key.dtype}"].append(
                (row.x, row)
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, engines in curves.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name, points in engines.items():
            points.sort(key=lambda point: point[0])
            x = [x for x, _ in points]
            axes.plot(x, [row.median for _, row in points], marker="o", label=name)
            low = [min(row.values) for _, row in points]
            axes.fill_between(x, low, [max(row.values) for _, row in points], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for points in engines.values() for x, _ in points}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(_AXES[kind][0])
        axes.set_ylabel(_AXES[kind][1])
        axes.set_title(title, fontsize=8)
        axes.legend(fontsize=8)
        path = folder / f"growth-{kind.replace(' ', '-')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


_AXES = {
    "one step by N": ("paraphrases N, equal live tokens", "ms per fused step"),
    "one question": ("paraphrases N", "ms per question"),
    "decode": ("live tokens", "ms per token"),
    "batch": ("questions at once", "ms per question"),
    "methods": ("methods at once, N = 5", "ms per question"),
}


def _kind(row: Row) -> str:
    """The way to grow that a case belongs to."""
    return next(kind for kind in _AXES if row.key.case.startswith(kind))


def _ratio_cell(row: Row, members: Sequence[Row], peer: str) -> str:
    if not row.key.engine.startswith(OURS):
        return ""
    found = [other for other in members if other.key.engine.startswith(peer)]
    if CACHED not in row.key.engine and any(CACHED not in r.key.engine for r in found):
        found = [other for other in found if CACHED not in other.key.engine]
    # Quantized weights are compared with bfloat16, or with what there is.
    for dtype in (row.key.dtype, BF16):
        found = [other for other in found if other.key.dtype == dtype] or found
    if not found:
        return ""
    return f"{ratio(min(found, key=lambda other: other.median), row):.2f}x"


def _number(value: float) -> str:
    """Four digits, whatever the size."""
    return f"{value:.3e}" if value < 1e-3 else f"{value:.4g}"
