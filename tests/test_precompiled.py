"""Steps that are compiled ahead of time: the same answers, other shapes refused, found again."""

import pytest
import torch
from engine_cases import REQUEST, assert_same

import minifuse
from minifuse.cache import KVCache
from minifuse.executor import GraphRecord
from minifuse.precompiled import Step, _fingerprint, paused_gc

OPTIONS = {"methods": ["fused"], "max_new_tokens": 3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "inductor"


@pytest.mark.slow
def test_a_stored_step_gives_the_same_answers(tiny_llama_folder, cache):
    eager = minifuse.load(tiny_llama_folder, compile=False).generate(**REQUEST, **OPTIONS)
    for is_stored in (False, True):
        fuser = minifuse.load(tiny_llama_folder)
        assert_same(fuser.generate(**REQUEST, **OPTIONS), eager)
        records = fuser.executor.graphs.values()
        assert records
        assert all(isinstance(record, GraphRecord) for record in records)
        assert {record.is_stored for record in records} == {is_stored}
    stored = list((cache / "minifuse").iterdir())
    assert len(stored) == len(records)

    # A damaged file is compiled anew, and replaced.
    for path in stored:
        path.write_bytes(path.read_bytes()[:1000])
    fuser = minifuse.load(tiny_llama_folder)
    assert_same(fuser.generate(**REQUEST, **OPTIONS), eager)
    assert not any(record.is_stored for record in fuser.executor.graphs.values())
    assert all(path.stat().st_size > 1000 for path in stored)

    # Other weights of the same shapes may use what is stored: weights are inputs.
    params = fuser.model.params
    with torch.inference_mode():
        params.final_norm.mul_(1.5)
    changed = fuser.generate(**REQUEST, **OPTIONS)
    with pytest.raises(AssertionError):
        assert_same(changed, eager)


@pytest.mark.slow
def test_what_autocast_made_is_for_autocast_alone(tiny_llama_folder, cache):
    """Autocast is compiled in: neither this process nor a later one may take it for the plain."""
    eager = minifuse.load(tiny_llama_folder, compile=False)
    wanted = eager.generate(**REQUEST, **OPTIONS)
    fuser = minifuse.load(tiny_llama_folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuser.generate(**REQUEST, **OPTIONS)
    assert fuser.executor.recompiles == 0
    number = len(fuser.executor.graphs)
    fuser.forget_prefixes()
    assert_same(fuser.generate(**REQUEST, **OPTIONS), wanted)
    assert fuser.executor.recompiles == number
    assert not any(record.is_stored for record in fuser.executor.graphs.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuser.generate(**REQUEST, **OPTIONS)
    assert fuser.executor.recompiles == number, "both are kept"

    later = minifuse.load(tiny_llama_folder)
    assert_same(later.generate(**REQUEST, **OPTIONS), wanted)
    assert all(record.is_stored for record in later.executor.graphs.values())


@pytest.mark.parametrize(
    "change",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode],
    ids=["autocast", "inference"],
)
def test_a_step_is_named_after_the_state_of_torch(change):
    args = (torch.zeros(2, 3), 1, "x")
    plain = _fingerprint("step", args)
    with change():
        assert _fingerprint("step", args) != plain
    assert _fingerprint("step", args) == plain


def test_a_step_knows_the_state_it_was_made_in():
    class Function:
        def disable_guard_check(self):
            pass

    args = (None, None, 1, (), KVCache([torch.zeros(1)], []), ())
    step = Step(Function(), args, is_stored=False)
    assert step.fits_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not step.fits_state()
    assert step.fits_state()


def test_a_step_refuses_other_shapes():
    class Function:
        def disable_guard_check(self):
            pass

        def __call__(self, params, config, block, inputs, cache, context):
            return inputs[0]

    class Cache:
        def __init__(self, keys):
            self.keys = keys

    def make_args(tokens, slots, dtype=torch.float32, block=1):
        inputs = (torch.zeros(1, tokens),)
        return None, None, block, inputs, Cache([torch.zeros(1, slots, dtype=dtype)]), inputs

    step = Step(Function(), make_args(4, 8), is_stored=False)
    assert step(*make_args(4, 8)).shape == (1, 4)
    others = (make_args(3, 8), make_args(4, 9), make_args(4, 8, torch.bfloat16))
    for other in (*others, make_args(4, 8, block=4)):
        with pytest.raises(AssertionError, match="other shapes"):
            step(*other)


def test_garbage_collection_goes_on_after_a_pause():
    import gc

    assert gc.isenabled()
    with paused_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"), paused_gc():
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
