"""GGUF reading: exact against what was written, equal to transformers' own, or refused by name."""

# ruff: noqa: RUF001 - texts that look alike are what the tokenizer is tested on

import json
import random
import re
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_files import CONTROLS, GGUF_FAMILIES, VOCAB, make_model, make_tokenizer, write_gguf
from tokenizers import pre_tokenizers

from minifuse.checkpoint import expected_tensors, params_from_tensors
from minifuse.config import Llama3Scaling, ModelConfig
from minifuse.convert import convert
from minifuse.errors import CheckpointError, ConfigError, MinifuseError
from minifuse.gguf import read_gguf, read_rope_scaling
from minifuse.gguf_tokenizer import PRE_TOKENIZERS
from minifuse.rope import make_inv_freq
from minifuse.saving import save_folder
from minifuse.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"

BIASED = {"attention_bias": True, "mlp_bias": True}


def set_metadata(**values):
    """A change for write_gguf: keys with `__` for dots; None takes a key out."""

    def change(metadata, _):
        for key, value in values.items():
            name = key.replace("__", ".")
            metadata[name] = value
            if value is None:
                del metadata[name]

    return change


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in GGUF_FAMILIES),
        ("llama", BIASED),
        ("qwen2", {"num_key_value_heads": 1}),
    ],
)
def test_tensors_are_the_hubs_exactly(tmp_path, family, overrides):
    model = make_model(family, **overrides)
    checkpoint = read_gguf(write_gguf(tmp_path / "m.gguf", model))
    tensors = dict(checkpoint.tensors())
    torch.testing.assert_close(tensors, dict(model.state_dict()), rtol=0, atol=0)
    config = ModelConfig.from_hf(checkpoint.config)
    assert config == ModelConfig.from_hf(model.config.to_dict())
    assert expected_tensors(config) == {name: tuple(t.shape) for name, t in tensors.items()}
    assert checkpoint.own_dtype == "float32"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_head_is_tied_where_the_file_has_none(tmp_path, family):
    model = make_model(family, tie_word_embeddings=True)
    checkpoint = read_gguf(write_gguf(tmp_path / "m.gguf", model))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in dict(checkpoint.tensors())


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_tensor_type_reads_as_transformers_reads_it(tmp_path, family, quant):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", make_model(family), quant)
    checkpoint = read_gguf(path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    torch.testing.assert_close(
        dict(checkpoint.tensors()), dict(reference.state_dict()), rtol=0, atol=0
    )
    own = {"F32": "float32", "F16": "float16"}
    assert checkpoint.own_dtype == own.get(quant, "bfloat16")


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_logits_are_those_of_transformers_reading(tmp_path, family):
    from transformers import AutoModelForCausalLM

    from minifuse.model import forward_plain

    # transformers takes Qwen3's default for the size of a head, whatever the file says.
    overrides = {"head_dim": 128} if family == "qwen3" else {}
    path = write_gguf(tmp_path / "m.gguf", make_model(family, **overrides), "Q8_0")
    checkpoint = read_gguf(path)
    config = ModelConfig.from_hf(checkpoint.config)
    params = params_from_tensors(checkpoint.tensors(), config, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    )
    token_ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = reference(token_ids).logits
        torch.testing.assert_close(
            forward_plain(config, params, token_ids), wanted, rtol=0, atol=1e-4
        )


def test_epsilon_and_theta_are_the_decimals_that_float32_stands_for(tmp_path):
    model = make_model("llama", rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1234567.8})
    config = read_gguf(write_gguf(tmp_path / "m.gguf", model)).config
    assert repr(config["rms_norm_eps"]) == "1e-05"
    assert repr(config["rope_theta"]) == "1234567.8"


LLAMA3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)


