"""Hub checkpoints: exact, strict in one message, and never two copies of the weights in memory."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import FAMILIES, make_larger_model, make_model

from minifuse import checkpoint
from minifuse.checkpoint import (
    count_parameters,
    expected_tensors,
    find_tensors,
    load_params,
    stored_dtype,
)
from minifuse.config import ModelConfig
from minifuse.errors import CheckpointError, ConfigError
from minifuse.files import read_json

VARIANTS = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "qwen3-tied": {"tie_word_embeddings": True},
}


def save_tiny(folder, variant="llama", **options):
    """A folder written by transformers; its config, and its state dict."""
    model = make_model(variant.split("-")[0], **VARIANTS[variant])
    model.save_pretrained(folder, **options)
    return ModelConfig.from_hf(read_json(folder / "config.json")), model.state_dict()


def edit_weights(folder, change):
    """Rewrite model.safetensors after `change` has edited its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_params_hold_every_tensor_in_its_rows(tmp_path, variant):
    config, state = save_tiny(tmp_path, variant)
    params = load_params(tmp_path, config)
    layer = params.layers[1]
    hub = {
        name.removeprefix("model.layers.1."): value
        for name, value in state.items()
        if name.startswith("model.layers.1.")
    }

    def stack(kind, *modules):
        return torch.cat([hub[f"{module}.{kind}"] for module in modules])

    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    wanted = {
        "attn_norm": hub["input_layernorm.weight"],
        "wqkv": stack("weight", *attention),
        "wo": hub["self_attn.o_proj.weight"],
        "mlp_norm": hub["post_attention_layernorm.weight"],
        "w_gate_up": stack("weight", *mlp),
        "w_down": hub["mlp.down_proj.weight"],
    }
    if config.attention_bias:
        wanted["bqkv"] = stack("bias", *attention)
    if config.attention_out_bias:
        wanted["bo"] = hub["self_attn.o_proj.bias"]
    if config.qk_norm:
        wanted["q_norm"] = hub["self_attn.q_norm.weight"]
        wanted["k_norm"] = hub["self_attn.k_norm.weight"]
    if config.mlp_bias:
        wanted["b_gate_up"] = stack("bias", *mlp)
        wanted["b_down"] = hub["mlp.down_proj.bias"]
    for field, value in layer._asdict().items():
        if field in wanted:
            torch.testing.assert_close(value, wanted[field], rtol=0, atol=0)
        else:
            assert value is None, field
    torch.testing.assert_close(params.embed, state["model.embed_tokens.weight"], rtol=0, atol=0)
    torch.testing.assert_close(params.final_norm, state["model.norm.weight"], rtol=0, atol=0)
    torch.testing.assert_close(params.lm_head, state["lm_head.weight"], rtol=0, atol=0)
    assert (params.lm_head is params.embed) == config.tie_word_embeddings
    assert count_parameters(config) == sum(t.numel() for t in state.values()) - (
        params.embed.numel() if config.tie_word_embeddings else 0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_that_transformers_writes(tmp_path, family):
    config, state = save_tiny(tmp_path, family)
    assert expected_tensors(config) == {name: tuple(t.shape) for name, t in state.items()}


def test_shards_load_as_one_file(tmp_path):
    config, _ = save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_params(tmp_path / "one", config), load_params(tmp_path / "many", config)
    torch.testing.assert_close(one, many, rtol=0, atol=0)


@pytest.mark.parametrize("names", [None, "bfloat16", "float16", "float32"])
def test_dtype_is_the_configs_else_the_tensors(tmp_path, names):
    config, _ = save_tiny(tmp_path)
    raw = read_json(tmp_path / "config.json")
    raw.pop("dtype", None)
    raw.pop("torch_dtype", None)
    if names:
        raw["torch_dtype"] = names
    (tmp_path / "config.json").write_text(json.dumps(raw))
    wanted = getattr(torch, names or "float32")
    assert stored_dtype(tmp_path) == wanted
    params = load_params(tmp_path, config)
    assert params.embed.dtype == params.layers[0].wqkv.dtype == wanted
    assert load_params(tmp_path, config, torch.bfloat16).embed.dtype == torch.bfloat16


def test_large_loads_show_their_progress(tmp_path, monkeypatch, capsys):
    config, _ = save_tiny(tmp_path)
    load_params(tmp_path, config)
    assert "loading" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "PROGRESS_BYTES", 1000)
    load_params(tmp_path, config)
    total = sum(tensor.num_bytes for tensor in find_tensors(tmp_path).values())
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in capsys.readouterr().err


def test_unknown_dtype_of_config_is_named(tmp_path):
    save_tiny(tmp_path)
    raw = read_json(tmp_path / "config.json") | {"dtype": "float8_e4m3fn"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="dtype is 'float8_e4m3fn'"):
        stored_dtype(tmp_path)


