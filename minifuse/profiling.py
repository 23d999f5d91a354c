"""Where the time of one request goes: measures, on one machine, in one process.

`profile` runs a request of a given size and returns plain data; `profile_report` shows it. Times
are wall clock. What other programs take from the cores is in every one of them: the load average
stands among the conditions, before and after.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import minifuse
from minifuse.cache import cache_bytes
from minifuse.config import ModelConfig
from minifuse.engine import Fuser
from minifuse.executor import PREFILL_BLOCK, PREFILL_SIZES
from minifuse.linear import fast_dtype
from minifuse.masks import Labels, make_mask, make_tables, write_rules
from minifuse.pool import LABEL_COUNTS, MIN_SLOTS
from minifuse.recompiles import count_graph_breaks, explain_recompiles
from minifuse.stages import listen
from minifuse.trials import TrialSize, make_trial
from minifuse.warmup import describe_graphs, warm_up_apart

# Enough to be far larger than any cache, little enough for any machine.
READ_BYTES = 512 * 2**20
PRODUCT_SIZES = (256, 512, 1024, 2048)
# A product that takes longer than this is not tried any larger.
LONG_PRODUCT_S = 0.3
# Steps behind each length of context, and of the eager and the marked run.
FEW_STEPS = 8


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    batch:         requests at once where throughput is measured
    repeats:       of every measurement; medians are reported
    contexts:      live tokens to time a step behind, by a longer prefix; those that are too few
                   for the rest of the request are left out
    compile_times: whether to start new processes with an empty and then a warm compile cache
    top:           operators to list; they come from graphs of their own, with marks, which have
                   to be compiled first. 0 for none
    trace:         a file for a Chrome trace of one request
    """

    batch: int = 1
    repeats: int = 5
    contexts: tuple[int, ...] = (200, 400, 600, 800)
    compile_times: bool = False
    top: int = 10
    trace: Path | None = None


