"""How sure a model is of its answer to each paraphrase: the share of samples that agree with it.

The file of these numbers gives the weights of `weighted_avg`, `weighted_max` and `fused_weighted`.
"""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.config import GenerationConfig
from minifuse.errors import UsageError
from minifuse.evaluation.batches import answer_batch, derive_seed, groups_of
from minifuse.evaluation.flags import check_count
from minifuse.evaluation.rows import show_value
from minifuse.jsonl import Unit, fingerprint, read_json_lines
from minifuse.normalize import normalize_answer

if TYPE_CHECKING:
    from minifuse.engine import Fuser
    from minifuse.results import Generation

# A sampling call shows each paraphrase several times, one stream a sample. This many streams fill
# one call of the largest decode graph; more would take a second call a step, and a longer cache:
# another size, for which all graphs are compiled anew.
_STREAMS_AT_ONCE = 32


@dataclass(frozen=True)
class ConfidencePrompt:
    """The plain prompts of an item, one for each paraphrase: prefix, segment, suffix."""

    id: str
    prefix: str
    segments: tuple[str, ...]
    suffix: str

    def unit(self) -> Unit:
        """What a results file is to hold of it: one line."""
        return Unit(self.id, fingerprint([self.prefix, self.segments, self.suffix]))


@dataclass(frozen=True)
class ConfidenceOptions:
    """How the samples are drawn, and where answers end."""

    samples: int = 10
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = GenerationConfig.max_new_tokens
    seed: int = 0
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        if self.temperature == 0:
            raise UsageError("temperature is 0, which draws the same text always; wanted above 0")
        GenerationConfig(**{k: v for k, v in asdict(self).items() if k != "samples"})

    def for_record(self) -> dict:
        """What is kept beside the results."""
        return asdict(self)


@dataclass(frozen=True)
class ItemConfidence:
    """What was found for one item, everything in the order of its paraphrases."""

    id: str
    confidences: tuple[float, ...]
    answers: tuple[str, ...]
    samples: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict:
        """A line of the confidence file."""
        return {
            "id": self.id,
            "confidences": list(self.confidences),
            "answers": list(self.answers),
            "samples": [list(texts) for texts in self.samples],
        }


def key_of_line(line: dict) -> tuple[str, None]:
    """What names a line of the confidence file; KeyError or TypeError for another."""
    sum(line["confidences"]), "".join(line["answers"])
    return line["id"], None


def agreement(answer: str, samples: Sequence[str]) -> float:
    """The share of samples equal to the answer after normalisation; 0 where it is empty then."""
    wanted = normalize_answer(answer)
    if not wanted:
        return 0.0
    return sum(normalize_answer(text) == wanted for text in samples) / len(samples)


def measure_confidences(
    fuser: "Fuser",
    prompts: Sequence[ConfidencePrompt],
    options: ConfidenceOptions,
    *,
    batch_size: int = 8,
    done: Collection[str] = (),
) -> Iterator[ItemConfidence]:
    """The confidences of each item not in `done`, as soon as its batch is through.

    batch_size: items at once
    raises:     UsageError naming the item that the model has no room for
    """
    rows = min(batch_size, len(prompts))
    for group in groups_of(prompts, batch_size):
        if all(prompt.id in done for prompt in group):
            continue
        for found in _measure_group(fuser, group, options, rows):
            if found.id not in done:
                yield found


def _measure_group(
    fuser: "Fuser", group: Sequence[ConfidencePrompt], options: ConfidenceOptions, rows: int
) -> list[ItemConfidence]:
    answers = _answer(fuser, group, options, copies=1, place=None, rows=rows)
    largest = max(len(prompt.segments) for prompt in group)
    at_once = _samples_at_once(options.samples, largest)
    samples: list[list[list[str]]] = [[[] for _ in prompt.segments] for prompt in group]
    for start in range(0, options.samples, at_once):
        copies = min(at_once, options.samples - start)
        drawn = _answer(fuser, group, options, copies=copies, place=start, rows=rows)
        for own, texts in zip(samples, drawn, strict=True):
            for index, text in enumerate(texts):
                own[index % len(own)].append(text)
    return [
        ItemConfidence(
            prompt.id,
            tuple(map(agreement, texts, own)),
            tuple(texts),
            tuple(map(tuple, own)),
        )
        for prompt, texts, own in zip(group, answers, samples, strict=True)
    ]


