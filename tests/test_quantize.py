"""Weights of 8 and 4 bits: rounding, files, GGUF's own scales, what is refused."""

import gguf
import pytest
import reference
import torch
from engine_cases import floats_of
from safetensors.torch import load_file, save_file
from tiny_files import make_model, write_gguf, write_hub_folder

from minifuse.checkpoint import (
    expected_tensors,
    find_tensors,
    load_params,
    params_from_tensors,
    weight_bytes,
    weight_kinds,
)
from minifuse.config import ModelConfig, quantization_field
from minifuse.convert import check, convert
from minifuse.errors import CheckpointError, ConfigError, UsageError
from minifuse.files import read_json, write_json
from minifuse.gguf import read_gguf
from minifuse.loader import load_model
from minifuse.quantize import QuantizedTensor, pack, packed_rows, quantize_weight
from minifuse.wheels import converted_folder, file_sha256

SCHEMES = ("int8", "int4")
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def make_folder(path, family="llama", **overrides):
    return write_hub_folder(path, make_model(family, **overrides))


# Rounding


@pytest.mark.parametrize("kind", SCHEMES)
def test_rounding_is_by_half_a_step_at_most(kind):
    weight = torch.randn(64, 160) * torch.logspace(-3, 2, 64)[:, None]
    stored = quantize_weight(weight, kind)
    found = reference.dequantize(stored.values, stored.scales)
    groups = weight.double().unflatten(1, (-1, 32 if kind == "int4" else 160))
    span = groups.amax(-1) - groups.amin(-1) if kind == "int4" else 2 * groups.abs().amax(-1)
    step = span / (15 if kind == "int4" else 254)
    # The scale is bf16: up to 2**-8 off, times 15 or 127 steps at the far end; the zero likewise.
    far = 15 * 2**-8 * step if kind == "int4" else 127 * 2**-8 * step
    zero = 2**-8 * groups.abs().amax(-1) * 2 if kind == "int4" else 0
    error = (found - weight.double()).abs().unflatten(1, (groups.shape[1], -1)).amax(-1)
    assert (error <= step * (0.5 + 2**-8) + far + zero).all()


