"""The race: its engines give the same answers, its arithmetic and its report are right."""

import contextlib
import io
import json
from dataclasses import dataclass

import pytest
import torch
from engine_cases import make_sharp_model
from tiny_files import write_gguf, write_hub_folder

from benchmarks.peers.__main__ import DTYPES, build_parser, main, run
from benchmarks.peers.agreement import Agreement, check_agreement, compare, raise_disagreements
from benchmarks.peers.engines import Averaged, Engines, LlamaEngine
from benchmarks.peers.questions import Question, make_passage, make_questions, split_passage
from benchmarks.peers.report import table_lines, write_plots
from benchmarks.peers.rows import Contestant, Key, Row, race, ratio
from benchmarks.peers.scenarios import Bench, Sizes
from benchmarks.peers.targets import TARGETS, Target, judge
from minifuse.errors import MinifuseError, UsageError

TINY = Sizes(
    new_tokens=3,
    num_segments=2,
    questions=2,
    few=1,
    batch_sizes=(1, 2),
    decode_lengths=(40,),
    prefill_lengths=(30,),
    decode_tokens=3,
    step_tokens=2,
    step_live=32,
    counts=(1, 16),
    contexts=(40,),
    batches=(1, 2),
    read_bytes=1 << 16,
)
FLOATS = ("float32", "bfloat16")


# llama.cpp keeps keys and values in float16, and sums in another order: 2e-3 at most when tried.
LLAMA_TOLERANCE = 0.005


@dataclass(frozen=True)
class TokenQuestion:
    """A question that is token ids alone."""

    prefix_ids: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> list[list[int]]:
        return [[*self.prefix_ids, *rest] for rest in self.rests]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("peers") / "tiny", make_sharp_model())


@pytest.fixture(scope="module")
def engines(folder):
    return Engines(str(folder), compile=False)


@pytest.fixture(scope="module")
def question(engines):
    return Question(
        engines.tokenizer,
        ("Q: value of a key?\n", "Q: which is the key, and why?\n", "Q: key?\n"),
        prefix="def answer(question):\n",
    )


@pytest.fixture
def bench(engines):
    return Bench(engines, FLOATS, 1, TINY)


def averaged_logits(model, prompts, num_tokens) -> Averaged:
    """The plainest way: each prompt alone, all logits, float64 means."""
    token_ids, means = [], []
    for _ in range(num_tokens):
        rows = [model(torch.tensor([[*p, *token_ids]])).logits[0, -1].double() for p in prompts]
        means.append(sum(rows) / len(rows))
        token_ids.append(int(means[-1].argmax()))
    return Averaged(tuple(token_ids), torch.stack(means))


