"""Kills programs at random moments, takes their work up again, and compares with a run in one go.

    python -m tests.faults --kills 50 --seed 0

Each of `evaluate`, `paraphrase`, `generate --input` and `convert_weights`, on a tiny random model
that runs eagerly, is started anew after every kill -9 until it has ended some times. Half of the
kills fall anywhere in its run time, half into the time in which it writes. After each one no file
under a final name may be half written, unless it is one that grows line by line; at the end the
output has to be that of the undisturbed run to the byte, timings aside, and nothing else may lie
beside it. Exit status 1 where something was found.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ROOT / "examples" / "questions.jsonl"
# A file that is continued is killed so many times at most before it may end.
KILLS_IN_A_ROW = 4
# Nothing is promised to the byte where sums are shared out over other numbers of threads.
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Program(NamedTuple):
    """One way of writing something.

    command: arguments of Python that write to a path, or go on with it
    read:    what has been written, as it is compared: name -> content, timings left out
    inspect: complaints about what a killed process left
    """

    command: Callable[[Path], list[str]]
    read: Callable[[Path], dict[str, object]]
    inspect: Callable[[Path], Iterator[str]]


class Outcome(NamedTuple):
    """What became of a program's kills.

    late:     how many came when there was output already
    finished: how often it was let run to its end, and compared
    """

    kills: int
    late: int
    finished: int
    problems: list[str]


def make_programs(folder: Path) -> dict[str, Program]:
    """The four programs on tiny models, whose files are written into a folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_files import make_model, write_hub_folder

    tiny = write_hub_folder(
        folder / "model", make_model("llama", max_position_embeddings=2048), max_shard_size="100KB"
    )
    # Large enough that writing it takes some time.
    wide = write_hub_folder(
        folder / "wide",
        make_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6),
        max_shard_size="20MB",
    )
    requests = folder / "requests.jsonl"
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    made = [{"id": line["id"], "segments": line["paraphrases"][:3]} for line in lines]
    requests.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    asked = folder / "asked.jsonl"
    made = [{"id": line["id"], "question": line["question"]} for line in lines]
    asked.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    model = ["--model", str(tiny), "--no-compile"]
    return {
        "generate": Program(
            lambda path: [
                *("-m", "minifuse.generate", "--input", str(requests), "--output", str(path)),
                *(*model, "--method", "fused,per_prompt", "--max-new-tokens", "4"),
                *("--temperature", "1", "--stop", "none"),
            ],
            read_lines,
            inspect_lines,
        ),
        "paraphrase": Program(
            lambda path: [
                *("-m", "minifuse.paraphrase", "--input", str(asked), "--output", str(path)),
                *(*model, "--count", "1", "--tries", "2", "--max-new-tokens", "4"),
                *("--batch-size", "2"),
            ],
            read_lines,
            inspect_lines,
        ),
        "evaluate": Program(
            lambda path: [
                *("-m", "minifuse.evaluate", "--dataset", str(QUESTIONS), "--output", str(path)),
                *(*model, "--methods", "fused,logit_avg", "--shots", "1", "--limit", "8"),
                *("--paraphrases", "2", "--max-new-tokens", "3", "--batch-size", "1", "--resume"),
            ],
            read_run,
            inspect_run,
        ),
        "convert_weights": Program(
            lambda path: [
                *("-m", "tools.convert_weights", str(wide), str(path), "--dtype", "float16"),
                *("--max-shard-size", "4MB"),
            ],
            read_folder,
            inspect_folder,
        ),
    }


# What is compared, and what must hold at any moment


def without_timings(line: bytes) -> object:
    return {name: value for name, value in json.loads(line).items() if name != "timings"}


def read_lines(path: Path) -> dict[str, object]:
    record = path.with_name(f"{path.name}.run.json")
    return {
        "lines": [without_timings(line) for line in path.read_bytes().splitlines()],
        "record": record.read_bytes(),
    }


def read_run(path: Path) -> dict[str, object]:
    found: dict[str, object] = {"names": sorted(file.name for file in path.iterdir())}
    lines = (path / "records.jsonl").read_bytes().splitlines()
    found["records.jsonl"] = [without_timings(line) for line in lines]
    # `command` names the output, and so does the report; tables hold timings.
    config = json.loads((path / "config.json").read_bytes())
    found["config.json"] = {name: v for name, v in config.items() if name != "command"}
    return found


def read_folder(path: Path) -> dict[str, object]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def inspect_json(path: Path) -> Iterator[str]:
    if path.exists():
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield f"{path.name} is half a file"


def inspect_lines(path: Path) -> Iterator[str]:
    yield from inspect_json(path.with_name(f"{path.name}.run.json"))
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                yield f"{path.name} has half a line before its end"


