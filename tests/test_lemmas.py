"""Lemmas from spaCy itself: the offline lookups, pipelines by name, processes, what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import spacy

from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.lemmas import Lemmatizer, add_lemmas, load_pipeline
from minifuse.evaluation.matching import match_lemma

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def lemmatizer() -> Lemmatizer:
    return Lemmatizer(show_progress=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The cities were bigger", "the city be big"),
        ("THE CITIES", "the city"),
        ("Cities", "city"),
        ("mice", "mouse"),
        ("Paris, France.", "paris france"),
        ("  two \t words\n", "two word"),
        ("well-known", "good know"),
        ("Ｐａｒｉｓ", "paris"),  # noqa: RUF001
        ("New\N{NO-BREAK SPACE}York", "new york"),
        ("don't", "do not"),
        ("東京", "東京"),
        ("$5", "$ 5"),
        ("", ""),
        ("?!...", ""),
    ],
)
def test_offline_lemmas_by_hand(lemmatizer, text, wanted):
    assert lemmatizer([text]) == [tuple(wanted.split())]


def test_lemmas_let_forms_of_a_word_meet(lemmatizer):
    [prediction, answer, other] = lemmatizer(["Big Cities!", "the big city", "big"])
    assert match_lemma(answer, [prediction])
    assert not match_lemma(other, [prediction])


def test_every_text_once(capsys):
    lemmatizer = Lemmatizer(num_processes=1, show_progress=True)
    texts = ["dogs", "cats", "dogs", "", "dogs"]
    expected = [("dog",), ("cat",), ("dog",), (), ("dog",)]
    assert lemmatizer(texts) == expected
    assert "3/3" in capsys.readouterr().err
    assert lemmatizer(texts) == expected
    assert capsys.readouterr().err == ""
    assert lemmatizer([*texts, "mice"]) == [*expected, ("mouse",)]
    assert "1/1" in capsys.readouterr().err


def test_processes_give_what_one_gives(lemmatizer):
    texts = [f"{word} of {number}" for number in range(600) for word in ("cities", "Mice!")]
    found = Lemmatizer(num_processes=2, show_progress=False)(texts)
    assert found == lemmatizer(texts)
    assert found[-1] == ("mouse", "of", "599")


def test_columns():
    table = pandas.DataFrame(
        {
            "prediction": ["Big cities.", "", "mice"],
            # Equally long lists, which pandas would take for a matrix.
            "answers": [["city", "The towns"], ["?", "x"], ["mouse", "rats"]],
            "other": [1, 2, 3],
        },
        index=[4, 4, 7],
    )
    before = table.copy(deep=True)
    found = add_lemmas(table, Lemmatizer(show_progress=False))
    pandas.testing.assert_frame_equal(table, before)
    assert list(found) == ["prediction", "answers", "other", "predict_lemma", "answer_lemmas"]
    assert list(found["predict_lemma"]) == [["big", "city"], [], ["mouse"]]
    assert list(found["answer_lemmas"]) == [
        [["city"], ["the", "town"]],
        [[], ["x"]],
        [["mouse"], ["rat"]],
    ]
    again = add_lemmas(found[["predict_lemma", *before]], Lemmatizer(show_progress=False))
    assert list(again) == ["predict_lemma", *before, "answer_lemmas"]
    empty = add_lemmas(table.head(0), Lemmatizer(show_progress=False))
    assert list(empty) == list(found)
    with pytest.raises(UsageError, match="no column answers; lemmas are made of"):
        add_lemmas(table[["prediction"]], Lemmatizer(show_progress=False))


def test_an_installed_pipeline(tmp_path):
    """A trained pipeline reads the text as it was written; here one of rules stands for it."""
    pipeline = spacy.blank("en")
    lookups = spacy.lookups.Lookups()
    lookups.add_table("lemma_lookup", {"Dogs": "Hound", "dogs": "dog"})
    pipeline.add_pipe("lemmatizer", config={"mode": "lookup"}).initialize(lookups=lookups)
    pipeline.to_disk(tmp_path / "rules")
    for num_processes in (1, 2):
        lemmatizer = Lemmatizer(str(tmp_path / "rules"), num_processes=num_processes)
        assert lemmatizer(["Dogs, dogs", "Cats"]) == [("hound", "dog"), ("cats",)]


def test_what_is_no_pipeline(tmp_path):
    spacy.blank("en").to_disk(tmp_path / "bare")
    (tmp_path / "broken").mkdir()
    with pytest.raises(
        MinifuseError,
        match=r"'en_core_none' is not installed; run: python -m spacy download en_core_none$",
    ):
        load_pipeline("en_core_none")
    with pytest.raises(MinifuseError, match="has no lemmatizer, only a tokenizer"):
        load_pipeline(str(tmp_path / "bare"))
    with pytest.raises(MinifuseError, match=r"cannot be loaded: .*meta\.json"):
        load_pipeline(str(tmp_path / "broken"))
    with pytest.raises(MinifuseError, match="'' is not installed"):
        load_pipeline("")
    with pytest.raises(UsageError, match="num_processes is 0; wanted at least 1"):
        Lemmatizer(num_processes=0)


def run_python(code: str, *options: str, path: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=None if path is None else os.environ | {"PYTHONPATH": str(path)},
        check=False,
    )


PRINT_ERROR = """
from minifuse.errors import MinifuseError
from minifuse.evaluation.lemmas import load_pipeline
try:
    load_pipeline()
except MinifuseError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("spacy_lookups_data", "pip install spacy-lookups-data"),
        ("spacy", "pip install 'minifuse[eval]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(tmp_path, name, command):
    """All packages but one, in a folder that stands for site-packages."""
    for package in Path(spacy.__file__).parents[1].iterdir():
        if package.name.split("-")[0] != name:
            (tmp_path / package.name).symlink_to(package)
    done = run_python(PRINT_ERROR, "-S", path=tmp_path)  # -S: without the real site-packages
    assert done.stdout.rstrip().endswith(f"run: {command}"), done.stderr


def test_importing_the_module_loads_no_spacy():
    names = "lemmas, matching, statistics, tables"
    done = run_python(
        f"from minifuse.evaluation import {names}\nimport sys\n"
        "heavy = {'spacy', 'pandas', 'pyarrow', 'scipy', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
