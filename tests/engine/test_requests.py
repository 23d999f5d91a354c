"""Requests that cannot be run, and those that just can."""

from dataclasses import replace

import pytest
from engine_cases import REQUEST, check_results, count_calls, flat, make_case

import minifuse
from minifuse.engine import Request
from minifuse.errors import MinifuseError, UsageError
from minifuse.loader import load_model
from minifuse.request import make_plan


def bad(match, status=2, **changes):
    return pytest.param({**REQUEST, **changes}, match, status, id=match[:40])


@pytest.mark.parametrize(
    ("request_", "match", "status"),
    [
        bad("segments is empty; wanted at least one", segments=[]),
        bad("segments is str; wanted a list of strings", segments="one"),
        bad("segments is NoneType; wanted a list", segments=None),
        bad("segment 2 is '', which is empty", segments=["a", ""]),
        bad("segment 1 is int; wanted a string", segments=[3]),
        bad("prefix is NoneType; wanted a string", prefix=None),
        bad("suffix is list; wanted a string", suffix=["A"]),
        bad("lone surrogate U\\+D800", segments=["a\ud800"]),
        bad("got 2 weights for 3 segments", weights=[1, 2]),
        bad("got 0 weights for 3 segments", weights=[]),
        bad("a weight is -1; wanted finite", weights=[-1, 1, 1]),
        bad("a weight is nan; wanted finite", weights=[1, float("nan"), 1]),
        bad("a weight is inf; wanted finite", weights=[1, float("inf"), 1]),
        bad("a weight is '1'; wanted finite", weights=["1", 1, 1]),
        bad("a weight is True; wanted finite", weights=[True, 1, 1]),
        bad("all weights are 0; wanted at least one", weights=[0, 0, 0]),
        bad("weights are 'entropy'; wanted numbers or one of", weights="entropy"),
        bad("method is 'fuse'; wanted one of origin", methods="fuse"),
        bad("method is 'FUSED'; wanted one of origin", methods=["fused", "FUSED"]),
        bad("methods is empty; wanted at least one", methods=[]),
        bad("positions is 'sequential'; wanted one of", positions="sequential"),
        bad("beta is nan; wanted a finite number", beta=float("nan")),
        bad("balance is '1'; wanted a finite number", balance="1"),
        bad("max_new_tokens is 0; wanted an integer", max_new_tokens=0),
        bad("max_new_tokens is -3; wanted an integer", max_new_tokens=-3),
        bad("max_new_tokens is 1.5; wanted an integer", max_new_tokens=1.5),
        bad("temperature is -0.1; wanted a finite", temperature=-0.1),
        bad("top_k is -1; wanted an integer of at", top_k=-1),
        bad("top_p is 0; wanted a number above 0", top_p=0),
        bad("top_p is 1.1; wanted a finite number", top_p=1.1),
        bad("seed is -1; wanted an integer of at", seed=-1),
        bad("stop holds ''; wanted strings that are", stop=[""]),
        bad("stop holds 3; wanted strings that are", stop=[3]),
    ],
)
def test_bad_input(fuser, request_, match, status):
    for call in (fuser.generate, fuser.stream):
        with pytest.raises(MinifuseError, match=match) as error:
            call(**request_)
        assert error.value.exit_status == status
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"continuations": []}, "continuations is \\[\\]; wanted a list of at least one"),
        ({"continuations": "Paris"}, "continuations is 'Paris'; wanted a list"),
        ({"continuations": ["a", ""]}, "continuation 2 is ''; wanted text"),
        ({"continuations": [3]}, "continuation 1 is 3; wanted text"),
        ({"continuations": ["a"], "methods": "vote"}, "vote has no probabilities"),
        ({"continuations": ["a"], "segments": []}, "segments is empty"),
    ],
)
def test_bad_input_to_score(fuser, changes, match):
    with pytest.raises(UsageError, match=match) as error:
        fuser.score(**{**REQUEST, **changes})
    assert error.value.exit_status == 2


def test_bad_input_to_a_batch_stops_it_before_anything_runs(fuser, monkeypatch):
    calls = count_calls(fuser, monkeypatch)
    with pytest.raises(UsageError, match="segments is empty"):
        fuser.generate_batch([Request(["a"])] * 9 + [Request([])])
    assert not calls
    for size in (0, -1, 1.5):
        with pytest.raises(UsageError, match=f"batch_size is {size}"):
            fuser.generate_batch([Request(["a"])], batch_size=size)
    assert fuser.generate_batch([]) == []


def test_a_misspelled_option_is_a_type_error(fuser):
    for call in (fuser.generate, fuser.stream):
        with pytest.raises(TypeError, match="max_tokens"):
            call(**REQUEST, max_tokens=3)
    with pytest.raises(TypeError, match="max_tokens"):
        fuser.generate_batch([Request(**REQUEST)], max_tokens=3)
    with pytest.raises(TypeError, match="temprature"):
        fuser.score(**REQUEST, continuations=["a"], temprature=1)
    with pytest.raises(TypeError, match="sufix"):
        fuser.generate(segments=["a"], sufix="b")


