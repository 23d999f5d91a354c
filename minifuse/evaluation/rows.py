"""Rows of JSONL, CSV and parquet files, on this machine or on the hub, each checked as it is read.

Rows are counted from 1: JSONL by its lines, CSV and parquet by their rows without the header.
Blank lines are passed over, but count.
"""

import csv
import hashlib
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.files import format_bytes, parse_json, write_whole
from minifuse.hub import (
    PATIENCE_S,
    HubSource,
    checked_info,
    explained,
    hub_cache,
    hub_endpoint,
    hub_library,
    within,
)
from minifuse.memory import free_host_memory

SUFFIXES = (".jsonl", ".csv", ".parquet")

# Where the hub puts the parquet files that it makes of data sets in other formats.
_CONVERTED = "refs/convert/parquet"
_SHARD = re.compile(r"(?P<stem>.+?)(-(?P<number>\d+)-of-(?P<count>\d+))?(-[0-9a-f]{16})?")
_SPLITS = ("test", "validation", "train")
_BATCH_ROWS = 4096
_SHOWN_CHARACTERS = 60
_CELL_CHARACTERS = 2**31 - 1  # the most that a C long holds everywhere


class BadRow(Exception):
    """What is wrong with one row; the message names file and row."""


class Rejects:
    """Rows that cannot be used: the first is an error, or all are noted."""

    def __init__(self, skip_bad: bool):
        self.skip_bad = skip_bad
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note a row.

        raises: UsageError unless bad rows are to be skipped
        """
        if not self.skip_bad:
            raise UsageError(f"{message}; correct it, or leave such rows out with --skip-bad")
        self.messages.append(message)


@dataclass(frozen=True, slots=True)
class Row:
    """One row; what it is asked for has the type that was asked for, or BadRow is raised.

    where:   how an error names it
    columns: names of all columns that the file has here, read or not
    is_text: cells are text, as in CSV, where lists are written as JSON
    """

    where: str
    values: Mapping[str, object]
    columns: Collection[str]
    is_text: bool = False

    def text(self, name: str) -> str:
        return self._checked(name, self._value(name))

    def texts(self, name: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """A list of texts, at least one unless it may be empty."""
        value = self._value(name)
        if self.is_text and isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError:
                raise BadRow(
                    f"{self.where}: {name} is {show_value(value)}; wanted a list as JSON, "
                    '["a", "b"]'
                ) from None
        if not isinstance(value, list):
            raise BadRow(f"{self.where}: {name} is {show_value(value)}; wanted a list of strings")
        if not value and not may_be_empty:
            raise BadRow(f"{self.where}: {name} is an empty list; wanted at least one string")
        return tuple(self._checked(f"{name}[{place}]", text) for place, text in enumerate(value))

    def optional_key(self, name: str) -> str | None:
        """As `key`; None where the cell is null, or empty in a CSV."""
        value = self._value(name)
        return None if value is None or (self.is_text and not value) else self.key(name)

    def key(self, name: str) -> str:
        """A name, such as an id: text, or an integer as text."""
        value = self._value(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise BadRow(
                f"{self.where}: {name} is {show_value(value)}; wanted a string or an integer"
            )
        return self._checked(name, value)

    def flag(self, name: str) -> bool:
        value = self._value(name)
        if not isinstance(value, bool):
            raise BadRow(f"{self.where}: {name} is {show_value(value)}; wanted true or false")
        return value

    def _value(self, name: str) -> object:
        try:
            return self.values[name]
        except KeyError:
            listed = one_line(", ".join(self.columns)) or "nothing"
            raise BadRow(f"{self.where}: there is no column {name!r} but {listed}") from None

    def _checked(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise BadRow(f"{self.where}: {name} is {show_value(value)}; wanted a string")
        if not value.strip():
            raise BadRow(f"{self.where}: {name} is {value!r}, which is empty; wanted text")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRow(
                    f"{self.where}: {name} holds half of a surrogate pair at {error.start}, which "
                    "is no text"
                ) from None
        return value


def show_value(value: object) -> str:
    """A value out of a file for a message, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def read_rows(path: Path, rejects: Rejects, columns: Sequence[str]) -> Iterator[Row]:
    """All rows of a file; the columns named are the only ones that a parquet file is read for.

    raises: UsageError for a file that cannot be read, and for a bad row unless those are skipped
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"cannot read {path}: wanted a file that ends in {', '.join(SUFFIXES)}")
    readers = dict(zip(SUFFIXES, (_read_jsonl, _read_csv, _read_parquet), strict=True))
    try:
        yield from readers[path.suffix](path, rejects, columns)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"cannot read {path}: {reason}") from None


def _read_jsonl(path: Path, rejects: Rejects, _: Sequence[str]) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = parse_json(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                rejects.add(f"{where}: not UTF-8 (byte {error.start})")
            except ValueError as error:
                rejects.add(f"{where}: not JSON: {one_line(error)}")
            else:
                if isinstance(values, dict):
                    yield Row(where, values, values.keys())
                else:
                    rejects.add(f"{where}: {type(values).__name__}; wanted a JSON object")


def _read_csv(path: Path, rejects: Rejects, _: Sequence[str]) -> Iterator[Row]:
    # Cells may hold whole documents. A setting of the process, so that it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _CELL_CHARACTERS))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            try:
                header = next(reader, [])
            except csv.Error as error:
                raise UsageError(f"{path}: the header is not CSV: {error}") from None
            _check_names(path, header)
            for number in itertools.count(1):
                where = f"{path}, row {number}"
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    rejects.add(f"{where}: not CSV: {error}")
                    continue
                if cells is None:
                    return
                if not cells:
                    continue  # a blank line, which counts all the same
                if len(cells) != len(header):
                    rejects.add(f"{where}: {len(cells)} cells; the header names {len(header)}")
                else:
                    values = dict(zip(header, cells, strict=True))
                    yield Row(where, values, header, is_text=True)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 (byte {error.start} of a block); save it as UTF-8"
            ) from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UsageError(f"{path}: the header names {repeated[0]!r} twice; names must differ")


def _read_parquet(path: Path, _: Rejects, columns: Sequence[str]) -> Iterator[Row]:
    parquet, arrow_error = _arrow()
    number = 0
    try:
        metadata = parquet.read_metadata(path)
        there = metadata.schema.to_arrow_schema().names
        _check_names(path, there)
        wanted = [name for name in dict.fromkeys(columns) if name in there]
        _check_unpacked(path, metadata)
        leaves = map(metadata.schema.column, range(metadata.num_columns))
        # Not within lists, which Arrow cannot read in batches so.
        texts = [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY" and leaf.path == leaf.name
        ]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                # Unchecked, offsets of a damaged file lead out of memory.
                batch.validate(full=True)
                # Lists of columns, since a dictionary a row would take most of the time.
                lists = [_values_of(batch.column(name)) for name in wanted]
                for place in range(batch.num_rows):
                    number += 1
                    values = {name: cells[place] for name, cells in zip(wanted, lists, strict=True)}
                    yield Row(f"{path}, row {number}", values, there)
    # The last two of values that Python has no room for, such as dates after the year 9999.
    except (arrow_error, ValueError, OverflowError) as error:
        raise UsageError(f"{path} cannot be read as parquet: {one_line(error)}") from None


def _values_of(column: Any) -> list:
    """A column's values; equal texts are one object: a file may hold a long one for all rows."""
    if not hasattr(column, "dictionary"):
        values: list = column.to_pylist()
        return values
    used = column.indices.unique().drop_null()
    texts = column.dictionary.take(used).to_pylist()
    by_index = dict(zip(used.to_pylist(), texts, strict=True))
    return [by_index.get(index) for index in column.indices.to_pylist()]


