"""The study of fusion: its dense forward against the engine, its report against known numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_files import make_model, write_hub_folder

import minifuse
from benchmarks.fusion_study.__main__ import main
from benchmarks.fusion_study.configs import (
    CONFIGS,
    ENSEMBLES,
    WEIGHTED_ENSEMBLES,
    WEIGHTINGS,
    Fused,
    choose_configs,
)
from benchmarks.fusion_study.decoder import make_tree, regroup_scores
from benchmarks.fusion_study.items import choose_work, half_of
from benchmarks.fusion_study.report import Cube, make_report, read_cubes, same_weights_of
from benchmarks.fusion_study.scoring import Study
from minifuse.errors import UsageError
from minifuse.evaluate import main as evaluate
from minifuse.evaluation.datasets import load_dataset
from minifuse.evaluation.statistics import resample_means
from minifuse.request import Request, encode_prompt, make_frame

QUESTIONS = Path(__file__).resolve().parents[1] / "examples" / "questions.jsonl"
# In nats: float32 on both sides, sums over the few tokens of an answer.
TOLERANCE = 1e-4
LIKELIHOOD = (("likelihood", 1.0),)
CONFIDENCE = (("confidence", 1.0),)
SEGMENTS = ["Q: value of a key?\n", "Q: which is the key, and why?\n", "Q: key?\n"]
REQUEST = Request(SEGMENTS, "def answer(question):\n", "A:")
# Two share their beginning, one begins another, and one is a single token.
CONTINUATIONS = [" key and", " key or not", " key", "x"]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def fuser(request, tmp_path_factory):
    model = make_model(request.param, num_hidden_layers=3, max_position_embeddings=2048)
    with torch.no_grad():
        for layer in model.model.layers:  # attention far from uniform
            layer.self_attn.q_proj.weight *= 2
            layer.self_attn.k_proj.weight *= 2
    folder = write_hub_folder(tmp_path_factory.mktemp("study") / request.param, model)
    return minifuse.load(folder, dtype="float32", compile=False)


def score(fuser, configs=(), request=REQUEST, continuations=CONTINUATIONS):
    return Study(fuser.model, configs).score(request, continuations)


def engine_score(fuser, method, request=REQUEST, continuations=CONTINUATIONS, **options):
    scores = fuser.score(
        segments=request.segments,
        prefix=request.prefix,
        suffix=request.suffix,
        weights=request.weights,
        continuations=continuations,
        methods=[method],
        **options,
    )[method]
    return scores if method == "per_prompt" else max(scores)


def encode(fuser, request):
    return encode_prompt(fuser.model.tokenizer, request, make_frame(fuser.model.tokenizer, None))


def close(value):
    return pytest.approx(value, abs=TOLERANCE)


# Against the engine


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0, 2.0])
def test_fused_is_the_engines(fuser, positions, balance):
    config = Fused(positions=positions, balance=balance)
    expected = engine_score(fuser, "fused", positions=positions, balance=balance)
    found = score(fuser, [config])
    assert found[config.name] == close(expected)
    # The references turn to their segments as far as fusion does, and never away from them.
    assert ("origin balance=0.5" in found) == (balance == 0.5)
    assert not any("balance=2" in name for name in found if not name.startswith("fused"))


@pytest.mark.parametrize("positions", ["aligned", "restart"])
@pytest.mark.parametrize("signal", ["likelihood", "confidence"])
@pytest.mark.parametrize(("beta", "balance"), [(1.0, 1.0), (4.0, 1.0), (0.5, 1.5)])
def test_weights_are_the_engines(fuser, positions, signal, beta, balance):
    config = Fused(((signal, beta),), positions=positions, balance=balance)
    found = score(fuser, [config])
    request = replace(REQUEST, weights=signal)
    options = {"positions": positions, "beta": beta, "balance": balance}
    assert found[config.name] == close(engine_score(fuser, "fused_weighted", request, **options))
    for method in WEIGHTED_ENSEMBLES:
        name = f"{method} {signal}@{beta:g}"
        assert found[name] == close(engine_score(fuser, method, request, **options))


@pytest.mark.parametrize("method", ENSEMBLES)
def test_ensembles_are_the_engines(fuser, method):
    assert score(fuser)[method] == close(engine_score(fuser, method))


def test_single_prompts_are_the_engines(fuser):
    found = score(fuser)
    singles = [max(scores) for scores in engine_score(fuser, "per_prompt")]
    assert found["origin"] == close(singles[0])
    assert found["mean single"] == close(sum(singles) / len(singles))
    assert found["best single"] == close(max(singles))


def test_one_segment_is_a_plain_prompt_whatever_the_configuration(fuser):
    request = replace(REQUEST, segments=SEGMENTS[:1])
    configs = [config for config in CONFIGS if config.sharpness == 1 and config.total == 1]
    found = score(fuser, configs, request)
    expected = engine_score(fuser, "origin", request)
    assert len(found) > len(configs)
    assert [*found.values()] == close([expected] * len(found))


def test_segments_of_one_token_weigh_the_same(fuser):
    request = replace(REQUEST, segments=["x", "y", "Q: key?\n"])
    config = Fused(LIKELIHOOD)
    found = score(fuser, [config, Fused()], request)
    with pytest.warns(UserWarning, match="one token"):
        expected = engine_score(fuser, "fused_weighted", request)
    assert found[config.name] == close(expected)
    assert found["fused"] == close(expected)


def test_no_prefix_is_the_engines_too(fuser):
    request = replace(REQUEST, prefix="")
    configs = [Fused(), Fused(LIKELIHOOD, positions="restart")]
    found = score(fuser, configs, request)
    assert found["fused"] == close(engine_score(fuser, "fused", request))
    expected = engine_score(fuser, "fused_weighted", request, positions="restart", beta=1.0)
    assert found[configs[1].name] == close(expected)


def test_items_do_not_depend_on_each_other(fuser):
    configs = [Fused(), Fused(LIKELIHOOD), Fused(split=3)]
    study = Study(fuser.model, configs)
    other = replace(REQUEST, prefix="another prefix\n", segments=SEGMENTS[:2])
    first = study.score(REQUEST, CONTINUATIONS)
    assert study.score(other, ["x"]) == score(fuser, configs, other, ["x"])
    assert study.score(REQUEST, CONTINUATIONS) == first


# What the engine does not have


def test_rows_do_not_depend_on_each_other(fuser):
    together = score(fuser, CONFIGS)
    for config in CONFIGS[::7]:
        assert score(fuser, [config])[config.name] == close(together[config.name])


def test_every_setting_changes_something(fuser):
    found = score(fuser, CONFIGS)
    assert all(math.isfinite(value) for value in found.values())
    plain = found["fused"]
    # Segments may all lie within a nat of the best.
    changing = [
        c for c in CONFIGS if c.within is None and c.name != "fused" and c.keep not in (3, 4)
    ]
    same = [c.name for c in changing if abs(found[c.name] - plain) < 1e-5]
    # A split below the first of so few layers is none.
    assert same == [Fused(split=1).name]


@pytest.mark.parametrize("terms", [(), LIKELIHOOD])
def test_neutral_settings_are_plain_fusion(fuser, terms):
    plain = Fused(terms)
    neutral = [replace(plain, keep=3), replace(plain, within=1e9)]
    found = score(fuser, [plain, *neutral])
    for config in neutral:
        assert found[config.name] == close(found[plain.name])
    # By the same path as others, at the value that changes nothing.
    nearly = replace(plain, contrast=1 + 1e-9)
    assert score(fuser, [nearly])[nearly.name] == close(found[plain.name])
    sharp = replace(plain, sharpness=1 + 1e-9)
    assert score(fuser, [sharp])[sharp.name] == close(found[plain.name])


@pytest.mark.parametrize("terms", [(), LIKELIHOOD])
def test_a_split_below_the_first_layer_is_plain_fusion(fuser, terms):
    found = score(fuser, [Fused(terms), Fused(terms, split=1)])  # 3 layers: a sixth is none
    assert found[Fused(terms, split=1).name] == close(found[Fused(terms).name])


def test_equal_segments_fuse_to_one_copy(fuser):
    request = replace(REQUEST, segments=SEGMENTS[:1] * 3)
    configs = [c for c in CONFIGS if c.balance == c.sharpness == c.total == 1]
    # The prior is for the first of them, but they are equal; where weights end, so does the bias.
    configs = [c for c in configs if c.layers == "all" or c.weights]
    found = score(fuser, configs, request)
    assert [*found.values()] == close([found["origin"]] * len(found))
    assert any(c.split for c in configs)
    assert any(c.mixed for c in configs)


@pytest.mark.parametrize("keep", [1, 2])
def test_dropped_segments_have_a_weight_of_zero(fuser, keep):
    config = Fused(keep=keep)
    scores = score(fuser, [config])
    likely = Study(fuser.model, ())._run_segments(encode(fuser, REQUEST)).likelihood
    weights = [float(value in likely.sort().values[-keep:]) for value in likely]
    assert sum(weights) == keep
    request = replace(REQUEST, weights=weights)
    assert scores[config.name] == close(engine_score(fuser, "fused_weighted", request))


def test_equal_segments_are_one_that_is_turned_to(fuser):
    """At balance 0 three copies weigh three times as much as one: a bias of log 3."""
    request = replace(REQUEST, segments=SEGMENTS[:1] * 3)
    found = score(fuser, [Fused(balance=0.0)], request)
    assert found["fused balance=0"] == close(found["origin balance=0"])
    assert found["fused balance=0"] != close(found["origin"])
    assert found["prob_avg balance=0"] == close(found["origin balance=0"])


def test_levelled_segments_get_their_weights_as_attention():
    shared, own = torch.randn(2, 1, 4, 9), torch.randn(2, 1, 4, 3)
    bias = torch.tensor([[0.2, 0.3, 0.5]]).log()
    before = shared.clone()
    before[..., 2:4] += bias[0, 0]
    before[..., 4:8] += bias[0, 1]
    before[..., 8:] += bias[0, 2]
    after = before.clone()
    regroup_scores(after, own, (2, 4, 1), bias, [Fused(contrast=0.0)])

    def masses(scores):
        probs = torch.cat((scores, own), -1).softmax(-1)
        return torch.stack([p.sum(-1) for p in probs[..., 2:9].split((2, 4, 1), -1)], -1)

    old, new = masses(before), masses(after)
    torch.testing.assert_close(new.sum(-1), old.sum(-1))
    shares = new / new.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, bias.exp().expand_as(shares))


def test_mixed_attention_is_the_mean_of_attentions():
    plain, own = torch.randn(2, 1, 4, 9), torch.randn(2, 1, 4, 3)
    weights = torch.tensor([0.2, 0.3, 0.5])
    spans = [slice(2, 4), slice(4, 8), slice(8, 9)]
    expected = torch.zeros(2, 1, 4, 12)
    for weight, span in zip(weights, spans, strict=True):
        scores = torch.cat((plain, own), -1)
        hidden = [other for other in spans if other != span]
        for other in hidden:
            scores[..., other] = -math.inf
        expected += weight * scores.softmax(-1)
    shared = plain.clone()
    for weight, span in zip(weights, spans, strict=True):
        shared[..., span] += weight.log()
    regroup_scores(shared, own, (2, 4, 1), weights.log()[None], [Fused(mixed=True)])
    torch.testing.assert_close(torch.cat((shared, own), -1).softmax(-1), expected)


def test_a_sharp_prompt_is_sharp_fusion_of_one_segment(fuser):
    config = Fused(LIKELIHOOD, sharpness=1.5)
    alone = [score(fuser, [config], replace(REQUEST, segments=[text])) for text in SEGMENTS]
    values = [found[config.name] for found in alone]
    together = score(fuser, [config])
    assert together["origin sharpness=1.5"] == close(values[0])
    assert together["mean single sharpness=1.5"] == close(sum(values) / 3)
    assert together["best single sharpness=1.5"] == close(max(values))
    assert together["weighted_max likelihood@1 sharpness=1.5"] in [close(v) for v in values]
    assert together["origin sharpness=1.5"] != close(together["origin"])


def test_a_tree_holds_shared_beginnings_once():
    tree = make_tree([7, 8], [[1, 2, 3], [1, 2, 4], [1], [5, 6]])
    assert tree.token_ids == (7, 8, 1, 2, 5)
    assert tree.offsets == (0, 1, 2, 3, 2)
    assert tree.readers == (1, 2, 3, 4)
    assert tree.own_mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    logprobs = torch.tensor([-float(2**pair) for pair in range(len(tree.asked))])
    sums = [sum(-(2.0**pair) for pair in answer) for answer in tree.answers]
    assert float(tree.best(logprobs)) == max(sums)
    with pytest.raises(UsageError, match="suffix"):
        make_tree([], [[1]])


# What is tried, and on what


def test_names_tell_configurations_apart():
    names = [config.name for config in CONFIGS]
    assert len(set(names)) == len(names) == len(set(CONFIGS))
    assert len(set(WEIGHTINGS)) == len(WEIGHTINGS)
    assert not any("," in name for name in names)
    assert Fused(LIKELIHOOD, sharpness=0.9).name == "fused likelihood@1 sharpness=0.9"
    assert choose_configs("all") == CONFIGS
    assert choose_configs("fused,fused keep=2") == (Fused(), Fused(keep=2))
    assert len(choose_configs("fused balance=?,fused balance=0.?5")) == 3
    with pytest.raises(UsageError, match="no name matches"):
        choose_configs("fusd")


def test_ensembles_with_the_same_weights_are_found_by_name():
    names = ["prob_avg", "logit_avg", "prob_max", "weighted_avg likelihood@1", "weighted_max top@1"]
    assert same_weights_of("fused", names) == ["logit_avg", "prob_avg"]
    assert same_weights_of("fused keep=2", names) == ["logit_avg", "prob_avg"]
    assert same_weights_of("fused likelihood@1 split=2", names) == ["weighted_avg likelihood@1"]
    assert same_weights_of("prob_avg", names) == []
    names += ["prob_avg sharpness=1.5", "weighted_avg likelihood@1 sharpness=1.5"]
    names += ["prob_avg balance=0.5 sharpness=1.5"]
    both = same_weights_of("fused balance=0.5 sharpness=1.5", names)
    assert both == ["logit_avg", "prob_avg", "prob_avg balance=0.5 sharpness=1.5"]
    sharp = same_weights_of("fused sharpness=1.5", names)
    assert sharp == ["logit_avg", "prob_avg", "prob_avg sharpness=1.5"]
    assert same_weights_of("fused likelihood@1 sharpness=1.5", names) == [
        "weighted_avg likelihood@1",
        "weighted_avg likelihood@1 sharpness=1.5",
    ]
    assert same_weights_of("fused sharpness=0.7", names) == ["logit_avg", "prob_avg"]


def test_shots_of_any_draw_are_no_items():
    dataset = load_dataset(str(QUESTIONS))
    options = {"shots": 3, "draws": 3, "seed": 0, "limit": None}
    items, drawn = choose_work(dataset, half=None, **options)
    shots = {shot.id for chosen in drawn for shot in chosen}
    assert len(drawn) == 3
    assert len(shots) > 3
    assert {item.id for item in items} == {item.id for item in dataset.items} - shots
    halves = [choose_work(dataset, half=half, **options)[0] for half in ("tune", "confirm")]
    assert all(halves)
    assert {i.id for part in halves for i in part} == {i.id for i in items}
    assert not {i.id for i in halves[0]} & {i.id for i in halves[1]}
    assert {half_of(i.id) for i in halves[0]} == {"tune"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = make_model("llama", max_position_embeddings=2048)
    return write_hub_folder(tmp_path_factory.mktemp("study") / "tiny", model)


def test_the_first_draw_is_a_run_of_evaluate(tiny, tmp_path, capsys):
    given = ["--dataset", str(QUESTIONS), "--model", str(tiny), "--shots", "2"]
    given += ["--paraphrases", "3", "--limit", "4"]
    table = tmp_path / "study.parquet"
    wanted = "fused,fused likelihood@1"
    assert main([*given, "--draws", "1", "--configs", wanted, "--output", str(table)]) == 0
    run = tmp_path / "run"
    more = ["--no-compile", "--max-new-tokens", "1", "--weights", "likelihood"]
    assert evaluate([*given, *more, "--beta", "1", "--output", str(run)]) == 0
    import pandas

    rows = pandas.read_parquet(table)
    ours = {(r.item, r.config): r.logprob for r in rows.itertuples()}
    names = {
        "origin": "origin",
        "prob_avg": "prob_avg",
        "logit_avg": "logit_avg",
        "fused": "fused",
        "fused_weighted": "fused likelihood@1",
        "weighted_avg": "weighted_avg likelihood@1",
    }
    checked = 0
    for line in (run / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["method"] in names and record["answer_logprob"] is not None:
            expected = close(record["answer_logprob"])
            assert ours[record["id"], names[record["method"]]] == expected
            checked += 1
    assert checked == 4 * len(names)


def test_a_table_and_its_report(tiny, tmp_path, capsys):
    given = ["--dataset", str(QUESTIONS), "--model", str(tiny), "--shots", "2", "--draws", "2"]
    given += ["--paraphrases", "3", "--configs", "fused,fused confidence@1"]
    paths = []
    for half in ("tune", "confirm"):
        paths.append(tmp_path / f"{half}.parquet")
        assert main([*given, "--limit", "8", "--half", half, "--output", str(paths[-1])]) == 0
    capsys.readouterr()
    assert main(["report", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert f"{QUESTIONS} tune: 2 draws of" in printed
    assert f"{QUESTIONS} confirm: 2 draws of" in printed
    for name in ("best single", "prob_avg", "fused", "weighted_max confidence@1"):
        assert f"\n| {name} |" in printed
    assert main(["report", str(paths[0]), str(paths[0])]) == 2
    assert "same draw" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.parquet")]) == 2
    assert len(read_cubes(paths)) == 2


# The report


def test_the_report_measures_against_the_right_references():
    names = ("origin", "best single", *ENSEMBLES, "weighted_avg top@1", "fused", "fused top@1")
    values = [-3.0, -1.0, -2.0, -2.2, -2.4, -1.9, -2.1, -1.5]
    logprobs = np.tile(np.array(values), (2, 3, 1))
    lines = make_report([Cube("set tune", names, logprobs)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    of = {row[0]: row[1:] for row in cells}
    # The best ensemble is logit_avg at -2: half of the distance to -1.
    assert of["fused top@1"] == [
        "-1.500",
        "+0.700 [+0.700, +0.700]",
        "+0.500 [+0.500, +0.500]",
        "+0.500 [+0.500, +0.500]",
        "+0.400 [+0.400, +0.400]",
        "50 %",
    ]
    assert of["fused"][4] == "-0.100 [-0.100, -0.100]"
    assert of["prob_max"][4] == ""
    order = [row[0] for row in cells if row[0] in names]
    assert order == sorted(names, key=lambda name: -values[names.index(name)])


def test_resamples_hold_the_spread_of_draws_and_items():
    generator = np.random.default_rng(0)
    draws, items = generator.normal(0, 0.5, (5, 1, 1)), generator.normal(0, 2, (1, 50, 1))
    logprobs = np.concatenate((draws + items, draws + items + 1), axis=2)
    means = resample_means(logprobs.swapaxes(0, 1), num_resamples=4000)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1.0)
    expected = math.sqrt(draws.var() / 5 + items.var() / 50)
    assert means[:, 0].std() == pytest.approx(expected, rel=0.05)
    assert means[:, 0].mean() == pytest.approx(logprobs[..., 0].mean(), abs=4 * expected / 60)
