"""Data sets: questions with their paraphrases and answers, out of files or off the hub.

webqa           WebQuestions; its paraphrases come from a paraphrase file
myriadlama      MyriadLAMA's rows, one item for each uuid
pararel         ParaRel's facts and templates, one item for each relation and subject
graphquestions  groups of human paraphrases
FILE            .jsonl, .csv or .parquet, and hf:ORG/NAME[:config][:split]; columns by a field map

In cloze sets [MASK] stands for the answer, which no text holds but the list of answers.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from minifuse.errors import UsageError
from minifuse.evaluation.rows import (
    SUFFIXES,
    BadRow,
    Listing,
    Rejects,
    Row,
    choose_split,
    hash_files,
    list_folder,
    list_hub,
    read_rows,
)
from minifuse.hub import HubSource, parse_hub_id

NAMES = ("webqa", "myriadlama", "pararel", "graphquestions")
FIELDS = ("id", "question", "paraphrases", "answers", "relation")
MASK = "[MASK]"

# Sets that come with their paraphrases, so that an item with few of them is no mistake.
_WITH_PARAPHRASES = ("myriadlama", "pararel", "graphquestions")
_HUB_PREFIX = "hf:"
_HUB_REPOSITORIES = {
    "webqa": HubSource("stanfordnlp/web_questions", "main"),
    "myriadlama": HubSource("iszhaoxin/MyriadLAMA", "main"),
}
_FOLDER_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Item:
    """One question.

    paraphrases: the first is what `origin` uses
    is_manual:   parallel to paraphrases, where a set tells people's templates from generated ones
    """

    id: str
    question: str
    paraphrases: tuple[str, ...]
    answers: tuple[str, ...]
    relation: str | None = None
    is_manual: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Dataset:
    """Items to evaluate, and what was read to get them.

    shots:     the training side, where there is one
    data_hash: over the bytes of all files that were read, the same wherever they lie
    skipped:   what is wrong with each row that was left out as bad
    notes:     what else was left out or put together, in sentences for the user
    """

    name: str
    items: tuple[Item, ...]
    shots: tuple[Item, ...]
    data_hash: str
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Found(NamedTuple):
    """An item, and how an error names the row that it is from."""

    where: str
    item: Item


@dataclass
class _Reading:
    """One call of `load_dataset`: what it was asked for and what it has come across."""

    rejects: Rejects
    fields: Mapping[str, str]
    min_paraphrases: int
    min_kinds: tuple[int, int]
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[Row]:
        self.paths.append(path)
        return read_rows(path, self.rejects, columns)

    def each(
        self, paths: Iterable[Path], columns: Sequence[str], read: Callable[[Row], None]
    ) -> None:
        """Have every row of the files read; one that is bad goes to the rejects."""
        for path in paths:
            for row in self.rows(path, columns):
                try:
                    read(row)
                except BadRow as error:
                    self.rejects.add(str(error))


def parse_fields(text: str) -> dict[str, str]:
    """Read a field map as the command line has it: id=qid,answers=gold.

    raises: UsageError for what is none
    """
    fields = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if not equals or not column or name in fields:
            raise UsageError(
                f"--fields has {part!r}; wanted NAME=COLUMN, once for a name out of "
                f"{', '.join(FIELDS)}"
            )
        fields[name] = column
    _check_fields(fields)
    return fields


def _check_fields(fields: Collection[str]) -> None:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise UsageError(f"--fields names {unknown[0]!r}; wanted one of {', '.join(FIELDS)}")


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    fields: Mapping[str, str] | None = None,
    paraphrase_file: Path | None = None,
    skip_bad: bool = False,
    min_paraphrases: int = 1,
    min_kinds: tuple[int, int] = (0, 0),
) -> Dataset:
    """Read a data set whole.

    name:            one of NAMES, a file, or hf:ORG/NAME[@revision][:config][:split]
    data_dir:        the folder with the files of a named set, instead of the hub
    fields:          {field: column} for a file or hf:; a field that it names must be there, one
                     that it leaves out is looked for under its own name
    paraphrase_file: JSONL of {"id", "question", "paraphrases"}; an item that it has gets its
                     question and these as paraphrases, instead of any of its own
    skip_bad:        leave bad rows out and note them
    min_paraphrases: what every item must have; where paraphrases belong to the set itself, items
                     with fewer are left out and counted in a note, elsewhere they are bad rows
    min_kinds:       of these, manual and automatic ones
    raises: UsageError naming file and row; MinifuseError where the hub does not give the files
    """
    fields = dict(fields or {})
    _check_fields(fields)
    reading = _Reading(Rejects(skip_bad), fields, min_paraphrases, min_kinds)
    items, shots = _read(name, data_dir, reading)
    if paraphrase_file is not None:
        given = _read_paraphrases(paraphrase_file, reading)
        _note_strangers(paraphrase_file, given, [*items, *shots], reading)
        items, shots = (_with_paraphrases(side, given, reading) for side in (items, shots))
    items, shots = _unique(items, reading), _unique(shots, reading)
    items = _with_enough(items, reading, is_own=name in _WITH_PARAPHRASES)
    items = _with_kinds(name, items, reading)
    if not items:
        raise UsageError(_describe_nothing(name, reading))
    return Dataset(
        name=name,
        items=tuple(found.item for found in items),
        shots=tuple(found.item for found in shots),
        data_hash=hash_files(reading.paths),
        skipped=tuple(reading.rejects.messages),
        notes=tuple(reading.notes),
    )


def _read(name: str, data_dir: Path | None, reading: _Reading) -> tuple[list[_Found], list[_Found]]:
    """Items and the training side."""
    if name in NAMES:
        if reading.fields:
            raise UsageError(f"--fields is for files and hf:; the columns of {name} are known")
        readers = {
            "webqa": _read_webqa,
            "myriadlama": _read_myriadlama,
            "pararel": _read_pararel,
            "graphquestions": _read_graphquestions,
        }
        return readers[name](data_dir, reading)
    if data_dir is not None:
        raise UsageError(f"--data-dir is for {', '.join(NAMES)}; the data set is {name!r}")
    if name.startswith(_HUB_PREFIX):
        return _read_hub(name, reading)
    path = Path(name)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"the data set is {name!r}; wanted one of {', '.join(NAMES)}, a file that ends in "
            f"{', '.join(SUFFIXES)}, or hf:ORG/NAME"
        )
    return _read_table([path], path.stem, reading), []


def _read_table(paths: Iterable[Path], stem: str, reading: _Reading) -> list[_Found]:
    """Items of files with a column for each field; `stem` begins the ids of rows without one."""
    given = reading.fields
    column = {name: given.get(name, name) for name in FIELDS}
    found: list[_Found] = []
    numbers = itertools.count()

    def read(row: Row) -> None:
        # Bad values count too, so that skipping a row renames no other.
        number = next(numbers)

        def has(name: str) -> bool:
            return name in given or column[name] in row.columns

        question = row.text(column["question"])
        paraphrases: tuple[str, ...] = (question,)
        if has("paraphrases"):
            paraphrases = row.texts(column["paraphrases"])
        item = Item(
            id=row.key(column["id"]) if has("id") else f"{stem}-{number}",
            question=question,
            paraphrases=paraphrases,
            answers=row.texts(column["answers"]),
            relation=row.optional_key(column["relation"]) if has("relation") else None,
        )
        found.append(_Found(row.where, item))

    reading.each(paths, tuple(column.values()), read)
    return found


def _read_sides(
    listing: Listing, config: str | None, split: str | None, reading: _Reading
) -> tuple[list[_Found], list[_Found]]:
    """A split's items, and those of the training split where that is another."""
    splits = listing.splits(config)
    chosen = choose_split(listing, splits, split)
    sides = [chosen, *(["train"] if chosen != "train" and "train" in splits else [])]
    found = [_read_table(listing.paths(splits[side]), side, reading) for side in sides]
    return found[0], found[1] if len(found) > 1 else []


