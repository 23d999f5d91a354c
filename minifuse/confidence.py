"""Write how sure the model is of each paraphrase: `python -m minifuse.confidence --output FILE`.

Each line is {"id", "confidences", "answers", "samples"}, in the order of the item's paraphrases:
the share of samples that agrees with the greedy answer, that answer, the samples. Exit status as in
`minifuse.generate`.

    python -m minifuse.confidence --dataset pararel --data-dir DIR --output confidences.jsonl
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.command import Parser, load_fuser, run_command
from minifuse.config import parse_quantize
from minifuse.evaluation.batches import write_file
from minifuse.evaluation.confidences import (
    ConfidenceOptions,
    ConfidencePrompt,
    Tally,
    key_of_line,
    measure_confidences,
)
from minifuse.evaluation.flags import (
    DATASET_METAVAR,
    add_dataset_flags,
    add_file_flags,
    add_sampling_flags,
    check_count,
    read_dataset,
)

if TYPE_CHECKING:
    from minifuse.engine import Fuser
    from minifuse.evaluation.prompts import PromptTemplate

_DEFAULTS = ConfidenceOptions()


def build_parser() -> argparse.ArgumentParser:
    """The command line; reading it loads no torch."""
    parser = Parser(
        prog="python -m minifuse.confidence",
        description="Answer each paraphrase greedily and by samples, and count how many agree.",
        epilog="Answers are compared after normalisation. An empty sample agrees with nothing, and "
        "an empty greedy answer has confidence 0.",
    )
    group = parser.add_argument_group("items")
    group.add_argument("--dataset", required=True, metavar=DATASET_METAVAR, help="a data set")
    add_dataset_flags(group)
    add = group.add_argument
    add("--paraphrase-file", type=Path, metavar="FILE.jsonl", help="paraphrases by item id")
    add("--template", type=Path, metavar="FILE.toml", help="prompts (default: the data set's own)")
    add(
        "--paraphrases",
        type=int,
        default=5,
        metavar="N",
        help="leave out what evaluation leaves out under the same --paraphrases (of --sweep the "
        "largest) and --choice; all paraphrases of the other items are measured (default: "
        "%(default)s)",
    )
    add("--choice", default="first", metavar="HOW", help="default: %(default)s")
    add("--shots", type=int, default=5, help="few-shot examples (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="N items alone, drawn as evaluation draws them")
    add = parser.add_argument_group("samples").add_argument
    add(
        "--samples",
        type=int,
        default=_DEFAULTS.samples,
        help="per paraphrase (default: %(default)s)",
    )
    add_sampling_flags(add, _DEFAULTS, "draws examples and samples (default: %(default)s)")
    add_file_flags(parser.add_argument_group("run"), "items")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(
        lambda: _run(build_parser().parse_args(argv)),
        interrupted="interrupted: items so far are whole",
    )


def _run(args: argparse.Namespace) -> None:
    template = _read_template(args)
    options = ConfidenceOptions(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        stop=template.stop,
    )
    check_count("--shots", args.shots, 0)
    check_count("--limit", args.limit)
    check_count("--batch-size", args.batch_size)
    prompts, wanted = _read_prompts(args, template)
    record = {
        "command": "confidence",
        "model": args.model,
        "dtype": args.dtype,
        "quantize": parse_quantize(args.quantize),
        "dataset": args.dataset,
        "shots": args.shots,
        **options.for_record(),
    }

    def make_lines(fuser: "Fuser", done: Collection[str]) -> Iterator[dict]:
        ids = set(wanted)
        work = [prompt for prompt in prompts if prompt.id in ids]
        for item in measure_confidences(
            fuser, work, options, batch_size=args.batch_size, done=done
        ):
            yield item.to_json()

    write_file(
        args.output,
        record,
        [prompt.unit() for prompt in prompts],
        wanted=wanted,
        read_key=key_of_line,
        tally=Tally(),
        load=lambda: load_fuser(args),
        make_lines=make_lines,
        noun="item",
    )


def _read_prompts(
    args: argparse.Namespace, template: "PromptTemplate"
) -> tuple[list[ConfidencePrompt], list[str]]:
    """The plain prompts that evaluation asks too, and the ids that are wanted now.

    Shots and items are drawn as evaluation draws them under the same seed: which items have too few
    paraphrases settles what can be drawn.
    """
    from minifuse.evaluation.prompts import (
        PromptBuilder,
        choose_items,
        choose_shots,
        kinds_needed,
        paraphrases_needed,
    )

    dataset = read_dataset(
        args,
        paraphrase_file=args.paraphrase_file,
        min_paraphrases=paraphrases_needed(args.choice, args.paraphrases),
        min_kinds=kinds_needed(args.choice),
    )
    shots, left_out = choose_shots(dataset, args.shots, args.seed)
    items = [item for item in dataset.items if item.id not in left_out]
    builder = PromptBuilder(template, tuple(shots))
    prompts = []
    for item in items:
        prompt = builder.build(item, item.paraphrases)
        prompts.append(ConfidencePrompt(item.id, prompt.prefix, prompt.segments, prompt.suffix))
    if args.limit is not None:
        items = choose_items(items, args.limit, args.seed)
    return prompts, [item.id for item in items]


def _read_template(args: argparse.Namespace) -> "PromptTemplate":
    from minifuse.evaluation.prompts import find_template, read_template

    return read_template(args.template or find_template(args.dataset))


if __name__ == "__main__":
    sys.exit(main())
