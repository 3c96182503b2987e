"""What one layer does with both streams: inputs x alone, targets y over a memory, and the two as one through shared weights.

Letters: B batch, S input length, T target length, n = S + T places of both, D model width, N query heads, R relative distances.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.attention import Segments
from lab.layers import Layer, Mixing


def within_inputs(segments: Segments) -> Segments:
    """`segments` are the numbers of the inputs (B S) and of the targets (B T)."""
    return None if segments is None else (segments[0], segments[0])


def _over_both(segments: Segments) -> Segments:
    """Of targets over [inputs ; targets]."""
    return None if segments is None else (segments[1], jnp.concatenate(segments, axis=1))


def _over_all(segments: Segments) -> Segments:
    """Of [inputs ; targets] over themselves."""
    if segments is None:
        return None
    numbers = jnp.concatenate(segments, axis=1)
    return numbers, numbers


def _reading(segments: Segments) -> Segments:
    """Of targets over the inputs alone."""
    return None if segments is None else (segments[1], segments[0])


def self_layer(
    layer: Layer, x_BSD: Array, positions_S: np.ndarray, segments: Segments, relative_NR: Array | None, *, causal: bool
) -> Array:
    normed = layer.before_attention(x_BSD)
    if isinstance(layer.attn, Mixing):
        return layer.after_attention(x_BSD, normed, None, layer.mixed(normed, normed.shape[1], causal=causal))
    q = layer.attn.queries(normed, positions_S)
    keys_values = layer.attn.keys_values(normed, positions_S)
    mixed = layer.attend_inputs(q, keys_values, segments, relative_NR, causal=causal)
    return layer.after_attention(x_BSD, normed, q, mixed)


def target_layer(
    layer: Layer,
    y_BTD: Array,
    memory: tuple[Array, Array],
    positions_T: np.ndarray,
    segments: Segments,
    relative_NR: Array | None,
    *,
    merged: bool,
) -> Array:
    normed = layer.before_attention(y_BTD)
    q = layer.attn.queries(normed, positions_T)
    own = layer.attn.keys_values(normed, positions_T)
    if merged:
        own = _join(memory, own)
    over = _over_both(segments) if merged else None  # targets by themselves are of one number
    mixed = layer.attend(q, own, over, relative_NR)
    read = None if merged else layer.reads(memory, _reading(segments), relative_NR)
    return layer.after_attention(y_BTD, normed, q, mixed, read, positions_T)


def joint_layer(
    layer: Layer,
    z_BnD: Array,
    positions_n: np.ndarray,
    S: int,
    segments: Segments,
    relative_NR: Array | None,
    *,
    merged: bool,
    causal: bool,
) -> Array:
    """One shared layer over both streams z = [x ; y], each projection once over all n = S+T positions."""
    normed_BnD = layer.before_attention(z_BnD)
    if isinstance(layer.attn, Mixing):
        return layer.after_attention(z_BnD, normed_BnD, None, layer.mixed(normed_BnD, S, causal=causal))
    q, (k, v) = layer.attn.queries(normed_BnD, positions_n), layer.attn.keys_values(normed_BnD, positions_n)
    memory = None if layer.cross is None else layer.cross.keys_values(normed_BnD[:, :S], positions_n[:S])
    if merged and causal and layer.attention != "reference":  # one rule for both streams; the reference does not skip
        mixed = layer.attend(q, (k, v), _over_all(segments), relative_NR)
    else:
        among = within_inputs(segments)
        mixed_x = layer.attend_inputs(q[:, :S], (k[:, :S], v[:, :S]), among, relative_NR, causal=causal)
        # The keys and values of a merged softmax are those of both streams, as they lie.
        first = 0 if merged else S
        over = _over_both(segments) if merged else None
        mixed_y = layer.attend(q[:, S:], (k[:, first:], v[:, first:]), over, relative_NR)
        mixed = jnp.concatenate([mixed_x, mixed_y], axis=1)
    read = None if merged else layer.reads(memory or (k[:, :S], v[:, :S]), _reading(segments), relative_NR)
    return layer.after_attention(z_BnD, normed_BnD, q, mixed, read, positions_n[S:])


def last_joint_layer(
    layer: Layer,
    z_BnD: Array,
    positions_n: np.ndarray,
    S: int,
    segments: Segments,
    relative_NR: Array | None,
    *,
    merged: bool,
) -> Array:
    """A shared layer whose inputs nothing reads: of x its keys and values alone."""
    normed_BnD = layer.before_attention(z_BnD)
    positions_T, normed_BTD, y_BTD = positions_n[S:], normed_BnD[:, S:], z_BnD[:, S:]
    if isinstance(layer.attn, Mixing):
        mixed_BTNH = layer.mixed(normed_BnD, S, causal=True, targets_alone=True)
        return layer.after_attention(y_BTD, normed_BTD, None, mixed_BTNH)
    if layer.cross is None:
        k, v = layer.attn.keys_values(normed_BnD, positions_n)
        memory, own = (k[:, :S], v[:, :S]), (k, v) if merged else (k[:, S:], v[:, S:])
    else:
        memory = layer.cross.keys_values(normed_BnD[:, :S], positions_n[:S])
        own = layer.attn.keys_values(normed_BTD, positions_T)
    q, over = layer.attn.queries(normed_BTD, positions_T), _over_both(segments) if merged else None
    mixed = layer.attend(q, own, over, relative_NR)
    read = None if merged else layer.reads(memory, _reading(segments), relative_NR)
    return layer.after_attention(y_BTD, normed_BTD, q, mixed, read, positions_T)


def _join(memory: tuple[Array, Array], own: tuple[Array, Array]) -> tuple[Array, Array]:
    """Keys and values of [memory ; targets]."""
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(memory, own, strict=True))
    return k, v
