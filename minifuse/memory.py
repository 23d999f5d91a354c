"""What memory is free, and what a call of the decoder takes beside weights and cache."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.config import ModelConfig

if TYPE_CHECKING:
    import torch


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes that this machine, or the container around this process, can still give."""
    limits = [_free_in_group()]
    with contextlib.suppress(OSError):
        # Of what the system calls free it leaves out the file cache, which it gives up on demand.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves (cgroup v2), None where there is no limit."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((folder / "memory.max").read_text())  # "max" where there is none
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # File cache that is given up on demand counts as used there.
        cached = int(dict(line.split() for line in lines)["inactive_file"])
        return max(0, limit - used + cached)
    return None


def call_bytes(config: ModelConfig, *, tokens: int, slots: int, is_compiled: bool) -> int:
    """Bytes that a call holds at its peak, at most.

    Attention's scores have to be there as a whole where nothing is compiled: as they come, with
    the bias, and normalised. Activations are counted in float32 and as if none were given back
    within a layer; of logits there are as many again while they become log-probabilities.
    """
    num_masks = len({layer in config.sliding_layers for layer in range(config.num_hidden_layers)})
    # The biases, and what the last of them is made of: flags, gathered entries, differences.
    pairs = tokens * slots * (4 * num_masks + 20)
    scores = 0 if is_compiled else 4 * 4 * config.num_attention_heads * tokens * slots
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    widths = 6 * config.hidden_size + 2 * heads + 3 * config.intermediate_size
    return pairs + scores + 4 * tokens * widths