@torch.inference_mode()
@pytest.mark.parametrize("way", ["prototype", "batched"])
def test_the_transformers_engines_average_logits(engines, question, way):
    engine = engines.transformers("float32")
    wanted = averaged_logits(engine.model, question.prompts, 8)
    found = getattr(engine, way)(question.prompts, 8)
    assert found.token_ids == wanted.token_ids
    torch.testing.assert_close(found.logits.double(), wanted.logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_separate_answers_are_those_of_each_prompt(engines, question):
    engine = engines.transformers("float32")
    wanted = [averaged_logits(engine.model, [p], 6).token_ids for p in question.prompts]
    assert engine.separate(question.prompts, 6) == wanted


@torch.inference_mode()
def test_decoding_behind_a_held_context_can_be_repeated(engines, question):
    engine = engines.transformers("float32")
    (prompt, *_) = question.prompts
    wanted = averaged_logits(engine.model, [prompt], 5).token_ids
    engine.hold(prompt)
    assert engine.decode(5) == wanted
    assert engine.decode_by_generate(5) == wanted
    assert engine.decode_by_generate(1) == wanted[:1]
    assert engine.decode(5) == wanted
    assert engine.prefill(prompt) == wanted[0]


@torch.inference_mode()
def test_minifuse_gives_the_same_average(engines, question):
    wanted = averaged_logits(engines.transformers("float32").model, question.prompts, 4)
    engine = engines.minifuse("float32")
    engine.fuser.forget_prefixes()
    for _ in ("cold", "cached"):
        assert engine.answer(question, "logit_avg", 4) == {"logit_avg": wanted.token_ids}


def test_a_forgotten_prefix_is_computed_anew(engines, question, monkeypatch):
    executor = engines.minifuse("float32").fuser.executor
    calls = []
    prefill = executor.prefill

    def counted(pool, groups):
        calls.append(groups)
        return prefill(pool, groups)

    monkeypatch.setattr(executor, "prefill", counted)
    counts = []
    for _ in range(2):
        engines.minifuse("float32").fuser.forget_prefixes()
        for _ in range(2):
            engines.minifuse("float32").answer(question, "fused", 1)
            counts.append(len(calls))
    # The prefix and the segments, then the segments alone.
    assert counts == [2, 3, 5, 6]


@pytest.mark.slow
def test_engines_agree_and_a_planted_disagreement_is_found(bench, monkeypatch):
    agreements = check_agreement(bench)
    raise_disagreements(agreements)
    assert {a.agrees for a in agreements} == {True}
    names = {(a.engine, a.dtype) for a in agreements}
    for state in ("cold", "cached"):
        for dtype in FLOATS:
            assert (f"(e) minifuse logit_avg, prefix {state}", dtype) in names

    engine = bench.engines.minifuse("float32")
    real = engine.answer

    def wrong(question, methods, num_tokens):
        answers = real(question, methods, num_tokens)
        if methods == "logit_avg":
            first, *rest = answers["logit_avg"]
            answers["logit_avg"] = ((first + 1) % 320, *rest)
        return answers

    monkeypatch.setattr(engine, "answer", wrong)
    with pytest.raises(MinifuseError, match=r"logit_avg, prefix cold in float32, token 1"):
        raise_disagreements(check_agreement(bench))


def test_a_near_tie_is_no_disagreement_and_what_follows_it_is_not_compared():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.9995, 0.0], [0.0, 0.0, 5.0]])
    reference = Averaged((1, 0, 2), logits)
    tied = compare("x", "float32", (1, 1, 0), reference, 1e-3)
    assert (tied.same, tied.of, tied.agrees) == (1, 3, True)
    assert tied.gap == pytest.approx(5e-4, rel=1e-3)
    assert compare("x", "float32", (1, 2, 2), reference, 1e-3).agrees is False
    assert compare("x", "int4", (0, 0, 2), reference, None).agrees is None
    assert compare("x", "float32", (1, 0, 2), reference, 1e-3).gap is None


def test_ratios_are_taken_repeat_by_repeat():
    slow = Row(Key("S1", "", "a", "float32"), "ms", (10.0, 40.0, 90.0))
    fast = Row(Key("S1", "", "b", "float32"), "ms", (1.0, 10.0, 10.0))
    assert ratio(slow, fast) == 9.0  # of 10, 4 and 9; the ratio of the medians is 4


def test_targets_are_judged():
    over, under = Key("S1", "", "a", "float32"), Key("S1", "", "b", "float32")
    rows = [Row(over, "ms", (10.0,)), Row(under, "ms", (4.0,))]
    targets = [
        Target("least", over, under, 2.5),
        Target("missed", over, under, 2.6),
        Target("most", over, under, 2.5, is_limit=True),
        Target("too much", over, under, 2.4, is_limit=True),
        Target("a time", over, None, 10.0, is_limit=True),
        Target("missing", over, Key("S1", "", "c", "float32"), 1.0),
        Target("not run", Key("S2", "", "a", "float32"), under, 1.0),
    ]
    outcomes = judge(rows, ["S1"], targets)
    assert [(o.name, o.ratio, o.met) for o in outcomes] == [
        ("least", 2.5, True),
        ("missed", 2.5, False),
        ("most", 2.5, True),
        ("too much", 2.5, False),
        ("a time", 10.0, True),
        ("missing", None, None),
    ]


