"""Which tokens a step sees: a pure function of (seed, step).

An example is a window of n tokens of ONE document: a document of m tokens gives floor(m / n) windows from its start,
and its rest is dropped and counted. No example crosses a document, so that there is nothing to mask.

All windows in an order that the seed draws, then all of them in another order, and so on, are one endless stream, and
step s of batch B takes stream[s * B : (s + 1) * B]. So runs of one seed and example length, whatever their batch or
their split in S inputs and T targets, read prefixes of the same stream.

A mixture has such a stream for each of its corpora, and takes from them in turn, so that of its first k examples each has
given its weight's share to within one. Its epoch ends where the first of them would begin again.

Letters: B examples, n tokens of an example.
"""

import functools
import math

import numpy as np
from jaxtyping import Int

from lab.data.corpus import Corpus, Split, in_order, prefetch
from lab.data.order import MOST, seeds, shuffled
from lab.data.prepare import load
from lab.data.synthetic import check_length
from lab.spec import Data

# Documents whose windows are counted together: what is kept in memory is one number for so many.
BLOCK = 256


class Examples:
    """`windows` in an epoch; `dropped` tokens of the training split that no window of this length covers."""

    def __init__(self, corpus: Corpus, length: int, seed: int):
        """Raises ValueError where `length` (tokens) is longer than every training document, or is not that of the examples
        of a task (lab.data.synthetic)."""
        check_length(corpus.summary.get("corpus", ""), length)
        self.length = length
        self._train = _Mixture(corpus.train, length)
        self._held_out = _Mixture(corpus.held_out, length)
        self.windows = self._train.epoch
        self.dropped = self._train.tokens - self._train.count * length
        if self.windows == 0:
            documents, longest = self._train.documents_without(corpus.train)
            raise ValueError(
                f"objective: an example has {length} tokens, and no document of the {documents} to "
                f"train on is longer than {longest}: use fewer (S + T), or a corpus of longer documents"
            )
        if max(self._train.counts) > MOST:
            raise ValueError(
                f"objective: an example of {length} tokens gives {max(self._train.counts):,} windows of this corpus, and "
                f"{MOST:,} can be put in an order: use longer examples (S + T)"
            )
        self._orders = [
            shuffled(count, s)
            for count, s in zip(self._train.counts, seeds(seed, len(self._train.counts)), strict=True)
        ]

    def batch(self, step: int, batch_size: int, rows: range | None = None) -> Int[np.ndarray, "B n"]:
        """int32 tokens of the examples that step `step` (from 0) takes, or of some of its rows. Access is random: nothing
        is kept."""
        assert step >= 0 and batch_size >= 1
        first, rows = step * batch_size, range(batch_size) if rows is None else rows
        which, place = self._train.turn(np.asarray(rows) + first)
        drawn = [self._orders[w](p) for w, p in zip(which.tolist(), place.tolist(), strict=True)]
        return self._train.read(which, np.array(drawn, np.int64))

    def held_out(self, count: int) -> Int[np.ndarray, "count n"]:
        """The same for every seed: windows evenly spaced over all of the held-out documents, of each corpus of a mixture its
        weight's share."""
        available = self._held_out.epoch
        if count > available:
            raise ValueError(
                f"evaluation.examples = {count}: the held-out documents give {available} examples of {self.length} "
                "tokens: ask for fewer, shorten them (S + T), or raise data.held_out"
            )
        which, place = self._held_out.turn(np.arange(count))
        taken, counts = np.bincount(which, minlength=len(self._held_out.counts)), np.array(self._held_out.counts)
        return self._held_out.read(which, (2 * place + 1) * counts[which] // (2 * taken[which]))


@functools.lru_cache(maxsize=1024)
def count_windows(data: Data, length: int) -> tuple[int, int]:
    """Examples of `length` tokens in an epoch of the training and of the held-out split; reads no token."""
    corpus = load(data)
    check_length(data.corpus, length)
    return _Mixture(corpus.train, length).epoch, _Mixture(corpus.held_out, length).epoch


class _Mixture:
    """The windows of a split, of one corpus or of several that take turns."""

    def __init__(self, split: Split, length: int):
        if length < 1:
            raise ValueError(f"objective: an example of {length} tokens: use at least 1")
        shares = [(s.weight, s.documents) for s in split.mixture] or [(1, len(split.lengths))]
        ends = np.cumsum([documents for _, documents in shares]).tolist()
        self.weights = [weight for weight, _ in shares]
        self.parts = [
            _Windows(split, length, end - documents, end) for end, (_, documents) in zip(ends, shares, strict=True)
        ]
        self.counts = [part.count for part in self.parts]
        self.count = sum(self.counts)
        self.tokens = sum(part.tokens for part in self.parts)
        # Examples until one of them is used up.
        total = sum(self.weights)
        self.epoch = min(
            count if len(shares) == 1 else math.floor(count * total / weight)
            for count, weight in zip(self.counts, self.weights, strict=True)
        )

    def turn(self, examples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn each example of the mixture is, and which of its own examples it then gives.

        Of the first k examples all but floor(k (W - w) / W) are the first corpus's, of weight w of W; the others are shared
        alike among those that are left. So any place is found without the places before it.
        """
        if len(self.parts) == 1:
            return np.zeros(len(examples_B), np.int64), examples_B
        # Python's integers: the products may be larger than 64 bits.
        place, following = examples_B.astype(object), examples_B.astype(object) + 1
        which, own = np.full(len(examples_B), -1), np.zeros(len(examples_B), np.int64)
        left = sum(self.weights)
        for part, weight in enumerate(self.weights):
            later, later_following = place * (left - weight) // left, following * (left - weight) // left
            mine = ((following - later_following) != (place - later)) & (which < 0)
            which[mine], own[mine] = part, (following - later_following)[mine] - 1
            place, following, left = later, later_following, left - weight
            if not left:
                break
        return which, own

    def read(self, which: np.ndarray, windows: np.ndarray) -> Int[np.ndarray, "B n"]:
        if len(self.parts) == 1:
            return self.parts[0].read(windows)
        found = np.empty((len(windows), self.parts[0].length), np.int32)
        for part in np.unique(which):
            found[which == part] = self.parts[part].read(windows[which == part])
        return found

    def documents_without(self, split: Split) -> tuple[int, int]:
        """Documents, and the longest, of the corpus that gives no window."""
        part = self.parts[self.counts.index(0)]
        lengths = split.lengths[part.first : part.end]
        return len(lengths), int(lengths.max(initial=0))


class _Windows:
    """The windows of documents first .. end of a split, numbered through in their order."""

    def __init__(self, split: Split, length: int, first: int, end: int):
        self.split, self.length, self.first, self.end = split, length, first, end
        counts, self.tokens = [], 0
        for lengths in in_order(split.lengths[first:end]):
            self.tokens += int(lengths.sum())
            counts.append(np.add.reduceat(lengths // length, np.arange(0, len(lengths), BLOCK)))
        prefetch(split.starts)
        # Windows before each block, and after the last.
        self.before = np.concatenate([[0], np.cumsum(np.concatenate(counts) if counts else np.zeros(0, np.int64))])
        self.count = int(self.before[-1])

    def read(self, windows_B: np.ndarray) -> Int[np.ndarray, "B n"]:
        block = np.searchsorted(self.before, windows_B, side="right") - 1
        within = windows_B - self.before[block]
        places = self.first + block[:, None] * BLOCK + np.arange(BLOCK)
        lengths = np.where(places < self.end, self.split.lengths[np.minimum(places, self.end - 1)], 0)
        after = np.cumsum(lengths // self.length, axis=1)
        document = (after <= within[:, None]).sum(axis=1)
        rows = np.arange(len(windows_B))
        within -= np.where(document > 0, after[rows, document - 1], 0)
        start = self.split.starts[places[rows, document]] + within * self.length
        return self.split.read(start, self.length)
