"""`python -m minifuse.evaluate` from data set to report, on a tiny model; killed and taken up."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_files import make_model, write_hub_folder

import minifuse
from minifuse.evaluate import main
from minifuse.evaluation.datasets import load_dataset
from minifuse.evaluation.prompts import (
    PromptBuilder,
    choose_shots,
    continuation_of,
    find_template,
    read_template,
)
from minifuse.evaluation.records import RECORDS_FILE
from minifuse.evaluation.runner import count_streams, predict
from minifuse.methods import FusionMethod

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ROOT / "examples" / "questions.jsonl"
# A tolerance in nats for one token's log-probability, see engine_cases; answers have a few.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = make_model("llama", max_position_embeddings=2048)
    return write_hub_folder(tmp_path_factory.mktemp("evaluate") / "tiny", made)


def flags(model: Path, output: Path, *more: str) -> list[str]:
    given = ["--dataset", str(QUESTIONS), "--model", str(model), "--no-compile", "--shots", "2"]
    given += ["--output", str(output), "--limit", "5", "--paraphrases", "3"]
    return [*given, "--max-new-tokens", "3", *more]


def read_records(run: Path) -> list[dict]:
    lines = (run / RECORDS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_timings(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "timings"} for record in records]


def assert_same_records(ours: list[dict], theirs: list[dict]) -> None:
    """The same answers to the same questions in any order; numbers within the tolerance."""

    def place(record: dict) -> tuple:
        index = record["paraphrase_index"]
        where = (record["draw"], record["n"], record["id"], record["method"])
        return *where, -1 if index is None else index

    exact = (
        "id",
        "n",
        "draw",
        "method",
        "paraphrase_index",
        "paraphrases",
        "text",
        "token_ids",
        "lines",
    )
    for one, other in zip(sorted(ours, key=place), sorted(theirs, key=place), strict=True):
        assert {k: one[k] for k in exact} == {k: other[k] for k in exact}
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=TOLERANCE)
        if one["answer_logprobs"] is not None:
            assert one["answer_logprobs"] == pytest.approx(other["answer_logprobs"], abs=TOLERANCE)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(flags(model, path)) == 0
    return path


def test_a_run_leaves_everything_that_was_promised(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "records.jsonl",
        "results.parquet",
        "results.feather",
        "results.csv",
        "summary.json",
        "report.html",
    }
    records = read_records(run)
    per_item = len(FusionMethod) - 1 + 3
    assert len(records) == 5 * per_item
    assert {record["method"] for record in records} == {str(method) for method in FusionMethod}
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["methods"]) == {str(method) for method in FusionMethod}
    assert summary["num_items"] == 5
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")


def test_records_are_what_the_engine_says(run, model):
    """One item, asked once more by hand."""
    config = json.loads((run / "config.json").read_text())
    dataset = load_dataset(str(QUESTIONS), min_paraphrases=3)
    shots, left_out = choose_shots(dataset, 2, 0)
    assert config["shot_ids"] == [[shot.id for shot in shots]]
    template = read_template(find_template(dataset.name))
    records = read_records(run)
    assert not left_out & {record["id"] for record in records}
    item = next(item for item in dataset.items if item.id == records[0]["id"])
    prompt = PromptBuilder(template, tuple(shots)).build(item, item.paraphrases[:3])
    request = {"prefix": prompt.prefix, "segments": prompt.segments, "suffix": prompt.suffix}
    fuser = minifuse.load(model, compile=False)
    methods = [str(method) for method in FusionMethod]
    answers = fuser.generate(**request, methods=methods, max_new_tokens=3, stop=template.stop)
    scores = fuser.score(
        **request,
        methods=[method for method in methods if method != "vote"],
        continuations=[continuation_of(answer) for answer in item.answers],
    )
    for record in (record for record in records if record["id"] == item.id):
        answer, score = answers[record["method"]], scores.get(record["method"])
        if record["paraphrase_index"] is not None:
            answer, score = (part[record["paraphrase_index"]] for part in (answer, score))
        assert record["token_ids"] == list(answer.token_ids)
        assert record["prediction"] == predict(answer.text)
        if score is None:
            assert record["answer_logprob"] is None
        else:
            assert record["answer_logprobs"] == pytest.approx(score, abs=TOLERANCE)
            assert record["answer_logprob"] == max(record["answer_logprobs"])


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_results_do_not_depend_on_the_batch_size(run, model, tmp_path, batch_size):
    assert main(flags(model, tmp_path / "run", "--batch-size", batch_size)) == 0
    assert_same_records(read_records(tmp_path / "run"), read_records(run))


def test_a_run_that_is_killed_again_and_again_ends_like_one_in_a_single_go(run, model, tmp_path):
    """kill -9 at random moments; nothing is lost, nothing doubled."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "minifuse.evaluate"]
    given = flags(model, output, "--batch-size", "1")
    draw = random.Random(0)

    def start() -> subprocess.Popen:
        more = ["--resume"] if (output / "config.json").exists() else []
        return subprocess.Popen(
            [*command, *given, *more],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    for _ in range(2):
        process, size = start(), _size(output)
        deadline = time.monotonic() + 60
        # Killed some time after it has written more, so that every start gets somewhere.
        while process.poll() is None and _size(output) == size and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start().wait() == 0
    assert_same_records(read_records(output), read_records(run))
    assert (output / "report.html").exists()


def _size(run: Path) -> int:
    path = run / RECORDS_FILE
    return path.stat().st_size if path.exists() else -1


def test_resume_wants_the_same_configuration(run, model, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(flags(model, copy)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(flags(model, copy, "--resume", "--seed", "1")) == 2
    assert "was made with seed 0, and this call has 1" in capsys.readouterr().err
    assert main(flags(model, copy, "--resume", "--draws", "2")) == 2
    assert "was made with draws 1, and this call has 2" in capsys.readouterr().err
    quantized = ("--dtype", "float32", "--quantize", "int8")
    assert main(flags(model, copy, "--resume", *quantized)) == 2
    assert "was made with quantize None, and this call has 'int8'" in capsys.readouterr().err
    before = (copy / RECORDS_FILE).read_bytes()
    assert main(flags(model, copy, "--resume", "--quantize", "none")) == 0
    # A run of a version that knew no quantized weights.
    config = json.loads((copy / "config.json").read_text())
    del config["quantize"]
    (copy / "config.json").write_text(json.dumps(config))
    assert main(flags(model, copy, "--resume")) == 0
    assert (copy / RECORDS_FILE).read_bytes() == before


def test_a_sweep_asks_with_several_numbers_of_paraphrases(model, tmp_path):
    given = flags(model, tmp_path / "run", "--sweep", "1,2", "--methods", "fused,logit_avg")
    assert main(given) == 0
    records = read_records(tmp_path / "run")
    assert [record["n"] for record in records] == [1, 1, 2, 2] * 5
    assert all(len(record["paraphrases"]) == record["n"] for record in records)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["by_n"]) == {"1", "2"}
    # Two runs, each with its own number of paraphrases, say the same.
    alone = []
    for n in ("1", "2"):
        given = flags(model, tmp_path / n, "--methods", "fused,logit_avg", "--paraphrases", n)
        assert main(given) == 0
        alone += read_records(tmp_path / n)
    assert_same_records(records, alone)


def test_a_sweep_of_prompts_that_differ_asks_one_by_one(model, tmp_path):
    """In-prompt paraphrases stand in one segment: prompts with fewer begin no others."""
    more = ("--sweep", "1,2", "--methods", "fused,logit_avg", "--format", "in-prompt")
    assert main(flags(model, tmp_path / "run", *more)) == 0
    records = read_records(tmp_path / "run")
    assert [record["n"] for record in records] == [1] * 10 + [2] * 10


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """A run over two draws of shots and two numbers of paraphrases."""
    path = tmp_path_factory.mktemp("evaluate") / "drawn"
    assert main(flags(model, path, *DRAWN)) == 0
    return path


DRAWN = ["--draws", "2", "--sweep", "1,3", "--methods", "fused,per_prompt,prob_avg"]


def test_draws_ask_the_same_behind_other_shots(drawn, model):
    config = json.loads((drawn / "config.json").read_text())
    assert config["draws"] == 2
    first, second = config["shot_ids"]
    dataset = load_dataset(str(QUESTIONS), min_paraphrases=3)
    assert first == [shot.id for shot in choose_shots(dataset, 2, 0)[0]]
    assert set(first) != set(second)
    records = read_records(drawn)
    # Draw, then items, then n; fused, prob_avg and n single prompts of each.
    order = [(record["draw"], record["n"]) for record in records]
    assert order == [
        cell for d in (0, 1) for _ in range(5) for n in (1, 3) for cell in [(d, n)] * (2 + n)
    ]
    assert not {record["id"] for record in records} & {*first, *second}
    asked = ("id", "n", "method", "paraphrase_index", "paraphrases", "answers")
    halves = [[r for r in records if r["draw"] == draw] for draw in (0, 1)]
    for one, other in zip(*halves, strict=True):
        assert [one[name] for name in asked] == [other[name] for name in asked]
    assert any(a["logprobs"] != b["logprobs"] for a, b in zip(*halves, strict=True))


def test_a_draw_is_asked_behind_its_own_shots(drawn, model):
    """One answer of the second draw, asked once more by hand."""
    config = json.loads((drawn / "config.json").read_text())
    dataset = load_dataset(str(QUESTIONS), min_paraphrases=3)
    by_id = {item.id: item for item in dataset.items}
    template = read_template(find_template(dataset.name))
    record = next(
        record
        for record in read_records(drawn)
        if (record["draw"], record["n"], record["method"]) == (1, 3, "fused")
    )
    shots = tuple(by_id[id] for id in config["shot_ids"][1])
    item = by_id[record["id"]]
    prompt = PromptBuilder(template, shots).build(item, item.paraphrases[:3])
    [score] = (
        minifuse.load(model, compile=False)
        .score(
            prefix=prompt.prefix,
            segments=prompt.segments,
            suffix=prompt.suffix,
            methods=["fused"],
            continuations=[continuation_of(answer) for answer in item.answers],
        )
        .values()
    )
    assert record["answer_logprobs"] == pytest.approx(score, abs=TOLERANCE)


def test_draws_are_summarised_and_compared(drawn, model, tmp_path, capsys):
    summary = json.loads((drawn / "summary.json").read_text())
    assert (summary["draws"], summary["num_items"], summary["n"]) == (2, 5, 3)
    assert summary["interval"].endswith("questions and 2 draws of shots")
    assert all(len(entry["by_draw"]) == 2 for entry in summary["comparisons"])
    assert main(["score", str(drawn)]) == 0
    assert json.loads((drawn / "summary.json").read_text()) == summary
    capsys.readouterr()
    assert main(["compare", str(drawn), str(drawn)]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["draws"] == 2
    assert output.err == ""
    other = tmp_path / "other"
    assert main(flags(model, other, "--seed", "1", "--methods", "fused", "--limit", "30")) == 0
    capsys.readouterr()
    assert main(["compare", str(drawn), str(other)]) == 0
    assert "warning: the runs drew other shots" in capsys.readouterr().err


@pytest.mark.parametrize("num_units", [0, 3, 12, 19])
def test_draws_are_taken_up_where_they_stopped(drawn, model, tmp_path, num_units):
    """The lines that are there stay; of 20 (item, n, draw) some are whole, and one is torn."""
    copy = shutil.copytree(drawn, tmp_path / "run")
    lines = (drawn / RECORDS_FILE).read_bytes().splitlines(keepends=True)
    records = read_records(drawn)
    units = list(dict.fromkeys((r["id"], r["n"], r["draw"]) for r in records))
    assert len(units) == 20
    torn = [(r["id"], r["n"], r["draw"]) for r in records].index(units[num_units])
    kept = b"".join(lines[:torn])
    (copy / RECORDS_FILE).write_bytes(kept + lines[torn] + lines[torn + 1][:30])
    assert main(flags(model, copy, *DRAWN, "--resume")) == 0
    assert (copy / RECORDS_FILE).read_bytes().startswith(kept)
    assert_same_records(read_records(copy), records)


def test_runs_of_another_version_are_not_worked_on(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"format": 1}))
    for work in (["score", str(copy)], ["lemmatize", str(copy)], ["compare", str(run), str(copy)]):
        assert main(work) == 2
        assert "another version of minifuse (format 1" in capsys.readouterr().err


def test_weights_come_from_a_confidence_file(model, tmp_path):
    """An item's weights are those of its chosen paraphrases, and go to the weighted methods."""
    dataset = load_dataset(str(QUESTIONS), min_paraphrases=3)
    lines = [{"id": item.id, "confidences": [0.5, 0.0, 1.0, 1.0, 0.0]} for item in dataset.items]
    path = tmp_path / "weights.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--weights-from", str(path), "--methods", "fused_weighted,weighted_max,fused"]
    assert main(flags(model, tmp_path / "run", *given)) == 0
    weights = {record["method"]: record["weights"] for record in read_records(tmp_path / "run")}
    assert weights["fused_weighted"] == pytest.approx([1 / 3, 0, 2 / 3])
    assert weights["weighted_max"] == pytest.approx([1 / 3, 0, 2 / 3])
    assert weights["fused"] is None


