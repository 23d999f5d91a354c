"""Files of a model: weights, configs, GGUF, tokenizers, templates; whole and damaged."""

import io
import json
import math
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import gguf
import safetensors.torch
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from minifuse.chat import read_chat_template, render_frame
from minifuse.checkpoint import expected_tensors, load_params, open_params, stored_dtype
from minifuse.config import ModelConfig
from minifuse.convert import open_source
from minifuse.files import read_json
from minifuse.gguf import read_gguf
from minifuse.hub import _read_shards
from minifuse.loader import load_model, read_eos_ids
from minifuse.saving import QuantizedSource, save_folder
from minifuse.tokenizer import Tokenizer

from .checking import Files, Target
from .mutations import DEEP, bytes_like, dump, json_texts, trees

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"

# Valid examples


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [0],
}
CONFIGS = (
    CONFIG,
    CONFIG | {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    CONFIG
    | {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    CONFIG
    | {
        "model_type": "mistral",
        "sliding_window": 8,
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_scaling": None,
    },
)
_TEXT = "The capital of France is Paris.\n" * 3 + "def f(x):\n    return x + 1\n"


@cache
def weights_of(model: int) -> dict[str, torch.Tensor]:
    shapes = expected_tensors(ModelConfig.from_hf(CONFIGS[model]))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@cache
def hub_files(model: int = 0) -> Files:
    """A folder in hub layout, its weights in one file."""
    return {
        "config.json": dump(CONFIGS[model]),
        "tokenizer.json": dump(tokenizer_trees()[0]),
        "model.safetensors": safetensors.torch.save(weights_of(model)),
    }


@cache
def tokenizer_trees() -> tuple[dict, ...]:
    """tokenizer.json of every kind of model, normalizer, pre-tokenizer, decoder and processor."""
    controls = [AddedToken(text, special=True) for text in ("<|end|>", "<|start|>", "<unk>")]

    def train(kind: str, pre, decoder, normalizer=None, **options) -> dict:
        unknown = {} if options.pop("no_unknown", False) else {"unk_token": "<unk>"}
        trainer = getattr(tokenizers.trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")(
            vocab_size=320,
            special_tokens=controls,
            show_progress=False,
            **({"unk_token": "<unk>"} if kind == "Unigram" else {}),
            **options,
        )
        tokenizer = tokenizers.Tokenizer(
            models.Unigram() if kind == "Unigram" else getattr(models, kind)(**unknown)
        )
        tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator([_TEXT] * 3, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 1)]
        )
        return json.loads(tokenizer.to_str())

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
    sequence = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    metaspace = pre_tokenizers.Metaspace(), decoders.Metaspace()
    undone = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    llama = train(
        "BPE",
        pre_tokenizers.Digits(),
        decoders.Sequence([*undone, decoders.Strip(" ", 1, 0)]),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    )
    llama["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return (
        train("BPE", bytes_, decoders.ByteLevel(), initial_alphabet=alphabet, no_unknown=True),
        train("BPE", sequence, decoders.ByteLevel(), normalizers.NFC(), initial_alphabet=alphabet),
        llama,
        train("Unigram", *metaspace, normalizers.NFKC()),
        train("WordPiece", pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()),
        train("WordLevel", pre_tokenizers.Whitespace(), decoders.Fuse()),
    )


TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "bos_token": "<|start|>",
    "eos_token": {"content": "<|end|>", "special": True},
    "added_tokens_decoder": {"0": {"content": "<|end|>", "special": True}},
    "additional_special_tokens": ["The", "<|end|>"],
    "extra_special_tokens": {"image_token": "of"},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


# Weights


def _safetensors(pick: Random) -> Files:
    model = pick.randint(0, 1)
    files = dict(hub_files(model))
    data = files["model.safetensors"]
    (length,) = struct.unpack("<Q", data[:8])
    if pick.randint(0, 1):
        files["model.safetensors"] = bytes_like(pick, data)
        return files
    header = json_texts(pick, json.loads(data[8 : 8 + length]))
    claimed = pick.choice((len(header),) * 8 + (0, len(data), 10**8, 2**60, 2**64 - 1))
    files["model.safetensors"] = struct.pack("<Q", claimed) + header + data[8 + length :]
    return files


