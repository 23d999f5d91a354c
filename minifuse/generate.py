"""Answer one question from many phrasings: `python -m minifuse.generate PARAPHRASE...`.

Results go to standard output (one JSON object each with `--json`) or to `--output`; all else goes
to standard error. Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.

    python -m minifuse.generate "What is the capital of France?" "France's capital is?" --method all
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minifuse.command import Parser, add_model_flags, check_interrupt, load_fuser, run_command
from minifuse.config import (
    POSITION_SCHEMES,
    WEIGHT_SIGNALS,
    FusionConfig,
    GenerationConfig,
    parse_quantize,
)
from minifuse.errors import MinifuseError, UsageError
from minifuse.jsonl import (
    Options,
    PromptLine,
    ResultsFile,
    check_weights,
    checked,
    dump_json,
    key_of_generation,
    read_input,
    read_text,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from minifuse.answers import Results
    from minifuse.engine import Fuser
    from minifuse.results import Generation, StreamEvent

TEMPLATE = "Q: {}\n"
SUFFIX = "A:"
STOP = "\n"
METHOD = "fused"

_GENERATION = GenerationConfig()
_FUSION = FusionConfig()
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def build_parser() -> argparse.ArgumentParser:
    """The command line; reading it loads no torch."""
    parser = Parser(
        prog="python -m minifuse.generate",
        description="Answer one question from many phrasings of it, fused inside attention.",
        epilog=r"--prefix TEXT, --template, --suffix, --system and --stop read \n, \t and \\ as "
        "newline, tab and backslash.",
    )
    prompt = parser.add_argument_group("prompt")
    add_prompt_flags(prompt)
    prompt.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='requests, one a line: {"id"?, "prefix"?, "segments": [...], "suffix"?, "weights"?}; '
        "segments are taken as they stand, without --template; --prefix, --suffix and --weights "
        "stand in for what a line leaves out; an id left out is the line number",
    )
    add_method_flags(parser.add_argument_group("fusion"))
    answer = parser.add_argument_group("answer")
    add_sampling_flags(answer)
    answer.add_argument(
        "--attribution",
        action="store_true",
        help="say what each paraphrase did for every answer: the attention it was given, the "
        "change when it is left out, the answer's log-probability behind it alone",
    )
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def add_prompt_flags(group: argparse._ActionsContainer) -> None:
    """What `read_prompt` reads, and `read_options` of a chat."""
    add = group.add_argument
    add("paraphrases", nargs="*", metavar="PARAPHRASE", help="one phrasing of the question")
    add(
        "--prefix",
        default="",
        metavar="TEXT|@FILE",
        help=r"text before every paraphrase, as it stands or from a file (\@ for a plain @)",
    )
    add(
        "--template",
        metavar="TEXT",
        help=f'what a paraphrase is put into, at its one {{}} (default: "{_escape(TEMPLATE)}"; '
        "with --chat the paraphrase itself)",
    )
    add(
        "--suffix",
        metavar="TEXT",
        help=f'what opens the answer (default: "{_escape(SUFFIX)}"; with --chat nothing)',
    )
    add(
        "--chat",
        action="store_true",
        help="put prefix and paraphrase into the model's chat template, as the user's message",
    )
    add("--system", metavar="TEXT", help="a system message, for --chat")
    add(
        "--chat-variable",
        action="append",
        default=[],
        dest="chat_variables",
        metavar="NAME=VALUE",
        help="what else the chat template asks for, as JSON or plain text, such as "
        "enable_thinking=false; may be repeated",
    )


def add_method_flags(group: argparse._ActionsContainer) -> None:
    """What `read_options` reads of fusion."""
    add = group.add_argument
    add(
        "--method",
        "--methods",
        action="append",
        dest="methods",
        metavar="NAME[,NAME...]|all",
        help=f"how paraphrases are combined (default: {METHOD})",
    )
    add(
        "--weights",
        metavar="NUMBER,NUMBER...|" + "|".join(WEIGHT_SIGNALS),
        help="one weight a paraphrase, or the signal that finds them "
        f"(default: {_FUSION.signal} where a method is weighted)",
    )
    add(
        "--beta",
        type=float,
        default=_FUSION.beta,
        help="weights found are softmax(beta * signal) (default: %(default)g)",
    )
    add(
        "--balance",
        type=float,
        help="fused methods attend to N paraphrases as to N**(1 - balance) (default: 0.5 for "
        "fused_auto, else 1)",
    )
    add(
        "--positions",
        choices=POSITION_SCHEMES,
        default=_FUSION.positions,
        help="where fused methods find the paraphrases (default: %(default)s)",
    )


def add_sampling_flags(group: argparse._ActionsContainer) -> None:
    """What `read_options` reads of the answer."""
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=_GENERATION.max_new_tokens,
        help="default: %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=_GENERATION.temperature,
        help="0 takes the best token (default: %(default)g)",
    )
    add("--top-k", type=int, default=_GENERATION.top_k, help="0 is off (default: %(default)s)")
    add("--top-p", type=float, default=_GENERATION.top_p, help="1 is off (default: %(default)g)")
    add("--seed", type=int, default=_GENERATION.seed, help="default: %(default)s")
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends an answer and is left out of it; may be repeated; `none` switches it off "
        f'(default: "{_escape(STOP)}"; with --chat none)',
    )


def _add_run_flags(group: argparse._ActionsContainer) -> None:
    add_model_flags(group)
    add = group.add_argument
    add("--json", action="store_true", help="print one JSON object a result")
    add(
        "--stream",
        action="store_true",
        help="print text as it comes; several methods: each answer when it is whole; with --json: "
        "one object a token before the results",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="append results there as they come; the same call again goes on where it stopped "
        "(its options are kept in FILE.jsonl.run.json)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(
        lambda: _run(build_parser().parse_intermixed_args(argv)),
        interrupted="interrupted: results so far are whole",
    )


def _run(args: argparse.Namespace) -> None:
    options = read_options(args)
    if args.stream and args.input:
        raise UsageError("--stream shows one request; leave it out with --input")
    prompts = _read_prompts(args)
    with contextlib.ExitStack() as stack:
        results_file = None
        if args.output:
            results_file = stack.enter_context(_open_results(args.output, options, prompts))
            prompts = [prompt for prompt in prompts if prompt.id not in results_file.done]
        if not prompts:
            print("nothing to do: every request is answered", file=sys.stderr)
            return
        fuser = load_fuser(args)
        if args.input:
            _answer_file(fuser, prompts, options, args, results_file)
        else:
            _answer_one(fuser, prompts[0], options, args, results_file)


def _open_results(path: Path, options: Options, prompts: list[PromptLine]) -> ResultsFile:
    return ResultsFile(
        path,
        options.for_record(),
        [prompt.unit(options.methods) for prompt in prompts],
        read_key=key_of_generation,
        source_names=("model", "source", "dtype", "quantize"),
    )


# From flags to options and prompts


def read_options(args: argparse.Namespace) -> Options:
    """Check every option that needs no model.

    raises: UsageError naming the option.
    """
    from minifuse.methods import parse_methods

    names = ",".join(args.methods or [METHOD]).split(",")
    generation = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=_read_stop(args.stop, is_chat=args.chat),
    )
    if not args.chat and (args.system is not None or args.chat_variables):
        flag = "--chat-variable" if args.system is None else "--system"
        raise UsageError(f"{flag} is for a chat template; wanted --chat beside it")
    fusion = FusionConfig(positions=args.positions, beta=args.beta, balance=args.balance)
    return Options(
        model=args.model,
        dtype=args.dtype,
        quantize=parse_quantize(args.quantize),
        methods=tuple(str(method) for method in parse_methods(name.strip() for name in names)),
        positions=fusion.positions,
        beta=fusion.beta,
        balance=fusion.balance,
        chat=args.chat,
        system=None if args.system is None else checked(_unescape(args.system), "--system"),
        chat_variables=_read_variables(args.chat_variables),
        attribution=args.attribution,
        **asdict(generation),
    )


def _read_variables(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE each; a value that is no JSON is a text."""
    variables: dict[str, Any] = {}
    for text in texts:
        name, equals, value = checked(text, "--chat-variable").partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--chat-variable is {text!r}; wanted NAME=VALUE")
        if name in variables:
            raise UsageError(f"--chat-variable {name} is given twice; wanted one value")
        try:
            variables[name] = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")  # Python alone reads NaN and Infinity


