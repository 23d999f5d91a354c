"""A target, and one input of it: laid into a folder, read under limits, judged."""

import contextlib
import os
import resource
import signal
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from minifuse.errors import MAX_MESSAGE_CHARS, MinifuseError

# One input takes milliseconds, and no more memory than the files of a tiny model.
CPU_SECONDS = 10
MEMORY_BYTES = 2**29


Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A kind of foreign file.

    files: makes what lies in a folder, by name, of choices
    read:  reads the folder; may write into its `out`, and nowhere else
    cost:  how many inputs of a common target take as long as one of this
    """

    name: str
    files: Callable[[Random], Files]
    read: Callable[[Path], None]
    cost: int = 1


class Fault(AssertionError):
    """What no input may bring about."""


class _Overrun(BaseException):
    """Not an Exception, so that nobody takes it for a fault of the file."""


def check(target: Target, files: Files, workplace: Path | None = None) -> str:
    """Have a target read files; returns "read", or the name of the MinifuseError that it raised.

    workplace: where the folder is made, and left where the process dies
    raises:    Fault, or whatever else the target raised
    """
    with tempfile.TemporaryDirectory(prefix="input-", dir=workplace) as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            with _limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(folder)
            outcome = "read"
        except MinifuseError as error:
            _check_message(str(error))
            outcome = type(error).__name__
        _check_leftovers(Path(place), files)
        return outcome


def _check_message(text: str) -> None:
    if not text or not text.isprintable():
        raise Fault(f"a message is no printable line: {text!r}")
    if len(text) > MAX_MESSAGE_CHARS:
        raise Fault(f"a message has {len(text)} characters: {text[:200]!r}")


def _check_leftovers(place: Path, files: Files) -> None:
    """Nothing outside of the folder, no temporary file in it, nothing that others may write."""
    if os.listdir(place) != ["folder"]:
        raise Fault(f"files outside of the folder: {sorted(os.listdir(place))}")
    for path in (place / "folder").rglob("*"):
        if path.name.startswith(".") or path.suffix in (".tmp", ".part"):
            raise Fault(f"a temporary file is left: {path.name}")
        if path.lstat().st_mode & stat.S_IWOTH:
            raise Fault(f"anybody may write {path.name}")
    named = {path.name for path in (place / "folder").iterdir()}
    extra = named - files.keys() - {"out"}
    if extra:
        raise Fault(f"files that nobody asked for: {sorted(extra)}")


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """CPU time and memory; raises Fault where the work took more.

    Code that is not Python sees the end of memory, but no signal: for it, the clock is looked at
    afterwards.
    """

    def stop(_: int, __: FrameType | None) -> None:
        raise _Overrun

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGPROF, stop)
    peak, start = _peak_bytes(), time.process_time()
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * MEMORY_BYTES, hard)
    )
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    except _Overrun:
        raise Fault(f"took more than {CPU_SECONDS} s of CPU time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
        taken, grown = time.process_time() - start, _peak_bytes() - peak
        if taken > CPU_SECONDS:
            raise Fault(f"took {taken:.1f} s of CPU time")
        if grown > MEMORY_BYTES:
            raise Fault(f"took {grown:,} bytes more than anything before")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