def rope_freqs(head_dim=16, scaling=LLAMA3, theta=500000.0):
    """The divisors of llama.cpp's converter, by its formula in plain Python."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        turns = scaling.original_max_position_embeddings / wavelength
        blend = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = min(max(blend, 0), 1)
        factors.append(1 / ((1 - blend) / scaling.factor + blend))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_restored_from_its_divisors(tmp_path):
    model = make_model("llama", rope_parameters={"rope_theta": 500000.0})
    path = write_gguf(
        tmp_path / "m.gguf",
        model,
        change=lambda _, a: a.update({"rope_freqs.weight": rope_freqs()}),
    )
    checkpoint = read_gguf(path)
    config = ModelConfig.from_hf(checkpoint.config)
    assert config.rope_scaling == LLAMA3
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(make_inv_freq(config), plain / torch.from_numpy(rope_freqs()))
    assert "rope_freqs.weight" not in dict(checkpoint.tensors())


@pytest.mark.parametrize(
    "divisors",
    [
        rope_freqs(scaling=Llama3Scaling(32.0, 1.0, 8.0, 8192)),
        rope_freqs(scaling=Llama3Scaling(32.0, 1.0, 4.0, 4096)),
        rope_freqs(head_dim=32),
        np.full(8, 2, np.float32),
    ],
)
def test_other_divisors_of_frequencies_are_refused(tmp_path, divisors):
    model = make_model("llama", rope_parameters={"rope_theta": 500000.0})
    path = write_gguf(
        tmp_path / "m.gguf", model, change=lambda _, a: a.update({"rope_freqs.weight": divisors})
    )
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is no RoPE scaling of Llama 3"):
        read_gguf(path)


FACTOR, CONTEXT = "rope.scaling.factor", "rope.scaling.original_context_length"


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", FACTOR: 4.0}, None),
        ({FACTOR: 0.0}, None),
        ({"rope.scaling.type": "linear", FACTOR: 1.0}, None),
        ({"rope.scaling.type": "linear", FACTOR: 4.0}, {"rope_type": "linear", "factor": 4.0}),
        # llama.cpp's reading of a file that names no type, and of its older key.
        ({FACTOR: 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scale_linear": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"rope.scaling.type": "yarn", FACTOR: 4.0, CONTEXT: 32768},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                FACTOR: 40.0,
                CONTEXT: 4096,
                "rope.scaling.yarn_attn_factor": 1.1,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "attention_factor": 1.1,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
    ],
)
def test_rope_scaling_in_the_words_of_the_hub(fields, scaling):
    assert read_rope_scaling(Path("m.gguf"), "llama.", fields) == scaling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic'; minifuse implements"),
        ({"rope.scaling.type": "yarn", FACTOR: 0.0}, "rope.scaling.factor is 0.0; wanted a pos"),
        ({"rope.scaling.type": "yarn", FACTOR: 4.0}, f"{CONTEXT} is None; wanted one positive int"),
    ],
)
def test_rope_scaling_that_is_none(fields, message):
    with pytest.raises(ConfigError, match=rf"m\.gguf: llama\.{message}"):
        read_rope_scaling(Path("m.gguf"), "llama.", fields)


def test_rope_scaling_reaches_the_config(tmp_path):
    change = set_metadata(
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__factor=4.0,
        llama__rope__scaling__original_context_length=64,
    )
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    assert read_gguf(path).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_logits_with_scaled_rope_are_those_of_the_hubs_model(tmp_path, kind):
    from minifuse.model import forward_plain

    rope = {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0}
    metadata = {"llama__rope__scaling__type": kind, "llama__rope__scaling__factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
        metadata["llama__rope__scaling__original_context_length"] = 64
    model = make_model("llama", rope_parameters=rope)
    checkpoint = read_gguf(write_gguf(tmp_path / "m.gguf", model, change=set_metadata(**metadata)))
    config = ModelConfig.from_hf(checkpoint.config)
    params = params_from_tensors(checkpoint.tensors(), config, torch.float32)
    tokens = torch.randint(0, VOCAB, (1, 50))
    with torch.inference_mode():
        wanted = model(tokens).logits
    # The decoder's own parity with transformers, see test_model.
    torch.testing.assert_close(forward_plain(config, params, tokens), wanted, rtol=0, atol=1e-4)


def test_a_mistral_is_a_llama_to_gguf(tmp_path):
    """llama.cpp's converter knows no architecture of that name; without a window they are alike."""
    mistral = make_model("mistral", sliding_window=None)
    model = make_model("llama")
    model.load_state_dict(mistral.state_dict())
    tensors = dict(read_gguf(write_gguf(tmp_path / "m.gguf", model)).tensors())
    torch.testing.assert_close(tensors, dict(mistral.state_dict()), rtol=0, atol=0)


