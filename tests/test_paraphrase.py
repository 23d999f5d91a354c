"""`python -m minifuse.paraphrase`: quality control, draws, files that are continued, errors."""

import json
import os
import string
import sys
from pathlib import Path

import pytest
import torch
from json_lines import assert_one_error, read_lines, write_lines
from killing import kill_at_random, size_of
from tiny_files import make_model, make_tokenizer, tokenizers, write_hub_folder

import minifuse
from minifuse.errors import UsageError
from minifuse.evaluation.batches import derive_seed
from minifuse.evaluation.datasets import load_dataset
from minifuse.evaluation.paraphrasing import (
    EXEMPLARS_FILE,
    REASONS,
    ParaphrasedQuestion,
    ParaphraseOptions,
    Question,
    Tally,
    judge,
    load_exemplars,
    tidy,
)
from minifuse.normalize import normalize_answer
from minifuse.paraphrase import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
# A random model's texts share no word with a question, so these have short ones alone. Few of the
# texts end in a question mark; the last two questions want one.
QUESTIONS = [f"who is no {n} of us" + "?" * (n > 3) for n in range(6)]
EXEMPLARS = """
instruction = "Ask again.\\n"
question = "Q: {question}\\n"
suffix = "P:"
[[sets]]
pairs = [["Who is it?", "Which one is it?"]]
[[sets]]
name = "second"
pairs = [["Where is it?", "In which place is it?"], ["What is it?", "Which thing is it?"]]
"""


def write_letters_folder(folder: Path) -> Path:
    """A random model whose texts are letters, spaces and question marks, and come to an end.

    A plain one writes bytes that are no characters, without end. Here every embedding is long in
    one direction, which the norm keeps, so that the head's column there is a bias.
    """
    model = make_model("llama", max_position_embeddings=2048)
    tokens = make_tokenizer(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))["tokens"]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10
        bias = model.lm_head.weight[:, 0]
        bias[:] = -5
        bias[[tokens.index(letter) for letter in string.ascii_lowercase]] = 0
        bias[[tokens.index(token) for token in ("\u0120", "?", "\u010a")]] = 0.25
    return write_hub_folder(folder, model)


@pytest.fixture(scope="module")
def letters_folder(tmp_path_factory) -> Path:
    return write_letters_folder(tmp_path_factory.mktemp("letters") / "model")


@pytest.fixture
def questions(tmp_path) -> Path:
    lines = [{"id": f"q{number}", "question": text} for number, text in enumerate(QUESTIONS)]
    return write_lines(tmp_path / "in.jsonl", lines)


@pytest.fixture
def exemplars(tmp_path) -> Path:
    path = tmp_path / "exemplars.toml"
    path.write_text(EXEMPLARS, encoding="utf-8")
    return path


SHORT = ("--count", "2", "--tries", "4", "--max-new-tokens", "8", "--temperature", "1")
SHORT = (*SHORT, "--top-p", "1", "--batch-size", "3")


@pytest.fixture
def paraphrase(letters_folder, questions, exemplars, capsys):
    """Run the command; returns (exit status, output, error output)."""
    own = ["--model", str(letters_folder), "--no-compile", "--exemplars", str(exemplars)]

    def run(*args: str) -> tuple[int, str, str]:
        given = [] if "--dataset" in args or "--input" in args else ["--input", str(questions)]
        status = main([*own, *given, *SHORT, *args])
        return status, *capsys.readouterr()

    return run


# Quality control

QUESTION = "What is the capital of France?"  # six words: at most 18 in a paraphrase
JUDGED = [
    ("Which city is the capital of France?", "stop", None),
    ("which CITY is France's capital ?", "stop", None),
    ("Whose capital is it\uff1f", "stop", None),
    ("Which city is the capital of France?", "length", "unfinished"),
    ("", "length", "unfinished"),
    ("", "stop", "empty"),
    ("Which c\ufffdty?", "stop", "garbled"),
    ("Which c\x07ty?", "stop", "garbled"),
    ("Which c\ue000ty?", "stop", "garbled"),
    ("???", "stop", "no_words"),
    ("1789?", "stop", "no_words"),
    ("The a?", "stop", "no_words"),
    (" ".join(["capital"] * 18) + "?", "stop", None),
    (" ".join(["capital"] * 19) + "?", "stop", "overlong"),
    ("The capital of France is Paris.", "stop", "no_question"),
    ("Where do the French govern from?", "stop", "unrelated"),
    ("What is its capitol?", "stop", None),
    ("what is the capital of France?", "stop", "copy"),
    ("What is a capital of... France?", "stop", "copy"),
    ("France's capital?", "stop", "copy"),
    ("Name France's capital?", "stop", "duplicate"),
]


