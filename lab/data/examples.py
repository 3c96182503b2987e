"""Which tokens a step sees: a pure function of (seed, step).

An example is a window of n tokens of ONE document: a document of m tokens gives floor(m / n) windows from its start,
and its rest is dropped and counted. No example crosses a document, so that there is nothing to mask.

All windows in an order that the seed draws, then all of them in another order, and so on, are one endless stream, and
step s of batch B takes stream[s * B : (s + 1) * B]. So runs of one seed and example length, whatever their batch or
their split in S inputs and T targets, read prefixes of the same stream.

Letters: B examples, n tokens of an example.
"""

import numpy as np
from jaxtyping import Int

from lab.data.prepare import Corpus, Split, load
from lab.data.synthetic import check_length
from lab.spec import Data


class Examples:
    """`windows` in an epoch; `dropped` tokens of the training split that no window of this length covers."""

    def __init__(self, corpus: Corpus, length: int, seed: int):
        """Raises ValueError where `length` (tokens) is longer than every training document, or is not that of the examples
        of a task (lab.data.synthetic)."""
        check_length(corpus.summary.get("corpus", ""), length)
        # Here, because it imports jax, which a planner need not have loaded.
        import grain

        self.length = length
        self._train = _Windows(corpus.train, length)
        self._held_out = _Windows(corpus.held_out, length)
        self.windows = self._train.count
        self.dropped = int(corpus.train.lengths.sum()) - self.windows * length
        if self.windows == 0:
            raise ValueError(
                f"objective: an example has {length} tokens, and no document of the {len(corpus.train.lengths)} to "
                f"train on is longer than {_longest(corpus.train)}: use fewer (S + T), or a corpus of longer documents"
            )
        # grain draws epoch e from its seed + e. Hashed seeds lie far apart: no run's second epoch is another's first.
        order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(self.windows).shuffle(seed=order_seed).repeat()

    def batch(self, step: int, batch_size: int, rows: range | None = None) -> Int[np.ndarray, "B n"]:
        """int32 tokens of the examples that step `step` (from 0) takes, or of some of its rows. Access is random: nothing
        is kept."""
        assert step >= 0 and batch_size >= 1
        first, rows = step * batch_size, range(batch_size) if rows is None else rows
        return self._train.read(np.array([self._order[first + row] for row in rows]))

    def held_out(self, count: int) -> Int[np.ndarray, "count n"]:
        """The same for every seed: windows evenly spaced over all of the held-out documents."""
        available = self._held_out.count
        if count > available:
            raise ValueError(
                f"evaluation.examples = {count}: the held-out documents give {available} examples of {self.length} "
                "tokens: ask for fewer, shorten them (S + T), or raise data.held_out"
            )
        return self._held_out.read((2 * np.arange(count) + 1) * available // (2 * count))

    def epochs(self, examples: int) -> float:
        """How often `examples` examples go through the training windows."""
        return examples / self.windows


def count_windows(data: Data, length: int) -> tuple[int, int]:
    """Examples of `length` tokens in the training and in the held-out split; reads no token."""
    check_length(data.corpus, length)
    corpus = load(data)
    return _Windows(corpus.train, length).count, _Windows(corpus.held_out, length).count


class _Windows:
    """The windows of a split, numbered through in the order of its documents."""

    def __init__(self, split: Split, length: int):
        if length < 1:
            raise ValueError(f"objective: an example of {length} tokens: use at least 1")
        self.split, self.length = split, length
        # Windows before each document, and after the last.
        self.before = np.concatenate([[0], np.cumsum(split.lengths // length)])
        self.count = int(self.before[-1])

    def read(self, windows: np.ndarray) -> np.ndarray:
        document = np.searchsorted(self.before, windows, side="right") - 1
        start = self.split.starts[document] + (windows - self.before[document]) * self.length
        return self.split.read(start, self.length)


def _longest(split: Split) -> int:
    return int(split.lengths.max(initial=0))
