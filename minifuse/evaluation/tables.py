"""The table of a run, one row per record: made from records.jsonl, kept in three formats.

Lists are lists in parquet and feather, and JSON text in CSV.
"""

import csv
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.evaluation.extras import import_extra
from minifuse.evaluation.lemmas import Lemmatizer, add_lemmas
from minifuse.evaluation.matching import (
    match_exact,
    match_first_word,
    match_lemma,
    match_lemma_both,
    token_f1,
)
from minifuse.files import new_file

if TYPE_CHECKING:
    import pyarrow
    from pandas import DataFrame
    from pyarrow import Table

TABLE_SUFFIXES = (".parquet", ".feather", ".csv")

_TEXT, _COUNT, _NUMBER, _FLAG = "text", "count", "number", "flag"
_TEXTS, _TEXT_LISTS, _NUMBERS = "texts", "text lists", "numbers"

# Every column with what it holds, in the order of the table. Text and counts may be missing.
# Those of attribution are there where a record has one: attention to prefix, segments, suffix and
# answer; what an answer loses without each segment, and is worth with each alone.
COLUMNS = {
    "id": _TEXT,
    "n": _COUNT,
    "draw": _COUNT,
    "method": _TEXT,
    "paraphrase_index": _COUNT,
    "relation": _TEXT,
    "question": _TEXT,
    "paraphrases": _TEXTS,
    "answers": _TEXTS,
    "prediction": _TEXT,
    "predict_lemma": _TEXTS,
    "answer_lemmas": _TEXT_LISTS,
    "positions": _TEXT,
    "match_lemma": _FLAG,
    "match_lemma_both": _FLAG,
    "match_exact": _FLAG,
    "match_first_word": _FLAG,
    "f1": _NUMBER,
    "answer_logprob": _NUMBER,
    "confidence": _NUMBER,
    "num_tokens": _COUNT,
    "prompt_tokens": _COUNT,
    "num_streams": _COUNT,
    "prefill_ms": _NUMBER,
    "decode_ms": _NUMBER,
    "attention": _NUMBERS,
    "without": _NUMBERS,
    "alone": _NUMBERS,
}
ATTRIBUTION_COLUMNS = ("attention", "without", "alone")
# Columns that may be empty; an empty cell of a CSV file is missing here, and "" elsewhere.
_MAY_BE_MISSING = ("paraphrase_index", "relation", "positions", "answer_logprob")
# What no two records have in common.
_KEY = ("id", "n", "draw", "method", "paraphrase_index")
_DTYPES: dict[str | None, object] = {_COUNT: "Int64", _NUMBER: "float64", _FLAG: "bool"}


