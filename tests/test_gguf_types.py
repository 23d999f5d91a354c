"""Every tensor type of GGUF that converts, against transformers' reading and plain loops."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_files import VOCAB, make_model, random_blocks, write_gguf

from minifuse.checkpoint import load_params, params_from_tensors
from minifuse.config import ModelConfig
from minifuse.convert import convert
from minifuse.errors import CheckpointError
from minifuse.files import read_json
from minifuse.gguf import read_gguf
from minifuse.model import forward_plain

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
PLAIN_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
I_TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS"),
)
# The gguf package decodes these, transformers does not.
OTHER_TYPES = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
TOKEN_IDS = torch.arange(0, VOCAB, 19)[None]


def make_wide(family="llama"):
    """Rows of 256 and 512, which is what blocks of 256 need."""
    return make_model(family, hidden_size=256, intermediate_size=512, head_dim=64)


def q4_k_m(name):
    """What llama.cpp calls Q4_K_M: the head and every other v and down matrix have more bits."""
    is_finer = name == "output.weight" or name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight")
    return "Q6_K" if is_finer else "Q4_K"


def our_logits(checkpoint):
    config = ModelConfig.from_hf(checkpoint.config)
    params = params_from_tensors(checkpoint.tensors(), config, torch.float32)
    with torch.inference_mode():
        return forward_plain(config, params, TOKEN_IDS)


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *(("llama", quant) for quant in (*PLAIN_TYPES, *K_TYPES, *I_TYPES, q4_k_m)),
        *(("qwen2", quant) for quant in (*K_TYPES, q4_k_m)),
    ],
)
def test_logits_are_those_of_transformers_reading(tmp_path, family, quant):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", make_wide(family), quant)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    )
    checkpoint = read_gguf(path)
    torch.testing.assert_close(
        dict(checkpoint.tensors()), dict(reference.state_dict()), rtol=0, atol=0
    )
    with torch.inference_mode():
        wanted = reference(TOKEN_IDS).logits
    assert wanted.std() > 0.01  # the blocks are no zeros
    torch.testing.assert_close(our_logits(checkpoint), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("quant", OTHER_TYPES)
def test_types_that_transformers_does_not_read(tmp_path, quant):
    path = write_gguf(tmp_path / "m.gguf", make_wide(), quant)
    checkpoint = read_gguf(path)
    assert torch.isfinite(our_logits(checkpoint)).all()
    blocks = {t.name: t for t in gguf.GGUFReader(path).tensors}["token_embd.weight"]
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.tensor_type))
    embed = dict(checkpoint.tensors())["model.embed_tokens.weight"]
    torch.testing.assert_close(embed, wanted, rtol=0, atol=0)


def test_every_type_of_the_package_is_tested_here():
    known = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert known == {*PLAIN_TYPES, *K_TYPES, *I_TYPES, *OTHER_TYPES}


def half(block, at):
    return np.float32(block[at : at + 2].view(np.float16)[0])


def q2_k(block, i):
    """scales u8[16]: scale and minimum of 16 numbers each; qs u8[64]; d, dmin f16."""
    quant = block[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    scale = block[i // 16]
    return (half(block, 80) * np.float32(scale & 15)) * np.float32(quant) - half(
        block, 82
    ) * np.float32(scale >> 4)


def q3_k(block, i):
    """hmask u8[32]: the third bits; qs u8[64]: two more; scales: 16 of 6 bits in u8[12]; d f16."""
    quant = int(block[32 + 32 * (i // 128) + i % 32]) >> 2 * (i % 128 // 32) & 3
    if not block[i % 32] >> i // 32 & 1:
        quant -= 4
    group = i // 16
    low = block[96 + group] & 15 if group < 8 else block[96 + group - 8] >> 4
    high = block[104 + group % 4] >> 2 * (group // 4) & 3
    scale = int(low | high << 4) - 32
    return half(block, 108) * np.float32(scale) * np.float32(quant)


def scale_and_minimum(packed, group):
    """6 bits each: the upper ones of the last four groups are on top of the first four's."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    upper_scale, upper_minimum = packed[group - 4] >> 6, packed[group] >> 6
    return packed[group + 4] & 15 | upper_scale << 4, packed[group + 4] >> 4 | upper_minimum << 4


