"""GGUF -> the hub's layout: config, tensors one at a time, tokenizer files.

Whatever changes the result is either carried over exactly or refused by name.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from minifuse.checkpoint import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    expected_tensors,
    list_names,
    save_checkpoint,
    write_json,
)
from minifuse.config import ModelConfig
from minifuse.errors import CheckpointError, ConfigError, MinifuseError, one_line
from minifuse.rope import make_inv_freq

# GGUF architecture -> the class that transformers names in config.json.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# llama.cpp's converter stores the q and k rows of these for interleaved RoPE.
_PERMUTED_ARCHITECTURES = ("llama",)

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"

# Metadata under `<architecture>.`: hub config field -> key.
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_READ_KEYS = frozenset(
    [
        *_CONFIG_KEYS.values(),
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    ]
)
# Keys that change the result and are not implemented, with the values that switch them off.
_NEUTRAL_VALUES = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
}

# Llama 3.1 and 3.2 differ in the factor alone; GGUF keeps the finished divisors, not these.
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

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


@dataclass(frozen=True)
class GgufCheckpoint:
    """A GGUF file in the words of the hub.

    config:          what config.json would hold
    tokenizer_files: file name -> JSON object; tokenizer.json, tokenizer_config.json (with the chat
                     template) and generation_config.json
    own_dtype:       name of the dtype that the weights were stored in; bfloat16 for quantised ones
    """

    path: Path
    config: dict
    tokenizer_files: dict[str, dict]
    own_dtype: str
    _reader: GGUFReader

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hub name and f32 tensor of every weight, in the file's order, one in memory at a time.

        raises: CheckpointError where a block of the file does not decode
        """
        heads = {}
        if self.config["model_type"] in _PERMUTED_ARCHITECTURES:
            heads["q_proj"] = self.config["num_attention_heads"]
            heads["k_proj"] = self.config["num_key_value_heads"]
        for stored in self._reader.tensors:
            if stored.name == _ROPE_FREQS:
                continue
            name = _hub_name(stored.name)
            tensor = _dequantize(self.path, stored)
            num_heads = heads.get(name.split(".")[-2])
            # One of another shape goes out as it is, to be named with all that do not fit.
            if num_heads and len(tensor) == num_heads * self.config["head_dim"]:
                tensor = _unpermute(tensor, num_heads)
            yield name, tensor


def read_gguf(path: Path | str) -> GgufCheckpoint:
    """Read a GGUF's metadata; its weights are read when `tensors()` is iterated.

    raises: CheckpointError for a file that is missing, corrupt, truncated, or holds tensors that
            nobody asked for; ConfigError, naming the key, for what minifuse does not implement
    """
    path = Path(path)
    reader = _open(path)
    metadata = _read_metadata(path, reader)
    _check_names(path, reader)
    config = _read_config(path, reader, metadata)
    tokenizer_files = _read_tokenizer(path, metadata, config)
    return GgufCheckpoint(path, config, tokenizer_files, _own_dtype(reader), reader)


def convert_gguf(
    source: Path | str,
    target: Path | str,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> None:
    """Write a GGUF as a folder in hub layout, all or nothing.

    The folder is made under a temporary name beside `target` and renamed at the end. Where
    another process was quicker, its folder stays and this one's is dropped.

    dtype:    name of the dtype to write; "auto" is the GGUF's own
    progress: wraps the iterator of tensors, given their number; a progress bar, say
    raises:   CheckpointError, ConfigError; MinifuseError where the folder cannot be written
    """
    target = Path(target)
    checkpoint = read_gguf(source)
    tensors: Iterable[tuple[str, Tensor]] = checkpoint.tensors()
    if progress is not None:
        tensors = progress(tensors, len(expected_tensors(ModelConfig.from_hf(checkpoint.config))))
    dtype_name = checkpoint.own_dtype if dtype == "auto" else dtype
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            temporary.chmod(0o755)
            for name, content in checkpoint.tokenizer_files.items():
                write_json(temporary / name, content)
            save_checkpoint(
                temporary, checkpoint.config, tensors, DTYPES[dtype_name], max_shard_bytes
            )
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise MinifuseError(f"{target} cannot be written: {one_line(error)}") from error


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; wanted a GGUF")
    try:
        # Counts and lengths of a corrupt file overflow inside numpy before they are refused.
        with np.errstate(all="ignore"):
            reader = GGUFReader(path)
    except Exception as error:
        # The reader checks little, so corruption surfaces as whatever its arithmetic runs into.
        raise CheckpointError(
            f"{path} is not a readable GGUF file, or is cut short ({one_line(error)}); "
            "fetch it again"
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} is a GGUF of the other byte order; convert it anew")
    if not reader.tensors:
        raise CheckpointError(f"{path} is a GGUF without tensors; wanted a model")
    return reader


def _read_metadata(path: Path, reader: GGUFReader) -> dict:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} has metadata that cannot be read ({one_line(error)}); fetch it again"
        ) from error


