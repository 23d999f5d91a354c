"""Paraphrases of questions, drawn from the model itself and checked before they are kept.

A question is drawn in rounds: each round shows the model one set of exemplars and draws a few
texts at once. What does not pass `judge` is counted by reason. A round's draws depend on the
seed, the round and the question alone.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.config import GenerationConfig
from minifuse.errors import UsageError
from minifuse.evaluation.batches import answer_batch, derive_seed, groups_of
from minifuse.evaluation.flags import check_count
from minifuse.files import read_toml
from minifuse.jsonl import Unit, checked, fingerprint, read_json_lines
from minifuse.normalize import normalize_answer

if TYPE_CHECKING:
    from minifuse.engine import Fuser

EXEMPLARS_FILE = Path(__file__).with_name("exemplars.toml")
STOP = "\n"

# Why a text is not kept; of several reasons the first one counts.
REASONS = (
    "unfinished",
    "empty",
    "garbled",
    "no_words",
    "overlong",
    "no_question",
    "unrelated",
    "copy",
    "duplicate",
)

# A paraphrase may have three times the question's words; of short questions ten words more.
LENGTH_FACTOR = 3
EXTRA_WORDS = 10

# A paraphrase says a third of the question's telling words again, as far as their first letters go:
# little enough for other wordings, too much for a small model that has changed the subject.
_TELLING_SHARE = 3
_STEM_LEN = 4
_COMMON_WORDS = frozenset(
    "about also been could does from have into kind many much name named that their them there "
    "these they thing this type used were what when where which whose will with would your".split()
)

# After NFKC, which turns wide ones into these.
_QUESTION_MARKS = ("?", "\u061f")


@dataclass(frozen=True)
class Question:
    """What is to be paraphrased.

    known: phrasings that are there already, the question itself among them
    """

    id: str
    text: str
    known: tuple[str, ...] = ()

    def unit(self) -> Unit:
        """What a results file is to hold of it: one line."""
        return Unit(self.id, fingerprint([self.text, self.known]))


@dataclass(frozen=True)
class Exemplars:
    """Few-shot prompts in several sets; a set is a tuple of (question, paraphrase).

    question: what a question is put into, at `{question}`
    suffix:   stands before a paraphrase
    """

    instruction: str
    question: str
    suffix: str
    sets: tuple[tuple[tuple[str, str], ...], ...]

    def prefix(self, number: int) -> str:
        """The instruction and all pairs of a set."""
        pairs = (
            f"{self.segment(question)}{self.suffix} {paraphrase}\n\n"
            for question, paraphrase in self.sets[number]
        )
        return self.instruction + "".join(pairs)

    def segment(self, question: str) -> str:
        """A question on its one line."""
        return self.question.replace("{question}", " ".join(question.split()))


@dataclass(frozen=True)
class ParaphraseOptions:
    """How many paraphrases, how hard to try, how they are drawn.

    tries: texts drawn for a question at most
    """

    count: int = 5
    tries: int = 20
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("count", self.count)
        if self.tries < self.count:
            raise UsageError(
                f"tries is {self.tries} for a count of {self.count}; wanted at least as many"
            )
        if self.temperature == 0:
            raise UsageError("temperature is 0, which draws the same text always; wanted above 0")
        GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def for_record(self, exemplars: Exemplars) -> dict:
        """What is kept beside the results."""
        return {**asdict(self), "exemplars": fingerprint(asdict(exemplars))}


@dataclass
class ParaphrasedQuestion:
    """A question with the paraphrases that were kept so far.

    draws:    texts drawn
    rejected: how many of them by reason; what is neither kept nor rejected came too late
    """

    question: Question
    count: int
    paraphrases: list[str] = field(default_factory=list)
    draws: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._copies = set(map(normalize_answer, (self.question.text, *self.question.known)))
        self._kept: set[str] = set()

    @property
    def missing(self) -> int:
        return self.count - len(self.paraphrases)

    def add(self, text: str, finish_reason: str) -> None:
        """Keep a drawn text, or count why not."""
        self.draws += 1
        if not self.missing:
            return
        text = tidy(text)
        reason = judge(text, finish_reason, self.question.text, self._copies, self._kept)
        if reason is not None:
            self.rejected[reason] += 1
            return
        self._kept.add(normalize_answer(text))
        self.paraphrases.append(text)

    def to_json(self) -> dict:
        """A line of the paraphrase file."""
        return {
            "id": self.question.id,
            "question": self.question.text,
            "paraphrases": self.paraphrases,
            "draws": self.draws,
            "rejected": {name: self.rejected[name] for name in REASONS if self.rejected[name]},
        }


def key_of_line(line: dict) -> tuple[str, None]:
    """What names a line of the paraphrase file; KeyError, TypeError or ValueError for another."""
    len(line["paraphrases"]), int(line["draws"]), dict(line["rejected"])
    return line["id"], None


def load_exemplars(path: Path | None = None) -> Exemplars:
    """Read exemplar sets, the project's own without a path.

    raises: UsageError for a file that cannot be read, or does not hold what it should.
    """
    path = path or EXEMPLARS_FILE
    raw = read_toml(path, UsageError, "--exemplars")
    wanted = {"instruction", "question", "suffix", "sets"}
    if raw.keys() != wanted:
        raise UsageError(
            f"{path} holds {', '.join(sorted(raw)) or 'nothing'}; wanted "
            f"{', '.join(sorted(wanted))}"
        )
    for name in ("instruction", "question", "suffix"):
        if not isinstance(raw[name], str):
            raise UsageError(f"{path}: {name} is {raw[name]!r}; wanted a string")
    if raw["question"].count("{question}") != 1:
        raise UsageError(f"{path}: question is {raw['question']!r}; wanted one {{question}} in it")
    if not raw["suffix"].strip():
        raise UsageError(f"{path}: suffix is {raw['suffix']!r}; wanted text before a paraphrase")
    if not isinstance(raw["sets"], list) or not raw["sets"]:
        raise UsageError(f"{path}: sets is {raw['sets']!r}; wanted at least one [[sets]]")
    sets = tuple(_read_set(value, f"{path}: set {n}") for n, value in enumerate(raw["sets"], 1))
    return Exemplars(raw["instruction"], raw["question"], raw["suffix"], sets)


def _read_set(raw: object, where: str) -> tuple[tuple[str, str], ...]:
    """`name` is for people."""
    pairs = raw.get("pairs") if isinstance(raw, dict) else None
    unknown = sorted(raw.keys() - {"name", "pairs"}) if isinstance(raw, dict) else []
    if unknown:
        raise UsageError(f"{where} holds {', '.join(unknown)}; wanted name and pairs")
    if not isinstance(pairs, list) or not pairs:
        raise UsageError(f"{where}: pairs is {pairs!r}; wanted a list of [question, paraphrase]")
    for number, pair in enumerate(pairs, 1):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text.strip() for text in pair):
            raise UsageError(
                f"{where}, pair {number} is {pair!r}; wanted [question, paraphrase], two strings"
            )
        if any(STOP in text for text in pair):
            raise UsageError(f"{where}, pair {number} spans lines; wanted one line each")
    return tuple((question, paraphrase) for question, paraphrase in pairs)


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON Lines file, `{"id", "question"}` each; other keys are passed over.

    raises: UsageError naming the file and the line that is wrong.
    """
    questions: dict[str, Question] = {}
    for _, where, raw in read_json_lines(path, "--input"):
        id, text = raw.get("id"), raw.get("question")
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise UsageError(f"{where}: id is {id!r}; wanted a string or an integer")
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{where}: question is {text!r}; wanted a string that is not empty")
        checked(text, f"{where}: question")
        id = checked(str(id), f"{where}: id")
        if id in questions:
            raise UsageError(f"{where}: id {id!r} stands in an earlier line; ids must differ")
        questions[id] = Question(id, text)
    if not questions:
        raise UsageError(f"{path} holds no question; wanted one JSON object a line")
    return list(questions.values())


