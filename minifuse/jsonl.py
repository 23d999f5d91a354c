"""Requests in and results out as JSON Lines, in files that can be continued after a crash."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minifuse.config import WEIGHT_SIGNALS
from minifuse.errors import MinifuseError, UsageError


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
    chat: bool
    system: str | None
    chat_variables: dict[str, Any]

    def for_engine(self) -> dict[str, Any]:
        """Keyword arguments of `Fuser.generate`, which knows its model and dtype already."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["model"], options["dtype"]
        return {**options, "methods": list(self.methods), "stop": list(self.stop)}


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
    for number, line in enumerate(read_text(path, "--input").split("\n"), 1):
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
        checked(text, f"{where}: {name}")
        if name.startswith("segments") and not text:
            raise UsageError(f"{where}: {name} is empty; wanted text")
    if "weights" in raw:
        weights = _read_line_weights(raw["weights"], where)
    weights = check_weights(weights, len(segments), f"{where}: weights")
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


def check_weights(
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


def read_text(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{name} cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None


def checked(text: str, name: str) -> str:
    """The text itself; arguments that are not UTF-8 reach Python as lone surrogates."""
    from minifuse.tokenizer import check_text

    check_text(text, name)
    return text


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
        content = "".join(f"{dump_json(result)}\n" for result in results).encode("utf-8")
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
            # In the order of the requests, so that the same call names the same one.
            for id in (prompt.id for prompt in prompts if prompt.id in self.done):
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


def dump_json(value: dict, *, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
