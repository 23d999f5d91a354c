"""minifuse: one question, many phrasings, one forward pass.

fuser = minifuse.load()
results = fuser.generate(segments=["Q: ...\n", "Q: ...\n"], suffix="A:", methods=["fused"])
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minifuse.engine import Fuser, load
    from minifuse.errors import MinifuseError
    from minifuse.request import Request
    from minifuse.results import Generation, LayoutEntry, StreamEvent

__version__ = "0.1.0"

# Where each public name lives; loaded on first use, so that `--help` loads no torch.
_HOMES = {
    "load": "minifuse.engine",
    "Fuser": "minifuse.engine",
    "Request": "minifuse.request",
    "Generation": "minifuse.results",
    "LayoutEntry": "minifuse.results",
    "StreamEvent": "minifuse.results",
    "MinifuseError": "minifuse.errors",
}

__all__ = ["Fuser", "Generation", "LayoutEntry", "MinifuseError", "Request", "StreamEvent", "load"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'minifuse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
