"""Runs tokens through compiled graphs of a few fixed sizes over a static cache.

A graph is known by its kind, its number of tokens, and the size of the pool (see `Graph`). It is
compiled on first use, by a run that holds padding alone; from then on nothing that fits recompiles:
layouts, methods, weights and batch mates are values in tensors. Longer inputs go through in chunks,
which changes nothing: a token sees earlier slots alone, and those are in the cache by then.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.types import GuardFilterEntry

from minifuse.attention_mass import attention_mass
from minifuse.cache import KVCache, allocate_cache, cache_bytes, mark_static, move_keys
from minifuse.config import ModelConfig
from minifuse.linear import fast_dtype
from minifuse.masks import Labels, Tables, make_dense_bias, make_mask, table_bytes
from minifuse.memory import call_bytes
from minifuse.model import LayerMasks, Params, forward, query_block_tokens, unembed
from minifuse.pool import Buffers, Lease, Pool, Size
from minifuse.precompiled import Step, precompile
from minifuse.rope import make_inv_freq
from minifuse.stages import stage

PREFILL_SIZES = (128, 512)
# Tokens whose queries visit the same blocks of keys.
PREFILL_BLOCK = 32
# Tokens of a step, and how many share their blocks. The streams of one request see mostly the same
# keys, and read them together; those of many requests do not.
DECODE_BLOCKS = {1: 1, 8: 8, 32: 32}
SHARED_DECODE_BLOCKS = {1: 1, 8: 1, 32: 4, 128: 8}
# What a call costs beside its tokens, and what a place that none of them takes, in tokens; and the
# cost of a call of one token, which is less than any other's. Between what was measured on two
# cores with AVX2 in float32 and int4; that two single calls stand for two tokens is by bfloat16
# (docs/performance.md, "Calls").
CALL_COST = 20
PADDING_COST = 0.3
SINGLE_COST = 11
# Up to so many tokens go through the decode graph: one graph less to compile.
MAX_DECODE_TOKENS = 128
# Inductor inlines a norm into the matrix product behind it, and computes it anew for every output
# row, unless an expression of more than so many operations gets a buffer of its own (default: 50).
# The asserts check the shapes of all weights again in every layer of every step.
# Inductor's CPU template of flex_attention cannot take in what follows it, but is asked to (2.13).
CompileOptions = dict[str, str | int | bool | Callable[..., Any]]
CPU_OPTIONS: CompileOptions = {
    "realize_opcount_threshold": 8,
    "size_asserts": False,
    "epilogue_fusion": False,
}
# What mode="reduce-overhead" stands for: a call replays one recorded CUDA graph. Where that cannot
# be, for a tensor on the CPU, say, it is an error and not a slow step.
CUDA_OPTIONS: CompileOptions = {
    "triton.cudagraphs": True,
    "triton.cudagraph_or_error": True,
    "graph_partition": False,
}
# Calls until a CUDA graph is recorded: the first one compiles, and runs without it.
RECORDING_CALLS = 2


class Token(NamedTuple):
    """One token to run: its id, and where it lies by its request's own count."""

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
    """The tokens of one call, padding last."""

    token_ids: Tensor  # i64[T]
    positions: Tensor  # i64[T]
    slots: Tensor  # i64[T]
    labels: Tensor  # i32[T]
    inv_freq: Tensor  # f32[T, D/2]
    live: Tensor | None  # i64[] on the CPU, how many are no padding; None on other devices


class Context(NamedTuple):
    """What the tokens of a call find: what lies in every slot, and who sees whom."""

    key_labels: Tensor  # i32[S]
    key_positions: Tensor  # i64[S]
    tables: Tables


# What is run for each lease.
TokenGroups = Sequence[tuple[Lease, Sequence[Token]]]
CopyGroups = Sequence[tuple[Lease, Sequence[Copy]]]
# What every call runs: `prefill_step` or `decode_step`, as it stands or compiled.
StepFunction = Callable[[Params, ModelConfig, int, Inputs, KVCache, Context], Tensor]


class Graph(NamedTuple):
    """What a graph is compiled for.

    block: tokens whose queries visit the same blocks of keys
    """

    kind: str
    tokens: int
    block: int
    size: Size


class GraphRecord(NamedTuple):
    """What a graph took to be ready; `is_stored` if it was found on disk whole."""

    seconds: float
    is_stored: bool


