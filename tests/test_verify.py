"""`python -m minifuse.verify`: a sound model passes, each check sees the fault planted for it."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from engine_cases import keep_a_stale_slot, lose_a_stored_prefix, make_sharp_model
from tiny_files import CONTROLS, write_hub_folder
from torch._dynamo.utils import counters

import minifuse
from minifuse import checks, pool, prefill, scoring
from minifuse.checks import CHECKS, Bench, run_checks
from minifuse.executor import Executor
from minifuse.methods import Reduction
from minifuse.verify import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "sharp"
    write_hub_folder(path, make_sharp_model())
    (path / "chat_template.jinja").write_text("<|start|>{{ messages[0].content }}<|end|>")
    return path


@pytest.fixture
def fuser(folder):
    return minifuse.load(folder, compile=False)


def failed(fuser, names: set[str]) -> set[str]:
    """Those of the named checks that fail."""
    return {finding.name for finding in run_checks(fuser, names) if finding.is_passed is False}


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
def test_a_sound_model_passes(folder, dtype, quantize):
    findings = list(run_checks(minifuse.load(folder, dtype, quantize=quantize, compile=False)))
    assert [f.name for f in findings if f.is_passed is False] == []
    not_run = {f.name for f in findings if f.is_passed is None}
    expected = {"compiled is eager", "no recompilation"}
    assert not_run == expected | ({"as transformers"} if quantize else set())
    for finding in findings:
        assert finding.note
        assert finding.measured is None or finding.measured <= finding.tolerance


# Faults: each takes what it needs, and breaks it.


def lose_a_weight(fuser, monkeypatch):
    fuser.model.params.layers[1].wo[3, 5] = torch.nan


def swap_heads(fuser, monkeypatch):
    heads = fuser.model.params.layers[0].wqkv.unflatten(0, (-1, fuser.model.config.head_dim))
    heads[0], heads[1] = heads[1].clone(), heads[0].clone()


def turn_by_another_base(fuser, monkeypatch):
    fuser.executor.config = replace(fuser.executor.config, rope_theta=5000.0)


def rules_with(change):
    """Tables in which some rules are others."""

    def plant(fuser, monkeypatch):
        write = pool.Pool.write_rules
        changed = {}

        def write_other(self, rules):
            others = []
            for lease, sees in rules:
                for label, rule in sees.items():
                    if id(rule) not in changed:
                        changed[id(rule)] = rule, change(label, rule)
                others.append((lease, {label: changed[id(r)][1] for label, r in sees.items()}))
            write(self, others)

        monkeypatch.setattr(pool.Pool, "write_rules", write_other)

    return plant


def leak(label: int, rule: dict) -> dict:
    """The second segment sees the first; labels: padding, prefix, segments."""
    return {**rule, 2: 0.0} if label == 3 and set(rule) == {1, 3} else rule


def lose_balance(label: int, rule: dict) -> dict:
    return dict.fromkeys(rule, 0.0)


def favour_the_first(label: int, rule: dict) -> dict:
    return {key: bias + (key == 2) for key, bias in rule.items()}


def turn_too_far(fuser, monkeypatch):
    copies_of = prefill._copies_of
    monkeypatch.setattr(
        prefill, "_copies_of", lambda job: [c._replace(turn=c.turn + 1) for c in copies_of(job)]
    )


def sharpen_means(fuser, monkeypatch):
    reduce = scoring.reduce_logits

    def reduce_other(logits, reduction, weights):
        is_mean = reduction is Reduction.MEAN_PROBS
        return reduce(1.1 * logits if is_mean else logits, reduction, weights)

    monkeypatch.setattr(scoring, "reduce_logits", reduce_other)


def mix_requests_up(fuser, monkeypatch):
    decode = Executor.decode

    def decode_other(self, own, groups):
        logits = decode(self, own, groups)
        return [2 * each for each in logits] if len(groups) > 1 else logits

    monkeypatch.setattr(Executor, "decode", decode_other)


def pretend_to_compile(fuser, monkeypatch):
    """The executor takes its eager steps for compiled ones."""
    steps = fuser.executor._steps
    fuser.executor.is_compiled = True
    monkeypatch.setattr(fuser.executor, "_find_ready", lambda graph: steps[graph.kind])


def compile_badly(fuser, monkeypatch):
    run = fuser.executor._run
    fuser.executor.is_compiled = True
    monkeypatch.setattr(
        fuser.executor, "_find_ready", lambda graph: fuser.executor._steps[graph.kind]
    )
    monkeypatch.setattr(fuser.executor, "_run", lambda *args: 1.01 * run(*args))


def compile_again(fuser, monkeypatch):
    pretend_to_compile(fuser, monkeypatch)
    fuser.executor.recompiles = 1


def with_every_call(event):
    """A compiler that does something with every call, and says nothing of it."""

    def plant(fuser, monkeypatch):
        pretend_to_compile(fuser, monkeypatch)
        run = fuser.executor._run

        def run_other(*args):
            event(fuser.executor)
            return run(*args)

        monkeypatch.setattr(fuser.executor, "_run", run_other)

    return plant


def add_a_graph(executor):
    executor.graphs[object()] = None


def break_a_graph(executor):
    counters["graph_break"]["planted"] += 1


def lose_a_letter(fuser, monkeypatch):
    decode = fuser.model.tokenizer.decode
    monkeypatch.setattr(fuser.model.tokenizer, "decode", lambda ids: decode(ids)[1:])


def let_controls_through(fuser, monkeypatch):
    tokenizer = fuser.model.tokenizer
    encode = tokenizer._full.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, is_start: encode(text, add_special_tokens=False).ids
    )


FAULTS = {
    "a weight that is no number": (lose_a_weight, {"weights", "plain decoding"}),
    "two heads swapped": (
        swap_heads,
        {"weights", "plain decoding", "streams are prompts alone", "as transformers"},
    ),
    "another RoPE base": (
        turn_by_another_base,
        {"plain decoding", "fused is as defined", "as transformers"},
    ),
    "a leak between segments": (
        rules_with(leak),
        {"segments isolated", "streams are prompts alone", "order changes nothing"},
    ),
    "no balance": (rules_with(lose_balance), {"fused is as defined", "copies weigh as one"}),
    "the first segment favoured": (
        rules_with(favour_the_first),
        {"fused is as defined", "order changes nothing"},
    ),
    "keys turned one position too far": (turn_too_far, {"fused is as defined"}),
    "an ensemble's mean too sharp": (sharpen_means, {"one segment is plain decoding"}),
    "a stale slot": (keep_a_stale_slot, {"cached is uncached"}),
    "a stored prefix that is lost": (lose_a_stored_prefix, {"prefix reused is recomputed"}),
    "a batch that changes answers": (mix_requests_up, {"batched is alone"}),
    "a graph that computes something else": (compile_badly, {"compiled is eager"}),
    "a graph compiled again": (compile_again, {"no recompilation"}),
    "a graph more with every call": (with_every_call(add_a_graph), {"no recompilation"}),
    "a graph broken with every call": (with_every_call(break_a_graph), {"no recompilation"}),
    "a letter lost": (lose_a_letter, {"tokenizer round trips"}),
    "control tokens out of text": (let_controls_through, {"text is no control token"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_sees_its_fault(fuser, monkeypatch, fault):
    plant, seen_by = FAULTS[fault]
    plant(fuser, monkeypatch)
    assert failed(fuser, seen_by) == seen_by


def test_a_faulty_template_is_seen(fuser, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content | upper }}")
    fuser.model = replace(fuser.model, folder=tmp_path)
    with pytest.raises(minifuse.MinifuseError, match="drops the user"):
        CHECKS["chat template renders"](SimpleNamespace(fuser=fuser))


def test_every_check_has_a_fault():
    planted = set().union(*(seen_by for _, seen_by in FAULTS.values()))
    assert planted | {"chat template renders"} == CHECKS.keys()


def test_a_model_that_ends_at_once(fuser):
    """Of an empty answer there is nothing to compare; the logits are."""
    (first,) = fuser.generate_batch([checks.REQUEST], methods="origin", max_new_tokens=1, stop=())
    fuser.model = replace(fuser.model, eos_token_ids=first["origin"].token_ids)
    (again,) = fuser.generate_batch([checks.REQUEST], methods="origin", max_new_tokens=1, stop=())
    assert again["origin"].token_ids == ()
    (finding,) = run_checks(fuser, ["as transformers"])
    assert finding.is_passed


def test_answers_that_part_are_as_far_apart_as_their_picks(fuser):
    (found,) = fuser.generate_batch([checks.REQUEST], methods="origin", max_new_tokens=4, stop=())
    whole = found["origin"]
    bench = Bench(fuser)
    assert checks.gap_of_answers(bench, checks.REQUEST, whole, whole) == 0
    short = replace(whole, token_ids=whole.token_ids[:2], logprobs=whole.logprobs[:2])
    # Not an end: that it stops there is a fault, to be seen by how unlikely an end is.
    assert checks.gap_of_answers(bench, checks.REQUEST, whole, short) > bench.tolerance
    fuser.model = replace(fuser.model, eos_token_ids=whole.token_ids[2:3])
    assert checks.gap_of_answers(bench, checks.REQUEST, short, whole) == 0
    other = replace(whole, token_ids=(*whole.token_ids[:3], whole.token_ids[3] ^ 1))
    scores = bench.ask(methods=["origin"], continuation=whole.token_ids)["origin"][3]
    behind = float(scores.max() - scores[other.token_ids[3]])
    gap = checks.gap_of_answers(bench, checks.REQUEST, whole, other)
    assert gap == pytest.approx(behind / 2, abs=1e-4)


def test_transformers_that_cannot_run_the_model(fuser, monkeypatch):
    def fail(*_, **__):
        raise TypeError("no such\nargument")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    (finding,) = run_checks(fuser, ["as transformers"])
    assert finding.is_passed is None
    assert finding.note.endswith("cannot run the model: no such argument")


def test_faults_do_not_widen_their_tolerance(folder, fuser, monkeypatch):
    sound = Bench(minifuse.load(folder, compile=False))
    forced = sound.forced_ids
    turn_by_another_base(fuser, monkeypatch)
    faulty = Bench(fuser)
    faulty.forced_ids = forced  # the probe is the same; only the engine is not
    assert faulty.tolerance == sound.tolerance


def test_the_command(folder, capsys):
    assert main(["--model", str(folder), "--no-compile", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["passed"]
    assert {"check", "passed", "measured", "tolerance", "unit", "note", "seconds"} == set(
        report["checks"][0]
    )
    assert len(report["checks"]) == len(CHECKS)
    assert "weights" in printed.err


def test_a_failure_is_an_exit_status(folder, tmp_path, monkeypatch, capsys):
    load = minifuse.load

    def load_broken(*args, **options):
        fuser = load(*args, **options)
        lose_a_weight(fuser, monkeypatch)
        return fuser

    monkeypatch.setattr(minifuse, "load", load_broken)
    assert main(["--model", str(folder), "--no-compile"]) == 1
    lines = capsys.readouterr().out.splitlines()
    marks = [line.split(" ")[0] for line in lines]
    assert marks.count("FAILED") > 1
    assert marks.count("ok") + marks.count("FAILED") == len(CHECKS) - 2
    assert "wo of layer 1 has 1 values that are not finite" in "".join(lines)
    passed, failed = marks.count("ok"), marks.count("FAILED")
    assert lines[-1].startswith(f"{passed} passed, {failed} failed, 2 not run")


def test_a_model_that_is_not_there():
    done = subprocess.run(
        [sys.executable, "-m", "minifuse.verify", "--model", "no/such/model.gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert CONTROLS
