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

from lab.attention import row_reduce
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

    def queries(self, x_BTD: Array, positions: Positions) -> Array:
        q_BTNH = _to_heads(x_BTD, self.q_DNH[...])
        if self.q_norm_H is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...])
        return rotate(q_BTNH, positions)

    def keys_values(self, x_BSD: Array, positions: Positions) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = _to_heads(x_BSD, self.k_DKH[...]), _to_heads(x_BSD, self.v_DKH[...])
        if self.k_norm_H is not None:
            k_BSKH = rms_norm(k_BSKH, self.k_norm_H[...])
        return rotate(k_BSKH, positions), v_BSKH

    def out(self, mixed_BTNH: Array) -> Array:
        o_NHD = self.o_NHD[...]
        return matmul(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), o_NHD.reshape(-1, o_NHD.shape[-1]))


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
        self.gate_DF = _matrix(draw, (shape.D, shape.F), shape.D) if options.mlp in GATED else None
        self.up_DF = _matrix(draw, (shape.D, shape.F), shape.D)
        self.down_FD = _matrix(draw, (shape.F, shape.D), shape.F, gain)

    def __call__(self, x_BTD: Array) -> Array:
        if self.gate_DF is None:
            inside_BTF = UNGATED[self.kind](matmul(x_BTD, self.up_DF[...]))
        else:
            inside_BTF = GATED[self.kind](matmul(x_BTD, self.gate_DF[...]), matmul(x_BTD, self.up_DF[...]))
        return matmul(inside_BTF, self.down_FD[...])


# Queries [B, T, N, H] -> what they find in a memory, [B, T, N, H].
Read = Callable[[Array], Array]


class Layer(nnx.Module):
    """Self-attention and MLP; `cross` adds what a target stream needs to read a memory in a softmax of its own.

    cross: "none" (the memory, if any, joins the self-attention), "tied" (a second sublayer that reuses the
    self-attention's projections) or "separate" (with projections of its own).

    With norm f and sublayers g (attention, cross-attention, MLP; in a parallel block their sum, as one sublayer):

        pre        x + g(f(x))         and a final norm at the end of the stack
        post       f(x + g(x))         and none: Vaswani et al. 2017
        sandwich   x + f(g(f(x)))      and a final norm: Ding et al. 2021 (CogView), Gemma 2
    """

    def __init__(self, shape: Shape, options: Options, *, cross: str, depth: int, attention: str, draw: Draw):
        # Residual branches start smaller the more there are (GPT-2).
        branches = 2 if cross == "none" else 3
        gain = (branches * depth) ** -0.5
        self.options, self.attention = options, attention

        def norms(*, there: bool = True) -> tuple[nnx.Param | None, nnx.Param | None]:
            """A sublayer's norm (before it, or after the sum), and the second of a sandwich."""
            return _ones(shape.D) if there else None, _ones(shape.D) if there and sandwich else None

        sandwich, serial = options.norm_place == "sandwich", options.block == "serial"
        self.attn_norm_D, self.attn_out_norm_D = norms()
        self.attn = Attention(shape, options, gain=gain, draw=draw)
        self.cross_norm_D, self.cross_out_norm_D = norms(there=serial and cross != "none")
        self.cross = Attention(shape, options, gain=gain, draw=draw) if cross == "separate" else None
        self.mlp_norm_D, self.mlp_out_norm_D = norms(there=serial)
        self.mlp = MLP(shape, options, gain=gain, draw=draw)

    @property
    def reader(self) -> Attention:
        """The projections that turn a memory into keys and values."""
        return self.attn if self.cross is None else self.cross

    def before_attention(self, x_BTD: Array) -> Array:
        """What queries, keys and values are made of."""
        return self._before(x_BTD, self.attn_norm_D)

    def after_attention(
        self,
        x_BnD: Float[Array, "B n D"],
        normed_BnD: Float[Array, "B n D"],
        q_BnNH: Float[Array, "B n N H"],
        mixed_BnNH: Float[Array, "B n N H"],
        read: Read | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B n D"]:
        """The layer's output, from its input, that `before_attention`, and its self-attention's queries and mixed values.

        read: the cross-attention of `separate` and `tied`, of the T last of the n places, whose `positions` are given.
        """
        if self.options.block == "parallel":
            out_BnD = self._outputs(normed_BnD, q_BnNH, mixed_BnNH, read, positions)
            return self._sum(x_BnD, out_BnD, self.attn_norm_D, self.attn_out_norm_D)
        x_BnD = self._sum(x_BnD, self.attn.out(mixed_BnNH), self.attn_norm_D, self.attn_out_norm_D)
        if read is not None:
            assert positions is not None

            def with_memory(y_BTD: Array) -> Array:
                q_BTNH = self.reader.queries(self._before(y_BTD, self.cross_norm_D), positions)
                return self._sum(y_BTD, self.reader.out(read(q_BTNH)), self.cross_norm_D, self.cross_out_norm_D)

            x_BnD = _on_last(positions.shape[-1], with_memory, x_BnD)
        return self._sum(x_BnD, self.mlp(self._before(x_BnD, self.mlp_norm_D)), self.mlp_norm_D, self.mlp_out_norm_D)

    def _outputs(
        self, normed_BnD: Array, q_BnNH: Array, mixed_BnNH: Array, read: Read | None, positions: Positions | None
    ) -> Array:
        """Of a parallel block, the sum of its sublayers' outputs."""
        if read is None:
            return self.attn.out(mixed_BnNH) + self.mlp(normed_BnD)
        assert positions is not None
        T, reader = positions.shape[-1], self.cross
        if reader is None:  # the same queries in two softmaxes, and one product for what both mix
            mixed_BnNH = _on_last(T, lambda mixed: mixed + read(q_BnNH[:, -T:]), mixed_BnNH)
            return self.attn.out(mixed_BnNH) + self.mlp(normed_BnD)
        found_BTD = reader.out(read(reader.queries(normed_BnD[:, -T:], positions)))
        return _on_last(T, lambda out: out + found_BTD, self.attn.out(mixed_BnNH) + self.mlp(normed_BnD))

    def _norm(self, x_BTD: Array, scale: nnx.Param | None) -> Array:
        assert scale is not None
        return NORMS[self.options.norm](x_BTD, scale[...])

    def _before(self, x_BTD: Array, scale: nnx.Param | None) -> Array:
        return x_BTD if self.options.norm_place == "post" else self._norm(x_BTD, scale)

    def _sum(self, x_BTD: Array, out_BTD: Array, scale: nnx.Param | None, second: nnx.Param | None) -> Array:
        """The residual stream with a sublayer's output in it."""
        if self.options.norm_place == "post":
            return self._norm(x_BTD + out_BTD, scale)
        return x_BTD + (out_BTD if second is None else self._norm(out_BTD, second))


def _on_last(T: int, function: Callable[[Array], Array], x: Float[Array, "B n *D"]) -> Float[Array, "B n *D"]:
    """`function` of the T last places; the others as they are."""
    if x.shape[1] == T:
        return function(x)
    last = function(x[:, -T:])
    return jnp.concatenate([x[:, :-T], last], axis=1)
