"""`python -m tools.soak`: a short soak finds nothing, and each planted fault is found."""

import json
import re
from collections import Counter

import pytest
import torch
from engine_cases import keep_a_stale_slot, lose_a_stored_prefix, make_sharp_model
from tiny_files import write_hub_folder

import minifuse
from minifuse import pool
from minifuse.config import GenerationConfig
from minifuse.definition import METHODS
from minifuse.executor import Executor
from minifuse.pool import Pool
from minifuse.soak import calls, judges, running
from tools.soak import main

OPTIONS = {"max_new_tokens": 4, "families": None, "is_short": True}


@pytest.fixture(scope="module")
def checker():
    """A tiny model with a window, and what its answers are held to."""
    return running.open_tiny("mistral", judges.Report(), compile=False)


def run(checker, **options):
    def open_checker(family, report):
        checker.report = report
        return checker

    return running.soak(open_checker, **{"seed": 0, "requests": 8, **OPTIONS, **options})


def test_a_short_soak_finds_nothing(checker):
    report = run(checker, requests=20)
    assert report.is_passed, report.divergences + report.faults
    assert report.requests >= 20
    assert report.tokens > 100
    assert 0 < report.worst_share < 1


def test_calls_are_drawn_from_everything():
    drawn = [calls.draw_call(seed, max_new_tokens=8) for seed in range(300)]
    assert drawn == [calls.draw_call(seed, max_new_tokens=8) for seed in range(300)]
    assert {call.family for call in drawn} == set(calls.FAMILIES)
    asked = Counter(method for call in drawn for method in call.options["methods"])
    assert set(asked) == {*METHODS, "vote", "all"}
    requests = [request for call in drawn for request in call.requests]
    assert {len(request.segments) for request in requests} == set(range(1, calls.MAX_SEGMENTS + 1))
    assert {"likelihood", "confidence", None} <= {
        r.weights for r in requests if not r.weights or isinstance(r.weights, str)
    }
    assert any(isinstance(request.weights, list) for request in requests)
    for name in ("stop", "temperature", "top_k"):
        assert {bool(call.options.get(name)) for call in drawn} == {False, True}
    assert {call.streams for call in drawn} == {call.forgets for call in drawn} == {False, True}
    assert {len(call.requests) > call.batch_size for call in drawn} == {False, True}


def test_filters_at_a_tie_are_held_to_neither_side():
    """The third and the fourth token are as likely, so that top-k leaves 0.825 of the mass or all
    of it: the first token alone has more than half of the one and less than half of the other."""
    scores = torch.tensor([0.45, 0.2, 0.175, 0.175], dtype=torch.float64).log()
    config = GenerationConfig(temperature=1.0, top_k=3, top_p=0.5)
    may, must = judges._kept(scores, config, 1e-6)
    assert may.tolist() == [True, True, False, False]
    assert must.tolist() == [True, False, False, False]


# Faults: each takes what it needs, and breaks it.


def shift_a_bias(fuser, monkeypatch):
    """A thousandth more attention on the second segment."""
    write = pool.Pool.write_rules
    kept = {}

    def write_other(self, rules):
        others = []
        for lease, sees in rules:
            for rule in sees.values():
                if id(rule) not in kept:
                    kept[id(rule)] = rule, {k: b + 1e-3 * (k == 3) for k, b in rule.items()}
            others.append((lease, {label: kept[id(rule)][1] for label, rule in sees.items()}))
        write(self, others)

    monkeypatch.setattr(pool.Pool, "write_rules", write_other)


def pick_with(change):
    def plant(fuser, monkeypatch):
        from minifuse import answers

        pick = answers.pick_token
        monkeypatch.setattr(answers, "pick_token", lambda *args: change(pick, *args))

    return plant


def draw_twice(pick, logprobs, config, generator):
    pick(logprobs, config, generator)
    return pick(logprobs, config, generator)


def take_the_second(pick, logprobs, config, generator):
    return logprobs.topk(2).indices[1:]


