"""The small files of a model folder: JSON read whole or refused in one line, names put in order."""

import json
from collections.abc import Iterable
from pathlib import Path

from minifuse.errors import CheckpointError, one_line


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    raises: CheckpointError where the file is missing, unreadable, not UTF-8, not JSON, or holds
            something else
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; wanted a model in hub layout") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; wanted a JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object for people to read, as UTF-8."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def list_names(names: Iterable[str]) -> str:
    """Names out of a file for a message, sorted; quoted where one would break the line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in sorted(names))
