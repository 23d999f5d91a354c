"""Damaged files of every kind, a few in every run; `python -m tests.fuzz` takes many."""

import warnings

import pytest
from fuzz import data_files
from fuzz.checking import Fault, Target, check
from fuzz.mutations import json_lines
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings, strategies

from minifuse.errors import MinifuseError

# Inputs of a common target.
NUM_EXAMPLES = 40


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path_factory):
    target = TARGETS[name]
    workplace = tmp_path_factory.mktemp("inputs")

    @settings(
        max_examples=max(2, NUM_EXAMPLES // target.cost),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.randoms(use_true_random=True).map(target.files))
    def run(files):
        check(target, files, workplace)

    run()


UNDAMAGED = {
    "rows-jsonl": {"rows.jsonl": data_files.ROWS},
    "paraphrase-file": {"rows.jsonl": data_files.ROWS, "given.jsonl": data_files.PARAPHRASES},
    "confidences": {"in.jsonl": data_files.CONFIDENCES},
    "requests": {"in.jsonl": data_files.LINES},
    "questions": {"in.jsonl": data_files.QUESTIONS},
}


@pytest.mark.parametrize(
    ("name", "files"),
    [*UNDAMAGED.items(), *[("named-set", files) for files in data_files.NAMED_SETS.values()]],
)
def test_what_is_damaged_was_well(name, files):
    """A reader that refuses its example at once is hardly tried."""
    assert check(TARGETS[name], {n: json_lines(rows) for n, rows in files.items()}) == "read"


def raise_(error):
    raise error


def grow(_):
    list(range(10**8))


def leave(folder):
    (folder.parent / "elsewhere").touch()


def write_openly(folder):
    (folder / "out").touch()
    (folder / "out").chmod(0o666)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda _: raise_(ValueError("x")), ValueError),
        (lambda _: raise_(MinifuseError("")), Fault),
        (grow, (Fault, MemoryError)),
        (leave, Fault),
        (lambda folder: (folder / ".a.tmp").touch(), Fault),
        (write_openly, Fault),
    ],
)
def test_the_judge_sees_faults(read, error):
    with warnings.catch_warnings(), pytest.raises(error):
        check(Target("x", lambda pick: {}, read), {})


def test_the_judge_lets_good_readers_pass():
    assert check(Target("x", lambda pick: {}, lambda folder: None), {}) == "read"
    refuse = Target("x", lambda pick: {}, lambda folder: raise_(MinifuseError("no")))
    assert check(refuse, {}) == "MinifuseError"


def test_an_endless_reader_is_stopped(monkeypatch):
    monkeypatch.setattr("fuzz.checking.CPU_SECONDS", 0.2)

    def read(_):
        while True:
            pass

    with pytest.raises(Fault, match=r"0\.2 s of CPU time"):
        check(Target("x", lambda pick: {}, read), {})