def read_records(path: Path) -> list[dict]:
    """The records of a run; a last line that a crash cut off is left out with a warning.

    raises: UsageError where the file cannot be read; MinifuseError naming the line of any other
            damage
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    records: list[dict] = []
    seen: dict[tuple, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # without a newline: never written to its end
                warnings.warn(f"{where} is torn and left out; --resume makes it anew", stacklevel=2)
                break
            raise MinifuseError(
                f"{where}: not JSON: {one_line(error)}; wanted a record of a run"
            ) from None
        if b"\\ud" in line.lower():
            _check_surrogates(record, where)
        _check_record(record, where)
        key = tuple(record[name] for name in _KEY)
        if key in seen:
            named = ", ".join(f"{name} {record[name]!r}" for name in _KEY)
            raise MinifuseError(
                f"{where} repeats line {seen[key]}: {named}; wanted every record once"
            )
        seen[key] = number
        records.append(record)
    return records


@dataclass(frozen=True)
class _Field:
    wanted: str
    is_right: Callable[[Any], bool]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_TEXT_FIELD = _Field("a string", lambda value: isinstance(value, str))
_OPTIONAL_TEXT = _Field("a string or null", lambda value: isinstance(value, str | None))
_TEXTS_FIELD = _Field("a list of strings", _is_texts)
_COUNT_FIELD = _Field("an integer of at least 0", _is_count)
_LIST_FIELD = _Field("a list", lambda value: isinstance(value, list))
# What the table reads of a record; a record may hold more.
_FIELDS = {
    "id": _TEXT_FIELD,
    "n": _Field("an integer of at least 1", lambda value: _is_count(value) and value > 0),
    "draw": _COUNT_FIELD,
    "method": _TEXT_FIELD,
    "paraphrase_index": _Field("an integer or null", lambda v: v is None or _is_count(v)),
    "relation": _OPTIONAL_TEXT,
    "question": _TEXT_FIELD,
    "paraphrases": _TEXTS_FIELD,
    "answers": _TEXTS_FIELD,
    "prediction": _TEXT_FIELD,
    "positions": _OPTIONAL_TEXT,
    "token_ids": _LIST_FIELD,
    "logprobs": _Field(
        "a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))
    ),
    "answer_logprob": _Field("a number or null", lambda v: v is None or _is_number(v)),
    "prompt_tokens": _COUNT_FIELD,
    "num_streams": _COUNT_FIELD,
    "timings": _Field(
        "an object with the numbers prefill_ms and decode_ms",
        lambda value: (
            isinstance(value, dict)
            and all(_is_number(value.get(name)) for name in ("prefill_ms", "decode_ms"))
        ),
    ),
}


def _is_attribution(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("attention"), dict):
        return False
    attention = value["attention"]
    shares = [attention.get(name) for name in ("prefix", "suffix", "answer")]
    lists = [attention.get("segments"), value.get("without"), value.get("alone")]
    return all(map(_is_number, shares)) and all(
        isinstance(numbers, list) and all(n is None or _is_number(n) for n in numbers)
        for numbers in lists
    )


_ATTRIBUTION = {
    "attribution": _Field("an object with attention, without and alone", _is_attribution)
}


def _check_surrogates(record: object, where: str) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MinifuseError(f"{where}: half a surrogate pair; wanted Unicode text") from None


def _check_record(record: object, where: str) -> None:
    if not isinstance(record, dict):
        raise MinifuseError(f"{where}: {type(record).__name__}; wanted a JSON object")
    fields = _FIELDS | (_ATTRIBUTION if "attribution" in record else {})
    for name, field in fields.items():
        if name not in record:
            raise MinifuseError(f"{where}: no {name}; wanted {field.wanted}")
        if not field.is_right(record[name]):
            shown = repr(record[name])
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise MinifuseError(f"{where}: {name} is {shown}; wanted {field.wanted}")


def make_table(
    records: Iterable[dict], spacy_model: str | None = None, num_processes: int | None = None
) -> "DataFrame":
    """One row per record, with lemmas, every rule and the costs; columns as in `COLUMNS`.

    records:       as `read_records` gives them
    spacy_model:   an installed pipeline; None for the offline lookup lemmatizer
    num_processes: for the lemmas; None for as many as pay
    raises:        MinifuseError where the lemmatizer or pandas is missing
    """
    records = list(records)
    copied = set(_FIELDS) & set(COLUMNS)
    columns = {name: [record[name] for record in records] for name in COLUMNS if name in copied}
    columns["confidence"] = [_confidence_of(record) for record in records]
    columns["num_tokens"] = [len(record["token_ids"]) for record in records]
    for name in ("prefill_ms", "decode_ms"):
        columns[name] = [record["timings"][name] for record in records]
    columns |= _attribution_columns(records)
    table = _make_frame(columns)
    return apply_rules(add_lemmas(table, Lemmatizer(spacy_model, num_processes=num_processes)))


def _attribution_columns(records: Sequence[dict]) -> dict[str, list]:
    """Columns of attribution; none where no record has any."""
    found = [record.get("attribution") for record in records]
    if not any(found):
        return {}
    columns: dict[str, list] = {name: [] for name in ATTRIBUTION_COLUMNS}
    for one in found:
        shares = one and one["attention"]
        columns["attention"].append(
            shares and [shares["prefix"], *shares["segments"], shares["suffix"], shares["answer"]]
        )
        columns["without"].append(one and one["without"])
        columns["alone"].append(one and one["alone"])
    return columns


def apply_rules(table: "DataFrame") -> "DataFrame":
    """The table with every rule's column made anew from texts and lemmas, in the usual order.

    raises: UsageError where a column is missing
    """
    sources = ("prediction", "answers", "predict_lemma", "answer_lemmas")
    missing = [name for name in sources if name not in table]
    if missing:
        raise UsageError(f"the table has no column {', '.join(missing)}; the rules read it")
    texts = list(zip(table["prediction"], table["answers"], strict=True))
    lemmas = list(zip(table["predict_lemma"], table["answer_lemmas"], strict=True))
    rules: dict[str, list] = {
        "match_lemma": [match_lemma(*row) for row in lemmas],
        "match_lemma_both": [match_lemma_both(*row) for row in lemmas],
        "match_exact": [match_exact(*row) for row in texts],
        "match_first_word": [match_first_word(*row) for row in texts],
        "f1": [token_f1(*row) for row in texts],
    }
    return _make_frame({name: list(table[name]) for name in table} | rules)


def write_table(table: "DataFrame", path: Path) -> None:
    """Write a table, whole or not at all; the file's suffix says the format.

    raises: UsageError for another suffix; MinifuseError where the file cannot be written
    """
    write = {".parquet": _write_parquet, ".feather": _write_feather, ".csv": _write_csv}
    suffix = _suffix_of(path)
    try:
        with new_file(path) as partial, partial.open("wb") as file:
            write[suffix](table, file)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:  # a column that is not what `COLUMNS` says
        raise MinifuseError(f"{path} cannot be written: {one_line(error)}") from None


def read_table(path: Path) -> "DataFrame":
    """A table as it was written; the file's suffix says the format.

    raises: UsageError for another suffix, or a file that cannot be read or is damaged
    """
    read: dict[str, Callable[[Path], Mapping[str, Sequence]]]
    read = {".parquet": _read_parquet, ".feather": _read_feather, ".csv": _read_csv}
    suffix = _suffix_of(path)
    try:
        columns = read[suffix](path)
        return _make_frame(columns)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    except MinifuseError:
        raise
    except Exception as error:  # pyarrow has a kind of its own for each of Python's
        raise UsageError(
            f"{path} is not a table that this program wrote: {one_line(error)}"
        ) from None


def _suffix_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UsageError(f"{path} ends in {suffix!r}; wanted one of {', '.join(TABLE_SUFFIXES)}")
    return suffix


def _confidence_of(record: dict) -> float:
    """Geometric mean of the tokens' probabilities; an empty answer has no confidence."""
    logprobs = record["logprobs"]
    if not logprobs or not record["prediction"]:
        return 0.0
    return math.exp(min(0.0, math.fsum(logprobs) / len(logprobs)))


