"""Softmax attention, computed in one of several ways that give the same numbers to rounding: one function and one dict
line each. Which one is used is a setting of the execution (lab.execution), never of the run.

Letters: B batch, S keys, T queries, N query heads, K key-value heads, G = N/K queries per key, H head width.

causal: the rule is aligned bottom-right, so query i of T sees keys 0 .. S-T+i. With S = T it is ordinary causal attention;
with keys [memory ; targets] a target sees all of the memory and the targets up to itself. turn, window: as in lab.seen.Rule,
query i standing where key S-T+i does.

relative_NR: a number for each distance -(n-1) .. n-1 between query and key, R = 2n-1, that each head adds to its scores.
first: where the first query stands among the keys, for distances alone; S-T unless given.

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

from lab.seen import Rule

# Numbers of the queries (B T) and of the keys (B S), whole numbers; None where every query and key are of one.
Segments = tuple[Array, Array] | None
UNSEEN = -1e30  # a score whose weight is exactly 0 beside any other; finite, so that rows without others are no NaN
LANES = 16  # of float32 in a vector register of AVX-512
ROWS = 64  # queries in a block: of 32 to 256 the fastest on the CPUs that were measured (docs/performance.md)


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    rule: Rule,
    segments: Segments,
    relative_NR: Array | None,
    first: int,
) -> Float[Array, "B T N H"]:
    """Every query-key product is computed, then masked: what `dense` in lab.cost counts, differentiated by JAX.

    The division by the softmax's sum comes after the product with the values, on T*H instead of T*S numbers.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if relative_NR is not None:
        scores_BKGTS += _by_head(relative_NR, K, first, slice(0, T), slice(0, S))[None]
    if rule.causal or rule.window is not None:
        scores_BKGTS = jnp.where(rule.mask(np.arange(S - T, S), np.arange(S))[None, None, None], scores_BKGTS, UNSEEN)
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


