"""Every way to compute attention against a loop over queries, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flop_counter
from lab.attention import ATTENTION, ROWS, attend
from reference_models import softmax_attention

WAYS = [name for name in ATTENTION if name != "reference"]
SHAPES = {  # B, T, S, N, K, H
    "square": (2, 9, 9, 2, 2, 4),
    "several blocks, the last one short": (2, 2 * ROWS + 5, 2 * ROWS + 5, 2, 1, 4),
    "targets over memory and targets": (1, ROWS + 3, 2 * ROWS, 4, 2, 6),
    "one query": (2, 1, 12, 3, 3, 4),
}


def made(shape, dtype=np.float32):
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(T)
    return tuple(
        jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    )


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ATTENTION)
def test_forward(how, shape, causal):
    q, k, v, _ = made(shape)
    _, T, S, *_ = shape
    seen = np.arange(S)[None, :] <= np.arange(T)[:, None] + S - T if causal else np.ones((T, S), bool)
    ours = attend(q, k, v, causal=causal, how=how)
    for row in range(len(q)):
        theirs = softmax_attention(*(np.asarray(a[row], np.float64) for a in (q, k, v)), seen)
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=3e-6)


def made_segments(shape, seed=0):
    """Runs of equal numbers among the keys; each query has that of the key that stands where it does."""
    B, T, S, *_ = shape
    keys = np.cumsum(np.random.default_rng(seed).random((B, S)) < 0.1, axis=1).astype(np.int32)
    return jnp.asarray(keys[:, S - T :]), jnp.asarray(keys)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ATTENTION)
def test_segments(how, shape, causal):
    """Forward against a loop, gradient against JAX's own derivative of the reference."""
    q, k, v, along = made(shape)
    _, T, S, *_ = shape
    segments = made_segments(shape)
    seen = np.arange(S)[None, :] <= np.arange(T)[:, None] + S - T if causal else np.ones((T, S), bool)
    ours = attend(q, k, v, causal=causal, how=how, segments=segments)
    for row in range(len(q)):
        same = np.asarray(segments[0][row])[:, None] == np.asarray(segments[1][row])[None, :]
        theirs = softmax_attention(*(np.asarray(a[row], np.float64) for a in (q, k, v)), seen & same)
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=3e-6)

    def gradient(how):
        projected = lambda *qkv: jnp.vdot(attend(*qkv, causal=causal, how=how, segments=segments), along)  # noqa: E731
        return jax.jit(jax.grad(projected, argnums=(0, 1, 2)))(q, k, v)

    for got, expected in zip(gradient(how), gradient("reference"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", WAYS)
def test_gradient(how, shape, causal):
    """Of a random projection, against JAX's own derivative of the reference."""
    q, k, v, along = made(shape)

    def gradient(how):
        projected = lambda *qkv: jnp.vdot(attend(*qkv, causal=causal, how=how), along)  # noqa: E731
        return jax.grad(projected, argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(gradient(how), gradient("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_blocks_skip_most_pairs_that_are_not_attended():
    n = 8 * ROWS
    shapes = [jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)] * 3
    whole, cut = (
        flop_counter.count(functools.partial(attend, causal=True, how=how), *shapes) for how in ("reference", "blocked")
    )
    assert cut / whole == pytest.approx((n + ROWS) / (2 * n))


def test_blocked_keeps_nothing_of_length_queries_times_keys():
    q, k, v, _ = made((1, 2 * ROWS, 2 * ROWS, 2, 2, 4))
    kept = jax.vjp(functools.partial(attend, causal=True, how="blocked"), q, k, v)[1]
    largest = max(np.size(leaf) for leaf in jax.tree.leaves(kept))
    assert largest <= q.size


def test_bf16_is_near_f32():
    shape = (2, 40, 72, 2, 2, 8)
    q, k, v, _ = made(shape)
    for how in ("reference", "blocked"):
        near = attend(*(a.astype(jnp.bfloat16) for a in (q, k, v)), causal=True, how=how)
        assert near.dtype == jnp.bfloat16
        np.testing.assert_allclose(near.astype(jnp.float32), attend(q, k, v, causal=True), rtol=0, atol=0.03)


@pytest.mark.parametrize("T", [4, 6])
def test_fused_fills_queries_up_from_the_left(T, monkeypatch):
    """cuDNN aligns its causal rule top-left; on its shapes and dtype it is called, here by a stand-in of its rule."""
    called = []

    def top_left(q, k, v, *, is_causal, implementation, local_window_size):
        assert local_window_size is None
        called.append((q.shape, implementation))
        assert is_causal and q.shape[1] == k.shape[1]
        return attend(q, k, v, causal=True)

    monkeypatch.setattr(jax.nn, "dot_product_attention", top_left)
    q, k, v, _ = made((2, T, 6, 2, 2, 8), jnp.bfloat16)
    ours = attend(q, k, v, causal=True, how="fused")
    assert called == [((2, 6, 2, 8), "cudnn")]
    np.testing.assert_array_equal(ours, attend(q, k, v, causal=True))
