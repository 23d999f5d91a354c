"""A run's folder: its configuration, and one JSON line for every answer, written item by item.

config.json        what the results depend on; a run is continued only under the same
environment.json   where it was made
records.jsonl      one line per answer; those of one item, one N and one draw are written at once
"""

import contextlib
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minifuse.errors import MinifuseError, UsageError
from minifuse.files import (
    DISK_FULL,
    GrowingFile,
    parse_json,
    partial_prefix,
    read_json,
    write_json,
)

FORMAT = 2
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
RECORDS_FILE = "records.jsonl"

# What tells one group of lines from another: they are written together, or not at all.
_UNIT = ("id", "n", "draw")

# What a process that was killed before it could write the config leaves; no run as yet.
_BEGINNING = (ENVIRONMENT_FILE, RECORDS_FILE)
_HALF_WRITTEN = (partial_prefix(CONFIG_FILE), partial_prefix(ENVIRONMENT_FILE))

# What may differ between the call that began a run and one that goes on with it.
_FREE_FIELDS = frozenset(["command", "batch_size"])


class RunFolder:
    """An open run folder; used as a context.

    done: (id, n, draw) of the items whose lines are there
    """

    def __init__(self, path: Path, config: dict[str, Any], *, resume: bool):
        """Begin a run, or take one up; a torn end is cut off.

        raises: UsageError where the folder holds a run and `resume` is False, or another run, or
                another process has it; MinifuseError where it cannot be read or written
        """
        self.path = path
        self.done: set[tuple[str, int, int]] = set()
        self._is_new = False
        config = json.loads(json.dumps(config | {"format": FORMAT}))  # as it will be read
        with self._as_error():
            self._check_free()
            path.mkdir(parents=True, exist_ok=True)
            self._file = GrowingFile(path / RECORDS_FILE)
            try:
                if not (path / CONFIG_FILE).exists():
                    self._begin(config)
                elif not resume:
                    raise UsageError(
                        f"{path} holds a run already; go on with it by --resume, or choose another "
                        "--output"
                    )
                else:
                    _check_same(path, read_json(path / CONFIG_FILE), config)
                self._take_up()
            except BaseException as error:
                self.__exit__(None, error, None)
                raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close it; a run that this call began and that failed at once leaves nothing behind."""
        is_ours = self._is_new and not self.done and self._file.is_as_left()
        has_failed = is_ours and isinstance(error, Exception)
        if has_failed:
            for name in (CONFIG_FILE, ENVIRONMENT_FILE):
                (self.path / name).unlink(missing_ok=True)
        self._file.close(remove=has_failed)
        if has_failed:
            with contextlib.suppress(OSError):  # something else may have put a file there
                self.path.rmdir()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the lines of one item, one N and one draw: all of them, or none.

        raises: MinifuseError where the disk is full, say, or something else changed the file
        """
        records = list(records)
        content = b"".join(_dump(record) for record in records)
        with self._as_error():
            self._file.append(content)
        self.done.add(_unit_of(records[0]))

    def _check_free(self) -> None:
        """Leave alone what is neither a run, nor empty, nor what a killed process began."""
        if not self.path.exists() or (self.path / CONFIG_FILE).exists():
            return
        records = self.path / RECORDS_FILE
        is_free = self.path.is_dir() and all(
            file.name in _BEGINNING or file.name.startswith(_HALF_WRITTEN)
            for file in self.path.iterdir()
        )
        if not is_free or (records.exists() and records.stat().st_size):
            raise UsageError(f"{self.path} is there and holds no run; choose another --output")

    def _begin(self, config: dict[str, Any]) -> None:
        self._is_new = True
        write_json(self.path / ENVIRONMENT_FILE, describe_environment())
        write_json(self.path / CONFIG_FILE, config)  # last: a folder with a config is a run

    def _take_up(self) -> None:
        """Find the items that are whole; what a killed process left of the next one is cut off."""
        position = whole = 0
        group: tuple[str, int, int] | None = None
        left = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True), 1):
            position += len(line)
            record = _parse(line)
            if record is None:
                if line.endswith(b"\n"):
                    raise MinifuseError(
                        f"{self.path / RECORDS_FILE}, line {number} is no record; the file was "
                        "changed by something else"
                    )
                break
            key = _unit_of(record)
            if key in self.done:
                raise MinifuseError(
                    f"{self.path / RECORDS_FILE}, line {number} is one more record of id "
                    f"{key[0]!r}, n {key[1]}, draw {key[2]}; the file was changed by something else"
                )
            if key != group:
                group, left = key, record["lines"]
            left -= 1
            if left == 0:
                whole = position
                self.done.add(key)
        self._file.cut(whole)

    @contextlib.contextmanager
    def _as_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_full = error.errno in DISK_FULL
            advice = "make room and go on by --resume" if is_full else "choose another --output"
            raise MinifuseError(
                f"{self.path} cannot be used: {error.strerror or error}; {advice}"
            ) from error


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and environment of a run.

    raises: UsageError where the folder is no run, cannot be read, or another version wrote it;
            CheckpointError where it is damaged
    """
    for name in (CONFIG_FILE, ENVIRONMENT_FILE):
        try:
            is_there = (path / name).is_file()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        if not is_there:
            raise UsageError(f"{path} holds no run: {name} is missing; wanted a run's --output")
    config = read_json(path / CONFIG_FILE)
    _check_format(path, config)
    return config, read_json(path / ENVIRONMENT_FILE)


@contextlib.contextmanager
def hold_run(path: Path) -> Iterator[None]:
    """Keep other processes from writing to a finished run.

    raises: as `read_run`; UsageError where one does; MinifuseError where it cannot be written
    """
    read_run(path)
    try:
        file = GrowingFile(path / RECORDS_FILE)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        file.close(remove=file.is_new)  # a run whose records are gone


def describe_environment() -> dict[str, Any]:
    """The machine and the packages that a run is made with."""
    import torch

    import minifuse

    return {
        "minifuse": minifuse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check_format(path: Path, config: dict[str, Any]) -> None:
    if config.get("format") != FORMAT:
        raise UsageError(
            f"{path} was written by another version of minifuse (format "
            f"{config.get('format')!r}, this one has {FORMAT}); choose another folder"
        )


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    _check_format(path, before)
    names = (before.keys() | now.keys()) - _FREE_FIELDS
    for name in sorted(names, key=lambda name: (name.endswith("_hash"), name)):  # options first
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{path} was made with {name} {_short(before.get(name))}, and this call has "
                f"{_short(now.get(name))}; choose another --output, or the same options"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unit_of(record: dict[str, Any]) -> tuple[str, int, int]:
    return tuple(record[name] for name in _UNIT)


def _dump(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    counts = {"n": 1, "draw": 0, "lines": 1}
    is_record = (
        isinstance(record, dict)
        and isinstance(record.get("id"), str)
        and all(type(record.get(name)) is int and record[name] >= counts[name] for name in counts)
    )
    return record if is_record and line.endswith(b"\n") else None
