"""Flags that the evaluation's commands share: which data set, and how it is read."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.errors import UsageError

if TYPE_CHECKING:
    from minifuse.evaluation.datasets import Dataset

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


def read_dataset(
    args: argparse.Namespace, *, paraphrase_file: Path | None, min_paraphrases: int
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
    )
    for note in dataset.notes:
        print(note, file=sys.stderr)
    if dataset.skipped:
        print(
            f"{len(dataset.skipped)} bad rows are left out, the first: {dataset.skipped[0]}",
            file=sys.stderr,
        )
    return dataset


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Refuse a number that is too small, before any work.

    raises: UsageError
    """
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; wanted an integer of at least {least}")
