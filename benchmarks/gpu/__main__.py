"""minifuse beside transformers on one GPU, on random weights: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --shapes llama-3.2-1b --contexts 1000

S1 one question in five phrasings, S3 decoding and S4 prefill of one prompt, all in bfloat16;
medians of repeats that run turn about. Weights are drawn, so nothing is fetched; the answers mean
nothing, and take as long as real ones. Decoding is compared with a device copy, prefill with a
large matrix product, and CUDA graphs that are recorded while the time is taken are counted. The
last line on standard output is one JSON object.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minifuse.command import Parser, run_command
from minifuse.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.peers.rows import Row
    from benchmarks.peers.targets import Outcome

NAMES = ("llama-3.2-1b", "llama-3.1-8b")
# Half of what is generated, and a prompt.
MIN_CONTEXT = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default=",".join(NAMES), help="default: %(default)s")
    parser.add_argument("--contexts", default="200,1000,3500", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    names, contexts = args.shapes.split(","), args.contexts.split(",")
    if not set(names) <= set(NAMES) or not all(part.isdecimal() for part in contexts):
        raise UsageError(
            f"shapes are {args.shapes} and contexts {args.contexts}; wanted some of "
            f"{','.join(NAMES)} and numbers, joined by commas"
        )
    if min(map(int, contexts)) < MIN_CONTEXT or args.repeats < 1:
        raise UsageError(
            f"contexts are {args.contexts} and repeats {args.repeats}; wanted at least "
            f"{MIN_CONTEXT} tokens and 1 repeat"
        )
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "torch sees no CUDA device, and this is a race on one; on a CPU run benchmarks.peers"
        )
    from benchmarks.gpu.race import SHAPES, measure, measure_ceilings
    from benchmarks.peers import report

    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    conditions = {
        "device": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "repeats": args.repeats,
        **ceilings,
        "prefill_of_product": {},
    }
    for name, value in conditions.items():
        print(f"{name}: {value}")
    rows: list[Row] = []
    outcomes: list[Outcome] = []
    for name in names:
        sizes = (list(map(int, contexts)), args.repeats)
        found, judged, shares = measure(name, SHAPES[name], *sizes, device, ceilings)
        rows += found
        outcomes += judged
        conditions["prefill_of_product"] |= shares
    for what, share in conditions["prefill_of_product"].items():
        print(f"prefill, of a large product: {what} tokens: {share:.0%}")
    print("", *report.table_lines(rows), "", *report.target_lines(outcomes), sep="\n")
    print(report.json_line(conditions, outcomes, rows, []))


if __name__ == "__main__":
    sys.exit(main())
