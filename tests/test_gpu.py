"""On CUDA: the same answers as anywhere, from graphs that are compiled and recorded once.

What lies beneath, blocks and masks, is tested where it is tested for the CPU.
"""

import random
import warnings
from dataclasses import replace

import pytest
import reference
import torch
from engine_cases import (
    REQUEST,
    WORDS,
    assert_identical,
    assert_same,
    check_results,
    nothing_compiles,
    sharpen,
)
from tiny_files import make_model, write_hub_folder

import minifuse
from minifuse.config import DTYPE_NAMES
from minifuse.executor import Token
from minifuse.methods import FusionMethod
from minifuse.pool import Need, Size
from minifuse.recompiles import recorded_cuda_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = {
    "llama": ("llama", {"max_position_embeddings": 2048}),
    # Three queries share a key: blocks of 128 of them are no whole number of tokens.
    "groups of three": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "max_position_embeddings": 2048},
    ),
    "window": ("mistral", {"sliding_window": 19, "max_position_embeddings": 2048}),
    "one layer slides": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 1,
            "max_position_embeddings": 2048,
        },
    ),
    # Torch's own choice of stages for the decode kernel makes an exception of these in float32.
    "wide heads": ("llama", {"head_dim": 256, "max_position_embeddings": 2048}),
}
LONG = {
    "prefix": "model = 42 " * 60,
    "segments": ["the key, " * 40, "return value " * 30 + "?"],
    "suffix": "A:",
}
# A bfloat16 keeps 8 bits: a few roundings of 2^-9 on scores of order 10. Estimated, not measured.
HALF_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.05}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    family, changes = SHAPES[request.param]
    model = sharpen(make_model(family, **changes))
    return write_hub_folder(tmp_path_factory.mktemp("gpu") / "model", model)


@pytest.fixture(scope="module")
def truth(folder):
    model = minifuse.load(folder, device="cpu", compile=False).model
    return reference.Reference(model.config, model.params)


@pytest.fixture(scope="module")
def fuser(folder):
    """Compiled, in float32."""
    return minifuse.load(folder, device="cuda", dtype="float32")


