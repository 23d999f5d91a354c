"""From a data set to a table, paired statistics and a report: `python -m minifuse.evaluate`.

    python -m minifuse.evaluate --dataset examples/questions.jsonl --methods all --output runs/first
    python -m minifuse.evaluate score runs/first --spacy-model en_core_web_lg
    python -m minifuse.evaluate lemmatize runs/first
    python -m minifuse.evaluate compare runs/first runs/second

A run may be killed at any time: the same call with --resume goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minifuse.command import Parser, add_model_flags, load_fuser, run_command
from minifuse.config import POSITION_SCHEMES, WEIGHT_SIGNALS, FusionConfig
from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.flags import add_dataset_flags, read_dataset
from minifuse.jsonl import checked

if TYPE_CHECKING:
    from pandas import DataFrame

    from minifuse.evaluation.datasets import Dataset, Item
    from minifuse.evaluation.prompts import PromptBuilder, PromptTemplate

_FUSION = FusionConfig()
MAX_NEW_TOKENS = 16


def build_parser() -> argparse.ArgumentParser:
    """The flags of a run; reading them loads no torch."""
    parser = Parser(
        prog="python -m minifuse.evaluate",
        description="Run methods over a data set, score the answers, and write a report.",
        epilog="python -m minifuse.evaluate score|lemmatize|compare --help: work on finished runs",
    )
    _add_data_flags(parser)
    _add_prompt_flags(parser)
    _add_run_flags(parser)
    _add_score_flags(parser)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--dataset",
        required=True,
        metavar="NAME|FILE|hf:ORG/NAME",
        help="webqa, myriadlama, pararel, graphquestions; a JSONL, CSV or parquet file; or a data "
        "set of the hub, hf:ORG/NAME[:config][:split]",
    )
    add_dataset_flags(group)
    add(
        "--paraphrase-file",
        type=Path,
        metavar="FILE.jsonl",
        help="of python -m minifuse.paraphrase",
    )
    add("--limit", type=int, metavar="N", help="evaluate a seeded choice of so many items")


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add("--paraphrases", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--sweep", metavar="N,N,...", help="several numbers of paraphrases in one run")
    add(
        "--choice",
        default="first",
        metavar="HOW",
        help="first, indices:0,2,3, mixed:M+A or repeat (default: %(default)s)",
    )
    add("--shots", type=int, default=5, metavar="K", help="default: %(default)s")
    add(
        "--draws",
        type=int,
        default=1,
        metavar="D",
        help="ask every item behind so many seeded draws of shots (default: %(default)s)",
    )
    add("--template", type=Path, metavar="FILE.toml", help="instead of the data set's own")
    add(
        "--format",
        default="prefix",
        choices=("prefix", "full", "shot-paraphrases", "in-prompt"),
        help="where instruction and shots stand (default: %(default)s)",
    )
    add("--chat", action="store_true", help="use the model's chat template")
    add("--system", metavar="TEXT", help="a system message, for --chat")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--methods", "--method", default="all", metavar="NAME[,NAME...]|all", help="default: all")
    add_model_flags(group)
    add(
        "--positions",
        choices=POSITION_SCHEMES,
        default=_FUSION.positions,
        help="where fused methods find the paraphrases (default: %(default)s)",
    )
    add("--weights", choices=WEIGHT_SIGNALS, help=f"signal of weights (default: {_FUSION.signal})")
    add("--weights-from", type=Path, metavar="FILE.jsonl", help="of python -m minifuse.confidence")
    add("--beta", type=float, default=_FUSION.beta, help="default: %(default)g")
    add("--balance", type=float, help="default: 0.5 for fused_auto, else 1")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="items at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="of shots, items and paraphrases (default: 0)")
    add(
        "--attribution",
        action="store_true",
        help="find out what each paraphrase did for every answer; for one number of paraphrases",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    add("--resume", action="store_true", help="go on with the run in --output")


def _add_score_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scores").add_argument
    add(
        "--spacy-model",
        metavar="NAME",
        help="pipeline for lemmas, en_core_web_lg for example (default: an offline English one)",
    )
    add("--family", metavar="A:B,A:B,...", help="pairs of methods to test, declared beforehand")
    add(
        "--rule",
        choices=("match_lemma", "match_lemma_both", "match_exact", "match_first_word"),
        default="match_lemma",
        help="of flips, spread, calibration and comparisons (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "score": _score_command,
        "lemmatize": _lemmatize_command,
        "compare": _compare_command,
    }
    work: Callable[[], None]
    if arguments and arguments[0] in commands:
        name = arguments[0]
        work = lambda: commands[name](arguments[1:])  # noqa: E731
    else:
        work = lambda: _run(build_parser().parse_args(arguments), arguments)  # noqa: E731
    return run_command(
        work, interrupted="interrupted: items so far are whole; the same call with --resume goes on"
    )


# A run


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    from minifuse.methods import parse_methods

    counts = _read_counts(args)
    methods = tuple(str(m) for m in parse_methods(n.strip() for n in args.methods.split(",")))
    FusionConfig(positions=args.positions, beta=args.beta, balance=args.balance)
    smallest = {"seed": 0, "shots": 0, "draws": 1, "batch_size": 1, "max_new_tokens": 1, "limit": 1}
    for name, low in smallest.items():
        value = getattr(args, name)
        if value is not None and value < low:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {value}; wanted an integer of at least {low}")
    if args.system is not None and not args.chat:
        raise UsageError("--system is for a chat template; wanted --chat beside it")
    if args.system is not None:
        checked(args.system, "--system")
    if args.attribution and len(counts) > 1:
        raise UsageError("--attribution is for one number of paraphrases; leave out --sweep")
    from minifuse.evaluation.extras import import_extra
    from minifuse.evaluation.lemmas import load_pipeline
    from minifuse.evaluation.prompts import kinds_needed, paraphrases_needed

    # What is missing shows before the work, not after it.
    for package in ("pandas", "pyarrow", "scipy", "matplotlib"):
        import_extra(package)
    load_pipeline(args.spacy_model)
    dataset = read_dataset(
        args,
        paraphrase_file=args.paraphrase_file,
        min_paraphrases=paraphrases_needed(args.choice, max(counts)),
        min_kinds=kinds_needed(args.choice),
    )
    template, builders, items = _prepare(args, dataset)
    weights = _read_weights(args, items)

    from minifuse.evaluation.records import RunFolder
    from minifuse.evaluation.runner import RunPlan, run_items

    fuser = load_fuser(args)
    options = {
        "positions": args.positions,
        "beta": args.beta,
        "balance": args.balance,
        "max_new_tokens": args.max_new_tokens,
        # An answer in a chat ends by itself; its first line is what counts either way.
        "stop": [] if args.chat else list(template.stop),
        "chat": args.chat,
        "system": args.system,
    }
    if args.attribution:  # runs from before it was there go on
        options["attribution"] = True
    config = {
        "command": ["python", "-m", "minifuse.evaluate", *arguments],
        "dataset": args.dataset,
        "data_hash": dataset.data_hash,
        "items_hash": _hash_items(items),
        "num_items": len(items),
        "skipped": len(dataset.skipped),
        "model": fuser.model.name,
        "source": fuser.model.source,
        "dtype": str(fuser.model.dtype).removeprefix("torch."),
        "quantize": fuser.model.config.quantize,
        "methods": list(methods),
        "n": list(counts),
        "choice": args.choice,
        "shots": args.shots,
        "draws": args.draws,
        "shot_ids": [[shot.id for shot in builder.shots] for builder in builders],
        "format_of_prompts": args.format,
        "template": asdict(template),
        "seed": args.seed,
        "limit": args.limit,
        "weights": args.weights,
        "weights_from": _hash_file(args.weights_from),
        "batch_size": args.batch_size,
        "family": _read_family(args.family),
        **options,
    }
    plan = RunPlan(methods, counts, args.choice, args.seed, weights, options)
    with RunFolder(args.output, config, resume=args.resume) as folder:
        run_items(fuser, items, builders, plan, folder, batch_size=args.batch_size)
        _finish(args.output, args)


def _read_counts(args: argparse.Namespace) -> tuple[int, ...]:
    if args.sweep is None:
        counts: tuple[int, ...] = (args.paraphrases,)
    else:
        try:
            counts = tuple(dict.fromkeys(int(part) for part in args.sweep.split(",")))
        except ValueError:
            raise UsageError(f"--sweep is {args.sweep!r}; wanted numbers, as in 1,2,3,5") from None
    if min(counts) < 1:
        raise UsageError(f"{min(counts)} paraphrases were asked for; wanted at least 1")
    return counts


def _prepare(
    args: argparse.Namespace, dataset: "Dataset"
) -> tuple["PromptTemplate", list["PromptBuilder"], list["Item"]]:
    """The template, a builder for every draw of shots, and the items to evaluate."""
    from minifuse.evaluation.prompts import (
        PromptBuilder,
        choose_draws,
        choose_items,
        find_template,
        read_template,
    )

    template = read_template(args.template or find_template(dataset.name))
    least = max(_read_counts(args)) if args.format == "shot-paraphrases" else 1
    draws, left_out = choose_draws(
        dataset, args.shots, args.seed, args.draws, min_paraphrases=least
    )
    items = [item for item in dataset.items if item.id not in left_out]
    if args.limit is not None and args.limit < len(items):
        items = choose_items(items, args.limit, args.seed)
    if not items:
        raise UsageError(
            f"{args.dataset} leaves no item to evaluate beside {args.draws} draws of {args.shots} "
            "shots; ask for fewer"
        )
    builders = [
        PromptBuilder(template, tuple(shots), format=args.format, chat=args.chat) for shots in draws
    ]
    return template, builders, items


def _read_weights(
    args: argparse.Namespace, items: Sequence["Item"]
) -> dict[str, tuple[float, ...]] | str | None:
    if args.weights_from is None:
        return args.weights
    if args.weights is not None:
        raise UsageError("--weights stands beside --weights-from; wanted one or the other")
    from minifuse.evaluation.confidences import read_weights, weights_of

    weights = read_weights(args.weights_from)
    for item in items:  # what does not fit shows before the work begins
        everything = range(len(item.paraphrases))
        weights_of(weights, item.id, everything, len(item.paraphrases))
    return weights


def _read_family(text: str | None) -> list[list[str]] | None:
    if text is None:
        return None
    from minifuse.methods import parse_methods

    pairs = []
    for part in text.split(","):
        names = part.split(":")
        if len(names) != 2:
            raise UsageError(f"--family has {part!r}; wanted METHOD:METHOD")
        pairs.append([str(method) for name in names for method in parse_methods(name.strip())])
    return pairs


def _hash_items(items: Sequence["Item"]) -> str:
    text = json.dumps([asdict(item) for item in items], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


# Finished runs


def _finish(run: Path, args: argparse.Namespace) -> None:
    """Tables, summary and report of a run's records, each whole or as it was.

    raises: MinifuseError where they cannot be written
    """
    from minifuse.evaluation.records import RECORDS_FILE, read_run
    from minifuse.evaluation.report import write_report
    from minifuse.evaluation.summary import summarise
    from minifuse.evaluation.tables import make_table, read_records
    from minifuse.files import write_json

    config, environment = read_run(run)
    table = make_table(read_records(run / RECORDS_FILE), args.spacy_model)
    _write_tables(table, run)
    scoring = {"spacy_model": args.spacy_model, "rule": args.rule}
    if args.family is not None:
        scoring["family"] = _read_family(args.family)
    summary = summarise(table, config | scoring)
    try:
        write_json(run / "summary.json", summary)
    except OSError as error:
        raise MinifuseError(f"{run}/summary.json cannot be written: {error.strerror}") from None
    write_report(run / "report.html", table, summary, config | scoring, environment)
    _print_summary(summary)
    print(f"wrote {run}/report.html, summary.json and results.*", file=sys.stderr)


def _write_tables(table: "DataFrame", run: Path) -> None:
    from minifuse.evaluation.tables import TABLE_SUFFIXES, write_table

    for suffix in TABLE_SUFFIXES:
        write_table(table, run / f"results{suffix}")


def _print_summary(summary: dict[str, Any]) -> None:
    """One line a method: log-probability of the best gold answer, then accuracy by each rule."""
    rules = ("match_lemma", "match_lemma_both", "match_exact", "match_first_word", "f1")
    print(f"{'method':<18} {'logprob':>8}  " + "  ".join(f"{rule:>16}" for rule in rules))
    for method, values in summary["methods"].items():
        cells = [values.get("answer_logprob"), *(values.get(rule) for rule in rules)]
        means = [cell["mean"] if cell else None for cell in cells]
        texts = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        print(f"{method:<18} {texts[0]:>8}  " + "  ".join(f"{text:>16}" for text in texts[1:]))


def _score_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m minifuse.evaluate score",
        description="Score a finished run anew: tables, summary and report are written again.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    _add_score_flags(parser)
    args = parser.parse_args(arguments)
    from minifuse.evaluation.records import hold_run

    with hold_run(args.run):
        _finish(args.run, args)


def _lemmatize_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m minifuse.evaluate lemmatize",
        description="Append lemma columns to the tables of a finished run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--spacy-model", metavar="NAME", help="default: an offline English one")
    args = parser.parse_args(arguments)
    from minifuse.evaluation.lemmas import Lemmatizer, add_lemmas
    from minifuse.evaluation.records import read_run
    from minifuse.evaluation.tables import read_table

    read_run(args.run)  # refuses the folder of another version
    table = read_table(args.run / "results.parquet")
    _write_tables(add_lemmas(table, Lemmatizer(args.spacy_model)), args.run)


def _compare_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m minifuse.evaluate compare",
        description="Compare two finished runs on the items that both have, method by method.",
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="the folder of a finished run")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="the folder of another")
    args = parser.parse_args(arguments)
    from minifuse.evaluation.records import read_run
    from minifuse.evaluation.summary import compare
    from minifuse.evaluation.tables import read_table

    runs = (args.run_a, args.run_b)
    shots_a, shots_b = (read_run(run)[0]["shot_ids"] for run in runs)
    if any(a != b for a, b in zip(shots_a, shots_b, strict=False)):
        print("warning: the runs drew other shots; differences hold those too", file=sys.stderr)
    tables = [read_table(run / "results.parquet") for run in runs]
    print(json.dumps(compare(*tables), indent=2))


if __name__ == "__main__":
    sys.exit(main())
