"""Encoding keeps users out of the control tokens; decoding streams without taking anything back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from minifuse.errors import CheckpointError, UsageError
from minifuse.tokenizer import Tokenizer

CORPUS = [
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "What is the capital of the country where 1984 was written? 123 4567",
    "naïve façade — “quoted” … 東京 日本 😀 👩‍👩‍👧 don't we'll\n\n  indented\ttab",
    "<s> </s> <|im_start|>user\nthink <think> and </think><|im_end|>",
]
HARD_TEXTS = [
    "👩‍👩‍👧‍👦 family",
    "e\u0301 é ﬁ Ⅷ",
    "🇫🇷🏳️‍🌈",
    "\0nul",
    "  two  spaces  ",
    "\r\n\r\n\t",
    "שלום עולם مرحبا",
    "a\u200db\ufeffc",
    "\ufffd kept \ufffd",
    "\U0001d518\U0001d52b\U0001d526",
    "हिन्दी ไทย",
    "▁ already ▁▁ there",
]
SPLIT = r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def special(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, special=True, normalized=False) for content in contents]


def train_byte_level(controls: list[str], size: int = 400, **options) -> tokenizers.Tokenizer:
    """Byte-level BPE whose base vocabulary lists its control tokens first, as SmolLM2's does."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_smollm() -> tokenizers.Tokenizer:
    tokenizer = train_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def make_gpt2() -> tokenizers.Tokenizer:
    """Byte-level BPE that puts a space before a text."""
    tokenizer = train_byte_level(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def make_llama3() -> tokenizers.Tokenizer:
    """Whole words straight from the vocabulary (ignore_merges), BOS from a template."""
    raw = json.loads(train_byte_level([]).to_str())
    raw["model"]["vocab"]["PAD"] = len(raw["model"]["vocab"])
    raw["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(special("PAD", "<|begin_of_text|>", "<|eot_id|>"))
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            ),
        ]
    )
    return tokenizer