def blocked(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    rule: Rule,
    segments: Segments,
    relative_NR: Array | None,
    first: int,
) -> Array:
    """Queries in blocks of ROWS, each against the keys that any of its queries sees, so that most pairs that are not
    attended are not computed. The backward pass computes the weights again from the log of their sum (Dao et al. 2022,
    arXiv 2205.14135): nothing of T x S is handed from pass to pass. Of layers that are not scanned XLA finds the scores
    computed twice and keeps them instead, which is faster and takes memory (lab.memory)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKGTH: Array = _blocked(q_BKGTH, k_BKSH, v_BKSH, segments, relative_NR, rule, first)  # pyright: ignore
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def fused(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    rule: Rule,
    segments: Segments,
    relative_NR: Array | None,
    first: int,
) -> Array:
    """cuDNN's flash attention through jax.nn, where it takes these shapes and dtypes and this rule, else `blocked`. It takes no
    segments, no turns, no window but a causal one; what is added to scores it would want for every pair, from memory.

    Its causal rule is aligned top-left: queries that are fewer than the keys are filled up from the left.
    """
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    plain = segments is None and relative_NR is None and rule.turn == 1 and (rule.causal or rule.window is None)
    if not plain or q_BTNH.dtype != jnp.bfloat16 or H % 8 or H > 128 or T % 2 or S % 2:
        return blocked(q_BTNH, k_BSKH, v_BSKH, rule, segments, relative_NR, first)
    if rule.causal and T < S:
        q_BTNH = jnp.concatenate([jnp.zeros((B, S - T, N, H), q_BTNH.dtype), q_BTNH], axis=1)
    window = None if rule.window is None else (rule.window - 1, 0)  # of keys behind a query, itself not counted
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=rule.causal, implementation="cudnn", local_window_size=window
    )
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
    turn: int = 1,
    window: int | None = None,
    relative_NR: Float[Array, "N R"] | None = None,
    first: int | None = None,
) -> Float[Array, "B T N H"]:
    """What every attention of every structure goes through; `how` is a key of ATTENTION."""
    rule = Rule(causal=causal, turn=turn, window=window)
    first = k_BSKH.shape[1] - q_BTNH.shape[1] if first is None else first
    return ATTENTION[how](q_BTNH, k_BSKH, v_BSKH, rule, segments, relative_NR, first)


def mix(
    mix_NTS: Float[Array, "N T S"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    how: str = "reference",
    turn: int = 1,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Weights that are given, and the same for all tokens, in place of a softmax's; 0 where the rule sees nothing. The reference
    computes every pair, all others skip blocks."""
    (N, T, S), (B, _, K, H) = mix_NTS.shape, v_BSKH.shape
    rule = Rule(causal=causal, turn=turn, window=window)
    outs = []
    for rows, keys, seen_TS in (
        [_block(slice(0, T), slice(0, S), S - T, rule)] if how == "reference" else _blocks(T, S, rule)
    ):
        weights = mix_NTS[:, rows, keys]
        if seen_TS is not None:
            weights = jnp.where(seen_TS[None], weights, 0.0)
        weights = weights.astype(v_BSKH.dtype).reshape(K, N // K, *weights.shape[1:])
        outs.append(jnp.einsum("KGTS,BSKH->BTKGH", weights, v_BSKH[:, keys], preferred_element_type=jnp.float32))
    return jnp.concatenate(outs, axis=1).reshape(B, T, N, H).astype(v_BSKH.dtype)


def row_reduce(pair: Callable[[Array, Array], Array], reduce: Callable[..., Array], x: Array) -> Array:
    """`reduce` over the last axis, which is kept with length 1. Halves are joined by `pair` down to LANES numbers: XLA
    does not vectorise a reduction over neighbouring numbers on CPU, and joins of halves it does."""
    while x.shape[-1] % 2 == 0 and x.shape[-1] > LANES:
        half = x.shape[-1] // 2
        x = pair(x[..., :half], x[..., half:])
    return reduce(x, axis=-1, keepdims=True)


def _same(queries_BT: Array, keys_BS: Array) -> Array:
    """[B, 1, 1, T, S]: whether query and key have one number."""
    return (queries_BT[:, :, None] == keys_BS[:, None, :])[:, None, None]


def _by_head(relative_NR: Array, K: int, first: int, rows: slice, keys: slice) -> Array:
    """[K, G, t, s]: what is added to the scores of these queries and keys. Copies of the numbers from the farthest key behind
    to the farthest ahead, laid end to end and cut one short, begin one further left in each row: no look-up, whose gradient would
    be a sum one by one."""
    t, s = rows.stop - rows.start, keys.stop - keys.start
    low = first + rows.start - (keys.stop - 1) + relative_NR.shape[1] // 2
    span = t + s - 1  # distances that there are
    ahead_first_NR = jnp.flip(relative_NR[:, low : low + span], axis=1)
    if t > 1:
        ahead_first_NR = jnp.tile(ahead_first_NR, (1, t))[:, t - 1 : t - 1 + t * (span - 1)]
        ahead_first_NR = ahead_first_NR.reshape(-1, t, span - 1)[:, :, :s]
    return ahead_first_NR.reshape(K, -1, t, s)


# Queries, the range of keys that they see, and where they see not all of it which [t, s].
Block = tuple[slice, slice, np.ndarray | None]


def _block(rows: slice, keys: slice, shift: int, rule: Rule) -> Block:
    seen_TS = rule.mask(np.arange(shift + rows.start, shift + rows.stop), np.arange(keys.start, keys.stop))
    return rows, keys, None if seen_TS.all() else seen_TS


def _blocks(T: int, S: int, rule: Rule) -> list[Block]:
    """Their keys begin and end where other blocks' do, as far as a rule allows."""
    if not rule.causal and rule.window is None:
        return [(slice(0, T), slice(0, S), None)]
    found, shift = [], S - T
    for i in range(0, T, ROWS):
        rows = slice(i, min(i + ROWS, T))
        low, high = rule.reach(shift + i, shift + rows.stop - 1, S)
        low = max(0, low - (low - shift) % ROWS)
        if not rule.causal:
            high = min(S, high + (shift - high) % ROWS)
        found.append(_block(rows, slice(low, high), shift, rule))
    return found


def _scores(
    q_BKGTH: Array, k_BKSH: Array, block: Block, segments: Segments, relative_NR: Array | None, first: int
) -> Array:
    rows, keys, seen_TS = block
    of_block = None if segments is None else (segments[0][:, rows], segments[1][:, keys])
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    if relative_NR is not None:
        scores_BKGTS += _by_head(relative_NR, k_BKSH.shape[1], first, rows, keys)[None]
    if seen_TS is not None:
        scores_BKGTS = jnp.where(seen_TS[None, None, None], scores_BKGTS, UNSEEN)
    return scores_BKGTS if of_block is None else jnp.where(_same(*of_block), scores_BKGTS, UNSEEN)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked(
    q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, segments: Segments, relative_NR: Array | None, rule: Rule, first: int
) -> Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segments, relative_NR, rule, first)[0]