@pytest.mark.parametrize(("text", "finish_reason", "expected"), JUDGED)
def test_quality_control(text, finish_reason, expected):
    copies = {normalize_answer(QUESTION), normalize_answer("France's capital?")}
    kept = {normalize_answer("name Frances capital")}
    assert judge(text, finish_reason, QUESTION, copies, kept) == expected


def test_every_reason_is_in_the_table():
    assert {expected for *_, expected in JUDGED} == {None, *REASONS}


def test_a_short_question_may_get_ten_words_more():
    for count, expected in ((11, None), (12, "overlong")):
        text = " ".join(["why"] * count) + "?"
        assert judge(text, "stop", "Who?", set(), set()) == expected


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        ("What money do people use in Japan?", "Which currency is used in Japan?", None),
        ("What money do people use in Japan?", "Which currency is used in Peru?", "unrelated"),
        ("Who is he, and why?", "Where do pandas live?", None),  # no longer words
        ("\u4e0a\u6d77\u5728\u54ea\u91cc\uff1f", "\u4e0a\u6d77\u5728\u54ea\uff1f", None),
    ],
)
def test_a_third_of_the_longer_words_is_said_again(question, text, expected):
    assert judge(text, "stop", question, set(), set()) == expected


def test_a_question_without_a_mark_needs_none():
    text = "The seat of France is [MASK]."
    assert judge(text, "stop", "The capital of France is [MASK].", set(), set()) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Who\u2028is\tit? \n", "Who is it?"),
        ('"Who is it?"', "Who is it?"),
        ("\u201cWho is it?\u201d", "Who is it?"),
        ('"Who" wrote "It"', '"Who" wrote "It"'),
        ('"', '"'),
        ('""', ""),
    ],
)
def test_texts_are_tidied(text, expected):
    assert tidy(text) == expected


def test_every_draw_is_kept_or_counted():
    asked = ParaphrasedQuestion(Question("a", "Who is it?", ("Capital of France?",)), 2)
    drawn = ["Who?", "who", "WHO?", "capital of France?", "Where is it?", "Never read?"]
    for text in drawn:
        asked.add(text, "stop")
    line = asked.to_json()
    assert line["paraphrases"] == ["Who?", "Where is it?"]
    assert line["rejected"] == {"no_question": 1, "copy": 1, "duplicate": 1}
    assert line["draws"] == len(drawn)
    tally = Tally(3)
    tally.add(line)
    tally.add({**line, "paraphrases": ["a", "b", "c"], "draws": 6, "rejected": {"copy": 2}})
    assert tally.describe() == (
        "2 questions, 5 paraphrases kept of 12 drawn; rejected: 0 unfinished, 0 empty, 0 garbled, "
        "0 no_words, 0 overlong, 1 no_question, 0 unrelated, 3 copy, 1 duplicate; 2 not needed; "
        "1 questions with fewer than 3"
    )


# Exemplars


def test_the_projects_own_exemplars_pass_their_own_control():
    exemplars = load_exemplars()
    assert len(exemplars.sets) > 1
    seen = set()
    for pairs in exemplars.sets:
        for question, text in pairs:
            assert judge(text, "stop", question, {normalize_answer(question)}, seen) is None
            seen |= {normalize_answer(question), normalize_answer(text)}
    assert len(seen) == 2 * sum(map(len, exemplars.sets))


def test_a_prompt_shows_the_pairs_of_one_set(exemplars):
    loaded = load_exemplars(exemplars)
    assert loaded.prefix(1) == (
        "Ask again.\nQ: Where is it?\nP: In which place is it?\n\n"
        "Q: What is it?\nP: Which thing is it?\n\n"
    )
    assert loaded.segment(" {question}\nor\u2028who? ") == "Q: {question} or who?\n"


