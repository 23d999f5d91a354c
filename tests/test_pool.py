"""The pool: who holds which slots and labels, and what is left of them afterwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minifuse.cache import allocate_cache
from minifuse.config import ModelConfig
from minifuse.masks import Labels, make_dense_bias
from minifuse.model import KV_BLOCK
from minifuse.pool import Buffers, Need, Pool, Size, round_up, slots_for

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
INV_FREQ = torch.ones(8)
CPU = torch.device("cpu")


def make_pool(blocks: int, labels: int = 32) -> Pool:
    slots = blocks * KV_BLOCK
    cache = allocate_cache(CONFIG, rows=1, slots=slots, dtype=torch.float32, device=CPU)
    return Pool(Size(slots, labels), Buffers(cache))


def test_a_lease_counts_from_its_prefix_on():
    pool = make_pool(6)
    prefix = pool.lease_prefix("p", Need(3, 1), INV_FREQ)
    first = pool.lease(Need(130, 2), INV_FREQ, prefix)
    second = pool.lease(Need(1, 1), INV_FREQ, prefix)
    assert prefix.slots == [0, KV_BLOCK, KV_BLOCK + 1, KV_BLOCK + 2]
    assert first.slots == [*prefix.slots, *range(4 * KV_BLOCK, 4 * KV_BLOCK + 130)]
    assert second.slots == [*prefix.slots, 3 * KV_BLOCK]
    assert (prefix.labels, first.labels, second.labels) == ([0, 1], [0, 1, 2, 3], [0, 1, 4])


def test_what_is_given_back_can_be_had_again():
    pool = make_pool(4, labels=6)
    first = pool.lease(Need(2 * KV_BLOCK, 2), INV_FREQ)
    second = pool.lease(Need(KV_BLOCK, 2), INV_FREQ)
    assert pool.lease(Need(1, 1), INV_FREQ) is None  # no slots
    pool.release(first)
    assert pool.lease(Need(1, 4), INV_FREQ) is None  # no labels
    again = pool.lease(Need(2 * KV_BLOCK, 3), INV_FREQ)
    assert (again.slots, again.labels[:3]) == (first.slots, first.labels)
    pool.release(second)
    pool.release(again)
    assert pool.is_idle


def test_a_prefix_stays_as_long_as_it_is_used():
    pool = make_pool(3)
    prefix = pool.lease_prefix("p", Need(5, 1), INV_FREQ)
    lease = pool.lease(Need(KV_BLOCK, 1), INV_FREQ, prefix)
    # No room for another one, and the first is in use.
    assert pool.lease_prefix("q", Need(5, 1), INV_FREQ) is None
    assert list(pool.prefixes) == ["p"]
    pool.release(lease)
    assert pool.lease_prefix("q", Need(2 * KV_BLOCK, 1), INV_FREQ) is not None
    assert list(pool.prefixes) == ["q"]


def test_a_request_never_lies_before_its_prefix():
    """No query sees a later slot."""
    pool = make_pool(5)
    early = pool.lease_prefix("early", Need(2 * KV_BLOCK, 1), INV_FREQ)
    late = pool.lease_prefix("late", Need(KV_BLOCK, 1), INV_FREQ)
    other = pool.lease(Need(KV_BLOCK, 1), INV_FREQ, late)
    pool.release_prefixes()
    assert list(pool.prefixes) == ["late"]
    # Two blocks are free, in front of the prefix alone.
    assert pool.lease(Need(KV_BLOCK, 1), INV_FREQ, late) is None
    assert late.users == 1
    assert pool.lease(Need(KV_BLOCK, 1), INV_FREQ) is not None
    assert early.blocks == [1, 2]
    pool.release(other)


def test_a_label_that_is_used_again_shows_nothing_of_its_former_keys():
    pool = make_pool(3)
    lease = pool.lease(Need(4, 1), INV_FREQ)
    pool.place_keys(lease, range(1, 5), 1, 0)
    pool.release(lease)
    again = pool.lease(Need(KV_BLOCK + 4, 1), INV_FREQ)
    assert again.labels == lease.labels
    pool.write_rules([(again, {1: {1: 0.0}})])
    pool.place_keys(again, range(1, 2), 1, 7)
    assert (pool.key_labels == again.labels[1]).nonzero().tolist() == [[again.slots[1]]]
    assert pool.key_positions[again.slots[1]] == 7


def test_rules_are_written_when_they_are_new():
    pool = make_pool(3)
    pool.lease(Need(1, 4), INV_FREQ)
    lease = pool.lease(Need(4, 2), INV_FREQ)
    first, second = lease.labels[1:]
    rules = {0: {0: 0.0}, 1: {1: 0.0}, 2: {1: -0.5, 2: 0.0}}
    pool.write_rules([(lease, rules)])
    assert pool.tables.visibility[second].nonzero().flatten().tolist() == [first, second]
    assert pool.tables.bias[second, first] == -0.5
    # The same label with another rule, as after scoring.
    pool.write_rules([(lease, {**rules, 2: {2: 0.25}})])
    assert pool.tables.visibility[second].nonzero().flatten().tolist() == [second]
    assert pool.tables.bias[second, second] == 0.25


@settings(max_examples=60)
@given(data=st.data())
def test_requests_in_flight_never_share_anything_and_see_their_own_alone(data):
    """Any order of coming and going: what each sees are keys of its own and of its prefix."""
    pool = make_pool(data.draw(st.integers(3, 9)), labels=24)
    live = []
    for _ in range(data.draw(st.integers(1, 25))):
        if live and data.draw(st.booleans()):
            pool.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
            continue
        key = data.draw(st.sampled_from([None, "p", "q"]))
        prefix = None
        if key is not None:
            prefix = pool.prefixes.get(key) or pool.lease_prefix(key, Need(3, 1), INV_FREQ)
            if prefix is None:
                continue
            pool.write_rules([(prefix, {1: {1: 0.0}})])
            pool.place_keys(prefix, range(1, 4), 1, 0)
        need = Need(data.draw(st.integers(1, 300)), data.draw(st.integers(1, 5)))
        lease = pool.lease(need, INV_FREQ, prefix)
        if lease is not None:
            live.append(lease)
            everything = range(1, len(lease.labels))
            pool.write_rules([(lease, {i: dict.fromkeys(everything, 0.0) for i in everything})])
            first_slot, label = (1, 1) if prefix is None else (4, 2)
            pool.place_keys(lease, range(first_slot, len(lease.slots)), label, 0)
    own = [set(lease.slots[len(lease.prefix.slots) if lease.prefix else 1 :]) for lease in live]
    assert len(set().union(*own)) == sum(map(len, own)), "two requests hold the same slot"
    for lease in live:
        last = torch.tensor([lease.slots[-1]])
        label = torch.tensor([lease.labels[-1]], dtype=torch.int32)
        labels = Labels(label, last, last, pool.key_labels, pool.key_positions)
        seen = (make_dense_bias(labels, pool.tables)[0] > -torch.inf).nonzero().flatten()
        assert seen.tolist() == sorted(lease.slots[1:])


@pytest.mark.parametrize(
    ("value", "wanted"), [(1, 1024), (1024, 1024), (1025, 2048), (9000, 16384)]
)
def test_rounding_up(value, wanted):
    assert round_up(value, (1024,)) == wanted


def test_slots_for_several_leases():
    """A block of padding, then whole blocks for each."""
    assert slots_for([]) == KV_BLOCK
    assert slots_for([Need(1, 9), Need(KV_BLOCK + 1, 1), Need(0, 0)]) == 4 * KV_BLOCK