def test_two_scalings_of_rope_are_refused(tmp_path):
    def change(metadata, arrays):
        metadata["llama.rope.scaling.factor"] = 4.0
        arrays["rope_freqs.weight"] = rope_freqs()

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(ConfigError, match=r"has both rope_freqs.weight and .*type linear"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "general.architecture",
            "gemma3",
            "general.architecture is 'gemma3'; minifuse reads llama",
        ),
        ("llama.rope.scaling.type", "longrope", "rope.scaling.type is 'longrope'; minifuse impl"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.factor is None; wanted a positive"),
        (
            "llama.rope.scaling.factor",
            -4.0,
            "rope.scaling.factor is -4.0; wanted a positive number",
        ),
        ("llama.rope.scaling.attn_factor", 0.5, "rope.scaling.attn_factor is 0.5"),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, "rope.scaling.yarn_log_multiplier is 0.1"),
        ("split.count", 3, "is one of 3 parts of a model; join them first"),
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.attention.sliding_window", 4096, "llama.attention.sliding_window is 4096"),
        ("llama.logit_scale", 0.5, "llama.logit_scale is 0.5"),
        ("llama.attention.causal", False, "llama.attention.causal is False"),
        ("llama.brand_new", 1, "llama.brand_new is 1, which minifuse does not implement"),
        (
            "llama.rope.dimension_count",
            8,
            "llama.rope.dimension_count is 8, but a head's size is 16",
        ),
        ("llama.attention.value_length", 8, "llama.attention.value_length is 8, but a head's"),
        (
            "llama.attention.head_count_kv",
            [2, 1],
            r"head_count_kv is \[2, 1\]; wanted one positive",
        ),
        ("llama.block_count", None, "llama.block_count is None; wanted one positive integer"),
        ("llama.embedding_length", 0, "llama.embedding_length is 0; wanted one positive integer"),
        ("llama.attention.layer_norm_rms_epsilon", None, "rms_epsilon is None; wanted a positive"),
        ("tokenizer.ggml.model", "t5", "tokenizer.ggml.model is 't5'; minifuse converts gpt2"),
        ("tokenizer.ggml.pre", "tekken", "tokenizer.ggml.pre is 'tekken'; minifuse knows gpt-2"),
        ("tokenizer.ggml.pre", "default", "tokenizer.ggml.pre is 'default'"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre is None"),
        ("tokenizer.ggml.add_space_prefix", True, "tokenizer.ggml.add_space_prefix is true"),
        ("tokenizer.ggml.add_eos_token", True, "tokenizer.ggml.add_eos_token is true"),
        ("tokenizer.ggml.token_type", [1] * (VOCAB - 1) + [6], r"token_type holds \[6\]"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, key, value, message):
    change = set_metadata(**{key: value})
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(ConfigError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.scaling.type", "linear"),
        ("llama.rope.scaling.factor", 1.0),
        ("llama.rope.scaling.factor", 0.0),
        ("llama.rope.scaling.finetuned", False),
        ("llama.attention.sliding_window", 0),
        ("split.count", 1),
        ("split.count", 0),
        ("llama.expert_count", 0),
        ("llama.attention.causal", True),
        ("llama.rope.dimension_count", 16),
        ("tokenizer.ggml.add_space_prefix", False),
    ],
)
def test_neutral_metadata_passes(tmp_path, key, value):
    plain = read_gguf(write_gguf(tmp_path / "plain.gguf", make_model("llama")))
    change = set_metadata(**{key: value})
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    assert read_gguf(path).config == plain.config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", None, "has no list tokenizer.ggml.tokens"),
        ("tokenizer.ggml.merges", None, "has no list tokenizer.ggml.merges"),
        (
            "tokenizer.ggml.token_type",
            [1, 1],
            f"has {VOCAB} tokenizer.ggml.tokens but 2 token types",
        ),
        ("tokenizer.ggml.merges", ["no such"], "has a tokenizer that does not hold together"),
        ("tokenizer.ggml.tokens", ["same"] * VOCAB, "has a token twice"),
        (
            "tokenizer.ggml.eos_token_id",
            VOCAB,
            f"eos_token_id is {VOCAB}; wanted one of the {VOCAB}",
        ),
    ],
)
def test_tokenizer_that_contradicts_itself(tmp_path, key, value, message):
    change = set_metadata(**{key: value})
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    def change(_, arrays):
        arrays["token_embd.weight"] = arrays["token_embd.weight"][:300]
        arrays["output.weight"] = arrays["output.weight"][:300]

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(CheckpointError, match=f"has {VOCAB} tokens but 300 rows"):
        read_gguf(path)


