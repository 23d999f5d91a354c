"""Prompts: what stands around the paraphrases, which of them are used, and the shots.

Whatever is drawn comes from hashes of the seed and an item's id: the same in every process, for
every method, and wherever an item stands in its file.
"""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from minifuse.errors import UsageError
from minifuse.evaluation.datasets import Dataset, Item
from minifuse.files import read_toml

FORMATS = ("prefix", "full", "shot-paraphrases", "in-prompt")
CHOICES = "first, indices:0,2,3, mixed:M+A or repeat"

_TEMPLATES = Path(__file__).parent / "templates"
_TEMPLATE_OF = {
    "webqa": "webqa",
    "myriadlama": "cloze",
    "pararel": "cloze",
    "graphquestions": "graphquestions",
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_WANTED_PLACEHOLDERS = {
    "instruction": set(),
    "shot": {"question", "answer"},
    "segment": {"question"},
    "suffix": set(),
}
# What a slip makes of a placeholder, such as { question } or {question!r}.
_SLIP = re.compile(r"\{[^{}]*\b(?:question|answer)\b[^{}]*\}")
_INDICES = re.compile(r"indices:(\d+(?:,\d+)*)")
_MIXED = re.compile(r"mixed:(\d+)\+(\d+)")


@dataclass(frozen=True)
class PromptTemplate:
    """The texts of a prompt; {question} and {answer} stand for those of an item.

    instruction: opens the prompt
    shot:        one solved example
    segment:     the question, once for each paraphrase
    suffix:      what stands between the question and the answer
    stop:        texts that end an answer
    """

    instruction: str
    shot: str
    segment: str
    suffix: str
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """The texts of one request, to be taken verbatim; fields as in `minifuse.request.Request`."""

    prefix: str
    segments: tuple[str, ...]
    suffix: str


@dataclass(frozen=True)
class PromptBuilder:
    """Puts items into prompts.

    format: prefix            instruction and shots are shared, each segment is one paraphrase
            full              each segment is the whole prompt, nothing is shared
            shot-paraphrases  as full behind a shared instruction; segment i has each shot in that
                              shot's paraphrase i
            in-prompt         one segment with all paraphrases one after the other
    chat:   the chat template opens the answer, so that the prompt's own suffix is left out
    """

    template: PromptTemplate
    shots: tuple[Item, ...] = ()
    format: str = FORMATS[0]
    chat: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"the prompt format is {self.format!r}; wanted one of {', '.join(FORMATS)}"
            )

    def build(self, item: Item, paraphrases: Sequence[str]) -> Prompt:
        """The prompt for an item in the phrasings that were chosen for it.

        raises: UsageError where a shot lacks the paraphrases that the format takes from it
        """
        template = self.template
        questions = [_fill(template.segment, question=text) for text in paraphrases]
        head = template.instruction + self._shots(0)
        prefix, segments = head, questions
        if self.format == "full":
            prefix, segments = "", [head + question for question in questions]
        elif self.format == "shot-paraphrases":
            prefix = template.instruction
            segments = [self._shots(index) + text for index, text in enumerate(questions)]
        elif self.format == "in-prompt":
            segments = ["".join(questions)]
        return Prompt(prefix, tuple(segments), "" if self.chat else template.suffix)

    def _shots(self, index: int) -> str:
        texts = []
        for shot in self.shots:
            if index >= len(shot.paraphrases):
                raise UsageError(
                    f"shot {shot.id!r} has {len(shot.paraphrases)} paraphrases; the format "
                    f"{self.format} takes {index + 1} from each: ask for fewer, or give more"
                )
            question, answer = shot.paraphrases[index], shot.answers[0]
            texts.append(_fill(self.template.shot, question=question, answer=answer))
        return "".join(texts)


def continuation_of(answer: str, *, chat: bool = False) -> str:
    """The text to score for a gold answer; a chat template's header needs no space behind it."""
    return answer if chat else f" {answer}"