def inspect_run(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    for name in ("config.json", "environment.json", "summary.json"):
        yield from inspect_json(path / name)
    report = path / "report.html"
    if report.exists() and not report.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        yield "report.html is half a file"
    from minifuse.errors import MinifuseError
    from minifuse.evaluation.tables import TABLE_SUFFIXES, read_table

    for suffix in TABLE_SUFFIXES:
        table = path / f"results{suffix}"
        try:
            if table.exists() and len(read_table(table)) != 16:
                yield f"{table.name} is half a file"
        except MinifuseError as error:
            yield str(error)


def inspect_folder(path: Path) -> Iterator[str]:
    if path.exists():
        from minifuse.checkpoint import load_params
        from minifuse.config import ModelConfig
        from minifuse.errors import MinifuseError
        from minifuse.files import read_json

        try:
            load_params(path, ModelConfig.from_hf(read_json(path / "config.json")))
        except MinifuseError as error:
            yield str(error)


# Kills


def start(program: Program, output: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program.command(output)],
        cwd=ROOT,
        env=ENVIRON,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_whole(program: Program, output: Path) -> tuple[int, str]:
    process = start(program, output)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


def look(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of all that lies in a folder now."""
    found = []
    for path in folder.rglob("*"):
        try:
            found.append((str(path), path.stat().st_size))
        except FileNotFoundError:  # it was a temporary one
            continue
    return sorted(found)


def kill_after(
    program: Program, output: Path, seconds: float, *, is_late: bool
) -> tuple[bool, bool]:
    """Start a program and kill -9 it; whether it was alive then, and had written something.

    seconds: from its start, or where `is_late` from the first change of what lies in its folder
    """
    before = look(output.parent)
    process = start(program, output)
    if is_late:
        while process.poll() is None and look(output.parent) == before:
            time.sleep(0.001)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL, look(output.parent) != before


def time_phases(program: Program, output: Path) -> tuple[float, float]:
    """Run a program undisturbed; seconds that it took in all, and from its first file on."""
    begin = time.monotonic()
    process = start(program, output)
    while process.poll() is None and not look(output.parent):
        time.sleep(0.001)
    writing = time.monotonic()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return time.monotonic() - begin, time.monotonic() - writing


def kill_again_and_again(
    program: Program, folder: Path, *, kills: int, seed: int, in_a_row: int = KILLS_IN_A_ROW
) -> Outcome:
    """Kill a program so many times, and take its work up in between."""
    draw = random.Random(seed)
    whole = folder / "whole" / "output"
    whole.parent.mkdir(parents=True)
    whole_s, writing_s = time_phases(program, whole)
    wanted = program.read(whole)
    names = [path.name for path in whole.parent.iterdir()]
    num_kills = late = finished = 0
    problems: list[str] = []
    while num_kills < kills:
        output = folder / f"round-{finished}" / "output"
        output.parent.mkdir()
        moments = []
        for _ in range(min(in_a_row, kills - num_kills)):
            is_late = draw.random() < 0.5
            seconds = draw.uniform(0, writing_s if is_late else whole_s)
            was_alive, has_written = kill_after(program, output, seconds, is_late=is_late)
            if not was_alive:
                break
            num_kills += 1
            late += has_written
            moments.append(f"{'+' if is_late else ''}{seconds:.3f} s")
            found = list(program.inspect(output))
            problems += [f"killed at {', '.join(moments)}: {text}" for text in found]
        status, said = (0, "") if program_is_done(program, output) else run_whole(program, output)
        finished += 1
        where = f"killed at {', '.join(moments)}, then let run"
        if status:
            problems.append(f"{where}: exit status {status}, {said.strip().splitlines()[-1:]}")
            continue
        found = program.read(output)
        problems += [f"{where}: other {name}" for name in wanted if found.get(name) != wanted[name]]
        left = sorted({path.name for path in output.parent.iterdir()} - set(names))
        problems += [f"{where}: {name} was left behind" for name in left]
        shutil.rmtree(output.parent)
    return Outcome(num_kills, late, finished, problems)


def program_is_done(program: Program, output: Path) -> bool:
    """A folder that is written in one go has no resuming."""
    return program.read is read_folder and output.exists()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill programs.")
    parser.add_argument("--kills", type=int, default=50, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--programs", default="generate,paraphrase,evaluate,convert_weights")
    args = parser.parse_args(argv)
    num_problems = 0
    with tempfile.TemporaryDirectory() as name:
        programs = make_programs(Path(name))
        for chosen in args.programs.split(","):
            folder = Path(name) / "runs" / chosen
            found = kill_again_and_again(programs[chosen], folder, kills=args.kills, seed=args.seed)
            print(
                f"{chosen}: {found.kills} kills, {found.late} of them after something was written; "
                f"{found.finished} runs to the end, {len(found.problems)} problems",
                flush=True,
            )
            for problem in found.problems:
                print(f"  {problem}", flush=True)
            num_problems += len(found.problems)
    return int(num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
