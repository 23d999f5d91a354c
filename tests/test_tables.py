"""Records to tables: what is read, what is refused, three formats that give back what they got."""

import contextlib
import json
import math
import struct

import pandas
import pyarrow
import pyarrow.feather
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.tables import (
    ATTRIBUTION_COLUMNS,
    COLUMNS,
    TABLE_SUFFIXES,
    apply_rules,
    make_table,
    read_records,
    read_table,
    write_table,
)


def make_record(**changes: object) -> dict:
    return {
        "id": "q1",
        "n": 2,
        "draw": 1,
        "question": "What is the capital of France?",
        "relation": "P36",
        "paraphrases": ["What is the capital of France?", "France's capital?"],
        "paraphrase_indices": [0, 1],
        "answers": ["Paris", "City of Light"],
        "method": "fused",
        "paraphrase_index": None,
        "positions": "parallel",
        "text": " Paris.\nQ:",
        "prediction": "Paris.",
        "token_ids": [3, 4],
        "logprobs": [-0.25, -0.75],
        "finish_reason": "stop",
        "answer_logprobs": [-1.0, -7.5],
        "answer_logprob": -1.0,
        "weights": None,
        "weights_source": None,
        "prompt_tokens": 30,
        "num_streams": 1,
        "timings": {"prefill_ms": 1.5, "decode_ms": 2.25, "steps": 2},
    } | changes


USUAL = [name for name in COLUMNS if name not in ATTRIBUTION_COLUMNS]
ATTRIBUTION = {
    "attention": {"prefix": 0.25, "segments": [0.125, 0.5], "suffix": 0.125, "answer": 0.0},
    "without": [-0.5, None],
    "alone": [-2.0, -3.5],
}


def write_records(path, records, end="\n"):
    path.write_text("\n".join(json.dumps(record) for record in records) + end, encoding="utf-8")
    return path


def test_a_row_by_hand():
    table = make_table([make_record()], num_processes=1)
    assert list(table) == USUAL
    [row] = table.to_dict("records")
    assert pandas.isna(row.pop("paraphrase_index"))
    assert row == {
        "id": "q1",
        "n": 2,
        "draw": 1,
        "method": "fused",
        "relation": "P36",
        "question": "What is the capital of France?",
        "paraphrases": ["What is the capital of France?", "France's capital?"],
        "answers": ["Paris", "City of Light"],
        "prediction": "Paris.",
        "predict_lemma": ["paris"],
        "answer_lemmas": [["paris"], ["city", "of", "light"]],
        "positions": "parallel",
        "match_lemma": True,
        "match_lemma_both": True,
        "match_exact": True,
        "match_first_word": True,
        "f1": 1.0,
        "answer_logprob": -1.0,
        "confidence": math.exp(-0.5),
        "num_tokens": 2,
        "prompt_tokens": 30,
        "num_streams": 1,
        "prefill_ms": 1.5,
        "decode_ms": 2.25,
    }


def test_every_rule_has_its_own_column():
    predictions = ["In Paris", "city", "paris", "Paris France", "light city of", "Rome"]
    table = make_table([make_record(prediction=text) for text in predictions])
    assert list(table["match_lemma"]) == [True, False, True, True, False, False]
    assert list(table["match_lemma_both"]) == [True, True, True, True, False, False]
    assert list(table["match_exact"]) == [False, False, True, False, False, False]
    assert list(table["match_first_word"]) == [False, True, True, True, False, False]
    assert list(table["f1"]) == pytest.approx([2 / 3, 1 / 2, 1, 2 / 3, 1, 0])


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "", "token_ids": [], "logprobs": []},
        {"prediction": "", "token_ids": [5], "logprobs": [-0.1]},  # a newline, say
    ],
)
def test_an_empty_prediction_is_wrong_and_without_confidence(changes):
    [row] = make_table([make_record(answers=["", "..."], **changes)]).to_dict("records")
    rules = ("match_lemma", "match_lemma_both", "match_exact", "match_first_word", "f1")
    assert [row[rule] for rule in rules] == [False] * 4 + [0.0]
    assert row["confidence"] == 0.0


def test_rules_can_be_made_anew():
    table = make_table([make_record(), make_record(id="q2", prediction="Rome")])
    changed = table.assign(predict_lemma=[["x"], ["paris"]], f1=0.5)
    again = apply_rules(changed)
    assert list(again["match_lemma"]) == [False, True]
    assert list(again["f1"]) == [1.0, 0.0]
    assert list(again) == USUAL
    pandas.testing.assert_frame_equal(apply_rules(table), table)
    with pytest.raises(UsageError, match="no column answer_lemmas; the rules read it"):
        apply_rules(table.drop(columns="answer_lemmas"))


# ---- records.jsonl