def make_qwen() -> tokenizers.Tokenizer:
    """NFC, digits one by one, and added tokens that are not special."""
    tokenizer = train_byte_level([])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    plain = [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    tokenizer.add_tokens([*plain, AddedToken("tool", special=False, normalized=True)])
    return tokenizer


def sentencepiece_model(**options) -> models.BPE:
    """Byte fallback, and merges that spell a control token, as some conversions make them."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += [*"▁abcdefghijklmnopqrstuvwxyzTF<>/.,\ufffd", "he", "▁t", "▁the", "s>", "▁▁", ""]
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "▁"), ("s", ">"), ("<", "s>")]
    ids = {token: id for id, token in enumerate(vocab)}
    return models.BPE(
        vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options
    )


def finish_sentencepiece(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(special("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def make_llama2() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(sentencepiece_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return finish_sentencepiece(tokenizer)


def make_metaspace(scheme: str = "first") -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(sentencepiece_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return finish_sentencepiece(tokenizer)


def make_metaspace_decoder() -> tokenizers.Tokenizer:
    tokenizer = make_metaspace("always")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make_nfkc() -> tokenizers.Tokenizer:
    """A normalizer that turns harmless letters into the text of a control token."""
    tokenizer = make_llama2()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def make_unigram() -> tokenizers.Tokenizer:
    """Scores that prefer the control tokens to any spelling of them."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz</>"] + [("▁the", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return finish_sentencepiece(tokenizer)


KINDS = {
    "smollm": make_smollm,
    "gpt2": make_gpt2,
    "llama3": make_llama3,
    "qwen": make_qwen,
    "llama2": make_llama2,
    "metaspace_first": make_metaspace,
    "metaspace_always": lambda: make_metaspace("always"),
    "metaspace_decoder": make_metaspace_decoder,
    "nfkc": make_nfkc,
    "unigram": make_unigram,
}
SENTENCEPIECE = ("llama2", "metaspace_first", "metaspace_always")
RAW = {kind: make() for kind, make in KINDS.items()}
OURS = {kind: Tokenizer(json.loads(raw.to_str())) for kind, raw in RAW.items()}

every_kind = pytest.mark.parametrize("kind", KINDS)


def save(folder: Path, raw: tokenizers.Tokenizer, config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# Encoding


@every_kind
@pytest.mark.parametrize("is_start", [True, False])
def test_no_added_token_is_ever_encoded(kind, is_start):
    unk = RAW[kind].token_to_id("<unk>")
    added = RAW[kind].get_added_tokens_decoder()
    assert set(OURS[kind].control_ids) == set(added) - {unk}
    for token in added.values():
        text = token.content
        for written in (text, f" {text}", f"the {text}the", f"{text}{text}\n", text.upper()):
            ids = OURS[kind].encode(written, is_start=is_start)
            assert ids
            assert not set(ids) & (set(added) - {unk})


@every_kind
@given(data=st.data())
def test_no_mixture_with_added_tokens_is_either(kind, data):
    contents = [t.content for t in RAW[kind].get_added_tokens_decoder().values()]
    fragment = st.one_of(
        st.sampled_from([*contents, "\uff1cs\uff1e", "<", "s", ">", " "]), st.text()
    )
    text = "".join(data.draw(st.lists(fragment, max_size=5)))
    for is_start in (True, False):
        ids = OURS[kind].encode(text, is_start=is_start)
        assert OURS[kind].control_ids.isdisjoint(ids)


def test_control_text_comes_back_as_it_was():
    text = "a <|im_start|>user\n<|endoftext|><think>b"
    for kind in ("smollm", "qwen"):
        ids = OURS[kind].encode(text, is_start=True)
        assert OURS[kind].decode(ids) == text


@every_kind
@given(text=st.one_of(st.text(), st.sampled_from(HARD_TEXTS)))
def test_plain_text_is_encoded_as_the_tokenizer_itself_does(kind, text):
    contents = [t.content for t in RAW[kind].get_added_tokens_decoder().values()]
    if any(content in text for content in contents):
        return
    assert OURS[kind].encode(text, is_start=True) == (
        RAW[kind].encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "unigram"])
def test_only_the_first_piece_gets_the_dummy_space(kind):
    ours = OURS[kind]
    assert ours.encode("the", is_start=True) == [ours.token_id("▁the")]
    assert ours.token_id("▁the") not in ours.encode("the", is_start=False)
    assert ours.encode(" the", is_start=False) == [ours.token_id("▁the")]
    joined = ours.encode("the", is_start=True) + ours.encode("the", is_start=False)
    assert ours.decode(joined) == "thethe"


def test_byte_level_prefix_space_stays_at_the_start():
    ours = OURS["gpt2"]
    assert ours.encode("the", is_start=True) == ours.encode(" the", is_start=False)
    assert ours.decode(ours.encode("the", is_start=False)) == "the"


def test_old_metaspace_files_lose_their_prefix_space_too():
    raw = json.loads(make_metaspace().to_str())
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    ours = Tokenizer(raw)
    assert ours.encode("the", is_start=True) == [ours.token_id("▁the")]
    assert ours.token_id("▁the") not in ours.encode("the", is_start=False)


@every_kind
def test_empty_text_has_no_tokens(kind):
    assert OURS[kind].encode("", is_start=True) == []
    assert OURS[kind].encode("", is_start=False) == []


def test_bytes_stay_usable_where_they_are_added_tokens():
    raw = make_llama2()
    raw.add_special_tokens(special("<0x0A>", "x"))
    ours = Tokenizer(json.loads(raw.to_str()))
    ids = ours.encode("x\ny", is_start=False)
    assert ids == [ours.token_id(token) for token in ("<0x78>", "<0x0A>", "y")]
    assert ours.token_id("<0x0A>") not in ours.encode("<0x0A>", is_start=True)


def test_letters_stay_usable_where_they_are_added_tokens():
    raw = make_smollm()
    raw.add_tokens(["x"])
    ours = Tokenizer(json.loads(raw.to_str()))
    assert ours.decode(ours.encode("x-x", is_start=True)) == "x-x"


def test_training_leftovers_change_nothing():
    raw = make_smollm()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.model.dropout = 0.5
    text = CORPUS[0]
    ours = Tokenizer(json.loads(raw.to_str()))
    assert ours.encode(text, is_start=True) == OURS["smollm"].encode(text, is_start=True)


@pytest.mark.parametrize(
    ("text", "code", "place"), [("ab\ud800", "U+D800", 2), ("\udcff", "U+DCFF", 0)]
)
def test_lone_surrogates_are_refused_by_name(text, code, place):
    with pytest.raises(UsageError, match=rf"lone surrogate {code.replace('+', '.')}.* {place},"):
        OURS["smollm"].encode(text, is_start=True)


def test_a_tokenizer_that_panics_at_every_text_is_refused():
    """A template for one text that names a second one; Rust's panic is no Exception."""
    raw = json.loads(make_smollm().to_str())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    with pytest.raises(CheckpointError, match="can build: index out of bounds"):
        Tokenizer(raw)


@pytest.mark.parametrize("normalizer", [[[]], {"type": "Sequence", "normalizers": [[[]]]}])
def test_steps_that_are_lists_are_refused(normalizer):
    """The package takes a list for an object of as many fields."""
    raw = json.loads(make_smollm().to_str()) | {"normalizer": normalizer}
    with pytest.raises(CheckpointError, match=r"holds list; wanted an object|can build"):
        Tokenizer(raw)


def test_a_text_that_the_tokenizer_cannot_take_is_an_error_of_ours():
    raw = json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0}, "gone")).to_str())
    with pytest.raises(CheckpointError, match="the tokenizer fails on a text: "):
        Tokenizer(raw).encode("b", is_start=True)


