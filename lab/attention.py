"""Softmax attention, computed in one of several ways that give the same numbers to rounding: one function and one dict
line each. Which one is used is a setting of the execution (lab.execution), never of the run.

Letters: B batch, S keys, T queries, N query heads, K key-value heads, G = N/K queries per key, H head width.

causal: the rule is aligned bottom-right, so query i of T sees keys 0 .. S-T+i. With S = T it is ordinary causal attention;
with keys [memory ; targets] a target sees all of the memory and the targets up to itself.

segments: numbers of the queries (B T) and of the keys (B S); a query sees only keys of its own number. So padding is seen
by padding alone, and documents that are packed in one row do not see each other. A query that would see no key at all
gets a mean of values that nothing may read.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

# Numbers of the queries (B T) and of the keys (B S), whole numbers; None where every query and key are of one.
Segments = tuple[Array, Array] | None
UNSEEN = -1e30  # a score whose weight is exactly 0 beside any other; finite, so that rows without others are no NaN
LANES = 16  # of float32 in a vector register of AVX-512
ROWS = 64  # queries in a block: of 32 to 256 the fastest on the CPUs that were measured (docs/performance.md)


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    segments: Segments = None,
) -> Float[Array, "B T N H"]:
    """Every query-key product is computed, then masked: what `dense` in lab.cost counts, differentiated by JAX.

    The division by the softmax's sum comes after the product with the values, on T*H instead of T*S numbers.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if causal:
        scores_BKGTS = jnp.where(_seen(T, S, S - T), scores_BKGTS, UNSEEN)
    if segments is not None:
        scores_BKGTS = jnp.where(_same(*segments), scores_BKGTS, UNSEEN)
    top_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weight_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
    mixed_BKGTH = jnp.einsum(
        "BKGTS,BSKH->BKGTH", weight_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    out_BKGTH = (mixed_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def blocked(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *, causal: bool, segments: Segments = None) -> Array:
    """Queries in blocks of ROWS, each against the keys that any of its queries sees, so that most pairs that are not
    attended are not computed. The backward pass computes the weights again from the log of their sum (Dao et al. 2022,
    arXiv 2205.14135): nothing of T x S is handed from pass to pass. Of layers that are not scanned XLA finds the scores
    computed twice and keeps them instead, which is faster and takes memory (lab.memory)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKGTH: Array = _blocked(q_BKGTH, k_BKSH, v_BKSH, segments, causal)  # pyright: ignore
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def fused(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *, causal: bool, segments: Segments = None) -> Array:
    """cuDNN's flash attention through jax.nn, where it takes these shapes and dtypes and there are no segments, else `blocked`.

    Its causal rule is aligned top-left: queries that are fewer than the keys are filled up from the left.
    """
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    if segments is not None or q_BTNH.dtype != jnp.bfloat16 or H % 8 or H > 128 or T % 2 or S % 2:
        return blocked(q_BTNH, k_BSKH, v_BSKH, causal=causal, segments=segments)
    if causal and T < S:
        q_BTNH = jnp.concatenate([jnp.zeros((B, S - T, N, H), q_BTNH.dtype), q_BTNH], axis=1)
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=causal, implementation="cudnn")
    return out_BTNH[:, -T:]


ATTENTION: dict[str, Callable[..., Array]] = {"reference": reference, "blocked": blocked, "fused": fused}


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    how: str = "reference",
    segments: Segments = None,
) -> Float[Array, "B T N H"]:
    """What every attention of every structure goes through; `how` is a key of ATTENTION."""
    return ATTENTION[how](q_BTNH, k_BSKH, v_BSKH, causal=causal, segments=segments)


def row_reduce(pair: Callable[[Array, Array], Array], reduce: Callable[..., Array], x: Array) -> Array:
    """`reduce` over the last axis, which is kept with length 1. Halves are joined by `pair` down to LANES numbers: XLA
    does not vectorise a reduction over neighbouring numbers on CPU, and joins of halves it does."""
    while x.shape[-1] % 2 == 0 and x.shape[-1] > LANES:
        half = x.shape[-1] // 2
        x = pair(x[..., :half], x[..., half:])
    return reduce(x, axis=-1, keepdims=True)


def _seen(T: int, S: int, shift: int) -> np.ndarray:
    """[1, 1, 1, T, S]: query i sees keys 0 .. i + shift."""
    return (np.arange(S)[None, :] <= np.arange(T)[:, None] + shift)[None, None, None]


def _same(queries_BT: Array, keys_BS: Array) -> Array:
    """[B, 1, 1, T, S]: whether query and key have one number."""
    return (queries_BT[:, :, None] == keys_BS[:, None, :])[:, None, None]


def _blocks(T: int, S: int, causal: bool) -> list[tuple[slice, int, int]]:
    """(queries, number of keys that they see, shift of their causal rule) of each block."""
    if not causal:
        return [(slice(0, T), S, S)]
    return [(slice(i, min(i + ROWS, T)), S - T + min(i + ROWS, T), S - T + i) for i in range(0, T, ROWS)]


def _scores(q_BKGTH: Array, k_BKSH: Array, shift: int, segments: Segments) -> Array:
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    T, S = scores_BKGTS.shape[-2:]
    if shift < S - 1:
        scores_BKGTS = jnp.where(_seen(T, S, shift), scores_BKGTS, UNSEEN)
    return scores_BKGTS if segments is None else jnp.where(_same(*segments), scores_BKGTS, UNSEEN)


def _of_block(segments: Segments, rows: slice, keys: int) -> Segments:
    return None if segments is None else (segments[0][:, rows], segments[1][:, :keys])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, segments: Segments, causal: bool) -> Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segments, causal)[0]


def _forward(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, segments: Segments, causal: bool):
    q_BKGTH = q_BKGTH * q_BKGTH.shape[-1] ** -0.5
    outs, logs = [], []
    for rows, keys, shift in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2], causal):
        scores = _scores(q_BKGTH[:, :, :, rows], k_BKSH[:, :, :keys], shift, _of_block(segments, rows, keys))
        top = row_reduce(jnp.maximum, jnp.max, scores)
        weights = jnp.exp(scores - top)
        total = row_reduce(jnp.add, jnp.sum, weights)
        mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH[:, :, :keys],
                           preferred_element_type=jnp.float32)  # fmt: skip
        outs.append((mixed / total).astype(q_BKGTH.dtype))
        logs.append(top + jnp.log(total))
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments, out_BKGTH, logs)


def _backward(causal: bool, saved, d_out_BKGTH: Array):
    q_BKGTH, k_BKSH, v_BKSH, segments, out_BKGTH, logs = saved
    S, dtype = k_BKSH.shape[2], q_BKGTH.dtype
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner_BKGT1 = jnp.sum(d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True)
    blocks = _blocks(q_BKGTH.shape[3], S, causal)
    bounds = [0, *(keys for _, keys, _ in blocks)]
    parts = list(itertools.pairwise(bounds))  # of the keys: the first block sees only its own, the last all
    d_q: list[Array] = []
    d_k: list[Any] = [0.0] * len(blocks)
    d_v: list[Any] = [0.0] * len(blocks)
    for index, ((rows, keys, shift), log) in enumerate(zip(blocks, logs, strict=True)):
        q, d_out = q_BKGTH[:, :, :, rows], d_out_BKGTH[:, :, :, rows]
        k, v = k_BKSH[:, :, :keys], v_BKSH[:, :, :keys]
        weights = jnp.exp(_scores(q, k, shift, _of_block(segments, rows, keys)) - log)
        d_weights = product("BKGTH,BKSH->BKGTS", d_out, v)
        d_scores = (weights * (d_weights - inner_BKGT1[:, :, :, rows])).astype(dtype)
        d_q.append(product("BKGTS,BKSH->BKGTH", d_scores, k))
        from_scores = product("BKGTS,BKGTH->BKSH", d_scores, q)
        from_weights = product("BKGTS,BKGTH->BKSH", weights.astype(dtype), d_out)
        for part, (low, high) in enumerate(parts[: index + 1]):
            d_k[part] += from_scores[:, :, low:high]
            d_v[part] += from_weights[:, :, low:high]
    d_q_BKGTH = (jnp.concatenate(d_q, axis=3) * q_BKGTH.shape[-1] ** -0.5).astype(dtype)
    d_k_BKSH, d_v_BKSH = (jnp.concatenate(cut, axis=2) for cut in (d_k, d_v))
    of_segments = jax.tree.map(lambda numbers: np.zeros(numbers.shape, jax.dtypes.float0), segments)
    return d_q_BKGTH, d_k_BKSH.astype(k_BKSH.dtype), d_v_BKSH.astype(v_BKSH.dtype), of_segments


_blocked.defvjp(_forward, _backward)
