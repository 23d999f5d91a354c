"""The tokenizer in a GGUF's metadata -> tokenizer.json and the files beside it.

Two kinds: `gpt2`, byte-level BPE with its merges, and `llama`, SentencePiece's BPE with byte
fallback, whose merges are derived from the scores. Where readers disagree on the second, it is done
as llama.cpp does it, for whom the file was written.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from minifuse.errors import CheckpointError, ConfigError, one_line

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_TYPES = {
    "gpt2": {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED},
    "llama": {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE},
}

# SentencePiece writes a space as this letter.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# What llama.cpp takes for SentencePiece where a file does not say.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}

# Keys that change the result and are not implemented, unless false.
_REFUSED_KEYS = {
    "gpt2": ("add_space_prefix", "add_eos_token", "add_sep_token"),
    "llama": (
        "add_eos_token",
        "add_sep_token",
        "remove_extra_whitespaces",
        "precompiled_charsmap",
    ),
}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _byte_level(use_regex: bool) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(digits: str) -> dict:
    """GPT-4's way of cutting text into words, with runs of digits as a pattern says."""
    pattern = "|".join((_CONTRACTIONS, _WORDS, digits, _SIGNS, _SPACES))
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


@dataclass(frozen=True)
class _PreTokenizer:
    """What `tokenizer.ggml.pre` stands for: the tokenizer.json of the models that bear the name."""

    steps: tuple[dict, ...]
    normalizer: dict | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = _PreTokenizer((_byte_level(use_regex=True),))
_LLAMA3 = _PreTokenizer(
    (_split(r"\p{N}{1,3}"), _byte_level(use_regex=False)), ignore_merges=True, adds_bos=True
)
_QWEN2 = _PreTokenizer((_split(r"\p{N}"), _byte_level(use_regex=False)), normalizer={"type": "NFC"})
_SMOLLM = _PreTokenizer(
    ({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
)

PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _SMOLLM,
}


def read_tokenizer(path: Path, metadata: dict, config: dict) -> dict[str, dict]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    metadata: of the GGUF at `path`, key -> value
    config:   what config.json holds
    raises:   CheckpointError, ConfigError, naming the key
    """
    fields = {
        key.removeprefix("tokenizer."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    kind = fields.get("ggml.model")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(
            f"{path}: tokenizer.ggml.model is {kind!r}; minifuse converts gpt2 (byte-level BPE) "
            "and llama (SentencePiece): use the model's hub folder with its tokenizer.json"
        )
    for key in _REFUSED_KEYS[kind]:
        if fields.get(f"ggml.{key}", False):
            raise ConfigError(
                f"{path}: tokenizer.ggml.{key} is true, which minifuse does not implement"
            )
    is_sentencepiece = kind == "llama"
    pre = None if is_sentencepiece else _find_pre_tokenizer(path, fields)
    tokens = _read_tokens(path, fields, config["vocab_size"], _TYPES[kind])
    special = _read_special(path, fields, tokens, _SENTENCEPIECE_IDS if is_sentencepiece else {})
    adds_bos = bool(fields.get("ggml.add_bos_token", pre.adds_bos if pre else True))
    adds_bos = adds_bos and "bos" in special
    adds_space = is_sentencepiece and bool(fields.get("ggml.add_space_prefix", True))
    vocab = _make_vocab(path, tokens, fields["ggml.token_type"])
    if pre:
        parts = _byte_level_parts(path, fields, vocab, pre)
    else:
        parts = _sentencepiece_parts(path, fields, vocab, tokens[special["unk"]], adds_space)
    return {
        "tokenizer.json": _make_tokenizer_json(
            path, fields, tokens, parts, special["bos"] if adds_bos else None
        ),
        "tokenizer_config.json": _make_tokenizer_config(
            fields, tokens, special, config, adds_bos=adds_bos, adds_space=adds_space
        ),
        "generation_config.json": _make_generation_config(special),
    }


def _find_pre_tokenizer(path: Path, fields: dict) -> _PreTokenizer:
    name = fields.get("ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path}: tokenizer.ggml.pre is {name!r}; minifuse knows "
            f"{', '.join(PRE_TOKENIZERS)}: use the model's hub folder with its tokenizer.json"
        )
    return PRE_TOKENIZERS[name]


def _read_list(path: Path, fields: dict, name: str, kind: type) -> list:
    value = fields.get(f"ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise CheckpointError(f"{path} has no list tokenizer.ggml.{name}; wanted a tokenizer")
    return value


def _read_tokens(path: Path, fields: dict, vocab_size: int, known: set[int]) -> list[str]:
    tokens = _read_list(path, fields, "tokens", str)
    types = _read_list(path, fields, "token_type", int)
    if len(tokens) != len(types):
        raise CheckpointError(
            f"{path} has {len(tokens)} tokenizer.ggml.tokens but {len(types)} token types"
        )
    if len(tokens) > vocab_size:
        raise CheckpointError(
            f"{path} has {len(tokens)} tokens but {vocab_size} rows in token_embd.weight; "
            "the tokenizer belongs to another model"
        )
    odd = set(types) - known
    if odd:
        raise ConfigError(
            f"{path}: tokenizer.ggml.token_type holds {sorted(odd)}; a tokenizer of the kind "
            f"{fields['ggml.model']} has the types {', '.join(map(str, sorted(known)))}"
        )
    return tokens


def _read_special(
    path: Path, fields: dict, tokens: list[str], defaults: dict[str, int]
) -> dict[str, int]:
    """bos, eos, pad, unk and eot, where the file names them or its kind has a default -> id."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot"}
    special = {}
    for name, key in keys.items():
        token_id = fields.get(f"ggml.{key}_token_id", defaults.get(name))
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}_token_id is {token_id!r}; wanted one of the "
                f"{len(tokens)} tokens"
            )
        special[name] = token_id
    return special


