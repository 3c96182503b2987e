"""Attention's projections, what can stand in their place, and the layer that every structure is built from.

Letters: B batch, S keys or input length, T queries or target length, n places of a layer's stream, D model width, F feed-forward,
N query heads, K key-value heads, H head width, A places that a mixing matrix has, R relative distances. A tensor's name ends in
its shape.

Parameters are float32 and are cast to the dtype of the activations where they are used; norms, rotations and softmax
are computed in float32.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from lab.attention import Segments, attend, mix
from lab.mlps import MLP
from lab.norms import NORMS, rms_norm
from lab.positions import CROSS, ROTARY, Positions
from lab.spec import Options, Shape
from lab.weights import Draw, matmul, matrix, ones


def _to_heads(x_BTD: Array, w_DNH: Array) -> Array:
    D, N, H = w_DNH.shape
    return matmul(x_BTD, w_DNH.reshape(D, N * H)).reshape(*x_BTD.shape[:2], N, H)


def _times(x: Array, multiplier: float) -> Array:
    """Of a parametrization (lab.parametrization); 1 leaves no trace in the program."""
    return x if multiplier == 1.0 else x * multiplier


def _from_heads(mixed_BTNH: Array, o_NHD: Array) -> Array:
    return matmul(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), o_NHD.reshape(-1, o_NHD.shape[-1]))


class Attention(nnx.Module):
    """One set of projections, with its own QK-norm. What attends to what is the transformer's business."""

    def __init__(self, shape: Shape, options: Options, *, gain: float, draw: Draw, places: int = 0):
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.encoding, self.score = options.encoding, options.parametrization.attention(H)
        self.q_DNH = matrix(draw, (D, N, H), D)
        self.k_DKH = matrix(draw, (D, K, H), D)
        self.v_DKH = matrix(draw, (D, K, H), D)
        self.o_NHD = matrix(draw, (N, H, D), N * H, gain)
        self.q_norm_H = ones(H) if options.qk_norm else None
        self.k_norm_H = ones(H) if options.qk_norm else None

    def queries(self, x_BTD: Array, positions: Positions) -> Array:
        q_BTNH = _to_heads(x_BTD, self.q_DNH[...])
        if self.q_norm_H is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...])
        return _times(self._turned(q_BTNH, positions), self.score)

    def keys_values(self, x_BSD: Array, positions: Positions) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = _to_heads(x_BSD, self.k_DKH[...]), _to_heads(x_BSD, self.v_DKH[...])
        if self.k_norm_H is not None:
            k_BSKH = rms_norm(k_BSKH, self.k_norm_H[...])
        return self._turned(k_BSKH, positions), v_BSKH

    def out(self, mixed_BTNH: Array) -> Array:
        return _from_heads(mixed_BTNH, self.o_NHD[...])

    def _turned(self, x_BTNH: Array, positions: Positions) -> Array:
        turn = ROTARY.get(self.encoding)
        return x_BTNH if turn is None else turn(x_BTNH, positions)


class Mixing(nnx.Module):
    """A learned matrix for each head in place of queries and keys: what place i takes from place j is one number, whatever
    tokens stand there. MLP-Mixer's mixing of tokens (Tolstikhin et al. 2021, arXiv 2105.01601) without its second layer, gMLP's
    spatial projection (Liu et al. 2021, arXiv 2105.08050) in attention's place.

    Rows are not normalised: entries are weights like any others, of either sign, drawn with the variance of a matrix of fan-in A,
    so that a row of j entries starts with j/A of the values' variance and none with more. Entries that no token may see are in
    the tree, and 0 wherever it is used.
    """

    def __init__(self, shape: Shape, options: Options, *, gain: float, draw: Draw, places: int):
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.v_DKH = matrix(draw, (D, K, H), D)
        self.mix_NAA = matrix(draw, (N, places, places), places)
        self.o_NHD = matrix(draw, (N, H, D), N * H, gain)

    def keys_values(self, x_BSD: Array, positions: Positions) -> tuple[Array, Array]:
        """Keys of no width: a cache of them is a cache of values."""
        v_BSKH = _to_heads(x_BSD, self.v_DKH[...])
        return v_BSKH[..., :0], v_BSKH

    def out(self, mixed_BTNH: Array) -> Array:
        return _from_heads(mixed_BTNH, self.o_NHD[...])

    def weights(self, queries: Positions, keys: Positions) -> Array:
        """[..., N, T, S] of places [..., T] and [..., S]; those beyond the matrix, which nothing may read, are its last."""
        most = self.mix_NAA[...].shape[-1] - 1
        rows, columns = jnp.minimum(queries, most), jnp.minimum(keys, most)
        return jnp.moveaxis(self.mix_NAA[...][:, rows[..., :, None], columns[..., None, :]], 0, -3)