def read_template(path: Path) -> PromptTemplate:
    """Read a template file; every key is wanted and no other is taken.

    raises: UsageError naming file and key
    """
    raw = read_toml(path, UsageError, "template")
    names = [field.name for field in fields(PromptTemplate)]
    for problem, keys in (
        ("lacks the key", set(names) - raw.keys()),
        ("has the unknown key", raw.keys() - set(names)),
    ):
        if keys:
            raise UsageError(
                f"template {path} {problem} {', '.join(sorted(keys))}; wanted {', '.join(names)}"
            )
    for name, wanted in _WANTED_PLACEHOLDERS.items():
        text = raw[name]
        if not isinstance(text, str):
            raise UsageError(f"template {path}: {name} is {text!r}; wanted a string")
        slips = [slip for slip in _SLIP.findall(text) if not _PLACEHOLDER.fullmatch(slip)]
        if slips:
            raise UsageError(
                f"template {path}: {name} has {slips[0]!r}; wanted a name alone between the braces"
            )
        found = set(_PLACEHOLDER.findall(text))
        if found != wanted:
            listed = " and ".join(f"{{{key}}}" for key in sorted(wanted, reverse=True))
            raise UsageError(
                f"template {path}: {name} is {text!r}; wanted {listed or 'no placeholder'} in it"
            )
    stop = raw["stop"]
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UsageError(
            f"template {path}: stop is {stop!r}; wanted a list of strings, none of them empty"
        )
    return PromptTemplate(**{**raw, "stop": tuple(stop)})


def find_template(dataset: str) -> Path:
    """The template file for a data set of that name; users copy and edit it."""
    return _TEMPLATES / f"{_TEMPLATE_OF.get(dataset, 'default')}.toml"


def _fill(template: str, **texts: str) -> str:
    """In one pass, so that braces in a question stay what they are."""
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


def _draw(seed: int, purpose: str, key: str | None) -> bytes:
    return hashlib.sha256(json.dumps([seed, purpose, key]).encode()).digest()


def check_choice(how: str, count: int) -> None:
    """Refuse a choice of paraphrases that no item can meet, before a data set is read.

    raises: UsageError
    """
    if count < 1:
        raise UsageError(f"{count} paraphrases are asked for; wanted at least 1")
    if how in ("first", "repeat"):
        return
    if match := _INDICES.fullmatch(how):
        listed = match[1].split(",")
        if len(set(map(int, listed))) < len(listed):
            raise UsageError(f"the choice {how} names an index twice; wanted each once, or repeat")
        named, what = len(listed), "names"
    elif match := _MIXED.fullmatch(how):
        named, what = int(match[1]) + int(match[2]), "draws"
    else:
        raise UsageError(f"the choice of paraphrases is {how!r}; wanted {CHOICES}")
    if named < count:
        raise UsageError(f"the choice {how} {what} {named} paraphrases; {count} are asked for")


def paraphrases_needed(how: str, count: int) -> int:
    """How many paraphrases an item must have for `choose_paraphrases` to succeed.

    That they must be manual or automatic in certain numbers comes on top, see `kinds_needed`.
    """
    check_choice(how, count)
    if how == "repeat":
        return 1
    if match := _INDICES.fullmatch(how):
        return max(map(int, match[1].split(",")[:count])) + 1
    if match := _MIXED.fullmatch(how):
        return int(match[1]) + int(match[2])
    return count


def kinds_needed(how: str) -> tuple[int, int]:
    """How many manual and how many automatic paraphrases an item must have for a choice."""
    match = _MIXED.fullmatch(how)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def choose_paraphrases(item: Item, count: int, how: str, seed: int) -> tuple[int, ...]:
    """Indices of the paraphrases that an item is asked in; those for fewer begin those for more.

    how:    first          in their order
            indices:0,2,3  these, in this order
            mixed:M+A      M manual and A automatic ones drawn for the item, `count` of these drawn
            repeat         the first, `count` times
    raises: UsageError naming the item where it has too few
    """
    check_choice(how, count)
    if how == "repeat":
        return (0,) * count
    if match := _MIXED.fullmatch(how):
        return _choose_mixed(item, (int(match[1]), int(match[2])), seed)[:count]
    indices = tuple(range(count))
    if match := _INDICES.fullmatch(how):
        indices = tuple(map(int, match[1].split(",")[:count]))
    available = len(item.paraphrases)
    if max(indices) >= available:
        raise UsageError(
            f"item {item.id!r} has {available} paraphrases; the choice {how} of {count} wants "
            f"{max(indices) + 1}"
        )
    return indices


def _choose_mixed(item: Item, wanted: tuple[int, int], seed: int) -> tuple[int, ...]:
    if item.is_manual is None:
        raise UsageError(
            f"item {item.id!r} does not tell manual from automatic paraphrases; wanted a data set "
            "that does, as myriadlama, or another choice"
        )
    order = sorted(
        range(len(item.paraphrases)), key=lambda index: _draw(seed, f"paraphrase {index}", item.id)
    )
    drawn: set[int] = set()
    kinds = ((True, "manual"), (False, "automatic"))
    for (is_manual, kind), number in zip(kinds, wanted, strict=True):
        of_kind = [index for index in order if item.is_manual[index] is is_manual]
        if len(of_kind) < number:
            raise UsageError(
                f"item {item.id!r} has {len(of_kind)} {kind} paraphrases; the choice wants {number}"
            )
        drawn.update(of_kind[:number])
    # A draw of its own: in `order` the index that settled who is in would also settle who is first.
    return tuple(sorted(drawn, key=lambda index: _draw(seed, f"place {index}", item.id)))


