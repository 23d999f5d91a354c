"""Show that a model runs right here: `python -m minifuse.verify --model NAME`.

Every promise is checked on the model at hand, in its own dtype and on its own device: segments are
isolated, one segment is plain decoding, copies weigh as one, order changes nothing, cached is
uncached, compiled is eager, and so on; weights are those of the files, text comes back from its
tokens. Each line has what was measured, what is tolerated, and where that comes from.

    python -m minifuse.verify
    python -m minifuse.verify --model ./my-model --dtype float32 --json

Exit status: 0 all checks passed, 1 one failed or the model does not load, 2 wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minifuse.command import Parser, add_model_flags, load_fuser, run_command

if TYPE_CHECKING:
    from minifuse.checks import Finding

MARKS = {True: "ok", False: "FAILED", None: "not run"}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="python -m minifuse.verify",
        description="Check a model on this machine: every promise, measured, against a tolerance "
        "that says where it comes from.",
    )
    add_model_flags(parser.add_argument_group("model"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    from minifuse.checks import run_checks
    from minifuse.profile_report import format_conditions
    from minifuse.profiling import describe_conditions, describe_model

    fuser = load_fuser(args)
    report = {"conditions": describe_conditions(), "model": describe_model(fuser)}
    print(format_conditions(report), end="\n\n", file=sys.stderr if args.json else sys.stdout)
    findings = []
    for finding in run_checks(fuser):
        findings.append(finding)
        lines = "\n".join(_lines_of(finding))
        print(lines, file=sys.stderr if args.json else sys.stdout, flush=True)
    failed = [finding for finding in findings if finding.is_passed is False]
    if args.json:
        found = [finding.to_json() for finding in findings]
        print(json.dumps({**report, "passed": not failed, "checks": found}))
    else:
        print(f"\n{_summary(findings)}")
    return int(bool(failed))


def _lines_of(finding: "Finding") -> Iterator[str]:
    numbers = ""
    if finding.measured is not None:
        numbers = f"{finding.measured:.3g} {finding.unit}, at most {finding.tolerance:.3g}"
    yield f"{MARKS[finding.is_passed]:8} {finding.name:30} {numbers:40} {finding.seconds:5.1f} s"
    yield f"{'':8} {finding.note}"


def _summary(findings: "list[Finding]") -> str:
    counts = {
        word: sum(finding.is_passed is state for finding in findings)
        for state, word in ((True, "passed"), (False, "failed"), (None, "not run"))
    }
    seconds = sum(finding.seconds for finding in findings)
    return ", ".join(f"{n} {word}" for word, n in counts.items()) + f" in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