MIXINGS: dict[str, Callable[..., nnx.Module]] = {"attention": Attention, "dense": Mixing}


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

    def __init__(
        self, shape: Shape, options: Options, *, cross: str, depth: int, attention: str, draw: Draw, places: int = 0
    ):
        # Residual branches start smaller the more there are (GPT-2).
        branches = 2 if cross == "none" else 3
        gain = (branches * options.parametrization.branch_depth(depth)) ** -0.5
        self.branch = 1 / options.parametrization.depth(depth)
        self.options, self.attention = options, attention

        def norms(*, there: bool = True) -> tuple[nnx.Param | None, nnx.Param | None]:
            """A sublayer's norm (before it, or after the sum), and the second of a sandwich."""
            return ones(shape.D) if there else None, ones(shape.D) if there and sandwich else None

        sandwich, serial = options.norm_place == "sandwich", options.block == "serial"
        self.attn_norm_D, self.attn_out_norm_D = norms()
        self.attn: Any = MIXINGS[options.mixing](shape, options, gain=gain, draw=draw, places=places)
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

    def attend(
        self,
        q_BTNH: Array,
        keys_values: tuple[Array, Array],
        segments: Segments,
        relative_NR: Array | None,
        *,
        causal: bool = True,
        turn: int = 1,
    ) -> Array:
        """Of targets over what they see, and of both streams under one causal rule."""
        return attend(q_BTNH, *keys_values, causal=causal, how=self.attention, segments=segments, turn=turn,
                      window=self.options.window, relative_NR=relative_NR)  # fmt: skip

    def attend_inputs(
        self,
        q_BSNH: Array,
        keys_values: tuple[Array, Array],
        segments: Segments,
        relative_NR: Array | None,
        *,
        causal: bool,
    ) -> Array:
        """Of inputs among themselves."""
        turn = self.options.turn
        causal = causal or turn is not None
        return self.attend(q_BSNH, keys_values, segments, relative_NR, causal=causal, turn=turn or 1)

    def mixed(self, normed_BnD: Array, S: int, *, causal: bool, targets_alone: bool = False) -> Array:
        """What learned matrices mix of n = S + T tokens, S of them inputs: of all, or of the targets alone."""
        _, v_BnKH = self.attn.keys_values(normed_BnD, np.arange(normed_BnD.shape[1]))
        how, n, mix_NAA = (
            {"how": self.attention, "window": self.options.window},
            v_BnKH.shape[1],
            self.attn.mix_NAA[...],
        )
        parts = []
        if not targets_alone:
            turn = self.options.turn
            parts.append(
                mix(mix_NAA[:, :S, :S], v_BnKH[:, :S], causal=causal or turn is not None, turn=turn or 1, **how)
            )
        if n > S:
            parts.append(mix(mix_NAA[:, S:n, :n], v_BnKH, causal=True, **how))
        return jnp.concatenate(parts, axis=1)

    def reads(self, memory: tuple[Array, Array], segments: Segments, relative_NR: Array | None) -> Read:
        """The cross-attention of `separate` and `tied`: every target sees the whole memory, whatever the window, as in
        Longformer's encoder-decoder (Beltagy et al. 2020, section 7) and LongT5 (Guo et al. 2022)."""
        relative_NR = relative_NR if self.options.encoding in CROSS else None
        S = memory[0].shape[1]  # inputs: the first target stands behind them
        return lambda q_BTNH: attend(q_BTNH, *memory, causal=False, how=self.attention, segments=segments,
                                     relative_NR=relative_NR, first=S)  # fmt: skip

    def after_attention(
        self,
        x_BnD: Float[Array, "B n D"],
        normed_BnD: Float[Array, "B n D"],
        q_BnNH: Float[Array, "B n N H"] | None,
        mixed_BnNH: Float[Array, "B n N H"],
        read: Read | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B n D"]:
        """The layer's output, from its input, that `before_attention`, and its self-attention's queries (none where learned
        matrices mix) and mixed values.

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
        self, normed_BnD: Array, q_BnNH: Array | None, mixed_BnNH: Array, read: Read | None, positions: Positions | None
    ) -> Array:
        """Of a parallel block, the sum of its sublayers' outputs."""
        if read is None:
            return self.attn.out(mixed_BnNH) + self.mlp(normed_BnD)
        assert positions is not None
        T, reader = positions.shape[-1], self.cross
        if reader is None:
            assert q_BnNH is not None  # the same queries in two softmaxes, and one product for what both mix
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
            return self._norm(x_BTD + _times(out_BTD, self.branch), scale)
        return x_BTD + _times(out_BTD if second is None else self._norm(out_BTD, second), self.branch)


def _on_last(T: int, function: Callable[[Array], Array], x: Float[Array, "B n *D"]) -> Float[Array, "B n *D"]:
    """`function` of the T last places; the others as they are."""
    if x.shape[1] == T:
        return function(x)
    last = function(x[:, -T:])
    return jnp.concatenate([x[:, :-T], last], axis=1)
