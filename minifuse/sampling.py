"""From next-token logits to a token: reduction over streams, filters, greedy or drawn."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minifuse.config import GenerationConfig
from minifuse.methods import Reduction


def reduce_logits(
    logits: Tensor, reduction: Reduction, weights: Sequence[float] | Tensor | None
) -> Tensor:
    """One next-token distribution of an answer's streams.

    logits:  f32[R, ..., V]
    weights: R numbers that sum to one, for the means
    returns: f32[..., V], normalised log-probabilities
    """
    if reduction is Reduction.NONE:
        return torch.log_softmax(logits[0], dim=-1)
    shape = (-1,) + (1,) * (logits.dim() - 1)
    if reduction is Reduction.MEAN_LOGITS:
        mean = (logits * _like(logits, weights).view(shape)).sum(0)
        return torch.log_softmax(mean, dim=-1)
    logprobs = torch.log_softmax(logits, dim=-1)
    if reduction is Reduction.MEAN_PROBS:
        log_weights = _like(logits, weights).log().view(shape)
        return torch.logsumexp(logprobs + log_weights, dim=0)
    return torch.log_softmax(logprobs.amax(0), dim=-1)


def _like(logits: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    assert weights is not None, "means take weights"
    return torch.as_tensor(weights, dtype=logits.dtype, device=logits.device)


def make_generator(
    seed: int, *identity: object, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of its own for each (seed, request, method, index).

    Other answers of the same call, or other requests of the same batch, change nothing in it.
    Devices draw differently.
    """
    digest = hashlib.sha256(repr((seed, *identity)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def pick_token(
    logprobs: Tensor, config: GenerationConfig, generator: torch.Generator | None
) -> Tensor:
    """The next token's id, i64[1]: the most likely at temperature 0, else drawn.

    It stays where `logprobs` are; reading it waits for a GPU to get there.

    logprobs:  f32[V]
    generator: on the same device
    """
    if config.temperature == 0:
        return logprobs.argmax(dim=-1, keepdim=True)
    probs = filter_probs(logprobs, config)
    # What `torch.multinomial` does for one draw, but for its check of the sum, which waits: the
    # first to arrive of independent exponential times.
    times = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / times).argmax(dim=-1, keepdim=True)


def filter_probs(logprobs: Tensor, config: GenerationConfig) -> Tensor:
    """Probabilities after temperature, top-k and top-p, in this order.

    logprobs: f32[V]
    returns:  f32[V], sums to one; the most likely token always stays
    """
    # Relative to the best, so that a tiny temperature leaves it at 0 and not at -inf.
    ordered, order = torch.sort(logprobs.double() - logprobs.max(), descending=True)
    ordered = ordered / config.temperature
    if config.top_k:
        ordered[config.top_k :] = -torch.inf
    probs = torch.softmax(ordered, dim=-1)
    if config.top_p < 1:
        # A token stays while the more likely ones before it have not yet reached top_p.
        before = probs.cumsum(-1) - probs
        probs = torch.where(before < config.top_p, probs, 0.0)
        probs[0] = probs[0].clamp_min(torch.finfo(probs.dtype).tiny)
    filtered = torch.zeros_like(probs).scatter(0, order, probs)
    return (filtered / filtered.sum()).float()
