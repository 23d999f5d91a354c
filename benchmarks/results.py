"""The tables of docs/results.md, out of finished runs: `python -m benchmarks.results`.

    python -m benchmarks.results ParaRel=runs/pararel,runs/pararel-restart WebQuestions=runs/webqa

Each argument names a data set, a run of all methods, and, behind a comma, a run of the fused
methods under the other setting of positions. Markdown goes to standard output: every method by
log-probability of the best gold answer and by accuracy; then each fused method against each
ensemble, on all items and on the half that no setting was chosen on (`fusion_study.items.half_of`).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fusion_study.items import half_of
from minifuse.command import Parser, run_command
from minifuse.errors import UsageError
from minifuse.evaluation.records import read_run
from minifuse.evaluation.summary import LOGPROB, PER_PROMPT, summarise
from minifuse.evaluation.tables import read_table

if TYPE_CHECKING:
    from pandas import DataFrame

REFERENCE = "prob_avg"
RULE = "match_lemma"
FUSED = ("fused", "fused_weighted", "fused_auto")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="python -m benchmarks.results", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN]", type=_parse)
    args = parser.parse_args(argv)
    return run_command(lambda: _print_all(args.runs), interrupted="interrupted")


def _parse(text: str) -> tuple[str, list[Path]]:
    name, _, runs = text.partition("=")
    if not name or not runs:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted NAME=RUN or NAME=RUN,RUN")
    return name, [Path(run) for run in runs.split(",")]


def _print_all(runs: Iterable[tuple[str, list[Path]]]) -> None:
    for name, paths in runs:
        print(f"## {name}\n")
        for line in describe(paths):
            print(line)
        sys.stdout.flush()


def describe(paths: Sequence[Path]) -> list[str]:
    """The lines of one data set.

    raises: UsageError where a folder is no run, or lacks what the tables need
    """
    configs = [read_run(path)[0] for path in paths]
    tables = [read_table(path / "results.parquet") for path in paths]
    config, table = configs[0], tables[0]
    missing = {REFERENCE, PER_PROMPT} - set(table["method"])
    if missing:
        raise UsageError(f"{paths[0]} has no {', '.join(sorted(missing))}; wanted all methods")
    lines = []
    for other, path in zip(configs, paths, strict=True):
        lines.append("    " + _command(other, path))
    summary = _against_reference(table, config)
    lines += [
        "",
        f"{summary['num_items']} items, {summary['draws']} draws of {config['shots']} shots, "
        f"{summary['n']} paraphrases, {config['dtype']}.",
        "",
    ]
    rows = _method_rows(summary, config["positions"])
    for other, more in zip(configs[1:], tables[1:], strict=True):
        rows += _other_rows(table, more, other)
    header = ("method", "positions", "streams", "log-probability", f"less {REFERENCE}", "accuracy")
    lines += _markdown(header, rows)
    lines += ["", *_comparison_lines(table, config, "all items")]
    confirm = table[[half_of(id) == "confirm" for id in table["id"]]]
    lines += ["", *_comparison_lines(confirm, config, "items of the confirming half"), ""]
    return lines


def _command(config: dict[str, Any], path: Path) -> str:
    """The command of a run, with the names of folders alone."""
    words = [Path(word).name if "/" in word else word for word in config["command"]]
    return " ".join(words).replace(f"--output {path.name}", f"--output runs/{path.name}")


def _against_reference(table: "DataFrame", config: dict[str, Any]) -> dict[str, Any]:
    methods = table["method"].unique()
    family = [[method, REFERENCE] for method in methods if method != REFERENCE]
    return summarise(table, config | {"family": family})


def _method_rows(summary: dict[str, Any], positions: str) -> list[list[str]]:
    differences = {
        entry["first"]: entry
        for entry in summary["comparisons"]
        if entry["measure"] == LOGPROB and entry["second"] == REFERENCE
    }
    rows = [
        [
            "best single prompt of each item",
            "",
            "",
            _mean(summary["best_single"][LOGPROB]),
            "",
            _share(summary["best_single"][RULE]),
        ]
    ]
    for method, entry in summary["methods"].items():
        streams = f"{entry['cost']['num_streams']:.0f}"
        name = f"{method} (their mean)" if method == PER_PROMPT else method
        where = positions if method in FUSED else ""
        difference = _difference(differences.get(method))
        cells = (_mean(entry[LOGPROB]), difference, _share(entry[RULE]))
        rows.append([name, where, streams, *cells])
    return rows


def _other_rows(table: "DataFrame", more: "DataFrame", config: dict[str, Any]) -> list[list[str]]:
    """The fused methods of another run, against the reference of the first."""
    import pandas

    wanted = more[more["method"].isin(FUSED)]
    reference = table[table["method"] == REFERENCE]
    summary = _against_reference(pandas.concat([reference, wanted]), config)
    rows = _method_rows(summary | {"best_single": _NOTHING}, config["positions"])
    return [row for row in rows if row[0] in FUSED]


_NOTHING = {LOGPROB: None, RULE: None}


def _comparison_lines(table: "DataFrame", config: dict[str, Any], what: str) -> list[str]:
    summary = summarise(table, config | {"family": None})
    rows = [
        [
            entry["first"],
            entry["second"],
            _difference(entry),
            f"{entry['p_holm']:.3g}",
            " ".join(f"{value:+.2f}" for value in entry["by_draw"]),
        ]
        for entry in summary["comparisons"]
        if entry["measure"] == LOGPROB and entry["first"] in FUSED
    ]
    header = ("fused", "ensemble", "difference", "p (Holm)", "by draw")
    lines = [f"By log-probability, {what} ({summary['num_items']}):", "", *_markdown(header, rows)]
    for method in FUSED:
        share = summary["methods"].get(method, {}).get("share_of_distance")
        if share:
            lines += [
                "",
                f"`{method}` goes {100 * share['share']:.0f} % [{100 * share['low']:.0f}, "
                f"{100 * share['high']:.0f}] of the way from `{share['reference']}` to the best "
                "single prompt of each item.",
            ]
    return lines


def _mean(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return ""
    return f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _share(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return ""
    mean, low, high = (100 * entry[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _difference(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["difference"] is None:
        return ""
    return f"{entry['difference']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