def _read_hub(name: str, reading: _Reading) -> tuple[list[_Found], list[_Found]]:
    repository, *rest = name.removeprefix(_HUB_PREFIX).split(":")
    source = parse_hub_id(repository)
    if source is None or len(rest) > 2 or not all(rest):
        raise UsageError(f"the data set is {name!r}; wanted hf:ORG/NAME[:config][:split]")
    listing = list_hub(source)
    named: tuple[str | None, ...] = tuple(rest)
    if len(rest) == 1 and rest[0] not in listing.configs:
        named = (None, *rest)
    config, split = (*named, None, None)[:2]
    return _read_sides(listing, config, split, reading)


def _read_webqa(data_dir: Path | None, reading: _Reading) -> tuple[list[_Found], list[_Found]]:
    listing = _list_named("webqa", data_dir)
    for split in ("test", "train"):
        if split not in listing.splits():
            raise UsageError(
                f"{listing.place} has no {split} split; wanted test and train, as .jsonl or "
                ".parquet (to evaluate one file, give it as the data set)"
            )
    return _read_sides(listing, None, "test", reading)


def _list_named(name: str, data_dir: Path | None) -> Listing:
    if data_dir is not None:
        return list_folder(data_dir, _FOLDER_SUFFIXES)
    if name not in _HUB_REPOSITORIES:
        raise UsageError(f"{name} is not on the hub; wanted the folder of its files as --data-dir")
    return list_hub(_HUB_REPOSITORIES[name])


