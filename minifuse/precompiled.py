"""Compiled steps that a new process finds whole, without tracing the model again.

Torch keeps what Inductor makes in its cache, but traces the Python code anew in every process to
learn which of it fits; for a model of 30 layers that is most of a warm start. Here a step is
compiled ahead of time for one set of shapes, and stored beside Inductor's own files under a name
that hashes all it depends on. Like those it is unpickled, so the folder must be one's own.

Such a step has no guards: its name stands for them, and `Step` checks the shapes at every call, and
on demand torch's own state, such as autocast and the number of threads, which is compiled in.
"""

import contextlib
import gc
import hashlib
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._pytree import tree_flatten, tree_leaves

from minifuse.config import ModelConfig
from minifuse.files import hash_sources


class Step:
    """A step compiled for fixed shapes; called as the function that it was made of.

    is_stored: whether it was found on disk
    """

    def __init__(self, function: Any, args: Sequence, *, is_stored: bool):
        # The name on disk says what guards would.
        function.disable_guard_check()
        self.is_stored = is_stored
        self._function = function
        self._shapes = _changing_shapes(args)
        self._state = GlobalStateGuard()

    def fits_state(self) -> bool:
        """Whether torch's own state is still what this was compiled in."""
        return self._state.check()

    def __call__(self, *args: object) -> Tensor:
        assert _changing_shapes(args) == self._shapes, "called with other shapes than compiled for"
        output: Tensor = self._function(*args)
        return output


def _changing_shapes(args: Sequence) -> list:
    """What differs between calls: of inputs, cache and context; params are always the same."""
    _, _, block, inputs, cache, context = args
    tensors = tree_leaves((inputs, cache.keys[0], context))
    return [block, *((tensor.shape, tensor.dtype, tensor.is_contiguous()) for tensor in tensors)]


def precompile(compiled: Any, name: str, args: Sequence) -> Step:
    """Take a step out of the cache, or compile it and put it there.

    compiled: what torch.compile returned, with `fullgraph` and without guards
    name:     of the step
    args:     params, config, block, inputs, cache and context, as it will be called with; not run
    """
    path = Path(cache_dir()) / "minifuse" / f"{_fingerprint(name, args)}.step"
    function = _load(path)
    is_stored = function is not None
    if function is None:
        with paused_gc():
            function = compiled.aot_compile((tuple(args), {}))
        path.parent.mkdir(parents=True, exist_ok=True)
        function.save_compiled_function(str(path))
    return Step(function, args, is_stored=is_stored)


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file, paused_gc():
            return torch.compiler.load_compiled_function(file)
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged file makes the unpickler raise: it is compiled anew
        return None


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection meanwhile: the compiler makes millions of objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _fingerprint(name: str, args: Sequence) -> str:
    """A hash of all that a compiled step depends on."""
    leaves, structure = tree_flatten(tuple(args))
    # Anything else might look alike without being alike.
    known = (Tensor, ModelConfig, int, float, str, type(None))
    assert all(isinstance(leaf, known) for leaf in leaves), "arguments of an unknown kind"
    numbers: dict[int, int] = {}
    described = [
        (
            leaf.shape,
            leaf.stride(),
            leaf.dtype,
            leaf.device,
            leaf.is_inference(),
            # Tensors that are one, such as a tied head, are one input of the graph.
            numbers.setdefault(leaf.data_ptr(), len(numbers)),
        )
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    ]
    parts = (
        name,
        torch.__version__,
        platform.python_version(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        GlobalStateGuard().__getstate__(),  # number of threads, autocast, default dtype, ...
        torch.is_inference_mode_enabled(),
        torch._inductor.config.get_hash(),
        hash_sources(),
        structure,
        described,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
