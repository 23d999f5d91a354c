"""RoPE against transformers' own, and its algebra."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minifuse.config import ModelConfig
from minifuse.dense import rope_by_hand
from minifuse.rope import apply_rope, make_cos_sin, make_inv_freq

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
KINDS = {
    "default": DEFAULT,
    "default, large theta": {**DEFAULT, "rope_theta": 1e6},
    "llama3": LLAMA3,
    "llama3, factor 32": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "linear": {**DEFAULT, "rope_type": "linear", "factor": 4.0},
    "dynamic": {**DEFAULT, "rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    # Qwen 2.5's model card; fractions of pairs; and a ramp that is a step.
    "yarn, Qwen 2.5": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "yarn, not truncated": {**YARN, "truncate": False, "beta_fast": 20, "beta_slow": 2},
    "yarn, step": {**YARN, "truncate": False, "beta_fast": 2, "beta_slow": 2},
}


def make_configs(rope: dict, head_dim: int) -> tuple[LlamaConfig, ModelConfig]:
    hub = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=dict(rope),
    )
    return hub, ModelConfig.from_hf(hub.to_dict())


def rotate_by(x, positions, inv_freq):
    return apply_rope(x, *make_cos_sin(inv_freq, positions))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers(kind, head_dim):
    hub, config = make_configs(KINDS[kind], head_dim)
    wanted = LlamaRotaryEmbedding(hub).inv_freq
    inv_freq = make_inv_freq(config)
    assert inv_freq.dtype == torch.float32
    # The same few float32 operations, in another order: some units in the last place.
    torch.testing.assert_close(inv_freq, wanted, rtol=4e-7, atol=0)
    by_hand, factor = rope_by_hand(config)
    torch.testing.assert_close(inv_freq, torch.tensor(by_hand), rtol=1e-6, atol=0)
    assert config.attention_scale == pytest.approx(factor**2 / head_dim**0.5)


@pytest.mark.parametrize("length", [100, 4096, 4097, 8192, 20000])
def test_dynamic_frequencies_equal_transformers_at_any_length(length):
    hub, config = make_configs(KINDS["dynamic"], 64)
    rope = LlamaRotaryEmbedding(hub)
    rope(torch.zeros(1), torch.arange(length)[None])
    own = make_inv_freq(config, config.rope_length(length))
    torch.testing.assert_close(own, rope.inv_freq, rtol=4e-7, atol=0)
    by_hand, _ = rope_by_hand(config, config.rope_length(length))
    torch.testing.assert_close(own, torch.tensor(by_hand), rtol=1e-6, atol=0)
    assert torch.equal(own, make_inv_freq(config)) == (length <= 4096)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_equals_transformers(kind):
    hub, config = make_configs(KINDS[kind], 64)
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    positions = torch.randint(0, 4096, (2, 9))
    rope = LlamaRotaryEmbedding(hub)
    # YaRN's factor is ours on the scores, and theirs on cosine and sine.
    turns = (part / rope.attention_scaling for part in rope(q, positions))
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, *turns)
    cos, sin = make_cos_sin(rope.inv_freq, positions)
    # Equal frequencies, so only sin and cos themselves and one rounding of values near 3 differ.
    torch.testing.assert_close(apply_rope(q, cos, sin), wanted_q, rtol=0, atol=2e-6)
    torch.testing.assert_close(apply_rope(k, cos, sin), wanted_k, rtol=0, atol=2e-6)
    # With frequencies of our own an angle up to 4096 is off by at most 4096 * 4e-7.
    own = rotate_by(q, positions, make_inv_freq(config))
    torch.testing.assert_close(own, wanted_q, rtol=0, atol=4096 * 4e-7 * q.abs().max().item())


def test_llama3_divides_slow_frequencies_keeps_fast_ones_and_blends_between():
    _, scaled = make_configs(LLAMA3, 128)
    base = make_inv_freq(replace(scaled, rope_scaling=None))
    ratio = make_inv_freq(scaled) / base
    turns = 512 * base / (2 * torch.pi)
    is_fast, is_slow = turns > 4, turns < 1
    assert 0 < is_fast.sum() < 64
    assert 0 < is_slow.sum() < 64
    between = ~is_fast & ~is_slow
    assert between.any()
    torch.testing.assert_close(ratio[is_fast], torch.ones(int(is_fast.sum())))
    torch.testing.assert_close(ratio[is_slow], torch.full((int(is_slow.sum()),), 1 / 8))
    # The blend is linear in the turns over the original context, from 1 turn to 4.
    blend = (turns[between] - 1) / 3
    torch.testing.assert_close(ratio[between], blend + (1 - blend) / 8)


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_rotations_add_up(kind):
    _, config = make_configs(KINDS[kind], 64)
    inv_freq = make_inv_freq(config)
    x = torch.randn(1, 2, 50, 64)
    first, turn = torch.randint(0, 1500, (2, 1, 50))
    twice = rotate_by(rotate_by(x, first, inv_freq), turn, inv_freq)
    once = rotate_by(x, first + turn, inv_freq)
    # An angle near 3000 is rounded to 2^-13; three such angles meet here.
    atol = 3 * 2**-13 / 2 * x.abs().max().item()
    torch.testing.assert_close(twice, once, rtol=0, atol=atol)


def test_scores_depend_on_the_distance_alone():
    _, config = make_configs(DEFAULT, 64)
    inv_freq = make_inv_freq(config).double()
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(q_position, k_position):
        q_at = rotate_by(q, torch.tensor([[q_position]]), inv_freq)
        k_at = rotate_by(k, torch.tensor([[k_position]]), inv_freq)
        return (q_at * k_at).sum()

    # 64 products near 1 in float32.
    torch.testing.assert_close(score(7, 3), score(407, 403), rtol=0, atol=64 * 2e-7)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-2


def test_position_zero_turns_nothing():
    x = torch.randn(1, 2, 1, 16)
    _, config = make_configs(DEFAULT, 16)
    assert torch.equal(rotate_by(x, torch.zeros(1, 1, dtype=torch.long), make_inv_freq(config)), x)


def test_a_quarter_turn_pairs_the_halves():
    """By hand: dimension 0 turns into dimension 0 + D/2, at one radian per position."""
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    angles = torch.tensor([torch.pi / 2, 0.0]).view(1, 1, 2)
    wanted = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(apply_rope(x, angles.cos(), angles.sin()), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rotated_in_float32_and_rounded_once(dtype):
    _, config = make_configs(DEFAULT, 64)
    inv_freq = make_inv_freq(config)
    x = torch.randn(1, 2, 40, 64).to(dtype)
    # Odd positions above 256, which bfloat16 cannot tell from their neighbours.
    positions = torch.arange(1001, 1081, 2)[None]
    rotated = rotate_by(x, positions, inv_freq)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rotate_by(x.float(), positions, inv_freq).to(dtype))
    cos, sin = make_cos_sin(inv_freq, positions)
    assert cos.dtype == sin.dtype == torch.float32


def test_each_row_and_token_has_its_own_position():
    _, config = make_configs(DEFAULT, 16)
    inv_freq = make_inv_freq(config)
    x = torch.randn(2, 3, 4, 16)
    positions = torch.tensor([[0, 5, 5, 2], [7, 0, 1, 100]])
    rotated = rotate_by(x, positions, inv_freq)
    for row in range(2):
        for token in range(4):
            alone = rotate_by(
                x[row : row + 1, :, token : token + 1],
                positions[row : row + 1, token : token + 1],
                inv_freq,
            )
            torch.testing.assert_close(rotated[row, :, token], alone[0, :, 0])
