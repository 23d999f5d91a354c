"""Rows of files: the same from every format, bad ones named; files of splits; the hub."""

import base64
import csv
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_stub import HubStub, Repository, _Handler

from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation import rows
from minifuse.evaluation.rows import (
    BadRow,
    Listing,
    Rejects,
    choose_split,
    hash_files,
    list_folder,
    read_rows,
)

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"id": "a", "question": "Größe?", "answers": ["eins", "zwei, drei"], "relation": "r"},
    {"id": "b", "question": 'with "quotes",\nand a line', "answers": ["x"], "relation": None},
]
COLUMNS = ("id", "question", "answers", "relation")


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                cells = [json.dumps(v) if isinstance(v, list) else v for v in row.values()]
                writer.writerow(cells)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_values(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    rows = list(read_rows(path, Rejects(False), COLUMNS))
    read = [
        {
            "id": row.key("id"),
            "question": row.text("question"),
            "answers": list(row.texts("answers")),
            "relation": row.optional_key("relation"),
        }
        for row in rows
    ]
    assert read == ROWS
    unit = "line" if suffix == ".jsonl" else "row"
    assert [row.where for row in rows] == [f"{path}, {unit} {number}" for number in (1, 2)]


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\n\n  \n{"id": 2}')
    rows = list(read_rows(path, Rejects(False), ("id",)))
    assert [(row.key("id"), row.where.split(", ")[1]) for row in rows] == [
        ("1", "line 1"),
        ("2", "line 4"),
    ]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfid,question\n1,x\n\n2,y\n\n")
    rows = list(read_rows(path, Rejects(False), ("id",)))
    assert [(row.key("id"), row.where.split(", ")[1]) for row in rows] == [
        ("1", "row 1"),
        ("2", "row 3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "good", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n{"id": 3}\n', ["1", "3"], "line 2: not JSON"),
        ("a.jsonl", b'{"id": 1}\n[1]\n', ["1"], "line 2: list; wanted a JSON object"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}\n', ["1"], r"line 2: not UTF-8 \(byte 8\)"),
        ("a.jsonl", b'{"id": 1}\n' + b"[" * 99999, ["1"], "line 2: not JSON"),
        ("a.csv", b"id,q\n1,x\n2\n3,y\n", ["1", "3"], "row 2: 1 cells; the header names 2"),
        ("a.csv", b'id,q\n1,x\n2,"y"z\n3,y\n', ["1", "3"], "row 2: not CSV"),
        ("a.csv", b'id,q\n1,x\n2,"y\n3,y\n', ["1"], "row 2: not CSV: unexpected end of data"),
    ],
)
def test_broken_rows_are_errors_or_counted(tmp_path, name, content, good, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}, {message}.*--skip-bad$"):
        list(read_rows(path, Rejects(False), ("id",)))
    rejects = Rejects(True)
    assert [row.key("id") for row in read_rows(path, rejects, ("id",))] == good
    assert len(rejects.messages) == 1
    assert re.search(message, rejects.messages[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,id\n1,2\n", "names 'id' twice"),
        ("a.csv", b"id,q\n1,\xff\n", "not UTF-8"),
        ("a.csv", b'"id"x,q\n1,2\n', "the header is not CSV"),
        ("a.txt", b"id,q\n1,x\n", r"wanted a file that ends in \.jsonl, \.csv, \.parquet"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.parquet", b"PAR1" + b"\0" * 100 + b"\x10\0\0\0PAR1", "cannot (be )?read"),
    ],
)
def test_broken_files_are_errors_even_where_rows_may_be_skipped(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        list(read_rows(path, Rejects(True), ("id", "q")))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_stand_twice_in_parquet(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["id", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet: the header names 'id' twice"):
        list(read_rows(tmp_path / "a.parquet", Rejects(True), ("id",)))


def test_a_cell_may_hold_a_document(tmp_path):
    """More than the csv module takes unasked."""
    [row] = read_rows(write_rows(tmp_path / "a.csv", [{"x": "word " * 50000}]), Rejects(False), "x")
    assert len(row.text("x")) == 250000


def test_without_pyarrow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MinifuseError, match=r"pip install 'minifuse\[eval\]'"):
        list(read_rows(path, Rejects(True), COLUMNS))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_files_that_are_not_there_or_are_folders(tmp_path, name):
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        list(read_rows(tmp_path / name, Rejects(True), ("id",)))
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"cannot read .*[Dd]irectory"):
        list(read_rows(tmp_path / name, Rejects(True), ("id",)))


def row_of(tmp_path: Path, value: object):
    path = write_rows(tmp_path / "a.jsonl", [{"x": value}])
    return next(read_rows(path, Rejects(False), ("x",)))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("text", None, "x is null; wanted a string"),
        ("text", 3, "x is 3; wanted a string"),
        ("text", "", "x is '', which is empty"),
        ("text", " \n", "which is empty"),
        ("text", "\ud800", "half of a surrogate pair"),
        ("texts", "Paris", "x is 'Paris'; wanted a list of strings"),
        ("texts", [], "x is an empty list"),
        ("texts", None, "x is null; wanted a list"),
        ("texts", {"a": 1}, "wanted a list of strings"),
        ("texts", ["a", 1], r"x\[1\] is 1; wanted a string"),
        ("texts", ["a", ""], r"x\[1\] is '', which is empty"),
        ("texts", [["a"]], r"x\[0\] is \['a'\]; wanted a string"),
        ("key", 1.5, "wanted a string or an integer"),
        ("key", True, "wanted a string or an integer"),
        ("key", None, "wanted a string or an integer"),
        ("key", "", "which is empty"),
        ("flag", 1, "x is 1; wanted true or false"),
        ("flag", "True", "wanted true or false"),
        ("optional_key", 5.5, "wanted a string or an integer"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, kind, value, message):
    row = row_of(tmp_path, value)
    with pytest.raises(BadRow, match=f"a.jsonl, line 1: .*{message}"):
        getattr(row, kind)("x")


def test_a_missing_column_is_named_with_those_there(tmp_path):
    with pytest.raises(BadRow, match="line 1: there is no column 'y' but x"):
        row_of(tmp_path, "a").text("y")


def test_names_of_columns_cannot_write_on_the_terminal(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"x\n\x1b[31m": 1, **{f"c{n}": 1 for n in range(999)}}]
    )
    with pytest.raises(BadRow) as caught:
        next(read_rows(path, Rejects(False), ("x",))).text("y")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(path))


