"""What a soak asks: calls drawn from seeds, of tiny models that are drawn here or of any other.

A call is one request or a batch of them, each with a prefix or none, any number of segments of any
length, weights; and for all of them methods, positions, sampling, stops.
"""

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minifuse.checkpoint import expected_tensors, params_from_tensors
from minifuse.config import ModelConfig
from minifuse.definition import FUSED, METHODS
from minifuse.engine import Fuser
from minifuse.errors import MinifuseError
from minifuse.loader import LoadedModel
from minifuse.pool import Size
from minifuse.request import Options, Request, make_plan
from minifuse.tokenizer import Tokenizer

# Pools that calls are drawn to fit into, so that every graph is known before the first of them.
SIZES = (Size(1024, 256), Size(1024, 256, True), Size(2048, 256, True), Size(2048, 1024, True))
MAX_BATCH = 6
MAX_SEGMENTS = 6

WORDS = (
    "the of which what city key value answer is in Norway France Zürich 東京 é def return model "
    "42 3.14 = ? , : ( ) Q: A:"
).split()
STOPS = (*string.ascii_letters, *string.digits, *"?.,:\n", " the", "qqq")
COMMON_PREFIXES = ("def answer(question):\n", "Q: capital of Japan?\nA: Tokyo\n\n", "é " * 30)

_SCALED = {"rope_theta": 10000.0, "factor": 3.0}
# What changes who sees whom, or how keys turn. The context of `dynamic` is exceeded on purpose.
FAMILIES: dict[str, dict] = {
    "llama": {"model_type": "llama", "max_position_embeddings": 2048},
    "mistral": {"model_type": "mistral", "max_position_embeddings": 2048, "sliding_window": 19},
    "qwen2": {
        "model_type": "qwen2",
        "max_position_embeddings": 2048,
        "use_sliding_window": True,
        "sliding_window": 19,
        "max_window_layers": 1,
    },
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {**_SCALED, "rope_type": "dynamic", "factor": 32.0},
    },
    "yarn": {
        "model_type": "qwen3",
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            **_SCALED,
            "rope_type": "yarn",
            "original_max_position_embeddings": 64,
        },
    },
}
VOCAB, NUM_EOS = 320, 8


@dataclass(frozen=True)
class Call:
    """What one seed stands for.

    family:   of the tiny models
    options:  for `generate_batch`
    forgets:  stored prefixes are dropped before it
    abandons: events after which a stream of the first request is closed before it, None for none
    streams:  the only request is streamed
    """

    seed: int
    family: str
    requests: tuple[Request, ...]
    batch_size: int
    options: Options
    forgets: bool
    abandons: int | None
    streams: bool


def draw_call(seed: int, *, max_new_tokens: int, is_short: bool = False) -> Call:
    """The call that a seed stands for.

    is_short: prompts that a larger model runs in reasonable time
    """
    rng = random.Random(seed)
    count = rng.choice((1, 1, 2, 3, rng.randint(1, MAX_BATCH)))
    methods = rng.choice(
        (["all"], rng.sample((*METHODS, "vote"), rng.randint(1, 4)), rng.sample(METHODS, 1))
    )
    if is_short and methods == ["all"]:
        methods = rng.sample((*METHODS, "vote"), 3)
    if "vote" in methods:
        methods = list(dict.fromkeys([*methods, "per_prompt"]))
    needs_end = methods == ["all"] or bool(set(FUSED) & set(methods))
    shared = _text(rng, 0, 25)
    requests = tuple(_draw_request(rng, shared, needs_end, is_short) for _ in range(count))
    options: Options = {
        "methods": methods,
        "positions": rng.choice(("aligned", "restart")),
        "beta": rng.choice((0.5, 1.0, 3.0, -1.0)),
        "balance": rng.choice((None, 1.0, 0.5, 0.0)),
        "max_new_tokens": rng.randint(1, max_new_tokens),
        "stop": rng.sample(STOPS, rng.choice((0, 0, 1, 15))),
    }
    if rng.random() < 0.5:
        options |= {
            "temperature": rng.choice((0.1, 0.7, 1.0, 1.8)),
            "top_k": rng.choice((0, 0, 1, 5, 40)),
            "top_p": rng.choice((1.0, 0.95, 0.5)),
            "seed": rng.randrange(2**31),
        }
    return Call(
        seed=seed,
        family=rng.choice(tuple(FAMILIES)),
        requests=requests,
        batch_size=rng.randint(1, count),
        options=options,
        forgets=rng.random() < 0.1,
        abandons=rng.randint(1, 3) if rng.random() < 0.1 else None,
        streams=count == 1 and rng.random() < 0.3,
    )


