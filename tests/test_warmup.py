"""`python -m minifuse.warmup`, and files of compiled code that it saves and loads."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minifuse.artifacts import describe_build, load_artifacts, save_artifacts
from minifuse.errors import MinifuseError, UsageError
from minifuse.trials import TrialSize, make_text, make_trial, segment_lengths
from minifuse.warmup import main, name_graph

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path):
    """Artifacts of a cache of two files."""
    cache = tmp_path / "cache"
    (cache / "ab" / "locks").mkdir(parents=True)
    (cache / "ab" / "kernel.so").write_bytes(b"\x7fELF" * 100)
    (cache / "graph").write_bytes(b"graph")
    (cache / "ab" / "locks" / "kernel").write_bytes(b"")
    (cache / "kernel.lock").write_bytes(b"")
    (cache / ".kernel.so.partial-x").write_bytes(b"half")
    path = tmp_path / "saved"
    assert save_artifacts(cache, path) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "saved"]
    return path


def rewrite(path: Path, **changes) -> None:
    """The same artifacts with another manifest."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    manifest = next(name for name in content if name.endswith(".json"))
    content[manifest] = json.dumps({**json.loads(content[manifest]), **changes})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_what_is_saved_can_be_loaded(saved, tmp_path):
    target = tmp_path / "other"
    (target / "ab").mkdir(parents=True)
    assert load_artifacts(saved, target) == 2
    assert (target / "ab" / "kernel.so").read_bytes() == b"\x7fELF" * 100
    assert (target / "graph").read_bytes() == b"graph"
    assert len([path for path in target.rglob("*") if path.is_file()]) == 2


def test_what_is_there_already_stays(saved, tmp_path):
    target = tmp_path / "other"
    target.mkdir()
    (target / "graph").write_bytes(b"older")
    load_artifacts(saved, target)
    assert (target / "graph").read_bytes() == b"older"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "1.0"}, "made for torch 1.0, this is "),
        ({"threads": "77"}, "made for threads 77, this is "),
        ({"minifuse": None}, "made for minifuse None, this is "),
        ({"format": 0}, "made for format 0, this is "),
        (
            {"cpu": [*describe_build()["cpu"], "avx4096"]},
            "a CPU with avx4096, which this one lacks",
        ),
        ({"cpu": 7}, "a CPU with 7, which this one lacks"),
        ({"cpu": [[7]]}, r"a CPU with \[7\], which this one lacks"),
    ],
)
def test_artifacts_of_another_build_are_refused(saved, tmp_path, changes, said):
    rewrite(saved, **changes)
    with pytest.raises(UsageError, match=said) as caught:
        load_artifacts(saved, tmp_path / "other")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_cpu_with_more_features_takes_them(saved, tmp_path):
    rewrite(saved, cpu=describe_build()["cpu"][1:])
    assert load_artifacts(saved, tmp_path / "other") == 2


