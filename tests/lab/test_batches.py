"""What a step is fed is a function of (seed, step): whoever asks, in whatever order, for whichever rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.batches import Batches, count_examples, epochs
from lab.data.prepare import Corpus, Split
from lab.data.tokenizers import TOKENIZERS
from lab.objectives import corrupted
from lab.spec import Evaluation, Objective
from runs import make_run

OBJECTIVES = {
    "lm": Objective(S=6, T=6),
    "prefix_lm": Objective(name="prefix_lm", S=6, T=6, splits=(2, 6, 9)),
    "span_corruption": corrupted(12),
    "ul2": Objective(name="ul2", S=6, T=6),
    "masked_lm": Objective(name="masked_lm", S=12, T=3),
    "causal_lm": Objective(name="causal_lm", S=0, T=12, attended=49),
    "pairs": Objective(name="pairs", S=9, T=6, buckets=((5, 6, 2), (9, 6, 1))),
}


def documents(count, seed):
    rng = np.random.default_rng(seed)
    sources, targets = rng.integers(1, 10, count), rng.integers(0, 6, count)
    lengths = sources + targets
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Split(
        tokens=rng.integers(0, 256, lengths.sum()).astype(np.uint8), starts=starts, lengths=lengths, sources=sources
    )


CORPUS = Corpus(train=documents(300, 0), held_out=documents(90, 1), tokenizer=TOKENIZERS["bytes"], summary={})


def batches(name, seed=0):
    structure = {"masked_lm": "encoder_only"}.get(name, "decoder_only")
    run = make_run(structure, objective=OBJECTIVES[name], batch=8, evaluation=Evaluation(examples=12))
    return Batches(replace(run, seed=replace(run.seed, data=seed)), CORPUS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(OBJECTIVES)), st.integers(0, 3), st.integers(0, 2000), st.sampled_from([1, 2, 8]))
def test_hosts_and_order_change_nothing(name, seed, step, hosts):
    one, fresh = batches(name, seed), batches(name, seed)
    one.step(max(step - 1, 0))
    form, whole = one.step(step)
    rows = [range(8 // hosts * i, 8 // hosts * (i + 1)) for i in range(hosts)]
    parts = [fresh.step(step, part) for part in rows]
    assert {f for f, _ in parts} == {form}
    for array, *pieces in zip(whole, *(batch for _, batch in parts), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces))
    S, T, P = one.forms[form].S, one.forms[form].T, one.forms[form].scored
    assert [array.shape for array in whole] == [(8, S), (8, T), (8, P)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_read_ahead_is_what_each_step_would_read(name, monkeypatch):
    monkeypatch.setattr("lab.batches.FEW", 8 * 12)  # one step, then two and a half at most
    monkeypatch.setattr("lab.batches.AHEAD", 20 * 12)
    one = batches(name)
    for step in (*range(9), 3, 4, 11, 10, 0):
        form, batch = one.step(step)
        alone, same = batches(name).step(step)
        assert form == alone
        for a, b in zip(batch, same, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_seeds_differ_and_share_the_held_out_examples(name):
    one, other = batches(name, 0), batches(name, 1)
    assert any(not np.array_equal(one.step(k)[1].labels, other.step(k)[1].labels) for k in range(3))
    for (form, batch), (same, again) in zip(one.held_out, other.held_out, strict=True):
        assert form == same
        for a, b in zip(batch, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_arms_of_one_length_read_the_same_text():
    """Split, corrupted or denoised: the same tokens of text at the same step."""
    texts = []
    for name in ("lm", "prefix_lm", "ul2", "span_corruption", "masked_lm"):
        fed = batches(name)
        texts.append(fed._windows.batch(7, 8))
    for text in texts[1:]:
        np.testing.assert_array_equal(text, texts[0])


@pytest.fixture
def planned(monkeypatch):
    """The planner finds the same corpus as the trainer."""
    from lab.data import examples, packed, pairs

    for module in (examples, packed, pairs):
        monkeypatch.setattr(module, "load", lambda data: CORPUS)
    for cached in (examples.count_windows, packed.count_rows, pairs.count_pairs):
        cached.cache_clear()
    yield
    for cached in (examples.count_windows, packed.count_rows, pairs.count_pairs):
        cached.cache_clear()


def test_the_planner_counts_what_the_trainer_sees(planned):
    for name, objective in OBJECTIVES.items():
        fed = batches(name)
        stream = getattr(fed, {"causal_lm": "_packed", "pairs": "_pairs"}.get(name, "_windows"))
        counted = {"causal_lm": "rows", "pairs": "counts"}.get(name, "windows")
        assert count_examples(fed.run.data, objective)[0] == np.sum(getattr(stream, counted)), name
        assert fed.target_tokens(10) == sum(int((fed.step(k)[1].labels != 258).sum()) for k in range(10)), (
            f"{name}: targets that are not padding"
        )


def test_epochs_are_those_of_the_bucket_that_comes_round_most_often(planned):
    fed = batches("pairs")
    each = [count * 8 / n for count, n in zip(fed.course.counts(50), fed._pairs.counts, strict=True)]
    assert epochs(fed.run, 50) == max(each) > min(each)
    lm = batches("lm")
    assert epochs(lm.run, 50) == 50 * 8 / lm._windows.windows
