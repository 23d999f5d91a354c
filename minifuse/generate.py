"""Answer one question from many phrasings: `python -m minifuse.generate PARAPHRASE...`.

Results go to standard output (one JSON object each with `--json`) or to `--output`; all else goes
to standard error. Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.

    python -m minifuse.generate "What is the capital of France?" "France's capital is?" --method all
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minifuse.config import POSITION_SCHEMES, WEIGHT_SIGNALS, FusionConfig, GenerationConfig
from minifuse.errors import MinifuseError, UsageError

if TYPE_CHECKING:
    from minifuse.engine import Fuser, Generation, StreamEvent

TEMPLATE = "Q: {}\n"
SUFFIX = "A:"
STOP = "\n"
METHOD = "fused"

_GENERATION = GenerationConfig()
_FUSION = FusionConfig()
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


@dataclass(frozen=True)
class PromptLine:
    """One request: a line of `--input`, or what the command line itself says.

    where: how an error names it
    """

    id: str | int | None
    prefix: str
    segments: tuple[str, ...]
    suffix: str
    weights: tuple[float, ...] | str | None
    where: str

    def fingerprint(self) -> str:
        """A hash of all that its results depend on."""
        content = [self.prefix, self.segments, self.suffix, self.weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Options:
    """What all requests of a run share; a run is continued only under equal options."""

    model: str | None
    dtype: str
    methods: tuple[str, ...]
    positions: str
    beta: float
    balance: float
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]

    def for_engine(self) -> dict[str, Any]:
        """Keyword arguments of `Fuser.generate`, which knows its model and dtype already."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["model"], options["dtype"]
        return {**options, "methods": list(self.methods), "stop": list(self.stop)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists what there is")


def build_parser() -> argparse.ArgumentParser:
    """The command line; reading it loads no torch."""
    parser = _Parser(
        prog="python -m minifuse.generate",
        description="Answer one question from many phrasings of it, fused inside attention.",
        epilog=r"--prefix TEXT, --template, --suffix and --stop read \n, \t and \\ as newline, "
        "tab and backslash.",
        allow_abbrev=False,
    )
    _add_prompt_flags(parser)
    _add_method_flags(parser)
    _add_sampling_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt").add_argument
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
        help=f'what a paraphrase is put into, at its one {{}} (default: "{_escape(TEMPLATE)}")',
    )
    add(
        "--suffix",
        default=_escape(SUFFIX),
        metavar="TEXT",
        help='what opens the answer (default: "%(default)s")',
    )
    add(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='requests, one a line: {"id"?, "prefix"?, "segments": [...], "suffix"?, "weights"?}; '
        "segments are taken as they stand, without --template; --prefix, --suffix and --weights "
        "stand in for what a line leaves out; an id left out is the line number",
    )


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("fusion").add_argument
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
        default=_FUSION.balance,
        help="scale of the bias that keeps N paraphrases from outweighing the prefix "
        "(default: %(default)g)",
    )
    add(
        "--positions",
        choices=POSITION_SCHEMES,
        default=_FUSION.positions,
        help="where fused methods find the paraphrases (default: %(default)s)",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("answer").add_argument
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
        f'(default: "{_escape(STOP)}")',
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--model", metavar="NAME|DIR|HUB_ID|FILE.gguf", help="default: the default model")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto")
    add("--device", default="auto", help="default: %(default)s")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the model, or run it op by op (default: --compile)",
    )
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
    try:
        args = build_parser().parse_intermixed_args(argv)
        with _one_line_warnings():
            _run(args)
        sys.stdout.flush()
    except MinifuseError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: results so far are whole", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0


def _run(args: argparse.Namespace) -> None:
    options = _read_options(args)
    prompts = _read_prompts(args)
    with contextlib.ExitStack() as stack:
        results_file = None
        if args.output:
            results_file = stack.enter_context(ResultsFile(args.output, options, prompts))
            prompts = [prompt for prompt in prompts if prompt.id not in results_file.done]
        if not prompts:
            print("nothing to do: every request is answered", file=sys.stderr)
            return
        fuser = _load(args)
        if args.input:
            _answer_file(fuser, prompts, options, args, results_file)
        else:
            _answer_one(fuser, prompts[0], options, args, results_file)


def _load(args: argparse.Namespace) -> "Fuser":
    import minifuse

    return minifuse.load(
        model=args.model, dtype=args.dtype, device=args.device, compile=args.compile
    )


# From flags to options and prompts