def _draw_request(rng: random.Random, shared: str, needs_end: bool, is_short: bool) -> Request:
    longest = rng.choice((4, 12, 12, 30 if is_short else 60))
    count = rng.randint(1, MAX_SEGMENTS)
    suffix = rng.choice(("", "A:", " the answer is", _text(rng, 1, 6)))
    segments = [_text(rng, 1, longest) for _ in range(count)]
    if rng.random() < 0.2:  # copies
        segments[-1] = segments[0]
    if needs_end and not suffix:
        # A view of several segments then wants their last tokens to be the same.
        segments = [f"{text} Z" for text in segments]
    prefix = rng.choice(("", shared, *COMMON_PREFIXES, _text(rng, 1, 40)))
    numbers = [rng.choice((0.0, 0.25, 1.0, 2.0, 7.5)) for _ in segments]
    weights = rng.choice((None, "likelihood", "confidence", numbers if any(numbers) else None))
    return Request(segments, prefix, suffix, weights)


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def fit_call(fuser: Fuser, call: Call, sizes: Sequence[Size]) -> Call:
    """The call, with mates and then segments left out until its pools are among those wanted."""
    plan = make_plan(**call.options)
    while True:
        try:
            jobs = [fuser._make_job(request, plan) for request in call.requests]
            batch = fuser._plan_batch(jobs, call.batch_size)
            alone = {fuser._plan_batch([job], 1)[0] for job in jobs}
            if {batch[0], *alone} <= set(sizes):
                return call
        except MinifuseError as error:
            if "shorten" not in str(error):  # more positions than the model has
                raise
        *others, last = call.requests
        if others:
            requests = tuple(others)
        elif len(last.segments) > 1:
            weights = last.weights
            if isinstance(weights, list):
                weights = weights[:-1] if any(weights[:-1]) else None
            requests = (replace(last, segments=last.segments[:-1], weights=weights),)
        else:
            raise MinifuseError(
                f"seed {call.seed}: one request does not fit into {sizes[0].slots} slots; ask for "
                "fewer new tokens"
            )
        call = replace(
            call, requests=requests, batch_size=min(call.batch_size, len(requests)), streams=False
        )


def make_tiny(family: str) -> LoadedModel:
    """A model of a family with drawn weights in float32, and a byte-level vocabulary.

    Attention is far from uniform, so that what sees too much, or too little, shows. Several tokens
    end an answer, so that some do.
    """
    raw = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
    }
    config = ModelConfig.from_hf(raw | FAMILIES[family])
    generator = torch.Generator().manual_seed(0)

    def draw() -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected_tensors(config).items():
            weight = 0.1 * torch.randn(shape, generator=generator)
            if name.endswith("norm.weight"):
                weight += 1
            yield name, weight * (2 if "q_proj" in name or "k_proj" in name else 1)

    return LoadedModel(
        config=config,
        params=params_from_tensors(draw(), config, torch.float32),
        tokenizer=_make_tokenizer(),
        eos_token_ids=(0, *range(VOCAB - NUM_EOS + 1, VOCAB)),
        name=f"tiny {family}",
        source="drawn",
        dtype=torch.float32,
        folder=Path(),
    )


def _make_tokenizer() -> Tokenizer:
    import json

    from tokenizers import Tokenizer as Whole
    from tokenizers import decoders, models, pre_tokenizers, trainers

    whole = Whole(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    return Tokenizer(json.loads(whole.to_str()))