def _forward(q_BKGTH, k_BKSH, v_BKSH, segments, relative_NR, rule: Rule, first: int):
    q_BKGTH = q_BKGTH * q_BKGTH.shape[-1] ** -0.5
    outs, logs = [], []
    for block in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2], rule):
        rows, keys, _ = block
        scores = _scores(q_BKGTH[:, :, :, rows], k_BKSH[:, :, keys], block, segments, relative_NR, first)
        top = row_reduce(jnp.maximum, jnp.max, scores)
        weights = jnp.exp(scores - top)
        total = row_reduce(jnp.add, jnp.sum, weights)
        mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH[:, :, keys],
                           preferred_element_type=jnp.float32)  # fmt: skip
        outs.append((mixed / total).astype(q_BKGTH.dtype))
        logs.append(top + jnp.log(total))
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments, relative_NR, out_BKGTH, logs)


def _backward(rule: Rule, first: int, saved, d_out_BKGTH: Array):
    q_BKGTH, k_BKSH, v_BKSH, segments, relative_NR, out_BKGTH, logs = saved
    (B, K, S, H), dtype = k_BKSH.shape, q_BKGTH.dtype
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner_BKGT1 = jnp.sum(d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True)
    blocks = _blocks(q_BKGTH.shape[3], S, rule)
    bounds = sorted({0, S, *(bound for _, keys, _ in blocks for bound in (keys.start, keys.stop))})
    parts = list(itertools.pairwise(bounds))  # of the keys: each block sees some of them whole, and no other
    d_q: list[Array] = []
    d_k: list[Any] = [0.0] * len(parts)
    d_v: list[Any] = [0.0] * len(parts)
    d_relative = None if relative_NR is None else jnp.zeros_like(relative_NR)
    for block, log in zip(blocks, logs, strict=True):
        rows, keys, _ = block
        q, d_out = q_BKGTH[:, :, :, rows], d_out_BKGTH[:, :, :, rows]
        k, v = k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        weights = jnp.exp(_scores(q, k, block, segments, relative_NR, first) - log)
        d_weights = product("BKGTH,BKSH->BKGTS", d_out, v)
        d_scores = weights * (d_weights - inner_BKGT1[:, :, :, rows])
        if relative_NR is not None:
            added = jax.vjp(lambda r, rows=rows, keys=keys: _by_head(r, K, first, rows, keys), relative_NR)[1]
            d_relative += added(jnp.sum(d_scores, axis=0))[0]
        d_scores = d_scores.astype(dtype)
        d_q.append(product("BKGTS,BKSH->BKGTH", d_scores, k))
        from_scores = product("BKGTS,BKGTH->BKSH", d_scores, q)
        from_weights = product("BKGTS,BKGTH->BKSH", weights.astype(dtype), d_out)
        for part, (low, high) in enumerate(parts):
            if keys.start <= low and high <= keys.stop:
                d_k[part] += from_scores[:, :, low - keys.start : high - keys.start]
                d_v[part] += from_weights[:, :, low - keys.start : high - keys.start]
    d_q_BKGTH = (jnp.concatenate(d_q, axis=3) * q_BKGTH.shape[-1] ** -0.5).astype(dtype)
    d_k_BKSH, d_v_BKSH = (
        jnp.concatenate(
            [jnp.broadcast_to(d, (B, K, high - low, H)) for d, (low, high) in zip(cut, parts, strict=True)], axis=2
        )
        for cut in (d_k, d_v)
    )
    of_segments = jax.tree.map(lambda numbers: np.zeros(numbers.shape, jax.dtypes.float0), segments)
    return d_q_BKGTH, d_k_BKSH.astype(k_BKSH.dtype), d_v_BKSH.astype(v_BKSH.dtype), of_segments, d_relative


_blocked.defvjp(_forward, _backward)
