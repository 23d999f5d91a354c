"""What a target of the fuzzing is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A kind of foreign file.

    files: makes what lies in a folder, by name, of choices
    read:  reads the folder; may write into its `out`, and nowhere else
    cost:  how many inputs of a common target take as long as one of this
    """

    name: str
    files: Callable[[Random], Files]
    read: Callable[[Path], None]
    cost: int = 1
