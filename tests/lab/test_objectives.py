"""Which tokens go in and which are predicted: nothing leaks, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.tokenizers import TOKENIZERS
from lab.forms import Form, Objective, forms
from lab.objectives import _GOLDEN, _mixed, build, corrupted, draws, pairs
from lab.spec import Evaluation
from runs import make_run

BYTES = TOKENIZERS["bytes"]


def restored(inputs, labels, sentinels):
    """The text again, from what is left of it and its spans."""
    spans, current = {}, None
    for token in labels[:-1].tolist():
        if token in sentinels:
            current = token
            assert current not in spans, "a sentinel twice"
            spans[current] = []
        else:
            spans[current].append(token)
    text = []
    for token in inputs.tolist():
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans, "a span that has no place"
    return text


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 150), st.floats(0.05, 0.6), st.floats(1.0, 20.0), st.integers(0, 10**6))
def test_span_corruption_inverts(text, density, mean_span, first):
    o = corrupted(text, mean_span=mean_span, density=density)
    tokens = np.arange(2 * text, dtype=np.int32).reshape(2, text) % 256
    batch = build(forms(o)[0], tokens, BYTES, seed=1, first=first)
    sentinels = [BYTES.special(i) for i in range(o.spans)]
    assert batch.inputs.shape == (2, o.S) and batch.labels.shape == batch.targets.shape == (2, o.T)
    for row in range(2):
        assert restored(batch.inputs[row], batch.labels[row], sentinels) == tokens[row].tolist()
        kept = [t for t in batch.inputs[row].tolist() if t < 256]
        hidden = [t for t in batch.labels[row].tolist() if t < 256]
        assert len(kept) + len(hidden) == text
        assert [t for t in batch.inputs[row].tolist() if t >= 256] == sentinels, "each once, in order"
        assert batch.inputs[row, 0] not in sentinels, "text comes first"
        assert batch.labels[row, -1] == BYTES.sep and (batch.labels[row, :-1] != BYTES.sep).all()
        assert batch.targets[row, 0] == BYTES.sep
        np.testing.assert_array_equal(batch.targets[row, 1:], batch.labels[row, :-1])
    alone = build(forms(o)[0], tokens[1:], BYTES, seed=1, first=first + 1)
    np.testing.assert_array_equal(alone.inputs, batch.inputs[1:])


def test_span_lengths_are_drawn_uniformly():
    """5 noisy tokens in 2 spans: 4 ways, each as likely; 6 others around them in 2 parts: 5 ways."""
    form = Form(name="span_corruption", S=8, T=8, length=11, spans=2)
    batch = build(form, np.zeros((4000, 11), np.int32), BYTES, seed=0, first=0)
    first, second = BYTES.special(0), BYTES.special(1)
    noise = (batch.labels == second).argmax(axis=1) - 1
    text = (batch.inputs == first).argmax(axis=1)
    for counts, ways in ((np.bincount(noise)[1:], 4), (np.bincount(text)[1:], 5)):
        expected = 4000 / ways
        assert len(counts) == ways and np.sum((counts - expected) ** 2 / expected) < 20, counts


def test_draws_are_uniform_and_a_function_of_seed_and_place():
    whole = draws(3, 10, 400, 50)
    np.testing.assert_array_equal(draws(3, 30, 5, 7), whole[20:25, :7])
    assert not np.array_equal(draws(4, 10, 400, 50), whole)
    counts = np.histogram(whole, bins=100, range=(0, 1))[0]
    assert np.sum((counts - 200) ** 2 / 200) < 160  # 99 degrees of freedom
    neighbours = [
        np.corrcoef(whole[:, :-1].ravel(), whole[:, 1:].ravel()),
        np.corrcoef(whole[:-1].ravel(), whole[1:].ravel()),
    ]
    assert all(abs(found[0, 1]) < 0.03 for found in neighbours)
    # SplitMix64 of the state 0, by its published reference: the first of its numbers.
    assert int(_mixed(np.array([_GOLDEN]))[0]) == 0xE220A8397B1DCDAF


def test_masks_are_bert_s():
    """15 of 100 tokens; of the chosen 80% become MASK, 10% another token, 10% stay."""
    form = Form(name="masked_lm", S=100, T=15, length=100)
    tokens = np.full((2000, 100), 7, np.int32)
    batch = build(form, tokens, BYTES, seed=0, first=0)
    assert (np.diff(batch.targets, axis=1) > 0).all() and (batch.labels == 7).all()
    entering = np.take_along_axis(batch.inputs, batch.targets, axis=1)
    assert abs(np.mean(entering == BYTES.mask) - 0.8) < 0.01
    assert abs(np.mean((entering != BYTES.mask) & (entering != 7)) - 0.1 * 255 / 256) < 0.01
    assert (batch.inputs == 7).sum() >= 2000 * 85 and entering.max() == BYTES.mask
    places = np.bincount(batch.targets.ravel(), minlength=100)
    assert np.sum((places - 300) ** 2 / 300) < 160


def test_ul2_tells_the_mode_and_keeps_the_text():
    o = Objective(name="ul2", S=30, T=34)
    run = make_run(objective=o)
    tokens = np.arange(2 * 64, dtype=np.int32).reshape(2, 64)
    for form in forms(o):
        batch = build(form, tokens, BYTES, seed=0, first=5, sentinels=o.ul2_spans)
        assert batch.inputs.shape == (2, form.S) and batch.labels.shape == (2, form.T)
        assert (batch.inputs[:, 0] == BYTES.special(o.ul2_spans + form.mode)).all()
        assert max(batch.inputs.max(), batch.labels.max()) < run.V
        for row in range(2):
            sentinels = [BYTES.special(i) for i in range(form.spans)]
            rest = batch.inputs[row, 1:]
            if form.name == "lm":
                assert [*rest.tolist(), *batch.labels[row].tolist()] == tokens[row].tolist()
            else:
                assert restored(rest, batch.labels[row], sentinels) == tokens[row].tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 4)), min_size=1, max_size=5), st.booleans())
def test_padding_of_pairs(lengths, score_inputs):
    form = Form(name="pairs", S=7, T=5, length=12, loss="all" if score_inputs else "targets")
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, s) for s, _ in lengths]
    targets = [rng.integers(0, 256, t) for _, t in lengths]
    batch = pairs(form, sources, targets, BYTES)
    assert batch.labels.shape == (len(lengths), form.scored)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        scored = batch.labels[row][batch.labels[row] != BYTES.pad].tolist()
        assert batch.inputs[row].tolist() == [BYTES.pad] * (7 - len(source)) + source.tolist()
        assert scored == [*(source[1:].tolist() if score_inputs else []), *target.tolist(), BYTES.sep]
        own = batch.labels[row, -5:]
        np.testing.assert_array_equal(batch.targets[row, 1:], own[:-1])
        assert batch.targets[row, 0] == BYTES.sep


def test_a_pair_that_does_not_fit_is_an_error():
    form = Form(name="pairs", S=3, T=3, length=6)
    for source, target in (([1] * 4, [1]), ([1], [1] * 3), ([], [1])):
        with pytest.raises(ValueError, match="does not fit 3 inputs and 3 targets"):
            pairs(form, [np.array(source)], [np.array(target)], BYTES)


def test_evaluation_at_splits_needs_text_that_long():
    with pytest.raises(ValueError, match=r"evaluation\.splits = \(11,\): lm on 11 tokens"):
        make_run(evaluation=Evaluation(splits=(11,)))
