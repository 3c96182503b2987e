"""Norm, positions, projections, MLP, and the layer that every structure is built from.

Letters: B batch, S keys or input length, T queries or target length, D model width, F feed-forward, N query heads,
K key-value heads, G = N/K queries per key, H head width. A tensor's name ends in its shape.

Parameters are float32 and are cast to the dtype of the activations where they are used; norms, rotations and softmax
are computed in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from lab.attention import Segments, attend, row_reduce
from lab.spec import Options, Shape

ROPE_BASE = 10_000.0
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


def _mean(x: Array) -> Array:
    return row_reduce(jnp.add, jnp.sum, x) / x.shape[-1]


def _row(scale_D: Array, x: Array) -> Array:
    return scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)


# The host's, [T], or a program's, [T] or [B, T].
Positions = np.ndarray | Array
TURNS = 512  # positions of a program are below its square


def rotate(x_BTNH: Float[Array, "B T N H"], positions: Positions) -> Float[Array, "B T N H"]:
    """Rotary positions (Su et al. 2021): channel i turns with channel i + H/2.

    Where positions are the host's, cosines are constants: a compiler that fuses them computes them for every number.
    """
    cosine, sine = _turns(positions, x_BTNH.shape[-1] // 2)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BTNH.dtype)


def _turns(positions: Positions, half: int) -> tuple[Any, Any]:
    """Float32 cosines and sines, [1 or B, T, 1, H/2], of each position's angles.

    A float32 angle of position 10,000 would be off by 1e-3: a program looks up the turn of 512 times a and that of b, which
    the host knows, and puts them together.
    """

    if isinstance(positions, np.ndarray):
        cosine_TH, sine_TH = _known_turns(positions, half)
        return cosine_TH[None, :, None, :], sine_TH[None, :, None, :]
    rows = positions if positions.ndim == 2 else positions[None]
    coarse, fine = _known_turns(np.arange(TURNS) * TURNS, half), _known_turns(np.arange(TURNS), half)
    coarse_c, coarse_s = (jnp.asarray(table)[rows // TURNS][:, :, None] for table in coarse)
    fine_c, fine_s = (jnp.asarray(table)[rows % TURNS][:, :, None] for table in fine)
    return coarse_c * fine_c - coarse_s * fine_s, coarse_s * fine_c + coarse_c * fine_s


def _known_turns(positions_T: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    angle_TH = np.outer(positions_T, ROPE_BASE ** (-np.arange(half) / half))
    return np.cos(angle_TH).astype(np.float32), np.sin(angle_TH).astype(np.float32)


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


def _matrix(draw: Draw, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    return nnx.Param(draw(shape, gain * fan_in**-0.5))


def _ones(width: int) -> nnx.Param:
    return nnx.Param(np.ones(width, np.float32))


def _to_heads(x_BTD: Array, w_DNH: Array) -> Array:
    D, N, H = w_DNH.shape
    return matmul(x_BTD, w_DNH.reshape(D, N * H)).reshape(*x_BTD.shape[:2], N, H)


def _times(x: Array, multiplier: float) -> Array:
    """Of a parametrization (lab.parametrization); 1 leaves no trace in the program."""
    return x if multiplier == 1.0 else x * multiplier


class Attention(nnx.Module):
    """One set of projections, with its own QK-norm. What attends to what is the transformer's business."""

    def __init__(self, shape: Shape, options: Options, *, gain: float, branch: float, draw: Draw):
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.q_DNH = _matrix(draw, (D, N, H), D)
        self.k_DKH = _matrix(draw, (D, K, H), D)
        self.v_DKH = _matrix(draw, (D, K, H), D)
        self.o_NHD = _matrix(draw, (N, H, D), N * H, gain)
        self.q_norm_H = _ones(H) if options.qk_norm else None
        self.k_norm_H = _ones(H) if options.qk_norm else None
        self.branch, self.score = branch, options.parametrization.attention(H)

    def queries(self, x_BTD: Array, positions: Positions) -> Array:
        q_BTNH = _to_heads(x_BTD, self.q_DNH[...])
        if self.q_norm_H is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...])
        return _times(rotate(q_BTNH, positions), self.score)

    def keys_values(self, x_BSD: Array, positions: Positions) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = _to_heads(x_BSD, self.k_DKH[...]), _to_heads(x_BSD, self.v_DKH[...])
        if self.k_norm_H is not None:
            k_BSKH = rms_norm(k_BSKH, self.k_norm_H[...])
        return rotate(k_BSKH, positions), v_BSKH

    def out(self, mixed_BTNH: Array) -> Array:
        o_NHD = self.o_NHD[...]
        out_BTD = matmul(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), o_NHD.reshape(-1, o_NHD.shape[-1]))
        return _times(out_BTD, self.branch)


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


class SwiGLU(nnx.Module):
    """Shazeer 2020: (silu(x G) * x U) W, three matrices."""

    def __init__(self, shape: Shape, *, gain: float, draw: Draw):
        self.gate_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.up_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = _matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF, up_BTF = matmul(x_BTD, self.gate_DF[...]), matmul(x_BTD, self.up_DF[...])
        return matmul(gated(gate_BTF, up_BTF), self.down_FD[...])


class Gelu(nnx.Module):
    """gelu(x U) W, two matrices."""

    def __init__(self, shape: Shape, *, gain: float, draw: Draw):
        self.up_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = _matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        return matmul(jax.nn.gelu(matmul(x_BTD, self.up_DF[...])), self.down_FD[...])


MLPS: dict[str, Callable[..., nnx.Module]] = {"swiglu": SwiGLU, "gelu": Gelu}


class Layer(nnx.Module):
    """Pre-norm self-attention and MLP; `cross` adds what a target stream needs to read a memory of its own softmax.

    cross: "none" (the memory, if any, joins the self-attention), "tied" (a second sublayer with its own norm that
    reuses the self-attention's projections) or "separate" (with projections of its own).
    """

    def __init__(self, shape: Shape, options: Options, *, cross: str, depth: int, attention: str, draw: Draw):
        # Residual branches start smaller the more there are (GPT-2).
        branches = 2 if cross == "none" else 3
        gain = (branches * options.parametrization.branch_depth(depth)) ** -0.5
        self.branch = 1 / options.parametrization.depth(depth)
        self.attention = attention
        self.attn_norm_D = _ones(shape.D)
        self.attn = Attention(shape, options, gain=gain, branch=self.branch, draw=draw)
        self.cross_norm_D = _ones(shape.D) if cross != "none" else None
        own = cross == "separate"
        self.cross = Attention(shape, options, gain=gain, branch=self.branch, draw=draw) if own else None
        self.mlp_norm_D = _ones(shape.D)
        self.mlp = MLPS[options.mlp](shape, gain=gain, draw=draw)

    @property
    def reader(self) -> Attention:
        """The projections that turn a memory into keys and values."""
        return self.attn if self.cross is None else self.cross

    def before_attention(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.attn_norm_D[...])

    def feed_forward(self, x_BTD: Array) -> Array:
        return x_BTD + _times(self.mlp(rms_norm(x_BTD, self.mlp_norm_D[...])), self.branch)

    def read(
        self,
        y_BTD: Array,
        memory_keys_values: tuple[Array, Array],
        positions: Positions,
        segments: Segments = None,
    ) -> Array:
        """The cross-attention sublayer of `separate` and `tied`: every target sees the whole memory."""
        assert self.cross_norm_D is not None
        q_BTNH = self.reader.queries(rms_norm(y_BTD, self.cross_norm_D[...]), positions)
        mixed_BTNH = attend(q_BTNH, *memory_keys_values, causal=False, how=self.attention, segments=segments)
        return y_BTD + self.reader.out(mixed_BTNH)