def test_nul_is_ordinary_text():
    for kind in ("smollm", "llama2"):
        assert OURS[kind].decode(OURS[kind].encode("a\0b", is_start=True)) == "a\0b"


# Template text


@every_kind
@given(data=st.data())
def test_template_text_at_the_start_is_what_the_tokenizer_itself_makes_of_it(kind, data):
    contents = [t.content for t in RAW[kind].get_added_tokens_decoder().values()]
    fragments = st.lists(st.one_of(st.sampled_from([*contents, "user\n", " "]), st.text()))
    text = "".join(data.draw(fragments))
    ids = OURS[kind].encode_template(text, is_start=True)
    assert ids == RAW[kind].encode(text, add_special_tokens=False).ids


@every_kind
@given(
    lead=st.one_of(st.text(), st.sampled_from([*HARD_TEXTS, "\n", " the", "the \n"])),
    data=st.data(),
)
def test_template_text_inside_is_plain_up_to_its_first_control_token(kind, lead, data):
    ours, raw = OURS[kind], RAW[kind]
    controls = [ours.token_of(id) for id in sorted(ours.control_ids)]
    if any(content in lead for content in controls) or not ours.control_ids.isdisjoint(
        raw.encode(lead, add_special_tokens=False).ids
    ):
        return
    assert ours.encode_template(lead, is_start=False) == ours.encode(lead, is_start=False)
    rest = data.draw(st.sampled_from(controls)) + data.draw(st.sampled_from(["", "the", " a\n"]))
    if kind == "qwen" and rest.startswith("tool"):
        # Normalised tokens are looked for after the others, in text that may have changed.
        return
    assert ours.encode_template(lead + rest, is_start=False) == [
        *ours.encode(lead, is_start=False),
        *raw.encode(rest, add_special_tokens=False).ids,
    ]


def test_template_text_has_control_tokens_and_no_bos_of_its_own():
    ours = OURS["llama2"]
    the, bos = ours.token_id("▁the"), ours.token_id("<s>")
    assert ours.encode_template("the", is_start=True) == [the]
    assert ours.encode_template("<s>the", is_start=True) == [bos, the]
    assert ours.encode_template(" the<s>", is_start=False) == [the, bos]
    assert the not in ours.encode_template("the<s>", is_start=False)
    assert ours.encode_template("", is_start=True) == ours.encode_template("", is_start=False) == []
    with pytest.raises(UsageError, match="lone surrogate"):
        ours.encode_template("\ud800", is_start=True)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("llama2", "", True),
        ("llama2", "user\n<s>", True),
        ("llama2", "<s>\n", False),
        ("metaspace_always", "<s>", True),
        ("metaspace_first", "<s>", False),
        ("unigram", "<s>", True),
        ("gpt2", "<|endoftext|>", True),
        ("gpt2", "the", False),
        ("smollm", "<|im_start|>", False),
    ],
)
def test_whether_a_text_starts_after_template_text(kind, text, expected):
    ours = OURS[kind]
    assert ours.is_start_after(text) is expected
    together = ours.encode_template(text + "the", is_start=True)
    assert together == [
        *ours.encode_template(text, is_start=True),
        *ours.encode("the", is_start=expected),
    ]


