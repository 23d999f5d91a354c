"""Write a paraphrase file with the model itself: `python -m minifuse.paraphrase --output FILE`.

Each line is {"id", "question", "paraphrases", "draws", "rejected"}; the last two say how many texts
were drawn and how many of them were rejected, by reason. Exit status as in `minifuse.generate`.

    python -m minifuse.paraphrase --dataset webqa --output paraphrases.jsonl
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.command import Parser, load_fuser, run_command
from minifuse.config import parse_quantize
from minifuse.errors import UsageError
from minifuse.evaluation.batches import write_file
from minifuse.evaluation.flags import (
    DATASET_METAVAR,
    add_dataset_flags,
    add_file_flags,
    add_sampling_flags,
    check_count,
    read_dataset,
)
from minifuse.evaluation.paraphrasing import (
    EXTRA_WORDS,
    LENGTH_FACTOR,
    ParaphraseOptions,
    Question,
    Tally,
    draw_paraphrases,
    key_of_line,
    load_exemplars,
    read_questions,
)

if TYPE_CHECKING:
    from minifuse.engine import Fuser

_DEFAULTS = ParaphraseOptions()
TRIES_FACTOR = _DEFAULTS.tries // _DEFAULTS.count


def build_parser() -> argparse.ArgumentParser:
    """The command line; reading it loads no torch."""
    parser = Parser(
        prog="python -m minifuse.paraphrase",
        description="Ask a model for other phrasings of questions, and keep those that pass.",
        epilog="Rejected and counted: texts that do not end, are empty, garbled or without a "
        f"letter, longer than {LENGTH_FACTOR} times the question's words and than {EXTRA_WORDS} "
        "words more, lack the question's question mark or most of its longer words, or equal "
        "the question or an earlier paraphrase after normalisation.",
    )
    group = parser.add_argument_group("questions")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar=DATASET_METAVAR, help="a data set's questions")
    source.add_argument(
        "--input", type=Path, metavar="FILE.jsonl", help='questions, {"id", "question"} a line'
    )
    add_dataset_flags(group)
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="N questions alone: the first of --input; of a data set as evaluation draws them "
        "under the same --seed",
    )
    add = parser.add_argument_group("paraphrases").add_argument
    add("--count", type=int, default=_DEFAULTS.count, help="per question (default: %(default)s)")
    add(
        "--tries",
        type=int,
        help=f"texts drawn for a question at most (default: {TRIES_FACTOR} times --count)",
    )
    add(
        "--exemplars",
        type=Path,
        metavar="FILE.toml",
        help="few-shot prompts instead of minifuse/evaluation/exemplars.toml",
    )
    add_sampling_flags(add, _DEFAULTS, "default: %(default)s")
    add_file_flags(parser.add_argument_group("run"), "questions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(
        lambda: _run(build_parser().parse_args(argv)),
        interrupted="interrupted: questions so far are whole",
    )


def _run(args: argparse.Namespace) -> None:
    options = ParaphraseOptions(
        count=args.count,
        tries=TRIES_FACTOR * args.count if args.tries is None else args.tries,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    check_count("--limit", args.limit)
    check_count("--batch-size", args.batch_size)
    exemplars = load_exemplars(args.exemplars)
    questions, wanted = _read_questions(args)
    record = {
        "command": "paraphrase",
        "model": args.model,
        "dtype": args.dtype,
        "quantize": parse_quantize(args.quantize),
        "dataset": args.dataset,
        **options.for_record(exemplars),
    }

    def make_lines(fuser: "Fuser", done: Collection[str]) -> Iterator[dict]:
        for paraphrased in draw_paraphrases(
            fuser,
            wanted,
            exemplars,
            options,
            batch_size=args.batch_size,
            done=done,
        ):
            yield paraphrased.to_json()

    write_file(
        args.output,
        record,
        [question.unit() for question in questions],
        wanted=[question.id for question in wanted],
        read_key=key_of_line,
        tally=Tally(options.count),
        load=lambda: load_fuser(args),
        make_lines=make_lines,
        noun="question",
    )


def _read_questions(args: argparse.Namespace) -> tuple[list[Question], list[Question]]:
    """All questions, and those that are wanted now."""
    if args.input:
        if args.data_dir or args.fields is not None or args.skip_bad:
            raise UsageError(
                "--data-dir, --fields and --skip-bad are for --dataset; --input is read as it is"
            )
        questions = read_questions(args.input)
        return questions, questions[: args.limit]
    from minifuse.evaluation.prompts import choose_items

    items = read_dataset(args, paraphrase_file=None, min_paraphrases=0).items
    questions = [Question(item.id, item.question, item.paraphrases) for item in items]
    if args.limit is None:
        return questions, questions
    ids = {item.id for item in choose_items(items, args.limit, args.seed)}
    return questions, [question for question in questions if question.id in ids]


if __name__ == "__main__":
    sys.exit(main())
