"""Which tokens go in and which are predicted: nothing leaks, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.tokenizers import TOKENIZERS
from lab.forms import Form, Objective, forms
from lab.objectives import build, corrupted, pairs
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
