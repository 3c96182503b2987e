"""Tasks whose truth is known: their tokens, and what no model can do better. A task is one function and one line in `TASKS`.

A task is a corpus, and its settings ride in the corpus's name: "zipf_facts:exponent=0.5,keys=4096". Bytes are fixed for
ever: see draws.py.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lab.checks import nearest
from lab.data.synthetic.chains import (
    DOCUMENT,
    FIRST,
    entropy_rate,
    markov,
    markov_documents,
    markov_transitions,
    uniform,
    uniform_documents,
)
from lab.data.synthetic.copying import copy, noisy_copy, reverse, sort
from lab.data.synthetic.dictionary import early_dictionary, late_dictionary
from lab.data.synthetic.facts import zipf_facts
from lab.data.synthetic.grammar import grammar
from lab.data.synthetic.hidden import hidden_markov, mess3
from lab.data.synthetic.parity import sparse_parity
from lab.data.synthetic.recall import associative_recall, k_hop
from lab.data.synthetic.task import Task

__all__ = [
    "DOCUMENT",
    "FIRST",
    "TASKS",
    "Task",
    "check_length",
    "entropy_rate",
    "markov_documents",
    "markov_transitions",
    "task",
    "uniform_documents",
]

TASKS: dict[str, Callable[..., Task]] = {
    "uniform": uniform,
    "markov": markov,
    "mess3": mess3,
    "hidden_markov": hidden_markov,
    "grammar": grammar,
    "zipf_facts": zipf_facts,
    "sparse_parity": sparse_parity,
    "copy": copy,
    "noisy_copy": noisy_copy,
    "reverse": reverse,
    "sort": sort,
    "associative_recall": associative_recall,
    "k_hop": k_hop,
    "late_dictionary": late_dictionary,
    "early_dictionary": early_dictionary,
}


@functools.cache
def task(corpus: str) -> Task:
    """The task of a corpus's name, "name" or "name:setting=value,...". `Task.name` has the settings that are not the
    defaults, in one order. Raises ValueError for an unknown task or setting, one given twice, and a bad value."""
    name, colon, settings = corpus.partition(":")
    if name not in TASKS:
        raise ValueError(f"data.corpus = {corpus!r}: no task {name!r}: {nearest(name, list(TASKS))}")
    defaults = {key: p.default for key, p in inspect.signature(TASKS[name]).parameters.items()}
    given: dict[str, Any] = {}
    for part in settings.split(",") if colon else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            hint = nearest(key, list(defaults)) if defaults else "it has none"
            raise ValueError(f"data.corpus = {corpus!r}: {name} has no setting {key!r}: {hint}")
        if not equals or key in given:
            remedy = "give it once" if key in given else f"use {key}={defaults[key]}"
            raise ValueError(f"data.corpus = {corpus!r}: {part!r} is not a setting: {remedy}")
        given[key] = _number(corpus, key, text, type(defaults[key]))
    changed = [f"{key}={given[key]!r}" for key in defaults if key in given and given[key] != defaults[key]]
    try:
        return replace(TASKS[name](**given), name=":".join([name, ",".join(changed)]) if changed else name)
    except ValueError as error:
        raise ValueError(f"data.corpus = {corpus!r}: {error}") from error


def check_stream(corpus: str, objective: str) -> None:
    """Raises ValueError where the corpus is a task of examples, which have no meaning one after the other."""
    if corpus.partition(":")[0] in TASKS and not task(corpus).stream:
        raise ValueError(
            f"objective.name = {objective!r}: {corpus!r} is a task whose examples stand by themselves: use 'lm'"
        )


def check_length(corpus: str, length: int) -> None:
    """Raises ValueError where windows of `length` tokens would not be the examples of a task. Other corpora have no such
    length."""
    if corpus.partition(":")[0] in TASKS:
        found = task(corpus)
        if not found.stream and length != found.n:
            raise ValueError(
                f"objective: an example has {length} tokens, and one of {found.name} has {found.n}: use S + T = {found.n}, such "
                f"as S = {found.S}, T = {found.T}"
            )


def _number(corpus: str, key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"data.corpus = {corpus!r}: {key} = {text!r}: use {expected}") from error
