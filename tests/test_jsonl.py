"""Results files for any kind of line; `generate` and the evaluation's commands test their own."""

import json

import pytest

from minifuse.errors import UsageError
from minifuse.jsonl import ResultsFile, Unit, fingerprint

METHODS = ("fused", "vote")


def key_of(line: dict) -> tuple:
    return (line["id"], line["n"]), line["method"]


def make_units(*, text: str = "") -> list[Unit]:
    keys = [(id, n) for id in ("a", "b") for n in (1, 2)]
    return [Unit(key, fingerprint([key, text]), frozenset(METHODS)) for key in keys]


def lines_of(unit: Unit) -> list[dict]:
    id, n = unit.id
    return [{"id": id, "n": n, "method": method} for method in METHODS]


def write(path, units, *, options=None, source="here", count=None) -> list:
    """Complete a file, or write `count` units; returns the ids that were done before."""
    with ResultsFile(path, options or {"seed": 0}, units, read_key=key_of) as file:
        done = [unit.id for unit in units if unit.id in file.done]
        file.check_source({"source": source})
        for unit in [unit for unit in units if unit.id not in file.done][:count]:
            file.append(lines_of(unit))
    return done


def test_every_cut_is_completed(tmp_path):
    """Units of several lines under ids of several parts: at each byte whole units stay."""
    path, units = tmp_path / "out.jsonl", make_units()
    assert write(path, units) == []
    whole = path.read_bytes()
    size = len("".join(f"{json.dumps(line)}\n" for line in lines_of(units[0])))
    assert len(whole) == len(units) * size
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert write(path, units) == [unit.id for unit in units[: cut // size]]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"seed": 1}}, "made with seed 0, and this call has 1"),
        ({"options": {"seed": 0, "more": 1}}, "made with more None, and this call has 1"),
        ({"source": "there"}, "made with source 'here', and this call has 'there'"),
        ({"units": make_units(text="x")}, r"another request under id \('a', 1\)"),
        ({"units": make_units()[1:]}, "line 1: not a result that this call would write"),
    ],
)
def test_another_run_is_refused(change, message, tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, make_units(), count=2)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        write(path, **{"units": make_units(), **change})
    assert path.read_bytes() == before
    assert write(path, make_units()) == [("a", 1), ("a", 2)]


def test_a_source_that_made_nothing_is_forgotten(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, make_units(), count=0)
    assert list(tmp_path.iterdir()) == []
    path.touch()
    write(path, make_units(), source="there", count=0)
    assert write(path, make_units()) == []


def test_a_line_twice_is_refused(tmp_path):
    path, units = tmp_path / "out.jsonl", make_units()
    write(path, units, count=2)
    content = path.read_bytes()
    path.write_bytes(content + content)
    with pytest.raises(UsageError, match="line 5: not a result"):
        write(path, units)


def test_a_whole_line_of_another_call_is_not_cut_off(tmp_path):
    """Not even the last one, which would do as what a crash left."""
    path = tmp_path / "out.jsonl"
    units = [Unit((id, 1), fingerprint(id), frozenset(["vote"])) for id in "ab"]
    with ResultsFile(path, {"seed": 0}, units, read_key=key_of) as file:
        for id in "ab":
            file.append([{"id": id, "n": 1, "method": "vote"}])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 2: not a result"):
        ResultsFile(path, {"seed": 0}, units[:1], read_key=key_of)
    assert path.read_bytes() == before


def test_lines_are_those_of_the_file_that_was_opened(tmp_path):
    """Something else may add to it, or take its place, before they are read."""
    path, units = tmp_path / "out.jsonl", make_units()
    write(path, units, count=2)
    wanted = [line for unit in units[:2] for line in lines_of(unit)]
    with ResultsFile(path, {"seed": 0}, units, read_key=key_of) as file:
        assert list(file.lines()) == wanted
        with path.open("a") as other:
            other.write("theirs\n")
        assert list(file.lines()) == wanted
        path.unlink()
        assert list(file.lines()) == wanted


def test_a_call_that_wrote_nothing_leaves_the_files_of_the_next(tmp_path):
    path, units = tmp_path / "out.jsonl", make_units()
    first = ResultsFile(path, {"seed": 0}, units, read_key=key_of)
    path.unlink()
    write(path, units, count=1)
    first.close()
    assert write(path, units) == [units[0].id]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.run.json"])
def test_lines_that_are_nested_too_deeply_are_refused(name, tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, make_units())
    (tmp_path / name).write_text("[" * 99_999 + "]" * 99_999 + "\n{}\n")
    with pytest.raises(UsageError, match=r"not a result|does not say which call made it"):
        write(path, make_units())
