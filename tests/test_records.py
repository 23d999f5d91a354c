"""A run's folder: whole items or none, and only under the configuration that it was begun with."""

import json
import shutil

import pytest

from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.records import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RECORDS_FILE,
    RunFolder,
    hold_run,
    read_run,
)

CONFIG = {"model": "tiny", "methods": ["fused", "origin"], "seed": 0, "command": ["x"]}


def lines_of(id: str, n: int = 2, draw: int = 0) -> list[dict]:
    methods = ("fused", "origin")
    unit = {"id": id, "n": n, "draw": draw}
    return [unit | {"method": m, "text": "é\n", "lines": len(methods)} for m in methods]


def read_records(path) -> list[dict]:
    return [json.loads(line) for line in (path / RECORDS_FILE).read_text("utf-8").splitlines()]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "new" / "run"
    with RunFolder(path, CONFIG, resume=False) as folder:
        for id in ("a", "b"):
            folder.append(lines_of(id))
    return path


def test_a_run_is_kept_with_what_it_depends_on(run):
    config, environment = read_run(run)
    assert config == CONFIG | {"format": 2}
    assert {"python", "torch", "cpu", "num_threads"} <= environment.keys()
    assert read_records(run) == lines_of("a") + lines_of("b")
    assert sorted(path.name for path in run.iterdir()) == [
        CONFIG_FILE,
        ENVIRONMENT_FILE,
        RECORDS_FILE,
    ]


def test_a_run_that_failed_leaves_the_files_of_the_next(tmp_path):
    path = tmp_path / "run"

    def fail():
        with RunFolder(path, CONFIG, resume=False) as folder:
            shutil.rmtree(path)
            with RunFolder(path, CONFIG, resume=False) as other:
                other.append(lines_of("a"))
            folder.append(lines_of("b"))

    with pytest.raises(MinifuseError, match="changed or removed by something else"):
        fail()
    assert read_run(path)[0] == CONFIG | {"format": 2}
    assert read_records(path) == lines_of("a")


def test_holding_a_run_makes_no_records(run):
    (run / RECORDS_FILE).unlink()
    with hold_run(run):
        pass
    assert not (run / RECORDS_FILE).exists()


def test_resume_goes_on_behind_what_is_done(run):
    with RunFolder(run, CONFIG, resume=True) as folder:
        assert folder.done == {("a", 2, 0), ("b", 2, 0)}
        for more in ({"n": 3}, {"draw": 1}):
            folder.append(lines_of("a", **more))
        assert folder.done == {("a", 2, 0), ("b", 2, 0), ("a", 3, 0), ("a", 2, 1)}
    with RunFolder(run, CONFIG, resume=True) as folder:
        assert folder.done == {("a", 2, 0), ("b", 2, 0), ("a", 3, 0), ("a", 2, 1)}
    more = lines_of("a", n=3) + lines_of("a", draw=1)
    assert read_records(run) == lines_of("a") + lines_of("b") + more


def test_a_run_torn_at_any_byte_loses_only_the_item_that_was_torn(run):
    """Every length that a killed process, or a full disk, may leave."""
    whole = (run / RECORDS_FILE).read_bytes()
    ends = [len(whole) // 2, len(whole)]
    for length in range(len(whole) + 1):
        (run / RECORDS_FILE).write_bytes(whole[:length])
        with RunFolder(run, CONFIG, resume=True) as folder:
            kept = max(end for end in [0, *ends] if end <= length)
            assert len(folder.done) == [0, *ends].index(kept)
            for id in ("a", "b"):
                if (id, 2, 0) not in folder.done:
                    folder.append(lines_of(id))
        assert (run / RECORDS_FILE).read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "made with seed 0, and this call has 1"),
        ({"methods": ["fused"]}, r"made with methods \['fused', 'origin'\], and this call has"),
        ({"extra": True}, "made with extra None, and this call has True"),
    ],
)
def test_another_configuration_is_refused_by_the_difference(run, change, message):
    with pytest.raises(UsageError, match=message):
        RunFolder(run, CONFIG | change, resume=True)
    assert read_records(run) == lines_of("a") + lines_of("b")


def test_the_command_line_itself_may_differ(run):
    with RunFolder(run, CONFIG | {"command": ["y"]}, resume=True) as folder:
        assert len(folder.done) == 2


def test_a_run_is_not_written_over(run):
    with pytest.raises(UsageError, match="holds a run already; go on with it by --resume"):
        RunFolder(run, CONFIG, resume=False)


@pytest.mark.parametrize("format", [1, 99])
def test_a_run_of_another_version_is_refused(run, format):
    """1: before there were draws of shots."""
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"format": format}))
    message = rf"another version of minifuse \(format {format}, this one has 2\)"
    for work in (lambda: read_run(run), lambda: RunFolder(run, CONFIG, resume=True)):
        with pytest.raises(UsageError, match=message):
            work()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UsageError, match="is there and holds no run"):
        RunFolder(tmp_path, CONFIG, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(UsageError, match=r"holds no run: config\.json is missing"):
        read_run(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MinifuseError, match="cannot be used: Not a directory"):
        RunFolder(tmp_path / "file" / "run", CONFIG, resume=False)


@pytest.mark.parametrize(
    "change", [{"id": ["a"]}, {"lines": "2"}, {"lines": 0}, {"n": True}, {"draw": -1}, None]
)
def test_lines_that_are_no_records_are_an_error_with_their_number(run, change):
    content = (run / RECORDS_FILE).read_text("utf-8").splitlines()
    strange = "{}" if change is None else json.dumps(lines_of("c")[0] | change)
    lines = [content[0], strange, *content[1:]]
    (run / RECORDS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(MinifuseError, match="line 2 is no record"):
        RunFolder(run, CONFIG, resume=True)


def test_lines_that_are_there_twice_are_an_error(run):
    content = (run / RECORDS_FILE).read_text("utf-8")
    (run / RECORDS_FILE).write_text(content + content.splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(MinifuseError, match="line 5 is one more record of id 'a', n 2, draw 0"):
        RunFolder(run, CONFIG, resume=True)


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(UsageError, match="too long"), RunFolder(path, CONFIG, resume=False):
        raise UsageError("too long")
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), RunFolder(path, CONFIG, resume=False):
        raise KeyboardInterrupt  # it can be taken up
    with pytest.raises(UsageError, match="too long"), RunFolder(path, CONFIG, resume=True):
        raise UsageError("too long")
    assert path.exists()
    with RunFolder(tmp_path / "other", CONFIG, resume=False) as folder:
        folder.append(lines_of("a"))
    with pytest.raises(UsageError, match="long"), RunFolder(folder.path, CONFIG, resume=True):
        raise UsageError("the second is too long")
    assert read_records(tmp_path / "other") == lines_of("a")


def test_a_disk_that_is_full_leaves_whole_items(run, monkeypatch):
    with RunFolder(run, CONFIG, resume=True) as folder:
        file = folder._file._file

        class Full:
            written = 0

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, content):
                if self.written:
                    raise OSError(28, "No space left on device")
                self.written = file.write(content[:10])
                return self.written

        monkeypatch.setattr(folder._file, "_file", Full())
        with pytest.raises(MinifuseError, match="No space left on device"):
            folder.append(lines_of("c"))
    assert read_records(run) == lines_of("a") + lines_of("b")
