"""What each step of a run is fed, as a function of (seed, step): a stream of examples, in the form that the step takes.

Three streams serve all objectives: windows of text within a document (lab.data.examples), documents packed in rows
(lab.data.packed), and pairs by length bucket (lab.data.pairs).
"""

import numpy as np

from lab import cost
from lab.data.examples import Examples, count_windows
from lab.data.packed import Packed, count_rows
from lab.data.pairs import Pairs, count_pairs
from lab.data.prepare import Corpus
from lab.forms import Course, Form, evaluated, forms
from lab.ledger import method_of
from lab.objectives import Batch, build
from lab.spec import Data, Objective, Run

# Tokens that are read and built together: arrays of a step or two are so small that calls would be what they cost. Whoever
# reads on gets four times as many each time, up to the most; whoever reads here and there, and a run of a few steps, few.
FEW, AHEAD = 2**10, 2**16


class Batches:
    """`forms` are those that steps take, `evaluated` the held-out examples of each form that the loss is of."""

    def __init__(self, run: Run, corpus: Corpus):
        o, seed = run.objective, run.seed.data
        self.run, self.tokenizer = run, corpus.tokenizer
        self.course, self.forms = Course(o, seed), forms(o)
        self._method = method_of(run)
        if self._method.one_epoch:
            epochs(run, cost.steps(run, run.V))  # which refuses what would come again
        self._sentinels = o.ul2_spans if o.name == "ul2" else 0
        # A block of the stream, and what is made of it.
        self._built: tuple[range, Batch] = range(0), Batch(None, None, None)
        self._ahead = FEW
        count = run.evaluation.examples
        self.held_out: list[tuple[Form, Batch]]
        if o.name == "pairs":
            self._pairs = Pairs(corpus, self.forms, seed)
            self.held_out = self._pairs.held_out(count)
        elif o.name == "causal_lm":
            self._packed = Packed(corpus, o, seed)
            self.held_out = [(self.forms[0], _packed(self._packed.held_out(count)))]
        else:
            self._windows = Examples(corpus, o.length, seed)
            tokens = self._windows.held_out(count)
            self.held_out = [
                (form, self._build(form, tokens, seed=0, first=0)) for form in evaluated(o, run.evaluation.splits)
            ]

    def step(self, step: int, rows: range | None = None) -> tuple[int, Batch]:
        """Which form step `step` (from 0) takes, and those rows of what it reads. Access is random: what is kept is a block that
        following steps read too."""
        run, form = self.run, self.course.form(step)
        first, count = self._method.examples(step)
        rows = range(count) if rows is None else rows
        if run.objective.name == "pairs":
            first = self.course.counts(step)[form] * run.batch if len(self.forms) > 1 else first
            return form, self._pairs.batch(form, first, rows)
        examples = range(first + rows.start, first + rows.stop)
        if len(self.forms) > 1 or len(rows) < count:
            return form, self._read(form, examples)
        there, built = self._built
        if not (there.start <= examples.start and examples.stop <= there.stop):
            on = there.start < examples.start <= there.stop
            self._ahead = min(AHEAD, 4 * self._ahead) if on else FEW
            there = range(examples.start, examples.start + max(count, self._ahead // self.forms[form].length))
            built = self._read(form, there)
            self._built = there, built
        return form, Batch(*(part[examples.start - there.start :][: len(examples)] for part in built))

    def _read(self, form: int, examples: range) -> Batch:
        if self.run.objective.name == "causal_lm":
            return _packed(self._packed.batch(examples.start, range(len(examples))))
        tokens = self._windows.batch(0, 1, examples)
        return self._build(self.forms[form], tokens, seed=self.run.seed.data, first=examples.start)

    def target_tokens(self, steps: int) -> int | None:
        """Targets that so many steps score, padding not among them; of loss on all, the targets alone. None of pairs
        among which the run selects: they differ in length."""
        counts, B = self.course.counts(steps), self.run.batch
        if self.run.objective.name == "pairs":
            if self._method.selects:
                return None
            return sum(self._pairs.target_tokens(bucket, count * B) for bucket, count in enumerate(counts))
        return sum(count * B * form.T for count, form in zip(counts, self.forms, strict=True))

    def _build(self, form: Form, tokens: np.ndarray, *, seed: int, first: int) -> Batch:
        return build(form, tokens, self.tokenizer, seed=seed, first=first, sentinels=self._sentinels)


def _packed(entering_and_labels: tuple[np.ndarray, np.ndarray]) -> Batch:
    entering, labels = entering_and_labels
    return Batch(np.zeros((len(entering), 0), np.int32), entering, labels)


def count_examples(data: Data, objective: Objective) -> tuple[int, int]:
    """Examples that there are to train on and held out; reads no token."""
    if objective.name == "pairs":
        counts, held_out, _ = count_pairs(data, _shapes(objective))
        return sum(counts), held_out
    if objective.name == "causal_lm":
        return count_rows(data, objective)
    return count_windows(data, objective.length)


def left_out(data: Data, objective: Objective) -> int:
    """Training pairs that no bucket takes; 0 of other objectives."""
    return count_pairs(data, _shapes(objective))[2] if objective.name == "pairs" else 0


def epochs(run: Run, steps: int) -> float:
    """How often so many steps go through the training examples; of pairs, through the bucket that comes round most often."""
    if len(forms(run.objective)) == 1 or run.objective.name != "pairs":
        method, there = method_of(run), count_examples(run.data, run.objective)[0]
        if method.one_epoch and (read := method.read(steps)) > there:
            raise ValueError(
                f"technique: the run reads {read:,} examples, its holdout model's among them, and the corpus has {there:,}, "
                "none of which may come again: lower the budget or mega_batch, or use more text"
            )
        return method.read(steps) / there
    counts, taken = count_pairs(run.data, _shapes(run.objective))[0], Course(run.objective, run.seed.data).counts(steps)
    return max(n * run.batch / count if count else 0.0 for n, count in zip(taken, counts, strict=True))


def _shapes(objective: Objective) -> tuple[tuple[int, int], ...]:
    return tuple((S, T) for S, T, _ in objective.buckets)