@pytest.mark.parametrize(
    "name", ["cache/../out", "cache//out", "cache/a/../../out", "out", "cache/a/"]
)
def test_nothing_is_unpacked_beside_the_cache(saved, tmp_path, name):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(name, b"x")
    target = tmp_path / "other"
    with pytest.raises(UsageError, match="which lies in no cache"):
        load_artifacts(saved, target)
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_artifacts_that_would_fill_the_disk_are_refused(saved, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=100))
    with pytest.raises(MinifuseError, match=r"saved unpacks to .* kB, and the disk of .* 100 B"):
        load_artifacts(saved, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_damaged_artifacts_are_refused_whole(saved, tmp_path):
    data = bytearray(saved.read_bytes())
    at = data.index(b"cache/graph") + len("cache/graph")
    data[at] ^= 0xFF
    saved.write_bytes(bytes(data))
    with pytest.raises(UsageError):
        load_artifacts(saved, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_files_that_are_no_artifacts_are_refused(tmp_path, content):
    path = tmp_path / "file"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", "x")
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="no file of compiled artifacts"):
        load_artifacts(path, tmp_path / "other")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--segments", "0"], "--segments is 0; wanted at least 1"),
        (["--segments", "1,x"], "'1,x'; wanted numbers with commas"),
        (["--methods", "fussed"], "fussed"),
        (["--batch-size", "0"], "--batch-size is 0; wanted at least 1"),
        (["--no-compile"], "--no-compile leaves nothing to warm up"),
        (["--save", "a", "--load", "b"], "wanted one of them"),
        (["--save", "missing/file"], "a folder that can be written"),
        (["--load", "missing"], "missing is not there"),
        (["--quantize", "int2"], "int2"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_graphs_are_named_in_words():
    key = {"kind": "decode", "tokens": 1, "slots": 1024, "labels": 256, "is_shared": False}
    assert name_graph({"key": key}) == "decode: 1 token, 1024 slots, 256 labels"
    key |= {"tokens": 8, "is_shared": True}
    assert name_graph({"key": key}).endswith("256 labels, for several requests")


# Requests of given sizes


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    from minifuse.tokenizer import Tokenizer

    return Tokenizer.from_folder(tiny_llama_folder)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 17, 128])
@pytest.mark.parametrize("is_start", [True, False])
def test_texts_have_as_many_tokens_as_asked(tokenizer, num_tokens, is_start):
    text = make_text(tokenizer, num_tokens, seed="a", is_start=is_start)
    assert len(tokenizer.encode(text, is_start=is_start)) == num_tokens


@pytest.mark.parametrize("suffix_tokens", [0, 3])
def test_trials_have_the_sizes_asked_for(tokenizer, suffix_tokens):
    size = TrialSize(segments=5, prefix_tokens=40, segment_tokens=9, suffix_tokens=suffix_tokens)
    request = make_trial(tokenizer, size)
    assert request == make_trial(tokenizer, size)
    assert request.prefix != make_trial(tokenizer, size, seed=1).prefix
    lengths = [len(tokenizer.encode(text, is_start=False)) for text in request.segments]
    assert lengths == segment_lengths(size) == [8, 10, 8, 10, 9]
    assert sum(lengths) + 40 + suffix_tokens == size.prompt_tokens
    if not suffix_tokens:
        assert len({tokenizer.encode(text, is_start=False)[-1] for text in request.segments}) == 1


@pytest.mark.parametrize("segments", [1, 2, 3, 8])
@pytest.mark.parametrize("segment_tokens", [1, 2, 7])
def test_segments_differ_but_sum_up(segments, segment_tokens):
    size = TrialSize(segments=segments, segment_tokens=segment_tokens)
    lengths = segment_lengths(size)
    assert sum(lengths) == segments * segment_tokens
    assert min(lengths) >= 1


# For real


def run_warmup(cache: Path, *argv: str | Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "minifuse.warmup", "--json", *map(str, argv)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "program code" in done.stderr or "--load" not in argv
    return json.loads(done.stdout)


@pytest.mark.slow
def test_loaded_artifacts_leave_nothing_to_compile(single_layer_folder, tmp_path):
    argv = ("--model", single_layer_folder, "--prefix-tokens", "20", "--segments", "2")
    path = tmp_path / "tiny.artifacts"
    first = run_warmup(tmp_path / "one", *argv, "--save", path)
    assert [graph["key"]["kind"] for graph in first["graphs"]] == ["prefill", "decode"]
    assert not any(graph["is_stored"] for graph in first["graphs"])
    second = run_warmup(tmp_path / "two", *argv, "--load", path)
    assert [graph["key"] for graph in second["graphs"]] == [g["key"] for g in first["graphs"]]
    assert all(graph["is_stored"] for graph in second["graphs"])
    with zipfile.ZipFile(path) as archive:
        wanted = {name.removeprefix("cache/") for name in archive.namelist()}
    kernels = {str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*.so")}
    assert kernels
    assert kernels <= wanted, "a kernel was compiled anew"
