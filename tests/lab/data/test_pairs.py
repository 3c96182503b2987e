"""Pairs in length buckets, against a loop over all of them."""

from dataclasses import replace

import numpy as np
import pytest

from lab.data import pairs as module
from lab.data.pairs import CYCLE, Pairs, count_pairs, pairs_objective
from lab.data.prepare import Corpus, Split
from lab.data.tokenizers import TOKENIZERS
from lab.forms import forms
from runs import make_run

BYTES = TOKENIZERS["bytes"]


def make_split(count, seed):
    """Pairs whose tokens tell which pair they are."""
    rng = np.random.default_rng(seed)
    sources, targets = rng.integers(1, 40, count), rng.integers(0, 12, count)
    lengths = sources + targets
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = np.repeat(np.arange(count) % 256, lengths).astype(np.uint8)
    return Split(tokens=tokens, starts=starts, lengths=lengths, sources=sources)


@pytest.fixture
def corpus(monkeypatch):
    made = Corpus(train=make_split(240, 0), held_out=make_split(80, 1), tokenizer=BYTES, summary={})
    monkeypatch.setattr(module, "load", lambda data: made)
    return made


def smallest(shapes, source, target):
    fitting = [s for s in shapes if source <= s[0] and target + 1 <= s[1]]
    return min(fitting, key=lambda s: (s[0] * s[1], s)) if fitting else None


def test_each_pair_is_in_the_smallest_bucket_that_takes_it(corpus):
    o = pairs_objective(make_run().data, inputs=(8, 24, 40), targets=(6, 10))
    shapes = [(S, T) for S, T, _ in o.buckets]
    stream = Pairs(corpus, forms(o), seed=0)
    expected = {shape: set() for shape in shapes}
    for pair in range(240):
        found = smallest(shapes, corpus.train.sources[pair], corpus.train.lengths[pair] - corpus.train.sources[pair])
        if found:
            expected[found].add(pair)
    assert stream.counts == [len(expected[shape]) for shape in shapes]
    assert sum(stream.counts) == 240 - stream.left_out
    counts, held_out, left_out = count_pairs.__wrapped__(make_run().data, tuple(shapes))
    assert list(counts) == stream.counts and left_out == stream.left_out and held_out <= 80
    for index, shape in enumerate(shapes):
        size = len(expected[shape])
        epoch = stream.batch(index, 0, range(size))
        assert set(epoch.inputs[:, -1].tolist()) == expected[shape], "an epoch has each pair once"
        again = stream.batch(index, size, range(size))
        assert sorted(again.inputs[:, -1]) == sorted(epoch.inputs[:, -1])
        np.testing.assert_array_equal(
            stream.batch(index, 2, range(1, 4)).inputs, stream.batch(index, 0, range(3, 6)).inputs
        )


def test_buckets_come_as_often_as_pairs_fall_into_them(corpus):
    o = pairs_objective(make_run().data, inputs=(8, 24, 40), targets=(6, 12))
    stream = Pairs(corpus, forms(o), seed=0)
    for members, (_, _, share) in zip(stream._members, o.buckets, strict=True):
        assert abs(share - CYCLE * len(members) / sum(stream.counts)) <= 0.5 or share == 1
    by_default = pairs_objective(make_run().data)
    assert all(S % 8 == 0 and T % 8 == 0 for S, T, _ in by_default.buckets)
    assert Pairs(corpus, forms(by_default), seed=0).left_out < 0.15 * 240


def test_a_rare_bucket_is_left_out_and_its_pairs_with_it(corpus):
    """One pair in 240 is longer than the others: as a bucket of its own it would be seen in every cycle."""
    sources = np.array(corpus.train.sources)
    assert (sources > 38).sum() < 240 / CYCLE < (sources <= 38).sum()
    o = pairs_objective(make_run().data, inputs=(38, 40), targets=(12,))
    assert [bucket[:2] for bucket in o.buckets] == [(38, 12)]


def test_targets_are_counted_without_their_padding(corpus):
    o = pairs_objective(make_run().data, inputs=(24, 40), targets=(6, 12))
    stream = Pairs(corpus, forms(o), seed=0)
    for bucket, size in enumerate(stream.counts):
        for count in (3, size, 2 * size + 5):
            labels = stream.batch(bucket, 0, range(count)).labels
            assert stream.target_tokens(bucket, count) == int((labels != BYTES.pad).sum())


def test_held_out_pairs_are_the_same_for_every_seed(corpus):
    o = pairs_objective(make_run().data)
    one, other = (Pairs(corpus, forms(o), seed).held_out(40) for seed in (0, 1))
    assert sum(len(batch.inputs) for _, batch in one) == 40
    for (form, batch), (same, again) in zip(one, other, strict=True):
        assert form == same
        np.testing.assert_array_equal(batch.inputs, again.inputs)


def test_a_corpus_without_pairs_is_refused(corpus, monkeypatch):
    plain = replace(corpus, train=replace(corpus.train, sources=None))
    monkeypatch.setattr(module, "load", lambda data: plain)
    with pytest.raises(ValueError, match="this corpus has no pairs: use python_docstrings"):
        pairs_objective(make_run().data)
    empty = replace(corpus, train=replace(corpus.train, sources=0 * corpus.train.sources))
    monkeypatch.setattr(module, "load", lambda data: empty)
    with pytest.raises(ValueError, match=r"inputs = \[9\], targets = \[9\]: no pair of the corpus fits"):
        pairs_objective(make_run().data, inputs=(9,), targets=(9,))