def profile(
    fuser: Fuser,
    size: TrialSize,
    options: ProfileOptions,
    args: argparse.Namespace,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measure all there is to know about one request size; see `profile_report` for the fields.

    args: the flags of `add_model_flags`, for new processes
    say:  told what is being done, for long runs
    raises: UsageError for sizes that the model cannot take
    """
    # Every answer is as long as was asked for.
    fuser.model = replace(fuser.model, eos_token_ids=())
    report: dict[str, Any] = {"conditions": describe_conditions(), "model": describe_model(fuser)}
    report["request"] = {
        **asdict(size),
        "methods": list(size.methods),
        "batch": options.batch,
        "repeats": options.repeats,
    }
    report["load_s"] = fuser.load_s
    say("first request, which compiles")
    start = time.perf_counter()
    request = make_trial(fuser.model.tokenizer, size)
    with listen() as spans:
        fuser.generate_batch([request], **_options(size))
    report["first_request_s"] = time.perf_counter() - start
    report["first_compile_s"] = fuser.executor.compile_s
    say("requests")
    report["request_ms"] = measure_request(fuser, size, options.repeats)
    report["batch"] = measure_batch(fuser, size, options)
    report["context"] = measure_contexts(fuser, size, options)
    report["timeline"] = make_timeline(fuser, size)
    report["peak_memory_bytes"] = peak_memory(fuser.executor.device)
    report["compile"] = {
        "compile_s": fuser.executor.compile_s,
        "graphs": describe_graphs(fuser),
        "recompiles": fuser.executor.recompiles,
        "graph_breaks": count_graph_breaks(),
        # Run eagerly, flex_attention still compiles something of its own.
        "explained": explain_recompiles(spans) if fuser.executor.is_compiled else [],
    }
    say("ceilings, masks")
    report["ceilings"] = measure_ceilings(fuser.executor.device, fuser.executor.dtype)
    report["step"] = measure_step(fuser, size, report)
    report["masks_ms"] = measure_masks(fuser, size, options.repeats)
    if options.trace is not None:
        write_trace(fuser, size, options.trace)
    if fuser.executor.is_compiled:
        say("the same eagerly")
        report["eager"] = measure_eager(fuser, size, report)
    if options.top:
        say("operators")
        report["operators"] = measure_operators(fuser, size, options.top)
    if options.compile_times:
        say("new processes with an empty and a warm compile cache")
        report["compile_times"] = measure_compile_times(args, size, options.batch)
    report["conditions"]["load_average_after"] = load_average()
    return report


# Conditions


def describe_conditions() -> dict:
    """What every number depends on, beside the model and the request."""
    return {
        "cpu": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minifuse": minifuse.__version__,
        "load_average": load_average(),
    }


def describe_model(fuser: Fuser) -> dict:
    """Name, source, dtype, and how it runs."""
    executor = fuser.executor
    device = executor.device
    return {
        "name": fuser.model.name,
        "source": fuser.model.source,
        "dtype": str(executor.dtype).removeprefix("torch."),
        "quantize": fuser.model.config.quantize or "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "compiled": executor.is_compiled,
    }


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes; None where the system has none."""
    return [round(number, 2) for number in os.getloadavg()] if hasattr(os, "getloadavg") else None


def processor_name() -> str:
    """As the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on the device if that is CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Requests


def _options(size: TrialSize, new_tokens: int | None = None) -> dict:
    return {
        "methods": size.methods,
        "max_new_tokens": new_tokens or size.new_tokens,
        "stop": [],
    }


def measure_request(fuser: Fuser, size: TrialSize, repeats: int) -> dict:
    """Milliseconds to the first token with a new and with a stored prefix, and to the last.

    Medians; the two kinds take turns.
    """
    found: dict[str, list[float]] = {name: [] for name in ("cold", "cached", "whole")}
    for seed in range(1, repeats + 1):
        request = make_trial(fuser.model.tokenizer, size, seed)
        for name in ("cold", "cached"):
            start = time.perf_counter()
            events = fuser.stream(
                segments=request.segments,
                prefix=request.prefix,
                suffix=request.suffix,
                **_options(size),
            )
            next(events)
            found[name].append(1000 * (time.perf_counter() - start))
            for _ in events:
                pass
        found["whole"].append(1000 * (time.perf_counter() - start))
    median = {name: statistics.median(times) for name, times in found.items()}
    return {
        "first_token_prefix_new": median["cold"],
        "first_token_prefix_stored": median["cached"],
        "whole_prefix_stored": median["whole"],
    }


def measure_batch(fuser: Fuser, size: TrialSize, options: ProfileOptions) -> dict:
    """Times of steps and throughput of `options.batch` requests at once, one prefix for all."""
    requests = [make_trial(fuser.model.tokenizer, size)] * options.batch
    steps, rates, prefills = [], [], []
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        with listen() as spans:
            results = fuser.generate_batch(requests, batch_size=options.batch, **_options(size))
        elapsed = time.perf_counter() - start
        if repeat == 0:
            continue  # may compile
        answers = [answer for result in results for answer in _answers(result)]
        steps += [span.ms for span in spans if span.name == "step"]
        prefills.append(sum(_answers(result)[0].timings["prefill_ms"] for result in results))
        rates.append(sum(len(answer.token_ids) for answer in answers) / elapsed)
    return {
        "requests": options.batch,
        "prefill_ms": statistics.median(prefills),
        "step_ms": percentiles(steps),
        "num_steps": len(steps),
        "tokens_per_s": statistics.median(rates),
    }


def _answers(results: dict) -> list:
    found = (v if isinstance(v, list) else [v] for v in results.values())
    return [answer for answers in found for answer in answers]


def percentiles(values: Sequence[float]) -> dict | None:
    """p50, p90 and p99, the nearest value of each; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{q}": ordered[min(last, round(q / 100 * last))] for q in (50, 90, 99)}


def measure_contexts(fuser: Fuser, size: TrialSize, options: ProfileOptions) -> list[dict]:
    """The median step behind each number of live tokens, one request at a time."""
    found = []
    for context in sorted(options.contexts):
        prefix_tokens = context - (size.prompt_tokens - size.prefix_tokens)
        if prefix_tokens < 0:
            continue
        longer = replace(size, prefix_tokens=prefix_tokens, new_tokens=FEW_STEPS + 1)
        request = make_trial(fuser.model.tokenizer, longer)
        steps = [
            ms
            for _ in range(2)
            for ms in _answers(fuser.generate_batch([request], **_options(longer))[0])[0].timings[
                "decode_ms"
            ]
        ]
        found.append({"live_tokens": context, "step_ms": statistics.median(steps)})
    return found


def make_timeline(fuser: Fuser, size: TrialSize) -> list[dict]:
    """One request with a new prefix, stage by stage: name, and start and end in ms."""
    request = make_trial(fuser.model.tokenizer, size, seed=10**6)
    start = time.perf_counter()
    with listen() as spans:
        fuser.generate_batch([request], **_options(size))
    return [
        {
            "name": span.name,
            "start_ms": 1000 * (span.start - start),
            "end_ms": 1000 * (span.end - start),
            "depth": span.depth,
        }
        for span in sorted(spans, key=lambda span: (span.start, span.depth))
    ]


# Ceilings


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """How fast this machine reads memory, and multiplies: bytes/s and FLOP/s, best of a few.

    A sum over a large tensor, and a large matrix product in the dtype that the model's products
    are computed in (float32 where the CPU multiplies no bfloat16), with as many threads as the
    model has.
    """
    dtype = fast_dtype(dtype, device)
    with torch.inference_mode():
        numbers = torch.ones(READ_BYTES // 4, device=device)
        read_s = min(_seconds(numbers.sum, device) for _ in range(5))
        del numbers
        rate = 0.0
        for n in PRODUCT_SIZES:
            left, right = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
            elapsed = min(_seconds(lambda: left @ right, device) for _ in range(3))  # noqa: B023
            rate = max(rate, 2 * n**3 / elapsed)
            if elapsed > LONG_PRODUCT_S:
                break
    return {"bytes_per_s": READ_BYTES / read_s, "flops_per_s": rate}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_step(fuser: Fuser, size: TrialSize, report: dict) -> dict:
    """Bytes and FLOPs of the middle step of a batch, and the fractions of both ceilings.

    Weights are read once a step, and of the cache what is live: both are as little as can be read.
    FLOPs are those of the calls as they run: tokens that only fill a graph up count, too.
    """
    batch = report["batch"]
    with listen() as spans:
        requests = [make_trial(fuser.model.tokenizer, size)] * batch["requests"]
        results = fuser.generate_batch(requests, batch_size=len(requests), **_options(size, 2))
    steps = [span for span in spans if span.name == "step"]
    calls = [
        span
        for span in spans
        if steps and span.start >= steps[0].start and span.name.startswith("decode ")
    ]
    config = fuser.model.config
    rows = sum(int(span.name.split()[1]) for span in calls)
    visited = sum(_live_tokens(_answers(result)) for result in results) + len(requests)
    # The prefix is stored once, and visited by each.
    prefix = _live_tokens(_answers(results[0]), {"prefix"})
    live = visited - prefix * (len(requests) - 1)
    weights = weight_bytes(fuser)
    cache = cache_bytes(config, rows=1, slots=live, dtype=fuser.executor.cache_dtype)
    # Every query of a request's streams visits all of its live slots.
    per_request = visited / len(requests)
    flops = rows * (2 * linear_parameters(config) + 4 * config.num_hidden_layers
                    * config.num_attention_heads * config.head_dim * per_request)  # fmt: skip
    found = {
        "rows": rows,
        "live_tokens": live,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "flops": flops,
    }
    if batch["step_ms"]:
        seconds = batch["step_ms"]["p50"] / 1000
        ceilings = report["ceilings"]
        found["memory_fraction"] = (weights + cache) / seconds / ceilings["bytes_per_s"]
        found["compute_fraction"] = flops / seconds / ceilings["flops_per_s"]
    return found


def _live_tokens(
    answers: Iterable, parts: Collection[str] = ("prefix", "segment", "suffix")
) -> int:
    """Slots of these parts that a request's answers see, each counted once."""
    entries = [entry for answer in answers for entry in answer.layout if entry.part in parts]
    return len({slot for entry in entries for slot in entry.slots})


def weight_bytes(fuser: Fuser) -> int:
    """Bytes of weights that a step reads: all but an embedding of its own, of which it reads rows.

    Tensors that share memory count once.
    """
    params = fuser.model.params
    tensors = [leaf for leaf in tree_leaves(params) if isinstance(leaf, Tensor)]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    if _pointer(params.embed) != _pointer(params.lm_head):
        sizes.pop(_pointer(params.embed), None)
    return sum(sizes.values())


def _pointer(part: object) -> int:
    leaves = [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]
    return leaves[0].data_ptr()


def linear_parameters(config: ModelConfig) -> int:
    """Numbers in all matrices that a token is multiplied by, the head's too."""
    C, D = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = (H + 2 * K) * D * C + H * D * C + 3 * config.intermediate_size * C
    return config.num_hidden_layers * layer + config.vocab_size * C


# Masks


def measure_masks(fuser: Fuser, size: TrialSize, repeats: int) -> dict:
    """Milliseconds to build tables and block lists, each by itself.

    The lists are built inside of the graphs that use them, once for all layers. Here the same
    functions run apart, eagerly: an upper bound.
    """
    device = fuser.executor.device
    graph = next(iter(fuser.executor.graphs), None)
    slots, labels = (graph.size.slots, graph.size.labels) if graph else (MIN_SLOTS, LABEL_COUNTS[0])
    rules = {label: dict.fromkeys(range(1, label + 1), 0.0) for label in range(1, 17)}

    def labels_of(T: int) -> Labels:
        places, everywhere = torch.arange(T, device=device), torch.arange(slots, device=device)
        return Labels(places.fill_(1).int(), places, places, everywhere.fill_(1).int(), everywhere)

    with torch.inference_mode():
        tables = make_tables(labels, device)
        few, many = labels_of(1), labels_of(PREFILL_SIZES[0])
        works = {
            "tables": lambda: write_rules(tables, rules),
            "decode_1": lambda: make_mask(few, tables, 1),
            f"prefill_{PREFILL_SIZES[0]}": lambda: make_mask(many, tables, PREFILL_BLOCK),
        }
        return {
            name: 1000 * statistics.median(_seconds(work, device) for _ in range(repeats + 1))
            for name, work in works.items()
        }


# Eager, operators, trace


def measure_eager(fuser: Fuser, size: TrialSize, report: dict) -> dict:
    """The median step without the compiler, the same weights, and how much slower that is."""
    eager = Fuser(fuser.model, compile=False)
    request = make_trial(fuser.model.tokenizer, size)
    few = min(size.new_tokens, FEW_STEPS + 1)
    results = eager.generate_batch([request], **_options(size, few))[0]
    steps = _answers(results)[0].timings["decode_ms"]
    if not steps:
        return {"step_ms": None, "compiled_step_ms": None, "ratio": None}
    with listen() as spans:
        fuser.generate_batch([request], **_options(size, few))
    compiled = statistics.median(span.ms for span in spans if span.name == "step")
    eager_ms = statistics.median(steps)
    return {"step_ms": eager_ms, "compiled_step_ms": compiled, "ratio": eager_ms / compiled}


def measure_operators(fuser: Fuser, size: TrialSize, top: int) -> list[dict]:
    """Where a request's processor time goes, by operator: the largest first.

    Kernels of the compiler have no names in graphs as they are; the graphs run here are compiled
    with marks around each, which cost a little.
    """
    marked = Fuser(fuser.model, compile=fuser.executor.is_compiled)
    request = make_trial(fuser.model.tokenizer, size)
    options = _options(size, min(size.new_tokens, FEW_STEPS + 1))
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        marked.generate_batch([request], **options)
    with torch.profiler.profile() as profiler:
        marked.generate_batch([request], **options)
    events = [e for e in profiler.key_averages() if e.self_cpu_time_total > 0]
    whole = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [
        {
            "name": event.key,
            "calls": event.count,
            "self_ms": event.self_cpu_time_total / 1000,
            "share": event.self_cpu_time_total / whole,
        }
        for event in events[:top]
    ]


def write_trace(fuser: Fuser, size: TrialSize, path: Path) -> None:
    """A Chrome trace of one request with a new prefix; the stages are marked in it."""
    request = make_trial(fuser.model.tokenizer, size, seed=10**6 + 1)
    with torch.profiler.profile() as profiler, listen(torch.profiler.record_function):
        fuser.generate_batch([request], **_options(size))
    profiler.export_chrome_trace(str(path))


# Compile times


def measure_compile_times(args: argparse.Namespace, size: TrialSize, batch: int) -> dict:
    """What the graphs cost in new processes, with an empty compile cache and with a warm one."""
    with tempfile.TemporaryDirectory(prefix="minifuse-profile-") as folder:
        return {
            name: warm_up_apart(args, [size], batch, Path(folder)) for name in ("empty", "warm")
        }
