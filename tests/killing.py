"""Kills commands in the midst of their work, for tests of files that are continued."""

import random
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kill_at_random(
    command: list[str], output: Path, num_bytes: int, *, seed: int, kills: int
) -> list[int]:
    """Start a command and kill -9 it, again and again; the sizes that its file had then.

    Once before there can be a line, then as soon as the file is longer than a random size: in
    bytes, not in seconds, so that no machine is too fast or too slow for it.

    num_bytes: of the file at its end
    """
    draw = random.Random(seed)
    targets = [-1, *sorted(draw.randrange(num_bytes * 2 // 3) for _ in range(kills - 1))]
    sizes = []
    for target in targets:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        if target < 0:
            time.sleep(draw.uniform(0, 1))
        while process.poll() is None and size_of(output) <= target:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        sizes.append(size_of(output))
    return sizes


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