def _check_names(path: Path, reader: GGUFReader) -> None:
    names = (tensor.name for tensor in reader.tensors)
    unknown = [name for name in names if name != _ROPE_FREQS and _hub_name(name) is None]
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that minifuse does not know: {list_names(unknown)}"
        )


def _hub_name(name: str) -> str | None:
    """The hub's name of a GGUF tensor, None if it has none: blk.7.attn_q.weight and the like."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal():
        return None
    _, index, module, kind = parts
    if module not in _BLOCK_NAMES or kind not in ("weight", "bias"):
        return None
    return f"model.layers.{int(index)}.{_BLOCK_NAMES[module]}.{kind}"


def _dequantize(path: Path, stored: ReaderTensor) -> Tensor:
    """f32, in the hub's [out, in] order, which is how the reader's data comes."""
    try:
        # Damaged scales overflow; what comes of them is looked for below.
        with np.errstate(all="ignore"):
            values = dequantize(stored.data, stored.tensor_type)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {stored.name} has the type {stored.tensor_type.name}, which the gguf "
            "package does not decode; choose another quantisation of the model"
        ) from None
    # A copy, because the file is mapped read-only and torch wants to be able to write.
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{path}: tensor {stored.name} holds numbers that are not finite; fetch the file again"
        )
    return tensor


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2+1, ...) back to halves.

    tensor: float[H*D, ...]
    """
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _own_dtype(reader: GGUFReader) -> str:
    """The dtype of the matrices, where it is one that torch computes in; bfloat16 elsewhere."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return plain.get(types.pop(), "bfloat16") if len(types) == 1 else "bfloat16"


def _read_config(path: Path, reader: GGUFReader, metadata: dict) -> dict:
    """The hub's config.json of a GGUF."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: general.architecture is {architecture!r}; minifuse reads "
            f"{', '.join(ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    _refuse_unsupported(path, prefix, fields)
    config = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    for field, key in _CONFIG_KEYS.items():
        config[field] = _integer(path, prefix, fields, key)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = _integer(path, prefix, fields, "attention.head_count_kv", heads)
    config["head_dim"] = _read_head_dim(path, prefix, fields, config)
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": _float(path, prefix, fields, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(path, prefix, fields, "rope.freq_base", 10000.0),
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} holds no token_embd.weight; wanted a whole model")
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    for field in ("bos_token_id", "eos_token_id"):
        token_id = metadata.get(f"tokenizer.ggml.{field}")
        if token_id is not None:
            config[field] = token_id
    if _ROPE_FREQS in tensors:
        config["rope_scaling"] = _read_rope_scaling(path, tensors[_ROPE_FREQS], config)
    return config


def _refuse_unsupported(path: Path, prefix: str, fields: dict) -> None:
    for key, value in fields.items():
        if key not in _READ_KEYS and value not in _NEUTRAL_VALUES.get(key, ()):
            raise ConfigError(
                f"{path}: {list_names([prefix + key])} is {value!r}, which minifuse does not "
                "implement"
            )


def _read_head_dim(path: Path, prefix: str, fields: dict, config: dict) -> int:
    default = config["hidden_size"] // config["num_attention_heads"]
    head_dim = _integer(path, prefix, fields, "attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(path, prefix, fields, key, head_dim) != head_dim:
            raise ConfigError(
                f"{path}: {prefix}{key} is {fields[key]}, but a head's size is {head_dim}; "
                "minifuse implements heads of one size that RoPE turns as a whole"
            )
    return head_dim


def _read_rope_scaling(path: Path, stored: ReaderTensor, config: dict) -> dict:
    """The llama3 scaling whose divisors of the frequencies are those of the file.

    The file keeps the divisors, f32[D/2], and not the four numbers that they came from; the largest
    is the factor, and the others are the same in all Llama 3 models. That guess has to reproduce
    every divisor, or the file is refused.
    """
    divisors = _dequantize(path, stored)
    scaling = {**_LLAMA3_SCALING, "factor": _shortest(float(divisors.max()))}
    plain = make_inv_freq(ModelConfig.from_hf(config))
    scaled = make_inv_freq(ModelConfig.from_hf(config | {"rope_scaling": scaling}))
    # Both sides rounded a handful of float32 operations apart.
    is_same = divisors.shape == plain.shape and torch.allclose(
        divisors, plain / scaled, rtol=1e-5, atol=0
    )
    if not is_same:
        raise ConfigError(
            f"{path}: {_ROPE_FREQS} is no RoPE scaling of Llama 3, and minifuse implements no "
            "other; use the model's safetensors with their config.json"
        )
    return scaling


def _integer(path: Path, prefix: str, fields: dict, key: str, default: int | None = None) -> int:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}: {prefix}{key} is {value!r}; wanted one positive integer")
    return value


