"""Scores that are not finite: where they come from is said, and nothing of them stays behind."""

from dataclasses import replace

import pytest
import torch
from engine_cases import REQUEST

import minifuse
from minifuse.errors import MinifuseError


@pytest.fixture
def own(folder):
    """A model of its own, to be damaged."""
    return minifuse.load(folder, compile=False)


def ways_to_ask(fuser):
    return {
        "generate": lambda: fuser.generate(**REQUEST),
        "stream": lambda: list(fuser.stream(**REQUEST)),
        "score": lambda: fuser.score(**REQUEST, continuations=["42"]),
    }


@pytest.mark.parametrize("way", ["generate", "stream", "score"])
def test_a_damaged_weight_is_named(own, way):
    own.model.params.layers[1].wo[3, 5] = torch.nan
    with pytest.raises(MinifuseError, match="wo of layer 1 has 1 value") as e:
        ways_to_ask(own)[way]()
    assert e.value.exit_status == 1


def test_damaged_weights_outside_of_layers_are_named(own):
    params = own.model.params
    broken = params._replace(final_norm=params.final_norm * torch.nan)
    damaged = minifuse.Fuser(replace(own.model, params=broken), compile=False)
    with pytest.raises(MinifuseError, match=r"final_norm has \d+ values that are not finite"):
        damaged.generate(**REQUEST)


def test_the_layer_that_overflows_is_named(own):
    own.model.params.layers[1].w_down.mul_(1e38)
    own.model.params.layers[1].w_gate_up.mul_(1e3)
    with pytest.raises(MinifuseError, match="arise in layer 1, whose numbers are too large for fl"):
        own.generate(**REQUEST)


def test_nothing_of_it_stays_in_the_cache(own):
    """Keys that are hidden count as zero, and zero times NaN is NaN."""
    whole = own.generate(**REQUEST)["fused"]
    weight = own.model.params.layers[0].wqkv
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(MinifuseError, match="wqkv of layer 0"):
        own.generate(**REQUEST)
    weight.copy_(kept)
    again = own.generate(**REQUEST)["fused"]
    assert again.token_ids == whole.token_ids
    assert again.logprobs == whole.logprobs


def test_quantized_weights_are_looked_at_too(folder):
    fuser = minifuse.load(folder, quantize="int8", compile=False)
    params = fuser.model.params
    broken = params._replace(final_norm=params.final_norm * torch.inf)
    damaged = minifuse.Fuser(replace(fuser.model, params=broken), compile=False)
    with pytest.raises(MinifuseError, match="final_norm has"):
        damaged.generate(**REQUEST)
