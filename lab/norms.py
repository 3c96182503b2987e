"""Norms: one function and one dict line each. All are computed in float32, and scaled by a vector.

Letters: B batch, D width. A tensor's name ends in its shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lab.attention import row_reduce

NORM_EPS = 1e-6


@jax.custom_vjp
def rms_norm(x: Float[Array, "*B D"], scale_D: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """Zhang and Sennrich 2019. The mean square is taken in float32."""
    return _norm_forward(x, scale_D)[0]


def _norm_forward(x: Array, scale_D: Array):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(_mean(jnp.square(x32)) + NORM_EPS)
    return (x32 * inverse * _row(scale_D, x)).astype(x.dtype), (x, inverse, scale_D)


def _norm_backward(saved, d_out: Array):
    """By hand, since JAX would keep what it broadcast on the way."""
    x, inverse, scale_D = saved
    x32, d32 = x.astype(jnp.float32), d_out.astype(jnp.float32)
    d_scale = jnp.sum(d32 * x32 * inverse, axis=range(x.ndim - 1))
    d_normed = d32 * _row(scale_D, x)
    shared = jnp.square(inverse) * _mean(d_normed * x32)
    return (inverse * (d_normed - x32 * shared)).astype(x.dtype), d_scale


rms_norm.defvjp(_norm_forward, _norm_backward)


def layer_norm(x: Float[Array, "*B D"], scale_D: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """Ba et al. 2016, with a scale and no bias: the RMS norm of what differs from the mean."""
    x32 = x.astype(jnp.float32)
    return rms_norm(x32 - _mean(x32), scale_D).astype(x.dtype)


def scale_only(x: Float[Array, "*B D"], scale_D: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """No norm: the learned scale that comes with one."""
    return (x.astype(jnp.float32) * _row(scale_D, x)).astype(x.dtype)


NORMS: dict[str, Callable[[Array, Array], Array]] = {"rms": rms_norm, "layer": layer_norm, "scale": scale_only}


def _mean(x: Array) -> Array:
    return row_reduce(jnp.add, jnp.sum, x) / x.shape[-1]


def _row(scale_D: Array, x: Array) -> Array:
    return scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)
