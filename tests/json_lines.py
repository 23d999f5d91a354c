"""JSON Lines files of tests, written and read whole."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: Path, lines: Iterable[dict | str]) -> Path:
    """Objects as lines; text as it is."""
    text = "".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    """The objects of a file that ends in a whole line."""
    content = path.read_text(encoding="utf-8")
    assert content.endswith("\n") or not content
    return [json.loads(line) for line in content.split("\n")[:-1]]


def assert_one_error(error: str, message: str) -> None:
    """What a command says on standard error is one line, with the message in it."""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
