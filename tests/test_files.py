"""What several modules share: paths by their words, sizes in words, foreign text in one line."""

import pytest

from minifuse.errors import one_line
from minifuse.files import format_bytes, is_inside


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
