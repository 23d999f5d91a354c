"""Requests inside a chat template."""

import shutil

import pytest
from engine_cases import assert_same, check_generation, flat
from reference import Case

import minifuse
from minifuse import chat
from minifuse import engine as engine_module
from minifuse.engine import Request
from minifuse.errors import UsageError

STRIPPING = (
    "<|start|>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}"
    "<|start|>>"
)


@pytest.fixture(scope="module")
def chat_fuser(bos_folder, tmp_path_factory):
    """A template that strips messages, on a tokenizer that adds a BOS of its own."""
    folder = shutil.copytree(bos_folder, tmp_path_factory.mktemp("engine") / "chat")
    (folder / "chat_template.jinja").write_text(STRIPPING)
    return minifuse.load(folder, compile=False)


def test_chat_is_the_template_around_the_message(chat_fuser, truth):
    """BOS stands where the template writes it, and nowhere else."""
    request = {"prefix": " \n def f:\n", "segments": ["a key? \n", "the value?"], "suffix": "A:"}
    results = chat_fuser.generate(**request, chat=True, methods="all", max_new_tokens=3)
    tokenizer = chat_fuser.model.tokenizer

    def encode(text):
        return tuple(tokenizer.encode(text, is_start=False))

    start, end = (tokenizer.token_id(token) for token in ("<|start|>", "<|end|>"))
    case = Case(
        prefix_ids=(start, *encode("[user]"), *encode("def f:\n")),
        segment_ids=(encode("a key?"), encode("the value?")),
        suffix_ids=(end, start, *encode(">"), *encode("A:")),
    )
    for generation in flat(results):
        if generation.method != "vote":
            check_generation(chat_fuser, truth, case, generation, max_new_tokens=3)
    plain = chat_fuser.generate(**request, methods=["origin"], max_new_tokens=3)
    assert plain["origin"].logprobs != results["origin"].logprobs


def test_chat_is_rendered_once_for_each_way_of_asking(chat_fuser, monkeypatch):
    calls = []
    monkeypatch.setattr(
        engine_module,
        "render_frame",
        lambda *args, **kwargs: calls.append(kwargs) or render(*args, **kwargs),
    )
    render = chat.render_frame
    fuser = minifuse.Fuser(chat_fuser.model, compile=False)
    for system in (None, "Be brief.", None, "Be brief.", "Be long."):
        fuser.generate(segments=["a key?"], chat=True, system=system, max_new_tokens=1)
    assert [call["system"] for call in calls] == [None, "Be brief.", "Be long."]


def test_chat_scores_and_batches_as_one_request(chat_fuser):
    options = {"chat": True, "system": "x", "methods": ["fused", "prob_avg"]}
    request = {"segments": ["a key?", "value"]}
    (batched,) = chat_fuser.generate_batch([Request(**request)], **options, max_new_tokens=2)
    assert_same(batched, chat_fuser.generate(**request, **options, max_new_tokens=2))
    scores = chat_fuser.score(**request, **options, continuations=[" the", "é"])
    assert all(value < 0 for values in scores.values() for value in values)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chat": True}, "segment 2 is ' ', which is empty"),
        ({"chat": "yes"}, "chat is 'yes'; wanted True or False"),
        ({"system": "x"}, "system is for a chat template"),
        ({"chat_variables": {"a": 1}}, "chat_variables is for a chat template"),
        ({"chat": True, "system": 3}, "system is int; wanted a string"),
        ({"chat": True, "chat_variables": [1]}, r"chat_variables is \[1\]; wanted a dict"),
        ({"chat": True, "chat_variables": {"messages": []}}, "'messages' is set by minifuse"),
    ],
)
def test_bad_chat_options(chat_fuser, options, match):
    with pytest.raises(UsageError, match=match):
        chat_fuser.generate(segments=["a", " "], **options)


def test_promise_9_holds_in_chats(chat_fuser):
    result = chat_fuser.generate(
        segments=["<|end|>", "<|start|> a"], chat=True, max_new_tokens=1, methods=["concat"]
    )
    segments = [e for e in result["concat"].layout if e.part == "segment"]
    controls = chat_fuser.model.tokenizer.control_ids
    assert controls.isdisjoint(id for entry in segments for id in entry.token_ids)
