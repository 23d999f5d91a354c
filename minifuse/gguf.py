"""GGUF -> the hub's layout: config and tensors, one at a time, with the tokenizer's files.

Whatever changes the result is either carried over exactly or refused by name.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from minifuse.config import ModelConfig
from minifuse.errors import CheckpointError, ConfigError, one_line
from minifuse.files import check_readable, list_names, write_json
from minifuse.gguf_tokenizer import read_tokenizer
from minifuse.quantize import QuantizedTensor, join_groups
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

# Rows are decoded in blocks of about this many numbers, so that only the result is of full size.
_DECODED_NUMBERS = 2**18

# Numbers, texts and lengths of texts in a file's metadata. A vocabulary of 256,000 tokens with as
# many merges, types and scores has two million.
MAX_GGUF_VALUES = 2**23

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
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
    ]
)
# Keys that change the result and are not implemented, with the values that switch them off.
_NEUTRAL_VALUES = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
}

# YaRN's optional numbers: hub field -> key. llama.cpp's converter copies them as they are.
_YARN_KEYS = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}

# Llama 3.1 and 3.2 differ in the factor alone; GGUF keeps the finished divisors, not these.
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
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

    def tensors(
        self, own_int4: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Hub name and f32 tensor of every weight, in the file's order, one in memory at a time.

        own_int4: hub names of those that come with their own nibbles and scales instead, where they
                  are stored as Q4_0 or Q4_1
        raises: CheckpointError where a block of the file does not decode
        """
        heads = {}
        if self.config["model_type"] in _PERMUTED_ARCHITECTURES:
            heads["q_proj"] = self.config["num_attention_heads"]
            heads["k_proj"] = self.config["num_key_value_heads"]
        for stored in self._reader.tensors:
            if stored.name != _ROPE_FREQS:
                name = _hub_name(stored.name)
                assert name is not None, stored.name  # those of no place were refused
                # No variable holds the tensor, so it goes as soon as its reader is done with it.
                decode = _read_int4 if name in own_int4 else _dequantize
                yield name, self._read_tensor(stored, heads.get(name.split(".")[-2]), decode)

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        for name, content in self.tokenizer_files.items():
            write_json(folder / name, content)

    def _read_tensor(
        self,
        stored: ReaderTensor,
        num_heads: int | None,
        decode: Callable[[Path, ReaderTensor], Tensor | QuantizedTensor],
    ) -> Tensor | QuantizedTensor:
        tensor = decode(self.path, stored)
        parts = tensor if isinstance(tensor, QuantizedTensor) else [tensor]
        # One of another shape goes out as it is, to be named with all that do not fit.
        if num_heads and len(parts[0]) == num_heads * self.config["head_dim"]:
            parts = [_unpermute(part, num_heads) for part in parts]
        return QuantizedTensor(*parts) if len(parts) == 2 else parts[0]


def read_gguf(path: Path | str) -> GgufCheckpoint:
    """Read a GGUF's metadata; its weights are read when `tensors()` is iterated.

    raises: CheckpointError for a file that is missing, corrupt, truncated, or holds tensors that
            nobody asked for; ConfigError, naming the key, for what minifuse does not implement
    """
    path = Path(path)
    reader = _open(path)
    metadata = _read_metadata(path, reader)
    # Several arrays for each string of a vocabulary; hundreds of megabytes, and needed no more.
    reader.fields.clear()
    parts = metadata.get("split.count", 0)
    # Zero is what joining them leaves behind.
    if parts not in (0, 1):
        raise ConfigError(
            f"{path} is one of {parts} parts of a model; join them first, with llama.cpp's "
            "llama-gguf-split --merge"
        )
    _check_tensors(path, reader)
    config = _read_config(path, reader, metadata)
    tokenizer_files = read_tokenizer(path, metadata, config)
    return GgufCheckpoint(path, config, tokenizer_files, _own_dtype(reader), reader)


class _Reader(GGUFReader):
    """The package's reader, which believes what a file says of its own size.

    It takes what lies beyond the end for nothing, so that an array that claims 2**60 bytes is read
    for ever; and it keeps an object of some hundred bytes for every number that it reads.
    """

    _num_reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != int(count):
            raise ValueError(f"wants {int(count)} values at byte {int(offset)}, has {len(found)}")
        self._num_reads += 1
        if self._num_reads > MAX_GGUF_VALUES:
            raise ValueError(f"has more than {MAX_GGUF_VALUES:,} values beside its weights")
        return found


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; wanted a GGUF")
    check_readable(path)
    try:
        # Counts and lengths of a corrupt file overflow inside numpy before they are refused.
        with np.errstate(all="ignore"):
            reader = _Reader(path)
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


