"""What several modules share: paths by their words, sizes in words, foreign text in one line."""

import pytest

from minifuse import files
from minifuse.errors import (
    MAX_MESSAGE_CHARS,
    CheckpointError,
    ConfigError,
    MinifuseError,
    one_line,
)
from minifuse.files import format_bytes, is_inside, new_file, read_json, read_toml, write_whole


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
