"""Runs a soak: every graph first, then call after call, each answer looked at.

After the warm-up nothing may compile, all slots and labels come back, and memory stays.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from minifuse.answers import Results
from minifuse.checks import flat
from minifuse.engine import Fuser
from minifuse.errors import MinifuseError
from minifuse.executor import MAX_DECODE_TOKENS, PADDING, PREFILL_SIZES
from minifuse.linear import HAS_ONEDNN, product_rows
from minifuse.pool import Lease, Size
from minifuse.results import StreamEvent
from minifuse.soak.calls import FAMILIES, SIZES, Call, draw_call, fit_call, make_tiny
from minifuse.soak.judges import Checker, Definition, Report
from minifuse.soak.watch import Watch, growth_of, resident_bytes

# What memory may grow by over all calls behind the warm-up, by a line through what is resident.
GROWTH_BYTES = 16 << 20
# Requests before memory is looked at: this share of all, and so many at least, while torch's own
# caches fill.
WARM_SHARE = 0.25
WARM_REQUESTS = 100


@torch.inference_mode()
def warm_up(fuser: Fuser, sizes: Sequence[Size]) -> None:
    """Get every graph ready that pools of these sizes need, and every product's code."""
    executor = fuser.executor
    lease = Lease([0], [0], executor.make_inv_freq(fuser.model.config.rope_length(1)))
    # Of products there are as many as numbers of rows, whatever the pool.
    rows = {product_rows(live) for live in range(1, PREFILL_SIZES[-1])} if HAS_ONEDNN else set()
    for size in sizes:
        with executor.pool(size) as pool:
            # Pages of a new cache count as memory once they are written.
            for layer in (*pool.cache.keys, *pool.cache.values):
                layer.zero_()
            for count in {*PREFILL_SIZES, *rows}:
                executor.prefill(pool, [(lease, [PADDING] * count)])
            few = {count for count in rows if count <= MAX_DECODE_TOKENS}
            for count in {*executor._blocks_of("decode", size), *few}:
                executor.decode(pool, [(lease, [PADDING] * count)])
        rows = set()


def soak(
    open_checker: Callable[[str, Report], Checker],
    *,
    seed: int,
    requests: int,
    max_new_tokens: int,
    is_short: bool = False,
    sizes: Sequence[Size] = SIZES,
    is_single: bool = False,
    families: Sequence[str] | None = tuple(FAMILIES),
    say: Callable[[Report, Sequence[str]], None] = lambda report, lines: None,
) -> Report:
    """Run calls from a seed on until so many requests have been answered.

    open_checker: the model of a family, and what its answers are held to; asked for once each
    is_single:    one call alone, without a look at memory
    families:     of the tiny models; None where there is one model, whatever the family
    say:          told after every call, with the lines that it added
    """
    report = Report()
    models: dict[str, tuple[Checker, Watch]] = {}

    def model_of(family: str) -> tuple[Checker, Watch]:
        if family not in models:
            checker = open_checker(family, report)
            report.tolerances[checker.fuser.model.name] = checker.tolerance
            watch = checker.watch
            # A few eager calls have nothing to get ready for: memory is not looked at.
            is_long = requests >= WARM_REQUESTS
            if not is_single and (checker.fuser.executor.is_compiled or is_long):
                warm_up(checker.fuser, sizes)
            models[family] = checker, watch
        for _, watch in models.values():
            watch.start()  # the compiler counts for all models together
        return models[family]

    for family in () if is_single else families or ("",):
        model_of(family)
    samples: list[tuple[int, int]] = []
    while report.requests < requests and not (is_single and report.calls):
        call = draw_call(seed + report.calls, max_new_tokens=max_new_tokens, is_short=is_short)
        family = ""
        if families:
            is_wanted = call.family in families
            family = call.family if is_wanted else families[call.seed % len(families)]
        checker, watch = models.get(family) or model_of(family)
        call = fit_call(checker.fuser, call, sizes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a segment of one token")
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            found = list(_run_call(checker, call, report))
        wrong = [f"seed {call.seed}, {line}" for line in found]
        faults = [f"seed {call.seed}: {line}" for line in watch.left_over()]
        new = watch.new_graphs()
        for _, other in models.values():
            other.new_graphs()
        if new and not is_single:
            report.new_graphs += new
            faults.append(f"seed {call.seed}: {new} graphs were compiled, or recompiled")
        report.divergences += wrong
        report.faults += faults
        report.calls += 1
        report.requests += len(call.requests)
        if report.requests >= max(WARM_SHARE * requests, WARM_REQUESTS) and not is_single:
            samples.append((report.requests, resident_bytes()))
        say(report, wrong + faults)
    report.graphs = sum(len(checker.fuser.executor.graphs) for checker, _ in models.values())
    report.growth_bytes = growth_of(samples)
    report.resident_bytes = samples[-1][1] if samples else None
    if report.growth_bytes is not None and report.growth_bytes > GROWTH_BYTES:
        line = (
            f"memory grew by {report.growth_bytes / 1e6:.0f} MB behind the warm-up; "
            f"at most {GROWTH_BYTES / 1e6:.0f} MB"
        )
        report.faults.append(line)
        say(report, [line])
    return report


def _run_call(checker: Checker, call: Call, report: Report) -> Iterator[str]:
    """Answer a call; what is wrong with its answers, request by request."""
    fuser = checker.fuser
    if call.forgets:
        fuser.forget_prefixes()
    first = call.requests[0]

    def stream() -> Generator[StreamEvent, None, Results]:
        return fuser.stream(
            segments=first.segments,
            prefix=first.prefix,
            suffix=first.suffix,
            weights=first.weights,
            **call.options,
        )

    if call.abandons is not None:
        events = stream()
        for _ in zip(range(call.abandons), events, strict=False):
            pass
        events.close()
    try:
        if call.streams:
            answers = [_streamed(stream())]
        else:
            answers = fuser.generate_batch(
                call.requests, batch_size=call.batch_size, **call.options
            )
    except MinifuseError as error:
        yield f"no answer: {error}"
        return
    for number, results in enumerate(answers):
        report.answers += len(flat(results))
        for problem in checker.check(call, number, results):
            yield f"request {number + 1}, {problem}"


def _streamed(events: Generator[StreamEvent, None, Results]) -> Results:
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value


def open_tiny(family: str, report: Report, *, compile: bool = True) -> Definition:
    """A tiny model, held to the definition."""
    return Definition(Fuser(make_tiny(family), compile=compile), report)
