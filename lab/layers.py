"""Norm, positions, attention, MLP, and the layer that every structure is built from.

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
from jaxtyping import Float, Int

from lab.spec import Options, Shape

ROPE_BASE = 10_000.0
NORM_EPS = 1e-6


def rms_norm(x: Float[Array, "*B D"], scale_D: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """Zhang and Sennrich 2019. The mean square is taken in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)
    return (x32 * (inverse * jnp.broadcast_to(scale_D, x.shape))).astype(x.dtype)


def rotate(x_BTNH: Float[Array, "B T N H"], positions_T: Int[Array, "T"]) -> Float[Array, "B T N H"]:
    """Rotary positions (Su et al. 2021): channel i turns with channel i + H/2."""
    half = x_BTNH.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_T.astype(jnp.float32)[None, :, None, None] * frequency[None, None, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BTNH.dtype)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """Softmax attention, the reference path: every query-key product is computed, then masked.

    causal: the rule is aligned bottom-right, so query i of T sees keys 0 .. S-T+i. With S = T it is ordinary causal
    attention; with keys [memory ; targets] a target sees all of the memory and the targets up to itself.
    The division by the softmax's sum comes after the product with the values, on T*H instead of T*S numbers.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if causal:
        seen_TS = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + (S - T)
        scores_BKGTS = jnp.where(seen_TS[None, None, None], scores_BKGTS, -jnp.inf)
    top_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weight_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
    mixed_BKGTH = jnp.einsum(
        "BKGTS,BSKH->BKGTH", weight_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    out_BKGTH = (mixed_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# Draws normal numbers of a shape and a standard deviation. Initial parameters come from the host's generator and not
# from a compiled program: a program that draws them takes as long to compile as the training step.
Draw = Callable[[tuple[int, ...], float], Any]


def _matrix(draw: Draw, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    return nnx.Param(draw(shape, gain * fan_in**-0.5))


def _ones(width: int) -> nnx.Param:
    return nnx.Param(np.ones(width, np.float32))


class Attention(nnx.Module):
    """One set of projections, with its own QK-norm. What attends to what is the transformer's business."""

    def __init__(self, shape: Shape, options: Options, *, gain: float, draw: Draw):
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.q_DNH = _matrix(draw, (D, N, H), D)
        self.k_DKH = _matrix(draw, (D, K, H), D)
        self.v_DKH = _matrix(draw, (D, K, H), D)
        self.o_NHD = _matrix(draw, (N, H, D), N * H, gain)
        self.q_norm_H = _ones(H) if options.qk_norm else None
        self.k_norm_H = _ones(H) if options.qk_norm else None

    def queries(self, x_BTD: Array, positions_T: Array) -> Array:
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.q_DNH[...].astype(x_BTD.dtype))
        if self.q_norm_H is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...])
        return rotate(q_BTNH, positions_T)

    def keys_values(self, x_BSD: Array, positions_S: Array) -> tuple[Array, Array]:
        k_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BSD, self.k_DKH[...].astype(x_BSD.dtype))
        v_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BSD, self.v_DKH[...].astype(x_BSD.dtype))
        if self.k_norm_H is not None:
            k_BSKH = rms_norm(k_BSKH, self.k_norm_H[...])
        return rotate(k_BSKH, positions_S), v_BSKH

    def out(self, mixed_BTNH: Array) -> Array:
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, self.o_NHD[...].astype(mixed_BTNH.dtype))


class SwiGLU(nnx.Module):
    """Shazeer 2020: (silu(x G) * x U) W, three matrices."""

    def __init__(self, shape: Shape, *, gain: float, draw: Draw):
        self.gate_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.up_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = _matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.gate_DF[...].astype(x_BTD.dtype))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.up_DF[...].astype(x_BTD.dtype))
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_FD[...].astype(x_BTD.dtype))


class Gelu(nnx.Module):
    """gelu(x U) W, two matrices."""

    def __init__(self, shape: Shape, *, gain: float, draw: Draw):
        self.up_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = _matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.up_DF[...].astype(x_BTD.dtype))
        return jnp.einsum("BTF,FD->BTD", jax.nn.gelu(up_BTF), self.down_FD[...].astype(x_BTD.dtype))


MLPS: dict[str, Callable[..., nnx.Module]] = {"swiglu": SwiGLU, "gelu": Gelu}


class Layer(nnx.Module):
    """Pre-norm self-attention and MLP; `cross` adds what a target stream needs to read a memory of its own softmax.

    cross: "none" (the memory, if any, joins the self-attention), "tied" (a second sublayer with its own norm that
    reuses the self-attention's projections) or "separate" (with projections of its own).
    """

    def __init__(self, shape: Shape, options: Options, *, cross: str, depth: int, draw: Draw):
        # Residual branches start smaller the more there are (GPT-2).
        branches = 2 if cross == "none" else 3
        gain = (branches * depth) ** -0.5
        self.attn_norm_D = _ones(shape.D)
        self.attn = Attention(shape, options, gain=gain, draw=draw)
        self.cross_norm_D = _ones(shape.D) if cross != "none" else None
        self.cross = Attention(shape, options, gain=gain, draw=draw) if cross == "separate" else None
        self.mlp_norm_D = _ones(shape.D)
        self.mlp = MLPS[options.mlp](shape, gain=gain, draw=draw)

    @property
    def reader(self) -> Attention:
        """The projections that turn a memory into keys and values."""
        return self.attn if self.cross is None else self.cross

    def before_attention(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.attn_norm_D[...])

    def feed_forward(self, x_BTD: Array) -> Array:
        return x_BTD + self.mlp(rms_norm(x_BTD, self.mlp_norm_D[...]))

    def read(self, y_BTD: Array, memory_keys_values: tuple[Array, Array], positions_T: Array) -> Array:
        """The cross-attention sublayer of `separate` and `tied`: every target sees the whole memory."""
        assert self.cross_norm_D is not None
        q_BTNH = self.reader.queries(rms_norm(y_BTD, self.cross_norm_D[...]), positions_T)
        return y_BTD + self.reader.out(attend(q_BTNH, *memory_keys_values, causal=False))