@dataclass
class _Fact:
    """A row group of MyriadLAMA while it is read; templates may be repeated."""

    where: str
    relation: str
    subject: str
    answers: tuple[str, ...]
    templates: dict[str, bool] = field(default_factory=dict)


def _read_myriadlama(data_dir: Path | None, reading: _Reading) -> tuple[list[_Found], list[_Found]]:
    if data_dir is not None and data_dir.is_file():
        paths = [data_dir]
    else:
        listing = _list_named("myriadlama", data_dir)
        paths = listing.paths(listing.names)
    facts: dict[str, _Fact] = {}
    known: dict[str, str] = {}

    def read(row: Row) -> None:
        uuid = row.key("uuid")
        relation, subject = row.text("rel_uri"), row.text("sub_ent")
        answers, is_manual = row.texts("obj_aliases"), row.flag("is_manual")
        template = row.text("template")
        # One string for all the facts of a relation.
        if template not in known:
            known[template] = _check_template(template, "template", row)
        fact = facts.setdefault(uuid, _Fact(row.where, relation, subject, answers))
        for name, old, new in (
            ("rel_uri", fact.relation, relation),
            ("sub_ent", fact.subject, subject),
            ("obj_aliases", fact.answers, answers),
        ):
            if old != new:
                raise BadRow(
                    f"{row.where}: {name} of uuid {uuid} is {new!r}, but {old!r} at {fact.where}"
                )
        fact.templates.setdefault(known[template], is_manual)

    columns = ("uuid", "rel_uri", "sub_ent", "obj_aliases", "template", "is_manual")
    reading.each(paths, columns, read)
    found = []
    for uuid, fact in facts.items():
        paraphrases = tuple(_fill(template, fact.subject) for template in fact.templates)
        item = Item(
            id=uuid,
            question=paraphrases[0],
            paraphrases=paraphrases,
            answers=fact.answers,
            relation=fact.relation,
            is_manual=tuple(fact.templates.values()),
        )
        found.append(_Found(fact.where, item))
    return found, []