def test_a_prompt_beyond_the_context_is_an_error_with_both_numbers(fuser):
    case = make_case(fuser, **REQUEST)
    prompt = len(case.prompt(0))
    longest = fuser.model.config.max_position_embeddings
    exactly = longest - prompt
    with pytest.raises(UsageError) as error:
        fuser.generate(**REQUEST, methods="origin", max_new_tokens=exactly + 1)
    assert f"needs {longest + 1} positions: a prompt of {prompt}" in str(error.value)
    assert f"the model has {longest}" in str(error.value)
    assert error.value.exit_status == 2
    next(fuser.stream(**REQUEST, methods="origin", max_new_tokens=exactly))  # what fits, runs
    # Segments share positions: only the methods that lay them end to end run out of them.
    many = {"segments": ["the value of the model? " * 20] * 12, "suffix": "A:"}
    fuser.generate(**many, methods="fused", max_new_tokens=1)
    for method in ("concat", "fused_plain"):
        with pytest.raises(UsageError, match=f"{method} needs .* the model has {longest}"):
            fuser.generate(**many, methods=["fused", method], max_new_tokens=1)
    with pytest.raises(UsageError, match=f"the model has {longest}"):
        fuser.score(**REQUEST, continuations=["Z" * longest])


@pytest.mark.parametrize("beta", [1.0, -1.0])
def test_the_longest_segment_counts_wherever_it_stands(fuser, beta):
    """Any segment may turn out heaviest."""
    config = replace(fuser.model.config, max_position_embeddings=40)
    small = minifuse.Fuser(replace(fuser.model, config=config), compile=False)
    for segments in (["Q: Z " * 20, "Q: Z"], ["Q: Z", "Q: Z " * 20]):
        with pytest.raises(UsageError, match="the model has 40"):
            small.generate(segments=segments, suffix="A:", methods=["weighted_max"], beta=beta)


def test_the_last_position_is_as_good_as_any(folder, truth):
    """A context of which a request takes every position."""
    model = load_model(folder)
    case_fuser = minifuse.Fuser(model, compile=False)
    prompt = len(make_case(case_fuser, **REQUEST).prompt(1))
    config = replace(model.config, max_position_embeddings=prompt + 4)
    small = minifuse.Fuser(replace(model, config=config), compile=False)
    results = small.generate(**REQUEST, methods="fused", max_new_tokens=4)
    check_results(small, truth, results, REQUEST, max_new_tokens=4)


@pytest.mark.parametrize("beta", [1.0, -1.0])
def test_whichever_segment_is_the_heaviest_there_is_room(fuser, beta):
    """Room for `weighted_max` beside `origin`, which has the longest segment, and so reads it too
    where that is the heaviest: with one sign of beta the other one is."""
    request = {**REQUEST, "segments": [f"{REQUEST['segments'][0]} 42 3.14", "Q: Z"]}
    options = {"methods": ["origin", "weighted_max"], "beta": beta}
    job = fuser._make_job(Request(**request, weights="likelihood"), make_plan(**options))
    assert job.extent.views == 2
    fuser.generate(**request, weights="likelihood", **options, max_new_tokens=3)


@pytest.mark.parametrize("beta", [1.0, -1.0])
def test_each_count_has_room_for_a_heaviest_of_its_own(fuser, beta):
    request = Request(**{**REQUEST, "segments": ["return key value", "Q: Z", "a", "42 = Z"]})
    options = {"methods": ["origin", "weighted_max"], "beta": beta, "max_new_tokens": 3}
    job = fuser._make_job(request, make_plan(**options), counts=[1, 2, 3, 4])
    assert job.extent.views == 4
    (found,) = fuser.generate_and_score([request], [["42"]], counts=[1, 2, 3, 4], **options)
    assert set(found[1]) == {1, 2, 3, 4}


def test_who_is_done_makes_room(fuser, monkeypatch):
    """Long answers hold nobody up: a step serves who is there, and no more come than fit."""
    requests = [Request(**REQUEST), *[Request(**REQUEST, id=i) for i in range(6)]]
    steps = []
    decode = fuser.executor.decode
    monkeypatch.setattr(
        fuser.executor, "decode", lambda p, groups: steps.append(len(groups)) or decode(p, groups)
    )
    text = fuser.generate(**REQUEST, max_new_tokens=3)["fused"].text
    steps.clear()
    together = fuser.generate_batch(requests, batch_size=4, max_new_tokens=3)
    assert [results["fused"].text for results in together] == [text] * 7
    # Four suffixes and two steps of four, then the other three.
    assert steps == [4, 4, 4, 3, 3, 3]


def test_segments_of_one_token_without_suffix(fuser):
    """Their views take the only token over, so that there is no segment left to encode."""
    ids = fuser.model.tokenizer.encode("Z", is_start=False)
    assert len(ids) == 1
    with pytest.warns(UserWarning, match="a segment of one token has no likelihood"):
        results = fuser.generate(
            prefix="def f:", segments=["Z", "Z"], methods="all", max_new_tokens=2
        )
    plain = results["origin"]
    assert plain.prompt_tokens == len(fuser.model.tokenizer.encode("def f:", is_start=True)) + 1
    assert all(
        g.token_ids == plain.token_ids
        for g in flat(results)
        if g.method not in ("concat", "fused_plain")
    )