def test_unknown_tensors_are_named_together(tmp_path):
    extra = {name: np.zeros(4, np.float32) for name in ("blk.0.ffn_gate_exps.weight", "a.weight")}
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=lambda _, a: a.update(extra))
    with pytest.raises(CheckpointError, match=r"know: a.weight, blk.0.ffn_gate_exps.weight"):
        read_gguf(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    def change(_, arrays):
        arrays["blk.1.ffn_up.weight"][3, 7] = np.nan

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "F16", change)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight holds numbers .* not finite"):
        dict(read_gguf(path).tensors())


def test_missing_tensors_are_named_together_and_nothing_is_left(tmp_path):
    def change(_, arrays):
        del arrays["output_norm.weight"], arrays["blk.1.ffn_up.weight"]

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(
        CheckpointError, match=r"missing: model.layers.1.mlp.up_proj.weight, model."
    ):
        convert(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_misshapen_tensors_are_named_together(tmp_path):
    def change(_, arrays):
        arrays["blk.0.attn_q.weight"] = arrays["blk.0.attn_q.weight"][:19]
        arrays["blk.1.ffn_up.weight"] = arrays["blk.1.ffn_up.weight"][:5]

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight is [19, 64], wanted [64, 64]" in str(
        caught.value
    )
    assert "model.layers.1.mlp.up_proj.weight is [5, 64], wanted [96, 64]" in str(caught.value)


def test_undecodable_tensor_type_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    model = make_model("llama")
    write_gguf(path, model, "Q8_0")
    # The type of one tensor, rewritten to Q8_1, whose blocks are larger; the data stay in bounds.
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert int.from_bytes(data[at : at + 4], "little") == gguf.GGMLQuantizationType.Q8_0
    data[at : at + 4] = int(gguf.GGMLQuantizationType.Q8_1).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight has the type Q8_1"):
        dict(read_gguf(path).tensors())


@pytest.mark.parametrize("kind", [0, 8, 9])
def test_an_array_that_claims_the_world_is_refused_at_once(tmp_path, kind):
    """The package's reader takes what lies beyond the end for nothing, and counts on."""
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"))
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4
    claim = kind.to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    path.write_bytes(data[:at] + claim + data[at + 12 :])
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        read_gguf(path)


def test_metadata_without_end_is_not_kept(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"))
    monkeypatch.setattr("minifuse.gguf.MAX_GGUF_VALUES", 1000)
    with pytest.raises(CheckpointError, match="has more than 1,000 values beside its weights"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("name", "shape"), [("token_embd.weight", 320), ("output_norm.weight", (8, 8))]
)
def test_tensors_of_other_dimensions_are_named(tmp_path, name, shape):
    def change(_, arrays):
        arrays[name] = np.zeros(shape, dtype=np.float32)

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    with pytest.raises(CheckpointError, match=rf"neither matrix nor vector: {name} is \["):
        read_gguf(path)


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 200, 3000, 9000, -5000, -1])
def test_truncated_file(tmp_path, kept):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "Q8_0")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a readable GGUF file") as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    "content", [b"", b"GGML" + bytes(100), b"GGUF" + b"\x09" + bytes(99), b"PK"]
)
def test_no_gguf_at_all(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        read_gguf(path)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_gguf(tmp_path)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("fuzz") / "m.gguf", make_model("llama"), "Q8_0")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 12_000), value=st.integers(0, 255))
def test_a_corrupt_byte_never_raises_anything_else(tiny_gguf, tmp_path, at, value):
    data = bytearray(tiny_gguf.read_bytes())
    data[at] = value
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(data)
    message = ""
    try:
        checkpoint = read_gguf(path)
        ModelConfig.from_hf(checkpoint.config)
        dict(checkpoint.tensors())
    except MinifuseError as error:
        message = str(error)
    assert "\n" not in message


# The pre-tokenizers of the published tokenizer.json files, spelled out once more.
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def true_pre_tokenizer(pre):
    def gpt4(digits):
        words = tokenizers.Regex(_GPT4_WORDS.replace("DIGITS", digits))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama-bpe": gpt4("{1,3}"),
        "qwen2": gpt4(""),
    }[pre]


