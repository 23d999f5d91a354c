"""What README, docs and Makefile tell people to type is what the commands take."""

import argparse
import re
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_imports import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that choose by their first argument which flags they take.
SUBCOMMANDS = [
    "minifuse.evaluate score",
    "minifuse.evaluate lemmatize",
    "minifuse.evaluate compare",
]
_CALL = re.compile(r"(?:^|[\s/])python3? -m ((?:minifuse|tools|benchmarks|tests)[\w.]*)( .*)?$")


def commands_of(page: Path) -> list[str]:
    """Whole command lines, without what the shell makes of them; inline mentions are no calls."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"\n\n((?: {4}.*\n)+)", text)
    blocks = [text] if page.name == "Makefile" else fenced + indented
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    found = [match for line in lines if (match := _CALL.search(line))]
    return [f"{match[1]}{match[2] or ''}" for match in found]


CALLS = [
    pytest.param(call, id=f"{page.name}: {call[:60]}")
    for page in PAGES
    for call in commands_of(page)
]


class _Parsed(Exception):
    """A command has got as far as its own work."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@pytest.fixture
def parse(monkeypatch):
    """Start a command, stop it when its arguments are read; returns the parser that read them."""

    def stopping(read):
        def parse_args(self, *args, **kwargs):
            read(self, *args, **kwargs)
            raise _Parsed(self)

        return parse_args

    def parse(call: str) -> argparse.ArgumentParser:
        name, *arguments = shlex.split(call, comments=True)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        is_package = find_spec(name).submodule_search_locations is not None
        main = import_module(f"{name}.__main__" if is_package else name).main
        with pytest.raises(_Parsed) as stopped:
            main()
        return stopped.value.parser

    for way in ("parse_args", "parse_intermixed_args"):
        read = getattr(argparse.ArgumentParser, way)
        monkeypatch.setattr(argparse.ArgumentParser, way, stopping(read))
    return parse


def parser_of(call: str, parse) -> argparse.ArgumentParser:
    """The parser of a command, whatever it asks for."""

    def never(self, message):
        raise _Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "error", never)
        from minifuse.command import Parser

        patch.setattr(Parser, "error", never)
        return parse(call)


def test_pages_hold_commands():
    told = {page.name: len(commands_of(page)) for page in PAGES}
    assert told["README.md"] > 15
    assert told["Makefile"] == 1


@pytest.mark.parametrize("call", CALLS)
def test_a_command_of_the_pages_is_one_that_its_parser_takes(call, parse):
    if "--help" in call:
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(call)
    else:
        parse(call)


@pytest.mark.parametrize("call", [*COMMANDS, *SUBCOMMANDS])
def test_help_says_something_about_every_argument(call, parse):
    parser = parser_of(call, parse)
    text = parser.format_help()
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(actions) > 1
    assert [action.dest for action in actions if not (action.help or "").strip()] == []
    for action in actions:
        for flag in action.option_strings:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag


def test_flags_that_the_readme_speaks_of_exist(parse):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {
        flag
        for call in [*COMMANDS, *SUBCOMMANDS]
        for action in parser_of(call, parse)._actions
        for flag in action.option_strings
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known == set()


def test_modules_that_the_readme_speaks_of_are_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m ((?:minifuse|tools|benchmarks)[\w.]*\w)", text))
    assert named <= set(COMMANDS)


def test_files_that_the_readme_speaks_of_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
