"""What several modules share: paths by their words, sizes in words, foreign text in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minifuse import files
from minifuse.errors import (
    MAX_MESSAGE_CHARS,
    CheckpointError,
    ConfigError,
    MinifuseError,
    one_line,
)
from minifuse.files import (
    check_unchanged,
    file_version,
    format_bytes,
    is_inside,
    new_file,
    new_folder,
    read_json,
    read_toml,
    try_lock,
    write_whole,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("deeper/model.safetensors", True),
        ("a..b", True),
        ("../x", False),
        ("a/../../x", False),
        ("a\\..\\x", False),
        ("/etc/x", False),
        ("C:x", False),
        ("\\\\host\\share\\x", False),
        ("", False),
        (".", False),
        ("a\0b", False),
        ("a\ud800b", False),
    ],
)
def test_paths_inside_of_a_folder(text, wanted):
    assert is_inside(text) == wanted


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (10**16, "10,000,000.0 GB"),
    ],
)
def test_sizes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("\x1b[31mred\x00"), "[31mred"),
        (ValueError(), "ValueError"),
        (ValueError("\n\x07"), "ValueError"),
        ("", ""),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "..."),
    ],
)
def test_foreign_text(said, text):
    assert one_line(said) == text


def test_a_message_is_one_printable_line_that_says_what_to_do():
    error = MinifuseError(f"a\nb is \x1b[31m {'x' * 10**6}; do this")
    assert str(error).startswith("a b is  [31m xxx")
    assert str(error).endswith("xxx; do this")
    assert str(error).isprintable()
    assert len(str(error)) <= MAX_MESSAGE_CHARS


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "\\ud83d\\ude42"}')
    assert read_json(path) == {"a": "\N{SLIGHTLY SMILING FACE}"}
    path.write_text('{"a": "\\uD83d"}')
    with pytest.raises(CheckpointError, match="half a surrogate pair"):
        read_json(path)


def test_json_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": 1, "b": 2}')
    with pytest.raises(CheckpointError, match=r"has 16 bytes; wanted JSON of at most 10$"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 0x" + b"f" * 9999, "is not TOML in UTF-8: Exceeds the limit"),
        (b"a = " + b"[" * 9999, "is not TOML in UTF-8: maximum recursion"),
        (b"a = 'x", "is not TOML in UTF-8"),
        (b"a = '\xff'", "is not TOML in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_toml_that_cannot_be_read(tmp_path, content, message):
    """Python reads hexadecimals of any length, and then refuses to write them into a message."""
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^card .*a.toml {message}"):
        read_toml(path, ConfigError, "card")


def test_a_file_is_private_until_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with new_file(path) as temporary:
        temporary.write_text("x")
        assert temporary.stat().st_mode & 0o777 == 0o600
        assert not path.exists()
    assert path.read_text() == "x"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new\ud800")

    def stop_half_way():
        with new_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "a").symlink_to("theirs")
    write_whole(tmp_path / "a", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "a").read_text() == "ours"


def test_what_unpacks_to_more_than_the_disk_has_is_refused(tmp_path):
    files.check_room(tmp_path / "new" / "folder", 1, "a")
    with pytest.raises(MinifuseError, match=r"a\.zip unpacks to .* GB, and the disk of .*new has"):
        files.check_room(tmp_path / "new", 2**60, "a.zip")


WRITE = """
import sys
from pathlib import Path
from minifuse.files import write_whole
path, letter = Path(sys.argv[1]), sys.argv[2]
for number in range(100):
    write_whole(path, letter * (number * 1000 + 1))
    (found,) = set(path.read_text())
"""


def test_processes_that_write_one_file_write_it_whole(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path / "a")]
    processes = [
        subprocess.Popen([*command, letter], stderr=subprocess.PIPE, text=True) for letter in "abc"
    ]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert len((tmp_path / "a").read_text()) == 99_001
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_of_a_file_goes(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".a.partial-x").write_text("half")
    (tmp_path / ".a.partial-y").symlink_to("theirs")
    os.mkfifo(tmp_path / ".a.partial-z")
    write_whole(tmp_path / "a", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    # A link is nothing that was left; what waits for a writer does not keep anybody waiting.
    assert sorted(os.listdir(tmp_path)) == [".a.partial-y", "a", "theirs"]


@pytest.mark.parametrize("has_locks", [True, False])
def test_writers_of_one_file_leave_each_others_alone(has_locks, tmp_path, monkeypatch):
    if not has_locks:
        monkeypatch.setattr(files, "try_lock", lambda handle: None)
    path = tmp_path / "a"
    with new_file(path) as first:
        first.write_text("first")
        with new_file(path) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_made_is_named_as_people_know_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "none" / "a", "x")
    assert caught.value.filename == str(tmp_path / "none" / "a")


def test_a_name_is_given_once_all_is_on_the_disk(tmp_path, monkeypatch):
    """A machine may stop at any moment after the renaming."""
    done = []
    monkeypatch.setattr(files, "_write_through", lambda path: done.append(path.name))
    replace = Path.replace

    def record(self, target):
        done.append(f"{self.name} to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", record)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "part").touch()
    files.rename_whole(tmp_path / "new", tmp_path / "whole")
    assert done == ["new", "part", "new to whole", tmp_path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_what_killed_processes_left_of_folders_goes_but_not_what_is_in_use(tmp_path):
    for name in (".x-left", ".x-empty", ".y-other"):
        (tmp_path / name).mkdir()
    (tmp_path / ".x-left" / "a").touch()
    with new_folder(tmp_path, ".x-") as first:
        assert sorted(os.listdir(tmp_path)) == sorted([first.name, ".y-other"])
        with new_folder(tmp_path, ".x-") as second:
            assert first.is_dir()
            second.rename(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == [".y-other", "whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_a_lock_is_one_processs_until_its_file_is_closed(tmp_path):
    with (tmp_path / "a").open("w") as first, (tmp_path / "a").open() as second:
        assert try_lock(first.fileno())
        assert try_lock(second.fileno()) is False
        first.close()
        assert try_lock(second.fileno())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("other"),
        lambda path: write_whole(path, "same"),
        lambda path: os.utime(path, ns=(0, 1)),
        lambda path: path.unlink(),
    ],
    ids=["written", "replaced", "touched", "removed"],
)
def test_a_file_that_was_changed(change, tmp_path):
    path = tmp_path / "a"
    path.write_text("same")
    version = file_version(path)
    check_unchanged(path, version)
    change(path)
    with pytest.raises(CheckpointError, match="a was changed while it was read; start again"):
        check_unchanged(path, version)
