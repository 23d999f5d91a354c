"""Every way to multiply with a weight, at every number of rows: `python -m benchmarks.products`.

The thresholds in `minifuse.linear` come from this: each way is the compiled `linear` itself with
the thresholds set so that it is taken. Microseconds, the best of some repeats, ways turn about.

    python -m benchmarks.products --shapes 3072x576 --rows 1,8,64

The last line printed is one JSON object.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from types import FunctionType
from unittest.mock import patch

import torch
from torch import Tensor

from minifuse import linear as products
from minifuse.quantize import pack, quantize_weight

ALWAYS = 10**9
# Takes all rows, and so what torch makes of a product by itself.
PLAIN = "F.linear"
# kind -> way -> thresholds that lead there
WAYS = {
    "float": {
        "reduction": {"REDUCTION_ROWS": ALWAYS},
        "library": {"REDUCTION_ROWS": 0, "WIDENED_ROWS": ALWAYS},
        PLAIN: {"REDUCTION_ROWS": 0, "WIDENED_ROWS": ALWAYS},
        "widened": {"REDUCTION_ROWS": 0, "WIDENED_ROWS": 0, "HAS_BF16_PRODUCTS": False},
    },
    "int8": {
        "kernel": {"INT8_KERNEL_ROWS": ALWAYS},
        "dequantized": {"INT8_KERNEL_ROWS": 0, "WIDENED_ROWS": 0},
    },
    "int4": {
        "kernel": {"INT4_KERNEL_ROWS": ALWAYS},
        "dequantized": {"INT4_KERNEL_ROWS": 0, "WIDENED_ROWS": 0},
    },
}
# Beyond so many rows a reduction takes minutes to no end.
MAX_REDUCTION_ROWS = 8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--shapes", default="3072x576,576x1536,49152x576", help="[out x in]")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args(argv)
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": products.HAS_BF16_PRODUCTS,
        "load_average": os.getloadavg()[0],
        "repeats": args.repeats,
    }
    print(json.dumps(conditions), file=sys.stderr)
    rows = []
    for shape in args.shapes.split(","):
        for count in map(int, args.rows.split(",")):
            out_features, in_features = map(int, shape.split("x"))
            rows.append(measure(out_features, in_features, count, args.repeats))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    print(json.dumps({"conditions": conditions, "rows": rows}))
    return 0


@torch.inference_mode()
def measure(out_features: int, in_features: int, count: int, repeats: int) -> dict:
    """Microseconds of each way for `count` rows."""
    weight = torch.randn(out_features, in_features)
    calls: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, count, in_features).to(dtype)
        for kind, ways in WAYS.items():
            if kind != "float" and dtype != torch.bfloat16:
                continue
            held = (
                weight.to(dtype) if kind == "float" else pack(quantize_weight(weight, kind), dtype)
            )
            for way, thresholds in ways.items():
                is_slow = way == "reduction" and count > MAX_REDUCTION_ROWS
                is_same = way == {torch.float32: "widened", torch.bfloat16: PLAIN}[dtype]
                if not is_slow and not is_same:
                    name = f"{kind if kind != 'float' else str(dtype)[6:]} {way}"
                    live = None if way == PLAIN else torch.tensor(count)
                    calls[name] = _compile(x, held, live, thresholds)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {"shape": f"{out_features}x{in_features}", "rows": count} | {
        name: round(seconds * 1e6) for name, seconds in best.items()
    }


def _compile(
    x: Tensor, weight: products.Weight, live: Tensor | None, thresholds: dict[str, int]
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return products.linear(x, weight, live=live)

    # A code object of its own, and no guards: the graph stays the one of these thresholds.
    own = FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    options = {"guard_filter_fn": lambda entries: [False] * len(entries)}
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    with patch.multiple(products, **thresholds):
        compiled()
    return compiled


if __name__ == "__main__":
    sys.exit(main())
