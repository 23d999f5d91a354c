"""Runs tokens through compiled graphs of a few fixed sizes over a static cache.

A graph is known by (kind, rows, tokens, slots, labels). It is compiled on first use, by a run that
holds padding alone; from then on nothing that fits recompiles: layouts, methods and weights are
values in tensors. Longer inputs go through in chunks, which changes nothing: a token sees earlier
slots alone, and those are in the cache by then.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from minifuse.cache import KVCache, allocate_cache, move_keys
from minifuse.config import ModelConfig
from minifuse.masks import make_decode_mask, make_prefill_mask, make_tables
from minifuse.model import AttentionMask, AttentionRule, LayerMasks, Params, forward, unembed
from minifuse.rope import make_inv_freq

PREFILL_SIZES = (128, 512)
# Several rows make up for shorter calls, and so pad less.
BATCH_PREFILL_SIZES = (32, 512)
DECODE_SIZES = (1, 8, 32)
LABEL_COUNTS = (256, 1024)
MIN_SLOTS = 1024
# What a call costs beside its tokens, in tokens; and the cost of a call of one token, which reads
# weights faster than any other.
CALL_COST = 14
SINGLE_COST = 6
# Up to so many tokens go through the decode graph: one graph less to compile.
MAX_DECODE_TOKENS = 128
# Inductor inlines a norm into the matrix product behind it, and computes it anew for every output
# row, unless an expression of this many operations gets a buffer of its own (default: 50).
# The asserts check the shapes of all weights again in every layer of every step.
CPU_OPTIONS = {"realize_opcount_threshold": 10, "size_asserts": False}


class Token(NamedTuple):
    """One token to run: its id, and where it lies."""

    id: int
    position: int
    slot: int
    label: int


PADDING = Token(0, 0, 0, 0)


class Copy(NamedTuple):
    """A key and value to copy to another slot: the key rotated on, and what label it gets."""

    source: int
    target: int
    turn: int
    label: int


class Inputs(NamedTuple):
    """The tokens of one call."""

    token_ids: Tensor  # i64[B, T]
    positions: Tensor  # i64[B, T]
    slots: Tensor  # i64[B, T]
    labels: Tensor  # i32[B, T]


@dataclass(frozen=True)
class Size:
    """What a batch takes, and what its graphs are compiled for, beside the number of tokens."""

    rows: int
    slots: int
    labels: int


class Context(NamedTuple):
    """What the tokens of a call find: where keys lie, how they turn, and who sees them."""

    key_labels: Tensor  # i32[B, S], 0 where nothing is written
    key_positions: Tensor  # i64[B, S]
    inv_freq: Tensor  # f32[B, D/2]
    visibility: Tensor  # bool[B, L, L]
    bias: Tensor  # f32[B, L, L]


@dataclass
class Session:
    """The cache and the context of a batch of requests while they are answered."""

    size: Size
    cache: KVCache
    context: Context

    def set_tables(self, sees: Sequence[dict[int, dict[int, float]]]) -> None:
        """Fill the tables from each row's rules; rows beyond them hold padding."""
        padding = [{0: {0: 0.0}}] * (self.size.rows - len(sees))
        visibility, bias = make_tables(
            [*sees, *padding], self.size.labels, self.context.bias.device
        )
        self.context = self.context._replace(visibility=visibility, bias=bias)

    def place_keys(self, row: int, slots: range, label: int, first_position: int) -> None:
        """Say what lies in consecutive slots of a row: one label, consecutive positions."""
        where = slice(slots.start, slots.stop)
        self.context.key_labels[row, where] = label
        positions = torch.arange(first_position, first_position + len(slots))
        self.context.key_positions[row, where] = positions.to(self.context.key_positions)

    def forget_keys(self, row: int, first_slot: int) -> None:
        """Hide all keys of a row from a slot on."""
        self.context.key_labels[row, first_slot:] = 0


def prefill_step(
    params: Params, config: ModelConfig, inputs: Inputs, cache: KVCache, context: Context
) -> Tensor:
    """Hidden states float[B, T, C] of many tokens; `cache` is changed in place."""

    def make_mask(rule: AttentionRule) -> AttentionMask:
        return make_prefill_mask(rule, config.group_size)

    return _forward(params, config, inputs, cache, context, make_mask)


def decode_step(
    params: Params, config: ModelConfig, inputs: Inputs, cache: KVCache, context: Context
) -> Tensor:
    """Logits f32[B, T, V] of a few tokens; `cache` is changed in place."""
    return unembed(params, _forward(params, config, inputs, cache, context, make_decode_mask))


