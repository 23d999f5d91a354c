"""Reductions and filters against naive float64 formulas; draws against their seeds and odds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minifuse.config import GenerationConfig
from minifuse.methods import Reduction
from minifuse.sampling import filter_probs, make_generator, pick_token, reduce_logits

LOGITS = st.lists(
    st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=4
)
# Float32 log-probabilities down to -60: 60 * 2^-24 for each of a few roundings.
ATOL = 3e-5


def softmax(row):
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / sum(exps) for e in exps]


def naive_reduction(logits, reduction, weights):
    """Probabilities, one plain loop at a time."""
    columns = list(zip(*logits, strict=True))
    if reduction is Reduction.NONE:
        return softmax(logits[0])
    if reduction is Reduction.MEAN_LOGITS:
        return softmax([math.fsum(map(math.prod, zip(weights, c, strict=True))) for c in columns])
    columns = list(zip(*map(softmax, logits), strict=True))
    if reduction is Reduction.MEAN_PROBS:
        return [math.fsum(map(math.prod, zip(weights, c, strict=True))) for c in columns]
    highest = [max(c) for c in columns]
    return [p / sum(highest) for p in highest]


@pytest.mark.parametrize("reduction", Reduction)
@given(logits=LOGITS, data=st.data())
def test_reductions_equal_the_naive_formulas(reduction, logits, data):
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=len(logits), max_size=len(logits)))
    weights = tuple(w / sum(raw) for w in raw)
    found = reduce_logits(torch.tensor(logits), reduction, weights)
    wanted = torch.tensor(naive_reduction(logits, reduction, weights), dtype=torch.float64).log()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=ATOL)
    assert float(found.double().exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("reduction", Reduction)
def test_reductions_keep_the_dimensions_between(reduction):
    logits = torch.randn(3, 4, 2, 7)
    weights = (0.2, 0.5, 0.3)
    found = reduce_logits(logits, reduction, weights)
    assert found.shape == (4, 2, 7)
    for i in range(4):
        alone = reduce_logits(logits[:, i, 1], reduction, weights)
        torch.testing.assert_close(found[i, 1], alone)


@pytest.mark.parametrize("reduction", Reduction)
def test_one_stream_is_its_own_distribution(reduction):
    logits = torch.randn(1, 9)
    wanted = torch.log_softmax(logits[0], -1)
    torch.testing.assert_close(reduce_logits(logits, reduction, (1.0,)), wanted)


@pytest.mark.parametrize("reduction", [Reduction.MEAN_LOGITS, Reduction.MEAN_PROBS])
def test_a_stream_of_weight_zero_counts_for_nothing(reduction):
    logits = torch.randn(3, 9)
    found = reduce_logits(logits, reduction, (0.4, 0.0, 0.6))
    wanted = reduce_logits(logits[[0, 2]], reduction, (0.4, 0.6))
    torch.testing.assert_close(found, wanted)
    assert found.isfinite().all()


@pytest.mark.parametrize("reduction", list(Reduction)[1:])
def test_order_of_streams_does_not_matter(reduction):
    logits, weights, order = torch.randn(3, 9), (0.2, 0.5, 0.3), [2, 0, 1]
    moved = reduce_logits(logits[order], reduction, tuple(weights[i] for i in order))
    torch.testing.assert_close(moved, reduce_logits(logits, reduction, weights))


@pytest.mark.parametrize("reduction", Reduction)
def test_far_scores_neither_overflow_nor_vanish(reduction):
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    found = reduce_logits(logits, reduction, (0.5, 0.5))
    torch.testing.assert_close(found, torch.tensor([0.0, -1e4, -2e4]))


def naive_filter(logprobs, temperature, top_k, top_p):
    """Temperature, then the k most likely, then as few as reach top_p; ties by token id."""
    probs = softmax([x / temperature for x in logprobs])
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if top_k:
        order = order[:top_k]
    total = math.fsum(probs[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    mass = math.fsum(probs[i] for i in kept)
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


# Distinct by at least 1e-3, so that rounding decides no order, and top_p on no cumulated sum.
SCORES = st.lists(st.integers(-4000, 4000), min_size=1, max_size=12, unique=True)


@given(
    scores=SCORES,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
)
def test_filters_equal_the_naive_loop(scores, temperature, top_k, top_p):
    scores = [score / 1000 for score in scores]
    logprobs = torch.log_softmax(torch.tensor(scores), -1)
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    found = filter_probs(logprobs, config)
    wanted = naive_filter(logprobs.tolist(), temperature, top_k, top_p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-7, atol=1e-30)
    assert float(found.double().sum()) == pytest.approx(1, abs=len(scores) * 2**-24)


def test_filters_by_hand():
    logprobs = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()

    def kept(**settings):
        probs = filter_probs(logprobs, GenerationConfig(temperature=1.0, **settings))
        return [round(p, 4) for p in probs.tolist()]

    assert kept() == [0.1, 0.5, 0.15, 0.25]
    assert kept(top_k=1) == [0, 1, 0, 0]
    assert kept(top_k=2) == [0, 0.6667, 0, 0.3333]
    assert kept(top_k=99) == kept()
    assert kept(top_p=0.4) == [0, 1, 0, 0]
    assert kept(top_p=0.6) == [0, 0.6667, 0, 0.3333]
    assert kept(top_p=0.76) == [0, 0.5556, 0.1667, 0.2778]
    assert kept(top_p=1e-9) == [0, 1, 0, 0]
    # top_p counts what top_k has left: of 2/3 and 1/3, two thirds reach 0.6.
    assert kept(top_k=2, top_p=0.6) == [0, 1, 0, 0]
    half = filter_probs(logprobs, GenerationConfig(temperature=0.5))
    squares = torch.tensor([0.01, 0.25, 0.0225, 0.0625])
    torch.testing.assert_close(half, squares / squares.sum())


def test_the_most_likely_token_always_stays():
    logprobs = torch.randn(50).log_softmax(-1)
    for settings in (
        {"top_p": 1e-300},
        {"top_k": 1},
        {"temperature": 1e-9},
        {"temperature": 1e-320},
    ):
        config = GenerationConfig(**{"temperature": 1.0, **settings})
        probs = filter_probs(logprobs, config)
        assert probs.isfinite().all()
        assert int(probs.argmax()) == int(logprobs.argmax())
        assert float(probs.max()) == 1.0


def test_greedy_takes_the_most_likely_whatever_the_filters():
    logprobs = torch.tensor([-3.0, -0.1, -2.0])
    assert pick_token(logprobs, GenerationConfig(), None) == 1
    assert pick_token(logprobs, GenerationConfig(top_k=2, top_p=0.1, seed=9), None) == 1


def draw(identity, count=40, **settings):
    config = GenerationConfig(**{"temperature": 1.0, **settings})
    generator = make_generator(config.seed, *identity)
    logprobs = torch.zeros(100).log_softmax(-1)
    return [int(pick_token(logprobs, config, generator)) for _ in range(count)]


def test_a_seed_repeats_a_draw():
    assert draw(("prompt", "fused", None)) == draw(("prompt", "fused", None))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 2**63 - 1},
        {"identity": ("another prompt", "fused", None)},
        {"identity": ("prompt", "logit_avg", None)},
        {"identity": ("prompt", "fused", 0)},
        {"identity": ("promptfused", None)},
    ],
)
def test_another_identity_is_another_draw(other):
    # Forty equal draws out of a hundred tokens: odds of 1e-80.
    changed = {"identity": ("prompt", "fused", None), **other}
    assert draw(**changed) != draw(("prompt", "fused", None))


def test_the_global_generator_plays_no_part():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(("x",))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draw(("x",)) == first


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_draws_follow_the_filtered_probabilities(settings):
    config = GenerationConfig(**{"temperature": 1.0, **settings})
    logprobs = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1]).log()
    probs = filter_probs(logprobs, config).double()
    generator = make_generator(0, "draws")
    count = 4000
    draws = torch.cat([pick_token(logprobs, config, generator) for _ in range(count)])
    shares = torch.bincount(draws, minlength=5).double() / count
    # Five standard deviations of a binomial share: a fair draw stays within with odds of 1e-5.
    bound = 5 * (probs * (1 - probs) / count).sqrt()
    assert ((shares - probs).abs() <= bound).all()
    assert not shares[probs == 0].any()


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_a_draw_is_the_one_that_torch_makes(settings):
    config = GenerationConfig(**{"temperature": 0.8, **settings})
    logprobs = torch.randn(500).log_softmax(-1)
    probs = filter_probs(logprobs, config)
    ours, theirs = (make_generator(3, "draws") for _ in range(2))
    for _ in range(50):
        wanted = torch.multinomial(probs, 1, generator=theirs)
        assert torch.equal(pick_token(logprobs, config, ours), wanted)


@pytest.mark.parametrize("reduction", Reduction)
def test_weights_may_be_a_tensor(reduction):
    logits, weights = torch.randn(3, 9), (0.2, 0.5, 0.3)
    found = reduce_logits(logits, reduction, torch.tensor(weights))
    assert torch.equal(found, reduce_logits(logits, reduction, weights))
