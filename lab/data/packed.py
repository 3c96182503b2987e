"""Documents packed in rows of n, none of them cut off: every token is a target exactly once, and so is every document's end.

A document of m tokens t_1 .. t_m takes m + 1 places, which read [SEP, t_1 .. t_m] and predict [t_1 .. t_m, SEP]. Documents
follow each other in the order in which they are stored, and row r is places r n .. (r+1) n - 1 of that: one that goes over a
row's end goes on in the next, where its first token there is preceded by the true one. What is left after the last whole row
is not used. Attention stays within a document (lab.objectives.Batch), so packing changes no prediction.

Letters: B rows of a batch, n places of a row.
"""

import functools

import numpy as np
from jaxtyping import Int

from lab.data.order import seeds, shuffled
from lab.data.prepare import Corpus, Split, load
from lab.data.synthetic import check_stream
from lab.forms import Objective
from lab.spec import Data


class Packed:
    """`rows` in an epoch; `dropped` places of the training documents that no row covers."""

    def __init__(self, corpus: Corpus, objective: Objective, seed: int):
        """Raises ValueError where all training documents together are shorter than one row, and where the objective was made
        for another corpus."""
        self._train, self._held_out = _training_rows(corpus, objective.T), _Rows(corpus.held_out, objective.T)
        self.sep, self.rows, self.dropped = corpus.tokenizer.sep, self._train.count, self._train.left
        _check_attended(self._train, objective)
        self._order = shuffled(self.rows, seeds(seed, 1)[0])

    def batch(self, first: int, rows: range) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B n"]]:
        """What enters and what is predicted, int32, of places first + rows of the stream."""
        return self._train.read(np.array([self._order(first + row) for row in rows]), self.sep)

    def held_out(self, count: int) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B n"]]:
        """The same for every seed: rows evenly spaced over the held-out documents."""
        return self._held_out.read(evenly(count, self._held_out.count, "rows"), self.sep)


def evenly(count: int, available: int, what: str) -> np.ndarray:
    """`count` of `available` numbers, evenly spaced; raises ValueError where there are fewer."""
    if count > available:
        raise ValueError(
            f"evaluation.examples = {count}: the held-out documents give {available} {what}: ask for fewer, or raise "
            "data.held_out"
        )
    return (2 * np.arange(count) + 1) * available // (2 * count)


def causal_lm(data: Data, T: int) -> Objective:
    """The objective of rows of T places, with the mean over the corpus of the query-key pairs within documents of a row."""
    return Objective(name="causal_lm", S=0, T=T, attended=_training_rows(load(data), T).attended_mean)


@functools.lru_cache(maxsize=64)
def count_rows(data: Data, objective: Objective) -> tuple[int, int]:
    """Rows in the training and in the held-out split; ValueError where the objective was made for another corpus."""
    corpus = load(data)
    rows = _training_rows(corpus, objective.T)
    _check_attended(rows, objective)
    return rows.count, _Rows(corpus.held_out, objective.T).count


def refuse_mixture(split: Split, objective: str) -> None:
    """Raises ValueError for a mixture: rows and buckets take documents as they lie, not by weight."""
    if split.mixture:
        raise ValueError(f"objective.name = {objective!r}: this corpus is a mixture, whose weights it can not keep: use one of "
                         "its corpora, or objective 'lm'")  # fmt: skip


def _training_rows(corpus: Corpus, length: int) -> "_Rows":
    refuse_mixture(corpus.train, "causal_lm")
    check_stream(corpus.summary.get("corpus", ""), "causal_lm")
    rows = _Rows(corpus.train, length)
    if not rows.count:
        raise ValueError(f"objective.T = {length}: the training documents fill no row of it: use fewer, or more text")
    return rows


def _check_attended(rows: "_Rows", objective: Objective) -> None:
    if objective.attended != rows.attended_mean:
        raise ValueError(
            f"objective.attended = {objective.attended}: rows of {objective.T} of this corpus attend to {rows.attended_mean} "
            "pairs on the mean: lab.data.packed.causal_lm(data, T) makes the objective of a corpus"
        )


class _Rows:
    def __init__(self, split: Split, length: int):
        self.split, self.length = split, length
        # Places before each document, and after the last.
        self.before = np.concatenate([[0], np.cumsum(split.lengths + 1)])
        self.count, self.left = divmod(int(self.before[-1]), length)

    def attended(self) -> int:
        """Query-key pairs of all rows: each document's part in each row is causal by itself."""
        end = self.count * self.length
        cuts = np.unique(np.concatenate([self.before[self.before < end], np.arange(0, end + 1, self.length)]))
        parts = np.diff(cuts)
        return int((parts * (parts + 1) // 2).sum())

    @functools.cached_property
    def attended_mean(self) -> int:
        """Of one row, to the nearest whole pair."""
        return round(self.attended() / self.count)

    def read(self, rows_B: np.ndarray, sep: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.length
        entering = np.empty((len(rows_B), n), np.int32)
        labels = np.empty((len(rows_B), n), np.int32)
        for row, number in enumerate(rows_B.tolist()):
            at, end = number * n, (number + 1) * n
            document = int(np.searchsorted(self.before, at, side="right")) - 1
            while at < end:
                begin, stop = int(self.before[document]), min(int(self.before[document + 1]), end)
                start, length = int(self.split.starts[document]), int(self.split.lengths[document])
                first = max(at - begin - 1, 0)  # of its tokens, the first that enters or is predicted here
                last = min(stop - begin, length)
                tokens = self.split.read(np.array([start + first]), last - first)[0]
                whole = np.concatenate([[sep], tokens, [sep]])  # what may enter, and what follows it
                skip = 0 if at == begin else 1
                place, size = at - number * n, stop - at
                entering[row, place : place + size] = whole[skip : skip + size]
                labels[row, place : place + size] = whole[skip + 1 : skip + 1 + size]
                at, document = stop, document + 1
        return entering, labels