BAD_EXEMPLARS = [
    ("x = ", "is not TOML"),
    ("", "holds nothing; wanted instruction, question, sets, suffix"),
    (EXEMPLARS + "[more]\n", "more"),
    (EXEMPLARS.replace('"Ask again.\\n"', "3"), "instruction is 3"),
    (EXEMPLARS.replace("{question}", "{q}"), "one {question} in it"),
    (EXEMPLARS.replace('"P:"', '" "'), "suffix is ' '"),
    (EXEMPLARS.split("[[sets]]")[0] + "sets = []\n", "sets is []"),
    (EXEMPLARS.split("[[sets]]")[0] + "sets = [3]\n", "set 1: pairs is None"),
    (EXEMPLARS.replace("name", "nome"), "set 2 holds nome"),
    (EXEMPLARS.replace('["What is it?", "Which thing is it?"]', '["What?"]'), "set 2, pair 2"),
    (EXEMPLARS.replace("Which thing is it?", " "), "set 2, pair 2"),
    (EXEMPLARS.replace("Which thing", "Which\\nthing"), "spans lines"),
]


@pytest.mark.parametrize(("text", "message"), BAD_EXEMPLARS)
def test_bad_exemplars_are_named(text, message, paraphrase, exemplars, tmp_path):
    exemplars.write_text(text, encoding="utf-8")
    output = tmp_path / "out.jsonl"
    status, _, error = paraphrase("--output", str(output))
    assert status == 2
    assert error.startswith("error: ")
    assert str(exemplars) in error
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


# Usage


def test_defaults_are_those_of_the_options():
    args = build_parser().parse_args(["--input", "x", "--output", "y"])
    defaults = ParaphraseOptions()
    for name in ("count", "temperature", "top_p", "max_new_tokens", "seed"):
        assert getattr(args, name) == getattr(defaults, name)
    assert args.compile is True
    assert EXEMPLARS_FILE.is_file()


