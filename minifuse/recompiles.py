"""Why the compiler made another graph of a function: its own reasons, in one line each.

Dynamo names the first thing in which the call at hand did not fit the youngest graph. Steps that
are compiled ahead of time (`precompiled`) give no such reasons: here is what others compile.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.utils import counters, get_compilation_metrics

from minifuse.stages import Span

_TENSOR = r"tensor '(?P<name>.+?)' "
_MISMATCH = r"mismatch at index (?P<index>\d+)\. expected (?P<old>\S+), actual (?P<new>\S+)"
# What Dynamo writes about the first guard that failed, and what it means.
_CAUSES: tuple[tuple[str, Callable[[re.Match], str]], ...] = (
    (
        _TENSOR + "size " + _MISMATCH,
        lambda m: (
            f"the size of {m['name']} along dimension {m['index']} was {m['old']} and is {m['new']}"
        ),
    ),
    (
        _TENSOR + "stride " + _MISMATCH,
        lambda m: (
            f"the stride of {m['name']} along dimension {m['index']} was {m['old']} and is "
            f"{m['new']}: another memory layout"
        ),
    ),
    (
        _TENSOR + r"(?P<what>\w+) mismatch\. expected (?P<old>[^,]+), actual (?P<new>\S+)",
        lambda m: f"the {m['what']} of {m['name']} was {m['old']} and is {m['new']}",
    ),
    (
        _TENSOR + r"dispatch key set mismatch",
        lambda m: (
            f"{m['name']} is another kind of tensor: made outside of inference_mode, or in it"
        ),
    ),
    (
        r"GLOBAL_STATE changed: (?P<what>[\w ]+)",
        lambda m: f"torch's state changed: {m['what'].strip()}",
    ),
    (
        r"___check_type_id\((?P<name>[^,]+),",
        lambda m: f"{m['name']} is of another type",
    ),
    (
        r"___check_obj_id\((?P<name>[^,]+),",
        lambda m: f"{m['name']} is another object",
    ),
    (
        r"len\((?P<name>.+?)\) == (?P<old>\d+)",
        lambda m: f"the length of {m['name']} is no longer {m['old']}",
    ),
    (
        r"(?P<name>\S+(?:\[[^\]]+\])?) == (?P<old>[^ #]+)",
        lambda m: f"{m['name']} is no longer {m['old']}: a Python value, a graph for each",
    ),
)


def count_graph_breaks() -> int:
    """Places where the compiler gave up and went on in Python, in this process."""
    return sum(counters["graph_break"].values())


def explain_recompiles(spans: Sequence[Span] = ()) -> list[dict]:
    """Each graph that was made because none at hand fitted: function, cause, seconds.

    spans: stages that were listened to; what was compiled in one called "compile ..." was planned
    """
    # Dynamo's clock counts from 1970.
    offset = time.time() - time.perf_counter()
    planned = [span for span in spans if span.name.startswith("compile ")]
    found = []
    for metrics in get_compilation_metrics():
        if not metrics.recompile_reason:
            continue
        start = (metrics.start_time_us or 0) / 1e6 - offset
        found.append(
            {
                "function": metrics.co_name,
                "cause": explain_cause(metrics.recompile_reason),
                "seconds": metrics.duration_us / 1e6 if metrics.duration_us else None,
                "planned": any(span.start <= start <= span.end for span in planned),
            }
        )
    return found


def explain_cause(reason: str) -> str:
    """Dynamo's reason in words; its own first line where it is of an unknown kind."""
    first, *_ = reason.strip().splitlines()
    first = re.sub(r"^\d+(?:/\d+)+: ", "", first)
    for pattern, explain in _CAUSES:
        if match := re.search(pattern, first):
            return explain(match)
    return first


@contextlib.contextmanager
def recorded_cuda_graphs() -> Iterator[list[str]]:
    """Lists the CUDA graphs that are recorded meanwhile, by the id of the compiled graph.

    Each is recorded once; again, where a tensor that was to stay in its place has moved.
    """
    recorded: list[str] = []

    def note(args: CallbackArgs) -> None:
        if args.callback_trigger is CallbackTrigger.CUDAGRAPH_RECORDING:
            recorded.append(args.compile_id)

    callback_handler.register_start_callback(note)
    try:
        yield recorded
    finally:
        callback_handler.remove_start_callback(note)