def _samples_at_once(samples: int, num_segments: int) -> int:
    """Samples of each paraphrase in a call: in few calls, and about as many in each."""
    most = max(1, _STREAMS_AT_ONCE // num_segments)
    return math.ceil(samples / math.ceil(samples / most))


def _answer(
    fuser: "Fuser",
    group: Sequence[ConfidencePrompt],
    options: ConfidenceOptions,
    *,
    copies: int,
    place: int | None,
    rows: int,
) -> list[list[str]]:
    """Each item's answers to its paraphrases, all of them `copies` times over.

    place: of the first sample; None for the greedy answers
    rows:  of every call, so that one set of graphs serves all groups
    """
    from minifuse.request import Request

    requests = [
        Request(list(prompt.segments) * copies, prompt.prefix, prompt.suffix, id=prompt.id)
        for prompt in group
    ]
    is_greedy = place is None
    results = answer_batch(
        fuser,
        requests,
        rows=rows,
        methods=["per_prompt"],
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if is_greedy else options.temperature,
        top_p=1.0 if is_greedy else options.top_p,
        stop=list(options.stop),
        seed=0 if is_greedy else derive_seed(options.seed, place),
    )
    return [_read_answers(result["per_prompt"]) for result in results]


def _read_answers(found: "Generation | list[Generation]") -> list[str]:
    assert isinstance(found, list), "not of `per_prompt`"
    return list(map(_read_answer, found))


def _read_answer(generation: "Generation") -> str:
    """The first line of an answer, which is all that evaluation scores."""
    return generation.text.strip().partition("\n")[0].strip()


# Weights


def read_weights(path: Path) -> dict[str, tuple[float, ...]]:
    """Confidences by item id, one for each paraphrase; other keys are passed over.

    Where all are 0 they say nothing: such an item's paraphrases weigh the same, with a warning.

    raises: UsageError naming the file and the line that is wrong.
    """
    weights: dict[str, tuple[float, ...]] = {}
    silent = []
    for _, where, raw in read_json_lines(path, "--weights-from"):
        id, values = raw.get("id"), raw.get("confidences")
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise UsageError(f"{where}: id is {id!r}; wanted a string or an integer")
        id = str(id)
        if id in weights:
            raise UsageError(f"{where}: id {id!r} stands in an earlier line; ids must differ")
        if not isinstance(values, list) or not values or not all(map(_is_weight, values)):
            raise UsageError(
                f"{where}: confidences is {show_value(values)}; wanted a list of finite numbers of "
                "at least 0, not empty"
            )
        if not any(values):
            silent.append(id)
        weights[id] = tuple(map(float, values)) if any(values) else (1.0,) * len(values)
    if not weights:
        raise UsageError(f"{path} holds no confidences; wanted one JSON object a line")
    if silent:
        warnings.warn(
            f"{path}: {len(silent)} of {len(weights)} items have no confidence above 0 "
            f"(the first is {silent[0]!r}); their paraphrases weigh the same",
            stacklevel=2,
        )
    return weights


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and value >= 0
    except OverflowError:
        return False


def weights_of(
    weights: Mapping[str, tuple[float, ...]],
    id: str,
    indices: Sequence[int],
    num_paraphrases: int,
) -> tuple[float, ...]:
    """The weights of an item's chosen paraphrases, from what `read_weights` returns.

    indices:         of the chosen ones among the item's paraphrases
    num_paraphrases: that the item has in all
    raises:          UsageError where the file lacks the item, or was made for other paraphrases
    """
    if id not in weights:
        raise UsageError(
            f"--weights-from holds no line for {id!r}; run minifuse.confidence over the same items"
        )
    values = weights[id]
    if len(values) != num_paraphrases:
        raise UsageError(
            f"--weights-from has {len(values)} confidences for {id!r}, which has "
            f"{num_paraphrases} paraphrases; run minifuse.confidence over the same paraphrases"
        )
    chosen = tuple(values[index] for index in indices)
    if any(chosen):
        return chosen
    # One text for all items, so that Python shows it once.
    warnings.warn(
        "some items' chosen paraphrases have no confidence above 0; these weigh the same",
        stacklevel=2,
    )
    return (1.0,) * len(chosen)


# The report


@dataclass
class Tally:
    """Counts over the lines of a confidence file."""

    items: int = 0
    paraphrases: int = 0
    total: float = 0.0
    silent: int = 0
    empty: int = 0

    def add(self, line: dict) -> None:
        self.items += 1
        self.paraphrases += len(line["confidences"])
        self.total += sum(line["confidences"])
        self.silent += not any(line["confidences"])
        self.empty += sum(not normalize_answer(answer) for answer in line["answers"])

    @property
    def mean(self) -> float:
        return self.total / self.paraphrases if self.paraphrases else 0.0

    def describe_progress(self) -> str:
        return f"mean {self.mean:.3f}, {self.silent} all zero"

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.items} items, {self.paraphrases} paraphrases, mean confidence {self.mean:.3f}; "
            f"{self.empty} empty answers, {self.silent} items with no confidence above 0"
        )
