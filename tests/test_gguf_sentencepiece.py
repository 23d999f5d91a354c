"""SentencePiece out of a GGUF: token ids as llama.cpp, SentencePiece and transformers have them."""

# ruff: noqa: RUF001 - texts that look alike are what the tokenizer is tested on

import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_files import SPACE, make_model, make_sentencepiece, write_gguf

from minifuse.convert import convert
from minifuse.errors import CheckpointError, ConfigError, MinifuseError
from minifuse.gguf import read_gguf
from minifuse.loader import load_model
from minifuse.tokenizer import Tokenizer

TEXTS = [
    "a random model",
    "two  spaces,   three,    four ",
    "line\nline\n\nline\r\n\ttab \n x",
    " starts with a space",
    "   starts with three",
    "\n starts with a line",
    "é e\u0301 ß İ ı ﬁ ½ ² x²",
    "你好，世界！ 日本語 한국어 العربية १२३",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 𝔘𝔫𝔦",
    f"{SPACE} {SPACE}{SPACE}x a{SPACE}b",
    "<0x0A> <0xZZ> <unk > <s> x</s>",
    "\u00a0 \u2003 \u3000 \u200b \ufeff",
    "\x01\x02\x7f\x80 \ufffd \U0010ffff",
    "selfself.self model.layers.0.weight tokenizer.ggml.tokens",
    "aaaaaaaaaaaaaaaaaaa eeeeeeee        ________",
    "x",
    " ",
    "  ",
    "\n",
]
# Texts that spell one are another matter, for which there is a test of its own.
SPECIAL = ("<unk>", "<s>", "</s>", "<tool>", "<turn>")
LINES = Path(__file__).read_text(encoding="utf-8").splitlines()


def use(vocabulary, **extra):
    """A change for write_gguf: SentencePiece's keys instead of those of byte-level BPE."""

    def change(metadata, _):
        for key in list(metadata):
            if key.startswith("tokenizer.ggml."):
                del metadata[key]
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": vocabulary["tokens"],
            "tokenizer.ggml.scores": vocabulary["scores"],
            "tokenizer.ggml.token_type": vocabulary["types"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        for key, value in extra.items():
            metadata[f"tokenizer.ggml.{key}"] = value
            if value is None:
                del metadata[f"tokenizer.ggml.{key}"]

    return change


def write(path, vocabulary=None, **extra):
    vocabulary = vocabulary or make_sentencepiece()
    model = make_model("llama", vocab_size=len(vocabulary["tokens"]))
    return write_gguf(path, model, change=use(vocabulary, **extra))


def full(files):
    return tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("spm") / "m.gguf")


@pytest.fixture(scope="module")
def ours(gguf_path):
    return full(read_gguf(gguf_path).tokenizer_files)