# BOS, vocabulary, tokenizer_config.json


@pytest.mark.parametrize("kind", ["smollm", "llama3", "qwen", "llama2", "metaspace_first"])
@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_bos_is_what_transformers_puts_there(kind, tokenizer_class, add_bos, tmp_path):
    from transformers import AutoTokenizer

    config = {"tokenizer_class": tokenizer_class, "add_bos_token": add_bos}
    config = {key: value for key, value in config.items() if value is not None}
    bos = {"llama3": "<|begin_of_text|>", "smollm": "<|im_start|>", "qwen": "<|im_start|>"}
    config["bos_token"] = bos.get(kind, "<s>")
    folder = save(tmp_path, RAW[kind], config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    bare = theirs.encode("the", add_special_tokens=False)
    assert theirs.encode("the") == [*ours.bos_ids, *bare]
    assert ours.encode("the", is_start=True) == bare
    assert bool(ours.bos_ids) == (kind not in ("smollm", "qwen"))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (processors.BertProcessing(("</s>", 2), ("<s>", 1)), (1,)),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), (1,)),
        (processors.ByteLevel(), ()),
        (processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)]), ()),
        (
            processors.TemplateProcessing(
                "<s> </s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            ),
            (1, 2),
        ),
        (
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)]),
                ]
            ),
            (2,),
        ),
    ],
)
def test_bos_is_what_the_post_processor_puts_there(processor, expected):
    raw = make_llama2()
    raw.post_processor = processor
    assert Tokenizer(json.loads(raw.to_str())).bos_ids == expected
    ids = raw.encode("the").ids
    assert tuple(ids[: ids.index(raw.token_to_id("▁the"))]) == expected


@every_kind
def test_vocab_size_counts_added_tokens(kind):
    ids = RAW[kind].get_vocab(with_added_tokens=True).values()
    assert OURS[kind].vocab_size == max(ids) + 1 == RAW[kind].get_vocab_size()


def test_tokens_that_the_config_alone_calls_special_are_control_tokens(tmp_path):
    raw = json.loads(make_smollm().to_str())
    raw["added_tokens"] = raw["added_tokens"][:1]
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": False}},
    }
    folder = save(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(raw)), config)
    ours = Tokenizer.from_folder(folder)
    assert ours.control_ids == {0, 1, 2}
    assert ours.decode([0, 1, 2]) == "<|im_start|>"
    assert ours.vocab_size == OURS["smollm"].vocab_size


# Decoding


@pytest.mark.parametrize("kind", ["smollm", "llama3", "qwen", "llama2"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decode_equals_transformers(kind, data, transformers_of):
    ids = data.draw(st.lists(st.integers(0, OURS[kind].vocab_size - 1), max_size=12))
    theirs = transformers_of(kind)
    assert OURS[kind].decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def transformers_of(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    made = {}

    def get(kind: str):
        if kind not in made:
            folder = save(tmp_path_factory.mktemp(kind), RAW[kind])
            made[kind] = PreTrainedTokenizerFast.from_pretrained(
                folder, clean_up_tokenization_spaces=False
            )
        return made[kind]

    return get


def stream_text(ours: Tokenizer, ids: list[int]) -> list[str]:
    """Every pushed piece; checks on the way that nothing certain is wrong."""
    stream, pieces = ours.stream(), []
    for count, id in enumerate(ids, 1):
        pieces.append(stream.push(id))
        assert "".join(pieces) + stream.pending == ours.decode(ids[:count])
    pieces.append(stream.finish())
    return pieces


@every_kind
@settings(max_examples=300)
@given(data=st.data())
def test_streamed_text_equals_decoded_text_for_any_ids(kind, data):
    size = OURS[kind].vocab_size
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=30))
    assert "".join(stream_text(OURS[kind], ids)) == OURS[kind].decode(ids)


@every_kind
@settings(max_examples=200)
@given(data=st.data())
def test_streamed_text_equals_decoded_text_for_broken_bytes(kind, data):
    """Ids drawn from the nastiest part of the vocabulary: bytes, spaces, control tokens."""
    ours = OURS[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = [*(f"<0x{byte:02X}>" for byte in (0x20, 0x41, 0x80, 0x9F, 0xE2, 0xF0, 0xFF))]
    names += [*alphabet, "", "▁", "▁▁", "▁the", "\ufffd", "<s>", "<think>", "Ġ", "<|im_end|>"]
    pool = [id for id in map(ours.token_id, names) if id is not None]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=20))
    assert "".join(stream_text(ours, ids)) == ours.decode(ids)


