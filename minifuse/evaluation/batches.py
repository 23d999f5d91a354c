"""Work in fixed groups, written line by line into a file that can be continued."""

import hashlib
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from minifuse.command import check_interrupt
from minifuse.jsonl import ResultsFile, Unit

if TYPE_CHECKING:
    from minifuse.answers import Results
    from minifuse.engine import Fuser
    from minifuse.request import Request

T = TypeVar("T")


class Tally(Protocol):
    """Counts over the lines of a file, for the progress bar and the last word."""

    def add(self, line: dict) -> None: ...
    def describe_progress(self) -> str: ...
    def describe(self) -> str: ...


def write_file(
    path: Path,
    record: Mapping[str, Any],
    units: Sequence[Unit],
    *,
    wanted: Sequence[Hashable],
    read_key: Callable[[dict], tuple[Hashable, Hashable]],
    tally: Tally,
    load: "Callable[[], Fuser]",
    make_lines: "Callable[[Fuser, Collection[Any]], Iterator[dict]]",
    noun: str,
) -> None:
    """Do what a file of one line a unit still lacks, with a progress bar; report on all of it.

    record:     what a later call has to share
    units:      all that the file may hold
    wanted:     ids of those that it is to hold after this call
    make_lines: from the model and the ids that are done, the lines of the wanted others
    noun:       what a unit is called
    raises:     as `ResultsFile`, `load` and `make_lines`
    """
    with ResultsFile(path, record, units, read_key=read_key) as results_file:
        num_done = sum(id in results_file.done for id in wanted)
        if num_done == len(wanted):
            print(f"nothing to do: every {noun} is in {path}", file=sys.stderr)
            return
        for line in results_file.lines():
            tally.add(line)
        fuser = load()
        results_file.check_source({"source": fuser.model.source})
        import tqdm

        with tqdm.tqdm(initial=num_done, total=len(wanted), unit=noun, file=sys.stderr) as bar:
            for line in make_lines(fuser, results_file.done):
                results_file.append([line])
                tally.add(line)
                bar.set_postfix_str(tally.describe_progress(), refresh=False)
                bar.update()
                check_interrupt()
    print(tally.describe(), file=sys.stderr)


def groups_of(work: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive groups of `size`, the last one what is left.

    Commands that resume always run a group whole, also where some of it is done already. Rounding
    depends on which rows share a batch, and a draw may hang on it: so a resumed run repeats the
    uninterrupted one to the byte.
    """
    for start in range(0, len(work), size):
        yield work[start : start + size]


def answer_batch(
    fuser: "Fuser", requests: "Sequence[Request]", *, rows: int = 0, **options: Any
) -> "list[Results]":
    """All requests at once.

    rows:   fill the batch up to so many, by asking the first request again: a smaller batch would
            have graphs of its own to compile
    raises: as `Fuser.generate_batch`
    """
    filled = [*requests, *[requests[0]] * (rows - len(requests))]
    return fuser.generate_batch(filled, batch_size=len(filled), **options)[: len(requests)]


def derive_seed(seed: int, *place: object) -> int:
    """A seed for one call of many under a user's seed; neighbouring seeds share none."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
