"""The race against other engines, for the same answers: `python -m benchmarks.peers`.

    python -m benchmarks.peers --quick
    python -m benchmarks.peers --plot docs/plots

(a) the published prototype's algorithm, (b) transformers with one batch, (c) transformers N times,
(d) llama.cpp, (e) minifuse; medians of repeats that run turn about. Nothing else should run.
The last line on standard output is one JSON object.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.command import Parser, run_command
from minifuse.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.peers.scenarios import Bench

SCENARIOS = ("S1", "S2", "S3", "S4", "S5", "S6")
DTYPES = ("float32", "bfloat16", "int8", "int4")
QUICK_SCENARIOS = ("S1", "S3", "S4")
QUICK_DTYPES = ("bfloat16", "int4")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="S1, S3 at 200 live tokens and S4 at 1,000, in bfloat16 and int4: four minutes",
    )
    add("--scenarios", type=_names(SCENARIOS), metavar="S1,...", help="default: all")
    add("--dtypes", type=_names(DTYPES), metavar="float32,...", help=f"of {', '.join(DTYPES)}")
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--threads", type=int, help="of every engine (default: torch's own choice)")
    add("--plot", type=Path, metavar="DIR", help="write plots of growth (S5) as PNG")
    add("--model", metavar="NAME|DIR|FILE.gguf", help="default: the default model")
    add("--skip-llama", action="store_true", help="leave out (d)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile minifuse, or run it op by op (default: --compile)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _names(known: Sequence[str]):
    def parse(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",")]
        wrong = [name for name in names if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}; wanted some of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return parse


def _run(args: argparse.Namespace) -> None:
    for name in ("repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; wanted at least 1")
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    from benchmarks.peers.engines import Engines
    from benchmarks.peers.scenarios import Bench, Sizes

    quick = Sizes(decode_lengths=(200,), prefill_lengths=(1000,)) if args.quick else Sizes()
    bench = Bench(
        engines=Engines(args.model, skip_llama=args.skip_llama, compile=args.compile),
        dtypes=args.dtypes or (QUICK_DTYPES if args.quick else DTYPES),
        repeats=args.repeats,
        sizes=quick,
    )
    names = args.scenarios or (QUICK_SCENARIOS if args.quick else SCENARIOS)
    run(bench, names, plot=args.plot)


def run(bench: "Bench", names: Sequence[str], plot: Path | None = None) -> None:
    """Run scenarios and print what came out.

    raises: MinifuseError, after all is printed, where engines that must agree do not
    """
    from benchmarks.peers import report
    from benchmarks.peers.agreement import check_agreement, raise_disagreements
    from benchmarks.peers.rows import say
    from benchmarks.peers.scenarios import SCENARIOS as CALLS
    from benchmarks.peers.targets import judge

    start = time.perf_counter()
    conditions = make_conditions(bench)
    for name, value in conditions.items():
        print(f"{name}: {value}")
    sys.stdout.flush()
    rows, agreements = [], []
    for name in names:
        found = CALLS[name](bench)
        rows += found
        # A run that is cut short leaves what it measured, if only as progress.
        say("\n".join(report.table_lines(found)))
        if name == "S1":
            agreements = check_agreement(bench)
        say(f"{name} done after {time.perf_counter() - start:.0f} s")
    bench.engines.drop()
    outcomes = judge(rows, names)
    conditions["load_average_at_end"] = os.getloadavg()
    conditions["seconds"] = round(time.perf_counter() - start, 1)
    sections = [
        report.table_lines(rows),
        report.agreement_lines(agreements),
        report.target_lines(outcomes),
    ]
    for lines in filter(None, sections):
        print("", *lines, sep="\n")
    print(
        f"\nload average at the end: {conditions['load_average_at_end']}, "
        f"{conditions['seconds']} s in all"
    )
    if plot is not None:
        title = f"{conditions['processor']}, {conditions['threads']} threads, {conditions['date']}"
        for path in report.write_plots(rows, plot, title):
            print(f"wrote {path}")
    print(report.json_line(conditions, outcomes, rows, agreements))
    raise_disagreements(agreements)


def make_conditions(bench: "Bench") -> dict:
    """Where, on what and with what a run was made."""
    import torch

    from benchmarks.peers.engines import versions
    from benchmarks.peers.questions import describe

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(),
        "model": bench.engines.source,
        "dtypes": list(bench.dtypes),
        "repeats": bench.repeats,
        "compiled": bench.engines.is_compiled,
        **describe(bench.questions(1)),
        "new_tokens": bench.sizes.new_tokens,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
