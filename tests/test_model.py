"""The decoder against transformers: random checkpoints through real files and our own loader."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from tiny_files import make_model
from torch import Tensor

from minifuse.checkpoint import load_params
from minifuse.config import ModelConfig
from minifuse.executor import Executor, Token
from minifuse.files import read_json
from minifuse.model import (
    Params,
    fold_queries,
    forward_plain,
    rms_norm,
    unfold_queries,
)
from minifuse.pool import Need, Size

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough that toy heads have fast, slow and blended frequencies.
    "original_max_position_embeddings": 64,
}
SCALED = {"rope_theta": 10000.0, "factor": 3.0}
YARN = {**SCALED, "rope_type": "yarn", "original_max_position_embeddings": 64}
# name: family, and what its config says beside the defaults of `make_model`, which has G = 2
VARIANTS = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {}),
    "llama 3, rope scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama, large theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, G = 3": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    ),
    "llama, G = 4": ("llama", {"num_key_value_heads": 1}),
    "llama, own head_dim": ("llama", {"head_dim": 32}),
    "llama, attention bias": ("llama", {"attention_bias": True}),
    "llama, MLP bias": ("llama", {"mlp_bias": True}),
    "llama, everything": (
        "llama",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama, linear": ("llama", {"rope_parameters": {**SCALED, "rope_type": "linear"}}),
    # Within the original length, 256: transformers changes frequencies from call to call beyond.
    "llama, dynamic": ("llama", {"rope_parameters": {**SCALED, "rope_type": "dynamic"}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 11}),
    "mistral, window as long as a block": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "qwen2, window in some layers": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 1,
        },
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {**YARN, "truncate": False}}),
    "qwen2, tied, G = 4": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, G = 1": ("qwen3", {"num_key_value_heads": 4}),
    "qwen3, every other layer slides": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3, tied, attention bias": (
        "qwen3",
        {"attention_bias": True, "tie_word_embeddings": True},
    ),
}
# The number. Logits here are near 10, so it is 1e-5 of their scale.
ATOL = 1e-4


@cache
def make_reference(variant: str):
    family, changes = VARIANTS[variant]
    return make_model(family, **changes)


@pytest.fixture
def load(tmp_path):
    """Write a variant by transformers' own `save_pretrained`, read it by ours."""

    def load(variant: str, **options) -> tuple[ModelConfig, Params]:
        make_reference(variant).save_pretrained(tmp_path, **options)
        config = ModelConfig.from_hf(read_json(tmp_path / "config.json"))
        return config, load_params(tmp_path, config, torch.float32)

    return load


@torch.inference_mode()
def reference_logits(model, tokens: Tensor) -> Tensor:
    return model(tokens).logits.float()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 320, shape)


def assert_same_logits(found: Tensor, wanted: Tensor) -> None:
    # The tolerance is absolute: logits that vanish would agree whatever the code did.
    assert wanted.std() > 0.5
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_logits_equal_transformers(load, variant):
    model = make_reference(variant)
    config, params = load(variant)
    tokens = random_tokens(2, 100)
    assert_same_logits(forward_plain(config, params, tokens), reference_logits(model, tokens))


@pytest.mark.parametrize("length", [1, 2, 31, 33, 128, 129])
def test_plain_logits_at_any_length(load, length):
    config, params = load("llama, G = 3")
    tokens = random_tokens(1, length)
    wanted = reference_logits(make_reference("llama, G = 3"), tokens)
    assert_same_logits(forward_plain(config, params, tokens), wanted)


