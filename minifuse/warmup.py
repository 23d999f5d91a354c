"""Compile what a model's requests need, before anybody waits for it.

    python -m minifuse.warmup --segments 1,5,20 --prefix-tokens 112,500 --batch-size 8
    python -m minifuse.warmup --save smollm2.artifacts
    python -m minifuse.warmup --load smollm2.artifacts

Which graphs a request needs depends on its lengths alone, so requests of the sizes given are run,
and whatever they need is compiled. It stays in the compile cache (TORCHINDUCTOR_CACHE_DIR).

`--save` compiles in a cache of its own, and writes all of that into one file; `--load` unpacks such
a file first. It holds program code, which runs as soon as it is used: load no file that you would
not run a program from.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.artifacts import load_artifacts, save_artifacts
from minifuse.command import Parser, add_model_flags, load_fuser, run_command
from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.files import format_bytes
from minifuse.trials import TrialSize, add_size_flags, flags_of_sizes, make_trial, sizes_of_flags

if TYPE_CHECKING:
    from minifuse.engine import Fuser

CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
_IS_CODE = "it holds program code: use it only where it comes from somebody you trust"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="python -m minifuse.warmup",
        description="Compile what requests of given sizes need, so that the compile cache on disk "
        "holds it. Numbers may be lists with commas; each combination is run.",
    )
    add_model_flags(parser.add_argument_group("model"))
    add_size_flags(parser.add_argument_group("requests"), several=True)
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=1,
        help="compile for batches of so many requests, too (%(default)s)",
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        type=Path,
        help="compile in an empty cache, and write all of it into this file as well; it fits the "
        "same versions, threads and kind of CPU",
    )
    parser.add_argument(
        "--load",
        metavar="FILE",
        type=Path,
        help="unpack such a file into the cache first. Its content is program code that will run: "
        "load no file that you would not run a program from",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    sizes = sizes_of_flags(args)
    if args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}; wanted at least 1")
    if not args.compile:
        raise UsageError("--no-compile leaves nothing to warm up; leave it out")
    if args.save and args.load:
        raise UsageError("--save and --load were given; wanted one of them")
    if args.save:
        _check_target(args.save)
    if args.load:
        number = load_artifacts(args.load, cache_folder())
        print(f"unpacked {number} files of {args.load}; {_IS_CODE}", file=sys.stderr)
    report = _save(args, sizes) if args.save else warm_up_here(args, sizes, args.batch_size)
    print(json.dumps(report) if args.json else format_report(report))


def _check_target(path: Path) -> None:
    """raises: UsageError where a long run could not write its result in the end"""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--save is {path}; wanted a file in a folder that can be written")


def cache_folder() -> Path:
    """Where Inductor keeps its cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _save(args: argparse.Namespace, sizes: Sequence[TrialSize]) -> dict:
    """Warm up an empty cache in a process of its own, and keep all that came into it."""
    with tempfile.TemporaryDirectory(prefix="minifuse-warmup-") as folder:
        report = warm_up_apart(args, sizes, args.batch_size, Path(folder))
        number = save_artifacts(Path(folder), args.save)
    load_artifacts(args.save, cache_folder())
    size = format_bytes(args.save.stat().st_size)
    print(f"wrote {args.save}: {number} files, {size}; {_IS_CODE}", file=sys.stderr)
    return report


def warm_up_apart(
    args: argparse.Namespace, sizes: Sequence[TrialSize], batch_size: int, cache: Path
) -> dict:
    """Warm up in a new process with a compile cache of its own.

    args:    the flags of `add_model_flags`
    returns: the report of `warm_up_here`, with `process_s` from launch to exit besides
    raises:  MinifuseError where the process fails
    """
    command = [sys.executable, "-m", "minifuse.warmup", "--json", f"--batch-size={batch_size}"]
    command += [f"--dtype={args.dtype}", f"--quantize={args.quantize}", f"--device={args.device}"]
    command += [f"--model={args.model}"] if args.model is not None else []
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *flags_of_sizes(sizes)],
        env={**os.environ, CACHE_DIR: str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - start
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MinifuseError(f"compiling in a new process failed: {one_line(said[-1])}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": elapsed}


def warm_up_here(args: argparse.Namespace, sizes: Sequence[TrialSize], batch_size: int) -> dict:
    """Load a model and warm it up in this process.

    args:    the flags of `add_model_flags`
    returns: load_s, compile_s, and the graphs: see `describe_graphs`
    """
    fuser = load_fuser(args)
    warm_up(fuser, sizes, batch_size)
    return {
        "load_s": fuser.load_s,
        "compile_s": fuser.executor.compile_s,
        "graphs": describe_graphs(fuser),
    }


def warm_up(fuser: "Fuser", sizes: Sequence[TrialSize], batch_size: int = 1) -> None:
    """Run requests of these sizes, alone and as a batch."""
    for size in sizes:
        request = make_trial(fuser.model.tokenizer, size)
        for number in sorted({1, batch_size}):
            fuser.generate_batch(
                [request] * number,
                batch_size=number,
                methods=size.methods,
                # The second token is the first that a step makes.
                max_new_tokens=min(size.new_tokens, 2),
            )


def describe_graphs(fuser: "Fuser") -> list[dict]:
    """What is ready so far, in order: the seconds that it took, and whether it was on disk."""
    return [
        {
            "key": {"kind": graph.kind, "tokens": graph.tokens, **vars(graph.size)},
            **record._asdict(),
        }
        for graph, record in fuser.executor.graphs.items()
    ]


def format_report(report: dict) -> str:
    """A line for each graph, and a sum."""
    graphs = report["graphs"]
    lines = [
        f"{graph['seconds']:8.1f} s  {name_graph(graph)}"
        f"{', found on disk' if graph['is_stored'] else ''}"
        for graph in graphs
    ]
    stored = sum(graph["is_stored"] for graph in graphs)
    lines.append(f"{report['compile_s']:8.1f} s  for {len(graphs)} graphs, {stored} found on disk")
    return "\n".join(lines)


def name_graph(graph: dict) -> str:
    """A graph's kind and sizes in words, of an entry of `describe_graphs`."""
    key = graph["key"]
    tokens = f"{key['tokens']} token{'s' if key['tokens'] > 1 else ''}"
    shared = ", for several requests" if key["is_shared"] else ""
    return f"{key['kind']}: {tokens}, {key['slots']} slots, {key['labels']} labels{shared}"


if __name__ == "__main__":
    sys.exit(main())