def prefill_step(
    params: Params,
    config: ModelConfig,
    block: int,
    inputs: Inputs,
    cache: KVCache,
    context: Context,
) -> Tensor:
    """Hidden states float[T, C] of many tokens; `cache` is changed in place."""
    token_ids, positions, slots, query_labels, inv_freq, live = inputs
    key_labels, key_positions, tables = context
    labels = Labels(query_labels, slots, positions, key_labels, key_positions)
    num_sliding = len(config.sliding_layers)
    masks = LayerMasks(
        full=make_mask(labels, tables, block) if num_sliding < config.num_hidden_layers else None,
        sliding=make_mask(labels, tables, block, config.sliding_window) if num_sliding else None,
    )
    tokens, places, targets, each_freq = (
        part[None] for part in (token_ids, positions, slots, inv_freq)
    )
    return forward(params, config, tokens, places, targets, each_freq, cache, masks, live)[0]


def decode_step(
    params: Params,
    config: ModelConfig,
    block: int,
    inputs: Inputs,
    cache: KVCache,
    context: Context,
) -> Tensor:
    """Logits f32[T, V] of a few tokens; `cache` is changed in place."""
    hidden = prefill_step(params, config, block, inputs, cache, context)
    return unembed(params, hidden[None], inputs.live)[0]