def test_long_values_do_not_flood_the_message(tmp_path):
    with pytest.raises(BadRow) as caught:
        row_of(tmp_path, {"a": "b" * 10000}).text("x")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("cell", ["Paris", "", "[", "3", '"Paris"'])
def test_lists_in_csv_are_json(tmp_path, cell):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["x"], [cell], ["y"]] if cell else [["x", "z"], ["", ""]])
    row = next(read_rows(path, Rejects(False), ("x",)))
    with pytest.raises(BadRow, match=r"row 1: x is .*wanted a list"):
        row.texts("x")


def test_the_hash_is_of_bytes_alone(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    c.write_bytes(b"one")
    assert hash_files([a, b]) == hash_files([c, b])
    assert len({hash_files(paths) for paths in ([a, b], [b, a], [a], [a, a])}) == 4
    (tmp_path / "d").write_bytes(b"onetwo")
    assert hash_files([tmp_path / "d"]) != hash_files([a, b])


def listing(*names: str) -> Listing:
    return Listing("the set", names, Path)


@pytest.mark.parametrize(
    ("names", "config", "splits"),
    [
        (("train.parquet", "test.parquet"), None, {"train", "test"}),
        (("data/train-00000-of-00001.parquet",), None, {"train"}),
        (("data/test-00000-of-00001-9fb5e4d2b1bd8b4c.parquet",), None, {"test"}),
        (("default/train/0000.parquet", "default/train/0001.parquet"), None, {"train"}),
        (("en/partial-train/0000.parquet", "de/test/0000.parquet"), "en", {"train"}),
        (("en/train-00000-of-00001.parquet", "de/test.parquet"), "en", {"train"}),
        (("en/dev.parquet", "default/test.parquet"), None, {"test"}),
    ],
)
def test_splits_are_read_from_names(names, config, splits):
    found = listing(*names).splits(config)
    assert set(found) == splits
    assert sum(map(len, found.values())) <= len(names)


def test_shards_come_in_order_and_none_may_be_missing():
    names = [f"data/train-{number:05}-of-00003.parquet" for number in (2, 0, 1)]
    assert listing(*names).splits() == {"train": sorted(names)}
    with pytest.raises(UsageError, match="has 2 of the 3 files"):
        listing(*names[:2]).splits()


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (("en/test.parquet", "de/test.parquet"), None, "several configurations.*de, en"),
        (("en/test.parquet", "de/test.parquet"), "fr", "no configuration 'fr' but de, en"),
    ],
)
def test_configurations_that_lead_nowhere(names, config, message):
    with pytest.raises(UsageError, match=message):
        listing(*names).splits(config)


