"""What modules that read and write models share: JSON files, paths, and how both are spoken of."""

import errno
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from minifuse.errors import CheckpointError, one_line

# An OSError of these numbers: no room on the disk, in a quota, in what one file may hold.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def is_inside(path_text: str) -> bool:
    """Whether a path stays in its folder; by its words, because the hub's cache is symlinks."""
    windows = PureWindowsPath(path_text)
    return bool(windows.parts) and not windows.anchor and ".." not in windows.parts


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
