"""What modules that read and write models share: JSON files, paths, and how both are spoken of."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from minifuse.errors import CheckpointError, MinifuseError, one_line

# An OSError of these numbers: no room on the disk, in a quota, in what one file may hold.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A tokenizer.json of 256,000 tokens has some 30 MB; parsed, it takes several times as much.
MAX_JSON_BYTES = 2**27


def parse_json(text: str | bytes) -> object:
    """What a JSON text holds.

    raises: ValueError for one that is none, or is nested so deeply that the parser gives up
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    raises: CheckpointError where the file is missing, unreadable, too large, not UTF-8, not JSON,
            or holds something else
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes:,} bytes; wanted JSON of at most {MAX_JSON_BYTES:,}"
            )
        content = parse_json(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; wanted a model in hub layout") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; wanted a JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object for people to read, as UTF-8."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def read_toml(path: Path, kind: type[MinifuseError], name: str) -> dict:
    """The table in a TOML file.

    kind:   what is raised where the file cannot be read, or is no TOML in UTF-8
    name:   what an error calls the file
    """
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
        # An integer in hexadecimals may have more digits than Python writes out in a message.
        repr(content)
    except OSError as error:
        raise kind(f"{name} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{name} {path} is not TOML in UTF-8: {one_line(error)}") from None
    return content


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside a path, private until it is whole and gets the path's name.

    Where writing it fails, nothing is left, and what had that name before stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, whole or not at all; `errors` as in `str.encode`."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def list_names(names: Iterable[str]) -> str:
    """Names out of a file for a message, sorted; quoted where one would break the line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in sorted(names))


def is_inside(path_text: str) -> bool:
    """Whether a path stays in its folder; by its words, because the hub's cache is symlinks."""
    windows = PureWindowsPath(path_text)
    is_name = bool(windows.parts) and "\0" not in path_text
    return is_name and not windows.anchor and ".." not in windows.parts


def format_bytes(count: int) -> str:
    """Bytes in the unit that disks are sold in: 98.4 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


@lru_cache(maxsize=1)
def hash_sources() -> str:
    """SHA-256 of the package's own modules (its wings aside): what compiled code was made of."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def tool_command(name: str) -> str:
    """How to start a tool, which lies inside of the package in a wheel, beside it in a checkout."""
    is_wheel = Path(__file__).with_name("tools").is_dir()
    return f"python -m {'minifuse.' if is_wheel else ''}tools.{name}"