def _make_frame(columns: Mapping[str, Sequence]) -> "DataFrame":
    """A frame with known columns first; the same types whatever the rows hold, none included."""
    pandas = import_extra("pandas")
    known = [name for name in COLUMNS if name in columns]
    order = [*known, *(name for name in columns if name not in COLUMNS)]
    frame = {}
    for name in order:
        kind = COLUMNS.get(name)
        values = columns[name]
        if kind is _TEXT:
            values = [None if _is_missing(value) else value for value in values]
        dtype = _DTYPES.get(kind, object if kind else None)
        frame[name] = pandas.Series(values, dtype=dtype)
    return pandas.DataFrame(frame)


def _is_missing(value: object) -> bool:
    return value is None or value != value  # NaN alone differs from itself


def _to_arrow(table: "DataFrame") -> "Table":
    pyarrow = import_extra("pyarrow")
    text = pyarrow.string()
    types: dict[str | None, object] = {
        _TEXT: text,
        _COUNT: pyarrow.int64(),
        _NUMBER: pyarrow.float64(),
        _FLAG: pyarrow.bool_(),
        _TEXTS: pyarrow.list_(text),
        _TEXT_LISTS: pyarrow.list_(pyarrow.list_(text)),
        _NUMBERS: pyarrow.list_(pyarrow.float64()),
    }
    arrays = {
        name: pyarrow.array(table[name], type=types.get(COLUMNS.get(name)), from_pandas=True)
        for name in table
    }
    return pyarrow.table(arrays)


def _write_parquet(table: "DataFrame", file: IO[bytes]) -> None:
    import_extra("pyarrow.parquet").write_table(_to_arrow(table), file)


def _write_feather(table: "DataFrame", file: IO[bytes]) -> None:
    import_extra("pyarrow.feather").write_feather(_to_arrow(table), file)


def _write_csv(table: "DataFrame", file: IO[bytes]) -> None:
    table = table.copy()
    for name in table:
        if COLUMNS.get(name) in (_TEXTS, _TEXT_LISTS, _NUMBERS):
            table[name] = [json.dumps(value, ensure_ascii=False) for value in table[name]]
    # All text in quotes: by default a carriage return alone gets none, and ends the row.
    quoting = csv.QUOTE_NONNUMERIC
    table.to_csv(file, index=False, encoding="utf-8", lineterminator="\n", quoting=quoting)


def _read_parquet(path: Path) -> dict[str, list]:
    with path.open("rb") as file:
        return _to_columns(import_extra("pyarrow.parquet").read_table(file))


def _read_feather(path: Path) -> dict[str, list]:
    with path.open("rb") as file:
        return _to_columns(import_extra("pyarrow.feather").read_table(file))


def _to_columns(table: "pyarrow.Table") -> dict[str, list]:
    # Unchecked, lengths and offsets of a damaged file lead out of memory, and the process dies.
    table.validate(full=True)
    return table.to_pydict()


def _read_csv(path: Path) -> dict[str, list]:
    table = import_extra("pandas").read_csv(
        path, dtype=str, keep_default_na=False, encoding="utf-8", encoding_errors="strict"
    )
    flags = {"True": True, "False": False}
    read: dict[str | None, Callable[[str], Any]] = {
        _TEXT: str,
        _COUNT: int,
        _NUMBER: float,
        _FLAG: flags.__getitem__,
        _TEXTS: json.loads,
        _TEXT_LISTS: json.loads,
        _NUMBERS: json.loads,
    }
    columns: dict[str, list] = {}
    for name in table:
        kind = COLUMNS.get(name)
        values = list(table[name])
        try:
            columns[name] = [_read_cell(name, read.get(kind, str), value) for value in values]
        except (ValueError, KeyError) as error:
            raise ValueError(f"column {name} holds what is no {kind}: {error}") from None
    return columns


def _read_cell(name: str, read: Callable[[str], Any], value: str) -> Any:
    return None if not value and name in _MAY_BE_MISSING else read(value)