def _check_template(template: str, name: str, row: Row) -> str:
    for placeholder in ("[X]", "[Y]"):
        if placeholder not in template:
            raise BadRow(
                f"{row.where}: {name} is {template!r}; wanted [X] for the subject and [Y] for the "
                "object"
            )
    return template


def _fill(template: str, subject: str) -> str:
    """The sentence about a subject; [Y] goes first, since a subject may be called anything."""
    return template.replace("[Y]", MASK).replace("[X]", subject)


def _read_pararel(data_dir: Path | None, reading: _Reading) -> tuple[list[_Found], list[_Found]]:
    listing = _list_named("pararel", data_dir)
    templates: dict[str, list[str]] = defaultdict(list)

    def read_template(row: Row) -> None:
        pattern = _check_template(row.text("pattern"), "pattern", row)
        templates[row.text("rel")].append(pattern)

    reading.each([_find_file(listing, "templates")], ("rel", "pattern"), read_template)
    facts: dict[tuple[str, str], tuple[str, str, dict[str, None]]] = {}
    num_rows = 0

    def read_fact(row: Row) -> None:
        nonlocal num_rows
        key = row.text("rel"), row.text("sub")
        answer, uuid = row.text("obj"), row.key("uuid")
        facts.setdefault(key, (row.where, uuid, {}))[2][answer] = None
        num_rows += 1

    reading.each([_find_file(listing, "facts")], ("rel", "sub", "obj", "uuid"), read_fact)
    if num_rows > len(facts):
        # Apart they would be one prompt with another right answer each time.
        reading.notes.append(
            f"{num_rows} facts make {len(facts)} items: objects of one relation and subject are "
            "answers of one item"
        )
    bare = Counter(relation for relation, _ in facts if relation not in templates)
    if bare:
        reading.notes.append(
            f"{bare.total()} items are left out: there is no template for {_list_counts(bare)}"
        )
    found = []
    for (relation, subject), (where, uuid, answers) in facts.items():
        if relation in templates:
            paraphrases = tuple(_fill(template, subject) for template in templates[relation])
            item = Item(uuid, paraphrases[0], paraphrases, tuple(answers), relation)
            found.append(_Found(where, item))
    return found, []


def _list_counts(relations: Mapping[str, int]) -> str:
    return ", ".join(f"{relation} ({count})" for relation, count in sorted(relations.items()))


def _find_file(listing: Listing, stem: str) -> Path:
    for name in listing.names:
        if Path(name).stem == stem:
            return listing.fetch(name)
    raise UsageError(f"{listing.place} holds no {stem}.jsonl; wanted one")


def _read_graphquestions(
    data_dir: Path | None, reading: _Reading
) -> tuple[list[_Found], list[_Found]]:
    listing = _list_named("graphquestions", data_dir)
    found: list[_Found] = []

    def read(row: Row) -> None:
        paraphrases = row.texts("sentence_paraphrases")
        item = Item(row.key("group_id"), paraphrases[0], paraphrases, row.texts("answers"))
        found.append(_Found(row.where, item))

    columns = ("group_id", "sentence_paraphrases", "answers")
    reading.each([_find_file(listing, "groups")], columns, read)
    return found, []


def _read_paraphrases(path: Path, reading: _Reading) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """By item id: where it stands, the question that it is about, its paraphrases."""
    if path.suffix != ".jsonl":
        raise UsageError(f"the paraphrase file is {path}; wanted one that ends in .jsonl")
    given: dict[str, tuple[str, str, tuple[str, ...]]] = {}

    def read(row: Row) -> None:
        id, question = row.key("id"), row.text("question")
        # None passed for some questions: minifuse.paraphrase writes these down, too.
        paraphrases = row.texts("paraphrases", may_be_empty=True)
        if id in given:
            raise BadRow(f"{row.where}: id {id!r} is taken by {given[id][0]}; ids must differ")
        given[id] = (row.where, question, paraphrases)

    reading.each([path], ("id", "question", "paraphrases"), read)
    return given


