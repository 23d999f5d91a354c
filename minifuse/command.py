"""What the command lines share: the model's flags, exit statuses, errors of one line, ctrl-C.

Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted, 141 nobody reads on.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minifuse.config import QUANTIZE_NAMES
from minifuse.errors import MAX_MESSAGE_CHARS, MinifuseError, UsageError, one_line

if TYPE_CHECKING:
    from minifuse.engine import Fuser

# What a shell reports for a program that SIGINT or SIGPIPE ended.
_INTERRUPTED = 130
_BROKEN_PIPE = 141

_is_interrupted = threading.Event()


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, so that all errors look alike; no abbreviated flags."""

    def __init__(self, **options: Any):  # those of argparse
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists what there is")


def add_model_flags(parser: argparse._ActionsContainer, *, compile: bool = True) -> None:
    """The flags that `load_fuser` reads; a parser or a group of one takes them.

    compile: the default of `--compile`
    """
    add = parser.add_argument
    add("--model", metavar="NAME|DIR|HUB_ID|FILE.gguf", help="default: the default model")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto")
    add(
        "--quantize",
        choices=QUANTIZE_NAMES,
        default="none",
        help="hold the weights in 8 or 4 bits; none is as they are stored (default: %(default)s)",
    )
    add("--device", default="auto", help="default: %(default)s")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=compile,
        help="compile the model, or run it op by op "
        f"(default: --{'' if compile else 'no-'}compile)",
    )


def check_output_file(path: Path, flag: str, suffixes: Sequence[str]) -> None:
    """Before long work: a file of that name can be written, and its kind is known.

    raises: UsageError naming the flag
    """
    if path.suffix not in suffixes:
        raise UsageError(f"{flag} is {path}; wanted a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} is {path}; wanted a file in a folder that can be written")


def load_fuser(args: argparse.Namespace) -> "Fuser":
    """The model that the flags of `add_model_flags` ask for; loads torch."""
    import minifuse

    return minifuse.load(
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        quantize=args.quantize,
        compile=args.compile,
    )


def run_command(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do a command's work, parsing included; returns its exit status.

    work:        returns an exit status, None for 0
    interrupted: what is said after ctrl-C
    """
    try:
        with _one_line_warnings(), _noted_interrupts():
            status = work()
        sys.stdout.flush()
    except MinifuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return status or 0


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if ctrl-C came and foreign code swallowed the exception.

    Python drops what is raised in a destructor or a weak reference's callback, and torch has many.
    Long loops look here between two pieces of work.
    """
    if _is_interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[None]:
    def note(*_: object) -> NoReturn:
        _is_interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    _is_interrupted.clear()
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *rest: object, **more: object) -> None:
        first_line, _, _ = str(message).strip().partition("\n")
        print(f"warning: {one_line(first_line, MAX_MESSAGE_CHARS)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        # Whoever leaves out --compile knows.
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield
