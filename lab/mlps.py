"""The MLP, and what can stand between its matrices: one function and one dict line each.

Letters: B batch, T tokens, D model width, F feed-forward width. A tensor's name ends in its shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lab.spec import Options, Shape
from lab.weights import Draw, matmul, matrix


@jax.custom_vjp
def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up, with one pass over memory in each direction."""
    return gate * jax.nn.sigmoid(gate) * up


def _gated_backward(saved, d_out: Array):
    gate, up = saved
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return d_out * up * (share + silu * (1 - share)), d_out * silu


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


def _from_inputs(function: Callable[..., Array]) -> Callable[..., Array]:
    """Kept for the backward pass are its inputs: JAX's derivative of the tanh in gelu would keep four arrays more."""
    return jax.checkpoint(function, prevent_cse=False)


gelu = _from_inputs(jax.nn.gelu)


@_from_inputs
def geglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    return jax.nn.gelu(gate) * up


def relu2(up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    return jnp.square(jax.nn.relu(up))


# What stands between the matrices. Of two: Shazeer 2020 (arXiv 2002.05202), (f(x G) * x U) W. Of one: f(x U) W, where relu2
# is Primer's (So et al. 2021, arXiv 2109.08668). Every gelu is the approximation by tanh.
GATED: dict[str, Callable[[Array, Array], Array]] = {"swiglu": gated, "geglu": geglu}
UNGATED: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "relu": jax.nn.relu, "relu2": relu2}


class MLP(nnx.Module):
    """Three matrices where it is gated, else two; no biases."""

    def __init__(self, shape: Shape, options: Options, *, gain: float, draw: Draw):
        self.kind = options.mlp
        self.gate_DF = matrix(draw, (shape.D, shape.F), shape.D) if options.mlp in GATED else None
        self.up_DF = matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        if self.gate_DF is None:
            inside_BTF = UNGATED[self.kind](matmul(x_BTD, self.up_DF[...]))
        else:
            inside_BTF = GATED[self.kind](matmul(x_BTD, self.gate_DF[...]), matmul(x_BTD, self.up_DF[...]))
        return matmul(inside_BTF, self.down_FD[...])