def test_one_message_names_everything_missing_unexpected_and_misshapen(tmp_path):
    config, _ = save_tiny(tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.9.surprise"] = torch.zeros(3)
        tensors["other"] = torch.zeros(3)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(7, 64)

    edit_weights(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_params(tmp_path, config)
    message = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight, model.norm.weight;" in message
    assert "unexpected: model.layers.9.surprise, other;" in message
    assert (
        "misshapen: model.layers.1.self_attn.k_proj.weight is [7, 64], wanted [32, 64]" in message
    )
    assert "\n" not in message
    assert caught.value.exit_status == 1


def test_buffers_of_old_checkpoints_are_let_pass(tmp_path):
    config, _ = save_tiny(tmp_path)
    before = load_params(tmp_path, config)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(tmp_path, change)
    torch.testing.assert_close(load_params(tmp_path, config), before, rtol=0, atol=0)


def test_tied_head_may_be_stored_again_but_not_contradict(tmp_path):
    config, _ = save_tiny(tmp_path, "llama-tied")
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    assert load_params(tmp_path, config).lm_head.shape == (320, 64)
    edit_weights(tmp_path, lambda t: t["lm_head.weight"][319, 63].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings true, but lm_head.weight"):
        load_params(tmp_path, config)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings true, but lm_head.weight"):
        load_params(tmp_path, config)


EMBED = "model.embed_tokens.weight"


def write_index(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../elsewhere.safetensors", "path inside of the folder"),
        ("a/../../elsewhere.safetensors", "path inside of the folder"),
        ("/etc/passwd", "path inside of the folder"),
        ("C:\\weights.safetensors", "path inside of the folder"),
        ("..\\weights.safetensors", "path inside of the folder"),
        ("", "path inside of the folder"),
        (7, "path inside of the folder"),
        ("model-00003-of-00009.safetensors", "which is not there"),
        ("x" * 5000, "which is not there"),
        ("two\nlines", r"names the shard 'two\\nlines', which is not there"),
        ("a\0b", "path inside of the folder"),
    ],
)
def test_index_that_leads_astray(tmp_path, shard, message):
    config, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    write_index(tmp_path, {"weight_map": {EMBED: "a.safetensors", "model.norm.weight": shard}})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_params(tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not JSON"),
        ("[]", "holds list; wanted a JSON object"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_index_that_is_no_index(tmp_path, content, message):
    config, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if content == "\udcff":
        (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    else:
        write_index(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        load_params(tmp_path, config)


def test_index_and_shards_that_disagree(tmp_path):
    config, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    write_index(tmp_path, {"weight_map": {EMBED: "a.safetensors", "ghost": "a.safetensors"}})
    with pytest.raises(CheckpointError, match="their shards do not hold: ghost"):
        load_params(tmp_path, config)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    write_index(tmp_path, {"weight_map": {EMBED: "a.safetensors", "x": "b.safetensors"}})
    with pytest.raises(CheckpointError, match=r"more than one shard holds lm_head.weight"):
        load_params(tmp_path, config)


def test_no_weights_at_all(tmp_path):
    config, _ = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*index.json"):
        load_params(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(CheckpointError, match="wanted weights as safetensors"):
        load_params(tmp_path, config)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5000, -1])
def test_truncated_file(tmp_path, kept):
    config, _ = save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
        load_params(tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "start",
    [b"GGUF", struct.pack("<Q", 2**40), struct.pack("<Q", 10) + b"{not json!"],
    ids=["another format", "huge header", "bad header"],
)
def test_wrong_header(tmp_path, start):
    config, _ = save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start) :])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_params(tmp_path, config)


def test_weights_that_are_no_floats(tmp_path):
    config, _ = save_tiny(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(64).char()}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is I8; wanted F64, F32"):
        load_params(tmp_path, config)


def test_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        find_tensors(tmp_path)


def test_float16_overflow_is_refused(tmp_path):
    config, _ = save_tiny(tmp_path)
    edit_weights(tmp_path, lambda t: t["model.norm.weight"][3].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has values beyond float16"):
        load_params(tmp_path, config, torch.float16)


PEAK = """
import sys
from pathlib import Path
import torch
from minifuse.checkpoint import expected_tensors, load_params
from minifuse.files import read_json
from minifuse.config import ModelConfig

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

folder = Path(sys.argv[1])
raw = read_json(folder / "config.json")
config = ModelConfig.from_hf(raw)
"""
LOAD = """
before = peak()
params = load_params(folder, config)
print(peak() - before)
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


def measure_peak(script, folder):
    """Bytes that a script adds to the peak memory of a process of its own."""
    command = [sys.executable, "-c", PEAK + script, str(folder)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@linux_only
@pytest.mark.parametrize("tied", [True, False])
def test_loading_takes_at_most_1_2_times_the_weights(tmp_path, tied):
    model = make_larger_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=40 * 10**6)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert measure_peak(LOAD, tmp_path) <= 1.2 * size


def test_a_folder_of_links_loads_as_the_hubs_cache_has_it(tmp_path):
    """Files are links to blobs outside of the folder, named by their hashes."""
    config, state = save_tiny(tmp_path / "blobs", max_shard_size="150kB")
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = path.rename(path.with_name(f"{number:064x}"))
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    params = load_params(snapshot, config)
    assert torch.equal(params.embed, state[EMBED])


def test_a_header_that_claims_the_world_is_refused_at_once(tmp_path):
    config, _ = save_tiny(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    for length in (2**60, 2**64 - 1):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
            load_params(tmp_path, config)