def q4_k(block, i):
    """d, dmin f16; scales and minima u8[12]; qs u8[128]: a row of low halves, then of high ones."""
    byte = block[16 + 32 * (i // 64) + i % 32]
    quant = byte >> 4 if i // 32 % 2 else byte & 15
    scale, minimum = scale_and_minimum(block[4:16], i // 32)
    return half(block, 0) * np.float32(scale) * np.float32(quant) - half(block, 2) * np.float32(
        minimum
    )


def q5_k(block, i):
    """As Q4_K, with the fifth bits, u8[32], before qs."""
    byte = block[48 + 32 * (i // 64) + i % 32]
    quant = byte >> 4 if i // 32 % 2 else byte & 15
    quant |= (block[16 + i % 32] >> i // 32 & 1) << 4
    scale, minimum = scale_and_minimum(block[4:16], i // 32)
    return half(block, 0) * np.float32(scale) * np.float32(quant) - half(block, 2) * np.float32(
        minimum
    )


def q6_k(block, i):
    """ql u8[128]: four bits; qh u8[64]: two more; scales i8[16]; d f16."""
    quarter = i % 128 // 32
    byte = block[64 * (i // 128) + 32 * (quarter % 2) + i % 32]
    low = byte >> 4 if quarter >= 2 else byte & 15
    high = block[128 + 32 * (i // 128) + i % 32] >> 2 * quarter & 3
    scale = block[192:208].view(np.int8)[i // 16]
    return half(block, 208) * np.float32(scale) * np.float32(int(low | high << 4) - 32)


TWINS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


@pytest.mark.parametrize("quant", K_TYPES)
def test_k_types_decode_as_their_definition_says(tmp_path, quant):
    """The twins go number by number, after the structs of llama.cpp's ggml-common.h."""
    path = write_gguf(tmp_path / "m.gguf", make_wide(), quant)
    down = dict(read_gguf(path).tensors())["model.layers.1.mlp.down_proj.weight"]
    blocks = random_blocks(GGMLQuantizationType[quant], tuple(down.shape)).reshape(256, 2, -1)
    wanted = [
        TWINS[quant](blocks[row, index // 256], index % 256)
        for row in range(4)
        for index in range(512)
    ]
    torch.testing.assert_close(down[:4].flatten(), torch.tensor(np.array(wanted)), rtol=0, atol=0)


def test_decoding_in_blocks_of_rows_changes_nothing(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", make_wide(), q4_k_m)
    whole = dict(read_gguf(path).tensors())
    monkeypatch.setattr("minifuse.gguf._DECODED_NUMBERS", 7 * 256)
    torch.testing.assert_close(dict(read_gguf(path).tensors()), whole, rtol=0, atol=0)


def test_mixed_types_convert(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_wide(), q4_k_m)
    convert(path, tmp_path / "out", dtype="float32")
    config = ModelConfig.from_hf(read_json(tmp_path / "out/config.json"))
    params = params_from_tensors(read_gguf(path).tensors(), config, torch.float32)
    torch.testing.assert_close(load_params(tmp_path / "out", config), params, rtol=0, atol=0)
    assert read_gguf(path).own_dtype == "bfloat16"


@pytest.mark.parametrize("quant", K_TYPES)
def test_scales_that_are_not_finite_are_refused(tmp_path, quant):
    path = write_gguf(tmp_path / "m.gguf", make_wide(), quant)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.ffn_up.weight"]
    at = stored.data_offset + {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(quant, 0)
    data = bytearray(path.read_bytes())
    data[at : at + 2] = np.float16("inf").tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight holds numbers .* not finite"):
        dict(read_gguf(path).tensors())