def test_records_are_read_as_they_stand(tmp_path):
    records = [make_record(), make_record(id="q2", extra=[1]), make_record(method="origin")]
    records.append(make_record(draw=0))
    path = write_records(tmp_path / "records.jsonl", records)
    assert read_records(path) == records
    # The newline at the end may be what is missing.
    assert read_records(write_records(path, records, end="")) == records
    path.write_bytes(b"")
    assert read_records(path) == []


@pytest.mark.parametrize("cut", [1, 20, 200, 5000])
def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path, cut):
    records = [make_record(), make_record(id="q2", question="é" * 3000)]
    path = write_records(tmp_path / "records.jsonl", records[:1])
    whole = path.read_bytes()
    torn = json.dumps(records[1], ensure_ascii=False).encode()[:cut]
    path.write_bytes(whole + torn)
    with pytest.warns(UserWarning, match=r"records\.jsonl, line 2 is torn and left out"):
        assert read_records(path) == records[:1]
    # The same in the middle is damage.
    path.write_bytes(torn + b"\n" + whole)
    with pytest.raises(MinifuseError, match=r"records\.jsonl, line 1: not JSON"):
        read_records(path)
    path.write_bytes(whole + torn + b"\n")
    with pytest.raises(MinifuseError, match=r"records\.jsonl, line 2: not JSON"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: list; wanted a JSON object"),
        ({"id": 7}, "line 2: id is 7; wanted a string"),
        ({"n": 0}, "line 2: n is 0; wanted an integer of at least 1"),
        ({"draw": -1}, "line 2: draw is -1; wanted an integer of at least 0"),
        ({"n": True}, "line 2: n is True; wanted an integer"),
        ({"answers": "Paris"}, "line 2: answers is 'Paris'; wanted a list of strings"),
        ({"answers": ["Paris", 3]}, "wanted a list of strings"),
        ({"logprobs": [None]}, r"logprobs is \[None\]; wanted a list of numbers"),
        ({"answer_logprob": "x"}, "answer_logprob is 'x'; wanted a number or null"),
        ({"timings": {"prefill_ms": 1}}, "wanted an object with the numbers prefill_ms and"),
        ({"prediction": None}, "prediction is None; wanted a string"),
        ({"question": ["x" * 500]}, r"question is \['x{55}\.\.\.; wanted a string"),
        ({"prediction": "\ud83d"}, "line 2: half a surrogate pair; wanted Unicode text"),
        ({}, "repeats line 1: id 'q1', n 2, draw 1, method 'fused', paraphrase_index None"),
    ],
)
def test_damage_names_file_and_line(tmp_path, line, message):
    text = line if isinstance(line, str) else json.dumps(make_record(**line))
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(make_record())}\n{text}\n", encoding="utf-8")
    with pytest.raises(MinifuseError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["id", "draw", "answers", "timings"])
def test_a_missing_field_is_named(tmp_path, name):
    record = make_record()
    del record[name]
    path = write_records(tmp_path / "records.jsonl", [record])
    with pytest.raises(MinifuseError, match=f"line 1: no {name}; wanted"):
        read_records(path)


def test_no_records(tmp_path):
    with pytest.raises(UsageError, match=r"none\.jsonl cannot be read: No such file"):
        read_records(tmp_path / "none.jsonl")
    table = make_table([])
    assert len(table) == 0
    assert table.dtypes.equals(make_table([make_record()]).dtypes)


# ---- Formats

texts = st.one_of(
    st.sampled_from(
        [
            "",
            "NA",
            "nan",
            "None",
            "1",
            "1e5",
            "True",
            ' "',
            "a,b",
            "\r",
            "x\r\ny",
            "[]",
            "\x00",
            "é東",
        ]
    ),
    st.text(max_size=6),
)
numbers = st.floats(allow_nan=False, width=64)
RECORDS = st.builds(
    make_record,
    question=texts,
    relation=st.one_of(st.none(), texts.filter(bool)),
    positions=st.one_of(st.none(), texts.filter(bool)),
    method=texts,
    id=texts,
    paraphrases=st.lists(texts, max_size=3),
    answers=st.lists(texts, max_size=3),
    prediction=texts,
    answer_logprob=st.one_of(st.none(), numbers),
    paraphrase_index=st.one_of(st.none(), st.integers(0, 2**40)),
    timings=st.fixed_dictionaries({"prefill_ms": numbers, "decode_ms": numbers}),
)


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@given(records=st.lists(RECORDS, max_size=3))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_was_written(tmp_path, suffix, records):
    table = make_table(records, num_processes=1)
    path = tmp_path / f"results{suffix}"
    write_table(table, path)
    pandas.testing.assert_frame_equal(read_table(path), table, check_exact=True)
    for name in ("paraphrases", "predict_lemma", "answer_lemmas"):
        assert list(read_table(path)[name]) == list(table[name])  # lists, not arrays