def test_shards_are_read_as_one_file_is(load):
    config, params = load("llama 3", max_shard_size="100KB")
    tokens = random_tokens(1, 20)
    wanted = reference_logits(make_reference("llama 3"), tokens)
    assert_same_logits(forward_plain(config, params, tokens), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_decode_equals_transformers(load, variant):
    check_prefill_then_decode(load, variant, lengths=(100, 77), steps=(1, 5))


def test_many_chunks_equal_one_sequence(load):
    check_prefill_then_decode(load, "llama 3", lengths=(170, 77), steps=(1, 1, 40))


@contextmanager
def leased(executor: Executor, rules: list[dict], slots: int = 200):
    """A pool of 1,024 slots, and a lease for each request's rules."""
    with executor.pool(Size(slots=1024, labels=16)) as pool:
        inv_freq = executor.make_inv_freq(None)
        leases = [pool.lease(Need(slots, len(rule)), inv_freq) for rule in rules]
        pool.write_rules(list(zip(leases, rules, strict=True)))
        yield pool, leases


def check_prefill_then_decode(load, variant: str, lengths, steps) -> None:
    """Requests of different lengths; one label that sees itself is plain causal attention."""
    model = make_reference(variant)
    config, params = load(variant)
    executor = Executor(config, params, compile=False)
    tokens = random_tokens(2, max(lengths) + sum(steps))
    wanted = reference_logits(model, tokens)

    def between(row: int, start: int, end: int) -> list[Token]:
        return [Token(int(tokens[row, i]), i, i + 1, 1) for i in range(start, end)]

    with leased(executor, [{1: {1: 0.0}}] * 2, slots=300) as (pool, leases):
        groups = [(lease, between(r, 0, lengths[r])) for r, lease in enumerate(leases)]
        for row, hidden in enumerate(executor.prefill(pool, groups)):
            assert_same_logits(executor.unembed(hidden), wanted[row, : lengths[row]])
        done = 0
        for step in steps:
            starts = [length + done for length in lengths]
            groups = [
                (lease, between(r, starts[r], starts[r] + step)) for r, lease in enumerate(leases)
            ]
            for row, logits in enumerate(executor.decode(pool, groups)):
                assert_same_logits(logits, wanted[row, starts[row] : starts[row] + step])
            done += step


def test_read_gives_the_logits_asked_for(load):
    """Short passes go through decode, long ones through prefill: the same numbers."""
    variant = "llama 3"
    config, params = load(variant)
    executor = Executor(config, params, compile=False)
    tokens = random_tokens(2, 200)
    all_logits = reference_logits(make_reference(variant), tokens)
    for length in (20, 200):
        rows = [
            [Token(int(tokens[row, i]), i, i + 1, 1) for i in range(length)] for row in range(2)
        ]
        wanted = [(0, length - 1), (1, 3), (1, length - 1)]
        with leased(executor, [{1: {1: 0.0}}] * 2) as (pool, leases):
            logits = executor.read(pool, list(zip(leases, rows, strict=True)), wanted)
        expected = torch.stack([all_logits[row, i] for row, i in wanted])
        assert_same_logits(logits, expected)


def test_the_bias_of_the_table_is_added_to_the_scores(load):
    """Two copies of a prompt under a bias of log(1/2) weigh as one: the logits do not change."""
    config, params = load("llama 3")
    executor = Executor(config, params, compile=False)
    prompt, last = random_tokens(12).tolist(), 7

    def run(copies: int, bias: float) -> Tensor:
        sees = {label: {label: 0.0} for label in range(1, copies + 1)}
        query = copies + 1
        sees[query] = {**dict.fromkeys(range(1, query), bias), query: 0.0}
        tokens = [
            Token(token, position, 1 + (label - 1) * len(prompt) + position, label)
            for label in range(1, query)
            for position, token in enumerate(prompt)
        ]
        with leased(executor, [sees]) as (pool, [lease]):
            executor.prefill(pool, [(lease, tokens)])
            end = 1 + copies * len(prompt)
            (logits,) = executor.decode(pool, [(lease, [Token(last, len(prompt), end, query)])])
            return logits

    one = run(1, 0.0)
    assert_same_logits(run(2, -torch.tensor(2.0).log().item()), one)
    assert (run(2, 0.0) - one).abs().max() > 100 * ATOL


@pytest.mark.parametrize("variant", ["llama 2", "llama, everything", "qwen2", "qwen3"])
def test_bfloat16_is_no_less_exact_than_transformers(variant, tmp_path):
    """Three ways: float32 of the same rounded weights is the truth, transformers' own bfloat16
    says how far off bfloat16 is."""
    family, changes = VARIANTS[variant]
    model = make_model(family, **changes).bfloat16()
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(read_json(tmp_path / "config.json"))
    params = load_params(tmp_path, config)
    assert params.embed.dtype == torch.bfloat16
    tokens = random_tokens(4, 64)
    theirs = reference_logits(model, tokens)
    truth = reference_logits(model.float(), tokens)
    ours = forward_plain(config, params, tokens)
    assert ours.isfinite().all()
    # Rounding the truth to bfloat16 once is the floor.
    floor = truth.bfloat16().float() - truth
    for measure in (lambda e: e.abs().max(), lambda e: e.pow(2).mean().sqrt()):
        own_error, their_error = measure(ours - truth), measure(theirs - truth)
        assert own_error <= 2 * their_error + measure(floor), (own_error, their_error)


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    # Mean square 12.5.
    wanted = torch.tensor([[2 * 3.0, -4.0]]) / (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(rms_norm(x, torch.tensor([2.0, -1.0]), 0.5), wanted)


def test_rms_norm_sums_squares_in_float32():
    x = torch.full((1, 1024), 300.0, dtype=torch.float16)  # squares overflow float16
    normed = rms_norm(x, torch.ones(1024, dtype=torch.float16), 1e-6)
    torch.testing.assert_close(normed, torch.ones_like(x))


def test_fold_and_unfold():
    """Folded query t * G + g of key/value head k is query head k * G + g of token t."""
    heads = torch.arange(2 * 3 * 6, dtype=torch.float32).view(2, 3, 6, 1).expand(2, 3, 6, 4)
    folded = fold_queries(heads, 2)
    assert folded.shape == (2, 2, 9, 4)
    for k in range(2):
        for t in range(3):
            for g in range(3):
                assert torch.equal(folded[:, k, t * 3 + g], heads[:, t, k * 3 + g])
    assert torch.equal(unfold_queries(folded, 3), heads.reshape(2, 3, 24))


def test_tied_heads_share_their_memory(load):
    _, params = load("llama, tied")
    assert params.lm_head is params.embed
    _, params = load("llama 3")
    assert params.lm_head is not params.embed
