"""What the engines are asked, as text for minifuse and as token ids for the others.

Five shots of about 112 tokens stand before every question, a paraphrase has about 15. Texts of a
wanted number of tokens are cut out of a passage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from minifuse.errors import MinifuseError
from minifuse.tokenizer import Tokenizer

PREFIX = (
    "Here are some questions with short answers.\n\n"
    "Q: Can you tell me the name of the capital city of Italy?\nA: Rome\n"
    "Q: Who was the English author of the famous play called Hamlet?\nA: William Shakespeare\n"
    "Q: Which of all the planets in the solar system is the largest?\nA: Jupiter\n"
    "Q: How many legs in all does a fully grown spider usually have?\nA: Eight\n"
    "Q: Which gas do the leaves of green plants take in from the air?\nA: Carbon dioxide\n"
)
SUFFIX = "A:"
_WORDINGS = (
    "What is the name of the capital city of {}",
    "Which city is the capital of {}, where its government sits",
    "What is the city called that {} has as its capital",
    "The seat of the government of {} is in which city",
    "If you go to {}, which city there is its capital",
    "Which of the cities of {} is the capital of the country",
    "The capital of {} is a city; what is it called",
    "From which city is the country of {} governed today",
)
# Every wording opened and closed in four ways makes 32 paraphrases.
_FRAMES = ("Q: {}?\n", "Q: {}, please?\n", "Q: So, {}?\n", "Q: {}, do you know?\n")
COUNTRIES = """
    France Japan Egypt Canada Norway Peru Kenya Cuba Austria Spain Portugal Germany Poland Greece
    Turkey Sweden Finland Denmark Iceland Ireland Belgium Hungary Romania Bulgaria Serbia Croatia
    Ukraine Russia China India Nepal Pakistan Iran Iraq Israel Jordan Lebanon Syria Morocco Algeria
    Tunisia Libya Sudan Ethiopia Somalia Uganda Ghana Nigeria Senegal Mali Angola Zambia Zimbabwe
    Mexico Brazil Argentina Chile Bolivia Colombia Venezuela Ecuador Australia Indonesia Thailand
""".split()
_PASSAGE = (
    "The history of the lighthouse begins with fires that people lit on hills. Later the fires "
    "were put on towers, so that ships could see them from farther away. Some towers stood on "
    "rocks in the sea, and the keepers lived there for months with their tools and their books. "
)


@dataclass(frozen=True)
class Question:
    """One question in N phrasings, and its tokens as every engine gets them.

    Texts are encoded one by one and joined as token ids, as minifuse does.
    """

    tokenizer: Tokenizer
    segments: tuple[str, ...]
    prefix: str = PREFIX
    suffix: str = SUFFIX

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        return (*self.tokenizer.bos_ids, *self.tokenizer.encode(self.prefix, is_start=True))

    @cached_property
    def rests(self) -> tuple[tuple[int, ...], ...]:
        """What follows the prefix in each of the N prompts: a paraphrase and the suffix."""
        suffix_ids = self.tokenizer.encode(self.suffix, is_start=False)
        return tuple(
            (*self.tokenizer.encode(text, is_start=not self.prefix), *suffix_ids)
            for text in self.segments
        )

    @property
    def prompts(self) -> list[list[int]]:
        """The N full prompts."""
        return [[*self.prefix_ids, *rest] for rest in self.rests]


def make_questions(tokenizer: Tokenizer, count: int, num_segments: int = 5) -> list[Question]:
    """Up to 64 questions behind the same prefix, in up to 32 phrasings each."""
    wordings = [frame.format(text) for frame, text in product(_FRAMES, _WORDINGS)]
    assert count <= len(COUNTRIES)
    assert num_segments <= len(wordings)
    return [
        Question(tokenizer, tuple(text.format(country) for text in wordings[:num_segments]))
        for country in COUNTRIES[:count]
    ]


def make_passage(tokenizer: Tokenizer, num_tokens: int, start: int = 0) -> str:
    """Plain text of exactly so many tokens, wherever it is put.

    start:  word to begin at, so that two passages differ
    raises: MinifuseError where none is found
    """
    words = (_PASSAGE * (num_tokens // 20 + 2)).split(" ")
    for skipped in range(start, start + 50):
        text = "".join(f" {word}" for word in words[skipped % len(words) :] if word)
        cut = tokenizer.decode(tokenizer.encode(text, is_start=False)[:num_tokens])
        if all(len(tokenizer.encode(cut, is_start=s)) == num_tokens for s in (True, False)):
            return cut
    raise MinifuseError(
        f"no passage of {num_tokens} tokens was found with this tokenizer; try another --model"
    )


def split_passage(tokenizer: Tokenizer, num_tokens: int, parts: int) -> tuple[str, ...]:
    """Different passages of equal length that have `num_tokens` together."""
    assert num_tokens % parts == 0
    return tuple(make_passage(tokenizer, num_tokens // parts, 7 * i) for i in range(parts))


def describe(questions: Sequence[Question]) -> dict[str, float]:
    """Token counts of the conditions."""
    rests = [len(rest) for question in questions for rest in question.rests]
    suffix = len(questions[0].tokenizer.encode(SUFFIX, is_start=False))
    return {
        "prefix_tokens": len(questions[0].prefix_ids),
        "paraphrases": len(questions[0].segments),
        "paraphrase_tokens": round(sum(rests) / len(rests) - suffix, 1),
        "suffix_tokens": suffix,
    }
