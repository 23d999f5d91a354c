"""Both engines on the same drawn weights, turn about on one device, and what the device can do."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.peers import rows as peers
from benchmarks.peers.engines import MinifuseEngine, TransformersEngine
from benchmarks.peers.questions import Question
from benchmarks.peers.rows import Row
from benchmarks.peers.targets import Outcome
from minifuse.checkpoint import params_from_tensors
from minifuse.config import ModelConfig
from minifuse.engine import Fuser
from minifuse.loader import LoadedModel
from minifuse.profiling import linear_parameters
from minifuse.recompiles import recorded_cuda_graphs
from minifuse.tokenizer import Tokenizer


def _llama(hidden: int, mlp: int, layers: int, head_dim: int, factor: float, tied: bool) -> dict:
    """What matters of a Llama 3's config.json."""
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**scaling, "factor": factor, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 64, 32.0, True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 128, 8.0, False),
}
DTYPE = "bfloat16"
ANSWER_TOKENS, NEW_TOKENS = 10, 32
COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
# Of a measured device copy; what the project aims at.
DECODE_AIM = 0.8


def measure(
    name: str,
    raw: dict,
    contexts: Sequence[int],
    repeats: int,
    device: torch.device,
    ceilings: dict[str, float],
    *,
    compile: bool = True,
) -> tuple[list[Row], list[Outcome], dict[str, float]]:
    """Race one shape; rows, what came of the aims, and what prefill reaches of a product's rate."""
    theirs, ours = make_engines(raw, device, compile=compile)
    config, tokenizer = ours.fuser.model.config, ours.fuser.model.tokenizer

    def run(way: Callable, on: torch.device | None) -> float | None:
        # Transformers' engine does not say where its tensors are to lie.
        with on or contextlib.nullcontext():
            found = way()
        return found if isinstance(found, float) else None

    def race(scenario: str, case: str, ways: dict[str, Callable], count: int = 1) -> list[Row]:
        contestants = [
            peers.Contestant(
                peers.Key(scenario, f"{name}{case}", engine, DTYPE),
                {"": partial(run, way, None if engine.startswith(peers.OURS) else device)},
                count=count,
            )
            for engine, way in ways.items()
        ]
        return peers.race(contestants, repeats, f"{name} {scenario}{case}")

    def answer(question: Question, method: str, num_tokens: int, *, is_cold: bool) -> None:
        if is_cold:
            ours.fuser.forget_prefixes()
        ours.answer(question, method, num_tokens)

    def context_ways(one: Question) -> tuple[dict[str, Callable], dict[str, Callable]]:
        """Of decoding and of prefill."""
        (ids,) = one.prompts
        return (
            {
                peers.OURS: lambda: NEW_TOKENS * ours.step_seconds(one, "origin", NEW_TOKENS),
                peers.TRANSFORMERS: lambda: (theirs.hold(ids), theirs.decode(NEW_TOKENS)),
            },
            {
                peers.OURS: lambda: answer(one, "origin", 1, is_cold=True),
                peers.TRANSFORMERS: lambda: theirs.prefill(ids),
            },
        )

    asked = make_question(tokenizer, prefix=112, segments=5, each=15)
    outcomes, prefill_shares = [], {}
    with recorded_cuda_graphs() as recorded:
        rows = race(
            "S1",
            "",
            {
                peers.PROTOTYPE: lambda: theirs.prototype(asked.prompts, ANSWER_TOKENS),
                peers.BATCHED: lambda: theirs.batched(asked.prompts, ANSWER_TOKENS),
                peers.GENERATE: lambda: theirs.separate(asked.prompts, ANSWER_TOKENS),
            }
            | {
                f"{peers.OURS} {method}, prefix {'cold' if is_cold else 'cached'}": partial(
                    answer, asked, method, ANSWER_TOKENS, is_cold=is_cold
                )
                for method in ("fused", "logit_avg")
                for is_cold in (True, False)
            },
        )
        for context in contexts:
            one = make_question(tokenizer, context - NEW_TOKENS // 2 - 2, segments=1, each=1)
            decoding, filling = context_ways(one)
            decoded = race("S3", f" at {context}", decoding, count=NEW_TOKENS)
            filled = race("S4", f" of {context}", filling)
            rows += decoded + filled
            copied = ours.bytes_per_step(context) / (decoded[0].median / 1000)
            share = copied / ceilings["copy_bytes_per_s"]
            what = f"{name}, decode at {context}: of a copy"
            outcomes.append(Outcome(what, share, DECODE_AIM, share >= DECODE_AIM))
            # The head runs for the last token alone.
            matrices = linear_parameters(config) - config.vocab_size * config.hidden_size
            rate = 2 * matrices * len(one.prompts[0]) / (filled[0].median / 1000)
            prefill_shares[f"{name}, {context}"] = rate / ceilings["product_flops_per_s"]
    again = len(recorded) - len(ours.fuser.executor.graphs)
    outcomes.append(Outcome(f"{name}, CUDA graphs recorded again", again, 0, again == 0))
    return rows, outcomes, prefill_shares


def make_engines(
    raw: dict, device: torch.device, *, compile: bool = True
) -> tuple[TransformersEngine, MinifuseEngine]:
    """Both engines on the same random weights; a token's text is its number."""
    torch.manual_seed(0)
    dtype = getattr(torch, DTYPE)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**raw), dtype=dtype, attn_implementation="sdpa"
        ).eval()
    config = ModelConfig.from_hf(raw)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    params = params_from_tensors(weights.items(), config, dtype, device)
    vocab = {str(number): number for number in range(config.vocab_size)}
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": "0"}
    tokenizer = Tokenizer({"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": words})
    loaded = LoadedModel(config, params, tokenizer, (), "random", "drawn", dtype, Path())
    ours, theirs = object.__new__(MinifuseEngine), object.__new__(TransformersEngine)
    ours.fuser = Fuser(loaded, compile=compile)
    theirs.adopt(model)
    return theirs, ours


def make_question(tokenizer: Tokenizer, prefix: int, segments: int, each: int) -> Question:
    """Random tokens, as many as asked for, and a suffix of one."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(str(draw.randrange(tokenizer.vocab_size)) for _ in range(count))

    return Question(tokenizer, tuple(text(each) for _ in range(segments)), text(prefix), text(1))


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes read and written a second by a large copy; FLOP/s of a large matrix product."""

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[5:])

    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    size = (PRODUCT_SIZE, PRODUCT_SIZE)
    left, right = (torch.randn(size, device=device).to(getattr(torch, DTYPE)) for _ in range(2))
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / seconds(lambda: target.copy_(source)),
        "product_flops_per_s": 2 * PRODUCT_SIZE**3 / seconds(lambda: left @ right),
    }