def _float(path: Path, prefix: str, fields: dict, key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ConfigError(f"{path}: {prefix}{key} is {value!r}; wanted a positive number")
    return _shortest(value)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _read_tokenizer(path: Path, metadata: dict, config: dict) -> dict[str, dict]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name."""
    fields = {
        key.removeprefix("tokenizer."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    model = fields.get("ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"{path}: tokenizer.ggml.model is {model!r}; minifuse converts gpt2 (byte-level BPE): "
            "use the model's hub folder with its tokenizer.json"
        )
    for key in ("ggml.add_space_prefix", "ggml.add_eos_token", "ggml.add_sep_token"):
        if fields.get(key, False):
            raise ConfigError(f"{path}: tokenizer.{key} is true, which minifuse does not implement")
    pre_name = fields.get("ggml.pre")
    if pre_name not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path}: tokenizer.ggml.pre is {pre_name!r}; minifuse knows "
            f"{', '.join(PRE_TOKENIZERS)}: use the model's hub folder with its tokenizer.json"
        )
    pre = PRE_TOKENIZERS[pre_name]
    tokens = _read_tokens(path, fields, config["vocab_size"])
    special = _read_special(path, fields, tokens)
    adds_bos = bool(fields.get("ggml.add_bos_token", pre.adds_bos)) and "bos" in special
    return {
        "tokenizer.json": _make_tokenizer_json(
            path, fields, tokens, pre, special["bos"] if adds_bos else None
        ),
        "tokenizer_config.json": _make_tokenizer_config(fields, tokens, special, adds_bos, config),
        "generation_config.json": _make_generation_config(special),
    }


def _read_tokens(path: Path, fields: dict, vocab_size: int) -> list[str]:
    tokens, types = fields.get("ggml.tokens"), fields.get("ggml.token_type")
    merges = fields.get("ggml.merges")
    for name, value in (("tokens", tokens), ("token_type", types), ("merges", merges)):
        if not isinstance(value, list):
            raise CheckpointError(f"{path} has no list tokenizer.ggml.{name}; wanted a tokenizer")
    if len(tokens) != len(types):
        raise CheckpointError(
            f"{path} has {len(tokens)} tokenizer.ggml.tokens but {len(types)} token types"
        )
    if len(tokens) > vocab_size:
        raise CheckpointError(
            f"{path} has {len(tokens)} tokens but {vocab_size} rows in token_embd.weight; "
            "the tokenizer belongs to another model"
        )
    odd = set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}
    if odd:
        raise ConfigError(
            f"{path}: tokenizer.ggml.token_type holds {sorted(odd)}; byte-level BPE has the types "
            f"{_NORMAL}, {_CONTROL}, {_USER_DEFINED} and {_UNUSED}"
        )
    return tokens


def _read_special(path: Path, fields: dict, tokens: list[str]) -> dict[str, int]:
    """bos, eos, pad, unk and eot, where the file names them -> token id."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot"}
    special = {}
    for name, key in keys.items():
        token_id = fields.get(f"ggml.{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}_token_id is {token_id!r}; wanted one of the "
                f"{len(tokens)} tokens"
            )
        special[name] = token_id
    return special


def _make_tokenizer_json(
    path: Path, fields: dict, tokens: list[str], pre: _PreTokenizer, bos_id: int | None
) -> dict:
    types = fields["ggml.token_type"]
    vocab = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED
    }
    if len(vocab) != sum(kind != _UNUSED for kind in types):
        raise CheckpointError(f"{path} has a token twice in tokenizer.ggml.tokens")
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "post_processor": _make_template(tokens, bos_id),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": fields["ggml.merges"],
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
    fields: dict, tokens: list[str], special: dict[str, int], adds_bos: bool, config: dict
) -> dict:
    content = {
        "add_bos_token": adds_bos,
        "add_prefix_space": False,
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