def test_the_split_to_evaluate():
    def chosen(splits: str, wanted: str | None = None) -> str:
        return choose_split(listing(), {split: [] for split in splits.split()}, wanted)

    assert chosen("train validation test") == "test"
    assert chosen("train validation") == "validation"
    assert chosen("train") == "train"
    assert chosen("everything") == "everything"
    assert chosen("train test", "train") == "train"
    with pytest.raises(UsageError, match="no split 'dev' but test, train"):
        chosen("train test", "dev")
    with pytest.raises(UsageError, match="none of the usual splits but one, two"):
        chosen("one two")


def test_folders_are_listed_by_one_kind_of_file(tmp_path):
    with pytest.raises(UsageError, match=r"holds no file that ends in \.parquet or \.jsonl"):
        list_folder(tmp_path, (".parquet", ".jsonl"))
    (tmp_path / "test.jsonl").touch()
    assert list_folder(tmp_path, (".parquet", ".jsonl")).names == ("test.jsonl",)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.parquet").touch()
    found = list_folder(tmp_path, (".parquet", ".jsonl"))
    assert found.names == ("data/test.parquet",)
    assert found.paths(found.names) == [tmp_path / "data" / "test.parquet"]
    with pytest.raises(UsageError, match="which is no folder"):
        list_folder(tmp_path / "test.jsonl", (".jsonl",))


