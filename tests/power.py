"""How far planted faults move a model, beside what `minifuse.verify` tolerates.

    python -m tests.power --dtype float32

Each fault of the table in docs/trust.md is planted into a freshly loaded model, run eagerly, and
the checks are made that compare distributions. One line for each, `!` where the fault is seen.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_cases import keep_a_stale_slot, lose_a_stored_prefix
from test_verify import (
    favour_the_first,
    leak,
    lose_balance,
    rules_with,
    swap_heads,
    turn_too_far,
)

import minifuse
from minifuse.checks import run_checks


def halve_the_base(fuser, monkeypatch):
    config = fuser.executor.config
    fuser.executor.config = replace(config, rope_theta=config.rope_theta / 2)


FAULTS = {
    "none": lambda fuser, monkeypatch: None,
    "two heads swapped": swap_heads,
    "half the RoPE base": halve_the_base,
    "a leak between segments": rules_with(leak),
    "no balance": rules_with(lose_balance),
    "a bias on the first segment": rules_with(favour_the_first),
    "moved keys turned too far": turn_too_far,
    "a stale slot": keep_a_stale_slot,
    "a lost prefix": lose_a_stored_prefix,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description="Plant faults.")
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--faults", default=",".join(FAULTS), help="names with commas")
    args = parser.parse_args()
    for name in args.faults.split(","):
        fuser = minifuse.load(args.model, dtype=args.dtype, compile=False)
        with pytest.MonkeyPatch.context() as monkeypatch:
            FAULTS[name](fuser, monkeypatch)
            for found in run_checks(fuser):
                if found.tolerance:
                    seen = "!" if found.is_passed is False else " "
                    sizes = f"{found.measured:9.2g} of {found.tolerance:.2g} nats"
                    print(f"{name:28} {seen} {found.name:32} {sizes}", flush=True)


if __name__ == "__main__":
    main()
