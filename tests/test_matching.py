"""The rules by example, traps first, and against slow twins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifuse.evaluation.matching import (
    FUNCTION_WORDS,
    NEGATIONS,
    RULES,
    match_exact,
    match_first_word,
    match_lemma,
    match_lemma_both,
    token_f1,
)
from minifuse.normalize import normalize_answer


@pytest.mark.parametrize(
    ("prediction", "answers", "one_way", "both_ways"),
    [
        # What goes wrong elsewhere.
        ("not paris", ["paris"], False, False),
        ("it be not paris", ["paris"], False, False),
        ("the", ["the usa"], False, False),
        ("of", ["united state of america"], False, False),
        ("", ["paris"], False, False),
        ("", [""], False, False),
        ("paris", [""], False, False),
        # Whole words, in one piece and in order.
        ("parisian", ["paris"], False, False),
        ("paris", ["parisian"], False, False),
        ("york", ["new york"], False, True),
        ("new york city", ["new york"], True, True),
        ("york new", ["new york"], False, False),
        ("new old york", ["new york"], False, False),
        ("in new york , usa", ["new york"], True, True),
        ("paris", ["paris"], True, True),
        ("the paris", ["paris"], True, True),
        ("united state", ["the united state"], False, True),
        # A negation elsewhere says nothing about the answer; one inside it is a part of it.
        ("paris not london", ["paris"], True, True),
        ("not lyon but paris", ["paris"], True, True),
        ("not paris but indeed paris", ["paris"], True, True),
        ("not guilty", ["not guilty"], True, True),
        ("i be not there", ["i be not there"], True, True),
        # An answer of function words alone.
        ("it be a city", ["it"], False, False),
        ("it", ["it"], True, True),
        ("the who", ["the who"], True, True),
        ("the who play", ["the who"], False, False),
        # All aliases.
        ("usa", ["america", "usa"], True, True),
        ("america", ["the united state of america", "usa"], False, True),
        ("paris", [], False, False),
    ],
)
def test_lemma_rules_by_hand(prediction, answers, one_way, both_ways):
    prediction, answers = prediction.split(), [answer.split() for answer in answers]
    assert match_lemma(prediction, answers) is one_way
    assert match_lemma_both(prediction, answers) is both_ways


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "first_word", "f1"),
    [
        ("not paris", ["paris"], False, False, 2 / 3),
        ("the", ["the usa"], False, False, 0),
        ("", [""], False, False, 0),
        ("...", ["!"], False, False, 0),
        ("the", ["a"], False, False, 0),
        ("", ["paris"], False, False, 0),
        ("parisian", ["paris"], False, False, 0),
        ("Paris.", ["paris"], True, True, 1),
        ("The Paris", ["paris"], True, True, 1),
        ("Paris, France", ["paris"], False, True, 2 / 3),
        ("New Jersey", ["New York"], False, True, 1 / 2),
        ("york new", ["New York"], False, False, 1),
        ("new new york", ["new york"], False, True, 4 / 5),
        ("U.S.A.", ["America", "usa"], True, True, 1),
        ("United States", ["usa", "united states of america"], False, True, 2 * 2 / 6),
        ("paris", [], False, False, 0),
    ],
)
def test_text_rules_by_hand(prediction, answers, exact, first_word, f1):
    assert match_exact(prediction, answers) is exact
    assert match_first_word(prediction, answers) is first_word
    assert token_f1(prediction, answers) == pytest.approx(f1, abs=1e-15)


words = st.lists(st.sampled_from("paris new york the of".split()), max_size=5)
aliases = st.lists(words, max_size=3)


def slow_occurs(part: list[str], whole: list[str]) -> bool:
    """By text: a run of whole words lies between two spaces."""
    if not set(part) - FUNCTION_WORDS:
        return bool(part) and part == whole
    return f" {' '.join(part)} " in f" {' '.join(whole)} "


@given(words, aliases)
def test_lemma_rules_against_text_search(prediction, answers):
    one_way = any(slow_occurs(answer, prediction) for answer in answers)
    other_way = any(slow_occurs(prediction, answer) for answer in answers)
    assert match_lemma(prediction, answers) == one_way
    assert match_lemma_both(prediction, answers) == (one_way or other_way)


@given(words, words, words, st.sampled_from(sorted(NEGATIONS)))
def test_a_negated_run_counts_only_where_it_stands_unnegated_too(before, run, after, negation):
    run = [*run, "rome"]  # once in the prediction, and not made of function words alone
    assert match_lemma([*before, *run, *after], [run])
    assert not match_lemma([*before, negation, *run, *after], [run])
    assert match_lemma([*before, negation, *run, *after, *run], [run])


@given(words, aliases)
def test_what_holds_for_every_rule(prediction, answers):
    text, texts = " ".join(prediction), [" ".join(answer) for answer in answers]
    found = dict(
        zip(
            RULES,
            (
                match_lemma(prediction, answers),
                match_lemma_both(prediction, answers),
                match_exact(text, texts),
                match_first_word(text, texts),
                token_f1(text, texts),
            ),
            strict=True,
        )
    )
    assert found["match_lemma"] <= found["match_lemma_both"]
    assert found["match_exact"] <= found["match_first_word"]
    assert not found["match_exact"] or found["f1"] == 1
    assert 0 <= found["f1"] <= 1
    # The order of aliases, their number, and case, articles and dots of the text do not matter.
    assert token_f1(text, texts[::-1] + texts) == found["f1"]
    assert match_exact(f"The {text.upper()}.", texts) == found["match_exact"]
    assert match_lemma(prediction, answers[::-1] + answers) == found["match_lemma"]


@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(prediction, answer):
    found = normalize_answer(" ".join(prediction)).split()
    wanted = normalize_answer(" ".join(answer)).split()
    left, shared = list(wanted), 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    expected = 0.0
    if shared:
        precision, recall = shared / len(found), shared / len(wanted)
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(" ".join(prediction), [" ".join(answer)]) == pytest.approx(expected)