def test_csv_is_what_others_can_read(tmp_path):
    write_table(make_table([make_record()]), tmp_path / "results.csv")
    [row] = pandas.read_csv(tmp_path / "results.csv").to_dict("records")
    assert row["prediction"] == "Paris."
    assert row["match_exact"]
    assert json.loads(row["answer_lemmas"]) == [["paris"], ["city", "of", "light"]]


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_columns_of_the_user_stay(tmp_path, suffix):
    table = make_table([make_record()]).assign(note=["mine"])[["note", "answers", "prediction"]]
    write_table(table, tmp_path / f"x{suffix}")
    read = read_table(tmp_path / f"x{suffix}")
    assert list(read) == ["answers", "prediction", "note"]
    assert read.to_dict("records") == table.to_dict("records")


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_whole_or_not_at_all(tmp_path, suffix):
    table = make_table([make_record()])
    path = tmp_path / f"results{suffix}"
    write_table(table, path)
    before = path.read_bytes()

    class Unwritable:
        def __str__(self) -> str:
            raise ValueError("no text for this")

    with pytest.raises(MinifuseError, match="cannot be written: "):
        write_table(table.assign(extra=[Unwritable()]), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(MinifuseError, match="cannot be written: Not a directory"):
        write_table(table, path / f"inner{suffix}")
    with pytest.raises(MinifuseError, match="cannot be written: No such file"):
        write_table(table, tmp_path / "none" / path.name)


def test_a_table_is_replaced_not_written_over(tmp_path):
    """A second name of the old file keeps it whole, as a crash in the middle would."""
    path, old = tmp_path / "results.parquet", tmp_path / "old.parquet"
    write_table(make_table([make_record()]), path)
    old.hardlink_to(path)
    write_table(make_table([make_record(id="q2")]), path)
    assert list(read_table(old)["id"]) == ["q1"]
    assert list(read_table(path)["id"]) == ["q2"]


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_what_is_no_table(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_table(path)
    write_table(make_table([make_record()]), path)
    content = path.read_bytes()
    for damaged in (b"", b"\xff\xfe\x00 no table", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError) as caught:
            read_table(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"ends in '.xls'; wanted one of .parquet, .feather"):
        read_table(tmp_path / "results.xls")


@pytest.mark.parametrize(
    ("column", "value"),
    [("n", "two"), ("f1", "x"), ("match_exact", "yes"), ("answers", "Paris"), ("n", "")],
)
def test_a_bad_cell_names_its_column(tmp_path, column, value):
    path = tmp_path / "results.csv"
    write_table(make_table([make_record()]), path)
    cells = pandas.read_csv(path, dtype=str, keep_default_na=False)
    cells.assign(**{column: value}).to_csv(path, index=False)
    with pytest.raises(UsageError, match=f"column {column} holds what is no"):
        read_table(path)


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".csv"])
def test_attribution_is_kept(tmp_path, suffix):
    records = [make_record(attribution=ATTRIBUTION), make_record(id="q2")]
    path = tmp_path / f"table{suffix}"
    write_table(make_table(records, num_processes=1), path)
    table = read_table(path)
    assert list(table) == list(COLUMNS)
    assert list(table["attention"]) == [[0.25, 0.125, 0.5, 0.125, 0.0], None]
    assert list(table["without"]) == [[-0.5, None], None]
    assert list(table["alone"]) == [[-2.0, -3.5], None]


def test_a_damaged_attribution_is_named(tmp_path):
    damaged = ATTRIBUTION | {"without": ["much"]}
    path = write_records(tmp_path / "records.jsonl", [make_record(attribution=damaged)])
    with pytest.raises(MinifuseError, match="line 1: attribution is"):
        read_records(path)


def test_offsets_that_lead_out_of_memory_are_refused(tmp_path):
    """Arrow believes them unless it is asked to look; the process died."""
    path = tmp_path / "a.feather"
    table = pyarrow.table({"id": ["x" * 77_777, "y"]})
    pyarrow.feather.write_feather(table, path, compression="uncompressed")
    data = path.read_bytes()
    before, after = (struct.pack("<3i", 0, end, 77_778) for end in (77_777, -(2**30)))
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    with pytest.raises(UsageError, match=r"is not a table that this program wrote: "):
        read_table(path)


def test_a_type_that_arrow_does_not_know_is_refused(tmp_path):
    """Integers of 8 bits, made ones of 4."""
    path = tmp_path / "a.feather"
    table = pyarrow.table({"n": pyarrow.array([1], pyarrow.int64())})
    pyarrow.feather.write_feather(table, path, compression="uncompressed")
    data = path.read_bytes()
    # The width stands in the schema, which the file holds twice.
    for at in range(len(data) - 4):
        if data[at : at + 4] == b"\x40\0\0\0":
            damaged = tmp_path / f"{at}.feather"
            damaged.write_bytes(data[:at] + b"\x04" + data[at + 1 :])
            with contextlib.suppress(UsageError):
                read_table(damaged)