def _check_unpacked(path: Path, metadata: Any) -> None:
    """Compare with the free memory what the largest group of rows says that it unpacks to.

    Of all columns: Arrow ends the process where what a damaged file says of one column is odd.

    raises: UsageError
    """
    groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    largest = max(groups, default=0)
    free = free_host_memory()
    if largest > free:
        raise UsageError(
            f"{path} has a group of rows that unpacks to {format_bytes(largest)}, and "
            f"{format_bytes(free)} of memory are free; write it with smaller groups"
        )


def _arrow() -> tuple[ModuleType, type[Exception]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MinifuseError(
            "reading parquet takes pyarrow, which is not installed: pip install 'minifuse[eval]'"
        ) from None
    return pyarrow.parquet, pyarrow.ArrowException


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in order: the same for the same bytes, wherever."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return total.hexdigest()


@dataclass(frozen=True)
class Listing:
    """Files of a data set: in a folder, or in a repository of the hub.

    place: how an error names it
    names: relative to the folder, with slashes
    fetch: the path of a file by its name
    """

    place: str
    names: tuple[str, ...]
    fetch: Callable[[str], Path]

    def paths(self, names: Iterable[str]) -> list[Path]:
        return [self.fetch(name) for name in names]

    @property
    def configs(self) -> dict[str, dict[str, list[str]]]:
        """Names by configuration and split, in order."""
        configs: dict[str, dict[str, list[str]]] = {}
        for name in sorted(self.names):
            config, split = _config_and_split(name)
            configs.setdefault(config, {}).setdefault(split, []).append(name)
        return configs

    def splits(self, config: str | None = None) -> dict[str, list[str]]:
        """Names of the files of each split of one configuration, in order.

        raises: UsageError where that is not there, not whole, or one of several
        """
        configs = self.configs
        listed = ", ".join(sorted(configs))
        if config is None:
            config = next(iter(configs)) if len(configs) == 1 else "default"
            if config not in configs:
                raise UsageError(
                    f"{self.place} has several configurations; wanted one of {listed}, as in "
                    f"hf:ORG/NAME:{sorted(configs)[0]}"
                )
        if config not in configs:
            raise UsageError(f"{self.place} has no configuration {config!r} but {listed}")
        for names in configs[config].values():
            self._check_whole(names)
        return configs[config]

    def _check_whole(self, names: list[str]) -> None:
        count = _shard_of(PurePosixPath(names[0]))["count"]
        if count is not None and len(names) != int(count):
            raise UsageError(
                f"{self.place} has {len(names)} of the {int(count)} files that {names[0]} is one "
                "of; fetch the others too"
            )


def _shard_of(path: PurePosixPath) -> re.Match[str]:
    match = _SHARD.fullmatch(path.stem)
    assert match is not None, path  # of any name
    return match


def _config_and_split(name: str) -> tuple[str, str]:
    """From data/SPLIT-0-of-1.parquet, CONFIG/SPLIT-0-of-1.parquet or CONFIG/SPLIT/0000.parquet."""
    path = PurePosixPath(name)
    folders = [part for part in path.parts[:-1] if part != "data"]
    split = _shard_of(path)["stem"]
    if folders and (split.isdecimal() or folders[-1] in _SPLITS):
        split = folders.pop().removeprefix("partial-")
    return "/".join(folders) or "default", split


def choose_split(listing: Listing, splits: Mapping[str, list[str]], wanted: str | None) -> str:
    """The split that was asked for, else test, validation or train, or the only one.

    raises: UsageError where that leads to none
    """
    choices = (wanted,) if wanted is not None else (*_SPLITS, *(splits if len(splits) == 1 else ()))
    for split in choices:
        if split in splits:
            return split
    problem = f"no split {wanted!r}" if wanted is not None else "none of the usual splits"
    raise UsageError(f"{listing.place} has {problem} but {', '.join(sorted(splits))}")


def list_folder(folder: Path, suffixes: Sequence[str]) -> Listing:
    """Files of a folder and its data/: those of the first suffix of which there are any.

    raises: UsageError where there are none
    """
    if not folder.is_dir():
        raise UsageError(f"--data-dir is {folder}, which is no folder; wanted one with data files")
    for suffix in suffixes:
        paths = [*folder.glob(f"*{suffix}"), *folder.glob(f"data/*{suffix}")]
        if paths:
            names = tuple(sorted(path.relative_to(folder).as_posix() for path in paths))
            return Listing(str(folder), names, lambda name: folder / name)
    raise UsageError(f"{folder} holds no file that ends in {' or '.join(suffixes)}")


def list_hub(source: HubSource) -> Listing:
    """Parquet files of a data set on the hub, or those that the hub itself made of it.

    Without the network they are what earlier calls left in the hub's cache.

    raises: MinifuseError where the repository cannot be asked, or has none
    """
    # What hub.py's messages say of a repository holds for a data set of this name.
    named = replace(source, repository=f"datasets/{source.repository}")
    revisions = [source.revision, *([_CONVERTED] if source.revision == "main" else [])]
    with explained(named):
        for revision in revisions:
            listing = _list_revision(replace(source, revision=revision), str(named))
            if listing is not None and listing.names:
                return listing
    if hub_library().constants.HF_HUB_OFFLINE:
        raise MinifuseError(
            f"{named} is not in the cache {hub_cache()}, and HF_HUB_OFFLINE forbids to fetch it: "
            "unset it, or give the files with --data-dir"
        )
    raise MinifuseError(
        f"{named} holds no parquet file; wanted one: download it and give the file itself"
    )


def _list_revision(source: HubSource, place: str) -> Listing | None:
    """None for the hub's own conversion where there is none, and for what the cache lacks."""
    library = hub_library()
    cached = _list_cached(source, place)
    if library.constants.HF_HUB_OFFLINE:
        return cached
    api = library.HfApi()
    try:
        info = checked_info(
            within(
                PATIENCE_S,
                lambda: api.dataset_info(
                    source.repository, revision=source.revision, timeout=PATIENCE_S
                ),
            )
        )
    except Exception as error:
        if (
            isinstance(error, library.errors.RevisionNotFoundError)
            and source.revision == _CONVERTED
        ):
            return None
        is_answer = isinstance(error, library.errors.HfHubHTTPError)
        is_local = isinstance(error, OSError) and error.errno is not None
        if is_answer or is_local or isinstance(error, MinifuseError):
            raise
        if cached is not None and cached.names:
            warnings.warn(
                f"{place} cannot be asked ({one_line(error)}); taking what the cache has",
                stacklevel=2,
            )
            return cached
        raise MinifuseError(
            f"{place} is not in the cache {hub_cache()}, and {hub_endpoint()} cannot be "
            f"reached ({one_line(error)}): connect, or give the files with --data-dir"
        ) from error
    _write_ref(source, info.sha)

    def fetch(name: str) -> Path:
        with explained(replace(source, repository=f"datasets/{source.repository}")):
            path = library.hf_hub_download(
                source.repository, name, repo_type="dataset", revision=info.sha
            )
        return Path(path)

    names = tuple(file.rfilename for file in info.siblings or ())
    return Listing(place, tuple(name for name in names if name.endswith(".parquet")), fetch)


def _repository_folder(source: HubSource) -> Path:
    name = hub_library().file_download.repo_folder_name
    return hub_cache() / name(repo_id=source.repository, repo_type="dataset")


def _list_cached(source: HubSource, place: str) -> Listing | None:
    folder = _repository_folder(source)
    ref = folder / "refs" / source.revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else source.revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    names = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.parquet"))
    return Listing(place, tuple(names), lambda name: snapshot / name)


def _write_ref(source: HubSource, commit: str) -> None:
    """Note what a revision stands for, so that the cache can be used without the network."""
    if source.revision == commit:
        return
    ref = _repository_folder(source) / "refs" / source.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    write_whole(ref, commit)