BAD_USAGE = [
    (["--output", "o"], "one of the arguments --dataset --input is required"),
    (["--input", "x"], "required: --output"),
    (["--input", "x", "--dataset", "y", "--output", "o"], "not allowed with"),
    (["--input", "/nowhere/x", "--output", "o"], "--input cannot read /nowhere/x"),
    (["--input", "x", "--data-dir", "y", "--output", "o"], "--data-dir, --fields and --skip-bad"),
    (["--dataset", "/nowhere/x.jsonl", "--output", "o"], "/nowhere/x.jsonl"),
    (["--input", "x", "--output", "o", "--count", "0"], "count is 0"),
    (["--input", "x", "--output", "o", "--tries", "4"], "tries is 4 for a count of 5"),
    (["--input", "x", "--output", "o", "--limit", "0"], "--limit is 0"),
    (["--input", "x", "--output", "o", "--batch-size", "0"], "--batch-size is 0"),
    (["--input", "x", "--output", "o", "--temperature", "0"], "temperature is 0"),
    (["--input", "x", "--output", "o", "--temperature", "nan"], "temperature is nan"),
    (["--input", "x", "--output", "o", "--top-p", "0"], "top_p is 0"),
    (["--input", "x", "--output", "o", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["--input", "x", "--output", "o", "--seed", "-1"], "seed is -1"),
    (["--input", "x", "--output", "o", "--exemplars", "/nowhere/e"], "/nowhere/e cannot be read"),
]


@pytest.mark.parametrize(("args", "message"), BAD_USAGE)
def test_bad_usage_is_one_line_and_status_2(args, message, capsys):
    assert main(args) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert_one_error(error, message)


BAD_LINES = [
    ("{", "not JSON"),
    ("[]", "list; wanted a JSON object"),
    ('{"question": "Who?"}', "id is None"),
    ('{"id": true, "question": "Who?"}', "id is True"),
    ('{"id": "a"}', "question is None"),
    ('{"id": "a", "question": " "}', "question is ' '"),
    ('{"id": "a", "question": ["Who?"]}', "question is ['Who?']"),
    ('{"id": "a", "question": "\\ud800"}', "question holds the lone surrogate"),
    ('{"id": "\\ud800", "question": "Who?"}', "id holds the lone surrogate"),
    ('{"id": 1, "question": "Who?"}', "id '1' stands in an earlier line"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(line, message, tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", [{"id": "1", "question": "Fine?"}, "\n", line])
    assert main(["--input", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}, line 3: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_file_without_questions_is_an_error(paraphrase, questions, tmp_path):
    write_lines(questions, ["\n"])
    status, _, error = paraphrase("--output", str(tmp_path / "out.jsonl"))
    assert status == 2
    assert "holds no question" in error


@pytest.mark.parametrize("place", ["missing/out.jsonl", "."])
def test_an_output_that_cannot_be_written_is_status_1(place, paraphrase, tmp_path):
    status, _, error = paraphrase("--output", str(tmp_path / place))
    assert status == 1
    assert f"error: {tmp_path / place} cannot be written: " in error


def test_a_failed_start_leaves_no_files(paraphrase, questions, exemplars, tmp_path):
    output = tmp_path / "out.jsonl"
    status, _, error = paraphrase("--output", str(output), "--model", str(tmp_path / "nowhere"))
    assert status == 1
    assert "nowhere" in error
    assert sorted(tmp_path.iterdir()) == sorted([questions, exemplars])


# Draws


def slow_paraphrases(fuser, exemplars: Path, question: Question, seed: int) -> dict:
    """One request at a time, as the command's documentation says it."""
    loaded = load_exemplars(exemplars)
    asked = ParaphrasedQuestion(question, 2)
    for round in range(4):  # two sets for a count of two: one text a round
        if asked.missing:
            result = fuser.generate(
                prefix=loaded.prefix(round % 2),
                segments=[f"Q: {question.text}\n"],
                suffix="P:",
                methods=["per_prompt"],
                temperature=1.0,
                stop=["\n"],
                max_new_tokens=8,
                seed=derive_seed(seed, round),
            )["per_prompt"][0]
            asked.add(result.text, result.finish_reason)
    return asked.to_json()


def test_a_batch_draws_what_each_question_draws_alone(
    paraphrase, letters_folder, exemplars, tmp_path
):
    output = tmp_path / "out.jsonl"
    status, printed, error = paraphrase("--output", str(output), "--seed", "0")
    assert (status, printed) == (0, "")
    fuser = minifuse.load(letters_folder, compile=False)
    lines = sorted(read_lines(output), key=lambda line: line["id"])
    assert lines == [
        slow_paraphrases(fuser, exemplars, Question(f"q{number}", text), 0)
        for number, text in enumerate(QUESTIONS)
    ]
    # Both ways of ending are among them, and the last word counts what is in the file.
    assert {len(line["paraphrases"]) == 2 for line in lines} == {True, False}
    assert max(line["draws"] for line in lines) == 4
    tally = Tally(2)
    for line in lines:
        tally.add(line)
    assert error.split("\n")[-2] == tally.describe()
    assert tally.rejected.total() > 0
    assert "6/6" in error
    assert tally.describe_progress() in error


def test_a_seed_repeats_a_run_and_another_does_not(paraphrase, tmp_path):
    contents = []
    for run, (seed, size) in enumerate([("1", "2"), ("1", "4"), ("2", "2")]):
        output = tmp_path / f"out{run}.jsonl"
        args = ("--output", str(output), "--seed", seed, "--batch-size", size, "--limit", "4")
        assert paraphrase(*args)[0] == 0
        contents.append(sorted(output.read_text(encoding="utf-8").split("\n")))
    assert contents[0] == contents[1] != contents[2]


def test_a_data_set_is_paraphrased_and_read_back(paraphrase, tmp_path):
    rows = [
        {"qid": "a", "text": QUESTIONS[0], "paraphrases": ["Known?"], "answers": ["x"]},
        {"qid": "b", "text": QUESTIONS[1], "paraphrases": ["Known?"], "answers": ["y"]},
    ]
    data = write_lines(tmp_path / "data.jsonl", rows)
    output = tmp_path / "out.jsonl"
    args = ("--dataset", str(data), "--fields", "id=qid,question=text", "--output", str(output))
    assert paraphrase(*args, "--tries", "20")[0] == 0
    lines = {line["id"]: line for line in read_lines(output)}
    assert lines.keys() == {"a", "b"}
    assert all(line["paraphrases"] for line in lines.values())
    fields = {"id": "qid", "question": "text"}
    dataset = load_dataset(str(data), fields=fields, paraphrase_file=output, min_paraphrases=2)
    for item in dataset.items:
        assert item.paraphrases == (item.question, *lines[item.id]["paraphrases"])


def test_a_question_without_room_is_named(paraphrase, questions, tmp_path):
    lines = [{"id": "fine", "question": "Who?"}, {"id": "long", "question": "long " * 3000}]
    write_lines(questions, lines)
    status, _, error = paraphrase("--output", str(tmp_path / "out.jsonl"))
    assert status == 2
    assert "error: request 'long': " in error
    assert "positions" in error


# Files that are continued


def test_an_interrupted_file_is_completed_byte_for_byte(paraphrase, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--output", str(output))
    assert paraphrase(*args)[0] == 0
    whole = output.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    # A torn first line, a group that has begun, one byte from the end.
    for cut in (ends[0] - 3, ends[1], len(whole) - 1):
        output.write_bytes(whole[:cut])
        status, _, error = paraphrase(*args)
        assert status == 0
        assert output.read_bytes() == whole
        assert "6/6" in error
        assert error.split("\n")[-2].startswith("6 questions, ")
    status, _, error = paraphrase(*args)
    assert (status, output.read_bytes()) == (0, whole)
    assert "nothing to do: every question is in " in error


def test_a_limit_is_no_configuration(paraphrase, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    paraphrase("--output", str(whole))
    for limit in ("3", "9"):
        assert paraphrase("--output", str(output), "--limit", limit)[0] == 0
    assert output.read_bytes() == whole.read_bytes()


CHANGES = [
    (("--seed", "1"), "made with seed 0, and this call has 1"),
    (("--count", "3"), "made with count 2, and this call has 3"),
    (("--tries", "7"), "made with tries 4, and this call has 7"),
    (("--temperature", "0.5"), "made with temperature 1.0, and this call has 0.5"),
    (("--top-p", "0.5"), "made with top_p 1.0, and this call has 0.5"),
    (("--max-new-tokens", "9"), "made with max_new_tokens 8, and this call has 9"),
    (("--dtype", "float32"), "made with dtype 'auto', and this call has 'float32'"),
    (("--quantize", "int8"), "made with quantize None, and this call has 'int8'"),
    (("--model", "default"), "made with model "),
    (("--exemplars", str(EXEMPLARS_FILE)), "made with exemplars "),
]


def test_another_configuration_is_refused(paraphrase, questions, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--output", str(output))
    assert paraphrase(*args, "--limit", "2")[0] == 0
    before = output.read_bytes()

    def refused(message: str, *flags: str) -> None:
        status, _, error = paraphrase(*args, *flags)
        assert status == 2
        assert_one_error(error, message)
        assert output.read_bytes() == before

    for flags, message in CHANGES:
        refused(message, *flags)
    record_path = tmp_path / "out.jsonl.run.json"
    record = json.loads(record_path.read_text(encoding="utf-8"))
    changed = {**record, "source": {"source": "elsewhere"}}
    record_path.write_text(json.dumps(changed), encoding="utf-8")
    refused("made with source 'elsewhere'")
    record_path.unlink()
    refused("does not say which call made it")
    record_path.write_text(json.dumps(record), encoding="utf-8")
    lines = [{"id": f"q{number}", "question": f"{text}?"} for number, text in enumerate(QUESTIONS)]
    write_lines(questions, lines)
    refused("answers another request under id 'q0'")


@pytest.mark.parametrize(
    "line", ['{"id": "q0"}\n', '{"id": "other", "paraphrases": [], "draws": 1, "rejected": {}}\n']
)
def test_a_foreign_line_is_left_alone(line, paraphrase, tmp_path):
    output = tmp_path / "out.jsonl"
    assert paraphrase("--output", str(output), "--limit", "2")[0] == 0
    broken = line + output.read_text(encoding="utf-8")
    output.write_text(broken, encoding="utf-8")
    status, _, error = paraphrase("--output", str(output))
    assert status == 2
    assert "out.jsonl, line 1: not a result that this call would write" in error
    assert output.read_text(encoding="utf-8") == broken


# Processes


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_killed_runs_add_up_to_an_uninterrupted_one(paraphrase, letters_folder, tmp_path):
    lines = [{"id": number, "question": f"who is {number}"} for number in range(10)]
    path = write_lines(tmp_path / "many.jsonl", lines)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    args = ("--input", str(path), "--output")
    assert paraphrase(*args, str(whole))[0] == 0
    own = ("--model", str(letters_folder), "--no-compile", *SHORT)
    own = (*own, "--exemplars", str(tmp_path / "exemplars.toml"))
    command = [sys.executable, "-m", "minifuse.paraphrase", *args, str(output), *own]
    sizes = kill_at_random(command, output, size_of(whole), seed=5, kills=2)
    assert 0 < sizes[1] < size_of(whole)
    assert whole.read_bytes().startswith(output.read_bytes())
    assert paraphrase(*args, str(output))[0] == 0
    assert output.read_bytes() == whole.read_bytes()


def test_options_are_checked():
    with pytest.raises(UsageError, match="tries is 1 for a count of 2"):
        ParaphraseOptions(count=2, tries=1)