def _read_options(args: argparse.Namespace) -> Options:
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
        stop=_read_stop(args.stop),
    )
    fusion = FusionConfig(positions=args.positions, beta=args.beta, balance=args.balance)
    if args.stream and args.input:
        raise UsageError("--stream shows one request; leave it out with --input")
    return Options(
        model=args.model,
        dtype=args.dtype,
        methods=tuple(str(method) for method in parse_methods(name.strip() for name in names)),
        positions=fusion.positions,
        beta=fusion.beta,
        balance=fusion.balance,
        **asdict(generation),
    )


def _read_stop(values: list[str] | None) -> tuple[str, ...]:
    if values is None:
        return (STOP,)
    if values == ["none"]:
        return ()
    if "none" in values:
        raise UsageError("--stop none stands beside another --stop; wanted one or the other")
    return tuple(_checked(_unescape(value), "--stop") for value in values)


def _read_prompts(args: argparse.Namespace) -> list[PromptLine]:
    """The requests of `--input`, or the one that the command line holds."""
    prefix = _read_prefix(args.prefix)
    suffix = _checked(_unescape(args.suffix), "--suffix")
    weights = _parse_weights(args.weights)
    if args.input:
        if args.paraphrases:
            raise UsageError(
                f"{len(args.paraphrases)} paraphrases stand beside --input; wanted one or the other"
            )
        if args.template is not None:
            raise UsageError(
                "--template stands beside --input, whose segments are taken as they stand; put it "
                "into the segments"
            )
        return read_input(args.input, prefix=prefix, suffix=suffix, weights=weights)
    if not args.paraphrases:
        raise UsageError("no paraphrase given; wanted at least one, or --input FILE.jsonl")
    template = TEMPLATE
    if args.template is not None:
        template = _checked(_unescape(args.template), "--template")
    if template.count("{}") != 1:
        raise UsageError(
            f"--template is {_escape(template)!r} with {template.count('{}')} places for a "
            "paraphrase; wanted exactly one {}"
        )
    segments = []
    for number, paraphrase in enumerate(args.paraphrases, 1):
        if not paraphrase.strip():
            raise UsageError(f"paraphrase {number} is empty; wanted text")
        segments.append(template.replace("{}", _checked(paraphrase, f"paraphrase {number}")))
    weights = _check_weights(weights, len(segments), "--weights")
    return [PromptLine(None, prefix, tuple(segments), suffix, weights, "the command line")]


def _read_prefix(value: str) -> str:
    """`@FILE` is read as it stands; other text has its escapes read."""
    if not value.startswith("@"):
        return _checked(
            _unescape(value.removeprefix("\\") if value[:2] == "\\@" else value), "--prefix"
        )
    return _read_text(Path(value[1:]), "--prefix")


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{name} cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None


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


