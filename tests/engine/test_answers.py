"""Drawn answers, and where answers end."""

from dataclasses import replace

import torch
from engine_cases import (
    EVERY_METHOD,
    REQUEST,
    TOLERANCE,
    assert_identical,
    assert_same,
    check_results,
    flat,
    make_case,
)

import minifuse
from minifuse.engine import Request

SAMPLED = {"temperature": 1.3, "max_new_tokens": 8}


def test_a_seed_repeats(fuser):
    one = fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=3)
    assert_identical(fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=3), one)
    other = fuser.generate(**REQUEST, **SAMPLED, methods="all", seed=4)
    assert one["fused"].token_ids != other["fused"].token_ids
    # Within a call, too, methods and paraphrases draw apart.
    assert len({g.token_ids for g in flat(one)}) >= 10


def test_other_methods_in_the_call_change_nothing(fuser):
    together = fuser.generate(**REQUEST, **SAMPLED, methods="all")
    for method in EVERY_METHOD:
        alone = fuser.generate(**REQUEST, **SAMPLED, methods=[method])
        assert_same(alone, {method: together[method]})


def test_the_place_in_a_batch_changes_nothing(fuser):
    batch = [Request(**REQUEST), Request(["return 42"]), Request(**REQUEST)]
    options = {"methods": ["fused", "per_prompt", "prob_avg"], **SAMPLED}
    results = fuser.generate_batch(batch, **options)
    assert_same(results[0], results[2])
    assert_same(results[0], fuser.generate(**REQUEST, **options))
    assert_same(results[1], fuser.generate(segments=["return 42"], **options))


def test_sampled_logprobs_are_those_of_the_method(fuser, truth):
    """All streams of an ensemble got the tokens that were drawn, and logprobs are unfiltered."""
    results = fuser.generate(**REQUEST, **SAMPLED, top_k=20, top_p=0.9, methods="all")
    case = make_case(fuser, **REQUEST)
    for generation in flat(results):
        if generation.method == "vote":
            continue
        logprobs = truth.logprobs(
            case, generation.method, generation.token_ids, generation.paraphrase_index
        )
        wanted = [float(logprobs[i, t]) for i, t in enumerate(generation.token_ids)]
        torch.testing.assert_close(list(generation.logprobs), wanted, atol=TOLERANCE, rtol=0)


def test_filters_keep_what_they_should(fuser, truth):
    case = make_case(fuser, **REQUEST)
    best = truth.logprobs(case, "fused", ())[0].argsort(descending=True).tolist()
    greedy = fuser.generate(**REQUEST, max_new_tokens=4)
    options = {"temperature": 2.0, "max_new_tokens": 4}
    assert_same(fuser.generate(**REQUEST, **options, top_k=1), greedy)
    assert_same(fuser.generate(**REQUEST, **options, top_p=1e-9), greedy)
    assert_same(fuser.generate(**REQUEST, temperature=1e-6, max_new_tokens=4), greedy)
    options["max_new_tokens"] = 1
    drawn = {
        fuser.generate(**REQUEST, **options, top_k=3, seed=seed)["fused"].token_ids[0]
        for seed in range(40)
    }
    # Nearly equal probabilities: each of the three is missed with (2/3)**40 = 1e-7 or so.
    assert drawn == set(best[:3])


# Where answers end


def first_texts(fuser, length=12):
    return fuser.generate(**REQUEST, max_new_tokens=length)["fused"]


def test_stop_strings_within_and_across_tokens(fuser):
    full = first_texts(fuser)
    pieces = [fuser.model.tokenizer.decode([i]) for i in full.token_ids]
    # The end of one token with the start of the next, where both are whole characters.
    at = next(i for i in range(2, 11) if "\ufffd" not in pieces[i] + pieces[i + 1])
    across = pieces[at][-1] + pieces[at + 1][0]
    place = full.text.index(across)
    for stop in (across, [across], ["never there", across]):
        result = fuser.generate(**REQUEST, max_new_tokens=12, stop=stop)["fused"]
        assert result.text == full.text[:place]
        assert result.finish_reason == "stop"
        assert result.token_ids == full.token_ids[: len(result.token_ids)]
        assert across in fuser.model.tokenizer.decode(result.token_ids)
        assert across not in fuser.model.tokenizer.decode(result.token_ids[:-1])
        assert len(result.logprobs) == len(result.token_ids)
    first_of_two = fuser.generate(**REQUEST, max_new_tokens=12, stop=[full.text[-1], full.text[:1]])
    assert first_of_two["fused"].text == ""
    unmet = fuser.generate(**REQUEST, max_new_tokens=12, stop="never there")["fused"]
    assert (unmet.text, unmet.finish_reason) == (full.text, "length")


def test_end_tokens_end_an_answer_and_stay_out_of_it(fuser):
    full = first_texts(fuser)
    end = full.token_ids[4]
    model = replace(fuser.model, eos_token_ids=(9999, end))
    cut = minifuse.Fuser(model, compile=False).generate(**REQUEST, max_new_tokens=12)["fused"]
    length = full.token_ids.index(end)
    assert cut.token_ids == full.token_ids[:length]
    assert cut.logprobs == full.logprobs[:length]
    assert cut.finish_reason == "stop"
    assert cut.text == fuser.model.tokenizer.decode(cut.token_ids)


def test_an_answer_may_be_empty(fuser):
    first = first_texts(fuser).token_ids[0]
    model = replace(fuser.model, eos_token_ids=(first,))
    results = minifuse.Fuser(model, compile=False).generate(**REQUEST, methods="all")
    fused = results["fused"]
    assert (fused.text, fused.token_ids, fused.logprobs) == ("", (), ())
    assert fused.finish_reason == "stop"


def test_answers_of_one_call_end_at_different_steps(fuser, truth):
    """The streams that are left go on with their own slots and positions."""
    results = fuser.generate(**REQUEST, methods="all", max_new_tokens=10)
    end = results["per_prompt"][0].token_ids[3]
    model = replace(fuser.model, eos_token_ids=(end,))
    short = minifuse.Fuser(model, compile=False)
    results = short.generate(**REQUEST, methods="all", max_new_tokens=10)
    assert len({len(g.token_ids) for g in flat(results)}) > 1
    check_results(short, truth, results, REQUEST, max_new_tokens=10)
