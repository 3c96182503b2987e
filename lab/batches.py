"""What each step of a run is fed, as a function of (seed, step): a stream of examples, in the form that the step takes.

Three streams serve all objectives: windows of text within a document (lab.data.examples), documents packed in rows
(lab.data.packed), and pairs by length bucket (lab.data.pairs).
"""

import numpy as np

from lab.data.examples import Examples, count_windows
from lab.data.packed import Packed, count_rows
from lab.data.pairs import Pairs, count_pairs
from lab.data.prepare import Corpus
from lab.forms import Course, Form, evaluated, forms
from lab.objectives import Batch, build
from lab.spec import Data, Objective, Run


class Batches:
    """`forms` are those that steps take, `evaluated` the held-out examples of each form that the loss is of."""

    def __init__(self, run: Run, corpus: Corpus):
        o, seed = run.objective, run.seed.data
        self.run, self.tokenizer = run, corpus.tokenizer
        self.course, self.forms = Course(o, seed), forms(o)
        self._sentinels = o.ul2_spans if o.name == "ul2" else 0
        count = run.evaluation.examples
        self.held_out: list[tuple[Form, Batch]]
        if o.name == "pairs":
            self._pairs = Pairs(corpus, self.forms, seed)
            self.held_out, self._examples = self._pairs.held_out(count), self._pairs.count
        elif o.name == "causal_lm":
            self._packed = Packed(corpus, o.T, seed)
            self.held_out, self._examples = [(self.forms[0], _packed(self._packed.held_out(count)))], self._packed.rows
        else:
            self._windows = Examples(corpus, o.length, seed)
            tokens, self._examples = self._windows.held_out(count), self._windows.windows
            self.held_out = [
                (form, self._build(form, tokens, seed=0, first=0)) for form in evaluated(o, run.evaluation.splits)
            ]

    def step(self, step: int, rows: range | None = None) -> tuple[int, Batch]:
        """Which form step `step` (from 0) takes, and those rows of its batch. Access is random: nothing is kept."""
        run, form = self.run, self.course.form(step)
        rows, first = range(run.batch) if rows is None else rows, step * run.batch
        if run.objective.name == "pairs":
            return form, self._pairs.batch(form, self.course.counts(step)[form] * run.batch, rows)
        if run.objective.name == "causal_lm":
            return form, _packed(self._packed.batch(first, rows))
        tokens = self._windows.batch(step, run.batch, rows)
        return form, self._build(self.forms[form], tokens, seed=run.seed.data, first=first + rows.start)

    def epochs(self, steps: int) -> float:
        """How often so many steps go through the training examples."""
        return steps * self.run.batch / self._examples

    def _build(self, form: Form, tokens: np.ndarray, *, seed: int, first: int) -> Batch:
        return build(form, tokens, self.tokenizer, seed=seed, first=first, sentinels=self._sentinels)


def _packed(entering_and_labels: tuple[np.ndarray, np.ndarray]) -> Batch:
    entering, labels = entering_and_labels
    return Batch(np.zeros((len(entering), 0), np.int32), entering, labels)


def count_examples(data: Data, objective: Objective) -> tuple[int, int]:
    """Examples that there are to train on and held out; reads no token."""
    if objective.name == "pairs":
        return count_pairs(data, [(S, T) for S, T, _ in objective.buckets])
    if objective.name == "causal_lm":
        return count_rows(data, objective.T)
    return count_windows(data, objective.length)
