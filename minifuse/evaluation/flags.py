"""Flags that the evaluation's commands share: the data set, how texts are drawn, the output."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.command import add_model_flags
from minifuse.errors import UsageError

if TYPE_CHECKING:
    from minifuse.evaluation.confidences import ConfidenceOptions
    from minifuse.evaluation.datasets import Dataset
    from minifuse.evaluation.paraphrasing import ParaphraseOptions

DATASET_METAVAR = "webqa|myriadlama|pararel|graphquestions|FILE|hf:ORG/NAME"


def add_dataset_flags(parser: argparse._ActionsContainer) -> None:
    """What `read_dataset` reads but `--dataset`, beside which a command may have another input."""
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="read a named set's files from a folder")
    add(
        "--fields",
        metavar="NAME=COLUMN,...",
        help="where a file keeps what it holds, such as id=qid,question=text",
    )
    add("--skip-bad", action="store_true", help="leave bad rows out and count them")


def add_sampling_flags(
    add: Callable[..., object], defaults: "ConfidenceOptions | ParaphraseOptions", seed_help: str
) -> None:
    """How texts are drawn; `add` is a parser's `add_argument`."""
    add("--temperature", type=float, default=defaults.temperature, help="default: %(default)g")
    add("--top-p", type=float, default=defaults.top_p, help="default: %(default)g")
    add(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        help="default: %(default)s",
    )
    add("--seed", type=int, default=defaults.seed, help=seed_help)


def add_file_flags(parser: argparse._ActionsContainer, noun: str) -> None:
    """Flags of a command whose output is one file that can be continued.

    noun: what it works on, in the plural
    """
    add_model_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=8, help=f"{noun} at once (default: %(default)s)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help=f"append {noun} there as they are finished; the same call again goes on where it "
        "stopped (its options are kept in FILE.jsonl.run.json)",
    )


def read_dataset(
    args: argparse.Namespace,
    *,
    paraphrase_file: Path | None,
    min_paraphrases: int,
    min_kinds: tuple[int, int] = (0, 0),
) -> "Dataset":
    """The data set that the flags name; what was left out of it is said on standard error.

    raises: as `datasets.load_dataset`
    """
    from minifuse.evaluation.datasets import load_dataset, parse_fields

    dataset = load_dataset(
        args.dataset,
        data_dir=args.data_dir,
        fields=parse_fields(args.fields) if args.fields is not None else {},
        paraphrase_file=paraphrase_file,
        skip_bad=args.skip_bad,
        min_paraphrases=min_paraphrases,
        min_kinds=min_kinds,
    )
    for note in dataset.notes:
        print(note, file=sys.stderr)
    if dataset.skipped:
        print(
            f"bad rows that are left out: {len(dataset.skipped)}, the first {dataset.skipped[0]}",
            file=sys.stderr,
        )
    return dataset


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Refuse a number that is too small, before any work.

    raises: UsageError
    """
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; wanted an integer of at least {least}")
