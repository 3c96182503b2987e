"""Documents packed in rows, against the plain concatenation of all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.packed import Packed, _Rows
from lab.data.prepare import Corpus, Split
from lab.data.tokenizers import TOKENIZERS

BYTES = TOKENIZERS["bytes"]
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
    packed = Packed(corpus, 7, seed=3)
    whole = packed.batch(0, range(12))
    parts = [Packed(corpus, 7, seed=3).batch(4 * step, range(4)) for step in (2, 0, 1)]
    for array, pieces in zip(whole, zip(*(parts[i] for i in (1, 2, 0)), strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces))
    assert not np.array_equal(whole[0], Packed(corpus, 7, seed=4).batch(0, range(12))[0])
    assert packed.rows == 40 * 6 // 7 and packed.dropped == 40 * 6 % 7
    entering, labels = packed.held_out(2)
    np.testing.assert_array_equal(entering[:, 1:], np.where(entering[:, 1:] == BYTES.sep, BYTES.sep, labels[:, :-1]))
    with pytest.raises(ValueError, match=r"evaluation\.examples = 3: .* give 2 rows"):
        packed.held_out(3)
    with pytest.raises(ValueError, match=r"objective\.T = 500: the training documents fill no row"):
        Packed(corpus, 500, seed=0)
