"""What is left over behind a soak's calls: slots, labels, prefixes, graphs, memory."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minifuse.engine import STORED_PREFIXES, Fuser
from minifuse.executor import count_compiled_graphs
from minifuse.model import KV_BLOCK
from minifuse.pool import Need, Pool, Size
from minifuse.recompiles import count_graph_breaks


class Watch:
    """Looks at what is left over: pools, buffers, prefixes, graphs, memory."""

    def __init__(self, fuser: Fuser):
        self.fuser = fuser
        self.lines: list[str] = []
        self.is_off = False
        make_pool = fuser.executor.pool

        @contextlib.contextmanager
        def watched(size: Size) -> Iterator[Pool]:
            with make_pool(size) as pool:
                yield pool
                # Not where it was abandoned; at once, since the next pool has the same memory.
                if not self.is_off:
                    self.lines += _left_in(pool)

        fuser.executor.pool = watched  # type: ignore[method-assign]  # of this one alone
        self.counts = self._count()

    def _count(self) -> tuple[int, int, int, int]:
        executor = self.fuser.executor
        graphs = len(executor.graphs)
        return graphs, count_compiled_graphs(), count_graph_breaks(), executor.recompiles

    def start(self) -> None:
        """What has been compiled so far is right."""
        self.counts = self._count()
        self.lines.clear()

    def new_graphs(self) -> int:
        """Graphs, graph breaks and recompilations since then; 0 where nothing is compiled ahead."""
        if not self.fuser.executor.is_compiled:
            return 0
        now = self._count()
        found = sum(b - a for a, b in zip(self.counts, now, strict=True))
        self.counts = now
        return found

    def left_over(self) -> Iterator[str]:
        """What the calls since the last look did not give back."""
        yield from self.lines
        self.lines.clear()
        if len(self.fuser._prefixes) > STORED_PREFIXES:
            yield f"{len(self.fuser._prefixes)} prefixes are stored"


def _left_in(pool: Pool) -> Iterator[str]:
    """What a pool whose requests are done still holds, beside prefixes."""
    if pool.num_requests:
        yield f"{pool.num_requests} leases were not given back"
    users = sum(lease.users for lease in pool.prefixes.values())
    if users:
        yield f"prefixes have {users} users that are gone"
    pool.release_prefixes()
    whole = Need(pool.size.slots - KV_BLOCK, pool.size.labels - 1)
    if pool.lease(whole, torch.empty(0)) is None or bool(pool.key_labels.any()):
        yield "slots or labels of a pool were not given back"


def resident_bytes() -> int:
    """Memory of this process that is resident, what is freed given back before; 0 if unknown."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth_of(samples: Sequence[tuple[int, int]]) -> int | None:
    """What a line through (requests, bytes) rises by from first to last; None for too few."""
    if len(samples) < 4:
        return None
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return int(slope * (x[-1] - x[0]))
