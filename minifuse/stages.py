"""Named stages of the work, timed for whoever listens.

    with listen() as spans:
        fuser.generate(...)
    spans[0]        # Span(name="prefix", start=..., end=..., depth=0)

Where nobody listens a stage costs a function call. Listening is for one thread at a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

# What else to enter around every stage while somebody listens: a profiler's mark, for example.
Mark = Callable[[str], AbstractContextManager]


class Span(NamedTuple):
    """A stage that has ended; `start` and `end` in seconds of time.perf_counter."""

    name: str
    start: float
    end: float
    depth: int  # 0 for a stage that lies in no other

    @property
    def ms(self) -> float:
        return 1000 * (self.end - self.start)


class _Listener:
    def __init__(self, mark: Mark | None):
        self.mark = mark or nullcontext
        self.depth = 0
        self.spans: list[Span] = []


_listener: _Listener | None = None


@contextmanager
def listen(mark: Mark | None = None) -> Iterator[list[Span]]:
    """Collect the stages that end meanwhile, in the order of their ends."""
    global _listener
    before, _listener = _listener, _Listener(mark)
    try:
        yield _listener.spans
    finally:
        _listener = before


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name a part of the work; as a decorator, a function's."""
    listener = _listener
    if listener is None:
        yield
        return
    depth = listener.depth
    listener.depth += 1
    start = time.perf_counter()
    try:
        with listener.mark(name):
            yield
    finally:
        listener.depth = depth
        listener.spans.append(Span(name, start, time.perf_counter(), depth))