def _make_vocab(path: Path, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id, without those that only fill up the embedding."""
    used = [
        (t, index)
        for index, (t, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED
    ]
    vocab = dict(used)
    if len(vocab) != len(used):
        raise CheckpointError(f"{path} has a token twice in tokenizer.ggml.tokens")
    return vocab


def _byte_level_parts(path: Path, fields: dict, vocab: dict[str, int], pre: _PreTokenizer) -> dict:
    """The parts of tokenizer.json that make a byte-level BPE."""
    return {
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "decoder": _byte_level(use_regex=True),
        "model": {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": _read_list(path, fields, "merges", str),
        },
    }


def _sentencepiece_parts(
    path: Path, fields: dict, vocab: dict[str, int], unknown: str, adds_space: bool
) -> dict:
    """The parts of tokenizer.json that make a SentencePiece BPE.

    The space in front of a text is put there whatever the text starts with, as llama.cpp and
    SentencePiece do it; transformers' Metaspace leaves out the one before another space.
    """
    missing = _BYTE_TOKENS - vocab.keys()
    if missing:
        raise ConfigError(
            f"{path}: tokenizer.ggml.tokens lacks {len(missing)} of the 256 byte tokens, "
            f"{min(missing)} for one; minifuse implements SentencePiece with byte fallback"
        )
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    undone = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        undone.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": undone},
        "model": {
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _derive_merges(path, fields),
        },
    }


def _derive_merges(path: Path, fields: dict) -> list[list[str]]:
    """Every way to put a token together from two others, the best score first.

    SentencePiece joins the two neighbours whose union has the highest score; here that union's
    rank says the same. Only normal tokens take part: control, byte and user-defined ones are never
    the outcome of a merge.
    """
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    scores = _read_list(path, fields, "scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens but {len(scores)} scores")
    pieces = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind == _NORMAL and token not in _BYTE_TOKENS
    }
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    ranks = {score for score, _, _ in merges}
    if (len(ranks) == 1 and len(merges) > 1) or any(score != score for score in ranks):
        raise ConfigError(
            f"{path}: tokenizer.ggml.scores put no order on the merges; "
            "use the model's hub folder with its tokenizer.json"
        )
    # Equal scores: in the order of transformers, which is as good as any.
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    return [[left, right] for _, left, right in merges]


def _make_tokenizer_json(
    path: Path, fields: dict, tokens: list[str], parts: dict, bos_id: int | None
) -> dict:
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, kind in enumerate(fields["ggml.token_type"])
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _make_template(tokens, bos_id),
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **parts["model"],
        },
    }
    try:
        tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        # tokenizers raises bare exceptions, for a merge of tokens that do not exist, say.
        raise CheckpointError(
            f"{path} has a tokenizer that does not hold together ({one_line(error)})"
        ) from error
    return content


def _make_template(tokens: list[str], bos_id: int | None) -> dict | None:
    """A post-processor that puts BOS first, or none."""
    if bos_id is None:
        return None
    bos = tokens[bos_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, pair],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _make_tokenizer_config(
    fields: dict,
    tokens: list[str],
    special: dict[str, int],
    config: dict,
    *,
    adds_bos: bool,
    adds_space: bool,
) -> dict:
    content = {
        "add_bos_token": adds_bos,
        "add_prefix_space": adds_space,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name in ("bos", "eos", "pad", "unk"):
        if name in special:
            content[f"{name}_token"] = tokens[special[name]]
    if "chat_template" in fields:
        content["chat_template"] = fields["chat_template"]
    return content


def _make_generation_config(special: dict[str, int]) -> dict:
    content: dict = {
        f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special
    }
    # Chat models end a turn with a token of their own, beside the one that ends a text.
    if special.get("eot", special.get("eos")) != special.get("eos"):
        content["eos_token_id"] = [special[name] for name in ("eos", "eot") if name in special]
    return content
