"""Answer random requests, and look for answers that are wrong and for what is left over.

    python -m tools.soak
    python -m tools.soak --requests 40 --no-compile
    python -m tools.soak --only 1234
    python -m tools.soak --model smollm2-135m-instruct-q4_1 --dtype float32 --requests 500

With tiny models, drawn here, every answer is held to the definition; with any other model each
request of a batch is held to itself alone. The last line printed is one JSON object. Exit status:
0 nothing found, 1 something was, 2 wrong usage.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from minifuse.command import Parser, add_model_flags, load_fuser, run_command
from minifuse.errors import UsageError
from minifuse.files import tool_command

TINY = "tiny"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog=tool_command("soak"),
        description="Run random requests: methods, weights, sampling, stops, batch mates. Answers "
        "are compared with the definition or with themselves alone; after a warm-up nothing may "
        f"compile or stay behind. --model {TINY}, the default, is five drawn models.",
    )
    add_model_flags(parser.add_argument_group("model"))
    parser.set_defaults(model=TINY)
    add = parser.add_argument_group("run").add_argument
    add("--requests", metavar="N", type=int, default=2000, help="to answer (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of the first call (%(default)s)")
    add("--only", metavar="SEED", type=int, help="run the call of one seed alone")
    add(
        "--families",
        metavar="NAME[,NAME...]",
        help=f"of the models of --model {TINY}: llama, mistral, qwen2, dynamic, yarn (all)",
    )
    add("--new-tokens", metavar="N", type=int, default=8, help="at most (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    for name, least in (("requests", 1), ("seed", 0), ("only", 0), ("new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is {value}; wanted at least {least}")
    is_tiny = args.model == TINY
    if is_tiny and (args.dtype not in ("auto", "float32") or args.quantize != "none"):
        raise UsageError(f"--model {TINY} is in float32; leave out --dtype and --quantize")
    from tqdm import tqdm

    from minifuse.soak.calls import FAMILIES, SIZES
    from minifuse.soak.judges import Alone, Checker, Report
    from minifuse.soak.running import open_tiny, soak

    families = _families_of(args.families, FAMILIES) if is_tiny else None
    fuser = None if is_tiny else load_fuser(args)

    def open_checker(family: str, report: Report) -> Checker:
        if fuser is None:
            return open_tiny(family, report, compile=args.compile)
        return Alone(fuser, report)

    start = time.perf_counter()
    with tqdm(total=args.requests, unit="request", file=sys.stderr, mininterval=5) as bar:

        def say(report: Report, lines: Sequence[str]) -> None:
            bar.update(report.requests - bar.n)
            for line in lines:
                tqdm.write(line, file=sys.stdout)

        report = soak(
            open_checker,
            seed=args.seed if args.only is None else args.only,
            requests=args.requests,
            max_new_tokens=args.new_tokens,
            is_short=not is_tiny,
            sizes=SIZES if is_tiny else SIZES[:2],
            is_single=args.only is not None,
            families=families,
            say=say,
        )
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"passed": report.is_passed, "seconds": seconds, **asdict(report)}))
    return int(not report.is_passed)


def _families_of(text: str | None, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(known) if text is None else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UsageError(f"a family is {name!r}; wanted one of {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