@pytest.fixture(scope="module")
def eager(folder):
    return minifuse.load(folder, device="cuda", dtype="float32", compile=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One shape alone, for what does not depend on it."""
    model = sharpen(make_model("llama", max_position_embeddings=2048))
    path = write_hub_folder(tmp_path_factory.mktemp("gpu") / "llama", model)
    return minifuse.load(path, device="cuda", dtype="float32")


@pytest.mark.parametrize("request_", [REQUEST, LONG], ids=["short", "several calls of 512"])
def test_compiled_answers_equal_eager_ones_and_the_reference(fuser, eager, truth, request_):
    options = {"methods": "all", "max_new_tokens": 6}
    ours = fuser.generate(**request_, **options)
    check_results(fuser, truth, ours, request_, max_new_tokens=6)
    check_results(eager, truth, eager.generate(**request_, **options), request_, max_new_tokens=6)


def test_a_batch_gives_what_each_request_gives_alone(fuser):
    requests = [
        minifuse.Request([f"{word} key?", "value 42 " * count], prefix="def answer", suffix="A:")
        for count, word in enumerate(WORDS[:6], start=1)
    ]
    options = {"methods": ["fused", "logit_avg", "per_prompt"], "max_new_tokens": 5}
    together = fuser.generate_batch(requests, batch_size=4, **options)
    for request, found in zip(requests, together, strict=True):
        assert_same(found, fuser.generate_batch([request], **options)[0])


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype_scores_as_float32_does(folder, eager, dtype):
    methods = [method for method in FusionMethod if method is not FusionMethod.VOTE]
    request = {**REQUEST, "continuations": [" key", " value = 42"], "methods": methods}
    wanted = eager.score(**request)
    found = minifuse.load(folder, device="cuda", dtype=dtype).score(**request)
    for method, scores in wanted.items():
        # Sums over the tokens of a continuation, eleven at most.
        bound = 11 * HALF_TOLERANCE[dtype]
        torch.testing.assert_close(
            torch.tensor(found[method]), torch.tensor(scores), rtol=0, atol=bound
        )


def test_nothing_is_compiled_or_recorded_again(llama):
    """Each graph is recorded once; then requests of all kinds, in another order, need no more."""
    draw = random.Random(0)

    def make_request() -> dict:
        def text(low: int, high: int) -> str:
            return "".join(draw.choices(WORDS, k=draw.randint(low, high)))

        segments = [text(1, 10) + "?" for _ in range(draw.randint(1, 5))]
        return {"prefix": text(0, 12), "segments": segments, "suffix": "A:"}

    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    options = {"methods": "all", "max_new_tokens": 5}
    requests = [make_request() for _ in range(20)]
    before = len(llama.executor.graphs)
    with recorded_cuda_graphs() as recorded:
        first = [llama.generate(**request, **options) for request in requests]
    assert len(recorded) == len(llama.executor.graphs) - before
    with recorded_cuda_graphs() as recorded, nothing_compiles(llama):
        for request, wanted in reversed(list(zip(requests, first, strict=True))):
            assert_same(llama.generate(**request, **options), wanted)
    assert not recorded
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips


def test_params_and_cache_are_read_where_they_lie(llama):
    """Of all inputs, a graph copies the five of its tokens alone."""
    counters = torch._dynamo.utils.counters["inductor"]
    name = "cudagraph_recorded_non_static_inputs"
    before = counters[name]
    with recorded_cuda_graphs() as recorded, llama.executor.pool(Size(8192, 256)) as pool:
        lease = pool.lease(Need(2, 1), llama.executor.make_inv_freq(None))
        llama.executor.decode(pool, [(lease, [Token(5, 0, 1, 1)])])
    assert len(recorded) == 1
    assert counters[name] - before == 5


def test_an_output_outlives_the_next_call(llama):
    executor = llama.executor
    with executor.pool(Size(1024, 256)) as pool:
        lease = pool.lease(Need(9, 1), executor.make_inv_freq(None))
        pool.write_rules([(lease, {1: {1: 0.0}})])
        (first,) = executor.decode(pool, [(lease, [Token(5, 0, 1, 1)])])
        kept = first.clone()
        (second,) = executor.decode(pool, [(lease, [Token(7, 1, 2, 1)])])
        assert not torch.equal(first, second)
        executor.prefill(pool, [(lease, [Token(9, 2, 3, 1)])])
        assert torch.equal(first, kept)


def test_another_cache_is_recorded_anew(llama):
    """Memory at another address must not be missed: its keys would be read from the old one."""
    options = {"methods": ["fused", "logit_avg"], "max_new_tokens": 5}
    wanted = llama.generate(**REQUEST, **options)
    held = llama.executor._free_buffers[:]
    llama.executor._free_buffers.clear()
    with recorded_cuda_graphs() as recorded:
        assert_identical(llama.generate(**REQUEST, **options), wanted)
    assert recorded
    assert held


@pytest.mark.parametrize("method", ["fused", "logit_avg", "weighted_prob_avg"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_waits_for_the_device_once(llama, method, temperature, monkeypatch):
    options = {
        "methods": [method],
        "max_new_tokens": 9,
        "temperature": temperature,
        "top_k": 20,
        "top_p": 0.9,
        "stop": [],
        "weights": [0.5, 0.3, 0.2],
    }
    monkeypatch.setattr(llama, "model", replace(llama.model, eos_token_ids=()))
    llama.generate(**REQUEST, **options)
    events = llama.stream(**REQUEST, **options)
    # The first step says what the new streams see, the last gives back what the request has.
    for _ in range(2):
        next(events)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(6):
                next(events)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 6, waits
    assert len(list(events)) == 1


def test_draws_repeat(llama):
    options = {"methods": "all", "max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    assert_identical(llama.generate(**REQUEST, **options), llama.generate(**REQUEST, **options))