@pytest.fixture(scope="module")
def reference(gguf_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


def slow_ids(text, vocabulary, adds_space=True):
    """llama.cpp's way: the two neighbours of the best union are joined, the leftmost of equals."""
    ids = {token: index for index, token in enumerate(vocabulary["tokens"])}
    scores = {
        token: score
        for token, kind, score in zip(
            vocabulary["tokens"], vocabulary["types"], vocabulary["scores"], strict=True
        )
        if kind == 1
    }
    symbols = list((" " * adds_space + text).replace(" ", SPACE)) if text else []
    while True:
        unions = [left + right for left, right in itertools.pairwise(symbols)]
        known = [(-scores[union], at) for at, union in enumerate(unions) if union in scores]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [unions[at]]
    found = []
    for symbol in symbols:
        if symbol in scores:
            found.append(ids[symbol])
        else:
            found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def plain_texts():
    """Over a thousand, none of which spells a special token."""
    texts = [*TEXTS, *LINES, *random_texts(1000)]
    texts = [text for text in texts if not any(token in text for token in SPECIAL)]
    assert len(texts) > 1000
    return texts


def random_texts(count):
    """Pieces of real lines, of all kinds of characters, and of white space, joined at random."""
    source = random.Random(0)
    kinds = [
        lambda: source.choice(LINES)[: source.randrange(30)],
        lambda: source.choice(("", " ", "  ", "\n", "\t", "\r\n", SPACE, "\u00a0")) * 2,
        lambda: "".join(chr(source.randrange(32, 0xD800)) for _ in range(3)),
        lambda: chr(source.randrange(0x1F300, 0x1F700)),
        lambda: source.choice(("<", "s>", "0x0A", "self", "the", "éà", "1234")),
    ]
    return [
        "".join(source.choice(kinds)() for _ in range(source.randrange(1, 6))) for _ in range(count)
    ]


def test_ids_are_those_of_the_slow_twin(ours):
    vocabulary = make_sentencepiece()
    for text in plain_texts():
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == slow_ids(text, vocabulary), text
        assert ours.decode(found) == text.replace(SPACE, " ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(text=st.text())
def test_any_text_comes_back(ours, text):
    found = ours.encode(text, add_special_tokens=False).ids
    assert found == slow_ids(text, make_sentencepiece())
    assert ours.decode(found) == text.replace(SPACE, " ")


def test_ids_are_those_of_transformers_reading(ours, reference):
    """transformers puts no space before a text that starts with one; SentencePiece does.

    So there, and there alone, the ids are those of the same text with one space less. (llama.cpp
    also puts a space before the text behind a special token, and transformers does not; minifuse
    encodes no special token together with text.)
    """
    differing = 0
    for text in plain_texts():
        starts_with_space = text[:1] in (" ", SPACE)
        differing += starts_with_space
        wanted = ours.encode(text[1:] if starts_with_space else text).ids
        if text in (" ", SPACE):
            wanted = [1, ours.token_to_id(SPACE)]
        assert reference.encode(text) == wanted, text
    assert differing > 100


def test_ids_are_those_of_sentencepiece_itself(tmp_path):
    """A model that SentencePiece trained, written as llama.cpp's converter writes it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.98,
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = model.get_piece_size()
    kinds = [
        (model.is_unknown, 2),
        (model.is_control, 3),
        (model.is_unused, 5),
        (model.is_byte, 6),
    ]
    vocabulary = {
        "tokens": [model.id_to_piece(i) for i in range(size)],
        "scores": [model.get_score(i) for i in range(size)],
        "types": [next((kind for test, kind in kinds if test(i)), 1) for i in range(size)],
    }
    vocabulary["types"][model.piece_to_id("<tool>")] = 4
    files = read_gguf(write(tmp_path / "m.gguf", vocabulary)).tokenizer_files
    ours = full(files)
    for text in plain_texts():
        assert ours.encode(text, add_special_tokens=False).ids == model.encode(text), text
    assert ours.encode("<tool>").ids == [1, model.piece_to_id("<tool>")]
    assert Tokenizer(files["tokenizer.json"]).control_ids == {
        1, 2, model.piece_to_id("<tool>"), model.piece_to_id("<turn>")
    }  # fmt: skip


def test_converted_folder_opens_in_transformers(gguf_path, ours, tmp_path):
    from transformers import AutoTokenizer

    convert(gguf_path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = Tokenizer.from_folder(tmp_path / "out")
    for text in [*TEXTS, *random_texts(100)]:
        assert tokenizer.encode(text) == ours.encode(text).ids, text
        if not any(token in text for token in SPECIAL):
            assert [1, *loaded.encode(text, is_start=True)] == ours.encode(text).ids, text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert loaded.bos_ids == (1,)
    assert loaded.control_ids == {1, 2}
    assert 0 not in loaded.encode("<unk> <unk>", is_start=True)


def test_the_loader_opens_such_a_file(gguf_path, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path))
    loaded = load_model(gguf_path)
    assert loaded.eos_token_ids == (2,)
    assert loaded.tokenizer.bos_ids == (1,)
    ids = loaded.tokenizer.encode("a random model", is_start=True)
    assert ids == slow_ids("a random model", make_sentencepiece())


def test_only_the_first_piece_gets_a_space(gguf_path):
    ours = Tokenizer(read_gguf(gguf_path).tokenizer_files["tokenizer.json"])
    vocabulary = make_sentencepiece()
    for text in ("model", " model", "\nx", "<s>model</s>", "<0x0A>"):
        assert ours.encode(text, is_start=True) == slow_ids(text, vocabulary)
        assert ours.encode(text, is_start=False) == slow_ids(text, vocabulary, adds_space=False)


def test_a_file_may_switch_off_the_space(tmp_path):
    files = read_gguf(write(tmp_path / "m.gguf", add_space_prefix=False)).tokenizer_files
    ours, vocabulary = full(files), make_sentencepiece()
    assert files["tokenizer_config.json"]["add_prefix_space"] is False
    for text in plain_texts():
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == slow_ids(text, vocabulary, adds_space=False), text
        assert ours.decode(found) == text.replace(SPACE, " ")


@pytest.mark.parametrize(("key", "adds"), [(None, True), (True, True), (False, False)])
def test_bos_is_added_unless_the_file_says_no(tmp_path, key, adds):
    extra = {} if key is None else {"add_bos_token": key}
    files = read_gguf(write(tmp_path / "m.gguf", **extra)).tokenizer_files
    assert (full(files).encode("a").ids[0] == 1) == adds
    assert files["tokenizer_config.json"]["add_bos_token"] is adds
    assert Tokenizer(files["tokenizer.json"]).bos_ids == ((1,) if adds else ())


def test_ids_that_a_file_leaves_out_are_those_of_llama(tmp_path):
    missing = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    files = read_gguf(write(tmp_path / "m.gguf", **missing)).tokenizer_files
    assert files["tokenizer_config.json"]["bos_token"] == "<s>"
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": 2}


def test_types_of_tokens(tmp_path):
    """Control and user-defined tokens are added, unused ones are none; no text merges to one."""
    vocabulary = make_sentencepiece()
    letters = ["<", "t", ">", "t>", "<t>", "<u>", "u>", "[PAD]", "<c>", "c>"]
    for token, kind in zip(letters, (1, 1, 1, 1, 3, 4, 1, 5, 1, 1), strict=True):
        if token in vocabulary["tokens"]:
            continue
        vocabulary["tokens"].append(token)
        vocabulary["types"].append(kind)
        vocabulary["scores"].append(-1.0 * len(vocabulary["tokens"]))
    files = read_gguf(write(tmp_path / "m.gguf", vocabulary)).tokenizer_files
    raw = files["tokenizer.json"]
    added = {token["content"]: token["special"] for token in raw["added_tokens"]}
    assert added == {"<unk>": True, "<s>": True, "</s>": True, "<t>": True, "<u>": False}
    assert "[PAD]" not in raw["model"]["vocab"]
    made = {left + right for left, right in raw["model"]["merges"]}
    assert "<c>" in made
    assert made.isdisjoint({"<t>", "<u>", "<s>", "[PAD]"})
    ours = Tokenizer(raw)
    text = "<t><u>[PAD]<c>"
    assert ours.control_ids.isdisjoint(ours.encode(text, is_start=True))
    assert ours.decode(ours.encode(text, is_start=True)) == text


def without_bytes(vocabulary):
    keep = [i for i, token in enumerate(vocabulary["tokens"]) if token not in ("<0x00>", "<0x41>")]
    return {key: [values[i] for i in keep] for key, values in vocabulary.items()}


def with_scores(change):
    def changed(vocabulary):
        return vocabulary | {"scores": change(vocabulary["scores"])}

    return changed


@pytest.mark.parametrize(
    ("change", "extra", "error", "message"),
    [
        (without_bytes, {}, ConfigError, r"lacks 2 of the 256 byte tokens, <0x00> for one"),
        (with_scores(lambda s: [-1000.0] * len(s)), {}, ConfigError, "put no order on the merges"),
        (
            with_scores(lambda s: [*s[:259], float("nan"), *s[260:]]),
            {},
            ConfigError,
            "put no order on",
        ),
        (with_scores(lambda s: s[1:]), {}, CheckpointError, r"tokens but \d+ scores"),
        (dict, {"scores": None}, CheckpointError, "has no list tokenizer.ggml.scores"),
        (dict, {"scores": ["high"]}, CheckpointError, "has no list tokenizer.ggml.scores"),
        (dict, {"remove_extra_whitespaces": True}, ConfigError, "remove_extra_whitespaces is true"),
        (dict, {"precompiled_charsmap": [1, 2]}, ConfigError, "precompiled_charsmap is true"),
        (dict, {"add_eos_token": True}, ConfigError, "add_eos_token is true"),
        (dict, {"model": "t5"}, ConfigError, "tokenizer.ggml.model is 't5'; minifuse converts"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, extra, error, message):
    path = write(tmp_path / "m.gguf", change(make_sentencepiece()), **extra)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), value=st.integers(0, 255))
def test_a_corrupt_byte_never_raises_anything_else(gguf_path, tmp_path, share, value):
    data = bytearray(gguf_path.read_bytes())
    data[int(share * (data.index(b"token_embd.weight") - 1))] = value
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(data)
    message = ""
    try:
        read_gguf(path)
    except MinifuseError as error:
        message = str(error)
    assert "\n" not in message
