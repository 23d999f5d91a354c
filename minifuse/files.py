"""What modules that read and write share: files that are whole or not there, JSON, paths."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from minifuse.errors import CheckpointError, MinifuseError, UsageError, one_line

if sys.platform != "win32":
    import fcntl

# An OSError of these numbers: no room on the disk, in a quota, in what one file may hold.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# In the name of what is not whole yet: `.NAME.partial-` and letters that are drawn.
PARTIAL = ".partial-"
# A tokenizer.json of 256,000 tokens has some 30 MB; parsed, it takes several times as much.
MAX_JSON_BYTES = 2**27


def parse_json(text: str | bytes) -> Any:
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
            or holds something else, or text that is none
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes:,} bytes; wanted JSON of at most {MAX_JSON_BYTES:,}"
            )
        text = path.read_bytes().decode("utf-8")
        content = parse_json(text)
        if "\\ud" in text.lower():  # a whole pair comes out as its character, half of one stays
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; wanted a model in hub layout") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{path} has half a surrogate pair; wanted Unicode text") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; wanted a JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object for people to read, as UTF-8; whole or not at all."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_whole(path, text + "\n")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Another name to write to, which gives way to the file's own at the end.

    Private until it is whole. Where writing it fails, nothing is left, and what had the name before
    stays. Of several processes that write one file the last one's stays, whole.
    """

    def make(prefix: str) -> Path:
        try:
            handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        except OSError as error:
            error.filename = str(path)  # the name that people know
            raise
        os.close(handle)
        return Path(name)

    with _claimed(path.parent, partial_prefix(path.name), make) as partial:
        yield partial
        partial.chmod(0o644)
        rename_whole(partial, path)


def partial_prefix(name: str) -> str:
    """How the name of a file or folder begins until it is whole."""
    return f".{name}{PARTIAL}"


@contextlib.contextmanager
def new_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder to write into, which is removed at the end unless it was renamed."""

    def make(prefix: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))

    with _claimed(parent, prefix, make) as folder:
        yield folder


@contextlib.contextmanager
def _claimed(parent: Path, prefix: str, make: Callable[[str], Path]) -> Iterator[Path]:
    """A new file or folder under a name that nobody else has, removed at the end if still there.

    Its lock is held meanwhile, which tells it from what killed processes left; that goes first.
    """
    remove_abandoned(parent, prefix)
    while True:
        path = make(prefix)
        with _locked(path) as is_locked:
            if is_locked is not False and path.exists():  # it was not taken for one that is left
                try:
                    yield path
                finally:
                    _remove(path)
                return


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed processes left under such names: it may be as large as a model."""
    try:
        paths = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError), _locked(path) as is_locked:
            if is_locked:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def rename_whole(source: Path, target: Path) -> None:
    """Give a file or a folder its final name; where the power fails, it is there whole or not.

    raises: OSError
    """
    for path in [source, *source.rglob("*")] if source.is_dir() else [source]:
        _write_through(path)
    source.replace(target)
    with contextlib.suppress(OSError):  # it is there; some disks have no such thing for folders
        _write_through(target.parent)


def _write_through(path: Path) -> None:
    if os.name != "posix":  # a file that is only read, and a folder, cannot be
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Hold a lock; yields what `try_lock` returns, False too where the path is gone."""
    if os.name != "posix":
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        yield try_lock(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed; its process's end closes it, too.

    returns: False where another process has locked it, None where there are no locks
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some disks have none
        return None
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Whether a path leads to an open file or folder."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


class GrowingFile:
    """A file that grows by whole pieces, and belongs to one process at a time."""

    def __init__(self, path: Path):
        """Open a file, or make an empty one.

        raises: UsageError where another process has it open; OSError
        """
        self.path = path
        while True:
            self.is_new = not path.exists()
            # For reading too, but positioned at the end: every write appends.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            is_locked = try_lock(self._file.fileno())
            if is_locked is False:
                self._file.close()
                raise UsageError(
                    f"another process is writing to {path}; wait until it is done, or choose "
                    "another --output"
                )
            self._end = self._file.seek(0, os.SEEK_END)
            if self.is_as_left():
                break
            self._file.close()  # removed by who had it, after it was opened here
        if is_locked is None:
            warnings.warn(
                f"{path} cannot be locked here: see to it that no other process writes to it",
                stacklevel=3,
            )

    def read(self) -> bytes:
        """All of it, but for what something else may have added meanwhile."""
        self._file.seek(0)
        return self._file.readall()[: self._end]

    def cut(self, end: int) -> None:
        """Forget what lies behind a byte.

        raises: as `append`
        """
        self._check()
        self._file.truncate(end)
        self._end = end

    def append(self, content: bytes) -> None:
        """Write a piece: all of it, or nothing.

        raises: MinifuseError where something else changed the file; OSError
        """
        self._check()
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
            os.fsync(self._file.fileno())
        except BaseException:  # an interrupt too must leave whole pieces
            self._file.truncate(self._end)
            raise
        self._end += len(content)

    def close(self, *, remove: bool = False) -> None:
        """Let other processes have it; remove it first if it is to go, and is still as it was."""
        if remove and self.is_as_left():
            Path(os.path.realpath(self.path)).unlink()  # not a link to it
        self._file.close()

    def _check(self) -> None:
        if not self.is_as_left():
            raise MinifuseError(
                f"{self.path} was changed or removed by something else meanwhile, and is left "
                "alone; choose another --output"
            )

    def is_as_left(self) -> bool:
        """Whether the path still leads to what was opened, and that was left alone."""
        handle = self._file.fileno()
        return _is_at(self.path, handle) and os.fstat(handle).st_size == self._end


def check_readable(path: Path) -> None:
    """Ask before a library does that takes a file which may not be read for a damaged one.

    raises: CheckpointError
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def file_version(path: Path) -> tuple[int, ...]:
    """What differs once a file was written to or replaced."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(path: Path, version: tuple[int, ...]) -> None:
    """Compare with an earlier `file_version`.

    raises: CheckpointError
    """
    with contextlib.suppress(OSError):
        if file_version(path) == version:
            return
    raise CheckpointError(
        f"{path} was changed while it was read; start again once nothing writes to it"
    )


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
    # Half a surrogate pair, which JSON can spell, is no part of a name either.
    is_name = bool(windows.parts) and not re.search("[\0\ud800-\udfff]", path_text)
    return is_name and not windows.anchor and ".." not in windows.parts


def format_bytes(count: int) -> str:
    """Bytes in the unit that disks are sold in: 98.4 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


def check_room(folder: Path, num_bytes: int, name: str) -> None:
    """Compare what something unpacks to with the room on the disk, before it fills it.

    raises: MinifuseError
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise MinifuseError(
            f"{name} unpacks to {format_bytes(num_bytes)}, and the disk of {folder} has "
            f"{format_bytes(free)} free; make room there"
        )


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
