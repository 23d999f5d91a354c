"""Convert a GGUF into a folder in hub layout, which minifuse and transformers open as it is.

    python -m tools.convert_weights model.gguf folder --check

Nothing is left behind under TARGET unless the whole conversion worked.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from minifuse.config import DTYPE_NAMES
from minifuse.errors import MinifuseError, ModelNotFoundError, UsageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Enough tokens that attention looks back, few enough for a large model on a CPU.
_CHECK_TOKENS = 32


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_weights",
        description="Convert a GGUF into a folder in hub layout: config.json, safetensors, "
        "tokenizer.json, tokenizer_config.json, generation_config.json.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a .gguf file")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="bfloat16", help="of the weights (%(default)s)"
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted 5GB, 500MB or the like")
    return size


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        convert(args.source, args.target, args.dtype, args.max_shard_size)
        return check(args.source, args.target, args.dtype) if args.check else 0
    except MinifuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def convert(source: Path, target: Path, dtype: str, max_shard_bytes: int) -> None:
    """Convert with a progress bar on standard error.

    raises: ModelNotFoundError, UsageError for a source that is not there, a target that is;
            and what minifuse.gguf.convert_gguf raises
    """
    if not source.is_file():
        raise ModelNotFoundError(f"{source} is not a file; wanted a .gguf")
    if target.exists():
        raise UsageError(f"{target} exists; choose a new folder or remove it first")
    from tqdm import tqdm

    from minifuse.gguf import convert_gguf

    def show(tensors: Iterable, total: int) -> Iterable:
        return tqdm(tensors, desc="converting", total=total, unit="tensor", file=sys.stderr)

    convert_gguf(source, target, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=show)
    print(f"wrote {target} as {dtype}", file=sys.stderr)


def check(source: Path, target: Path, dtype: str) -> int:
    """Compare logits of the GGUF in float32 with those of the written folder; 1 if they differ.

    Rounding the weights to `dtype` in memory shows how far the logits may move. The folder's may
    move twice as far, plus the rounding of float32 arithmetic itself, layer upon layer.
    """
    import torch

    from minifuse.checkpoint import DTYPES, load_params, params_from_tensors, read_json
    from minifuse.config import ModelConfig
    from minifuse.gguf import read_gguf
    from minifuse.model import forward_plain

    original = read_gguf(source)
    config = ModelConfig.from_hf(original.config)
    written_config = ModelConfig.from_hf(read_json(target / "config.json"))
    token_ids = torch.linspace(0, config.vocab_size - 1, _CHECK_TOKENS).long()[None]
    rounded = ((name, tensor.to(DTYPES[dtype])) for name, tensor in original.tensors())
    f32 = torch.float32
    with torch.inference_mode():
        # In turn, so that one set of weights is in memory at a time.
        params = params_from_tensors(original.tensors(), config, f32)
        exact = forward_plain(config, params, token_ids)
        params = params_from_tensors(rounded, config, f32)
        naive = forward_plain(config, params, token_ids)
        params = load_params(target, written_config, f32)
        written = forward_plain(written_config, params, token_ids)
    floor = torch.finfo(f32).eps * config.num_hidden_layers * exact.abs().max().item()
    tolerance = 2 * (naive - exact).abs().max().item() + floor
    difference = (written - exact).abs().max().item()
    is_close = difference <= tolerance
    print(
        f"largest logit difference {difference:.3g}, tolerance {tolerance:.3g} "
        f"({_CHECK_TOKENS} tokens, {dtype} against float32): {'ok' if is_close else 'too far'}"
    )
    return 0 if is_close else 1


if __name__ == "__main__":
    sys.exit(main())
