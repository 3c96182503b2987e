"""Products with parameters, and how these are drawn.

Letters: B batch, M rows of all, D what goes in, F what comes out. A tensor's name ends in its shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float


@jax.custom_vjp
def matmul(x: Float[Array, "*B D"], w_DF: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """The product with a float32 matrix, which is cast to the dtype of x; its gradient is summed in float32.

    The gradient's products are written out over flat rows: of more dimensions XLA makes copies that are transposed in
    strides, fused with the elementwise work before them (a quarter of a step on CPU).
    """
    return jnp.einsum("...D,DF->...F", x, w_DF.astype(x.dtype))


def _matmul_forward(x: Array, w_DF: Array):
    return matmul(x, w_DF), (x, w_DF)


def _matmul_backward(saved, d_out: Array):
    x, w_DF = saved
    d_x = jnp.einsum("...F,DF->...D", d_out, w_DF.astype(x.dtype))
    x_MD, d_out_MF = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_w = jnp.einsum("MD,MF->DF", x_MD, d_out_MF, preferred_element_type=jnp.float32)
    return d_x, d_w.astype(w_DF.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


# Draws normal numbers of a shape and a standard deviation. Initial parameters come from the host's generator and not
# from a compiled program: a program that draws them takes as long to compile as the training step.
Draw = Callable[[tuple[int, ...], float], Any]


def matrix(draw: Draw, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    return nnx.Param(draw(shape, gain * fan_in**-0.5))


def ones(width: int) -> nnx.Param:
    return nnx.Param(np.ones(width, np.float32))