def lose_a_lease(fuser, monkeypatch):
    def release(self, lease):
        self.num_requests -= 1
        if lease.prefix is not None:
            lease.prefix.users -= 1

    # Requests that wait for slots would wait for ever; these have room enough.
    monkeypatch.setattr(Pool, "release", release)


def forget_a_stop(fuser, monkeypatch):
    from minifuse.results import TextBuilder

    monkeypatch.setattr(TextBuilder, "_cut_at_stop", lambda self, text, searched: False)


FAULTS = {
    "a bias that is a thousandth off": (shift_a_bias, "nats off"),
    "a stale slot": (keep_a_stale_slot, "nats off"),
    "a stored prefix that is lost": (lose_a_stored_prefix, "nats off"),
    "noise that is drawn twice": (pick_with(draw_twice), "behind the definition's pick"),
    "the second best token": (pick_with(take_the_second), "behind the definition's pick"),
    "a lease that is lost": (lose_a_lease, "not given back"),
    "a stop string that is passed over": (forget_a_stop, "its tokens say"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_its_seed_repeats_it(checker, monkeypatch, fault):
    plant, said = FAULTS[fault]
    checker.fuser.forget_prefixes()
    plant(checker.fuser, monkeypatch)
    # Of the calls from 0 on, 6 is the first with an answer that a stop string ends.
    report = run(checker, seed=6 if plant is forget_a_stop else 0, requests=5)
    found = [line for line in report.divergences + report.faults if said in line]
    assert found
    assert not report.is_passed
    if plant is lose_a_stored_prefix:
        return  # what is stored comes from earlier calls
    seed = int(re.match(r"seed (\d+)", found[0])[1])
    again = run(checker, seed=seed, is_single=True)
    assert again.calls == 1
    assert any(said in line for line in again.divergences + again.faults)


def test_a_graph_compiled_later_is_found(checker, monkeypatch):
    executor = checker.fuser.executor
    run_graph = executor._run

    def compile_again(*args):
        executor.recompiles += 1
        return run_graph(*args)

    monkeypatch.setattr(executor, "is_compiled", True)
    monkeypatch.setattr(executor, "_find_ready", lambda graph: executor._steps[graph.kind])
    monkeypatch.setattr(executor, "_run", compile_again)
    monkeypatch.setattr(executor, "recompiles", 0)
    report = run(checker, requests=1, sizes=calls.SIZES[:2])
    assert any("recompiled" in line for line in report.faults)


def test_memory_that_grows_is_found(checker, monkeypatch):
    generate, kept = checker.fuser.generate_batch, []

    def leak(requests, **options):
        kept.append(torch.ones(4 << 20))  # 16 MB
        return generate(requests, **options)

    monkeypatch.setattr(running, "WARM_REQUESTS", 2)
    monkeypatch.setattr(checker.fuser, "generate_batch", leak)
    report = run(checker, requests=10, max_new_tokens=1)
    assert report.growth_bytes > running.GROWTH_BYTES
    assert any("memory grew" in line for line in report.faults)
    assert report.divergences == []


def test_a_batch_that_changes_answers_is_found(tmp_path, monkeypatch):
    folder = write_hub_folder(tmp_path / "sharp", make_sharp_model())
    alone = judges.Alone(minifuse.load(folder, compile=False), judges.Report())
    four = {"seed": 6, "requests": 4}  # whose answers are long
    sound = run(alone, **four)
    assert sound.is_passed, sound.divergences + sound.faults
    assert sound.tokens > 20
    decode = Executor.decode

    def decode_other(self, own, groups):
        logits = decode(self, own, groups)
        return [1.01 * each for each in logits] if len(groups) > 1 else logits

    monkeypatch.setattr(Executor, "decode", decode_other)
    assert any("alone" in line for line in run(alone, **four).divergences)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(judges, "CALIBRATION_CALLS", 3)
    assert main(["--no-compile", "--only", "3", "--new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report["passed"]
    assert report["calls"] == 1
    assert main(["--requests", "0"]) == 2
    assert "error: --requests is 0; wanted at least 1" in capsys.readouterr().err
    assert main(["--dtype", "bfloat16"]) == 2