HARD_TEXTS = [
    "👩‍👩‍👧‍👦 family, flags 🇫🇷🇯🇵, skin 👍🏽, keycap 1️⃣, heart ❤️",
    "e\u0301 and \u00e9, Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘",
    "الأرقام ٠١٢٣٤٥٦٧٨٩ و ۰۱۲۳ و १२३ ๑๒๓",
    "你好，世界！日本語の文章。한국어 텍스트 １２３ 〇一二三",
    "\x00\x01\x02\x07\x08\x0b\x0c\x0e\x1b\x1f\x7f\x80\x85\x9f",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    " \n \n  x",
    "\u00a0",
    "a\u00a0b\u00a0\u00a01 \u2003\u2009\u200a2\u30003",
    "zero\u200bwidth\u200c\u200djoin\u2060er\ufeff",
    "\u202eright to left\u202c \u2066iso\u2069",
    "\ufffd\ufffe\uffff\U0010ffff\ue000\U000f0000",
    "½ ² ³ ⅷ Ⅳ ① ㊿ x² 10⁻³  ²   ½",
    "a   2 and 2024,  3.14  x",
    "It's I'LL we'Ve 'tis don't'd",
    "$ 5.00 + 7% == 12?!... --- ___ ```code```",
    "def f(x):\n    return x  # 42\n\n\n\t\tpass",
    "ﬁ ﬂ ǆ ß İ ı Å Å K",
    "https://example.org/a_b?c=d&e=%20#f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈 𒀀 🀄",
    "x" * 300 + "1" * 50 + " " * 40 + "9",
]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_pre_tokenizers_cut_text_as_the_published_ones(tmp_path, pre):
    vocabulary = make_tokenizer(true_pre_tokenizer(pre))
    change = set_metadata(
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__tokens=vocabulary["tokens"],
        tokenizer__ggml__merges=vocabulary["merges"],
    )
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    raw = read_gguf(path).tokenizer_files["tokenizer.json"]
    ours = tokenizers.Tokenizer.from_str(json.dumps(raw))
    reference = vocabulary["tokenizer"]
    if pre == "qwen2":
        reference.normalizer = tokenizers.normalizers.NFC()
    for text in [*HARD_TEXTS, *Path(__file__).read_text(encoding="utf-8").splitlines()]:
        encoding = ours.encode(text, add_special_tokens=False)
        if pre != "llama-bpe":
            assert encoding.ids == reference.encode(text).ids, text
        assert ours.pre_tokenizer.pre_tokenize_str(text) == (
            reference.pre_tokenizer.pre_tokenize_str(text)
        )
        normal = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert ours.decode(encoding.ids, skip_special_tokens=False) == normal
    assert raw["model"]["ignore_merges"] == (pre == "llama-bpe")


def test_aliases_of_pre_tokenizers():
    assert PRE_TOKENIZERS["llama3"] == PRE_TOKENIZERS["llama-bpe"] == PRE_TOKENIZERS["llama-v3"]


def test_token_types_become_added_tokens(tmp_path):
    def change(metadata, _):
        metadata["tokenizer.ggml.token_type"][-1] = 4
        metadata["tokenizer.ggml.token_type"][-2] = 5
        metadata["tokenizer.ggml.tokens"][-1] = "<tool>"
        metadata["tokenizer.ggml.tokens"][-2] = "[PAD318]"
        metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-2]

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    raw = read_gguf(path).tokenizer_files["tokenizer.json"]
    added = {token["content"]: (token["id"], token["special"]) for token in raw["added_tokens"]}
    assert added == {CONTROLS[0]: (0, True), CONTROLS[1]: (1, True), "<tool>": (VOCAB - 1, False)}
    assert "[PAD318]" not in raw["model"]["vocab"]
    ours = Tokenizer(raw)
    assert ours.control_ids == {0, 1, VOCAB - 1}
    assert ours.control_ids.isdisjoint(ours.encode("a<|end|><tool>[PAD318]", is_start=True))