# Quality control


def tidy(text: str) -> str:
    """A drawn text on one line, without quotation marks around all of it."""
    text = " ".join(text.split())
    for opening, closing in ('""', "''", "\u201c\u201d", "\u2018\u2019"):
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in inner:
            return inner.strip()
    return text


def judge(
    text: str,
    finish_reason: str,
    question: str,
    copies: Collection[str],
    kept: Collection[str],
) -> str | None:
    """Why a tidy text is no paraphrase, one of REASONS; None where it may be one.

    copies, kept: normalised phrasings of the question that are known, and that were kept before
    """
    if finish_reason != "stop":
        return "unfinished"
    if not text:
        return "empty"
    if any(_is_garbled(character) for character in text):
        return "garbled"
    normalised = normalize_answer(text)
    if not any(map(str.isalpha, normalised)):
        return "no_words"
    num_words = len(question.split())
    if len(text.split()) > max(LENGTH_FACTOR * num_words, num_words + EXTRA_WORDS):
        return "overlong"
    if _is_asked(question) and not _is_asked(text):
        return "no_question"  # small models like to answer instead
    if not _is_related(text, question):
        return "unrelated"
    if normalised in copies:
        return "copy"
    return "duplicate" if normalised in kept else None


def _is_asked(text: str) -> bool:
    return unicodedata.normalize("NFKC", text).rstrip().endswith(_QUESTION_MARKS)


