"""Fuzz whatever reads foreign bytes, each target in a process of its own.

python -m tests.fuzz --examples 20000
python -m tests.fuzz --examples 500 --target gguf --target tokenizer --seed 7

Where an input brings out a fault, the target ends, the input is kept in a folder under `--found`,
and the command ends with status 1. The last line is one JSON object.
"""

import argparse
import contextlib
import faulthandler
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# A whole input, on the clock; what takes longer hangs in code that is not Python.
HANG_SECONDS = 180


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--examples", type=int, default=1000, help="of a common target; slow ones get fewer")
    add("--target", action="append", metavar="NAME", help="default: all")
    add("--seed", type=int, default=0, help="default: 0")
    add("--found", type=Path, default=Path("fuzz-found"), help="where inputs are kept")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    if args.here:
        return _run_here(args.target[0], args)
    from .targets import TARGETS

    names = args.target or list(TARGETS)
    unknown = sorted(set(names) - TARGETS.keys())
    if unknown:
        build_parser().error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    results = [_run_apart(name, args) for name in names]
    print(f"{'TARGET':16} {'INPUTS':>8} {'READ':>8} {'REFUSED':>8} {'FAULTS':>6} {'SECONDS':>8}")
    for result in results:
        print(
            f"{result['target']:16} {result['inputs']:8,} {result['read']:8,} "
            f"{result['refused']:8,} {result['faults']:6} {result['seconds']:8.1f}"
        )
    total = {
        key: sum(result[key] for result in results)
        for key in ("inputs", "read", "refused", "faults")
    }
    print(json.dumps({"seed": args.seed, "examples": args.examples, **total, "targets": results}))
    return 1 if total["faults"] else 0


def _run_apart(name: str, args: argparse.Namespace) -> dict:
    """A target in another process: what kills that one is a fault of the target alone."""
    command = [sys.executable, "-m", "tests.fuzz", "--here", "--target", name]
    command += ["--examples", str(args.examples), "--seed", str(args.seed)]
    command += ["--found", str(args.found)]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent, check=False)
    with contextlib.suppress(ValueError, IndexError):
        line = done.stdout.splitlines()[-1]
        # On standard error too, since a long run may be stopped before its table.
        print(line, file=sys.stderr)
        return json.loads(line)
    print(f"{name}: the process died with status {done.returncode}", file=sys.stderr)
    nothing = dict.fromkeys(("inputs", "read", "refused"), 0)
    return {"target": name, **nothing, "faults": 1, "seconds": time.monotonic() - start}


def _run_here(name: str, args: argparse.Namespace) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
    from tqdm import tqdm

    from .checking import check
    from .targets import TARGETS

    target = TARGETS[name]
    outcomes: Counter[str] = Counter()
    num_examples = max(1, args.examples // target.cost)
    bar = tqdm(desc=f"{name:16}", total=num_examples, mininterval=5, unit=" inputs")
    # Here lies the input of a process that died.
    workplace = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    last: dict[str, bytes] = {}

    @seed(args.seed)
    @settings(
        max_examples=num_examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    # Seeds alone are hypothesis' own choices: it takes some ten times longer over every one.
    @given(strategies.randoms(use_true_random=True).map(target.files))
    def run(files: dict[str, bytes]) -> None:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            outcome = check(target, files, workplace)
        except BaseException as error:
            outcome = f"fault {type(error).__name__}"
            last.clear()
            last.update(files)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            outcomes[outcome] += 1
            bar.update()

    start, faults = time.monotonic(), 0
    try:
        run()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        faults = 1
        kept = args.found / name
        kept.mkdir(parents=True, exist_ok=True)
        for file_name, content in last.items():
            (kept / file_name).write_bytes(content)
        import traceback

        traceback.print_exception(error)
        print(f"{name}: {type(error).__name__}, its input is in {kept}", file=sys.stderr)
    bar.close()
    shutil.rmtree(workplace)
    result = {
        "target": name,
        "inputs": sum(outcomes.values()),
        "read": outcomes["read"],
        "refused": sum(n for key, n in outcomes.items() if key.endswith("Error")),
        "faults": faults,
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(outcomes),
    }
    print(json.dumps(result))
    return faults


if __name__ == "__main__":
    sys.exit(main())
