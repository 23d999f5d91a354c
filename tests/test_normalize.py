"""SQuAD's normalisation of answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifuse.normalize import normalize_answer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Paris", "paris"),
        (" Paris.\n", "paris"),
        ("The  Eiffel\tTower", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("THE END", "end"),
        # Articles are whole words.
        ("Athens, Thea and another", "athens thea and another"),
        # Punctuation goes first and leaves no space behind, as in SQuAD's own script.
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("a.b.", "ab"),
        ("'the'", ""),
        ("$1,000.50", "100050"),
        ("", ""),
        ("...", ""),
        ("the a an", ""),
        # NFKC: full width, ligatures, no-break spaces, composed and decomposed accents.
        ("Ｐａｒｉｓ", "paris"),  # noqa: RUF001
        ("ﬁne", "fine"),
        ("New\N{NO-BREAK SPACE}York", "new york"),
        ("Cafe\N{COMBINING ACUTE ACCENT}", "café"),
        # What is no ASCII punctuation is text.
        ("東京", "東京"),
        ("¿Qué?", "¿qué"),
    ],
)
def test_by_hand(text, wanted):
    assert normalize_answer(text) == wanted


@pytest.mark.parametrize(
    "texts", [("Paris", "paris!", "the Paris", " PARIS "), ("Zoë", "Zoe\N{COMBINING DIAERESIS}")]
)
def test_equal_answers_are_equal(texts):
    assert len({normalize_answer(text) for text in texts}) == 1


@given(st.text(alphabet="aAtThHeEnN .,-'\tß東"))
def test_shape_of_what_comes_out(text):
    found = normalize_answer(text)
    assert found == " ".join(found.split())
    assert found == found.lower()
    assert not set(found) & set(".,-'")
    assert not {"a", "an", "the"} & set(found.split())
    assert normalize_answer(found) == found