class Executor:
    """Owns params, compiled graphs and cache buffers; knows nothing of text or methods.

    graphs:     what is compiled so far, in order
    recompiles: graphs compiled on any other occasion: another state of torch (autocast, threads),
                or something is wrong; 0 otherwise
    """

    def __init__(self, config: ModelConfig, params: Params, *, compile: bool):
        self.config = config
        self.params = params
        self.is_compiled = compile
        self.recompiles = 0
        self._steps: dict[str, StepFunction] = {"prefill": prefill_step, "decode": decode_step}
        if compile:
            mark_static(params)
            self._steps = {
                kind: _compile(step, params.final_norm.device) for kind, step in self._steps.items()
            }
        self.graphs: dict[Graph, GraphRecord] = {}
        self._ready: dict[Graph, list[StepFunction]] = {}
        self._free_buffers: list[Buffers] = []

    @property
    def device(self) -> torch.device:
        return self.params.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.params.final_norm.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """What attention runs in, wider than the weights where that is faster."""
        return fast_dtype(self.dtype, self.device)

    @property
    def compile_s(self) -> float:
        """Seconds spent on compiling so far, or on finding what was compiled."""
        return sum(record.seconds for record in self.graphs.values())

    @contextmanager
    def pool(self, size: Size) -> Iterator[Pool]:
        """Slots and tables for requests; their memory goes back to be used again."""
        pool = Pool(size, self._take_buffers(size.slots))
        try:
            yield pool
        finally:
            # The most recent two are kept: that of a batch, and that of single requests.
            self._free_buffers = [pool.buffers, *self._free_buffers][:2]

    @torch.inference_mode()
    def _take_buffers(self, slots: int) -> Buffers:
        for i, buffers in enumerate(self._free_buffers):
            if buffers.cache.num_slots == slots:
                return self._free_buffers.pop(i)
        del self._free_buffers[1:]
        cache = allocate_cache(
            self.config, rows=1, slots=slots, dtype=self.cache_dtype, device=self.device
        )
        return Buffers(cache)

    def bytes_for(self, size: Size) -> int:
        """What a pool of this size and its largest call take, beyond what is held already."""
        held = next((b for b in self._free_buffers if b.cache.num_slots == size.slots), None)
        cache = cache_bytes(self.config, rows=1, slots=size.slots, dtype=self.cache_dtype)
        call = call_bytes(
            self.config,
            tokens=PREFILL_SIZES[-1],
            slots=size.slots,
            is_compiled=self.is_compiled,
        )
        tables = table_bytes(size.labels)
        return call + cache * (held is None) + tables * (held is None or not held.has_tables(size))

    def make_inv_freq(self, rope_length: int | None) -> Tensor:
        """f32[D/2] on the device; see `rope.make_inv_freq`."""
        return make_inv_freq(self.config, rope_length).to(self.device)

    def prefill(self, pool: Pool, groups: TokenGroups) -> list[Tensor]:
        """Run tokens, any number of them; hidden states float[n, C] of each group."""
        return self._run_chunks("prefill", pool, groups)

    def decode(self, pool: Pool, groups: TokenGroups) -> list[Tensor]:
        """Run a few tokens through the decode graph; logits f32[n, V] of each group."""
        return self._run_chunks("decode", pool, groups)

    def read(self, pool: Pool, groups: TokenGroups, wanted: Sequence[tuple[int, int]]) -> Tensor:
        """Run tokens, and return the logits of some of them.

        wanted:  (group, index in that group) pairs
        returns: f32[len(wanted), V]
        """
        run = self.decode if is_short(groups) else self.prefill
        outputs = run(pool, groups)
        rows = torch.stack([outputs[group][index] for group, index in wanted])
        return rows if is_short(groups) else self.unembed(rows)

    @torch.inference_mode()
    def move(self, pool: Pool, groups: CopyGroups) -> None:
        """Copy keys to other slots, rotated on."""
        moved = [
            (lease.slots[source], lease.slots[target], turn, lease.labels[label])
            for lease, copies in groups
            for source, target, turn, label in copies
        ]
        if not moved:
            return
        source, target, turns, labels = torch.tensor(moved, device=self.device).unbind(-1)
        pool.key_labels[target] = labels.int()
        pool.key_positions[target] = pool.key_positions[source] + turns
        inv_freq = _each_inv_freq(groups, padding=0)
        move_keys(pool.cache, source[None], target[None], turns[None], inv_freq[None])

    @torch.inference_mode()
    def attention_mass(
        self,
        pool: Pool,
        lease: Lease,
        tokens: Sequence[Token],
        parts: Mapping[int, int],
        num_parts: int,
    ) -> Tensor:
        """How much attention tokens that have been run gave to each part, f32[L, n, num_parts].

        parts: the request's label -> number of the part that its keys belong to
        """
        rows = [(t.id, t.position, lease.slots[t.slot], lease.labels[t.label]) for t in tokens]
        token_ids, positions, slots, labels = _upload(rows, self.device).unbind(-1)
        # What no part claims is hidden from these tokens, and comes to no mass.
        of_label = torch.full((pool.size.labels,), num_parts, device=self.device)
        for label, part in parts.items():
            of_label[lease.labels[label]] = part
        known = Labels(labels, slots, positions, pool.key_labels, pool.key_positions)
        mass = attention_mass(
            self.params,
            self.config,
            token_ids,
            positions,
            lease.inv_freq,
            pool.cache,
            make_dense_bias(known, pool.tables),
            make_dense_bias(known, pool.tables, self.config.sliding_window),
            of_label[pool.key_labels],
            num_parts + 1,
        )
        return mass[..., :num_parts]

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits f32[n, V] of hidden states float[n, C]; not compiled: n takes any value."""
        return unembed(self.params, hidden[None])[0]

    @torch.inference_mode()
    def _run_chunks(self, kind: str, pool: Pool, groups: TokenGroups) -> list[Tensor]:
        """Run all groups one behind the other, in calls of compiled sizes."""
        lengths = [len(tokens) for _, tokens in groups]
        blocks = self._blocks_of(kind, pool.size)
        sizes = plan_calls(sum(lengths), tuple(blocks))
        padding = sum(sizes) - sum(lengths)
        filled = [
            (token_id, position, lease.slots[slot], lease.labels[label])
            for lease, tokens in groups
            for token_id, position, slot, label in tokens
        ]
        filled += [PADDING] * padding
        columns = _upload(filled, self.device).unbind(-1)
        token_ids, positions, slots, labels = (column.contiguous() for column in columns)
        parts = (token_ids, positions, slots, labels.int(), _each_inv_freq(groups, padding))
        pool.key_labels[slots] = parts[3]
        pool.key_positions[slots] = positions
        context = Context(pool.key_labels, pool.key_positions, pool.tables)
        outputs, left = [], sum(lengths)
        for size, *chunk in zip(sizes, *(part.split(list(sizes)) for part in parts), strict=True):
            # Elsewhere it would have to be read back, and rows cost little.
            live = torch.tensor(min(size, left)) if self.device.type == "cpu" else None
            graph = Graph(kind, size, blocks[size], pool.size)
            outputs.append(self._run(graph, Inputs._make((*chunk, live)), pool.cache, context))
            left -= size
        return list(torch.cat(outputs)[: sum(lengths)].split(lengths))

    def _blocks_of(self, kind: str, size: Size) -> dict[int, int]:
        """Compiled sizes, and for each the tokens that share their blocks."""
        wanted = SHARED_DECODE_BLOCKS if size.is_shared else DECODE_BLOCKS
        if kind == "prefill":
            wanted = dict.fromkeys(PREFILL_SIZES, PREFILL_BLOCK)
        return {
            tokens: query_block_tokens(tokens, block, self.config.group_size, self.device)
            for tokens, block in wanted.items()
        }

    def _run(self, graph: Graph, inputs: Inputs, cache: KVCache, context: Context) -> Tensor:
        step = self._steps[graph.kind]
        if self.is_compiled:
            step = self._find_ready(graph) or self._compile(graph, inputs, cache, context)
        before = count_compiled_graphs()
        with stage(f"{graph.kind} {graph.tokens}"):
            output = step(self.params, self.config, graph.block, inputs, cache, context)
        if self.is_compiled:
            self.recompiles += count_compiled_graphs() - before
        return output

    def _find_ready(self, graph: Graph) -> StepFunction | None:
        """What was compiled for a graph, in the state that torch is in now."""
        for step in self._ready.get(graph, ()):
            if not isinstance(step, Step) or step.fits_state():
                return step
        return None

    def _compile(
        self, graph: Graph, inputs: Inputs, cache: KVCache, context: Context
    ) -> StepFunction:
        """Get a graph ready; if it is run for that, then with padding alone."""
        start = time.perf_counter()
        step, is_stored = self._steps[graph.kind], False
        nothing = Inputs._make(None if part is None else torch.zeros_like(part) for part in inputs)
        args = (self.params, self.config, graph.block, nothing, cache, context)
        # The default limit of 8 graphs per function would end in a silent eager fallback.
        with (
            stage(f"compile {graph.kind} {graph.tokens}"),
            torch._dynamo.config.patch(
                recompile_limit=1024,
                accumulated_recompile_limit=4096,
                fail_on_recompile_limit_hit=True,
            ),
        ):
            if self.device.type == "cpu":
                stored = precompile(step, graph.kind, args)
                step, is_stored = stored, stored.is_stored
            else:
                for _ in range(RECORDING_CALLS):
                    step(*args)
        seconds = time.perf_counter() - start
        if graph in self.graphs:  # in another state of torch
            self.recompiles += 1
            seconds += self.graphs[graph].seconds
        self._ready.setdefault(graph, []).append(step)
        self.graphs[graph] = GraphRecord(seconds, is_stored)
        return step


def _upload(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A tensor of Python numbers on a device, without waiting for what a GPU is busy with."""
    pinned = torch.tensor(rows, device="cpu", pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _each_inv_freq(groups: TokenGroups | CopyGroups, padding: int) -> Tensor:
    """Every token's own frequencies, f32[n + padding, D/2]."""
    counts = [len(tokens) for _, tokens in groups]
    counts[-1] += padding
    each = [
        lease.inv_freq.expand(count, -1) for (lease, _), count in zip(groups, counts, strict=True)
    ]
    return torch.cat(each)


def _compile(step: StepFunction, device: torch.device) -> StepFunction:
    """Compile a step for one executor, with guards on what differs from call to call alone.

    Params never change, the sizes of a cache are those of the context, and the library's own
    functions stay what they are: hundreds of guards on these would cost up to half a millisecond
    a step. The copy has a code object of its own, because Dynamo keeps graphs with the code: two
    models must not find each other's.
    """
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    if device.type == "cuda":
        options: CompileOptions = {"guard_filter_fn": _keep_guards} | CUDA_OPTIONS
        return _replayed(torch.compile(own, fullgraph=True, dynamic=False, options=options))
    # Compiled ahead of time (`precompiled`): a step's name on disk stands for its guards.
    options = {"guard_filter_fn": lambda entries: [False] * len(entries)} | CPU_OPTIONS
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _replayed(compiled: StepFunction) -> StepFunction:
    """A compiled step on CUDA, whose output stays as it is when others run.

    Every call begins a new round of CUDA graphs. Otherwise one that follows another would be taken
    for its continuation, and recorded once for each graph that it ever follows.
    """

    def run(*args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # All graphs share their memory: the next to run overwrites this one's output.
        return compiled(*args).clone()

    return run


def _keep_guards(entries: Sequence[GuardFilterEntry]) -> list[bool]:
    # Nameless guards are on torch's own state, such as the grad mode.
    kept = ("inputs", "context", "config", "block")
    return [not entry.name or entry.name.startswith(kept) for entry in entries]


def count_compiled_graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def is_short(groups: TokenGroups) -> bool:
    """Whether the decode graph is to take the tokens."""
    return sum(len(tokens) for _, tokens in groups) <= MAX_DECODE_TOKENS


@lru_cache(maxsize=4096)
def plan_calls(length: int, graph_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the calls that take `length` tokens at the least cost.

    graph_sizes: what is compiled, ascending; the largest is taken while much is left
    """
    if length <= 0:
        return ()
    largest = graph_sizes[-1]
    if length > 2 * largest:
        whole = length // largest - 1
        return (largest,) * whole + plan_calls(length - whole * largest, graph_sizes)
    plans = [(size, *plan_calls(length - size, graph_sizes)) for size in reversed(graph_sizes)]
    return min(plans, key=lambda plan: _cost_of_calls(plan, length))


def _cost_of_calls(sizes: Sequence[int], length: int) -> float:
    """What the calls take, in tokens; all but the last are full."""
    costs = [SINGLE_COST if size == 1 else CALL_COST + size for size in sizes]
    return sum(costs) - (1 - PADDING_COST) * (sum(sizes) - length)
