"""Tiny random models as real files: hub folders by transformers, GGUFs by gguf's own writer."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 320
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROLS = ("<|end|>", "<|start|>")

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(_CLASSES)
# Architectures of GGUF: llama.cpp knows Mistral as a llama.
GGUF_FAMILIES = tuple(family for family in FAMILIES if family != "mistral")

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def make_model(family: str, **overrides) -> PreTrainedModel:
    """A random f32 model of a family; every weight differs from its neighbours, biases too."""
    config_class, model_class = _CLASSES[family]
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "head_dim": 32 if family == "qwen3" else 16,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = model_class(config_class(**(settings | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_larger_model(**overrides) -> PreTrainedModel:
    """About 150 MB, so that what Python itself allocates does not count."""
    return make_model(
        "llama",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=16000,
        head_dim=64,
        **overrides,
    )


def make_tokenizer(pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer) -> dict:
    """A byte-level BPE trained on this file: tokens, their merges and types as GGUF keeps them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(CONTROLS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert len(tokens) == VOCAB
    return {
        "tokens": tokens,
        "types": [3 if token in CONTROLS else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer": tokenizer,
    }


def make_sentencepiece() -> dict:
    """A SentencePiece BPE trained on this file: tokens, scores and types as GGUF keeps them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False)
    tokenizer.train([__file__], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # Merges in their order, each token but once, then the letters, as SentencePiece lists them.
    merged = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    learned = merged + sorted(model["vocab"].keys() - set(merged))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokens": ["<unk>", "<s>", "</s>", *byte_tokens, *learned],
        "types": [2, 3, 3] + [6] * 256 + [1] * len(learned),
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(learned))],
    }


def write_hub_folder(folder: Path, model: PreTrainedModel, **save_options) -> Path:
    """config.json and weights by transformers, tokenizer.json beside them."""
    model.save_pretrained(folder, **save_options)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    make_tokenizer(byte_level)["tokenizer"].save(str(folder / "tokenizer.json"))
    return folder


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quant: str | Callable[[str], str] = "F32",
    change: Callable[[dict, dict], None] | None = None,
) -> Path:
    """Write a model the way llama.cpp's converter does: matrices as `quant`, vectors as F32.

    quant:  the type of all matrices, or of each by its name; what the gguf package cannot encode
            becomes random blocks
    change: may edit the metadata ({key: value}) and the f32 arrays before they
            are written
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    arrays = {
        _gguf_name(name): _permute(config, name, tensor.numpy())
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    metadata = _make_metadata(config)
    if change is not None:
        change(metadata, arrays)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, array in arrays.items():
        kind_name = quant if isinstance(quant, str) else quant(name)
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else kind_name]
        if kind.name in ("F32", "F16"):
            writer.add_tensor(name, gguf.quants.quantize(array, kind))
            continue
        try:
            data = gguf.quants.quantize(array, kind)
        except NotImplementedError:
            data = random_blocks(kind, array.shape)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where a block's f16 scales are, in bytes.
_SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """Rows of valid blocks: every bit random, but scales such that numbers stay near one tenth.

    returns: u8[rows, bytes of a row]
    """
    generator = np.random.default_rng([int(kind), *shape])
    block_len, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // block_len, num_bytes), np.uint8)
    if kind.name == "MXFP4":  # one byte, an exponent of two
        blocks[..., 0] = generator.integers(118, 124, blocks.shape[:2])
    elif kind.name == "NVFP4":  # bytes of their own floating point; the largest is no number
        blocks[..., :4] %= 0x30
    elif kind.name == "IQ1_M":  # the upper four bits of each of four words
        blocks[..., 49::2] &= 0x0F
        blocks[..., 55] |= 0x20
    else:
        top = {"Q6_K": 3e-5, "Q3_K": 1e-3, "IQ4_XS": 3e-5}.get(kind.name, 3e-3)
        for at in _SCALES_AT.get(kind.name, (num_bytes - 2 if kind.name[0] == "T" else 0,)):
            scales = generator.uniform(0.3, 1, (*blocks.shape[:2], 1)) * top
            blocks[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _make_metadata(config) -> dict:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = make_tokenizer(byte_level)
    prefix = config.model_type
    rope = config.rope_parameters
    return {
        f"{prefix}.block_count": config.num_hidden_layers,
        f"{prefix}.context_length": config.max_position_embeddings,
        f"{prefix}.embedding_length": config.hidden_size,
        f"{prefix}.feed_forward_length": config.intermediate_size,
        f"{prefix}.attention.head_count": config.num_attention_heads,
        f"{prefix}.attention.head_count_kv": config.num_key_value_heads,
        f"{prefix}.attention.key_length": config.head_dim,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{prefix}.rope.freq_base": float(rope["rope_theta"]),
        f"{prefix}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary["tokens"],
        "tokenizer.ggml.token_type": vocabulary["types"],
        "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_NAMES[module]}.{kind}"


def _permute(config, name: str, array: np.ndarray) -> np.ndarray:
    """Llama's q and k rows as interleaved pairs, the other architectures as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if config.model_type != "llama" or module not in heads:
        return array
    halves = array.reshape(heads[module], 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