@every_kind
@given(text=st.one_of(st.text(), st.sampled_from(HARD_TEXTS + CORPUS)))
@example("👩‍👩‍👧‍👦")
def test_streamed_text_equals_decoded_text_for_any_text(kind, text):
    ids = OURS[kind].encode(text, is_start=True)
    assert "".join(stream_text(OURS[kind], ids)) == OURS[kind].decode(ids)


def test_characters_come_whole_and_as_early_as_they_are_certain():
    ours = OURS["smollm"]
    stream = ours.stream()
    ids = [id for letter in "a😀" for id in byte_ids(ours, letter)]
    assert [stream.push(id) for id in ids] == ["a", "", "", "", "😀"]
    assert stream.finish() == ""


def test_byte_tokens_wait_for_the_end_of_their_run():
    """One bad byte turns a whole run of byte tokens into replacement characters."""
    ours = OURS["llama2"]
    newline, bad, the = (ours.token_id(t) for t in ("<0x0A>", "<0xFF>", "▁the"))
    stream = ours.stream()
    assert [stream.push(newline), stream.pending] == ["", "\n"]
    assert [stream.push(the), stream.pending] == ["\n the", ""]
    assert [stream.push(newline), stream.push(bad)] == ["", ""]
    assert stream.finish() == "\ufffd\ufffd"


def test_a_finished_stream_starts_anew():
    stream = OURS["llama2"].stream()
    the = OURS["llama2"].token_id("▁the")
    assert [stream.push(the), stream.finish()] == ["the", ""]
    assert stream.push(the) == "the"


def test_a_decoder_that_cuts_the_end_is_asked_at_the_end_alone():
    """`tokenizers` panics where both cuts of a Strip meet, as they would after the first token."""
    raw = make_llama2()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    )
    ours = Tokenizer(json.loads(raw.to_str()))
    ids = [ours.token_id(token) for token in ("▁", "▁the", "▁")]
    stream = ours.stream()
    assert [stream.push(id) for id in ids] == ["", "", ""]
    assert stream.finish() == ours.decode(ids) == " the"


def byte_ids(ours: Tokenizer, text: str) -> list[int]:
    """One id for each byte of a text, under a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [ours.token_id(letters[byte]) for byte in text.encode("utf-8")]


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[]", "holds list"),
        (b"{}", "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "not a tokenizer"),
        pytest.param(b"[" * 100_000, "is not JSON", id="deep"),
    ],
)
def test_bad_files_are_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_a_bad_config_file_is_named(tmp_path):
    save(tmp_path, RAW["smollm"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_folder(tmp_path)


def test_an_added_token_whose_id_would_move_is_refused(tmp_path):
    raw = json.loads(make_qwen().to_str())
    raw["added_tokens"][0]["id"] += 7
    with pytest.raises(CheckpointError, match=r"<\|endoftext\|>.* is listed with id"):
        Tokenizer(raw)


def test_a_template_that_names_no_token_is_refused():
    raw = json.loads(make_llama2().to_str())
    raw["post_processor"]["special_tokens"] = {}
    with pytest.raises(CheckpointError, match="post_processor uses '<s>'"):
        Tokenizer(raw)


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, minifuse.tokenizer; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
