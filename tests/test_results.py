"""Answers as they grow, the vote, and the fields of a JSON result."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifuse.layout import Part
from minifuse.normalize import normalize_answer
from minifuse.results import Generation, LayoutEntry, TextBuilder, pick_winner
from minifuse.tokenizer import Tokenizer

EOS = 0


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_folder) -> Tokenizer:
    """A byte-level BPE: most tokens are single bytes, so that characters are cut up, too."""
    return Tokenizer.from_folder(tiny_llama_folder)


def make_builder(tokenizer, stop=(), max_new_tokens=1000) -> TextBuilder:
    return TextBuilder(tokenizer.stream(), stop, (EOS,), max_new_tokens)


def tokens_of(tokenizer, *texts: str) -> list[int]:
    """Token ids of texts that are encoded one by one: no token spans two of them."""
    return [i for text in texts for i in tokenizer.encode(text, is_start=False)]


def feed(builder: TextBuilder, token_ids) -> list[str]:
    """Push tokens until the answer ends; the pieces that came out."""
    pieces = []
    for token_id in token_ids:
        pieces.append(builder.push(token_id, -0.5))
        assert "".join(pieces) == builder.text[: sum(map(len, pieces))]
        if builder.finish_reason:
            break
    return pieces


def test_text_comes_token_by_token(tokenizer):
    builder = make_builder(tokenizer)
    token_ids = tokens_of(tokenizer, "Z", "q", "7")
    assert feed(builder, token_ids) == ["Z", "q", "7"]
    assert builder.token_ids == token_ids
    assert builder.logprobs == [-0.5] * 3
    assert builder.finish_reason is None


def test_eos_ends_the_answer_and_is_no_part_of_it(tokenizer):
    builder = make_builder(tokenizer)
    token_ids = tokens_of(tokenizer, "Z", "q")
    assert feed(builder, [*token_ids, EOS, *token_ids]) == ["Z", "q", ""]
    assert builder.token_ids == token_ids
    assert len(builder.logprobs) == 2
    assert (builder.text, builder.finish_reason) == ("Zq", "stop")


def test_eos_at_once_is_an_empty_answer(tokenizer):
    builder = make_builder(tokenizer)
    assert builder.push(EOS, -0.1) == ""
    assert (builder.token_ids, builder.text, builder.finish_reason) == ([], "", "stop")


def test_length_ends_the_answer(tokenizer):
    builder = make_builder(tokenizer, max_new_tokens=2)
    assert feed(builder, tokens_of(tokenizer, "Z", "q", "7")) == ["Z", "q"]
    assert (builder.text, builder.finish_reason) == ("Zq", "length")
    assert len(builder.token_ids) == 2


def test_a_stop_string_across_tokens(tokenizer):
    builder = make_builder(tokenizer, stop=("\n\nQ:",))
    token_ids = tokens_of(tokenizer, "Z", "\n", "\n", "Q", ":", "x")
    # What may become the stop string is held back until it does.
    assert feed(builder, token_ids) == ["Z", "", "", "", ""]
    assert (builder.text, builder.finish_reason) == ("Z", "stop")
    # The tokens go through the one that completed it.
    assert builder.token_ids == token_ids[:-1]
    assert len(builder.logprobs) == 5


def test_held_back_text_comes_once_it_is_no_stop_string(tokenizer):
    builder = make_builder(tokenizer, stop=("\n\nQ:",))
    token_ids = tokens_of(tokenizer, "Z", "\n", "\n", "\n", "Q", "x")
    assert feed(builder, token_ids) == ["Z", "", "", "\n", "", "\n\nQx"]
    assert builder.finish_reason is None


@pytest.mark.parametrize(("end", "reason"), [("eos", "stop"), ("length", "length")])
def test_held_back_text_comes_at_the_end(tokenizer, end, reason):
    token_ids = tokens_of(tokenizer, "Z", "\n")
    builder = make_builder(tokenizer, stop=("\n\n",), max_new_tokens=2 if end == "length" else 9)
    assert "".join(feed(builder, [*token_ids, EOS])) == "Z\n"
    assert (builder.text, builder.finish_reason) == ("Z\n", reason)


def test_a_stop_string_that_is_the_last_token_allowed(tokenizer):
    builder = make_builder(tokenizer, stop=("q",), max_new_tokens=2)
    feed(builder, tokens_of(tokenizer, "Z", "q"))
    assert (builder.text, builder.finish_reason) == ("Z", "stop")


def test_the_first_of_several_stop_strings_cuts(tokenizer):
    builder = make_builder(tokenizer, stop=("7Z", "q7", "x"))
    assert feed(builder, tokens_of(tokenizer, "Z", "q", "7", "Z")) == ["Z", "", ""]
    assert (builder.text, builder.finish_reason) == ("Z", "stop")


def test_half_a_character_is_held_back(tokenizer):
    euro = tokens_of(tokenizer, "€")
    assert len(euro) == 3
    builder = make_builder(tokenizer)
    assert feed(builder, [*euro, *euro]) == ["", "", "€", "", "", "€"]


@pytest.mark.parametrize(("end", "reason"), [("eos", "stop"), ("length", "length")])
def test_half_a_character_at_the_end_is_a_replacement(tokenizer, end, reason):
    token_ids = tokens_of(tokenizer, "Z", "€")[:3]
    builder = make_builder(tokenizer, max_new_tokens=3 if end == "length" else 9)
    pieces = feed(builder, [*token_ids, EOS])
    assert "".join(pieces) == builder.text == tokenizer.decode(token_ids)
    assert builder.text.rstrip("\N{REPLACEMENT CHARACTER}") == "Z"
    assert builder.finish_reason == reason


def test_a_stop_string_of_half_a_character_at_the_end(tokenizer):
    """What the end itself brings out is searched, too."""
    builder = make_builder(tokenizer, stop=("\N{REPLACEMENT CHARACTER}",))
    pieces = feed(builder, [*tokens_of(tokenizer, "Z", "€")[:3], EOS])
    assert ("".join(pieces), builder.text, builder.finish_reason) == ("Z", "Z", "stop")


def naive_answer(tokenizer, token_ids, stop, max_new_tokens):
    """Decode everything anew at every token: (text, tokens used, why it ended)."""
    for count, token_id in enumerate(token_ids, 1):
        ids = token_ids[:count]
        is_end = token_id == EOS or count == max_new_tokens
        if token_id == EOS:
            ids = ids[:-1]
        text = tokenizer.decode(ids)
        if not is_end:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found = [text.index(s) for s in stop if s in text]
        if found:
            return text[: min(found)], len(ids), "stop"
        if is_end:
            return text, len(ids), "stop" if token_id == EOS else "length"
    return text, len(ids), None


TEXTS = st.lists(st.text("ab\n €😀", min_size=1, max_size=4), min_size=1, max_size=8)
STOPS = st.lists(st.text("ab\n €", min_size=1, max_size=4), max_size=3)


@given(
    texts=TEXTS,
    stop=STOPS,
    cut=st.integers(0, 30),
    has_eos=st.booleans(),
    max_new_tokens=st.integers(1, 40),
)
def test_any_answer_equals_a_naive_search(tokenizer, texts, stop, cut, has_eos, max_new_tokens):
    token_ids = tokens_of(tokenizer, *texts)
    token_ids = token_ids[: max(1, len(token_ids) - cut)] + [EOS] * has_eos
    builder = make_builder(tokenizer, stop, max_new_tokens)
    pieces = feed(builder, token_ids)
    text, used, reason = naive_answer(tokenizer, token_ids, stop, max_new_tokens)
    assert builder.finish_reason == reason
    assert builder.token_ids == token_ids[:used]
    assert len(builder.logprobs) == used
    sent = "".join(pieces)
    if reason is not None:
        assert sent == builder.text == text
    else:
        assert builder.text == text
        # Held back: the longest end that some stop string begins with, and no more.
        ends = [text[i:] for i in range(len(text)) if any(s.startswith(text[i:]) for s in stop)]
        assert text.removeprefix(sent) == max(ends, key=len, default="")


def finished(tokenizer, text: str, *logprobs: float) -> TextBuilder:
    """A real answer of this text; its log-probabilities in order, the last one repeated."""
    builder = make_builder(tokenizer)
    token_ids = tokens_of(tokenizer, text) if text else []
    for i, token_id in enumerate(token_ids):
        builder.push(token_id, logprobs[min(i, len(logprobs) - 1)])
    builder.push(EOS, -1.0)
    assert builder.text == text
    return builder


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        # The majority, however sure the others are.
        ([("Rome", -0.01), ("Paris", -3.0), ("Paris", -3.0)], "Paris"),
        # Compared after normalisation; the surest wording speaks for its group.
        ([("Rome", -0.01), (" paris.", -3.0), ("The Paris", -2.0)], "The Paris"),
        # Ties by mean log-probability per token, not by the sum.
        ([("Rome", -1.0), ("Constantinople", -0.9)], "Constantinople"),
        ([("Rome", -1.0), ("Rome", -3.0), ("Paris", -1.5), ("Paris", -1.6)], "Paris"),
        # An empty answer has no vote, unless there is no other.
        ([("", -0.1), ("...", -0.1), ("Paris", -9.0)], "Paris"),
        ([("", -0.1), ("", -0.1)], ""),
        ([("Paris", -1.0)], "Paris"),
    ],
)
def test_the_vote(tokenizer, answers, winner):
    built = [finished(tokenizer, text, logprob) for text, logprob in answers]
    for order in itertools.permutations(built):
        assert order[pick_winner(order)].text == winner


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Paris", "paris.", "the Paris", "Rome", "rome", "", "..."]),
            st.sampled_from([-0.25, -0.5, -1.0]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_order_never_matters(tokenizer, answers, random):
    built = [finished(tokenizer, text, logprob) for text, logprob in answers]
    chosen = built[pick_winner(built)]
    shuffled = random.sample(built, len(built))
    again = shuffled[pick_winner(shuffled)]
    assert (again.text, again.logprobs) == (chosen.text, chosen.logprobs)
    # And it is a majority.
    names = [normalize_answer(text) for text, _ in answers]
    spoken = [name for name in names if name] or names
    assert spoken.count(normalize_answer(chosen.text)) == max(map(spoken.count, spoken))


def make_generation(**changes) -> Generation:
    fields = {
        "method": "fused_weighted",
        "paraphrase_index": None,
        "text": "Paris",
        "token_ids": (5, 6),
        "logprobs": (-0.5, -0.25),
        "finish_reason": "stop",
        "prompt_tokens": 12,
        "weights": (0.25, 0.75),
        "weights_source": "given",
        "model": "tiny",
        "source": "folder sha256:0",
        "dtype": "float32",
        "quantize": None,
        "positions": "aligned",
        "seed": 3,
        "layout": (LayoutEntry(Part.PREFIX, None, (1,), (0, 1), (4,)),),
        "timings": {"load_s": 0.1, "compile_s": 0.0, "prefill_ms": 2.0, "decode_ms": [1.0]},
        "recompiles": 0,
    }
    return Generation(**{**fields, **changes})


def test_the_fields_of_a_json_result():
    """Exactly those of the design, in its order."""
    names = """
        id method paraphrase_index text token_ids logprobs finish_reason prompt_tokens weights
        model source dtype quantize positions seed timings recompiles
    """
    result = make_generation().to_json("q1")
    assert list(result) == names.split()
    assert result["id"] == "q1"
    assert result["weights"] == {"source": "given", "values": [0.25, 0.75]}
    assert list(result["timings"]) == ["load_s", "compile_s", "prefill_ms", "decode_ms"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_methods_without_weights_have_none():
    result = make_generation(weights=None, weights_source=None).to_json()
    assert result["weights"] is None
    assert result["id"] is None
