"""Decoding speed beside transformers, and time to the first answer: `python -m benchmarks.speed`.

Decoding: one stream behind about 200 live tokens, both engines on the same weights and threads,
turn about, so that a noisy machine slows both. A time per token is the difference between a long
and a short answer, over the tokens between them: prefill and set-up cancel.

Start-up: a new process each, by the wall clock from launch to exit, with an empty and then with a
warm compile cache. The model lies converted on disk.

The last line printed is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from minifuse.engine import Fuser
from minifuse.loader import load_model, resolve_model

LONG, SHORT = 65, 1
PROMPT = (
    "The history of the lighthouse begins with fires that people lit on hills. Later the fires "
    "were put on towers, so that ships could see them from farther away. "
) * 6
FIRST_ANSWER = [
    "-m",
    "minifuse.generate",
    "--method=fused",
    "--prefix=@examples/five_shots.txt",
    "What is the capital of France?",
    "Which city is the capital of France?",
    "France has which capital city?",
    "Can you name the capital of France?",
    "In which city does the government of France sit?",
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--skip-start-up", action="store_true", help="measure decoding alone")
    args = parser.parse_args(argv)
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": _processor(),
        "repeats": args.repeats,
    }
    print(json.dumps(conditions), file=sys.stderr)
    rows = [race(dtype, args.repeats) for dtype in ("bfloat16", "float32")]
    print(f"{'decode':10} {'minifuse':>12} {'transformers':>14} {'ratio':>7} {'aim':>5}")
    for row in rows:
        print(
            f"{row['dtype']:10} {row['minifuse_ms']:9.2f} ms {row['transformers_ms']:11.2f} ms "
            f"{row['ratio']:7.2f} {row['aim']:5.1f}"
        )
    start_up = {}
    if not args.skip_start_up:
        start_up = time_start_up()
        for name, seconds in start_up.items():
            print(f"first fused answer, {name} compile cache: {seconds:.1f} s")
    print(json.dumps({"conditions": conditions, "decode": rows, "start_up_s": start_up}))
    return 0


def race(dtype: str, repeats: int) -> dict:
    """Milliseconds per token of both engines, and the median of their ratios."""
    ours, theirs = minifuse_runner(dtype), transformers_runner(dtype)
    # The first calls compile, allocate, and fill caches.
    ours(LONG), theirs(LONG)
    pairs = [(_ms_per_token(ours), _ms_per_token(theirs)) for _ in range(repeats)]
    return {
        "dtype": dtype,
        "minifuse_ms": statistics.median(own for own, _ in pairs),
        "transformers_ms": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / own for own, other in pairs),
        "aim": {"bfloat16": 4.0, "float32": 3.0}[dtype],
    }


def minifuse_runner(dtype: str) -> Callable[[int], None]:
    """A call that generates a given number of tokens."""
    fuser = Fuser(replace(load_model(dtype=dtype), eos_token_ids=()))

    def run(count: int) -> None:
        result = fuser.generate(segments=[PROMPT], methods=["origin"], max_new_tokens=count)
        assert len(result["origin"].token_ids) == count

    return run


def transformers_runner(dtype: str) -> Callable[[int], None]:
    """The same through transformers' `generate`."""
    import transformers

    folder = resolve_model().folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    token_ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")

    def run(count: int) -> None:
        output = model.generate(
            **token_ids, min_new_tokens=count, max_new_tokens=count, do_sample=False
        )
        assert output.shape[1] - token_ids["input_ids"].shape[1] == count

    return run


def _ms_per_token(run: Callable[[int], None]) -> float:
    seconds = {}
    for count in (SHORT, LONG):
        start = time.perf_counter()
        run(count)
        seconds[count] = time.perf_counter() - start
    return 1000 * (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)


def time_start_up() -> dict[str, float]:
    """Seconds to the first fused answer with an empty and with a warm compile cache."""
    load_model()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        seconds = {}
        for name in ("empty", "warm"):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *FIRST_ANSWER], env=environment, check=True, capture_output=True
            )
            seconds[name] = time.perf_counter() - start
    return seconds


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
