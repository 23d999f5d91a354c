"""One sequence of slots for all requests in flight: who holds which slots and labels.

A batch is a longer packed prompt. Requests lie side by side in one row of the cache, each in blocks
of its own, and do not see each other for the same reason that paraphrases do not: no table says so.
So a batch has no padding, its requests come and go one by one, and a prefix that they share is
stored once: its label is one that all of them see.

A request numbers its own slots and labels from 1 (see `layout`); a `Lease` says where they lie.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minifuse.cache import KVCache, mark_static
from minifuse.masks import Rule, Tables, clear_tables, make_tables, write_rules
from minifuse.model import KV_BLOCK

LABEL_COUNTS = (256, 1024, 4096)
MIN_SLOTS = 1024


@dataclass(frozen=True)
class Size:
    """What graphs are compiled for, beside the number of tokens.

    is_shared: several requests are in flight, whose streams see few keys in common
    """

    slots: int
    labels: int
    is_shared: bool = False


class Need(NamedTuple):
    """Slots and labels of its own that a lease wants: without those of padding and prefix."""

    slots: int
    labels: int

    @property
    def blocks(self) -> int:
        return -(-self.slots // KV_BLOCK)


@dataclass(eq=False)
class Lease:
    """Where the slots and labels of one request, or of a prefix, lie in the pool.

    slots, labels: the pool's number for each of the request's own; padding and prefix come first
    inv_freq:      f32[D/2], by how much its keys turn from position to position
    prefix:        the lease that this one continues, None where there is none
    users:         how many leases continue this one
    """

    slots: list[int]
    labels: list[int]
    inv_freq: Tensor
    prefix: "Lease | None" = None
    users: int = 0
    blocks: list[int] = field(default_factory=list)
    rules: dict[int, Rule] = field(default_factory=dict)


class Buffers:
    """The memory of a pool. It outlives the pool, because a CUDA graph reads and writes where it
    was recorded: pools of the same size, one after the other, find everything in the same place.
    The tables of every number of labels that was asked for stay, too: 84 MB for 4,096.
    """

    @torch.inference_mode()
    def __init__(self, cache: KVCache):
        self.cache = cache
        self.device = cache.keys[0].device
        self.key_labels = torch.zeros(cache.num_slots, dtype=torch.int32, device=self.device)
        self.key_positions = torch.zeros(cache.num_slots, dtype=torch.long, device=self.device)
        self._tables: dict[int, Tables] = {}
        mark_static((cache, self.key_labels, self.key_positions))

    def has_tables(self, size: Size) -> bool:
        """Whether there are tables of as many labels already."""
        return size.labels in self._tables

    @torch.inference_mode()
    def clear(self, num_labels: int) -> Tables:
        """Forget all keys; returns tables of so many labels, in which nobody sees anything."""
        self.key_labels.zero_()
        self.key_positions.zero_()
        if num_labels not in self._tables:
            self._tables[num_labels] = make_tables(num_labels, self.device)
            mark_static(self._tables[num_labels])
        clear_tables(self._tables[num_labels])
        return self._tables[num_labels]


class Pool:
    """The cache and its tables, what is known of every slot, and which blocks and labels are free.

    The first block belongs to padding, which writes to slot 0. Stale keys are harmless: nothing
    sees a slot whose label is 0.
    """

    def __init__(self, size: Size, buffers: Buffers):
        self.size = size
        self.buffers = buffers
        self.tables = buffers.clear(size.labels)
        self.cache = buffers.cache
        self.key_labels = buffers.key_labels
        self.key_positions = buffers.key_positions
        self.prefixes: dict[Hashable, Lease] = {}
        self.num_requests = 0
        self._free_blocks = list(range(1, size.slots // KV_BLOCK))
        self._free_labels = list(range(1, size.labels))

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight."""
        return self.num_requests == 0

    def lease(
        self,
        need: Need,
        inv_freq: Tensor,
        prefix: Lease | None = None,
    ) -> Lease | None:
        """Slots and labels for a request; None where too few are free.

        Nothing sees a later slot, so a request has to lie behind its prefix: prefixes take the
        lowest free blocks, requests the highest.
        """
        blocks = self._free_blocks[len(self._free_blocks) - need.blocks :]
        if not self._has_room(need) or (prefix and blocks and blocks[0] < prefix.blocks[-1]):
            return None
        if prefix is not None:
            prefix.users += 1
        self.num_requests += 1
        return self._take(need, blocks, inv_freq, prefix)

    def lease_prefix(self, key: Hashable, need: Need, inv_freq: Tensor) -> Lease | None:
        """Slots and a label for a prefix, found again under `key`; None where too few are free."""
        if not self._has_room(need):
            self.release_prefixes()
        if not self._has_room(need):
            return None
        self.prefixes[key] = self._take(need, self._free_blocks[: need.blocks], inv_freq, None)
        return self.prefixes[key]

    def _has_room(self, need: Need) -> bool:
        return need.blocks <= len(self._free_blocks) and need.labels <= len(self._free_labels)

    def _take(self, need: Need, blocks: list[int], inv_freq: Tensor, prefix: Lease | None) -> Lease:
        slots = [block * KV_BLOCK + i for block in blocks for i in range(KV_BLOCK)]
        labels = self._free_labels[: need.labels]
        self._free_blocks = [block for block in self._free_blocks if block not in blocks]
        self._free_labels = self._free_labels[need.labels :]
        return Lease(
            slots=[*(prefix.slots if prefix else [0]), *slots[: need.slots]],
            labels=[*(prefix.labels if prefix else [0]), *labels],
            inv_freq=inv_freq,
            prefix=prefix,
            blocks=blocks,
        )

    def release(self, lease: Lease) -> None:
        """Give back what a request has of its own."""
        self.num_requests -= 1
        if lease.prefix is not None:
            lease.prefix.users -= 1
        self._give_back(lease)

    def release_prefixes(self) -> None:
        """Give back what the prefixes have that no request uses."""
        for key, lease in list(self.prefixes.items()):
            if lease.users == 0:
                self._give_back(self.prefixes.pop(key))

    def _give_back(self, lease: Lease) -> None:
        first_slot, first_label = 1, 1
        if lease.prefix is not None:
            first_slot, first_label = len(lease.prefix.slots), len(lease.prefix.labels)
        self.forget_keys(lease, first_slot)
        self._free_blocks = sorted([*self._free_blocks, *lease.blocks])
        self._free_labels = sorted([*self._free_labels, *lease.labels[first_label:]])

    @torch.inference_mode()
    def write_rules(self, rules: Sequence[tuple[Lease, Mapping[int, Rule]]]) -> None:
        """Bring the tables up to date with what each request's labels see.

        Rules are compared by identity: they are made once and never changed.
        """
        changed: dict[int, Rule] = {}
        for lease, sees in rules:
            for label, rule in sees.items():
                if label > 0 and lease.rules.get(label) is not rule:
                    lease.rules[label] = rule
                    changed[lease.labels[label]] = {
                        lease.labels[key]: bias for key, bias in rule.items()
                    }
        if changed:
            write_rules(self.tables, changed)

    @torch.inference_mode()
    def place_keys(self, lease: Lease, slots: range, label: int, first_position: int) -> None:
        """Say what lies in consecutive slots: one label, consecutive positions."""
        where = lease.slots[slots.start : slots.stop]
        self.key_labels[where] = lease.labels[label]
        positions = torch.arange(first_position, first_position + len(where))
        self.key_positions[where] = positions.to(self.key_positions)

    @torch.inference_mode()
    def forget_keys(self, lease: Lease, first_slot: int) -> None:
        """Hide all keys of a request from one of its slots on."""
        self.key_labels[lease.slots[first_slot:]] = 0


def slots_for(needs: Sequence[Need]) -> int:
    """Slots of a pool in which such leases fit at once, padding's block included."""
    return KV_BLOCK * (1 + sum(need.blocks for need in needs))


def round_up(value: int, choices: Sequence[int]) -> int:
    """The smallest choice of at least `value`, else the next power of two."""
    return next((c for c in choices if c >= value), 1 << (value - 1).bit_length())