def _read_weights(folder: Path) -> None:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    stored_dtype(folder)
    load_params(folder, config)
    list(open_params(folder, config, torch.float32).layers)


def _index(pick: Random) -> Files:
    files = dict(hub_files())
    weights = weights_of(0)
    names = sorted(weights)
    placed = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        files[shard] = safetensors.torch.save({name: weights[name] for name in half})
        placed |= dict.fromkeys(half, shard)
    del files["model.safetensors"]
    valid = {"metadata": {"total_size": 1}, "weight_map": placed}
    return files | {"model.safetensors.index.json": json_texts(pick, valid)}


def _read_index(folder: Path) -> None:
    for name in _read_shards(folder / "model.safetensors.index.json"):
        assert (folder / name).resolve().is_relative_to(folder.resolve()), name
    load_model(folder, device="cpu")


def _config(pick: Random) -> Files:
    model = pick.randint(0, len(CONFIGS) - 1)
    files = hub_files(model) | {"config.json": json_texts(pick, CONFIGS[model])}
    if pick.randint(0, 1):
        valid = {"eos_token_id": [0, 1], "bos_token_id": 1}
        files["generation_config.json"] = json_texts(pick, valid)
    return files


def _read_config(folder: Path) -> None:
    read_eos_ids(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    assert config.context_length > 0
    assert math.isfinite(config.attention_scale)
    config.rope_length(10**6)
    load_model(folder, device="cpu")


def _torch_file(pick: Random) -> Files:
    files = {"config.json": dump(CONFIG)}
    content = io.BytesIO()
    is_zip = pick.randint(0, 1)
    torch.save(weights_of(0), content, _use_new_zipfile_serialization=is_zip)
    fragments = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"R.", b"(", b"t", b"\x80\x02", b"2" * 200)
    return files | {"pytorch_model.bin": bytes_like(pick, content.getvalue(), fragments)}


def _read_torch_file(folder: Path) -> None:
    dict(open_source(folder).tensors())


# GGUF


_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS |= {12: "d"}
_STRING, _ARRAY = 8, 9


def _pack(kind: object, value: object) -> bytes:
    """A number as the format wants it, whatever it is."""
    form = _FORMATS.get(kind, "Q") if isinstance(kind, int) else "I"
    try:
        return struct.pack(f"<{form}", value)
    except (struct.error, OverflowError):
        size = struct.calcsize(form)
        number = value if isinstance(value, int) else 0
        return (number % 256**size).to_bytes(size, "little")


def _pack_text(value: object) -> bytes:
    text = (value if isinstance(value, str) else "").replace(DEEP, "deep")
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _pack_value(kind: object, value: object) -> bytes:
    if kind == _STRING:
        return _pack_text(value)
    if kind != _ARRAY:
        return _pack(kind, value)
    value = value if isinstance(value, dict) else {}
    items, values = value.get("items", 4), value.get("values", [])
    packed = [_pack_value(items, one) for one in values if isinstance(values, list)]
    return _pack(4, items) + _pack(10, value.get("count", len(packed))) + b"".join(packed)


def write_gguf(tree: object, data: bytes) -> bytes:
    """A GGUF of such a tree as `gguf_trees` has; what makes no sense in it becomes zeros."""
    tree = tree if isinstance(tree, dict) else {}
    head = [_pack(4, tree.get("magic")), _pack(4, tree.get("version"))]
    head += [_pack(10, tree.get("tensor_count")), _pack(10, tree.get("kv_count"))]
    for name in ("kv", "tensors"):
        for entry in tree.get(name) if isinstance(tree.get(name), list) else ():
            entry = entry if isinstance(entry, dict) else {}
            head.append(_pack_text(entry.get("name")))
            if name == "kv":
                head.append(_pack(4, entry.get("type")))
                head.append(_pack_value(entry.get("type"), entry.get("value")))
                continue
            dims = entry.get("dims") if isinstance(entry.get("dims"), list) else []
            head.append(_pack(4, entry.get("num_dims", len(dims))))
            head += [_pack(10, size) for size in dims]
            head += [_pack(4, entry.get("type")), _pack(10, entry.get("offset"))]
    text = b"".join(head)
    return text + b"\0" * (-len(text) % 32) + data


def _array(items: int, values: list) -> dict:
    return {"items": items, "count": len(values), "values": values}


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


