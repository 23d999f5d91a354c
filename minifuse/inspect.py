"""Lay a request open: `python -m minifuse.inspect PARAPHRASE...`.

Where every token lies, who sees whom and with which bias, which blocks attention skips, how much of
its attention each generated token gave to which part, and what is odd about all that.

    python -m minifuse.inspect "What is the capital of France?" "France's capital is which city?"
    python -m minifuse.inspect --method fused_plain --output it.svg "Is ice cold?" "Is ice hot?"

Exit status: 0 done, 1 the work failed, 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minifuse.command import (
    Parser,
    add_model_flags,
    check_output_file,
    load_fuser,
    run_command,
)
from minifuse.generate import (
    add_method_flags,
    add_prompt_flags,
    add_sampling_flags,
    read_options,
    read_prompt,
    request_of,
)
from minifuse.jsonl import dump_json

_SUFFIXES = (".svg", ".png", ".pdf")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags: a request's, as `minifuse.generate` has them, and how it is shown."""
    parser = Parser(
        prog="python -m minifuse.inspect",
        description="Show where the tokens of a request lie, who sees whom, and what the answer "
        "attended to.",
    )
    add_prompt_flags(parser.add_argument_group("prompt"))
    add_method_flags(parser.add_argument_group("fusion"))
    add_sampling_flags(parser.add_argument_group("answer"))
    group = parser.add_argument_group("run")
    # One request: compiling would take longer than it saves.
    add_model_flags(group, compile=False)
    add = group.add_argument
    add("--layers", action="store_true", help="attention of every layer by itself, too")
    add("--json", action="store_true", help="print one JSON object instead, with everything in it")
    add(
        "--output",
        type=Path,
        metavar="FILE" + "|".join(_SUFFIXES),
        help="draw it there; standard output has the text all the same",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_intermixed_args(argv)))


def _run(args: argparse.Namespace) -> None:
    args.attribution = True
    options, prompt = read_options(args), read_prompt(args)
    if (path := args.output) is not None:
        check_output_file(path, "--output", _SUFFIXES)
    from minifuse.pictures import draw_inspection, format_inspection

    inspection = load_fuser(args).inspect(**request_of(prompt), **options.for_engine())
    if path is not None:
        draw_inspection(inspection, path)
        print(f"drawn: {path}", file=sys.stderr)
    if args.json:
        print(dump_json(inspection.to_json(), ensure_ascii=False))
    else:
        print(format_inspection(inspection, by_layer=args.layers))


if __name__ == "__main__":
    sys.exit(main())
