"""Quantized models answer as float models with the very weights that their bits stand for."""

from dataclasses import replace

import pytest
import reference
import torch
from engine_cases import (
    EVERY_METHOD,
    REQUEST,
    assert_same,
    check_results,
    floats_of,
    make_case,
    nothing_compiles,
    requests,
)
from hypothesis import given, settings

import minifuse

CONTINUATIONS = [" the value of 42", "\n\nQ: key", "é"]
SCORED = [method for method in EVERY_METHOD if method != "vote"]


@pytest.fixture(scope="module")
def int8_fuser(folder):
    """In float32, so that the engine's own tolerance holds."""
    return minifuse.load(folder, dtype="float32", quantize="int8", compile=False)


@pytest.fixture(scope="module")
def int4_fuser(folder):
    return minifuse.load(folder, quantize="int4", compile=False)


def truth_of_weights(fuser) -> reference.Reference:
    return reference.Reference(fuser.model.config, floats_of(fuser.model.params))


def score(fuser) -> torch.Tensor:
    """Log-probabilities of the continuations by every method, in one order."""
    found = fuser.score(**REQUEST, continuations=CONTINUATIONS, methods=SCORED)
    return torch.tensor([number for value in found.values() for number in _flat(value)])


def _flat(value):
    return [n for part in value for n in (part if isinstance(part, list) else [part])]


def true_scores(fuser) -> torch.Tensor:
    """The same in float64 by the dense reference, on the weights that the bits stand for."""
    truth, case = truth_of_weights(fuser), make_case(fuser, **REQUEST)
    targets = [tuple(fuser.model.tokenizer.encode(t, is_start=False)) for t in CONTINUATIONS]
    numbers = []
    for method in SCORED:
        indices = range(case.num_segments) if method == "per_prompt" else [None]
        numbers += [truth.score(case, method, ids, i) for i in indices for ids in targets]
    return torch.tensor(numbers)


def bfloat16_twin(fuser) -> minifuse.Fuser:
    """A float model in bfloat16 whose weights are the dequantized ones, rounded."""
    model = fuser.model
    params = reference.as_dtype(floats_of(model.params), torch.bfloat16)
    return minifuse.Fuser(
        replace(model, params=params, config=replace(model.config, quantize=None)), compile=False
    )


@settings(max_examples=10)
@given(request=requests())
@pytest.mark.filterwarnings("ignore:a segment of one token")
def test_int8_equals_the_reference_on_its_weights(int8_fuser, request):
    results = int8_fuser.generate(**request, methods="all", max_new_tokens=3)
    assert set(results) == set(EVERY_METHOD)
    truth = truth_of_weights(int8_fuser)
    assert check_results(int8_fuser, truth, results, request, max_new_tokens=3) <= 1


def test_int4_is_as_near_to_its_weights_as_bfloat16_is(int4_fuser):
    wanted = true_scores(int4_fuser)
    naive = (score(bfloat16_twin(int4_fuser)) - wanted).abs()
    found = (score(int4_fuser) - wanted).abs()
    # Twice the error of the float model in the same dtype, over 45 scores.
    assert found.max() <= 2 * naive.max()
    assert found.mean() <= 2 * naive.mean()


def test_another_weight_would_be_noticed(int4_fuser):
    """The comparison above can fail: half of one layer's nibbles are turned over."""
    model = int4_fuser.model
    layer = model.params.layers[0]
    values = layer.w_down.values ^ 0x08
    broken = layer._replace(w_down=layer.w_down._replace(values=values))
    params = model.params._replace(layers=(broken, *model.params.layers[1:]))
    damaged = minifuse.Fuser(replace(model, params=params), compile=False)
    wanted = true_scores(int4_fuser)
    naive = (score(bfloat16_twin(int4_fuser)) - wanted).abs()
    assert (score(damaged) - wanted).abs().max() > 2 * naive.max()


def test_results_name_the_scheme(int4_fuser, int8_fuser, fuser):
    for one, scheme, dtype in (
        (int4_fuser, "int4", "bfloat16"),
        (int8_fuser, "int8", "float32"),
        (fuser, None, "float32"),
    ):
        result = one.generate(**REQUEST, methods=["fused"], max_new_tokens=1)["fused"]
        assert (result.quantize, result.dtype) == (scheme, dtype)
        assert result.to_json()["quantize"] == scheme


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_stored_prefix_changes_nothing(folder, scheme):
    fuser = minifuse.load(folder, quantize=scheme, compile=False)
    options = {"methods": "all", "max_new_tokens": 4}
    first = fuser.generate(**REQUEST, **options)
    assert_same(fuser.generate(**REQUEST, **options), first, tolerance=0)


@pytest.mark.slow
def test_int8_compiled_equals_eager(folder, int8_fuser):
    compiled = minifuse.load(folder, dtype="float32", quantize="int8")
    options = {"methods": ["fused", "per_prompt"], "max_new_tokens": 3}
    assert_same(compiled.generate(**REQUEST, **options), int8_fuser.generate(**REQUEST, **options))


@pytest.mark.slow
def test_int4_compiled_is_as_near_to_its_weights(folder, int4_fuser):
    compiled = minifuse.load(folder, quantize="int4")
    wanted = true_scores(int4_fuser)
    naive = (score(bfloat16_twin(int4_fuser)) - wanted).abs()
    found = (score(compiled) - wanted).abs()
    assert found.max() <= 2 * naive.max()
    with nothing_compiles(compiled):
        score(compiled)