def _check_tensors(path: Path, reader: GGUFReader) -> None:
    names = (tensor.name for tensor in reader.tensors)
    unknown = [name for name in names if name != _ROPE_FREQS and _hub_name(name) is None]
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that minifuse does not know: {list_names(unknown)}"
        )
    odd = [
        f"{tensor.name} is {tensor.shape.tolist()}"
        for tensor in reader.tensors
        if len(tensor.shape) != (1 if _is_vector(tensor.name) else 2) or not tensor.shape.all()
    ]
    if odd:
        raise CheckpointError(f"{path} holds what is neither matrix nor vector: {list_names(odd)}")


def _is_vector(name: str) -> bool:
    return name == _ROPE_FREQS or name.endswith(("_norm.weight", ".bias"))


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
    shape = [int(size) for size in reversed(stored.shape)]
    tensor = torch.empty(shape, dtype=torch.float32)
    step = max(1, _DECODED_NUMBERS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        rows = stored.data[start : start + step]
        try:
            # Damaged scales overflow; what comes of them is looked for below.
            with np.errstate(all="ignore"):
                values = dequantize(rows, stored.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: tensor {stored.name} has the type {stored.tensor_type.name}, which the "
                "gguf package does not decode; choose another quantisation of the model"
            ) from None
        if not np.isfinite(values).all():
            raise _not_finite(path, stored)
        tensor[start : start + step].numpy()[:] = values
    return tensor


def _read_int4(path: Path, stored: ReaderTensor) -> Tensor | QuantizedTensor:
    """Nibbles and scales of Q4_0 (w = d * (q - 8)) and Q4_1 (w = d * q + m), the floats of others.

    The numbers d and m are f16, and are rounded to bf16; nothing else is.
    """
    is_q4_1 = stored.tensor_type == GGMLQuantizationType.Q4_1
    if not is_q4_1 and stored.tensor_type != GGMLQuantizationType.Q4_0:
        return _dequantize(path, stored)
    rows = int(stored.shape[1])
    num_scales = 1 + is_q4_1
    blocks = torch.from_numpy(stored.data.reshape(rows, -1, 2 * num_scales + 16).copy())
    numbers = blocks[..., : 2 * num_scales].contiguous().view(torch.float16).float()
    if not torch.isfinite(numbers).all():
        raise _not_finite(path, stored)
    scale = numbers[..., 0]
    zero = numbers[..., 1] + 8 * scale if is_q4_1 else torch.zeros_like(scale)
    return join_groups(blocks[..., 2 * num_scales :], scale, zero)


def _not_finite(path: Path, stored: ReaderTensor) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {stored.name} holds numbers that are not finite; fetch the file again"
    )


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2+1, ...) back to halves.

    tensor: [H*D, ...]
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
    scaling = read_rope_scaling(path, prefix, fields)
    if _ROPE_FREQS in tensors:
        if scaling:
            raise ConfigError(
                f"{path} has both {_ROPE_FREQS} and {prefix}rope.scaling.type "
                f"{scaling['rope_type']}; minifuse implements one scaling of RoPE at a time"
            )
        scaling = _find_llama3_scaling(path, tensors[_ROPE_FREQS], config)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def read_rope_scaling(path: Path, prefix: str, fields: dict) -> dict | None:
    """The hub's `rope_scaling` of a GGUF's keys, None where RoPE is not scaled.

    fields: metadata under `prefix`, which, with `path`, is for messages
    raises: ConfigError, naming the key
    """
    kind = fields.get("rope.scaling.type", "linear")
    # llama.cpp reads a factor of zero as none, and the older key where the newer one is missing.
    key = "rope.scaling.factor"
    if kind == "linear" and key not in fields:
        key = "rope.scale_linear"
    if kind == "none" or (kind == "linear" and fields.get(key, 0.0) in (0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{path}: {prefix}rope.scaling.type is {kind!r}; minifuse implements none, linear and "
            "yarn"
        )
    scaling = {"rope_type": kind, "factor": _float(path, prefix, fields, key)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _integer(
            path, prefix, fields, "rope.scaling.original_context_length"
        )
        scaling |= {
            field: _float(path, prefix, fields, yarn_key)
            for field, yarn_key in _YARN_KEYS.items()
            if yarn_key in fields
        }
    return scaling


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


def _find_llama3_scaling(path: Path, stored: ReaderTensor, config: dict) -> dict:
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
            f"{path}: {_ROPE_FREQS} is no RoPE scaling of Llama 3, and minifuse reads no "
            "other from such a tensor; use the model's safetensors with their config.json"
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
