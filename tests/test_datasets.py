"""Data sets: what is read, what is left out, and what is said of bad input."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minifuse.errors import UsageError
from minifuse.evaluation.datasets import MASK, Item, load_dataset, parse_fields

ROOT = Path(__file__).resolve().parents[1]
ROW = {"id": "a", "question": "q?", "paraphrases": ["q?", "p?"], "answers": ["x"]}
TEMPLATE_ROW = {
    "uuid": "u",
    "rel_uri": "P36",
    "sub_ent": "France",
    "obj_aliases": ["Paris"],
    "template": "[X] has [Y].",
    "is_manual": True,
}


def write_jsonl(path: Path, rows: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_gives_the_same_items_in_every_format(tmp_path, suffix):
    rows = [
        {**ROW, "relation": "r"},
        {"id": "b", "question": "é?", "paraphrases": ["1", "2"], "answers": ["y", "z"]},
    ]
    rows[1]["relation"] = None
    path = tmp_path / f"set{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                for row in rows
            )
    data = load_dataset(str(path), min_paraphrases=2)
    assert data.items == (
        Item("a", "q?", ("q?", "p?"), ("x",), "r"),
        Item("b", "é?", ("1", "2"), ("y", "z"), None),
    )
    assert (data.name, data.shots, data.skipped, data.notes) == (str(path), (), (), ())


def test_fields_map_columns(tmp_path):
    rows = [{"qid": 7, "text": "q?", "gold": ["x"], "id": "other", "group": "g"}]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    fields = parse_fields("id=qid,question=text,answers=gold,relation=group")
    assert load_dataset(str(path), fields=fields).items == (Item("7", "q?", ("q?",), ("x",), "g"),)


def test_relations_may_be_numbers(tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [{**ROW, "relation": 7}])
    assert load_dataset(str(path)).items[0].relation == "7"


def test_rows_without_an_id_are_called_by_their_number(tmp_path):
    rows = [{"question": f"{n}?", "answers": ["x"]} for n in range(3)]
    rows[1]["answers"] = []
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    data = load_dataset(str(path), skip_bad=True)
    assert [item.id for item in data.items] == ["set-0", "set-2"]


@pytest.mark.parametrize(
    "text", ["", "id", "id=", "question", "id=a,id=b", "name=x", "id=a,,question=b", "=x"]
)
def test_field_maps_that_are_none(text):
    with pytest.raises(UsageError, match=r"--fields (has|names) .*; wanted"):
        parse_fields(text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "id": "first"}, "id 'first' is taken by .*line 1; ids must differ"),
        ({"id": "a", "answers": ["x"]}, "there is no column 'question' but id, answers"),
        ({"id": "a", "question": "q?"}, "there is no column 'answers' but id, question"),
        ({**ROW, "id": None}, "id is null; wanted a string or an integer"),
        ({**ROW, "id": 1.5}, "id is 1.5; wanted a string or an integer"),
        ({**ROW, "question": ""}, "question is '', which is empty"),
        ({**ROW, "question": 3}, "question is 3; wanted a string"),
        ({**ROW, "answers": []}, "answers is an empty list"),
        ({**ROW, "answers": "x"}, "answers is 'x'; wanted a list of strings"),
        ({**ROW, "answers": ["x", 5]}, r"answers\[1\] is 5; wanted a string"),
        ({**ROW, "answers": [None]}, r"answers\[0\] is null; wanted a string"),
        ({**ROW, "paraphrases": ["q?"]}, "1 paraphrases of id 'a'; wanted at least 2"),
        ({**ROW, "paraphrases": []}, "paraphrases is an empty list"),
        ({**ROW, "paraphrases": ["q?", " "]}, r"paraphrases\[1\] is ' ', which is empty"),
        ({"id": "a", "question": "q?", "answers": ["x"]}, "1 paraphrases of id 'a'"),
        ({**ROW, "relation": 5.5}, "relation is 5.5; wanted a string or an integer"),
        ({**ROW, "relation": True}, "relation is True; wanted a string or an integer"),
        ("[1]", "list; wanted a JSON object"),
        ('{"id": "a"', "not JSON"),
        ('{"id": "a", "question": NaN}', "question is nan; wanted a string"),
    ],
)
def test_bad_rows_name_file_and_row_or_are_counted(tmp_path, row, message):
    good = {**ROW, "id": "first"}
    path = write_jsonl(tmp_path / "set.jsonl", [good, row])
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}, line 2: {message}") as caught:
        load_dataset(str(path), min_paraphrases=2)
    assert "\n" not in str(caught.value)
    data = load_dataset(str(path), min_paraphrases=2, skip_bad=True)
    assert [item.id for item in data.items] == ["first"]
    assert len(data.skipped) == 1
    assert re.search(message, data.skipped[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "webqe"}, "'webqe'; wanted one of webqa, myriadlama, .*hf:ORG/NAME"),
        ({"name": "set.json"}, "wanted one of"),
        ({"name": "missing.jsonl"}, "cannot read missing.jsonl: No such file"),
        ({"name": "hf:name"}, r"wanted hf:ORG/NAME\[:config\]\[:split\]"),
        ({"name": "hf:o/n:a:b:c"}, "wanted hf:ORG/NAME"),
        ({"name": "hf:o/n:"}, "wanted hf:ORG/NAME"),
        ({"name": "pararel"}, "wanted the folder of its files as --data-dir"),
        ({"name": "graphquestions", "data_dir": Path("nowhere")}, "nowhere, which is no folder"),
        ({"name": "webqa", "fields": {"id": "x"}}, "--fields is for files and hf:"),
        ({"name": "a.jsonl", "fields": {"ID": "x"}}, "--fields names 'ID'; wanted one of id"),
        ({"name": "a.jsonl", "data_dir": Path(".")}, "--data-dir is for webqa"),
    ],
)
def test_calls_that_lead_nowhere(options, message):
    with pytest.raises(UsageError, match=message):
        load_dataset(**options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "the files have no rows"), ([{"id": 1}, {}], "2 rows are bad, first .*line 1: ")],
)
def test_no_items_are_an_error(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(UsageError, match=f"has no item to evaluate: {message}"):
        load_dataset(str(path), skip_bad=True)


def test_a_mapped_column_must_be_there(tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [ROW])
    for field in ("id", "question", "paraphrases", "answers", "relation"):
        with pytest.raises(UsageError, match="line 1: there is no column 'missing' but id"):
            load_dataset(str(path), fields={field: "missing"})


class TestParaphraseFiles:
    def load(self, tmp_path, lines, **options):
        rows = [{"id": n, "question": f"{n}?", "answers": ["x"]} for n in (1, 2)]
        path = write_jsonl(tmp_path / "set.jsonl", rows)
        file = write_jsonl(tmp_path / "paraphrases.jsonl", lines)
        return load_dataset(str(path), paraphrase_file=file, **options)

    def test_they_follow_the_question_and_repeat_nothing(self, tmp_path):
        lines = [
            {"id": 1, "question": "1?", "paraphrases": ["one?", "1?", "one?", "eins?"], "more": 0},
            {"id": "unknown", "question": "?", "paraphrases": ["?"]},
        ]
        data = self.load(tmp_path, lines)
        assert data.items[0].paraphrases == ("1?", "one?", "eins?")
        assert data.items[1].paraphrases == ("2?",)
        [note] = data.notes
        assert note.startswith("1 of 2 lines in ")
        assert note.endswith("paraphrases.jsonl are of no item here")

    def test_a_file_for_another_set_is_refused(self, tmp_path):
        lines = [{"id": id, "question": "1?", "paraphrases": ["one?"]} for id in ("test-0", "x")]
        message = "2 of 2 lines in .* are of no item here, the first 'test-0'; wanted a paraphrase"
        with pytest.raises(UsageError, match=message):
            self.load(tmp_path, lines, skip_bad=True)
        assert len(self.load(tmp_path, []).items) == 2

    def test_a_question_that_none_was_found_for_keeps_itself(self, tmp_path):
        data = self.load(tmp_path, [{"id": 1, "question": "1?", "paraphrases": []}])
        assert data.items[0].paraphrases == ("1?",)

    def test_the_hash_covers_them(self, tmp_path):
        first = {"id": 1, "question": "1?", "paraphrases": ["one?"]}
        hashes = {
            self.load(tmp_path, [{**first, "paraphrases": [text]}]).data_hash for text in "ab"
        }
        assert len(hashes) == 2

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"id": 1, "question": "other?", "paraphrases": ["p"]}, "of this data set"),
            ({"id": 2, "question": "2?", "paraphrases": ["p"]}, "id '2' is taken by .*line 1"),
            ({"id": 1, "question": "1?", "paraphrases": [""]}, "paraphrases"),
            ({"id": 1, "question": "1?"}, "no column 'paraphrases'"),
            ("{", "not JSON"),
        ],
    )
    def test_bad_lines(self, tmp_path, line, message):
        lines = [{"id": 2, "question": "2?", "paraphrases": ["zwei?"]}, line]
        with pytest.raises(UsageError, match=rf"paraphrases\.jsonl, line 2: .*{message}"):
            self.load(tmp_path, lines)
        assert len(self.load(tmp_path, lines, skip_bad=True).skipped) == 1

    def test_too_few_name_the_row_of_the_item(self, tmp_path):
        lines = [{"id": 1, "question": "1?", "paraphrases": ["p"]}]
        with pytest.raises(UsageError, match=r"set\.jsonl, line 2: 1 paraphrases of id '2'"):
            self.load(tmp_path, lines, min_paraphrases=2)

    def test_other_files_are_refused(self, tmp_path):
        path = write_jsonl(tmp_path / "set.jsonl", [ROW])
        with pytest.raises(UsageError, match=r"wanted one that ends in \.jsonl"):
            load_dataset(str(path), paraphrase_file=tmp_path / "p.csv")


class TestWebqa:
    def test_test_is_evaluated_and_train_gives_shots(self, shared_data):
        folder = shared_data / "webquestions"
        data = load_dataset("webqa", data_dir=folder)
        for side, split in ((data.items, "test"), (data.shots, "train")):
            rows = read_jsonl(folder / f"{split}.jsonl")
            assert len(side) == len(rows)
            for number in (0, 17, len(rows) - 1):
                question, answers = rows[number]["question"], tuple(rows[number]["answers"])
                assert side[number] == Item(f"{split}-{number}", question, (question,), answers)

    def test_parquet_as_the_hub_has_it(self, shared_data, tmp_path):
        folder = shared_data / "webquestions"
        (tmp_path / "data").mkdir()
        for split in ("train", "test"):
            table = pyarrow.Table.from_pylist(read_jsonl(folder / f"{split}.jsonl"))
            path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(table, path)
        mine, theirs = (load_dataset("webqa", data_dir=place) for place in (tmp_path, folder))
        assert (mine.items, mine.shots) == (theirs.items, theirs.shots)
        assert mine.data_hash != theirs.data_hash

    def test_paraphrases_go_by_id(self, shared_data, tmp_path):
        folder = shared_data / "webquestions"
        plain = load_dataset("webqa", data_dir=folder)
        lines = [
            {"id": item.id, "question": item.question, "paraphrases": [f"{item.question} ?"]}
            for item in (*plain.items, plain.shots[0])
        ]
        file = write_jsonl(tmp_path / "p.jsonl", lines)
        data = load_dataset("webqa", data_dir=folder, paraphrase_file=file, min_paraphrases=2)
        assert {len(item.paraphrases) for item in data.items} == {2}
        assert [len(shot.paraphrases) for shot in data.shots[:2]] == [2, 1]

    def test_without_paraphrases_five_are_too_many(self, shared_data):
        message = r"test\.jsonl, line 1: 1 paraphrases .*at least 5: .*a paraphrase file"
        with pytest.raises(UsageError, match=message):
            load_dataset("webqa", data_dir=shared_data / "webquestions", min_paraphrases=5)

    def test_both_sides_are_wanted(self, tmp_path):
        write_jsonl(tmp_path / "test.jsonl", [ROW])
        with pytest.raises(UsageError, match="has no train split; wanted test and train"):
            load_dataset("webqa", data_dir=tmp_path)


class TestPararel:
    def test_items_are_what_a_slow_reading_finds(self, shared_data):
        folder = shared_data / "pararel"
        data = load_dataset("pararel", data_dir=folder, min_paraphrases=5)
        facts, templates = (read_jsonl(folder / f"{name}.jsonl") for name in ("facts", "templates"))
        patterns: dict[str, list[str]] = {}
        for row in templates:
            patterns.setdefault(row["rel"], []).append(row["pattern"])
        answers: dict[tuple[str, str], set[str]] = {}
        for row in facts:
            answers.setdefault((row["rel"], row["sub"]), set()).add(row["obj"])
        wanted = {
            (relation, subject): gold
            for (relation, subject), gold in answers.items()
            if len(patterns.get(relation, [])) >= 5
        }
        assert len(data.items) == len(wanted) == 9131
        by_uuid = {row["uuid"]: row for row in facts}
        for item in data.items:
            row = by_uuid[item.id]
            assert (item.relation, row["rel"], item.is_manual) == (row["rel"], row["rel"], None)
            assert set(item.answers) == wanted.pop((row["rel"], row["sub"]))
            assert len(item.answers) == len(set(item.answers))
            assert item.question == item.paraphrases[0]
            for paraphrase, pattern in zip(item.paraphrases, patterns[row["rel"]], strict=True):
                before, after = pattern.replace("[X]", row["sub"]).split("[Y]")
                assert paraphrase == f"{before}[MASK]{after}"
        assert not wanted
        assert data.notes == (
            "14826 facts make 13914 items: objects of one relation and subject are answers of "
            "one item",
            "878 items are left out: there is no template for P31 (878)",
            "3905 items are left out, with fewer than 5 paraphrases: P103 (918), P108 (372), "
            "P127 (616), P1303 (507), P131 (775), P276 (717)",
        )

    @pytest.mark.parametrize(
        ("templates", "facts", "message"),
        [
            ([{"rel": "P1", "pattern": "[X] is here."}], [], r"templates\.jsonl, line 1: .*\[Y\]"),
            ([{"rel": "P1"}], [], r"templates\.jsonl, line 1: there is no column 'pattern'"),
            ([], [{"rel": "P1", "sub": "a", "obj": 5, "uuid": "u"}], "line 1: obj is 5"),
            ([], [], "the files have no rows"),
        ],
    )
    def test_bad_files(self, tmp_path, templates, facts, message):
        write_jsonl(tmp_path / "templates.jsonl", templates)
        write_jsonl(tmp_path / "facts.jsonl", facts)
        with pytest.raises(UsageError, match=message):
            load_dataset("pararel", data_dir=tmp_path)
        (tmp_path / "facts.jsonl").unlink()
        with pytest.raises(UsageError, match=r"templates\.jsonl|holds no facts\.jsonl"):
            load_dataset("pararel", data_dir=tmp_path)

    def test_a_subject_may_hold_a_placeholder(self, tmp_path):
        write_jsonl(tmp_path / "templates.jsonl", [{"rel": "P", "pattern": "[X] in [Y], [X]"}])
        fact = {"rel": "P", "sub": "the [Y] and [X]", "obj": "gold", "uuid": 1}
        write_jsonl(tmp_path / "facts.jsonl", [fact])
        item = load_dataset("pararel", data_dir=tmp_path).items[0]
        assert item.question == "the [Y] and [X] in [MASK], the [Y] and [X]"


@pytest.fixture(scope="module")
def whole_myriadlama(shared_data):
    return load_dataset("myriadlama", data_dir=shared_data / "pararel_as_myriadlama")


class TestMyriadlama:
    def test_parquet_is_grouped_by_uuid(self, shared_data, whole_myriadlama):
        folder, data = shared_data / "pararel_as_myriadlama", whole_myriadlama
        table = pyarrow.parquet.read_table(folder / "pararel_as_myriadlama.parquet").to_pandas()
        assert len(data.items) == table["uuid"].nunique() == 13036
        assert sum(len(item.paraphrases) for item in data.items) == len(table)
        groups = table.groupby("uuid", sort=False)
        for item, (uuid, group) in zip(data.items, groups, strict=True):
            assert item.id == uuid
            assert item.relation == group["rel_uri"].iloc[0]
            assert item.answers == tuple(group["obj_aliases"].iloc[0])
            assert item.is_manual == tuple(group["is_manual"])
            assert all(MASK in text for text in item.paraphrases)
            assert not any("[X]" in text or "[Y]" in text for text in item.paraphrases)

    def test_jsonl_gives_the_same_items(self, shared_data, whole_myriadlama):
        path = shared_data / "pararel_as_myriadlama" / "pararel_as_myriadlama_sample300facts.jsonl"
        sample = load_dataset("myriadlama", data_dir=path)
        assert len(sample.items) == 300
        whole = {item.id: item for item in whole_myriadlama.items}
        assert all(whole[item.id] == item for item in sample.items)

    def test_facts_with_few_templates_are_counted(self, shared_data):
        path = shared_data / "pararel_as_myriadlama" / "pararel_as_myriadlama_sample300facts.jsonl"
        data = load_dataset("myriadlama", data_dir=path, min_paraphrases=10)
        rows = Counter(row["uuid"] for row in read_jsonl(path))
        assert len(data.items) == sum(count >= 10 for count in rows.values())
        assert data.notes[0].startswith(f"{300 - len(data.items)} items are left out, with fewer")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"template": "[X] has it."}, r"wanted \[X\] for the subject and \[Y\]"),
            ({"template": "It has [Y]."}, r"wanted \[X\] for the subject and \[Y\]"),
            ({"obj_aliases": []}, "obj_aliases is an empty list"),
            ({"obj_aliases": ["Lyon"]}, "obj_aliases of uuid u is .*Lyon.*Paris.* at .*line 1"),
            ({"rel_uri": "P37"}, "rel_uri of uuid u is 'P37', but 'P36' at"),
            ({"sub_ent": "Spain"}, "sub_ent of uuid u is 'Spain'"),
            ({"is_manual": "no"}, "is_manual is 'no'; wanted true or false"),
            ({"uuid": None}, "uuid is null"),
        ],
    )
    def test_bad_rows(self, tmp_path, change, message):
        rows = [TEMPLATE_ROW, TEMPLATE_ROW | {"template": "[Y] is in [X]."} | change]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        with pytest.raises(UsageError, match=f"line 2: .*{message}"):
            load_dataset("myriadlama", data_dir=path)
        data = load_dataset("myriadlama", data_dir=path, skip_bad=True)
        assert [item.paraphrases for item in data.items] == [("France has [MASK].",)]
        assert len(data.skipped) == 1

    def test_templates_count_once(self, tmp_path):
        path = write_jsonl(tmp_path / "rows.jsonl", [TEMPLATE_ROW, TEMPLATE_ROW])
        assert load_dataset("myriadlama", data_dir=path).items[0].is_manual == (True,)


class TestGraphquestions:
    def test_groups_are_items(self, shared_data):
        folder = shared_data / "graphquestions"
        groups = read_jsonl(folder / "groups.jsonl")
        data = load_dataset("graphquestions", data_dir=folder)
        assert len(data.items) == len(groups) == 113
        for item, group in zip(data.items, groups, strict=True):
            texts = tuple(group["sentence_paraphrases"])
            assert item == Item(str(group["group_id"]), texts[0], texts, tuple(group["answers"]))
        five = load_dataset("graphquestions", data_dir=folder, min_paraphrases=5)
        assert len(five.items) == sum(len(group["sentence_paraphrases"]) >= 5 for group in groups)
        assert five.notes == ("40 items are left out, with fewer than 5 paraphrases",)


def test_the_example_questions_are_whole():
    data = load_dataset(str(ROOT / "examples" / "questions.jsonl"), min_paraphrases=5)
    assert len(data.items) >= 40
    assert len({item.question for item in data.items}) == len(data.items)
    for item in data.items:
        assert len(item.paraphrases) == len(set(item.paraphrases)) == 5
        assert item.paraphrases[0] == item.question
        assert item.relation is not None
        for text in item.paraphrases:
            assert text == text.strip()
            assert text[0].isupper()
            assert text[-1] in "?."
            words = re.findall(r"\w+", text)
            assert not any(re.search(rf"\b{re.escape(a)}\b", text) for a in item.answers), text
            assert 3 <= len(words) <= 20
    assert min(Counter(item.relation for item in data.items).values()) >= 2


class TestKinds:
    """Manual and automatic paraphrases, which the choice mixed:M+A draws from."""

    def load(self, tmp_path, **options):
        rows = [
            {
                **TEMPLATE_ROW,
                "uuid": f"u{n}",
                "template": f"[X] {place} [Y]",
                "is_manual": is_manual,
            }
            for n, kinds in enumerate(((True, True, False), (True, True), (False, True, False)))
            for place, is_manual in enumerate(kinds)
        ]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        return load_dataset("myriadlama", data_dir=tmp_path, **options)

    @pytest.mark.parametrize(
        ("kinds", "ids"),
        [
            ((0, 0), "u0 u1 u2"),
            ((2, 0), "u0 u1"),
            ((1, 1), "u0 u2"),
            ((2, 1), "u0"),
            ((0, 2), "u2"),
        ],
    )
    def test_items_with_too_few_of_a_kind_are_left_out(self, tmp_path, kinds, ids):
        data = self.load(tmp_path, min_kinds=kinds)
        assert [item.id for item in data.items] == ids.split()
        left_out = 3 - len(data.items)
        assert len(data.notes) == (left_out > 0)
        assert all(note.startswith(f"{left_out} items are left out, with") for note in data.notes)

    def test_none_left_is_an_error(self, tmp_path):
        with pytest.raises(UsageError, match="no item to evaluate: 3 items are left out"):
            self.load(tmp_path, min_kinds=(3, 3))

    def test_sets_that_do_not_tell_kinds(self, tmp_path):
        path = write_jsonl(tmp_path / "set.jsonl", [ROW])
        with pytest.raises(UsageError, match=r"set\.jsonl does not tell manual from automatic"):
            load_dataset(str(path), min_kinds=(1, 0))

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "rows.txt").write_text("")
        with pytest.raises(UsageError, match=r"rows\.txt: wanted a file that ends in \.jsonl"):
            load_dataset("myriadlama", data_dir=tmp_path / "rows.txt")
