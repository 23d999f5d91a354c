"""Answers token by token."""

import pytest
from engine_cases import REQUEST, assert_identical, count_calls, flat

from minifuse.errors import UsageError


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_stream_is_generate(fuser, temperature):
    options = {"methods": "all", "max_new_tokens": 8, "temperature": temperature, "stop": ["\n"]}
    wanted = fuser.generate(**REQUEST, **options)
    events = []
    stream = fuser.stream(**REQUEST, **options)
    while True:
        try:
            events.append(next(stream))
        except StopIteration as stop:
            assert_identical(stop.value, wanted)
            break
    for generation in flat(wanted):
        own = [
            e
            for e in events
            if (e.method, e.paraphrase_index) == (generation.method, generation.paraphrase_index)
        ]
        assert "".join(e.text for e in own) == generation.text
        assert [e.finish_reason for e in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == generation.finish_reason
        if generation.method == "vote":
            assert len(own) == 1
            continue
        ids = [e.token_id for e in own if e.token_id not in fuser.model.eos_token_ids]
        assert tuple(ids) == generation.token_ids
        assert tuple(e.logprob for e in own[: len(ids)]) == generation.logprobs


def test_closing_a_stream_stops_the_work(fuser, monkeypatch):
    wanted = fuser.generate(**REQUEST, max_new_tokens=5)
    calls = count_calls(fuser, monkeypatch)
    stream = fuser.stream(**REQUEST, max_new_tokens=500)
    assert not calls, "nothing runs before the first event is asked for"
    for _ in range(3):
        next(stream)
    before = calls.copy()
    assert before["decode"] <= 4  # the suffix, then one for each further token
    stream.close()
    assert calls == before
    with pytest.raises(StopIteration):
        next(stream)
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)


def test_a_stream_that_is_abandoned_or_fails_leaves_the_fuser_usable(fuser):
    wanted = fuser.generate(**REQUEST, max_new_tokens=5)
    stream = fuser.stream(**REQUEST, max_new_tokens=50)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)
    abandoned = fuser.stream(**REQUEST, max_new_tokens=50)
    next(abandoned)
    del abandoned
    assert_identical(fuser.generate(**REQUEST, max_new_tokens=5), wanted)


def test_two_interleaved_streams_do_not_disturb_each_other(fuser):
    other = {**REQUEST, "segments": ["return 42", "def model"], "suffix": " ="}
    options = {"methods": ["fused", "logit_avg", "concat"], "max_new_tokens": 10}
    wanted = [fuser.generate(**REQUEST, **options), fuser.generate(**other, **options)]
    streams = [fuser.stream(**REQUEST, **options), fuser.stream(**other, **options)]
    results = [None, None]
    while None in results:
        for number in (0, 1):
            try:
                if results[number] is None:
                    next(streams[number])
            except StopIteration as stop:
                results[number] = stop.value
        fuser.score(**REQUEST, continuations=["42"])  # and a third caller in between
    for ours, theirs in zip(results, wanted, strict=True):
        assert_identical(ours, theirs)


def test_stream_checks_its_input_at_the_call(fuser):
    with pytest.raises(UsageError, match="segments is empty"):
        fuser.stream(segments=[])
