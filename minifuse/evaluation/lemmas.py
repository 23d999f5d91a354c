"""Lemmas of predictions and answers, by spaCy; the only module that knows it.

The default is an offline pipeline: English tokens and the lookup lemmatizer of
spacy-lookups-data. Any installed pipeline can take its place by name.
"""

import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.evaluation.extras import import_extra

if TYPE_CHECKING:
    from pandas import DataFrame
    from spacy.language import Language

_CHUNK_LEN = 500
# Texts that pay for one more process, which takes seconds to import spaCy and load a pipeline: the
# lookup lemmatizer (30,000 short texts a second, measured) and trained ones, which are slower.
_WORTH_A_PROCESS = {True: 100_000, False: 5_000}


class Lemmatizer:
    """Texts to lemmas: lower case, no punctuation, no white space; every text only once.

    model:         name or folder of an installed pipeline; None for the offline one
    num_processes: None for as many as pay, at most one per CPU
    show_progress: None for a bar where standard error is a terminal
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        num_processes: int | None = None,
        show_progress: bool | None = None,
    ):
        """Find the pipeline.

        raises: MinifuseError where spaCy, the pipeline or the lookups are missing
        """
        if num_processes is not None and num_processes < 1:
            raise UsageError(f"num_processes is {num_processes}; wanted at least 1")
        self.model = model
        self.num_processes = num_processes
        self._disable_bar = None if show_progress is None else not show_progress
        self._pipeline = load_pipeline(model)
        self._found: dict[str, tuple[str, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """The lemmas of each text."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._found]
        if not unseen:
            return [self._found[text] for text in texts]
        with tqdm(
            total=len(unseen), desc="lemmas", unit=" texts", disable=self._disable_bar
        ) as bar:
            for chunk, lemmas in self._in_chunks(unseen):
                self._found.update(zip(chunk, lemmas, strict=True))
                bar.update(len(chunk))
        return [self._found[text] for text in texts]

    def _in_chunks(self, texts: list[str]) -> Iterator[tuple[list[str], list[tuple[str, ...]]]]:
        chunks = [texts[i : i + _CHUNK_LEN] for i in range(0, len(texts), _CHUNK_LEN)]
        num_processes = self.num_processes
        if num_processes is None:
            worth = math.ceil(len(texts) / _WORTH_A_PROCESS[self.model is None])
            num_processes = min(os.cpu_count() or 1, worth)
        if min(num_processes, len(texts)) <= 1:
            for chunk in chunks:
                yield chunk, _lemmas_by(self._pipeline, chunk, is_offline=self.model is None)
            return
        # Fresh processes: a fork of a process in which torch has started threads may hang.
        pool = ProcessPoolExecutor(
            num_processes, get_context("spawn"), initializer=_start_worker, initargs=(self.model,)
        )
        try:
            yield from zip(chunks, pool.map(_work, chunks), strict=True)
        except BrokenProcessPool:
            raise MinifuseError(
                "a process that made lemmas died, perhaps for want of memory; use fewer processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def add_lemmas(table: "DataFrame", lemmatizer: Lemmatizer) -> "DataFrame":
    """A copy of the table with `predict_lemma` (a list) and `answer_lemmas` (lists) at the end.

    Columns of those names keep their place and are replaced.

    raises: UsageError where `prediction` or `answers` is missing
    """
    missing = [name for name in ("prediction", "answers") if name not in table]
    if missing:
        raise UsageError(
            f"the table has no column {' or '.join(missing)}; lemmas are made of prediction and "
            "answers"
        )
    predictions, answers = list(table["prediction"]), list(table["answers"])
    lemmatizer([*predictions, *(alias for aliases in answers for alias in aliases)])
    table = table.copy()
    table["predict_lemma"] = _column(list(lemmas) for lemmas in lemmatizer(predictions))
    table["answer_lemmas"] = _column(
        [list(lemmas) for lemmas in lemmatizer(aliases)] for aliases in answers
    )
    return table


@lru_cache(maxsize=2)
def load_pipeline(model: str | None = None) -> "Language":
    """A spaCy pipeline that gives lemmas: an installed one, or the offline one for None.

    raises: MinifuseError where it is missing, with the command that installs it
    """
    spacy = import_extra("spacy")
    return _load_offline(spacy) if model is None else _load_installed(spacy, model)


def _load_offline(spacy: ModuleType) -> "Language":
    pipeline = spacy.blank("en")
    pipeline.add_pipe("lemmatizer", config={"mode": "lookup"})
    try:
        pipeline.initialize()
    except ValueError:  # spaCy's way to say that there are no tables
        raise MinifuseError(
            "the lookup tables of the offline lemmatizer are not installed; "
            "run: pip install spacy-lookups-data"
        ) from None
    return pipeline


def _load_installed(spacy: ModuleType, model: str) -> "Language":
    if not model or not (spacy.util.is_package(model) or os.path.exists(model)):
        raise MinifuseError(
            f"spaCy pipeline {model!r} is not installed; run: python -m spacy download {model}"
        )
    try:
        # Names of people and places are of no use here, and cost time.
        pipeline = spacy.load(model, exclude=["ner"])
    except Exception as error:
        raise MinifuseError(
            f"spaCy pipeline {model!r} cannot be loaded: {one_line(error)}"
        ) from None
    names = pipeline.pipe_names
    if not any("token.lemma" in pipeline.get_pipe_meta(name).assigns for name in names):
        raise MinifuseError(
            f"spaCy pipeline {model!r} has no lemmatizer, only "
            f"{', '.join(names) or 'a tokenizer'}; choose another pipeline"
        )
    return pipeline


_worker_state: dict[str, Any] = {}


def _start_worker(model: str | None) -> None:
    _worker_state.update(pipeline=load_pipeline(model), is_offline=model is None)


def _work(chunk: list[str]) -> list[tuple[str, ...]]:
    return _lemmas_by(_worker_state["pipeline"], chunk, is_offline=_worker_state["is_offline"])


def _lemmas_by(
    pipeline: "Language", texts: list[str], *, is_offline: bool
) -> list[tuple[str, ...]]:
    # Equal-looking texts are made equal. The lookup tables hold lower-case words alone ("Cities"
    # would stay as it is); a trained pipeline reads more from the text as it was written.
    texts = [unicodedata.normalize("NFKC", text) for text in texts]
    if is_offline:
        texts = [text.lower() for text in texts]
    return [
        tuple(
            (token.lemma_ or token.text).lower()
            for token in doc
            if not (token.is_punct or token.is_space)
        )
        for doc in pipeline.pipe(texts)
    ]


def _column(values: Iterable[list]) -> object:
    """A column of lists; pandas would take a plain list of equally long lists for a matrix."""
    values = list(values)
    column = import_extra("numpy").empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column
