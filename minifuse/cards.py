"""Finds and reads model cards, `models/*.toml`; no torch, so that names can be listed quickly."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from minifuse.config import DTYPE_NAMES
from minifuse.errors import ConfigError, ModelNotFoundError

DEFAULT_CARD = "smollm2-135m-instruct-q4_1"


@dataclass(frozen=True)
class PypiSource:
    """A GGUF inside a wheel: package and version, the member's path, its SHA-256 in hex."""

    package: str
    version: str
    member: str
    sha256: str

    def __str__(self) -> str:
        return f"PyPI {self.package}=={self.version}, {self.member}"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at a revision."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hub {self.repository} at {self.revision}"


_SOURCES = {"pypi": PypiSource, "hub": HubSource}


@dataclass(frozen=True)
class ModelCard:
    """One model that minifuse knows by name.

    dtype:       what its folder is made or kept in
    stop_tokens: tokens that end an answer, whatever the checkpoint's own files say
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    license: str
    dtype: str
    stop_tokens: tuple[str, ...]
    source: PypiSource | HubSource


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
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"card {path} cannot be read: {error}") from error
    source = raw.pop("source", None)
    kind = source.pop("kind", None) if isinstance(source, dict) else None
    if kind not in _SOURCES:
        raise ConfigError(f"card {path}: source.kind is {kind!r}; wanted {' or '.join(_SOURCES)}")
    _check_fields(path, "source.", source, _SOURCES[kind])
    _check_fields(path, "", raw | {"source": None}, ModelCard)
    if raw["dtype"] not in DTYPE_NAMES:
        raise ConfigError(
            f"card {path}: dtype is {raw['dtype']!r}; wanted one of {', '.join(DTYPE_NAMES)}"
        )
    lists = {name: tuple(raw.pop(name)) for name in ("aliases", "stop_tokens")}
    return ModelCard(**raw, **lists, source=_SOURCES[kind](**source))


def _check_fields(path: Path, prefix: str, raw: dict, kind: type) -> None:
    wanted = {field.name: field.type for field in fields(kind)}
    for problem, names in (
        ("lacks", wanted.keys() - raw.keys()),
        ("has the unknown", raw.keys() - wanted.keys()),
    ):
        if names:
            listed = ", ".join(prefix + name for name in sorted(names))
            raise ConfigError(f"card {path} {problem} field {listed}")
    for name, value in raw.items():
        if wanted[name] is str and not isinstance(value, str):
            raise ConfigError(f"card {path}: {prefix}{name} is {value!r}; wanted a string")
        if wanted[name] == tuple[str, ...] and not _is_strings(value):
            raise ConfigError(f"card {path}: {prefix}{name} is {value!r}; wanted a list of strings")


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
