"""Requests in and results out as JSON Lines, in files that can be continued after a crash."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minifuse.config import WEIGHT_SIGNALS
from minifuse.errors import MinifuseError, UsageError
from minifuse.files import DISK_FULL, GrowingFile, parse_json, write_whole


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

    def unit(self, methods: Iterable[str]) -> "Unit":
        """What a results file is to hold of it."""
        keys: set[tuple[str, int | None]] = set()
        for method in methods:
            indices = range(len(self.segments)) if method == "per_prompt" else [None]
            keys |= {(method, index) for index in indices}
        content = [self.prefix, self.segments, self.suffix, self.weights]
        return Unit(self.id, fingerprint(content), frozenset(keys))


@dataclass(frozen=True)
class Options:
    """What all requests of a run share; a run is continued only under equal options."""

    model: str | None
    dtype: str
    quantize: str | None
    methods: tuple[str, ...]
    positions: str
    beta: float
    balance: float | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    chat: bool
    system: str | None
    chat_variables: dict[str, Any]
    attribution: bool

    def for_engine(self) -> dict[str, Any]:
        """Keyword arguments of `Fuser.generate`, which knows its model already."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["model"], options["dtype"], options["quantize"]
        return {**options, "methods": list(self.methods), "stop": list(self.stop)}

    def for_record(self) -> dict[str, Any]:
        """What is kept beside the results; the order of the methods says nothing.

        Attribution shows where it is asked for: files from before it was there go on.
        """
        record = {**asdict(self), "methods": sorted(self.methods)}
        if not self.attribution:
            del record["attribution"]
        return record


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
    seen: dict[str | int | None, str] = {}
    for number, where, line in read_json_lines(path, "--input"):
        _check_keys(line, where)
        raw = {"id": number, "prefix": prefix, "suffix": suffix, **line}
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


def read_json_lines(path: Path, name: str) -> Iterator[tuple[int, str, dict]]:
    """Each line's number, how an error names it, and its object; blank lines are passed over.

    name:   what an error calls the file, such as the flag that named it
    raises: UsageError naming the file and the line that is wrong.
    """
    for number, line in enumerate(read_text(path, name).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            raw = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UsageError(f"{where}: {type(raw).__name__}; wanted a JSON object")
        yield number, where, raw


def _check_keys(raw: dict, where: str) -> None:
    allowed = ("id", "prefix", "segments", "suffix", "weights")
    unknown = [key for key in raw if key not in allowed]
    if unknown:
        raise UsageError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; wanted {', '.join(allowed)}"
        )


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
    if not isinstance(value, list) or not all(
        isinstance(weight, int | float) and not isinstance(weight, bool) for weight in value
    ):
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


@dataclass(frozen=True)
class Unit:
    """A piece of work whose lines are written together: all that a results file knows of it.

    id:          names it; what JSON holds, or a tuple of such
    fingerprint: of all that its lines depend on, beside the run's options
    line_keys:   what tells its lines from one another
    """

    id: Hashable
    fingerprint: str
    line_keys: frozenset[Hashable] = frozenset({None})


def fingerprint(content: object) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def key_of_line(line: dict) -> tuple[Hashable, Hashable]:
    """The unit's id and the line's key, where a unit has one line."""
    return line["id"], None


def key_of_generation(line: dict) -> tuple[Hashable, Hashable]:
    """The unit's id and the line's key, where a unit is a request and a line one answer."""
    return line["id"], (line["method"], line["paraphrase_index"])


