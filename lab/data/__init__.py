"""Text: which corpora there are, what exactly is in them, how it becomes tokens, and which tokens a step sees."""

from lab.data.corpora import CORPORA
from lab.data.examples import Examples, count_windows
from lab.data.prepare import Corpus, Described, describe, load, tokenizer_of
from lab.data.tokenizers import TOKENIZERS

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Corpus",
    "Described",
    "Examples",
    "count_windows",
    "describe",
    "load",
    "tokenizer_of",
]
