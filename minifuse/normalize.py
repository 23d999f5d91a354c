"""Answer normalisation, shared by `vote` and the evaluation."""

import re
import string
import unicodedata

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's rule, arXiv:1606.05250).

    Unicode is brought to NFKC first, so that equal-looking answers are equal.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _ARTICLES.sub(" ", _PUNCTUATION.sub("", text))
    return " ".join(text.split())