@cache
def gguf_trees() -> tuple[tuple[dict, bytes], ...]:
    """Headers and data: byte-level BPE with f32 and f16, SentencePiece with 4 bits and scaling."""
    vocab = tokenizer_trees()[0]["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].get)
    tokens += [f"<fill{number}>" for number in range(320 - len(tokens))]
    bpe = {
        "ggml.model": (8, "gpt2"),
        "ggml.pre": (8, "gpt-2"),
        "ggml.tokens": (9, _array(8, tokens)),
        "ggml.token_type": (9, _array(5, [3, 3, 3, *[1] * 317])),
        "ggml.merges": (9, _array(8, [" ".join(pair) for pair in vocab["merges"]])),
        "ggml.add_bos_token": (7, True),
    }
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghij"]
    pieces += ["ab", "abc", "\u2581a", "\u2581ab", "\u2581"]
    llama = {
        "ggml.model": (8, "llama"),
        "ggml.tokens": (9, _array(8, pieces)),
        "ggml.token_type": (9, _array(5, [2, 3, 3, *[6] * 256, *[1] * 15])),
        "ggml.scores": (9, _array(6, [0.0] * 259 + [-float(rank) for rank in range(15)])),
        "ggml.unknown_token_id": (4, 0),
        "ggml.add_space_prefix": (7, True),
    }
    scaled = {
        "rope.scaling.type": (8, "yarn"),
        "rope.scaling.factor": (6, 4.0),
        "rope.scaling.original_context_length": (4, 64),
    }
    return (
        _gguf_tree(bpe, lambda name: "F16" if "attn" in name else "F32", {}, with_freqs=True),
        _gguf_tree(llama, lambda name: "Q4_1" if "ffn" in name else "Q4_0", scaled),
    )


def _gguf_tree(
    tokenizer: dict, type_of: Callable[[str], str], scaled: dict, *, with_freqs: bool = False
) -> tuple[dict, bytes]:
    fields = {
        "block_count": (4, 2),
        "context_length": (4, 256),
        "embedding_length": (4, 64),
        "feed_forward_length": (4, 64),
        "attention.head_count": (4, 2),
        "attention.head_count_kv": (4, 1),
        "attention.key_length": (4, 32),
        "attention.layer_norm_rms_epsilon": (6, 1e-5),
        "rope.freq_base": (6, 10000.0),
        **scaled,
    }
    kv = {"general.architecture": (8, "llama")} | {f"llama.{k}": v for k, v in fields.items()}
    kv |= {f"tokenizer.{k}": v for k, v in tokenizer.items()}
    kv |= {
        "tokenizer.ggml.bos_token_id": (4, 1),
        "tokenizer.ggml.eos_token_id": (4, 0),
        "tokenizer.chat_template": (8, "{{ messages[0].content }}"),
    }
    tensors, data = [], b""
    arrays = {name: value.numpy() for name, value in weights_of(0).items()}
    if with_freqs:
        # No scaling at all, as far as Llama 3's goes: a factor of one.
        arrays["rope_freqs"] = torch.ones(16).numpy()
    for name, array in arrays.items():
        parts = name.split(".")
        if name != "rope_freqs":
            block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
            name = f"{block}{_GGUF_NAMES[parts[-2]]}"
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else type_of(name)]
        content = gguf.quants.quantize(array, kind).tobytes()
        tensors.append(
            {
                "name": f"{name}.weight",
                "dims": list(reversed(array.shape)),
                "type": int(kind),
                "offset": len(data),
            }
        )
        data += content + b"\0" * (-len(content) % 32)
    tree = {
        "magic": gguf.GGUF_MAGIC,
        "version": 3,
        "tensor_count": len(tensors),
        "kv_count": len(kv),
        "kv": [{"name": k, "type": kind, "value": value} for k, (kind, value) in kv.items()],
        "tensors": tensors,
    }
    return tree, data


def _gguf(pick: Random) -> Files:
    tree, data = pick.choice(gguf_trees())
    content = write_gguf(trees(pick, tree) if pick.randint(0, 3) else tree, data)
    return {"m.gguf": content if pick.randint(0, 2) else bytes_like(pick, content)}