@pytest.mark.parametrize("kind", SCHEMES)
def test_what_is_on_the_grid_stays(kind):
    stored = quantize_weight(torch.randn(64, 96), kind)
    exact = reference.dequantize(stored.values, stored.scales).float()
    again = quantize_weight(exact, kind)
    torch.testing.assert_close(
        reference.dequantize(again.values, again.scales).float(), exact, rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_constant_rows(kind, value):
    """No span at all: nothing is divided by zero."""
    stored = quantize_weight(torch.full((64, 64), value), kind)
    found = reference.dequantize(stored.values, stored.scales).float()
    torch.testing.assert_close(found, torch.full((64, 64), value), rtol=2**-8, atol=0)


def test_the_layout_of_a_file_drawn():
    """One row of 32: the first half in low nibbles, the second in high ones."""
    nibbles = [*range(16), *range(15, -1, -1)]
    weight = torch.tensor([[float(n) for n in nibbles]])
    stored = quantize_weight(weight, "int4")
    assert stored.values.tolist() == [[n | (15 - n) << 4 for n in range(16)]]
    assert stored.scales.tolist() == [[[1.0, 8.0]]]
    assert torch.equal(reference.dequantize(stored.values, stored.scales).float(), weight)
    stored = quantize_weight(torch.tensor([[-127.0, 0.0, 3.0, 127.0] * 8]), "int8")
    assert stored.values.tolist() == [[-127, 0, 3, 127] * 8]
    assert stored.scales.tolist() == [1.0]


def test_packing_takes_no_memory_of_its_own():
    stored = quantize_weight(torch.randn(128, 64), "int4")
    packed = pack(stored, torch.bfloat16)
    assert packed.values.data_ptr() == stored.values.data_ptr()
    assert packed.values.shape == (128 // packed_rows(), 64, packed_rows() // 2)


# Checkpoints


def test_which_weights_are_of_which_kind():
    config = ModelConfig.from_hf(make_model("llama", intermediate_size=96).config.to_dict())
    assert weight_kinds(config) == {}
    assert set(weight_kinds(config.quantized("int8")).values()) == {"int8"}
    kinds = weight_kinds(config.quantized("int4"))
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == "int8"
    assert kinds[Q_PROJ] == kinds[DOWN] == "int4"
    # 4 heads and 2 * 1 of 8 are 48 rows together, no multiple of 64.
    small = make_model("llama", head_dim=8, num_key_value_heads=1)
    kinds = weight_kinds(ModelConfig.from_hf(small.config.to_dict()).quantized("int4"))
    assert kinds[Q_PROJ] == kinds[Q_PROJ.replace("q_", "v_")] == "int8"
    assert kinds[DOWN] == "int4"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_folder_quantized_as_it_is_loaded(tmp_path, family, scheme):
    folder = make_folder(tmp_path / "tiny", family, tie_word_embeddings=family == "qwen2")
    loaded = load_model(folder, quantize=scheme)
    assert (loaded.config.quantize, loaded.dtype) == (scheme, torch.bfloat16)
    config = loaded.config.quantized(None)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = weight_kinds(config).get(name)
        stored = kind and quantize_weight(tensor, kind)
        tensors[name] = (
            reference.dequantize(*stored).float() if kind else tensor.to(torch.bfloat16).float()
        )
    plain = ModelConfig.from_hf(read_json(folder / "config.json"))
    wanted = params_from_tensors(tensors.items(), plain, torch.float32)
    found = loaded.params
    assert (found.lm_head is found.embed) == plain.tie_word_embeddings
    assert {p.dtype for p in (found.final_norm, found.layers[0].attn_norm)} == {torch.bfloat16}
    torch.testing.assert_close(
        floats_of(found), wanted, rtol=2**-20, atol=2**-20, check_dtype=False
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_quantized_folder_is_loaded_without_a_flag(tmp_path, scheme, max_shard_bytes):
    folder = make_folder(tmp_path / "tiny")
    target = tmp_path / "out"
    dtype = convert(folder, target, quantize=scheme, max_shard_bytes=max_shard_bytes)
    assert dtype == "bfloat16"
    raw = read_json(target / "config.json")
    assert raw["quantization_config"] == quantization_field(scheme)
    assert raw["torch_dtype"] == "bfloat16"
    config = ModelConfig.from_hf(raw)
    stored = find_tensors(target)
    assert {name: t.shape for name, t in stored.items()} == expected_tensors(config)
    assert stored[Q_PROJ + ".values"].dtype == ("U8" if scheme == "int4" else "I8")
    assert sum(t.num_bytes for t in stored.values()) == weight_bytes(config, torch.bfloat16)
    wanted = load_model(folder, quantize=scheme).params
    for flag in (None, "none", scheme):
        loaded = load_model(target, quantize=flag)
        assert (loaded.config.quantize, loaded.dtype) == (scheme, torch.bfloat16)
        torch.testing.assert_close(loaded.params, wanted, rtol=0, atol=0)
    other = next(s for s in SCHEMES if s != scheme)
    with pytest.raises(UsageError, match=f"quantize is '{other}', but .* stored as {scheme}"):
        load_model(target, quantize=other)
    # Once more, from the quantized folder: its bits are copied.
    convert(target, tmp_path / "copy")
    copied = {
        k: t for f in (tmp_path / "copy").glob("*.safetensors") for k, t in load_file(f).items()
    }
    first = {k: t for f in target.glob("*.safetensors") for k, t in load_file(f).items()}
    torch.testing.assert_close(copied, first, rtol=0, atol=0)
    assert check(folder, target).is_close


def test_check_finds_a_wrong_nibble(tmp_path):
    folder = make_folder(tmp_path / "tiny")
    convert(folder, tmp_path / "out", quantize="int4")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors[DOWN + ".values"] ^= 0x88
    save_file(tensors, tmp_path / "out/model.safetensors")
    assert not check(folder, tmp_path / "out").is_close


def test_int8_runs_in_float32_too(tmp_path):
    folder = make_folder(tmp_path / "tiny")
    convert(folder, tmp_path / "out", dtype="float32", quantize="int8")
    loaded = load_model(tmp_path / "out")
    assert loaded.dtype == loaded.params.embed.scales.dtype == torch.float32
    assert torch.equal(
        loaded.params.final_norm, load_model(folder).params.final_norm
    )  # not rounded


# GGUF


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_keeps_its_own_scales(tmp_path, family, quant):
    """Every weight is what GGUF says, but for d and m, which are rounded from f16 to bf16."""
    path = write_gguf(tmp_path / "tiny.gguf", make_model(family), quant)
    exact = dict(read_gguf(path).tensors())
    config = ModelConfig.from_hf(read_gguf(path).config).quantized("int4")
    wanted = {name for name, kind in weight_kinds(config).items() if kind == "int4"}
    own = dict(read_gguf(path).tensors(wanted))
    assert {n for n, t in own.items() if isinstance(t, QuantizedTensor)} == wanted
    for name in wanted:
        found = reference.dequantize(*own[name])
        groups = exact[name].double().unflatten(1, (-1, 32))
        error = (found - exact[name].double()).abs().unflatten(1, (-1, 32)).amax(-1)
        # w = (q - 8) * d + z: d is off by 2**-8 of itself, up to 8 times, and z by 2**-8 of itself.
        d = own[name].scales[..., 0].double().abs()
        z = own[name].scales[..., 1].double().abs()
        assert (error <= 1.01 * 2**-8 * (8 * d + z) + 2**-24 * groups.abs().amax(-1)).all()


def test_gguf_scales_that_bfloat16_holds_are_exact(tmp_path):
    """Powers of two as d and m: then nothing is rounded at all, the rows' order included."""

    def on_a_grid(_, arrays):
        for array in arrays.values():
            if array.ndim == 2:
                steps = torch.arange(array.size).reshape(array.shape) * 7 % 16
                steps[:, ::32], steps[:, 1::32] = 0, 15
                array[:] = (steps / 64 - 0.125).numpy()

    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "Q4_1", change=on_a_grid)
    exact = dict(read_gguf(path).tensors())
    own = dict(read_gguf(path).tensors({Q_PROJ, DOWN}))
    for name in (Q_PROJ, DOWN):
        assert torch.equal(reference.dequantize(*own[name]), exact[name].double())


def test_other_types_of_a_gguf_are_rounded_from_their_floats(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path / "home"))

    def kind(name):
        return "Q8_0" if "ffn_down" in name else "Q4_1"

    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), kind)
    loaded = load_model(path, quantize="int4")
    folder = converted_folder(file_sha256(path), "bfloat16", "int4")
    assert loaded.folder == folder
    assert folder.name == "bfloat16-int4-v1"
    tensors = dict(read_gguf(path).tensors())
    stored = load_file(folder / "model.safetensors")
    wanted = quantize_weight(tensors[DOWN], "int4")
    assert torch.equal(stored[DOWN + ".values"], wanted.values)
    assert torch.equal(stored[DOWN + ".scales"], wanted.scales)
    # The floats have a folder of their own.
    assert load_model(path).config.quantize is None
    names = sorted(inner.name for inner in folder.parent.iterdir())
    assert names == ["auto-v1", "bfloat16-int4-v1"]
    convert(path, tmp_path / "out", quantize="int4")
    again = load_params(tmp_path / "out", ModelConfig.from_hf(read_json(folder / "config.json")))
    torch.testing.assert_close(again, loaded.params, rtol=0, atol=0)