class DataHandler(_Handler):
    """The stub's repositories, where the hub has its data sets."""

    def do_GET(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/")
        self.path = re.sub(r"^/datasets/", "/", self.path)
        super().do_GET()


@pytest.fixture
def hub(tmp_path):
    stub = HubStub()
    stub._server.RequestHandlerClass = DataHandler
    with stub:
        yield stub


LOAD = """
import json, sys
from pathlib import Path
from minifuse.errors import MinifuseError
from minifuse.evaluation.datasets import load_dataset
for name in sys.argv[1:]:
    try:
        data = load_dataset(name)
        print(json.dumps([data.items[0].id, len(data.items), len(data.shots), data.data_hash]))
    except MinifuseError as error:
        print(json.dumps(str(error)))
"""


def load(hub: HubStub, home: Path, *names: str, offline: bool = False) -> list:
    """What each name gives: first id, items, shots and hash, or the message of the error."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def parquet_bytes(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def questions(count: int, start: str) -> bytes:
    return parquet_bytes(
        [
            {"url": "u", "question": f"{start} {number}?", "answers": ["yes"]}
            for number in range(count)
        ]
    )


def test_sets_come_from_the_hub_and_then_from_its_cache(hub, tmp_path):
    webqa = hub.repositories["stanfordnlp/web_questions"] = Repository()
    webqa.commit(
        {
            "README.md": b"a card",
            "data/train-00000-of-00001.parquet": questions(3, "train"),
            "data/test-00000-of-00001.parquet": questions(2, "test"),
        }
    )
    converted = hub.repositories["org/converted"] = Repository()
    converted.commit({"data.json": b"[]"})
    converted.commit(
        {
            "en/test/0000.parquet": questions(4, "en"),
            "en/test/0001.parquet": questions(1, "more"),
            "de/train/0000.parquet": questions(5, "de"),
            "de/dev/0000.parquet": questions(6, "dev"),
        },
        "refs/convert/parquet",
    )
    hub.repositories["org/none"] = Repository()
    hub.repositories["org/none"].commit({"README.md": b""})
    rows = [
        {
            "uuid": "u1",
            "rel_uri": "P36",
            "is_manual": number == 0,
            "sub_ent": "France",
            "obj_aliases": ["Paris", "Lutetia"],
            "template": f"[X] {number} [Y]",
        }
        for number in range(3)
    ]
    hub.repositories["iszhaoxin/MyriadLAMA"] = Repository()
    hub.repositories["iszhaoxin/MyriadLAMA"].commit({"data/train.parquet": parquet_bytes(rows)})
    names = (
        "webqa",
        "hf:stanfordnlp/web_questions",
        "hf:stanfordnlp/web_questions:train",
        "hf:org/converted:en",
        "hf:org/converted:de:dev",
        "myriadlama",
        "hf:org/converted",
        "hf:org/converted:en:dev",
        "hf:org/none",
        "hf:org/missing",
        "hf:org/converted@branch",
    )
    results = load(hub, tmp_path, *names)
    assert [result[:3] for result in results[:6]] == [
        ["test-0", 2, 3],
        ["test-0", 2, 3],
        ["train-0", 3, 0],
        ["test-0", 5, 0],
        ["dev-0", 6, 5],
        ["u1", 1, 0],
    ]
    assert results[0][3] == results[1][3] != results[2][3]
    for result, words in zip(
        results[6:],
        (
            "several configurations; wanted one of de, en",
            "has no split 'dev' but test",
            "hub datasets/org/none at main holds no parquet file",
            "hub datasets/org/missing at main does not exist",
            "has no such revision",
        ),
        strict=True,
    ):
        assert words in result
    sent = hub.files_sent()
    assert len(sent) == len(set(sent)), "a file was fetched twice"

    # The same from the cache; what was not fetched is not made up.
    before = len(hub.seen)
    again = load(hub, tmp_path, *names[:6], "hf:org/other", offline=True)
    assert again[:6] == results[:6]
    assert "HF_HUB_OFFLINE forbids" in again[6]
    assert len(hub.seen) == before
    hub.stop()
    unreachable = load(hub, tmp_path, "webqa", "hf:org/other")
    assert unreachable[0] == results[0]
    assert "cannot be reached" in unreachable[1]


def test_a_hub_that_says_nothing_is_not_waited_for_long(tmp_path):
    silent = HubStub()
    release = threading.Event()

    class Silent(DataHandler):
        def do_GET(self) -> None:
            release.wait()

    silent._server.RequestHandlerClass = Silent
    with silent:
        [message] = load(silent, tmp_path, "webqa")
        release.set()
    assert "cannot be reached" in message


def test_a_value_that_python_cannot_hold(tmp_path):
    column = pyarrow.array([2**31 - 1], pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"id": column}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read as parquet: "):
        list(read_rows(tmp_path / "a.parquet", Rejects(True), ("id",)))


def test_parquet_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    """A megabyte of zeros is a few bytes on the disk."""
    path = tmp_path / "a.parquet"
    column = pyarrow.array(["0" * 2**20 for _ in range(4)])
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path, use_dictionary=False)
    assert path.stat().st_size < 2**19
    monkeypatch.setattr(rows, "free_host_memory", lambda: 2**22)
    with pytest.raises(UsageError, match=r"a group of rows that unpacks to 4\.2 MB, and 4"):
        next(read_rows(path, Rejects(False), ["a"]))
    monkeypatch.setattr(rows, "free_host_memory", lambda: 2**23)
    assert len(list(read_rows(path, Rejects(False), ["a"]))) == 4


@pytest.mark.parametrize("has_schema", [True, False])  # of Arrow, which keeps a dictionary one
def test_parquet_whose_rows_share_a_long_text(has_schema, tmp_path):
    """It says of itself that it unpacks to a megabyte, and stands for four gigabytes."""
    path = tmp_path / "a.parquet"
    indices = pyarrow.array([None, *[0] * 4095], pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["0" * 2**20]))
    table = pyarrow.table({"a": column})
    pyarrow.parquet.write_table(table, path, store_schema=has_schema)
    assert path.stat().st_size < 2**19
    before = pyarrow.total_allocated_bytes()
    texts = []
    for row in read_rows(path, Rejects(False), ["a"]):
        texts.append(row.values["a"])
        assert pyarrow.total_allocated_bytes() - before < 2**24
    assert len(texts) == 4096
    assert texts.count(None) == 1
    assert {len(text) for text in texts if text is not None} == {2**20}
    assert len({id(text) for text in texts}) == 2


def test_parquet_of_lists_and_of_texts_that_differ(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [str(number) for number in range(10_000)]
    lists = [[text, None] for text in texts]
    pyarrow.parquet.write_table(pyarrow.table({"a": texts, "b": lists}), path, row_group_size=5000)
    found = [row.values for row in read_rows(path, Rejects(False), ["b", "a"])]
    assert found == [{"b": b, "a": a} for a, b in zip(texts, lists, strict=True)]


# Found by tests.fuzz: what it says of the sizes of its fourth column does not fit together, and
# Arrow ends the process of who asks for that.
ODD_SIZES = (
    "c-oa!%}*0S6rUZo%TjxQhS}^UO=yU0hymn72x%ZP3vB`0Kx-%;;n3~wQZS{|ZTXCeCSEiW4?PiMj2Ha}<lxbR2Te"
    "G5H1T4*XgqjC6BBV}`az*<f-l|K-8b+3e((3@Z90qNeTYY`XgES{zzaazBN0%84ThOaPMW-T3gnMRVs7F?0C`cMi"
    "$pdf0SUe#(8;A_PH$-eXA)D%WKuWH6$s{DwBsh4$)n3?(t(47iicl8@u7QqYC7P44;1wCkJp(?)cx(L_Ab96!`Sr"
    ";akit02+4NhOv55~yg%0O0{qNEqNT*>M-yEn{#2bQ!&yhFl@u&yjv_}_JmCH(?Ll*i&yNE28h@X(dA=*ko97&O7A"
    "%f5JBX9Tlak$)MUJI`dlC^`@4b+0FB)<_&Q6#Tfc7eBH~r%@Z5dpILD?S!vXD1ct#uu_0rGS}8LpWfAmXF@^i{mQ"
    "Y2^!R8`-jR5XzTwx~=C{Z9Q-05kx{{g!*}z&#dJO2$u31t&Fv9WeXK7p8E7`e%rG1Wn|mR=rza^ulST@75I=x83a"
    "PJLQ6rs#7lRicbvMcinW8PP{Dw*0iqj%5t1$_D&PrHEk?C|hV+z^zH#ayR6lS|lUNVh>I6Dm+X1G!qLz>d(i2Yl%"
    "&7;w`nuuF@YSQc6_tldh@cB)2EJT&rB$rzBTjk@)gLbP!1aG4R?q0zqRK%qvK{Fyr~YbGUpCfEQauo?Hby#jNxUj"
    "bUqqnzWDkzVXXXQ?nUX&?T&32R)-c8~T(TP&Z(}WuLl~#=c$)b%5)h>i;}}md$LXEe9JwZj>C+Zn!pzxQ-5<Y2Na"
    "%Jj6lBhAx(0F8D2cYaG{3WIhBI5K5@(v0mY5|A4UbR7PN8GfOa>JWZ5jh+#>htTO&UM2SK*6>%0*ZCXsX5tB6Kmr"
    "q20v=ZNpd(?JX@tu|@NT_RiItK36XT$(i9qq13SnTIw8KSg+#DYn=9n8S9s^kjNMV@m#9^8guSZz8y@PP4*Y5o@k"
    "k@BC>+Fcn*)L(&uBW9_>thqoZJq9KB6Gu0pqw%XRCvy|L}zA`?sI$lpKI)7#UhER)Z=_6KY-FSF#Y>Muk<V+H"
)
READ = """
import sys
from pathlib import Path
from minifuse.errors import UsageError
from minifuse.evaluation.rows import Rejects, read_rows
try:
    print(len(list(read_rows(Path(sys.argv[1]), Rejects(False), ["id", "question", "answers"]))))
except UsageError as error:
    print(error)
"""


def test_parquet_whose_sizes_do_not_fit_together(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(zlib.decompress(base64.b85decode(ODD_SIZES)))
    command = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert done.stdout.count("\n") == 1
