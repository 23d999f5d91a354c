"""Floats, int8 and int4 side by side: `python -m benchmarks.quantized`.

For each scheme the bytes of its weights, the seconds to load them, perplexity on a text, and, turn
about, so that a noisy machine slows all alike, milliseconds per decode step of one stream and for a
prefill of about 512 tokens.

    python -m benchmarks.quantized --text book.txt
    python -m benchmarks.quantized --text questions.jsonl --field context --chunks 16

The last line printed is one JSON object.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minifuse.config import QUANTIZE_NAMES
from minifuse.engine import Fuser
from minifuse.loader import load_model
from minifuse.model import Params

PREFILL = 512
# Characters of a chunk of the text, and of what opens it.
CHUNK, OPENING = 2000, 200
NEW_TOKENS = 33
WORDS = "The keeper of the lighthouse counts ships that pass in the night and writes them down. "


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a text, or a .jsonl with --field"
    )
    parser.add_argument("--field", metavar="NAME", help="where the lines of a .jsonl keep a text")
    parser.add_argument(
        "--chunks", type=int, default=16, help=f"of {CHUNK} characters (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--skip-speed", action="store_true", help="bytes and perplexity alone")
    args = parser.parse_args(argv)
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "model": args.model,
        "text": args.text and str(args.text),
        "chunks": args.chunks,
        "repeats": args.repeats,
    }
    print(json.dumps(conditions), file=sys.stderr)
    text = _read_text(args.text, args.field) if args.text else None
    fusers, rows = {}, {}
    for scheme in QUANTIZE_NAMES:
        # The first load converts, where the model is a GGUF; the second is the one that counts.
        load_model(args.model, "bfloat16", "cpu", scheme)
        start = time.perf_counter()
        model = load_model(args.model, "bfloat16", "cpu", scheme)
        load_s = time.perf_counter() - start
        fusers[scheme] = Fuser(replace(model, eos_token_ids=()))
        rows[scheme] = {
            "quantize": scheme,
            "load_s": load_s,
            "weight_bytes": count_bytes(model.params),
            "perplexity": text and perplexity(fusers[scheme], text, args.chunks),
        }
        print(json.dumps(rows[scheme]), file=sys.stderr)
    if not args.skip_speed:
        for scheme, times in race(fusers, args.repeats).items():
            rows[scheme] |= times
    _print_table(list(rows.values()))
    print(json.dumps({"conditions": conditions, "rows": list(rows.values())}))
    return 0


def count_bytes(params: Params) -> int:
    """Bytes of all weights in memory, those of a tied head once."""
    found: dict[int, int] = {}

    def count(part: object) -> None:
        if isinstance(part, Tensor):
            found[part.data_ptr()] = part.nbytes
        elif isinstance(part, tuple):
            for inner in part:
                count(inner)

    count(params)
    return sum(found.values())


def perplexity(fuser: Fuser, text: str, num_chunks: int) -> float:
    """Of a text's first chunks, each read alone, behind its first characters."""
    logprob, num_tokens = 0.0, 0
    for start in range(0, min(num_chunks * CHUNK, len(text)), CHUNK):
        opening, rest = text[start : start + OPENING], text[start + OPENING : start + CHUNK]
        scores = fuser.score(segments=[opening], continuations=[rest], methods=["origin"])
        logprob += scores["origin"][0]
        num_tokens += len(fuser.model.tokenizer.encode(rest, is_start=False))
    return math.exp(-logprob / num_tokens)


def race(fusers: dict[str, Fuser], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each scheme's times, and their ratios to those of the first, turn about."""
    tokenizer = next(iter(fusers.values())).model.tokenizer
    length = len(tokenizer.encode(WORDS, is_start=True))
    prompts = {"decode_ms": WORDS, "prefill_ms": WORDS * (PREFILL // length)}
    times = {name: {kind: [] for kind in prompts} for name in fusers}
    for repeat in range(repeats + 1):
        for name, fuser in fusers.items():
            for kind, prompt in prompts.items():
                found = fuser.generate(
                    segments=[prompt],
                    methods=["origin"],
                    max_new_tokens=NEW_TOKENS if kind == "decode_ms" else 1,
                )["origin"].timings
                value = found[kind]
                if repeat:  # the first one compiles
                    median = statistics.median(value) if kind == "decode_ms" else value
                    times[name][kind].append(median)
    first = times[next(iter(times))]
    rows: dict[str, dict[str, float]] = {}
    for name, measured in times.items():
        rows[name] = {kind: statistics.median(values) for kind, values in measured.items()}
        for kind, values in measured.items():
            ratios = [base / value for base, value in zip(first[kind], values, strict=True)]
            rows[name][kind.replace("ms", "ratio")] = statistics.median(ratios)
    return rows


def _read_text(path: Path, field: str | None) -> str:
    if field is None:
        return path.read_text(encoding="utf-8")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n\n".join(dict.fromkeys(json.loads(line)[field] for line in lines if line.strip()))


def _print_table(rows: list[dict]) -> None:
    names = list(rows[0])
    print("  ".join(f"{name:>13}" for name in names))
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("  ".join(f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