def choose_shots(
    dataset: Dataset, count: int, seed: int, *, min_paraphrases: int = 1
) -> tuple[list[Item], frozenset[str]]:
    """Shots, and the ids of items that must not be evaluated since they are shots.

    They come from the training side; where there is none from the items themselves. None asks
    what an item that is evaluated asks. Relations, where there are any, take turns.

    min_paraphrases: that a shot must have; more than one for the format shot-paraphrases alone
    raises: UsageError where there are not enough
    """
    if count < 0:
        raise UsageError(f"{count} shots are asked for; wanted 0 or more")
    if count == 0:
        return [], frozenset()
    is_apart = bool(dataset.shots)
    asked = Counter(text for item in dataset.items for text in _asks(item))
    num_itself = 0 if is_apart else 1
    candidates = [
        item
        for item in (dataset.shots if is_apart else dataset.items)
        if len(item.paraphrases) >= min_paraphrases
        and all(asked[text] <= num_itself for text in _asks(item))
    ]
    if len(candidates) < count or (not is_apart and len(dataset.items) <= count):
        side = "training side" if is_apart else "items themselves, of which some must remain"
        wanted = "a shot asks nothing that is evaluated"
        remedy = "ask for fewer"
        if min_paraphrases > 1:
            wanted += (
                f" and has {min_paraphrases} paraphrases, one for each segment of the format "
                "shot-paraphrases"
            )
            remedy += (
                " shots or paraphrases, or give more paraphrases to the "
                f"{'training side' if is_apart else 'items'} in the paraphrase file"
            )
        raise UsageError(
            f"{count} shots are asked for; {dataset.name} has {len(candidates)} that can be, among "
            f"the {side}; {wanted}: {remedy}"
        )
    shots = _take_turns(candidates, count, seed, "shot")
    return shots, frozenset() if is_apart else frozenset(shot.id for shot in shots)


def choose_draws(
    dataset: Dataset, count: int, seed: int, num_draws: int, *, min_paraphrases: int = 1
) -> tuple[list[list[Item]], frozenset[str]]:
    """Several draws of shots, and the ids of all items that are a shot in any of them.

    Draw 0 is what `choose_shots` gives for the seed, whatever the number of draws.

    raises: UsageError where there are not enough shots, or draws that nothing tells apart
    """
    if num_draws > 1 and count == 0:
        raise UsageError(
            f"{num_draws} draws of 0 shots are asked for; draws differ in their shots alone: ask "
            "for shots, or for 1 draw"
        )
    draws = [
        choose_shots(dataset, count, _seed_of_draw(seed, draw), min_paraphrases=min_paraphrases)
        for draw in range(num_draws)
    ]
    return [shots for shots, _ in draws], frozenset().union(*(ids for _, ids in draws))


def _seed_of_draw(seed: int, draw: int) -> int:
    return int.from_bytes(_draw(seed, f"draw {draw}", None)[:8]) if draw else seed


def _asks(item: Item) -> set[str]:
    return {item.question.casefold(), item.paraphrases[0].casefold()}


def choose_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """A sample in which relations, where there are any, have equal shares as far as they go.

    In the order of `items`; a sample of fewer is part of one of more.
    """
    items = list(items)
    chosen = {item.id for item in _take_turns(items, count, seed, "item")}
    return [item for item in items if item.id in chosen]


def _take_turns(items: Iterable[Item], count: int, seed: int, purpose: str) -> list[Item]:
    """Draw items, one from each relation in turn until there are enough or none is left."""
    of_relation: dict[str | None, list[Item]] = {}
    for item in items:
        of_relation.setdefault(item.relation, []).append(item)

    def by_draw(key: str | None) -> bytes:
        return _draw(seed, purpose, key)

    queues = deque(
        deque(sorted(of_relation[relation], key=lambda item: by_draw(item.id)))
        for relation in sorted(of_relation, key=by_draw)
    )
    taken: list[Item] = []
    while queues and len(taken) < count:
        queue = queues.popleft()
        taken.append(queue.popleft())
        if queue:
            queues.append(queue)
    return taken