def _note_strangers(
    path: Path, given: Collection[str], found: Iterable[_Found], reading: _Reading
) -> None:
    """Say how many lines of a paraphrase file are of no item.

    raises: UsageError where all are
    """
    ids = {one.item.id for one in found}
    strangers = [id for id in given if id not in ids]
    if not strangers:
        return
    problem = f"{len(strangers)} of {len(given)} lines in {path} are of no item here"
    if len(strangers) == len(given):
        raise UsageError(
            f"{problem}, the first {strangers[0]!r}; wanted a paraphrase file of this data set"
        )
    reading.notes.append(problem)


def _with_paraphrases(
    side: list[_Found],
    given: Mapping[str, tuple[str, str, tuple[str, ...]]],
    reading: _Reading,
) -> list[_Found]:
    """The items with the paraphrases that a file gives them, behind their question."""
    result = []
    for where, item in side:
        if item.id in given:
            line, question, paraphrases = given[item.id]
            if question != item.question:
                reading.rejects.add(
                    f"{line}: id {item.id!r} has the question {question!r}, but {item.question!r} "
                    f"at {where}; wanted a paraphrase file of this data set"
                )
                continue
            texts = tuple(dict.fromkeys((item.question, *paraphrases)))
            item = replace(item, paraphrases=texts, is_manual=None)
        result.append(_Found(where, item))
    return result


def _unique(side: list[_Found], reading: _Reading) -> list[_Found]:
    first: dict[str, _Found] = {}
    for found in side:
        id = found.item.id
        if id in first:
            reading.rejects.add(
                f"{found.where}: id {id!r} is taken by {first[id].where}; ids must differ"
            )
        else:
            first[id] = found
    return list(first.values())


def _with_enough(side: list[_Found], reading: _Reading, *, is_own: bool) -> list[_Found]:
    """Those with the paraphrases that were asked for.

    is_own: the others are left out with a note, since the set is made so; else they are bad rows
    """
    result = []
    few: Counter[str | None] = Counter()
    for found in side:
        count = len(found.item.paraphrases)
        if count >= reading.min_paraphrases:
            result.append(found)
        elif is_own:
            few[found.item.relation] += 1
        else:
            reading.rejects.add(
                f"{found.where}: {count} paraphrases of id {found.item.id!r}; wanted at least "
                f"{reading.min_paraphrases}: give more in a column or a paraphrase file, or ask "
                "for fewer"
            )
    if few:
        note = (
            f"{few.total()} items are left out, with fewer than {reading.min_paraphrases} "
            "paraphrases"
        )
        listed = {relation: count for relation, count in few.items() if relation is not None}
        reading.notes.append(f"{note}: {_list_counts(listed)}" if listed else note)
    return result


def _with_kinds(name: str, side: list[_Found], reading: _Reading) -> list[_Found]:
    """Those with the manual and automatic paraphrases that were asked for.

    raises: UsageError where the set does not tell them apart
    """
    if not any(reading.min_kinds):
        return side
    manual, automatic = reading.min_kinds
    result = []
    for found in side:
        kinds = found.item.is_manual
        if kinds is None:
            raise UsageError(
                f"{name} does not tell manual from automatic paraphrases (item "
                f"{found.item.id!r}); wanted a data set that does, as myriadlama, or another choice"
            )
        if sum(kinds) >= manual and len(kinds) - sum(kinds) >= automatic:
            result.append(found)
    if len(result) < len(side):
        reading.notes.append(
            f"{len(side) - len(result)} items are left out, with fewer than {manual} manual or "
            f"{automatic} automatic paraphrases"
        )
    return result


def _describe_nothing(name: str, reading: _Reading) -> str:
    why = "; ".join(reading.notes) or "the files have no rows"
    if reading.rejects.messages:
        why = f"{len(reading.rejects.messages)} rows are bad, first {reading.rejects.messages[0]}"
    return f"the data set {name} has no item to evaluate: {why}"