def test_finished_runs_are_scored_lemmatized_and_compared(run, model, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("summary.json", "report.html", "results.csv"):
        (copy / name).unlink()
    assert main(["score", str(copy)]) == 0
    assert json.loads((copy / "summary.json").read_text()) == json.loads(
        (run / "summary.json").read_text()
    )
    assert main(["lemmatize", str(copy)]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), str(copy)]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared


BAD_USAGE = [
    (["--paraphrases", "0"], "0 paraphrases were asked for"),
    (["--paraphrases", "9"], "5 paraphrases of id .* wanted at least 9"),
    (["--sweep", "1,x"], "--sweep is '1,x'"),
    (["--shots", "-1"], "--shots is -1"),
    (["--draws", "0"], "--draws is 0"),
    (["--draws", "2", "--shots", "0"], "2 draws of 0 shots are asked for"),
    (["--draws", "40", "--shots", "20"], "leaves no item to evaluate beside 40 draws of 20 shots"),
    (["--shots", "99"], "99 shots are asked for"),
    (["--limit", "0"], "--limit is 0"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--methods", "guess"], "guess"),
    (["--system", "x"], "--system is for a chat template"),
    (["--beta", "nan"], "beta is nan"),
    (["--choice", "best"], "best"),
    (["--choice", "mixed:2+1"], "does not tell manual from automatic paraphrases"),
    (["--seed", "-5"], "--seed is -5"),
    (["--chat", "--system", "\udcff"], "--system"),
    (["--fields", "x"], "--fields has 'x'"),
    (["--family", "fused"], "--family has 'fused'"),
    (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--weights", "likelihood", "--weights-from", "x"], "--weights stands beside"),
]


@pytest.mark.parametrize(("more", "message"), BAD_USAGE)
def test_bad_usage_is_one_line_and_leaves_nothing(more, message, model, tmp_path, capsys):
    import re

    assert main(flags(model, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--spacy-model", "xx_missing_sm"], "xx_missing_sm"),
        (["--chat"], "no chat template"),
        (["--max-new-tokens", "4000"], "request '[^']+': .* positions"),
    ],
)
def test_what_fails_at_once_leaves_nothing(more, message, model, tmp_path, capsys):
    """So that the corrected call can have the same --output."""
    import re

    assert main(flags(model, tmp_path / "run", *more)) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(flags(model, tmp_path / "file" / "run")) == 1
    assert "cannot be used" in capsys.readouterr().err


def test_predictions_are_the_first_line():
    assert predict(" Paris\nQ: next") == "Paris"
    assert predict("\n\n  Rome \n") == "Rome"
    assert predict(" \n") == predict("") == ""


def test_streams_that_a_method_needs_alone():
    assert count_streams("logit_avg", 5) == count_streams("vote", 5) == 5
    assert count_streams("fused", 5) == count_streams("weighted_max", 5) == 1
    assert count_streams("per_prompt", 5) == 1


def test_interrupted_runs_say_how_to_go_on(model, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("minifuse.evaluation.runner._run_asks", interrupt)
    assert main(flags(model, tmp_path / "run")) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert os.path.exists(tmp_path / "run" / "config.json")


def test_attribution_goes_into_records_summary_and_report(model, tmp_path, capsys):
    run = tmp_path / "run"
    given = ["--methods", "fused,logit_avg,per_prompt", "--limit", "3", "--attribution"]
    assert main(flags(model, run, *given)) == 0
    records = read_records(run)
    assert records
    for record in records:
        found = record["attribution"]
        assert sum(found["attention"]["segments"]) > 0
        assert len(found["without"]) == len(found["alone"]) == 3
    summary = json.loads((run / "summary.json").read_text())
    told = summary["methods"]["fused"]["attribution"]
    own = [r["attribution"] for r in records if r["method"] == "fused"]
    assert told["num_answers"] == len(own) == 3
    assert told["alone"][1] == pytest.approx(sum(a["alone"][1] for a in own) / 3)
    assert told["segments"][2] == pytest.approx(sum(a["attention"]["segments"][2] for a in own) / 3)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="attribution"' in page
    assert "fused: prefix" in page
    assert "per_prompt: prefix" not in page  # each of its answers sees one paraphrase alone
    assert main(flags(model, tmp_path / "two", "--sweep", "2,3", "--attribution")) == 2
    assert "one number of paraphrases" in capsys.readouterr().err
