"""Sources and targets of their own lengths: which length bucket each pair is in, and the stream of each bucket.

A bucket is a static shape (S, T). A pair belongs to the first that takes it, smallest first: its source in S places, its
target and the end in T. Pairs that no bucket takes are left out, and counted. Each bucket has a stream of its own, and steps
take buckets as often as pairs fall into them (lab.forms.Course).
"""

import functools
from collections.abc import Sequence

import numpy as np

from lab.data.order import seeds, shuffled
from lab.data.packed import evenly, refuse_mixture
from lab.data.prepare import Corpus, Split, load
from lab.data.tokenizers import Tokenizer
from lab.forms import MOST_FORMS, Form, Objective
from lab.objectives import Batch
from lab.objectives import pairs as batch_of_pairs
from lab.spec import Data

CYCLE = 32  # steps in which each bucket comes as often as its share says; shares are rounded to this


class Pairs:
    """`counts` pairs in an epoch of each bucket; `left_out` training pairs that no bucket takes."""

    def __init__(self, corpus: Corpus, forms: Sequence[Form], seed: int):
        """Raises ValueError for a corpus that has no pairs, and for a bucket that no training pair falls into."""
        self.forms, self.tokenizer = tuple(forms), corpus.tokenizer
        self._train, self._held_out = _Spans(corpus.train), _Spans(corpus.held_out)
        where = self._train.buckets([(form.S, form.T) for form in forms])
        self._members = [np.flatnonzero(where == index) for index in range(len(forms))]
        self.counts = [len(members) for members in self._members]
        self.left_out = int((where < 0).sum())
        for form, members in zip(forms, self._members, strict=True):
            if not len(members):
                raise ValueError(
                    f"objective.buckets: no pair to train on falls into ({form.S}, {form.T}): leave it out "
                    "(lab.data.pairs.pairs_objective finds buckets for a corpus)"
                )
        self._orders = [
            shuffled(len(members), s) for members, s in zip(self._members, seeds(seed, len(forms)), strict=True)
        ]

    def batch(self, bucket: int, first: int, rows: range) -> Batch:
        """Places first + rows of the bucket's own stream."""
        order, members = self._orders[bucket], self._members[bucket]
        chosen = members[[order(first + row) for row in rows]]
        return self._train.batch(self.forms[bucket], chosen, self.tokenizer)

    def target_tokens(self, bucket: int, count: int) -> int:
        """Targets and ends of the first `count` places of the bucket's stream, padding not among them."""
        members, order = self._members[bucket], self._orders[bucket]
        each = self._train.targets[members] + 1
        whole, rest = divmod(count, len(members))
        begun = [order(whole * len(members) + place) for place in range(rest)]
        return int(whole * each.sum() + each[begun].sum())

    def held_out(self, count: int) -> list[tuple[Form, Batch]]:
        """The same for every seed: `count` held-out pairs, evenly spaced among those that a bucket takes, by bucket."""
        where = self._held_out.buckets([(form.S, form.T) for form in self.forms])
        taken = np.flatnonzero(where >= 0)
        chosen = taken[evenly(count, len(taken), "pairs that a bucket takes")]
        found = []
        for index, form in enumerate(self.forms):
            members = chosen[where[chosen] == index]
            if len(members):
                found.append((form, self._held_out.batch(form, members, self.tokenizer)))
        return found


class _Spans:
    """Where sources and targets of a split lie."""

    def __init__(self, split: Split):
        if split.sources is None:
            raise ValueError(
                "objective.name = 'pairs': this corpus has no pairs: use python_docstrings, python_bodies, or prepare one with "
                "--source-column and --target-column"
            )
        refuse_mixture(split, "pairs")
        self.split = split
        self.sources = np.asarray(split.sources)
        self.targets = np.asarray(split.lengths) - self.sources

    def buckets(self, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
        """int [pairs]: the index of the smallest bucket that takes each, -1 where none does."""
        found = np.full(len(self.sources), -1)
        for index in sorted(range(len(shapes)), key=lambda i: (shapes[i][0] * shapes[i][1], shapes[i]), reverse=True):
            S, T = shapes[index]
            found[(self.sources >= 1) & (self.sources <= S) & (self.targets + 1 <= T)] = index
        return found

    def batch(self, form: Form, chosen: np.ndarray, tokenizer: Tokenizer) -> Batch:
        sources, targets = [], []
        for pair in chosen.tolist():
            whole = self.split.read(np.array([self.split.starts[pair]]), int(self.split.lengths[pair]))[0]
            sources.append(whole[: self.sources[pair]])
            targets.append(whole[self.sources[pair] :])
        return batch_of_pairs(form, sources, targets, tokenizer)


def pairs_objective(
    data: Data,
    *,
    inputs: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    loss: str = "targets",
) -> Objective:
    """Buckets for a corpus of pairs: every S of `inputs` with every T of `targets`, as often as pairs fall into it. One that
    would hold less than a cycle's step is left out, and its pairs to the next larger one that there is: a rare bucket would
    be seen too often. By default the quartiles and the 95th percentile of the
    sources' lengths, and the median and 95th percentile of the targets' (their ends among them), in multiples of 8."""
    spans = _Spans(load(data).train)
    S = sorted(set(inputs or _edges(spans.sources, (0.25, 0.5, 0.75, 0.95))))
    T = sorted(set(targets or _edges(spans.targets + 1, (0.5, 0.95))))
    shapes = [(s, t) for s in S for t in T]
    while True:
        where = spans.buckets(shapes)
        total = int((where >= 0).sum())
        if not total:
            raise ValueError(f"inputs = {S}, targets = {T}: no pair of the corpus fits: use longer ones")
        counts = np.bincount(where[where >= 0], minlength=len(shapes))
        rare = [i for i, n in enumerate(counts) if n * CYCLE < total]
        if not rare and len(shapes) <= MOST_FORMS:
            break
        shapes.pop(min(rare or range(len(shapes)), key=lambda i: counts[i]))
    shares = [max(1, round(CYCLE * int(n) / total)) for n in counts]
    buckets = tuple((s, t, share) for (s, t), share in zip(shapes, shares, strict=True))
    return Objective(
        name="pairs", S=max(s for s, _ in shapes), T=max(t for _, t in shapes), buckets=buckets,
        loss=loss,  # pyright: ignore[reportArgumentType]: checked there
    )  # fmt: skip


def _edges(lengths: np.ndarray, shares: Sequence[float]) -> list[int]:
    return [int(-(-np.quantile(lengths, share) // 8) * 8) for share in shares]


@functools.lru_cache(maxsize=64)
def count_pairs(data: Data, shapes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], int, int]:
    """Training pairs of each bucket, held-out pairs that a bucket takes, and training pairs that none does."""
    corpus = load(data)
    train, held_out = (_Spans(split).buckets(shapes) for split in (corpus.train, corpus.held_out))
    counts = np.bincount(train[train >= 0], minlength=len(shapes))
    return tuple(counts.tolist()), int((held_out >= 0).sum()), int((train < 0).sum())