def _read_stop(values: list[str] | None, *, is_chat: bool) -> tuple[str, ...]:
    if values is None:
        return () if is_chat else (STOP,)
    if values == ["none"]:
        return ()
    if "none" in values:
        raise UsageError("--stop none stands beside another --stop; wanted one or the other")
    return tuple(checked(_unescape(value), "--stop") for value in values)


def _read_prompts(args: argparse.Namespace) -> list[PromptLine]:
    """The requests of `--input`, or the one that the command line holds."""
    if not args.input:
        if not args.paraphrases:
            raise UsageError("no paraphrase given; wanted at least one, or --input FILE.jsonl")
        return [read_prompt(args)]
    if args.paraphrases:
        raise UsageError(
            f"{len(args.paraphrases)} paraphrases stand beside --input; wanted one or the other"
        )
    if args.template is not None:
        raise UsageError(
            "--template stands beside --input, whose segments are taken as they stand; put it "
            "into the segments"
        )
    return read_input(
        args.input,
        prefix=_read_prefix(args.prefix),
        suffix=_read_suffix(args),
        weights=_parse_weights(args.weights),
    )


def read_prompt(args: argparse.Namespace) -> PromptLine:
    """The request that the flags of `add_prompt_flags` hold.

    raises: UsageError naming the flag.
    """
    if not args.paraphrases:
        raise UsageError("no paraphrase given; wanted at least one")
    template = "{}" if args.chat else TEMPLATE
    if args.template is not None:
        template = checked(_unescape(args.template), "--template")
    if template.count("{}") != 1:
        raise UsageError(
            f"--template is {_escape(template)!r} with {template.count('{}')} places for a "
            "paraphrase; wanted exactly one {}"
        )
    segments = []
    for number, paraphrase in enumerate(args.paraphrases, 1):
        if not paraphrase.strip():
            raise UsageError(f"paraphrase {number} is empty; wanted text")
        segments.append(template.replace("{}", checked(paraphrase, f"paraphrase {number}")))
    weights = check_weights(_parse_weights(args.weights), len(segments), "--weights")
    prefix, suffix = _read_prefix(args.prefix), _read_suffix(args)
    return PromptLine(None, prefix, tuple(segments), suffix, weights, "the command line")


