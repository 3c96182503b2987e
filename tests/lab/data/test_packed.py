"""Documents packed in rows, against the plain concatenation of all of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.packed import Packed, _Rows, _training_rows
from lab.data.prepare import Corpus, Share, Split
from lab.data.tokenizers import TOKENIZERS
from lab.forms import Objective

BYTES = TOKENIZERS["bytes"]


def made(corpus, T):
    """The objective of a corpus that is not on disk."""
    rows = _training_rows(corpus, T)
    return Objective(name="causal_lm", S=0, T=T, attended=rows.attended_mean)


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def make_split(lengths):
    """Documents of different tokens with gaps between them, as where held-out ones lie between."""
    lengths = np.array(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths + 2)[:-1]])
    tokens = (np.arange(int(lengths.sum()) + 2 * len(lengths)) * 37 % 256).astype(np.uint8)
    return Split(tokens=tokens, starts=starts, lengths=lengths)


def documents(split):
    return [split.read(np.array([s]), int(n))[0].tolist() for s, n in zip(split.starts, split.lengths, strict=True)]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 25))
def test_every_token_and_every_end_is_a_target_exactly_once(lengths, n):
    split = make_split(lengths)
    rows = _Rows(split, n)
    entering, labels = rows.read(np.arange(rows.count), BYTES.sep)
    everything = [token for text in documents(split) for token in (*text, BYTES.sep)]
    before = [token for text in documents(split) for token in (BYTES.sep, *text)]
    assert labels.reshape(-1).tolist() == everything[: rows.count * n]
    assert entering.reshape(-1).tolist() == before[: rows.count * n]
    assert rows.count * n + rows.left == len(everything) and rows.left < n


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 25))
def test_attended_pairs_are_those_within_documents_of_a_row(lengths, n):
    split = make_split(lengths)
    rows = _Rows(split, n)
    entering, _ = rows.read(np.arange(rows.count), BYTES.sep)
    number = np.cumsum(entering == BYTES.sep, axis=1)
    same = number[:, :, None] == number[:, None, :]
    assert rows.attended() == int((same & np.tril(np.ones((n, n), bool))).sum())


def test_the_stream_is_a_function_of_seed_and_place():
    corpus = Corpus(train=make_split([5] * 40), held_out=make_split([9, 9]), tokenizer=BYTES, summary={})
    o = made(corpus, 7)
    packed = Packed(corpus, o, seed=3)
    whole = packed.batch(0, range(12))
    parts = [Packed(corpus, o, seed=3).batch(4 * step, range(4)) for step in (2, 0, 1)]
    for array, pieces in zip(whole, zip(*(parts[i] for i in (1, 2, 0)), strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces))
    assert not np.array_equal(whole[0], Packed(corpus, o, seed=4).batch(0, range(12))[0])
    assert packed.rows == 40 * 6 // 7 and packed.dropped == 40 * 6 % 7
    entering, labels = packed.held_out(2)
    np.testing.assert_array_equal(entering[:, 1:], np.where(entering[:, 1:] == BYTES.sep, BYTES.sep, labels[:, :-1]))
    with pytest.raises(ValueError, match=r"evaluation\.examples = 3: .* give 2 rows"):
        packed.held_out(3)
    with pytest.raises(ValueError, match=r"objective\.T = 500: the training documents fill no row"):
        Packed(corpus, replace(o, T=500, attended=500), seed=0)
    with pytest.raises(ValueError, match=r"objective\.attended = 7: rows of 7 of this corpus attend to 19 pairs"):
        Packed(corpus, replace(o, attended=7), seed=0)


def test_rows_of_mixtures_and_of_tasks_are_refused():
    corpus = Corpus(train=make_split([5] * 40), held_out=make_split([9, 9]), tokenizer=BYTES, summary={})
    mixed = replace(corpus.train, mixture=(Share(weight=1, documents=20), Share(weight=3, documents=20)))
    with pytest.raises(ValueError, match="'causal_lm': this corpus is a mixture"):
        made(replace(corpus, train=mixed), 7)
    with pytest.raises(ValueError, match="'copy' is a task whose examples stand by themselves"):
        made(replace(corpus, summary={"corpus": "copy"}), 7)