def test_damaged_scales_of_a_gguf(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "Q4_0")
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
    content = bytearray(path.read_bytes())
    content[stored.data_offset : stored.data_offset + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"blk.0.attn_q.weight holds numbers that are not fin"
    ):
        list(read_gguf(path).tensors({Q_PROJ}))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int2"}, "quantize is 'int2'; wanted none, int8, int4"),
        (
            {"quantize": "int4", "dtype": "float32"},
            "int4 weights run in bfloat16; use that, or auto",
        ),
        ({"quantize": "int8", "dtype": "float16"}, "int8 weights run in bfloat16 or float32"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    folder = make_folder(tmp_path / "tiny")
    with pytest.raises(UsageError, match=message) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)
    if "dtype" in options:
        with pytest.raises(UsageError, match=message):
            convert(folder, tmp_path / "out", **options)
        convert(folder, tmp_path / "stored", quantize=options["quantize"])
        with pytest.raises(UsageError, match=message):
            load_model(tmp_path / "stored", dtype=options["dtype"])


def test_cuda_is_refused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "tiny")
    monkeypatch.setattr("minifuse.loader.resolve_device", lambda _: torch.device("cuda"))
    with pytest.raises(UsageError, match="int4 weights are not implemented on cuda"):
        load_model(folder, quantize="int4")
    convert(folder, tmp_path / "out", quantize="int8")
    with pytest.raises(UsageError, match="int8 weights are not implemented on cuda"):
        load_model(tmp_path / "out")


def test_rows_that_do_not_divide_into_groups(tmp_path):
    folder = make_folder(tmp_path / "tiny", intermediate_size=72)
    with pytest.raises(
        UsageError, match="intermediate_size is 72; quantized weights want multiples"
    ):
        load_model(folder, quantize="int8")


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq", "bits": 4},
        quantization_field("int4") | {"version": 2},
        quantization_field("int4") | {"group_size": 64},
        quantization_field("int4") | {"scheme": "int3"},
    ],
)
def test_quantization_that_is_not_ours(tmp_path, change):
    folder = make_folder(tmp_path / "tiny")
    raw = read_json(folder / "config.json")
    write_json(folder / "config.json", raw | {"quantization_config": change})
    with pytest.raises(ConfigError, match="config field quantization_config is"):
        load_model(folder)


def test_values_of_another_type(tmp_path):
    folder = make_folder(tmp_path / "tiny")
    convert(folder, tmp_path / "out", quantize="int8")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {Q_PROJ + ".values": tensors[Q_PROJ + ".values"].view(torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.values is U8"):
        load_model(tmp_path / "out")
    save_file({k: t for k, t in tensors.items() if k != Q_PROJ + ".scales"}, path)
    with pytest.raises(CheckpointError, match=f"missing: {Q_PROJ}.scales"):
        load_model(tmp_path / "out")


def test_weights_that_are_not_finite(tmp_path):
    folder = make_folder(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][3, 5] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{DOWN} has values that are not finite"):
        load_model(folder, quantize="int8")