def test_contestants_run_turn_about_and_the_fastest_variant_is_taken():
    calls = []

    def slow() -> float:
        calls.append("slow")
        return 2.0

    def quick() -> float:
        calls.append("quick")
        return 1.0

    def other() -> float:
        calls.append("other")
        return 5.0

    contestants = [
        Contestant(Key("S1", "", "a", ""), {"slow": slow, "quick": quick}, count=4),
        Contestant(Key("S1", "", "b", ""), {"": other}, prepare=lambda: calls.append("ready")),
    ]
    rows = race(contestants, 3, "test")
    assert [(row.chosen, row.values) for row in rows] == [
        ("quick", (250.0,) * 3),
        ("", (5000.0,) * 3),
    ]
    assert calls[-9:] == "quick ready other ready other quick quick ready other".split()


def test_what_compiles_while_the_time_is_taken_is_reported(capsys):
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter(range(2, 9))
    same = Contestant(Key("S1", "", "a", ""), {"": lambda: compiled(torch.ones(1)).item()})
    race([same], 2, "one size")
    assert "compiled" not in capsys.readouterr().err
    other = Contestant(
        Key("S1", "", "a", ""), {"": lambda: compiled(torch.ones(next(sizes)))[0].item()}
    )
    race([other], 2, "new sizes")
    assert "new sizes: 2 graphs were compiled" in capsys.readouterr().err


def test_questions_have_the_counts_that_were_asked_for(engines):
    questions = make_questions(engines.tokenizer, 64, 32)
    assert len({text for q in questions for text in q.segments}) == 64 * 32
    assert len({q.prefix_ids for q in questions}) == 1
    for length in (1, 30, 300):
        text = make_passage(engines.tokenizer, length)
        assert len(engines.tokenizer.encode(text, is_start=True)) == length
    parts = split_passage(engines.tokenizer, 64, 4)
    assert [len(engines.tokenizer.encode(p, is_start=False)) for p in parts] == [16] * 4
    assert len(set(parts)) == 4


@pytest.fixture(scope="module")
def whole_run(engines, tmp_path_factory):
    """Every scenario on the tiny model; what was printed, and the plots."""
    plots = tmp_path_factory.mktemp("plots")
    printed = io.StringIO()
    bench = Bench(engines, (*FLOATS, "int4"), 1, TINY)
    with contextlib.redirect_stdout(printed):
        run(bench, ("S1", "S2", "S3", "S4", "S5"), plots)
    return printed.getvalue().splitlines(), sorted(path.name for path in plots.iterdir())


@pytest.mark.slow
def test_the_last_line_is_json(whole_run):
    lines, plots = whole_run
    found = json.loads(lines[-1])
    assert list(found) == ["conditions", "targets", "rows"]
    assert {"processor", "threads", "load_average", "torch", "date"} <= set(found["conditions"])
    for target in found["targets"]:
        assert list(target) == ["name", "ratio", "target", "met"]
        assert (target["ratio"] is None) == (target["met"] is None)
    scenarios = {row["scenario"] for row in found["rows"]}
    assert scenarios == {"S1", "S2", "S3", "S3 bytes", "S4", "S5", "agreement"}
    assert lines[0].startswith("date: ")
    assert plots == [
        "growth-batch.png",
        "growth-decode.png",
        "growth-methods.png",
        "growth-one-question.png",
        "growth-one-step-by-N.png",
    ]


@pytest.mark.slow
def test_targets_without_lengths_find_their_rows(whole_run):
    """What a tiny run cannot have: other lengths, llama.cpp, quantized weights, and growth in more
    than one dtype."""
    found = json.loads(whole_run[0][-1])
    for target in found["targets"]:
        name = target["name"]
        if name.startswith("S5") and "float32" in name:
            continue
        if not any(word in name for word in ("live tokens: ", "S3", "S4", "int4", "(d)")):
            assert target["ratio"] is not None, name


