"""The rules that say whether a prediction is right, side by side; over all aliases of the answer.

The lemma rules read lists of lemmas, the others text. A prediction of nothing is never right.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from minifuse.normalize import normalize_answer

BINARY_RULES = ("match_lemma", "match_lemma_both", "match_exact", "match_first_word")
RULES = (*BINARY_RULES, "f1")

# Words that carry no answer by themselves: "the" is not "the USA", and "it is a city" is not "It".
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those there here
    i me my you your he him his she her it its we us our they them their
    who whom whose which what and or but nor if as
    of in on at to for from by with about into
    am is are was were be been being do does did have has had will would can could not n't no
    """.split()
)
# "not Paris" holds the words of "Paris" and says the opposite.
NEGATIONS = frozenset(("not", "n't", "never", "neither", "nor"))

_normalized = lru_cache(maxsize=1 << 16)(normalize_answer)


def match_lemma(prediction: Sequence[str], answers: Sequence[Sequence[str]]) -> bool:
    """Whether an answer's lemmas are a contiguous run of the prediction's.

    A run right after a negation does not count, and an answer of function words alone must be
    the whole prediction.
    """
    return any(_occurs(answer, prediction) for answer in answers)


def match_lemma_both(prediction: Sequence[str], answers: Sequence[Sequence[str]]) -> bool:
    """`match_lemma`, or the prediction's lemmas are such a run of an answer's."""
    return any(_occurs(answer, prediction) or _occurs(prediction, answer) for answer in answers)


def match_exact(prediction: str, answers: Sequence[str]) -> bool:
    """Whether prediction and an answer are equal after normalisation."""
    found = _normalized(prediction)
    return bool(found) and any(found == _normalized(answer) for answer in answers)


def match_first_word(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the first words of prediction and an answer are equal after normalisation."""
    found = _normalized(prediction).split()[:1]
    return bool(found) and any(found == _normalized(answer).split()[:1] for answer in answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best alias's F1 over words after normalisation, each as often as it occurs.

    SQuAD's rule (arXiv:1606.05250), but 0 rather than 1 where nothing meets nothing.
    """
    return max((_f1(_normalized(prediction), _normalized(answer)) for answer in answers), default=0)


def _f1(prediction: str, answer: str) -> float:
    found, wanted = Counter(prediction.split()), Counter(answer.split())
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def _occurs(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether `part` stands in `whole` as a run of whole words that answers something."""
    part, whole = tuple(part), tuple(whole)
    if not part:
        return False
    if FUNCTION_WORDS.issuperset(part):
        return part == whole
    return any(
        whole[start : start + len(part)] == part and not (start and whole[start - 1] in NEGATIONS)
        for start in range(len(whole) - len(part) + 1)
    )
