"""What all commands share: exit statuses, one line for whatever goes wrong, ctrl-C that lasts."""

import os
import signal
import sys
import threading
import warnings

import pytest

from minifuse.command import Parser, check_interrupt, run_command
from minifuse.errors import CheckpointError, MinifuseError, UsageError


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: fail(MinifuseError("it\nbroke")), 1, "error: it broke\n"),
        (lambda: fail(CheckpointError("bad file")), 1, "error: bad file\n"),
        (lambda: fail(UsageError("bad flag")), 2, "error: bad flag\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "stopped\n"),
        (lambda: warnings.warn("odd\nand more", stacklevel=1), 0, "warning: odd\n"),
    ],
)
def test_exit_status_and_what_is_said(work, status, said, capsys):
    assert run_command(work, interrupted="stopped") == status
    assert capsys.readouterr() == ("", said)


def test_faults_of_our_own_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("flags", [["--number", "x"], ["--num", "1"], ["more"]])
def test_a_parser_raises(flags):
    parser = Parser(prog="python -m something")
    parser.add_argument("--number", type=int)
    with pytest.raises(UsageError, match=r"; --help lists what there is$"):
        parser.parse_args(flags)


class Falls:
    """Ctrl-C in a destructor, where Python ignores what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):  # the handler runs between two of these
            pass


def test_ctrl_c_that_is_swallowed_comes_again(monkeypatch):
    swallowed, steps = [], []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    def work():
        for step in range(5):
            steps.append(step)
            if step == 1:
                Falls()
            check_interrupt()

    before = signal.getsignal(signal.SIGINT)
    assert run_command(work) == 130
    assert len(swallowed) == 1
    assert steps == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before
    assert run_command(check_interrupt) == 0, "the next command starts afresh"


def test_a_command_runs_in_any_thread():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run_command(lambda: 3)))
    thread.start()
    thread.join()
    assert statuses == [3]
