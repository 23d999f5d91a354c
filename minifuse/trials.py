"""Requests of given sizes in tokens, for those who warm up or measure: sizes, flags, texts.

The texts are common words without much sense; speed depends on their lengths alone.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifuse.errors import UsageError

if TYPE_CHECKING:
    from minifuse.request import Request
    from minifuse.tokenizer import Tokenizer

_WORDS = (
    "the of and to in is that it was for on are with as at be this have from or had by but some "
    "what there we can out other were all your when up use how said each she which do their time "
    "if will way about many then them would write like so these her long make thing see him two "
    "has look more day could go come did my no most number who over know water than call first"
).split()
# What can make up for one last token: something short that does not join what stands before it.
_FILLERS = (" a", " I", ".", "\n", " x", ";", "7", "=", "?", "~")


@dataclass(frozen=True)
class TrialSize:
    """What a request of a trial holds; the defaults are a question behind five shots.

    segments: paraphrases in a request
    *_tokens: of the prefix (without BOS), the segments on average, the suffix, the answer
    methods:  names or aliases
    """

    segments: int = 5
    prefix_tokens: int = 112
    segment_tokens: int = 15
    suffix_tokens: int = 2
    new_tokens: int = 10
    methods: tuple[str, ...] = ("fused",)

    def __post_init__(self) -> None:
        """raises: UsageError for a number below what a request needs"""
        least = {"segments": 1, "prefix_tokens": 0, "segment_tokens": 1, "suffix_tokens": 0}
        for name, lowest in {**least, "new_tokens": 1}.items():
            value = getattr(self, name)
            if value < lowest:
                raise UsageError(f"{_flag_of(name)} is {value}; wanted at least {lowest}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prefix, segments and one suffix."""
        return self.prefix_tokens + self.segments * self.segment_tokens + self.suffix_tokens


_FLAGS = {
    "segments": "paraphrases in a request",
    "prefix_tokens": "of the shared prefix, in tokens",
    "segment_tokens": "of a paraphrase, on average",
    "suffix_tokens": "of what opens the answer",
    "new_tokens": "of the answer",
}


def add_size_flags(parser: argparse._ActionsContainer, *, several: bool = False) -> None:
    """A flag for each field of TrialSize.

    several: the numbers may be lists with commas
    """
    for name, unit in _FLAGS.items():
        parser.add_argument(
            _flag_of(name),
            metavar="N[,N...]" if several else "N",
            type=parse_numbers if several else int,
            default=str(getattr(TrialSize, name)),
            help=f"{unit} (%(default)s)",
        )
    parser.add_argument(
        "--method",
        "--methods",
        dest="methods",
        metavar="NAME[,NAME...]|all",
        default=",".join(TrialSize.methods),
        help="asked with all at once (%(default)s)",
    )


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_numbers(text: str) -> list[int]:
    """Numbers with commas between them.

    raises: argparse.ArgumentTypeError
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted numbers with commas") from None


def sizes_of_flags(args: argparse.Namespace) -> list[TrialSize]:
    """The sizes that the flags of `add_size_flags` say, one for each combination of numbers.

    raises: UsageError for a number too small, an unknown method
    """
    from minifuse.methods import parse_methods

    names = parse_methods(name.strip() for name in args.methods.split(","))
    methods = tuple(str(name) for name in names)
    given = [getattr(args, name) for name in _FLAGS]
    lists = [numbers if isinstance(numbers, list) else [numbers] for numbers in given]
    return [
        TrialSize(**dict(zip(_FLAGS, numbers, strict=True)), methods=methods)
        for numbers in itertools.product(*lists)
    ]


def flags_of_sizes(sizes: Sequence[TrialSize]) -> list[str]:
    """The arguments that `sizes_of_flags` reads as these, where they are all combinations."""
    numbers = {name: dict.fromkeys(str(getattr(size, name)) for size in sizes) for name in _FLAGS}
    flags = [f"{_flag_of(name)}={','.join(values)}" for name, values in numbers.items()]
    return [*flags, f"--methods={','.join(sizes[0].methods)}"]


def make_trial(tokenizer: "Tokenizer", size: TrialSize, seed: int = 0) -> "Request":
    """A request of this size, the same for the same seed; another seed has another prefix.

    raises: UsageError where this vocabulary makes no text of so many tokens
    """
    from minifuse.request import Request

    prefix = make_text(tokenizer, size.prefix_tokens, seed=f"prefix {seed}", is_start=True)
    # Without a suffix the segments have to end in the same token; it is the last of their texts.
    end = "" if size.suffix_tokens else "\n"
    segments = [
        make_text(
            tokenizer,
            length,
            seed=f"segment {seed} {index}",
            is_start=not prefix,
            end=end,
        )
        for index, length in enumerate(segment_lengths(size))
    ]
    suffix = make_text(tokenizer, size.suffix_tokens, seed="suffix", is_start=False)
    return Request(segments=segments, prefix=prefix, suffix=suffix)


def segment_lengths(size: TrialSize) -> list[int]:
    """Tokens of each segment: one less and one more by turns, since real ones differ, too."""
    step = min(1, size.segment_tokens - 1)
    lengths = [
        size.segment_tokens + (step if index % 2 else -step) for index in range(size.segments)
    ]
    if size.segments % 2:
        lengths[-1] = size.segment_tokens
    return lengths


def make_text(
    tokenizer: "Tokenizer", num_tokens: int, *, seed: str, is_start: bool, end: str = ""
) -> str:
    """A text that is encoded as exactly so many tokens.

    is_start: as for `Tokenizer.encode`
    end:      what the text ends with, where it has any tokens
    raises:   UsageError where no such text was found
    """
    if num_tokens == 0:
        return ""
    draw = random.Random(seed)
    words = ["".join((" ", draw.choice(_WORDS))) for _ in range(num_tokens)]

    def count(parts: Sequence[str]) -> int:
        return len(tokenizer.encode("".join(parts) + end, is_start=is_start))

    # Every word is at least a token, so the longest text that is not too long lies in the list.
    low, high = 0, num_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(words[:middle]) <= num_tokens else (low, middle - 1)
    parts: Sequence[str] | None = words[:low]
    while parts is not None and (reached := count(parts)) < num_tokens:
        longer = ([*parts, filler] for filler in draw.sample(_FILLERS, len(_FILLERS)))
        parts = next((new for new in longer if reached < count(new) <= num_tokens), None)
    if parts is None or reached > num_tokens:
        raise UsageError(
            f"no text of {num_tokens} tokens was found in this model's vocabulary; "
            "try another number"
        )
    return "".join(parts) + end