class ResultsFile:
    """A JSON Lines file that grows by whole units and can be continued.

    A line does not hold all that it depends on, so options and units are kept beside it, in
    `FILE.run.json`; a run with other options, or other content under an id that is done, is
    refused.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        units: Sequence[Unit],
        *,
        read_key: Callable[[dict], tuple[Hashable, Hashable]] = key_of_line,
        source_names: Sequence[str] = (),
    ):
        """Open, and find what is done; a torn end is cut off.

        options:      what all units share, as JSON holds it
        read_key:     a line's unit and its key; KeyError or TypeError for a line of another kind
        source_names: keys of a line that say which model made it; without any, call
                      `check_source` before the first `append`
        raises:       UsageError where the file belongs to another run, or another process has it;
                      MinifuseError where it cannot be written.
        """
        self.path = path
        self.done: set[Hashable] = set()
        self._options = dict(options)
        self._units = {unit.id: unit for unit in units}
        self._read_key = read_key
        self._source_names = tuple(source_names)
        self._source: dict[str, Any] | None = None
        self._record_path = path.with_name(f"{path.name}.run.json")
        with self._as_error():
            self._file = GrowingFile(path)
        try:
            with self._as_error():
                self._take_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; one that this call made and left empty is removed."""
        is_empty = self._file.is_new and self._file.is_as_left() and not self._file.read()
        if is_empty:
            self._record_path.unlink(missing_ok=True)
        self._file.close(remove=is_empty)

    def lines(self) -> Iterator[dict]:
        """Those of the units that are done, in the order of the file."""
        return map(parse_json, self._file.read().splitlines())

    def append(self, lines: Sequence[dict]) -> None:
        """Write one unit's lines: all of them, or none.

        raises: UsageError where another model made the lines that are there; MinifuseError where
                something else changed the file, or it cannot be written.
        """
        if self._source_names:
            self._compare_source(self._source_of(lines[0]))
        content = "".join(f"{dump_json(line)}\n" for line in lines).encode("utf-8")
        with self._as_error():
            self._file.append(content)

    def check_source(self, source: Mapping[str, Any]) -> None:
        """Keep which model makes the lines, where they do not say so themselves.

        source: what is known only once the model is loaded, such as the hash of its files
        raises: UsageError where another model made the lines that are there.
        """
        self._compare_source(dict(source))
        with self._as_error():
            self._write_record()

    def _take_up(self) -> None:
        content = self._file.read()
        if content:
            record = self._read_record()
            self._check_options(record["options"])
            end = self._find_done(content)
            # In the order of the units, so that the same call names the same one.
            for id in (id for id in self._units if id in self.done):
                if record["requests"].get(json.dumps(id)) != self._units[id].fingerprint:
                    raise UsageError(
                        f"{self.path} answers another request under id {id!r}; choose another "
                        "--output"
                    )
            if not self._source_names:
                self._source = record.get("source")
            self._file.cut(end)
        self._write_record()

    def _write_record(self) -> None:
        record: dict[str, Any] = {"options": self._options}
        if self._source is not None and not self._source_names:
            record["source"] = self._source
        record["requests"] = {json.dumps(id): u.fingerprint for id, u in self._units.items()}
        write_whole(self._record_path, json.dumps(record, ensure_ascii=False, indent=1))

    def _read_record(self) -> dict:
        # Whatever is wrong with it, the answer is the same.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            record = parse_json(self._record_path.read_bytes())
            parts = record["options"], record["requests"], record.get("source", {})
            if all(isinstance(part, dict) for part in parts):
                return record
        raise UsageError(
            f"{self.path} is not empty, and {self._record_path.name} beside it does not say which "
            "call made it; choose another --output"
        )

    def _check_options(self, recorded: dict) -> None:
        current = json.loads(json.dumps(self._options))
        for name in sorted(recorded.keys() | current.keys()):
            old, new = recorded.get(name), current.get(name)
            if old != new:
                raise UsageError(
                    f"{self.path} was made with {name} {old!r}, and this call has {new!r}; choose "
                    "another --output or repeat the first call's options"
                )

    def _source_of(self, line: dict) -> dict[str, Any]:
        return {name: line.get(name) for name in self._source_names}

    def _compare_source(self, source: dict[str, Any]) -> None:
        if self._source is None:
            self._source = source
        for name, new in source.items():
            old = self._source.get(name)
            if old != new:
                raise UsageError(
                    f"{self.path} was made with {name} {old!r}, and this call has {new!r}; choose "
                    "another --output"
                )

    def _find_done(self, content: bytes) -> int:
        """Fill `done`; returns where the last whole unit ends."""
        end = offset = 0
        open_id: Hashable = None
        missing: set[Hashable] = set()
        # Behind the last line's end may be what a crash left.
        for number, raw in enumerate(content.split(b"\n")[:-1], 1):
            offset += len(raw) + 1
            try:
                line = parse_json(raw)
                id, key = self._read_key(line)
                is_new = not missing
                if is_new and id not in self.done:
                    open_id, missing = id, set(self._units[id].line_keys)
                if id != open_id:
                    raise KeyError(id)
                missing.remove(key)
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{self.path}, line {number}: not a result that this call would write; choose "
                    "another --output"
                ) from None
            if not missing:
                self.done.add(id)
                if self._source_names:
                    self._source = self._source_of(line)
                end = offset
        return end

    @contextlib.contextmanager
    def _as_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_full = error.errno in DISK_FULL
            advice = "make room and run this again" if is_full else "choose another --output"
            raise MinifuseError(
                f"{error.filename or self.path} cannot be written: {error.strerror}; {advice}"
            ) from None


def dump_json(value: dict, *, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