def _forward(
    params: Params,
    config: ModelConfig,
    inputs: Inputs,
    cache: KVCache,
    context: Context,
    make_mask: Callable[[AttentionRule], AttentionMask],
) -> Tensor:
    tokens, positions, slots, labels = inputs
    key_labels, key_positions, inv_freq, visibility, bias = context
    rule = AttentionRule(labels, slots, key_labels, visibility, bias)
    windowed = rule._replace(
        query_positions=positions, key_positions=key_positions, window=config.sliding_window
    )
    num_sliding = len(config.sliding_layers)
    masks = LayerMasks(
        full=make_mask(rule) if num_sliding < config.num_hidden_layers else None,
        sliding=make_mask(windowed) if num_sliding else None,
    )
    return forward(params, config, tokens, positions, slots, inv_freq, cache, masks)


class Executor:
    """Owns params, compiled graphs and cache buffers; knows nothing of text or methods.

    compile_s:  seconds spent in compiling runs so far
    recompiles: graphs compiled outside of such runs; 0 unless something is wrong
    """

    def __init__(self, config: ModelConfig, params: Params, *, compile: bool):
        self.config = config
        self.params = params
        self.is_compiled = compile
        self.compile_s = 0.0
        self.recompiles = 0
        self._steps = {"prefill": prefill_step, "decode": decode_step}
        if compile:
            self._steps = {
                kind: _compile(step, params.embed.device) for kind, step in self._steps.items()
            }
        self._compiled: set[tuple[str, int, Size]] = set()
        self._free_caches: list[KVCache] = []

    @property
    def device(self) -> torch.device:
        return self.params.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.params.embed.dtype

    @contextmanager
    def session(self, size: Size, rope_lengths: Sequence[int | None] = ()) -> Iterator[Session]:
        """Tensors for a batch; the cache goes back to be used again.

        Stale keys in it are harmless: nothing sees a slot whose label is 0.

        rope_lengths: `config.rope_length` of each row's request; None for the rows beyond them
        """
        with torch.inference_mode():
            visibility, bias = make_tables([{0: {0: 0.0}}] * size.rows, size.labels, self.device)
            lengths = [*rope_lengths, *[None] * (size.rows - len(rope_lengths))]
            inv_freq = torch.stack([make_inv_freq(self.config, length) for length in lengths])
            shape = (size.rows, size.slots)
            context = Context(
                key_labels=torch.zeros(shape, dtype=torch.int32, device=self.device),
                key_positions=torch.zeros(shape, dtype=torch.long, device=self.device),
                inv_freq=inv_freq.to(self.device),
                visibility=visibility,
                bias=bias,
            )
            session = Session(size, self._take_cache(size), context)
        try:
            yield session
        finally:
            # The most recent two sizes are kept: a batch, and the single row of its prefix.
            self._free_caches = [session.cache, *self._free_caches][:2]

    def _take_cache(self, size: Size) -> KVCache:
        for i, cache in enumerate(self._free_caches):
            if (cache.keys[0].shape[0], cache.num_slots) == (size.rows, size.slots):
                return self._free_caches.pop(i)
        self._free_caches.clear()
        return allocate_cache(
            self.config, rows=size.rows, slots=size.slots, dtype=self.dtype, device=self.device
        )

    def prefill(self, session: Session, rows: Sequence[Sequence[Token]]) -> Tensor:
        """Run tokens, any number of them; hidden states float[B, n, C] of the longest row's n."""
        sizes = PREFILL_SIZES if session.size.rows == 1 else BATCH_PREFILL_SIZES
        return self._run_chunks("prefill", session, rows, sizes)

    def decode(self, session: Session, rows: Sequence[Sequence[Token]]) -> Tensor:
        """Run a few tokens through the decode graph; logits f32[B, n, V]."""
        return self._run_chunks("decode", session, rows, DECODE_SIZES)

    def read(
        self, session: Session, rows: Sequence[Sequence[Token]], wanted: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Run tokens, and return the logits of some of them.

        wanted:  (row, index in that row) pairs
        returns: f32[len(wanted), V]
        """
        row_index, token_index = (list(index) for index in zip(*wanted, strict=True))
        if is_short(rows):
            return self.decode(session, rows)[row_index, token_index]
        return self.unembed(self.prefill(session, rows)[row_index, token_index])

    @torch.inference_mode()
    def move(self, session: Session, rows: Sequence[Sequence[Copy]]) -> None:
        """Copy keys to other slots, rotated on."""
        length = max(map(len, rows))
        padding = Copy(0, 0, 0, 0)
        filled = [[*row, *[padding] * (length - len(row))] for row in rows]
        filled += [[padding] * length] * (session.size.rows - len(rows))
        source, target, turns, labels = torch.tensor(filled, device=self.device).movedim(-1, 0)
        key_labels, key_positions, inv_freq, *_ = session.context
        key_labels.scatter_(1, target, labels.int())
        key_positions.scatter_(1, target, key_positions.gather(1, source) + turns)
        move_keys(session.cache, source, target, turns, inv_freq)

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits f32[n, V] of hidden states float[n, C]; not compiled: n takes any value."""
        return unembed(self.params, hidden[None])[0]

    @torch.inference_mode()
    def _run_chunks(
        self,
        kind: str,
        session: Session,
        rows: Sequence[Sequence[Token]],
        graph_sizes: tuple[int, ...],
    ) -> Tensor:
        length = max(map(len, rows))
        sizes = plan_calls(length, session.size.rows, graph_sizes)
        padded = sum(sizes)
        filled = [[*row, *[PADDING] * (padded - len(row))] for row in rows]
        filled += [[PADDING] * padded] * (session.size.rows - len(rows))
        token_ids, positions, slots, labels = torch.tensor(filled, device=self.device).unbind(-1)
        inputs = Inputs(token_ids, positions, slots, labels.int())
        session.context.key_labels.scatter_(1, slots, inputs.labels)
        session.context.key_positions.scatter_(1, slots, positions)
        outputs = []
        for chunk in zip(*(part.split(list(sizes), dim=1) for part in inputs), strict=True):
            # Contiguous and compact: a graph is compiled for one stride pattern.
            chunk = Inputs(*(part.clone(memory_format=torch.contiguous_format) for part in chunk))
            outputs.append(self._run(kind, session, chunk))
        return torch.cat(outputs, dim=1)[:, :length]

    def _run(self, kind: str, session: Session, inputs: Inputs) -> Tensor:
        key = (kind, inputs.token_ids.shape[1], session.size)
        if self.is_compiled and key not in self._compiled:
            start = time.perf_counter()
            # The default limit of 8 graphs per function would end in a silent eager fallback.
            with torch._dynamo.config.patch(
                recompile_limit=1024,
                accumulated_recompile_limit=4096,
                fail_on_recompile_limit_hit=True,
            ):
                self._call(kind, session, Inputs(*map(torch.zeros_like, inputs)))
            self.compile_s += time.perf_counter() - start
            self._compiled.add(key)
        before = count_compiled_graphs()
        output = self._call(kind, session, inputs)
        if self.is_compiled:
            self.recompiles += count_compiled_graphs() - before
        return output

    def _call(self, kind: str, session: Session, inputs: Inputs) -> Tensor:
        step = self._steps[kind]
        return step(self.params, self.config, inputs, session.cache, session.context)


def _compile(step: Callable, device: torch.device) -> Callable:
    """Compile a step for one executor, with guards on what differs from call to call alone.

    Params never change, the sizes of a cache are those of the context, and the library's own
    functions stay what they are: hundreds of guards on these would cost up to half a millisecond
    a step. The copy has a code object of its own, because Dynamo keeps graphs with the code: two
    models must not find each other's.
    """
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    options = {"guard_filter_fn": _keep_guards}
    if device.type == "cpu":
        options |= CPU_OPTIONS
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _keep_guards(entries: Sequence) -> list[bool]:
    # Nameless guards are on torch's own state, such as the grad mode.
    kept = ("inputs", "context", "config")
    return [not entry.name or entry.name.startswith(kept) for entry in entries]


def count_compiled_graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def is_short(rows: Sequence[Sequence[Token]]) -> bool:
    """Whether the decode graph is to take the tokens."""
    return max(map(len, rows)) <= MAX_DECODE_TOKENS


@lru_cache(maxsize=4096)
def plan_calls(length: int, rows: int, graph_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the calls that take `length` tokens of each row, at the least cost.

    graph_sizes: what is compiled, ascending; the largest is taken while much is left
    """
    if length <= 0:
        return ()
    largest = graph_sizes[-1]
    if length > 2 * largest:
        whole = length // largest - 1
        return (largest,) * whole + plan_calls(length - whole * largest, rows, graph_sizes)
    plans = [
        (size, *plan_calls(length - size, rows, graph_sizes)) for size in reversed(graph_sizes)
    ]
    return min(plans, key=lambda plan: sum(_cost_of_call(size * rows) for size in plan))


def _cost_of_call(num_tokens: int) -> int:
    return SINGLE_COST if num_tokens == 1 else CALL_COST + num_tokens


def round_up(value: int, choices: Sequence[int]) -> int:
    """The smallest choice of at least `value`, else the next power of two."""
    return next((c for c in choices if c >= value), 1 << (value - 1).bit_length())
