"""`python -m minifuse.verify`: a sound model passes, each check sees the fault planted for it."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_cases import keep_a_stale_slot, lose_a_stored_prefix, make_sharp_model
from tiny_files import CONTROLS, write_hub_folder

import minifuse
from minifuse import pool, prefill, scoring
from minifuse.checks import CHECKS, Bench, run_checks
from minifuse.executor import Executor
from minifuse.methods import Reduction
from minifuse.verify import main

NAMES = [check.__name__ for check in CHECKS]


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
    checks = [check for check in CHECKS if check.__name__.removeprefix("check_") in names]
    found = zip(checks, run_checks(fuser, checks), strict=True)
    return {c.__name__.removeprefix("check_") for c, f in found if f.is_passed is False}


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
def test_a_sound_model_passes(folder, dtype, quantize):
    findings = list(run_checks(minifuse.load(folder, dtype, quantize=quantize, compile=False)))
    assert [f.name for f in findings if f.is_passed is False] == []
    not_run = {f.name for f in findings if f.is_passed is None}
    assert not_run == {"compiled", "recompiles"} | ({"transformers"} if quantize else set())
    for finding in findings:
        assert finding.note
        assert finding.measured is None or finding.measured <= finding.tolerance


# Faults: each takes what it needs, and breaks it.


def lose_a_weight(fuser, monkeypatch):
    fuser.model.params.layers[1].wo[3, 5] = torch.nan


def swap_heads(fuser, monkeypatch):
    first, second = fuser.model.params.layers[0].wqkv.view(-1, 16, 64)[:2].clone()
    heads = fuser.model.params.layers[0].wqkv.view(-1, 16, 64)
    heads[0], heads[1] = second, first


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
    "a weight that is no number": (lose_a_weight, {"weights", "plain_prompt"}),
    "two heads swapped": (swap_heads, {"weights", "plain_prompt", "streams", "transformers"}),
    "another RoPE base": (turn_by_another_base, {"plain_prompt", "fused", "transformers"}),
    "a leak between segments": (rules_with(leak), {"isolation", "streams", "order"}),
    "no balance": (rules_with(lose_balance), {"fused", "copies"}),
    "the first segment favoured": (rules_with(favour_the_first), {"fused", "order"}),
    "keys turned one position too far": (turn_too_far, {"fused"}),
    "an ensemble's mean too sharp": (sharpen_means, {"one_segment"}),
    "a stale slot": (keep_a_stale_slot, {"cached"}),
    "a stored prefix that is lost": (lose_a_stored_prefix, {"prefix"}),
    "a batch that changes answers": (mix_requests_up, {"batch"}),
    "a graph that computes something else": (compile_badly, {"compiled"}),
    "a graph compiled again": (compile_again, {"recompiles"}),
    "a letter lost": (lose_a_letter, {"tokenizer"}),
    "control tokens out of text": (let_controls_through, {"controls"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_sees_its_fault(fuser, monkeypatch, fault):
    plant, seen_by = FAULTS[fault]
    plant(fuser, monkeypatch)
    assert failed(fuser, seen_by) == seen_by


def test_a_faulty_template_is_seen(fuser, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content | upper }}")
    fuser.model = replace(fuser.model, folder=tmp_path)
    bench = SimpleNamespace(fuser=fuser)
    (check,) = [check for check in CHECKS if check.__name__ == "check_chat"]
    with pytest.raises(minifuse.MinifuseError, match="drops the user"):
        check(bench)


def test_every_check_has_a_fault():
    planted = set().union(*(seen_by for _, seen_by in FAULTS.values())) | {"chat"}
    assert {f"check_{name}" for name in planted} == set(NAMES)


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
