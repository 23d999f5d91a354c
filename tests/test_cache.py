"""The cache: writing by slot, moving keys to other positions, storing a prefix."""

import pytest
import torch
from tiny_files import make_model

from minifuse.cache import (
    KVCache,
    allocate_cache,
    cache_bytes,
    move_keys,
    read_slots,
    write_cache,
    write_slots,
)
from minifuse.checkpoint import params_from_tensors
from minifuse.config import ModelConfig
from minifuse.masks import Labels, make_mask, make_tables, write_rules
from minifuse.model import LayerMasks, forward
from minifuse.rope import apply_rope, make_cos_sin, make_inv_freq

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
CPU = torch.device("cpu")


def make_cache(rows: int, slots: int, dtype=torch.float32) -> KVCache:
    """A cache of random numbers."""
    cache = allocate_cache(CONFIG, rows=rows, slots=slots, dtype=dtype, device=CPU)
    for layer in cache.keys + cache.values:
        layer.normal_()
    return cache


def clone(cache: KVCache) -> KVCache:
    return KVCache(*(tuple(layer.clone() for layer in part) for part in cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocation(dtype, device):
    cache = allocate_cache(CONFIG, rows=2, slots=256, dtype=dtype, device=device)
    layers = cache.keys + cache.values
    assert len(cache.keys) == len(cache.values) == 3
    assert {layer.shape for layer in layers} == {(2, 2, 256, 16)}
    assert {layer.dtype for layer in layers} == {dtype}
    assert not any(layer.any() for layer in layers)
    assert cache.num_slots == 256
    # Inductor copies a storage that two inputs share: every layer has its own.
    assert len({layer.untyped_storage().data_ptr() for layer in layers}) == len(layers)
    taken = sum(layer.untyped_storage().nbytes() for layer in layers)
    assert cache_bytes(CONFIG, rows=2, slots=256, dtype=dtype) == taken


def test_write_by_slot():
    cache = torch.zeros(2, 2, 8, 4)
    new = torch.randn(2, 2, 3, 4)
    slots = torch.tensor([[5, 1, 7], [2, 3, 4]])
    write_cache(cache, slots, new)
    wanted = torch.zeros(2, 2, 8, 4)
    for row in range(2):
        for token in range(3):
            wanted[row, :, slots[row, token]] = new[row, :, token]
    assert torch.equal(cache, wanted)


def test_padding_writes_to_slot_0_alone():
    cache = torch.randn(1, 2, 8, 4)
    before = cache.clone()
    new = torch.randn(1, 2, 4, 4)
    write_cache(cache, torch.tensor([[3, 0, 0, 0]]), new)
    assert torch.equal(cache[:, :, 3], new[:, :, 0])
    untouched = [1, 2, 4, 5, 6, 7]
    assert torch.equal(cache[:, :, untouched], before[:, :, untouched])


def test_move_copies_values_and_turns_keys():
    cache = make_cache(2, 16)
    before = clone(cache)
    inv_freq = make_inv_freq(CONFIG)
    source = torch.tensor([[2, 3, 0], [4, 5, 6]])
    target = torch.tensor([[9, 8, 0], [5, 6, 7]])  # row 1 overlaps its own source
    turns = torch.tensor([[7, 7, 0], [1, 30, 300]])
    move_keys(cache, source, target, turns, inv_freq)
    for layer in range(3):
        for row in range(2):
            moved = set()
            for old, new, turn in zip(source[row], target[row], turns[row], strict=True):
                if new == 0:
                    continue
                moved.add(int(new))
                key = before.keys[layer][row : row + 1, :, old : old + 1]
                wanted = apply_rope(key, *make_cos_sin(inv_freq, turn.view(1, 1)))
                torch.testing.assert_close(cache.keys[layer][row, :, new], wanted[0, :, 0])
                value = before.values[layer][row, :, old]
                assert torch.equal(cache.values[layer][row, :, new], value)
            kept = [slot for slot in range(1, 16) if slot not in moved]
            for part in range(2):
                now, then = cache[part][layer][row], before[part][layer][row]
                assert torch.equal(now[:, kept], then[:, kept])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_moved_keys_equal_keys_encoded_at_their_new_positions(family):
    """Token embeddings hold no position, so in the first layer a move is exact.

    In later layers the keys depend on what their tokens saw; a segment that sees itself alone
    sees the same distances wherever it stands, so all layers agree.
    """
    model = make_model(family, num_hidden_layers=3)
    config = ModelConfig.from_hf(model.config.to_dict())
    params = params_from_tensors(model.state_dict().items(), config, torch.float32)
    tokens = torch.randint(0, config.vocab_size, (1, 8))
    inv_freq = make_inv_freq(config)
    tables = make_tables(2, CPU)
    write_rules(tables, {1: {1: 0.0}})

    def encode(first_position: int, first_slot: int, cache: KVCache) -> None:
        slots = torch.arange(first_slot, first_slot + 8)
        key_labels = torch.zeros(128, dtype=torch.int32)
        key_labels[slots] = 1
        positions = torch.arange(first_position, first_position + 8)
        ones = torch.ones(8, dtype=torch.int32)
        labels = Labels(ones, slots, positions, key_labels, torch.zeros(128, dtype=torch.long))
        masks = LayerMasks(make_mask(labels, tables, 8), None)
        with torch.inference_mode():
            rows = (tokens, positions[None], slots[None])
            forward(params, config, *rows, inv_freq, cache, masks)

    cache = allocate_cache(config, rows=1, slots=128, dtype=torch.float32, device=CPU)
    encode(4, 1, cache)
    encode(41, 20, cache)
    source, target = torch.arange(1, 9)[None], torch.arange(60, 68)[None]
    move_keys(cache, source, target, torch.full((1, 8), 37), inv_freq)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        scale = keys.abs().max().item()
        # Float32 through at most three layers, near 1e-5 of the scale.
        torch.testing.assert_close(keys[:, :, 60:68], keys[:, :, 20:28], rtol=0, atol=1e-5 * scale)
        assert (keys[:, :, 60:68] - keys[:, :, 1:9]).abs().max() > 0.1 * scale
        assert torch.equal(values[:, :, 60:68], values[:, :, 1:9])


def test_stored_slots_come_back_in_others():
    source, target = make_cache(1, 16), make_cache(1, 32)
    before = clone(target)
    old, new = torch.tensor([1, 2, 3, 9, 8]), torch.tensor([20, 4, 5, 6, 31])
    stored = read_slots(source, old)
    assert stored.num_slots == 5
    wanted = clone(source)
    for layer in source.keys + source.values:
        layer.zero_()  # what is stored is a copy
    write_slots(target, new, stored)
    kept = [slot for slot in range(32) if slot not in new.tolist()]
    for part in range(2):
        for layer in range(3):
            now, then = target[part][layer], before[part][layer]
            assert torch.equal(now[:, :, new], wanted[part][layer][:, :, old])
            assert torch.equal(now[:, :, kept], then[:, :, kept])