def _is_related(text: str, question: str) -> bool:
    """True as well of questions in a few short words, or in a script without spaces."""
    if len(question.split()) < 3:
        return True
    wanted = _stems(question)
    return _TELLING_SHARE * len(wanted & _stems(text)) >= len(wanted)


def _stems(text: str) -> set[str]:
    words = normalize_answer(text).split()
    telling = (word for word in words if len(word) >= _STEM_LEN and word not in _COMMON_WORDS)
    return {word[:_STEM_LEN] for word in telling}


def _is_garbled(character: str) -> bool:
    """Bytes that were no character, control characters, code points without a meaning."""
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


# Drawing


def draw_paraphrases(
    fuser: "Fuser",
    questions: Sequence[Question],
    exemplars: Exemplars,
    options: ParaphraseOptions,
    *,
    batch_size: int = 8,
    done: Collection[str] = (),
) -> Iterator[ParaphrasedQuestion]:
    """Each question not in `done` as soon as its paraphrases are found or its tries used up.

    batch_size: questions drawn at once
    raises:     UsageError naming the question that the model has no room for
    """
    for group in groups_of(questions, batch_size):
        if all(question.id in done for question in group):
            continue
        for finished in _draw_group(fuser, group, exemplars, options):
            if finished.question.id not in done:
                yield finished


def _draw_group(
    fuser: "Fuser",
    group: Sequence[Question],
    exemplars: Exemplars,
    options: ParaphraseOptions,
) -> Iterator[ParaphrasedQuestion]:
    open_questions = [ParaphrasedQuestion(question, options.count) for question in group]
    # Every set has its part in the first `count` draws.
    per_round = math.ceil(options.count / len(exemplars.sets))
    for round in range(math.ceil(options.tries / per_round)):
        draws = min(per_round, options.tries - round * per_round)
        _draw_round(fuser, open_questions, exemplars, options, round, draws)
        is_last = (round + 1) * per_round >= options.tries
        for candidate in open_questions:
            if is_last or not candidate.missing:
                yield candidate
        open_questions = [candidate for candidate in open_questions if candidate.missing]
        if not open_questions:
            return


def _draw_round(
    fuser: "Fuser",
    open_questions: Iterable[ParaphrasedQuestion],
    exemplars: Exemplars,
    options: ParaphraseOptions,
    round: int,
    draws: int,
) -> None:
    """Draw for all open questions at once, each its own copies of one segment."""
    from minifuse.request import Request

    prefix = exemplars.prefix(round % len(exemplars.sets))
    requests = [
        Request(
            [exemplars.segment(candidate.question.text)] * draws,
            prefix,
            exemplars.suffix,
            id=candidate.question.id,
        )
        for candidate in open_questions
    ]
    results = answer_batch(
        fuser,
        requests,
        methods=["per_prompt"],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=[STOP],
        seed=derive_seed(options.seed, round),
    )
    for candidate, result in zip(open_questions, results, strict=True):
        answers = result["per_prompt"]
        assert isinstance(answers, list)
        for generation in answers:
            candidate.add(generation.text, generation.finish_reason)


# The report


@dataclass
class Tally:
    """Counts over the lines of a paraphrase file."""

    count: int
    questions: int = 0
    kept: int = 0
    short: int = 0
    draws: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, line: dict) -> None:
        self.questions += 1
        self.kept += len(line["paraphrases"])
        self.short += len(line["paraphrases"]) < self.count
        self.draws += line["draws"]
        self.rejected.update(line["rejected"])

    def describe_progress(self) -> str:
        return f"{self.kept} kept, {self.rejected.total()} rejected, {self.short} short"

    def describe(self) -> str:
        """One line for people, every reason in it."""
        reasons = ", ".join(f"{self.rejected[name]} {name}" for name in REASONS)
        spare = self.draws - self.kept - self.rejected.total()
        return (
            f"{self.questions} questions, {self.kept} paraphrases kept of {self.draws} drawn; "
            f"rejected: {reasons}; {spare} not needed; {self.short} questions with fewer than "
            f"{self.count}"
        )