def _read_suffix(args: argparse.Namespace) -> str:
    if args.suffix is None:
        return "" if args.chat else SUFFIX
    return checked(_unescape(args.suffix), "--suffix")


def _read_prefix(value: str) -> str:
    """`@FILE` is read as it stands; other text has its escapes read."""
    if not value.startswith("@"):
        return checked(
            _unescape(value.removeprefix("\\") if value[:2] == "\\@" else value), "--prefix"
        )
    return read_text(Path(value[1:]), "--prefix")


def _parse_weights(value: str | None) -> tuple[float, ...] | str | None:
    if value is None or value in WEIGHT_SIGNALS:
        return value
    try:
        return tuple(float(number) for number in value.split(","))
    except ValueError:
        raise UsageError(
            f"--weights is {value!r}; wanted numbers with commas between them or one of "
            f"{', '.join(WEIGHT_SIGNALS)}"
        ) from None


def _unescape(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def _escape(text: str) -> str:
    for written, character in reversed(_ESCAPES.items()):
        text = text.replace(character, written)
    return text


# Answers


def _answer_file(
    fuser: "Fuser",
    prompts: list[PromptLine],
    options: Options,
    args: argparse.Namespace,
    results_file: "ResultsFile | None",
) -> None:
    """Answer request after request, each one's results written before the next is begun.

    One by one, not in batches, so that an interrupted run and one in a single go draw alike.
    """
    import tqdm

    done = len(results_file.done) if results_file else 0
    bar = tqdm.tqdm(
        prompts, initial=done, total=done + len(prompts), unit="request", file=sys.stderr
    )
    with bar:
        for prompt in bar:
            try:
                results = _flatten(fuser.generate(**request_of(prompt), **options.for_engine()))
            except MinifuseError as error:
                raise type(error)(f"{prompt.where}: {error}") from None
            if results_file:
                results_file.append([result.to_json(id=prompt.id) for result in results])
            if args.json or not results_file:
                with bar.external_write_mode(file=sys.stdout):
                    _print_results(results, prompt.id, is_json=args.json)
                    sys.stdout.flush()
            check_interrupt()


def _answer_one(
    fuser: "Fuser",
    prompt: PromptLine,
    options: Options,
    args: argparse.Namespace,
    results_file: "ResultsFile | None",
) -> None:
    if args.stream:
        print_event = _event_printer(options.methods, is_json=args.json)
        events = fuser.stream(**request_of(prompt), **options.for_engine())
        results = _flatten(_drain(events, print_event))
    else:
        results = _flatten(fuser.generate(**request_of(prompt), **options.for_engine()))
    if results_file:
        results_file.append([result.to_json(id=None) for result in results])
    if args.json or not args.stream:
        _print_results(results, None, is_json=args.json)
    elif args.attribution:
        print()
        for result in results:
            print(f"{_label(result.method, result.paraphrase_index)}:")
            print("\n".join(_describe_attribution(result)))
    sys.stdout.flush()
    print(_describe_timings(results[0]), file=sys.stderr)


def request_of(prompt: PromptLine) -> dict[str, Any]:
    """Keyword arguments of `Fuser.generate`."""
    weights = prompt.weights
    return {
        "prefix": prompt.prefix,
        "segments": list(prompt.segments),
        "suffix": prompt.suffix,
        "weights": list(weights) if isinstance(weights, tuple) else weights,
    }


def _flatten(results: "dict[str, Generation | list[Generation]]") -> "list[Generation]":
    flat: list[Generation] = []
    for result in results.values():
        flat += result if isinstance(result, list) else [result]
    return flat


def _print_results(results: "list[Generation]", id: str | int | None, *, is_json: bool) -> None:
    for result in results:
        if is_json:
            _print_json(result.to_json(id=id))
        else:
            name = _label(result.method, result.paraphrase_index)
            print(f"{'' if id is None else f'{id}: '}{name}: {result.text.strip()}")
            for line in _describe_attribution(result):
                print(line)


def _describe_attribution(result: "Generation") -> Iterator[str]:
    """A line for each segment, and one for what else was attended to."""
    found = result.attribution
    if found is None:
        return
    for number, (share, change, alone) in enumerate(
        zip(found.segments, found.without, found.alone, strict=True), 1
    ):
        left_out = "nothing is left without it" if change is None else f"without it {change:+.3f}"
        yield f"  {number:3}  attention {share:6.1%}  {left_out}  alone {alone:.3f}"
    yield (
        f"       attention {found.prefix:.1%} prefix, {found.suffix:.1%} suffix, "
        f"{found.answer:.1%} answer; log-probabilities in nats, {sum(result.logprobs):.3f} in all"
    )


def _label(method: str, paraphrase_index: int | None) -> str:
    return str(method) if paraphrase_index is None else f"{method}[{paraphrase_index}]"


def _print_json(value: dict) -> None:
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(dump_json(value, ensure_ascii=not is_utf8), flush=True)


def _drain(
    events: "Generator[StreamEvent, None, Results]", take: "Callable[[StreamEvent], None]"
) -> "Results":
    """Hand on every event; returns what the stream itself returns at its end."""
    with contextlib.closing(events):
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                return stop.value
            take(event)


def _event_printer(methods: tuple[str, ...], *, is_json: bool) -> "Callable[[StreamEvent], None]":
    if is_json:
        return _print_event
    if len(methods) == 1 and methods[0] != "per_prompt":
        return _TextPrinter()
    return _LinePrinter()


def _print_event(event: "StreamEvent") -> None:
    names = ("method", "paraphrase_index", "token_id", "text", "logprob", "finish_reason")
    _print_json({"event": "token", **{name: getattr(event, name) for name in names}})


class _TextPrinter:
    """Prints the one answer's text as it comes, after its method's name."""

    def __init__(self) -> None:
        self._has_begun = False

    def __call__(self, event: "StreamEvent") -> None:
        text = event.text
        if not self._has_begun:
            text = text.lstrip()
            if text or event.finish_reason is not None:
                self._has_begun = True
                text = f"{event.method}: {text}"
        print(text, end="" if event.finish_reason is None else "\n", flush=True)


class _LinePrinter:
    """Prints each answer in a line of its own, as soon as it is whole."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def __call__(self, event: "StreamEvent") -> None:
        name = _label(event.method, event.paraphrase_index)
        self._texts[name] = self._texts.get(name, "") + event.text
        if event.finish_reason is not None:
            print(f"{name}: {self._texts.pop(name).strip()}", flush=True)


def _describe_timings(result: "Generation") -> str:
    timings = result.timings
    decode = timings["decode_ms"]
    parts = [
        f"load {timings['load_s']:.1f} s",
        f"compile {timings['compile_s']:.1f} s",
        f"prefill {timings['prefill_ms']:.0f} ms",
    ]
    if decode:
        parts.append(f"decode {sum(decode) / len(decode):.1f} ms a step, {len(decode)} steps")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
