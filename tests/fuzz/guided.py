"""Inputs that coverage guides: atheris keeps the choices that reached new code, and changes them.

What it guides is minifuse's own Python. The readers below it, in C++ and Rust, come without
instruments.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import NoReturn

# Choices that one input may make; behind them they are drawn.
MAX_BYTES = 4096


class Choices(Random):
    """A `Random` that makes the choices that some bytes spell."""

    def __init__(self, data: bytes):
        super().__init__(0)
        self._data = data

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        if len(self._data) < size:
            return super().getrandbits(k)
        spelled, self._data = self._data[:size], self._data[size:]
        return int.from_bytes(spelled, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """minifuse's modules that are imported in here tell atheris where they get.

    raises: ModuleNotFoundError without atheris (pip install -e '.[fuzz]')
    """
    import atheris

    with atheris.instrument_imports(include=["minifuse"]):
        yield


def run_guided(
    one: Callable[[Random], None],
    end: Callable[[BaseException | None], int],
    *,
    runs: int,
    seed: int,
) -> NoReturn:
    """Try so many inputs, or up to the first that fails; then the process ends.

    one: makes an input of choices and tries it
    end: told of the exception that came out, if any; gives the exit status
    """
    import atheris

    count = 0

    def try_one(data: bytes) -> None:
        nonlocal count
        count += 1
        error = None
        try:
            one(Choices(data))
        except BaseException as raised:
            error = raised
        if error is not None or count == runs:
            status = end(error)
            sys.stdout.flush()
            os._exit(status)  # libFuzzer would end it as well, without a last word of ours

    options = [f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-len_control=0", "-verbosity=0"]
    # `check` looks at time and memory itself; a timeout of 0 would be one.
    options += ["-rss_limit_mb=0", f"-timeout={2**20}"]
    atheris.Setup(["tests.fuzz", *options], try_one)
    atheris.Fuzz()
    raise AssertionError("it ends by itself")