def _check_weights(
    weights: tuple[float, ...] | str | None, count: int, name: str
) -> tuple[float, ...] | str | None:
    """Refuse weights that no engine could use, before a model is loaded."""
    if weights is None or isinstance(weights, str):
        return weights
    listed = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise UsageError(
            f"{name} holds {len(weights)} numbers for {count} segments; wanted one for each"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise UsageError(f"{name} holds {listed}; wanted finite numbers of at least 0")
    if not any(weights):
        raise UsageError(f"{name} holds {listed}; wanted at least one above 0")
    return weights


def _unescape(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def _escape(text: str) -> str:
    for written, character in reversed(_ESCAPES.items()):
        text = text.replace(character, written)
    return text


def _checked(text: str, name: str) -> str:
    """The text itself; arguments that are not UTF-8 reach Python as lone surrogates."""
    from minifuse.tokenizer import check_text

    check_text(text, name)
    return text


# Input lines


def read_input(
    path: Path,
    *,
    prefix: str = "",
    suffix: str = "",
    weights: tuple[float, ...] | str | None = None,
) -> list[PromptLine]:
    """All requests of a JSON Lines file; blank lines are passed over.

    prefix, suffix, weights: stand in for what a line leaves out
    raises: UsageError naming the file and the line that is wrong.
    """
    prompts: list[PromptLine] = []
    seen: dict[str | int, str] = {}
    for number, line in enumerate(_read_text(path, "--input").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        raw = {"id": number, "prefix": prefix, "suffix": suffix, **_parse_line(line, where)}
        prompt = _read_line(raw, weights, where)
        if prompt.id in seen:
            raise UsageError(
                f"{where}: id {prompt.id!r} is taken by {seen[prompt.id]}; ids must differ"
            )
        seen[prompt.id] = f"line {number}"
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path} holds no request; wanted one JSON object a line")
    return prompts


def _parse_line(line: str, where: str) -> dict:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: {type(raw).__name__}; wanted a JSON object")
    allowed = ("id", "prefix", "segments", "suffix", "weights")
    unknown = [key for key in raw if key not in allowed]
    if unknown:
        raise UsageError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; wanted {', '.join(allowed)}"
        )
    return raw


def _read_line(raw: dict, weights: tuple[float, ...] | str | None, where: str) -> PromptLine:
    if isinstance(raw["id"], bool) or not isinstance(raw["id"], str | int):
        raise UsageError(f"{where}: id is {raw['id']!r}; wanted a string or an integer")
    segments = raw.get("segments")
    if not isinstance(segments, list) or not segments:
        raise UsageError(f"{where}: segments is {segments!r}; wanted a list of strings, not empty")
    named = {"id": raw["id"], "prefix": raw["prefix"], "suffix": raw["suffix"]}
    named |= {f"segments[{place}]": segment for place, segment in enumerate(segments)}
    for name, text in named.items():
        if name == "id" and isinstance(text, int):
            continue
        if not isinstance(text, str):
            raise UsageError(f"{where}: {name} is {text!r}; wanted a string")
        _checked(text, f"{where}: {name}")
        if name.startswith("segments") and not text:
            raise UsageError(f"{where}: {name} is empty; wanted text")
    if "weights" in raw:
        weights = _read_line_weights(raw["weights"], where)
    weights = _check_weights(weights, len(segments), f"{where}: weights")
    return PromptLine(raw["id"], raw["prefix"], tuple(segments), raw["suffix"], weights, where)


def _read_line_weights(value: object, where: str) -> tuple[float, ...] | str | None:
    if value is None or (isinstance(value, str) and value in WEIGHT_SIGNALS):
        return value
    is_list = isinstance(value, list) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) for weight in value
    )
    if not is_list:
        raise UsageError(
            f"{where}: weights is {value!r}; wanted a list of numbers or one of "
            f"{', '.join(WEIGHT_SIGNALS)}"
        )
    try:
        return tuple(map(float, value))
    except OverflowError:
        raise UsageError(f"{where}: weights holds an integer that no float can hold") from None


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
                results = _flatten(fuser.generate(**_request(prompt), **options.for_engine()))
            except MinifuseError as error:
                raise type(error)(f"{prompt.where}: {error}") from None
            if results_file:
                results_file.append([result.to_json(id=prompt.id) for result in results])
            if args.json or not results_file:
                with bar.external_write_mode(file=sys.stdout):
                    _print_results(results, prompt.id, is_json=args.json)
                    sys.stdout.flush()


def _answer_one(
    fuser: "Fuser",
    prompt: PromptLine,
    options: Options,
    args: argparse.Namespace,
    results_file: "ResultsFile | None",
) -> None:
    if args.stream:
        print_event = _event_printer(options.methods, is_json=args.json)
        events = fuser.stream(**_request(prompt), **options.for_engine())
        results = _flatten(_drain(events, print_event))
    else:
        results = _flatten(fuser.generate(**_request(prompt), **options.for_engine()))
    if results_file:
        results_file.append([result.to_json(id=None) for result in results])
    if args.json or not args.stream:
        _print_results(results, None, is_json=args.json)
    sys.stdout.flush()
    print(_describe_timings(results[0]), file=sys.stderr)


def _request(prompt: PromptLine) -> dict[str, Any]:
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


def _label(method: str, paraphrase_index: int | None) -> str:
    return str(method) if paraphrase_index is None else f"{method}[{paraphrase_index}]"


def _dump(value: dict, *, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)


def _print_json(value: dict) -> None:
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(_dump(value, ensure_ascii=not is_utf8), flush=True)