def test_lengths_and_engines_of_the_targets_are_those_of_the_scenarios():
    lengths = {t.over.case for t in TARGETS if t.over.scenario in ("S3", "S3 bytes")}
    assert lengths <= set(map(str, Sizes().decode_lengths))
    lengths = {t.over.case for t in TARGETS if t.over.scenario == "S4"}
    assert lengths <= set(map(str, Sizes().prefill_lengths))
    assert len({t.name for t in TARGETS}) == len(TARGETS)


def test_the_table_compares_with_the_fastest_of_each_peer():
    def row(engine, dtype, value):
        return Row(Key("S1", "", engine, dtype), "ms", (value,))

    rows = [
        row("(a) prototype", "float32", 900.0),
        row("(a) prototype", "bfloat16", 800.0),
        row("(d) llama.cpp, N times", "q4_1", 60.0),
        row("(d) llama.cpp, shared prefix, prefix cached", "q4_1", 30.0),
        row("(e) minifuse fused, prefix cold", "float32", 10.0),
        row("(e) minifuse fused, prefix cached", "int4", 5.0),
    ]
    lines = table_lines(rows)
    cold, cached = (next(x for x in lines if f"fused, prefix {s}" in x) for s in ("cold", "cached"))
    assert "90.00x" in cold
    assert "6.00x" in cold
    assert "160.00x" in cached
    assert "6.00x" in cached


def test_no_plots_without_growth(tmp_path):
    assert write_plots([], tmp_path / "plots", "title") == []


def test_arguments_are_checked():
    args = build_parser().parse_args(["--dtypes", "int4,float32", "--scenarios", "S3, S1"])
    assert (args.dtypes, args.scenarios) == (("float32", "int4"), ("S1", "S3"))
    assert DTYPES[-1] == "int4"
    for wrong in (["--scenarios", "S7"], ["--dtypes", "float16"], ["--plots", "x"]):
        with pytest.raises(UsageError):
            build_parser().parse_args(wrong)


def test_wrong_numbers_are_usage_errors(capsys):
    assert main(["--repeats", "0"]) == 2
    assert "--repeats is 0; wanted at least 1" in capsys.readouterr().err


def test_missing_engines_are_skipped_with_a_word(folder, capsys):
    assert Engines(str(folder), compile=False).llama() == {}
    assert "llama.cpp is skipped: there is no .gguf" in capsys.readouterr().err


@pytest.mark.parametrize("flash_attn", [False, True])
@torch.inference_mode()
def test_llama_gives_the_same_answers_each_way(tmp_path, flash_attn):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: bench)")
    model = make_sharp_model()
    llama = LlamaEngine(write_gguf(tmp_path / "tiny.gguf", model), 1, flash_attn=flash_attn)
    question = TokenQuestion((5, 9, 33, 7, 60), ((11, 12, 13), (14, 15), (90, 80, 70, 60)))
    wanted = averaged_logits(model, question.prompts, 6)
    singles = [averaged_logits(model, [prompt], 6) for prompt in question.prompts]
    with contextlib.closing(llama):
        for _ in range(2):
            found = llama.batched(question, 6)
            assert found.token_ids == wanted.token_ids
            torch.testing.assert_close(
                found.logits.double(), wanted.logits, atol=LLAMA_TOLERANCE, rtol=0
            )
            for way in (llama.separate(question.prompts, 6), llama.shared(question, 6)):
                assert way == [single.token_ids for single in singles]
        llama.hold(question.prompts[0])
        assert llama.decode(6) == llama.decode(6) == singles[0].token_ids
        assert llama.prefill(question.prompts[0]) == singles[0].token_ids[0]


def test_agreement_rows_name_themselves():
    row = Agreement("x", "float32", 3, 3, None, 1e-3).to_json()
    assert (row["scenario"], row["agrees"]) == ("agreement", True)
