"""What `profiling.profile` measured, for people: a table, and plots."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.figures import make_figure, save_figure
from minifuse.files import format_bytes
from minifuse.warmup import name_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stages in the order of a request, with their colours in the plot.
_COLOURS = {
    "prefix": "#4477aa",
    "segments": "#66ccee",
    "moves": "#ccbb44",
    "views": "#228833",
    "step": "#ee6677",
    "other": "#bbbbbb",
}


def format_profile(report: dict) -> str:
    """The whole table; conditions come first."""
    return "\n".join(line for part in _parts(report) for line in [*part, ""]).rstrip()


def format_conditions(report: dict) -> str:
    """CPU, threads, versions, load average, model: what every number depends on."""
    c, model = report["conditions"], report["model"]
    load = c["load_average"]
    return "\n".join(
        (
            f"{c['cpu']} ({c['cpu_capability']}, {c['cores']} cores), {c['threads']} threads, "
            f"{c['system']}",
            f"Python {c['python']}, torch {c['torch']}, minifuse {c['minifuse']}, load average "
            + (" ".join(f"{number:.2f}" for number in load) if load else "unknown"),
            f"{model['name']}, {model['dtype']}, quantize {model['quantize']}, on "
            f"{model['device']}, {'compiled' if model['compiled'] else 'eager'}",
        )
    )


def _parts(report: dict) -> Iterator[list[str]]:
    r = report["request"]
    yield format_conditions(report).splitlines()
    yield [
        f"{r['segments']} segments of {r['segment_tokens']} tokens behind a prefix of "
        f"{r['prefix_tokens']}, a suffix of {r['suffix_tokens']}, {r['new_tokens']} new tokens",
        f"methods {', '.join(r['methods'])}; {r['batch']} at once; {r['repeats']} repeats",
    ]
    yield list(_start_up(report))
    yield list(_request(report))
    yield list(_step(report))
    yield list(_compiler(report))
    if report.get("operators"):
        yield [
            f"{'self CPU':>12} {'share':>6} {'calls':>6}  operator",
            *(
                f"{op['self_ms']:9.2f} ms {op['share']:6.1%} {op['calls']:6}  {_cut(op['name'])}"
                for op in report["operators"]
            ),
        ]


def _start_up(report: dict) -> Iterator[str]:
    yield _row("load", report["load_s"], "s")
    yield _row("first request", report["first_request_s"], "s")
    yield _row("  of that compiling", report["first_compile_s"], "s")
    for name, times in report.get("compile_times", {}).items():
        yield _row(f"new process, {name} compile cache", times["process_s"], "s")
        yield _row("  of that compiling", times["compile_s"], "s")
    yield _row("peak memory", report["peak_memory_bytes"] / 1e6, "MB")


def _request(report: dict) -> Iterator[str]:
    request, batch = report["request_ms"], report["batch"]
    yield _row("first token, new prefix", request["first_token_prefix_new"], "ms")
    yield _row("first token, stored prefix", request["first_token_prefix_stored"], "ms")
    yield _row("whole answer, stored prefix", request["whole_prefix_stored"], "ms")
    if batch["step_ms"]:
        times = "  ".join(f"{name} {ms:.2f}" for name, ms in batch["step_ms"].items())
        yield f"{_label('time per token')} {times} ms ({batch['num_steps']} steps)"
    yield _row("throughput, prefill included", batch["tokens_per_s"], "tokens/s")
    for found in report["context"]:
        yield _row(f"step behind {found['live_tokens']:,} live tokens", found["step_ms"], "ms")
    for name, ms in report["masks_ms"].items():
        yield _row(f"mask apart, eager: {name.replace('_', ' ')}", ms, "ms")


def _step(report: dict) -> Iterator[str]:
    step, ceilings = report["step"], report["ceilings"]
    weights, cache = format_bytes(step["weight_bytes"]), format_bytes(step["cache_bytes"])
    yield f"{_label('a step reads')} {weights} of weights, {cache} of cache"
    yield f"{_label('a step computes')} {step['flops'] / 1e9:.3f} GFLOP in {step['rows']} rows"
    yield _row("memory read, measured", ceilings["bytes_per_s"] / 1e9, "GB/s")
    yield _row("matrix product, measured", ceilings["flops_per_s"] / 1e9, "GFLOP/s")
    if "memory_fraction" in step:
        yield f"{_label('a step reaches')} {step['memory_fraction']:.1%} of that memory read, " + (
            f"{step['compute_fraction']:.1%} of that product"
        )
    if (eager := report.get("eager")) and eager["ratio"] is not None:
        yield (
            f"{_label('a step eagerly')} {eager['step_ms']:.2f} ms, compiled "
            f"{eager['compiled_step_ms']:.2f} ms: {eager['ratio']:.1f} times as fast"
        )


def _compiler(report: dict) -> Iterator[str]:
    found = report["compile"]
    yield (
        f"{len(found['graphs'])} graphs, {found['recompiles']} recompiles, "
        f"{found['graph_breaks']} graph breaks"
    )
    for graph in found["graphs"]:
        yield f"{graph['seconds']:8.1f} s  {name_graph(graph)}"
    for cause in found["explained"]:
        kind = "another graph" if cause["planned"] else "RECOMPILED"
        yield f"{kind} of {cause['function']}: {cause['cause']}"


def _label(name: str) -> str:
    return f"{name:34}"


def _row(name: str, value: float, unit: str) -> str:
    return f"{_label(name)} {value:10,.2f} {unit}"


def _cut(name: str, max_chars: int = 70) -> str:
    return name if len(name) <= max_chars else f"{name[: max_chars - 3]}..."


def plot_profile(report: dict, path: Path) -> None:
    """Draw one request's timeline, and step time against context, as PNG or SVG.

    raises: MinifuseError where matplotlib is missing or the file cannot be written
    """
    figure = make_figure(9, 6.4, "--plot")
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.3))
    _draw_timeline(upper, report["timeline"])
    _draw_contexts(lower, report)
    figure.suptitle(format_conditions(report), fontsize=8, x=0.01, ha="left")
    save_figure(figure, path)


def bars_of(timeline: list[dict]) -> list[tuple[str, float, float]]:
    """Stages that lie in no other, and what is between them: (name, start, length) in ms."""
    bars, reached = [], 0.0
    for span in timeline:
        if span["depth"]:
            continue
        if span["start_ms"] > reached:
            bars.append(("other", reached, span["start_ms"] - reached))
        bars.append((span["name"], span["start_ms"], span["end_ms"] - span["start_ms"]))
        reached = span["end_ms"]
    return bars


def _draw_timeline(axes: "Axes", timeline: list[dict]) -> None:
    bars = bars_of(timeline)
    totals: dict[str, float] = {}
    for name, _, length in bars:
        totals[name] = totals.get(name, 0.0) + length
    names = [name for name in _COLOURS if name in totals]
    for row, name in enumerate(names):
        own = [(start, length) for bar, start, length in bars if bar == name]
        # On the first row all, one behind the other; below it each stage alone.
        for y in (0, row + 1):
            axes.broken_barh(own, (y - 0.38, 0.76), color=_COLOURS[name], ec="white", lw=0.4)
    counts = {name: sum(bar == name for bar, *_ in bars) for name in names}
    labels = [
        f"{f'{counts[name]} steps' if name == 'step' else name}  {totals[name]:.1f} ms"
        for name in names
    ]
    axes.set_yticks(range(len(names) + 1), ["one request", *labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(left=0)
    steps = sum(name == "step" for name, *_ in bars)
    axes.set_title(
        f"One request with a new prefix; {steps} steps after the first token", fontsize=9
    )
    axes.grid(axis="x", alpha=0.3)


def _draw_contexts(axes: "Axes", report: dict) -> None:
    found = report["context"]
    axes.set_title("Step time against context", fontsize=9)
    axes.set_xlabel("live tokens", fontsize=8)
    axes.set_ylabel("ms a step (median)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if not found:
        axes.text(0.5, 0.5, "no context was measured", ha="center", transform=axes.transAxes)
        return
    contexts = [point["live_tokens"] for point in found]
    axes.plot(contexts, [point["step_ms"] for point in found], "o-", color=_COLOURS["step"])
    floor = report["step"]["weight_bytes"] / report["ceilings"]["bytes_per_s"] * 1000
    axes.axhline(floor, color="#555555", ls="--", lw=1)
    axes.annotate(
        f"weights alone at the measured memory speed: {floor:.1f} ms",
        (contexts[0], floor),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set_ylim(bottom=0)
