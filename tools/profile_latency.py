"""Show where the time of a request goes, for any model, dtype, layout and batch.

    python -m tools.profile_latency --plot profile.png
    python -m tools.profile_latency --segments 10 --methods fused,avg --batch 4
    python -m tools.profile_latency --contexts 200,1000,3500 --compile-times --trace trace.json

The last line printed is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

from minifuse.command import (
    Parser,
    add_model_flags,
    check_output_file,
    load_fuser,
    run_command,
)
from minifuse.errors import UsageError
from minifuse.files import tool_command
from minifuse.trials import add_size_flags, parse_numbers, sizes_of_flags


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog=tool_command("profile_latency"),
        description="Measure one request, and a batch of such: start-up, time to the first token, "
        "time per token, memory, what the machine could reach, and what the compiler did.",
    )
    add_model_flags(parser.add_argument_group("model"))
    add_size_flags(parser.add_argument_group("request"))
    add = parser.add_argument_group("measures").add_argument
    add("--batch", metavar="N", type=int, default=1, help="requests at once (%(default)s)")
    add("--repeats", metavar="N", type=int, default=5, help="of each measure (%(default)s)")
    add(
        "--contexts",
        metavar="N[,N...]",
        type=parse_numbers,
        default="200,400,600,800",
        help="live tokens to time steps behind, by a longer prefix (%(default)s)",
    )
    add(
        "--compile-times",
        action="store_true",
        help="start new processes with an empty and then a warm compile cache, too",
    )
    add(
        "--top",
        metavar="N",
        type=int,
        default=10,
        help="operators to list; 0 saves compiling the marked graphs they come from (%(default)s)",
    )
    add("--plot", metavar="FILE.png|svg", type=Path, help="draw a timeline, and step times")
    add("--trace", metavar="FILE.json", type=Path, help="write a Chrome trace of one request")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    (size,) = sizes_of_flags(args)
    _check(args)
    from minifuse.profile_report import format_profile, plot_profile
    from minifuse.profiling import ProfileOptions, profile

    options = ProfileOptions(
        batch=args.batch,
        repeats=args.repeats,
        contexts=tuple(args.contexts),
        compile_times=args.compile_times,
        top=args.top,
        trace=args.trace,
    )
    report = profile(
        load_fuser(args), size, options, args, say=lambda line: print(line, file=sys.stderr)
    )
    if args.plot:
        plot_profile(report, args.plot)
    print(format_profile(report))
    print(json.dumps(report))


def _check(args: argparse.Namespace) -> None:
    """raises: UsageError for what would stop a long run in its middle"""
    for name, least in (("batch", 1), ("repeats", 1), ("top", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} is {getattr(args, name)}; wanted at least {least}")
    if min(args.contexts) < 1:
        raise UsageError(f"--contexts has {min(args.contexts)}; wanted numbers of at least 1")
    if args.compile_times and not args.compile:
        raise UsageError("--compile-times needs the compiler; leave out --no-compile")
    for name, suffixes in (("plot", (".png", ".svg")), ("trace", (".json",))):
        if (path := getattr(args, name)) is not None:
            check_output_file(path, f"--{name}", suffixes)


if __name__ == "__main__":
    sys.exit(main())
