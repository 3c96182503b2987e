"""Which tokens a step sees, against windows cut by brute force."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data import Examples, count_windows, describe, load
from lab.data.prepare import Corpus, Split
from lab.data.tokenizers import TOKENIZERS


@pytest.fixture(autouse=True)
def own_cache(cache, tmp_path, monkeypatch):
    """Each test's own, after the session's (`cache`)."""
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "own"))


def make_corpus(train_lengths: list[int], held_out_lengths: list[int]) -> Corpus:
    """Documents of both splits, mixed; token i of the whole file is i, so that every window is another."""
    lengths = np.array(train_lengths + held_out_lengths)
    held_out = np.arange(len(lengths)) >= len(train_lengths)
    order = np.random.default_rng(0).permutation(len(lengths))
    lengths, held_out = lengths[order], held_out[order]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = np.arange(lengths.sum()).astype(np.uint16)
    train, held = (Split(tokens=tokens, starts=starts[c], lengths=lengths[c]) for c in (~held_out, held_out))
    return Corpus(train=train, held_out=held, tokenizer=TOKENIZERS["bytes"], summary={})


def brute_force(split: Split, length: int) -> list[tuple[int, ...]]:
    windows = []
    for start, document in zip(split.starts.tolist(), split.lengths.tolist(), strict=True):
        at = 0
        while at + length <= document:
            windows.append(tuple(int(t) for t in split.tokens[start + at : start + at + length]))
            at += length
    return windows


def rows(tokens: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, LENGTHS, st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_an_epoch_is_every_window_once(train, held_out, length, seed):
    corpus = make_corpus(train, held_out)
    expected = brute_force(corpus.train, length)
    if not expected:
        with pytest.raises(ValueError, match="use fewer"):
            Examples(corpus, length, seed)
        return
    examples = Examples(corpus, length, seed)
    assert examples.windows == len(expected)
    assert examples.dropped == sum(train) - length * len(expected)
    for epoch in range(3):
        seen = rows(examples.batch(epoch, len(expected)))
        assert sorted(seen) == sorted(expected)
    available = brute_force(corpus.held_out, length)
    assert rows(examples.held_out(len(available))) == available


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(1)
    return make_corpus(rng.integers(1, 200, 50).tolist(), rng.integers(1, 200, 20).tolist())


def test_batches_are_pieces_of_one_stream_read_in_any_order(corpus):
    examples = Examples(corpus, 7, seed=5)
    stream = examples.batch(0, 4096)
    assert stream.dtype == np.int32 and stream.shape == (4096, 7)
    assert 2 * examples.windows < 4096  # reaches into a third epoch
    again = Examples(corpus, 7, seed=5)
    for batch in (1, 3, 16, 64):
        for step in (4096 // batch - 1, 0, 17, 5):
            np.testing.assert_array_equal(again.batch(step, batch), stream[step * batch : (step + 1) * batch])


def test_workers_change_nothing(corpus):
    examples = Examples(corpus, 7, seed=5)
    expected = [examples.batch(step, 8) for step in range(60)]
    for workers in (2, 5):
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda step: examples.batch(step, 8), range(60)))
        np.testing.assert_array_equal(found, expected)


def test_seeds_and_epochs_have_orders_of_their_own(corpus):
    orders = []
    for seed in range(4):
        examples = Examples(corpus, 7, seed)
        orders += [tuple(map(tuple, examples.batch(epoch, examples.windows).tolist())) for epoch in range(3)]
    assert len(set(orders)) == 12


def test_the_order_never_changes():
    examples = Examples(make_corpus([100], [10]), 5, seed=3)
    assert (examples.batch(0, 20)[:, 0] // 5 % 20).tolist() == [
        19,
        3,
        14,
        17,
        4,
        5,
        10,
        7,
        9,
        15,
        6,
        1,
        11,
        8,
        12,
        18,
        16,
        2,
        13,
        0,
    ]


def test_held_out_examples_are_fixed_and_evenly_spread(corpus):
    available = brute_force(corpus.held_out, 7)
    first, second = Examples(corpus, 7, seed=0), Examples(corpus, 7, seed=9)
    for count in (1, 5, 17, len(available)):
        found = first.held_out(count)
        np.testing.assert_array_equal(found, second.held_out(count))
        places = [available.index(row) for row in rows(found)]
        gaps = np.diff([places[-1] - len(available), *places])  # around the end, too
        assert len(places) == count and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_too_many_held_out_examples_are_refused(corpus):
    available = len(brute_force(corpus.held_out, 7))
    with pytest.raises(ValueError, match=rf"evaluation\.examples = {available + 1}: .* give {available} examples of 7"):
        Examples(corpus, 7, seed=0).held_out(available + 1)
    with pytest.raises(ValueError, match=r"give 0 examples of 199 .* or raise data\.held_out"):
        Examples(make_corpus([200], [10]), 199, seed=0).held_out(1)


def test_lengths_that_no_document_has_are_refused():
    with pytest.raises(ValueError, match=r"has 41 tokens, and no document of the 2 to train on is longer than 40"):
        Examples(make_corpus([40, 3], [50]), 41, seed=0)
    with pytest.raises(ValueError, match="use at least 1"):
        Examples(make_corpus([40, 3], [50]), 0, seed=0)


def test_a_corpus_on_disk_counts_and_reads_alike():
    data = describe("markov").data
    examples = Examples(load(data), 48, seed=0)
    train, held_out = count_windows(data, 48)
    assert train == examples.windows == len(load(data).train.lengths) * (16_384 // 48)
    assert len(examples.held_out(held_out)) == held_out
    batch = examples.batch(3, 16)
    assert type(batch) is np.ndarray and batch.dtype == np.int32
    train = load(data).train
    text = b"".join(train.document(number).astype(np.uint8).tobytes() for number in range(len(train.lengths)))
    assert all(row.astype(np.uint8).tobytes() in text for row in batch)


def test_a_batch_takes_less_than_a_millisecond():
    examples = Examples(load(describe("markov").data), 256, seed=0)
    times = []
    for step in range(200):
        start = time.perf_counter()
        examples.batch(step, 16)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3