@pytest.mark.parametrize(
    ("pre", "key", "adds"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos_is_added_where_the_file_says_so(tmp_path, pre, key, adds):
    change = set_metadata(tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=key)
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    files = read_gguf(path).tokenizer_files
    assert files["tokenizer_config.json"]["add_bos_token"] is adds
    full = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert (full.encode("a").ids[0] == 1) == adds
    assert (full.encode("a", "a").ids.count(1) == 2) == adds
    assert Tokenizer(files["tokenizer.json"]).bos_ids == ((1,) if adds else ())


def test_tokenizer_config_and_generation_config(tmp_path):
    change = set_metadata(
        tokenizer__ggml__padding_token_id=0,
        tokenizer__ggml__unknown_token_id=1,
        tokenizer__ggml__eot_token_id=1,
    )
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), change=change)
    files = read_gguf(path).tokenizer_files
    assert files["tokenizer_config.json"] == {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": "<|start|>",
        "chat_template": "{{ messages[0]['content'] }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|end|>",
        "model_max_length": 256,
        "pad_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|start|>",
    }
    assert files["generation_config.json"] == {
        "bos_token_id": 1,
        "eos_token_id": [0, 1],
        "pad_token_id": 0,
    }


def test_conversion_leaves_the_folder_of_a_quicker_process(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"))
    assert save_folder(tmp_path / "out", read_gguf(path), dtype="float32")
    before = (tmp_path / "out/config.json").stat()
    assert not save_folder(tmp_path / "out", read_gguf(path), dtype="float32")
    assert (tmp_path / "out/config.json").stat().st_ino == before.st_ino
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.fixture(scope="module")
def default_gguf():
    """The default model's GGUF as the loader keeps it."""
    from minifuse.cards import DEFAULT_CARD, find_card
    from minifuse.loader import resolve_model
    from minifuse.wheels import cache_dir

    resolve_model()
    source = find_card(DEFAULT_CARD).source
    return cache_dir() / "gguf" / source.sha256 / Path(source.member).name


def read_lines():
    """A few thousand lines of the shared data, the same ones every time."""
    if not DATA.is_dir():
        pytest.skip("shared/data is not there")
    lines = []
    for path in sorted(DATA.glob("*/*.jsonl")):
        # Without the escapes of JSON; long lines cut, so that many different ones fit.
        texts = [json.dumps(json.loads(line), ensure_ascii=False)[:400] for line in path.open()]
        lines += random.Random(0).sample(texts, min(400, len(texts)))
    assert len(lines) > 3000
    return lines


def is_number(char):
    return unicodedata.category(char).startswith("N")


def cut_at_numbers(text):
    """What `Digits(individual_digits=True)` does: numbers stand alone, the rest stays whole."""
    pieces = [""]
    for char in text:
        if is_number(char):
            pieces += [char, ""]
        else:
            pieces[-1] += char
    return pieces


def without_space_before_numbers(text):
    return re.sub(r"\s+(?=\S)", lambda m: "" if is_number(text[m.end()]) else m[0], text)


@pytest.mark.model
def test_default_token_ids_are_those_of_transformers_reading(default_gguf):
    """transformers ignores `pre: smollm`, which cuts text before and behind each digit.

    So a run of white space before a digit comes out differently there. Everything else is equal,
    and with the cuts made by hand transformers' own tokenizer gives our ids everywhere.
    """
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
    ours = Tokenizer(read_gguf(default_gguf).tokenizer_files["tokenizer.json"])
    texts = [*HARD_TEXTS, *read_lines()]
    differing = 0
    for text in texts:
        ids = ours.encode(text, is_start=True)
        assert ids == [i for piece in cut_at_numbers(text) for i in reference.encode(piece)], text
        if ids != reference.encode(text):
            differing += 1
            bare = without_space_before_numbers(text)
            assert bare != text
            assert ours.encode(bare, is_start=True) == reference.encode(bare), text
    print(f"{differing} of {len(texts)} texts differ, each by white space before a digit")
    assert differing < len(texts) / 10


@pytest.mark.model
def test_default_tensors_are_those_of_transformers_reading(default_gguf):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        default_gguf.parent, gguf_file=default_gguf.name, dtype="float32"
    ).state_dict()
    names = set()
    for name, tensor in read_gguf(default_gguf).tensors():
        torch.testing.assert_close({name: tensor}, {name: reference[name]}, rtol=0, atol=0)
        names.add(name)
    assert names == reference.keys() - {"lm_head.weight"}
