"""Convert a model into a folder in hub layout, which minifuse and transformers open as it is.

    python -m tools.convert_weights model.gguf folder --check
    python -m tools.convert_weights folder other-folder --dtype float16 --max-shard-size 500MB

Nothing is left behind under TARGET unless the whole conversion worked.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from minifuse.command import Parser, run_command
from minifuse.config import DTYPE_NAMES, QUANTIZE_NAMES
from minifuse.files import tool_command

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog=tool_command("convert_weights"),
        description="Convert a model into a new folder in hub layout: config.json, safetensors, "
        "and the files of its tokenizer.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .gguf file; a folder with safetensors or pytorch_model.bin; or another model that "
        "minifuse finds by name, which is converted as minifuse loads it",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPE_NAMES),
        default="auto",
        help="of the weights; auto is as they are stored, bfloat16 where that is quantised "
        "(%(default)s)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE_NAMES,
        default="none",
        help="write the weights in 8 or 4 bits, for minifuse alone; a GGUF's Q4_0 and Q4_1 keep "
        "their own scales under int4 (%(default)s)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=parse_size,
        default="5GB",
        help="weights above this go into several files, e.g. 500MB (%(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load both sides again, compare logits, and exit 1 where they differ by more than "
        "the rounding to DTYPE explains",
    )
    return parser


def parse_size(text: str) -> int:
    """Bytes in 5GB, 500MB, 1.5GiB or a bare number.

    raises: argparse.ArgumentTypeError
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted 5GB, 500MB or the like")
    return size


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from minifuse.convert import check, convert

    def show(tensors: Iterable, total: int) -> Iterable:
        return tqdm(tensors, desc="converting", total=total, unit="tensor", file=sys.stderr)

    dtype = convert(
        args.source,
        args.target,
        dtype=args.dtype,
        quantize=args.quantize,
        max_shard_bytes=args.max_shard_size,
        progress=show,
    )
    kind = dtype if args.quantize == "none" else f"{args.quantize} and {dtype}"
    print(f"wrote {args.target} as {kind}", file=sys.stderr)
    if not args.check:
        return 0
    found = check(args.source, args.target)
    print(
        f"largest logit difference {found.difference:.3g}, tolerance {found.tolerance:.3g} "
        f"({found.num_tokens} tokens, {found.dtype} against float32): "
        f"{'ok' if found.is_close else 'too far'}"
    )
    return 0 if found.is_close else 1


if __name__ == "__main__":
    sys.exit(main())
