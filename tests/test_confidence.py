"""`python -m minifuse.confidence`: agreement, samples, files that are continued, weights."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
from json_lines import assert_one_error, read_lines, write_lines
from killing import kill_at_random, size_of

import minifuse
from minifuse import evaluate
from minifuse.confidence import build_parser, main
from minifuse.errors import UsageError
from minifuse.evaluation.batches import derive_seed
from minifuse.evaluation.confidences import (
    ConfidenceOptions,
    ConfidencePrompt,
    Tally,
    _samples_at_once,
    agreement,
    measure_confidences,
    read_weights,
    weights_of,
)
from minifuse.executor import DECODE_BLOCKS

TEMPLATE = """
instruction = "Answer.\\n"
shot = "Q: {question}\\nA: {answer}\\n"
segment = "Q: {question}\\n"
suffix = "A:"
stop = ["\\n", "e"]
"""


def make_rows(count: int) -> list[dict]:
    return [
        {
            "id": f"i{n}",
            "question": f"Who is {n}?",
            "paraphrases": [f"Who is {n}?", f"Which one is {n}?", f"Number {n} is who?"][
                : 1 + n % 3
            ],
            "answers": [f"name {n}"],
        }
        for n in range(count)
    ]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_lines(tmp_path / "data.jsonl", make_rows(7))


@pytest.fixture
def template(tmp_path) -> Path:
    path = tmp_path / "template.toml"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


OWN = ("--shots", "2", "--samples", "3", "--max-new-tokens", "4", "--batch-size", "2")
OWN = (*OWN, "--temperature", "0.2", "--paraphrases", "1")


@pytest.fixture
def confidence(tiny_llama_folder, data, template, capsys):
    """Run the command; returns (exit status, output, error output)."""
    own = ["--model", str(tiny_llama_folder), "--no-compile", "--template", str(template), *OWN]

    def run(*args: str) -> tuple[int, str, str]:
        given = [] if "--dataset" in args else ["--dataset", str(data)]
        status = main([*own, *given, *args])
        return status, *capsys.readouterr()

    return run


# Agreement


@pytest.mark.parametrize(
    ("answer", "samples", "expected"),
    [
        ("Paris", ["Paris", "paris.", "The PARIS!", "London"], 0.75),
        ("Paris", ["not Paris", "Paris France"], 0.0),
        ("Paris", ["", " "], 0.0),
        ("", ["", ""], 0.0),
        ("The.", ["the", "a", ""], 0.0),
        ("\uff11\uff12", ["12"], 1.0),
    ],
)
def test_agreement(answer, samples, expected):
    assert agreement(answer, samples) == expected


# Measuring


def slow_confidence(fuser, prompt: ConfidencePrompt, options: ConfidenceOptions) -> dict:
    """One item, as the documentation says it: all samples of all paraphrases in one request."""
    shared = {"prefix": prompt.prefix, "suffix": prompt.suffix, "methods": ["per_prompt"]}
    shared |= {"stop": list(options.stop), "max_new_tokens": options.max_new_tokens}
    greedy = [
        fuser.generate(segments=[segment], **shared)["per_prompt"][0] for segment in prompt.segments
    ]
    drawn = fuser.generate(
        segments=list(prompt.segments) * options.samples,
        temperature=options.temperature,
        seed=derive_seed(options.seed, 0),
        **shared,
    )["per_prompt"]
    count = len(prompt.segments)
    samples = [[result.text.strip() for result in drawn[i::count]] for i in range(count)]
    answers = [result.text.strip() for result in greedy]
    return {
        "id": prompt.id,
        "confidences": [agreement(*pair) for pair in zip(answers, samples, strict=True)],
        "answers": answers,
        "samples": samples,
    }


def test_a_batch_measures_what_each_item_has_alone(confidence, tiny_llama_folder, data, tmp_path):
    output = tmp_path / "out.jsonl"
    status, printed, error = confidence("--output", str(output), "--seed", "4")
    assert (status, printed) == (0, "")
    lines = read_lines(output)
    record = json.loads((tmp_path / "out.jsonl.run.json").read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in make_rows(7)}
    shots = [rows[id] for id in rows.keys() - {line["id"] for line in lines}]
    assert len(shots) == 2
    assert sorted(line["id"] for line in lines) == sorted(
        json.loads(id) for id in record["requests"]
    )
    asked = [f"Q: {shot['paraphrases'][0]}\nA: {shot['answers'][0]}\n" for shot in shots]
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    options = ConfidenceOptions(
        samples=3, temperature=0.2, max_new_tokens=4, seed=4, stop=("\n", "e")
    )

    def expected(order: list[str]) -> list[dict]:
        prefix = "Answer.\n" + "".join(order)
        return [
            slow_confidence(
                fuser,
                ConfidencePrompt(
                    line["id"],
                    prefix,
                    tuple(f"Q: {text}\n" for text in rows[line["id"]]["paraphrases"]),
                    "A:",
                ),
                options,
            )
            for line in lines
        ]

    # The order of the two shots is the prompts' own business.
    assert lines in (expected(asked), expected(asked[::-1]))
    tally = Tally()
    for line in lines:
        tally.add(line)
    assert error.split("\n")[-2] == tally.describe()
    assert 0 < tally.mean < 1  # neither all nor nothing agrees, or this would show little
    assert "5/5" in error


def test_many_samples_go_in_several_calls(tiny_llama_folder):
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    segments = tuple(f"Q: {number}\n" for number in range(30))
    prompts = [
        ConfidencePrompt("wide", "", segments, "A:"),
        ConfidencePrompt("one", "", ("Q",), "A"),
    ]
    options = ConfidenceOptions(samples=5, max_new_tokens=2, temperature=1.5)
    wide, one = measure_confidences(fuser, prompts, options)
    assert [len(wide.confidences), len(wide.answers), len(wide.samples)] == [30, 30, 30]
    assert {len(texts) for texts in (*wide.samples, *one.samples)} == {5}
    # The calls draw apart: the same draws in each would repeat after two samples.
    assert any(texts[:2] != texts[2:4] for texts in wide.samples)


@pytest.mark.parametrize(
    ("samples", "num_segments", "calls"),
    [(10, 1, 1), (10, 5, 2), (10, 8, 3), (10, 20, 10), (10, 99, 10), (7, 16, 4), (1, 99, 1)],
)
def test_samples_are_spread_evenly_over_calls_of_one_decode_graph(samples, num_segments, calls):
    at_once = _samples_at_once(samples, num_segments)
    assert -(-samples // at_once) == calls
    assert at_once * num_segments <= max(max(DECODE_BLOCKS), num_segments)


def test_a_short_last_group_takes_no_size_of_its_own(tiny_llama_folder, monkeypatch):
    """Every size is a set of graphs to compile; the answers are what each item has alone."""
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    texts = [tuple(f"{n} Q{i}\n" for i in range(5)) for n in range(11)]
    prompts = [ConfidencePrompt(str(n), "Do.\n", texts[n], "A:") for n in range(11)]
    options = ConfidenceOptions(samples=10, max_new_tokens=3)
    sizes = set()
    make_pool = fuser.executor.pool
    monkeypatch.setattr(fuser.executor, "pool", lambda size: sizes.add(size) or make_pool(size))
    list(measure_confidences(fuser, prompts[:8], options, batch_size=8))
    full = set(sizes)
    found = list(measure_confidences(fuser, prompts, options, batch_size=8))
    assert sizes == full
    monkeypatch.undo()
    [alone] = measure_confidences(fuser, prompts[10:], options)
    assert found[10] == alone


def test_items_are_those_of_an_evaluation(confidence, tiny_llama_folder, data, template, tmp_path):
    """Items with too few paraphrases count neither as items nor as shots, as in evaluation."""
    rows = [
        {**row, "paraphrases": [f"{row['question']} {n}" for n in range(1 + (number > 3))]}
        for number, row in enumerate(make_rows(12))
    ]
    write_lines(data, rows)
    output, run = tmp_path / "out.jsonl", tmp_path / "run"
    shared = ("--paraphrases", "2", "--skip-bad", "--shots", "2", "--seed", "3")
    status, _, error = confidence("--output", str(output), *shared)
    assert status == 0
    assert "bad rows that are left out: 4, the first " in error
    own = ("--dataset", str(data), "--model", str(tiny_llama_folder), "--no-compile")
    own = (*own, "--template", str(template), "--output", str(run), "--max-new-tokens", "2")
    weights = ("--methods", "weighted_max", "--weights-from", str(output))
    with warnings.catch_warnings(record=True):
        assert evaluate.main([*own, *shared, *weights]) == 0
    records = read_lines(run / "records.jsonl")
    assert sorted(record["id"] for record in records) == sorted(
        line["id"] for line in read_lines(output)
    )
    assert len(records) == 6


def test_a_seed_repeats_a_run_and_another_does_not(tiny_llama_folder):
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    prompts = [ConfidencePrompt(str(n), "", (f"Q: {n}\n", f"Say {n}\n"), "A:") for n in range(3)]

    def measure(seed: int, batch_size: int) -> list[dict]:
        options = ConfidenceOptions(samples=4, max_new_tokens=3, temperature=1.0, seed=seed)
        found = measure_confidences(fuser, prompts, options, batch_size=batch_size)
        return [item.to_json() for item in found]

    assert measure(1, 2) == measure(1, 3) != measure(2, 2)


# Usage


def test_defaults_are_those_of_the_options():
    args = build_parser().parse_args(["--dataset", "x", "--output", "y"])
    defaults = ConfidenceOptions()
    for name in ("samples", "temperature", "top_p", "max_new_tokens", "seed"):
        assert getattr(args, name) == getattr(defaults, name)


BAD_USAGE = [
    (["--output", "o"], "required: --dataset"),
    (["--dataset", "d"], "required: --output"),
    (["--dataset", "/nowhere/d.jsonl", "--output", "o"], "/nowhere/d.jsonl"),
    (["--dataset", "d", "--output", "o", "--samples", "0"], "samples is 0"),
    (["--dataset", "d", "--output", "o", "--temperature", "0"], "temperature is 0"),
    (["--dataset", "d", "--output", "o", "--top-p", "2"], "top_p is 2"),
    (["--dataset", "d", "--output", "o", "--shots", "-1"], "--shots is -1"),
    (["--dataset", "d", "--output", "o", "--limit", "0"], "--limit is 0"),
    (["--dataset", "d", "--output", "o", "--batch-size", "0"], "--batch-size is 0"),
    (["--dataset", "d", "--output", "o", "--template", "/nowhere/t"], "/nowhere/t"),
    (["--dataset", "d", "--output", "o", "--seed", "x"], "invalid int value"),
    (["--dataset", "d", "--output", "o", "--paraphrases", "0"], "0 paraphrases are asked for"),
    (["--dataset", "d", "--output", "o", "--choice", "best"], "the choice of paraphrases is"),
]


@pytest.mark.parametrize(("args", "message"), BAD_USAGE)
def test_bad_usage_is_one_line_and_status_2(args, message, capsys):
    assert main(args) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert_one_error(error, message)


def test_more_shots_than_items_is_an_error(confidence, tmp_path):
    status, _, error = confidence("--output", str(tmp_path / "out.jsonl"), "--shots", "7")
    assert status == 2
    assert "7 shots" in error


def test_an_item_without_room_is_named(confidence, data, tmp_path):
    rows = make_rows(2)
    rows[1]["paraphrases"] = ["long " * 3000]
    write_lines(data, rows)
    status, _, error = confidence("--output", str(tmp_path / "out.jsonl"), "--shots", "0")
    assert status == 2
    assert "error: request 'i1': " in error


# Files that are continued


def test_an_interrupted_file_is_completed_byte_for_byte(confidence, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--output", str(output))
    assert confidence(*args)[0] == 0
    whole = output.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 5
    for cut in (1, ends[0], ends[2] - 3, len(whole) - 1):
        output.write_bytes(whole[:cut])
        status, _, error = confidence(*args)
        assert status == 0
        assert output.read_bytes() == whole
        assert error.split("\n")[-2].startswith("5 items, ")
    status, _, error = confidence(*args)
    assert (status, output.read_bytes()) == (0, whole)
    assert "nothing to do: every item is in " in error


def test_a_limit_is_no_configuration(confidence, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    confidence("--output", str(whole))
    for limit in ("2", "9"):
        assert confidence("--output", str(output), "--limit", limit)[0] == 0
    lines = {line["id"]: line for line in read_lines(output)}
    assert lines == {line["id"]: line for line in read_lines(whole)}
    assert len(lines) == len(read_lines(output))


CHANGES = [
    (("--seed", "1"), "made with seed 0, and this call has 1"),
    (("--samples", "4"), "made with samples 3, and this call has 4"),
    (("--shots", "1"), "made with shots 2, and this call has 1"),
    (("--temperature", "0.5"), "made with temperature 0.2, and this call has 0.5"),
    (("--top-p", "0.5"), "made with top_p 1.0, and this call has 0.5"),
    (("--max-new-tokens", "9"), "made with max_new_tokens 4, and this call has 9"),
    (("--dtype", "float32"), "made with dtype 'auto', and this call has 'float32'"),
    (("--quantize", "int8"), "made with quantize None, and this call has 'int8'"),
]


def test_another_configuration_is_refused(confidence, data, template, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--output", str(output))
    assert confidence(*args, "--limit", "2")[0] == 0
    before = output.read_bytes()

    def refused(message: str, *flags: str) -> None:
        status, _, error = confidence(*args, *flags)
        assert status == 2
        assert_one_error(error, message)
        assert output.read_bytes() == before

    for flags, message in CHANGES:
        refused(message, *flags)
    template.write_text(TEMPLATE.replace('"\\n", "e"', '"\\n"'), encoding="utf-8")
    refused("made with stop ['\\n', 'e'], and this call has ['\\n']")
    template.write_text(TEMPLATE.replace("Answer", "Say"), encoding="utf-8")
    refused("answers another request under id ")
    template.write_text(TEMPLATE, encoding="utf-8")
    rows = [{**row, "paraphrases": [f"Name {row['id']}"]} for row in make_rows(7)]
    write_lines(data, rows)
    refused("answers another request under id ")


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_killed_runs_add_up_to_an_uninterrupted_one(
    confidence, tiny_llama_folder, template, tmp_path
):
    data = write_lines(tmp_path / "many.jsonl", make_rows(10))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    args = ("--dataset", str(data), "--output")
    assert confidence(*args, str(whole))[0] == 0
    own = ("--model", str(tiny_llama_folder), "--no-compile", "--template", str(template), *OWN)
    command = [sys.executable, "-m", "minifuse.confidence", *args, str(output), *own]
    sizes = kill_at_random(command, output, size_of(whole), seed=6, kills=2)
    assert 0 < sizes[1] < size_of(whole)
    assert whole.read_bytes().startswith(output.read_bytes())
    assert confidence(*args, str(output))[0] == 0
    assert output.read_bytes() == whole.read_bytes()


# Weights


def test_weights_are_read_back_and_used(confidence, tiny_llama_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    assert confidence("--output", str(output))[0] == 0
    lines = {line["id"]: line["confidences"] for line in read_lines(output)}
    with pytest.warns(UserWarning, match="have no confidence above 0"):
        weights = read_weights(output)
    assert weights.keys() == lines.keys()
    silent = [id for id, values in lines.items() if not any(values)]
    assert 0 < len(silent) < len(lines)
    for id, values in lines.items():
        assert weights[id] == (tuple(values) if any(values) else (1.0,) * len(values))
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    for values in weights.values():
        results = fuser.generate(
            segments=[f"Q: {n}\n" for n in range(len(values))],
            suffix="A:",
            weights=values,
            methods=["weighted_avg", "weighted_max", "fused_weighted"],
            max_new_tokens=1,
        )
        assert results["fused_weighted"].weights == pytest.approx(
            [value / sum(values) for value in values]
        )


def test_all_zero_confidences_weigh_the_same_with_a_warning(tmp_path):
    lines = [{"id": "a", "confidences": [0, 0.5]}, {"id": 7, "confidences": [0, 0, 0]}]
    path = write_lines(tmp_path / "weights.jsonl", lines)
    with pytest.warns(UserWarning, match=r"1 of 2 items have no confidence above 0 .*'7'"):
        weights = read_weights(path)
    assert weights == {"a": (0.0, 0.5), "7": (1.0, 1.0, 1.0)}


def test_weights_of_chosen_paraphrases(recwarn):
    weights = {"a": (0.0, 0.5, 1.0, 0.0)}
    assert weights_of(weights, "a", (2, 0, 2), 4) == (1.0, 0.0, 1.0)
    assert not recwarn
    with pytest.warns(UserWarning, match="these weigh the same"):
        assert weights_of(weights, "a", (3, 0), 4) == (1.0, 1.0)
    with pytest.raises(UsageError, match="no line for 'b'"):
        weights_of(weights, "b", (0,), 4)
    with pytest.raises(UsageError, match="4 confidences for 'a', which has 5 paraphrases"):
        weights_of(weights, "a", (0,), 5)


BAD_WEIGHTS = [
    ("{", "not JSON"),
    ('{"confidences": [1]}', "id is None"),
    ('{"id": "b"}', "confidences is null"),
    pytest.param('{"id": "b", "confidences": [%s"x"]}' % ("1, " * 999), "1,...; wanted", id="long"),
    ('{"id": "b", "confidences": []}', "confidences is []"),
    ('{"id": "b", "confidences": [true]}', "confidences is [True]"),
    ('{"id": "b", "confidences": ["1"]}', "confidences is ['1']"),
    ('{"id": "b", "confidences": [-0.1]}', "confidences is [-0.1]"),
    ('{"id": "b", "confidences": [NaN]}', "confidences is [nan]"),
    ('{"id": "b", "confidences": [1e999]}', "confidences is [inf]"),
    pytest.param('{"id": "b", "confidences": [1%s]}' % ("0" * 400), "confidences is", id="large"),
    ('{"id": "a", "confidences": [1]}', "id 'a' stands in an earlier line"),
]


@pytest.mark.parametrize(("line", "message"), BAD_WEIGHTS)
def test_bad_weights_are_named(line, message, tmp_path):
    path = write_lines(tmp_path / "weights.jsonl", [{"id": "a", "confidences": [1]}, line])
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


def test_files_without_weights_are_errors(tmp_path):
    with pytest.raises(UsageError, match="--weights-from cannot read"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no confidences"):
        read_weights(write_lines(tmp_path / "empty", ["\n"]))