def _drain(
    events: "Iterator[StreamEvent]", take: "Callable[[StreamEvent], None]"
) -> "dict[str, Generation | list[Generation]]":
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


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        first_line, _, _ = str(message).strip().partition("\n")
        print(f"warning: {first_line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# The results file


class ResultsFile:
    """A JSON Lines file that grows by whole requests and can be continued.

    A result does not hold all that it depends on, so options and requests are kept beside it, in
    `FILE.run.json`; a run with other options, or other text under an id that is done, is refused.
    """

    def __init__(self, path: Path, options: Options, prompts: list[PromptLine]):
        """Open, and find what is done; a torn end is cut off.

        raises: UsageError where the file belongs to another run; MinifuseError where it cannot be
        written.
        """
        self.path = path
        self.done: set[str | int | None] = set()
        self._last: dict | None = None
        self._record_path = path.with_name(f"{path.name}.run.json")
        self._is_new = not path.exists()
        with self._as_error():
            # For reading too, but positioned at the end: every write appends.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            with self._as_error():
                self._take_up(options, prompts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; one that this call made and left empty is removed."""
        is_empty = self._is_new and os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if is_empty:
            self.path.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)

    def append(self, results: list[dict]) -> None:
        """Write one request's results: all of them, or none.

        raises: UsageError where another model made the results that are there.
        """
        self._check_source(results[0])
        content = "".join(f"{_dump(result)}\n" for result in results).encode("utf-8")
        with self._as_error():
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(content):
                    written += self._file.write(content[written:])
                os.fsync(self._file.fileno())
            except BaseException:  # an interrupt too must leave whole requests
                self._file.truncate(end)
                raise
        self._last = results[0]

    def _take_up(self, options: Options, prompts: list[PromptLine]) -> None:
        self._file.seek(0)
        content = self._file.read()
        requests = {json.dumps(prompt.id): prompt.fingerprint() for prompt in prompts}
        if content:
            record = self._read_record(self._record_path)
            self._check_options(record["options"], options)
            end = self._find_done(content, options.methods, prompts)
            for id in self.done:
                if record["requests"].get(json.dumps(id)) != requests[json.dumps(id)]:
                    raise UsageError(
                        f"{self.path} answers another request under id {id!r}; choose another "
                        "--output"
                    )
            self._file.truncate(end)
        record = {"options": asdict(options), "requests": requests}
        partial = self._record_path.with_name(f"{self._record_path.name}.partial")
        partial.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(partial, self._record_path)

    def _read_record(self, path: Path) -> dict:
        # Whatever is wrong with it, the answer is the same.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_bytes())
            if isinstance(record["options"], dict) and isinstance(record["requests"], dict):
                return record
        raise UsageError(
            f"{self.path} is not empty, and {path.name} beside it does not say which call made it; "
            "choose another --output"
        )

    def _check_options(self, recorded: dict, options: Options) -> None:
        current = json.loads(json.dumps(asdict(options)))
        for name in sorted(recorded.keys() | current.keys()):
            old, new = recorded.get(name), current.get(name)
            if name == "methods":
                old, new = sorted(old or []), sorted(new)
            if old != new:
                raise UsageError(
                    f"{self.path} was made with {name} {old!r}, and this call has {new!r}; choose "
                    "another --output or repeat the first call's options"
                )

    def _check_source(self, result: dict) -> None:
        for name in ("model", "source", "dtype", "quantize"):
            if self._last is not None and self._last.get(name) != result.get(name):
                raise UsageError(
                    f"{self.path} was made with {name} {self._last.get(name)!r}, and this call has "
                    f"{result.get(name)!r}; choose another --output"
                )

    def _find_done(self, content: bytes, methods: Iterable[str], prompts: list[PromptLine]) -> int:
        """Fill `done`; returns where the last whole request ends."""
        expected = {prompt.id: _expected_results(methods, prompt) for prompt in prompts}
        end = offset = 0
        open_id, missing = None, set()
        lines = content.split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            offset += len(line) + 1
            try:
                result = json.loads(line)
                id, key = result["id"], (result["method"], result["paraphrase_index"])
                is_new = not missing
                if is_new and id not in self.done:
                    open_id, missing = id, set(expected[id])
                if id != open_id:
                    raise KeyError(id)
                missing.remove(key)
            except (ValueError, KeyError, TypeError):
                if number == len(lines) - 1 and not lines[-1]:
                    break  # the last line may be what a crash left
                raise UsageError(
                    f"{self.path}, line {number}: not a result that this call would write; choose "
                    "another --output"
                ) from None
            if not missing:
                self.done.add(id)
                self._last = result
                end = offset
        return end

    @contextlib.contextmanager
    def _as_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MinifuseError(
                f"cannot write {error.filename or self.path}: {error.strerror}; choose another "
                "--output"
            ) from None


def _expected_results(methods: Iterable[str], prompt: PromptLine) -> set[tuple[str, int | None]]:
    expected: set[tuple[str, int | None]] = set()
    for method in methods:
        if method == "per_prompt":
            expected |= {(method, index) for index in range(len(prompt.segments))}
        else:
            expected.add((method, None))
    return expected


if __name__ == "__main__":
    sys.exit(main())
