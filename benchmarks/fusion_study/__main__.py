"""How likely gold answers are under many ways to fuse, side by side: to choose the defaults.

    python -m benchmarks.fusion_study --dataset pararel --data-dir DIR --half tune
        --output T.parquet
    python -m benchmarks.fusion_study --dataset pararel --data-dir DIR --half confirm
        --configs "fused,fused likelihood@1" --output C.parquet
    python -m benchmarks.fusion_study report T.parquet C.parquet

Prompts, items and shots are those of `python -m minifuse.evaluate`, and the measure is its
answer_logprob: the best gold answer's log-probability in nats, teacher-forced. The forward pass is
a plain dense one, since most of what is tried here the engine has no mechanism for; what both have
is checked against the engine in tests/test_fusion_study.py.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.fusion_study.configs import choose_configs
from benchmarks.fusion_study.items import choose_work
from benchmarks.fusion_study.report import make_report, read_cubes
from benchmarks.fusion_study.scoring import Study
from minifuse.command import Parser, add_model_flags, check_interrupt, run_command
from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.datasets import Item
from minifuse.evaluation.extras import import_extra
from minifuse.evaluation.flags import DATASET_METAVAR, add_dataset_flags, check_count, read_dataset
from minifuse.evaluation.prompts import (
    PromptBuilder,
    choose_paraphrases,
    continuation_of,
    find_template,
    paraphrases_needed,
    read_template,
)
from minifuse.loader import load_model
from minifuse.request import Request

if TYPE_CHECKING:
    from pandas import DataFrame


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.fusion_study",
        description="Log-probability of the best gold answer under many ways to fuse.",
        epilog="python -m benchmarks.fusion_study report FILE...: print what was found",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar=DATASET_METAVAR)
    add_dataset_flags(parser)
    add("--paraphrase-file", type=Path, metavar="FILE.jsonl")
    add("--draws", type=int, default=3, help="of shots (default: %(default)s)")
    add("--shots", type=int, default=5, help="default: %(default)s")
    add("--paraphrases", type=int, default=5, help="default: %(default)s")
    add("--limit", type=int, metavar="N", help="a seeded choice of items, halved by --half")
    add("--half", choices=("tune", "confirm"), help="default: all items")
    add("--configs", default="all", metavar="NAME,...", help="names or patterns (default: all)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, required=True, metavar="FILE.parquet")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    work: Callable[[], None]
    if arguments and arguments[0] == "report":
        work = functools.partial(_report_command, arguments[1:])
    else:
        work = functools.partial(_run, arguments)
    return run_command(work, interrupted="interrupted: the draws before this one are written")


def _run(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(arguments)
    for name in ("draws", "paraphrases", "limit"):
        check_count(f"--{name}", getattr(args, name))
    check_count("--shots", args.shots, 0)
    configs = choose_configs(args.configs)
    pandas = import_extra("pandas")
    import_extra("pyarrow")
    dataset = read_dataset(
        args,
        paraphrase_file=args.paraphrase_file,
        min_paraphrases=paraphrases_needed("first", args.paraphrases),
    )
    items, drawn = choose_work(
        dataset,
        shots=args.shots,
        draws=args.draws,
        seed=args.seed,
        limit=args.limit,
        half=args.half,
    )
    model = load_model(args.model, args.dtype, args.device, args.quantize)
    if model.config.quantize is not None:
        raise UsageError("the study's own decoder multiplies floats; leave --quantize out")
    study = Study(model, configs)
    template = read_template(find_template(dataset.name))
    about = {
        "dataset": dataset.name,
        "half": args.half or "all",
        "seed": args.seed,
        "model": model.name,
        "source": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    tables = []
    for draw, shots in enumerate(drawn):
        builder = PromptBuilder(template, tuple(shots))
        rows = list(_score_items(study, builder, items, args, f"draw {draw}"))
        tables.append(pandas.DataFrame(rows).assign(draw=draw, **about))
        _write(pandas.concat(tables, ignore_index=True), args.output)
    print(f"wrote {args.output}: {len(items)} items, {len(drawn)} draws", file=sys.stderr)


def _score_items(
    study: Study,
    builder: PromptBuilder,
    items: Sequence[Item],
    args: argparse.Namespace,
    title: str,
) -> Iterator[dict]:
    import tqdm

    for item in tqdm.tqdm(items, desc=title, unit="item", file=sys.stderr):
        chosen = choose_paraphrases(item, args.paraphrases, "first", args.seed)
        prompt = builder.build(item, [item.paraphrases[i] for i in chosen])
        request = Request(prompt.segments, prompt.prefix, prompt.suffix)
        scores = study.score(request, [continuation_of(answer) for answer in item.answers])
        for name, logprob in scores.items():
            yield {"item": item.id, "relation": item.relation, "config": name, "logprob": logprob}
        check_interrupt()


def _write(table: "DataFrame", path: Path) -> None:
    """Write a table whole, so that a reader never finds half of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        table.to_parquet(part, index=False)
        part.replace(path)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror}") from None


def _report_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m benchmarks.fusion_study report",
        description="Print what was found as a markdown table.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.parquet")
    print(make_report(read_cubes(parser.parse_args(arguments).files)))


if __name__ == "__main__":
    sys.exit(main())
