"""Memory is planned before it is taken."""

from dataclasses import replace
from pathlib import Path

import pytest
from engine_cases import REQUEST, assert_same

import minifuse
from minifuse import engine, memory
from minifuse.engine import Request
from minifuse.errors import MinifuseError
from minifuse.masks import make_tables, table_bytes
from minifuse.pool import Size
from minifuse.request import make_plan


def with_context(fuser, length):
    config = replace(fuser.model.config, max_position_embeddings=length)
    return minifuse.Fuser(replace(fuser.model, config=config), compile=False)


def peak_bytes():
    """The most that this process ever had resident, since it was last asked to forget that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"no peak of memory to be had: {error}")


def test_a_request_beyond_memory_is_an_error_with_both_numbers(fuser):
    endless = with_context(fuser, 10**12)
    slots = 2**34
    # Keys and values of 2 layers, 2 heads and 16 numbers of 4 bytes; what 512 queries make of them
    # with 4 heads; hidden states of 64 numbers.
    needed = slots * (2 * 2 * 2 * 16 * 4 + 512 * (24 + 4 * 16) + 2 * 4 * 64)
    wanted = rf"{slots} slots .* need {needed / 1e9:.0f}\.\d\d GB, and \d+\.\d\d GB of memory are"
    for call in (endless.generate, endless.stream):
        with pytest.raises(MinifuseError, match=wanted) as error:
            call(**REQUEST, max_new_tokens=10**10)
        assert error.value.exit_status == 1


def test_no_more_is_taken_than_planned(fuser, monkeypatch):
    """Nor is far more planned than taken: what fits is run."""
    planned = []
    bytes_for = engine.Fuser._bytes_for
    monkeypatch.setattr(
        engine.Fuser, "_bytes_for", lambda *args: planned.append(bytes_for(*args)) or planned[-1]
    )
    long = with_context(fuser, 10**5)
    request = {"segments": ["word " * 400, "other " * 300], "prefix": "a prefix " * 300}
    forget_peak()
    before = peak_bytes()
    long.generate(**request, suffix=" Z", methods="logit_avg", max_new_tokens=2)
    taken = peak_bytes() - before
    assert len(planned) == 1
    assert planned[0] > 1e8
    assert planned[0] / 4 < taken < planned[0]


def test_what_is_held_already_is_not_planned_again(fuser, monkeypatch):
    """The second request finds the first one's cache, though nothing else would fit beside it."""
    own = with_context(fuser, 2048)
    options = {"methods": "fused", "max_new_tokens": 3}
    plan = make_plan(**options)
    size = Size(1024, 256)
    needed = own._bytes_for([own._make_job(Request(**REQUEST), plan)], 1, size)
    own.generate(**REQUEST, **options)
    held = needed - own._bytes_for([own._make_job(Request(**REQUEST), plan)], 1, size)
    assert held == 1024 * 2 * 2 * 2 * 16 * 4 + table_bytes(256)
    monkeypatch.setattr(engine, "free_memory", lambda device: needed - held)
    own.generate(**REQUEST, **options)
    monkeypatch.setattr(engine, "free_memory", lambda device: needed - held - 1)
    with pytest.raises(MinifuseError, match="1024 slots of keys and values, their tables"):
        own.generate(**REQUEST, **options)


def test_bytes_of_tables(device):
    taken = sum(table.nbytes for table in make_tables(64, device))
    assert table_bytes(64) == taken


def test_a_batch_beyond_memory_is_made_smaller(fuser, monkeypatch):
    """With room for eight blocks: one for padding, one for the prefix, one for each request."""
    requests = [Request(**REQUEST, id=number) for number in range(7)]
    options = {"methods": ["fused"], "max_new_tokens": 3}
    plan = make_plan(**options)
    jobs = [fuser._make_job(request, plan) for request in requests]
    needed = fuser._bytes_for(jobs, 6, Size(1024, 256, True))
    monkeypatch.setattr(engine, "free_memory", lambda device: needed)
    sizes = []
    make_pool = fuser.executor.pool
    monkeypatch.setattr(fuser.executor, "pool", lambda size: sizes.append(size) or make_pool(size))
    with pytest.warns(UserWarning, match="6 requests are run at once, not 7: .* 0.0. GB"):
        together = fuser.generate_batch(requests, batch_size=7, **options)
    assert [size.slots for size in sizes] == [1024]
    for results in together:
        assert_same(results, fuser.generate(**REQUEST, **options))


def test_memory_of_a_container(tmp_path):
    """Cgroup v2: its limit, less what is used, but for file cache that goes on demand."""
    assert memory._free_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 300\ninactive_file 200\n")
    assert memory._free_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._free_in_group(tmp_path) == 500
    (tmp_path / "memory.max").write_text("100\n")
    assert memory._free_in_group(tmp_path) == 0