def _read_gguf(folder: Path) -> None:
    checkpoint = read_gguf(folder / "m.gguf")
    is_small = len(checkpoint.config) % 2
    source = QuantizedSource(checkpoint, "int4") if is_small else checkpoint
    save_folder(folder / "out", source, dtype="bfloat16")
    assert not (folder / "out").is_symlink()
    _use_tokenizer(Tokenizer.from_folder(folder / "out"))
    read_chat_template(folder / "out")


# Tokenizers and templates


def _tokenizer(pick: Random) -> Files:
    valid = pick.choice(tokenizer_trees())
    files = {"tokenizer.json": dump(valid)}
    if pick.randint(0, 1):
        files["tokenizer_config.json"] = dump(TOKENIZER_CONFIG)
    name = pick.choice(sorted(files) + ["tokenizer.json"] * 2)
    valid = valid if name == "tokenizer.json" else TOKENIZER_CONFIG
    return files | {name: json_texts(pick, valid)}


def _use_tokenizer(tokenizer: Tokenizer) -> None:
    text = "The  capital of <|start|>\n\N{GRINNING FACE} <0x41>\t12345 "
    for is_start in (True, False):
        ids = tokenizer.encode(text, is_start=is_start)
        assert tokenizer.control_ids.isdisjoint(ids)
    ids += tokenizer.encode_template(text, is_start=True)
    tokenizer.is_start_after(text)
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    written = "".join(map(stream.push, ids)) + stream.finish()
    assert written == tokenizer.decode(ids)


def _read_tokenizer(folder: Path) -> None:
    _use_tokenizer(Tokenizer.from_folder(folder))


_JINJA = tuple(
    text.encode()
    for text in (
        "{{", "}}", "{%", "%}", "{#", "#}", "{{ ''.__class__.__mro__ }}", "{{ messages }}",
        "{% for m in messages %}", "{% endfor %}", "{% if x is defined %}", "{% endif %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% set ns = namespace(a=1) %}",
        "{{ 9 ** (9 ** 9) }}", "{{ 'x' * 10 ** 10 }}", "{{ messages[0].content }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ raise_exception('no\\n') }}", "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '%c' % 999999999999 }}", "{{ '\\ud800' }}", "{% include 'a' %}", "{% extends 'a' %}",
        "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ x|attr('__class__') }}",
        "{{ lipsum.__globals__['os'].popen('id') }}", "{{ dict(a=1).fromkeys(range(9)) }}",
        "{{ strftime_now('%' ~ 'Y' * 99999) }}", "\0", "\x1b[31m", "\r\n", "{{- ", " -}}",
    )
)  # fmt: skip


@cache
def _templates() -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(TEMPLATES.glob("*.jinja")))


def _template(pick: Random) -> Files:
    valid = pick.choice((*_templates(), b"{{ messages[-1].content }}"))
    return {
        "chat_template.jinja": bytes_like(pick, valid, _JINJA),
        "tokenizer_config.json": dump(TOKENIZER_CONFIG),
    }


def _read_template(folder: Path) -> None:
    template = read_chat_template(folder)
    assert template is not None
    system = "Be brief." if len(template.text) % 2 else None
    render_frame(template, system=system)


def _template_files(pick: Random) -> Files:
    text = "{{ messages[0].content }}"
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": text}]
    templates = (text, named, {"default": text, "rag": text}, None)
    config = TOKENIZER_CONFIG | {"chat_template": pick.choice(templates)}
    files = {
        "tokenizer_config.json": json_texts(pick, config),
        "special_tokens_map.json": json_texts(pick, {"bos_token": "<s>", "eos_token": None}),
        "chat_template.json": json_texts(pick, {"chat_template": text}),
    }
    if not pick.randint(0, 3):
        files["chat_template.jinja"] = bytes_like(pick, text.encode(), _JINJA)
    return files


TARGETS = (
    Target("safetensors", _safetensors, _read_weights, 2),
    Target("index", _index, _read_index, 2),
    Target("config", _config, _read_config, 2),
    Target("torch-file", _torch_file, _read_torch_file, 4),
    Target("gguf", _gguf, _read_gguf, 4),
    Target("tokenizer", _tokenizer, _read_tokenizer, 2),
    Target("template", _template, _read_template, 20),
    Target("template-files", _template_files, read_chat_template),
)
