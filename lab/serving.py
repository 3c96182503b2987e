"""Cached decoding: keys and values are computed once for each token and kept.

    prefill   inputs -> a cache that targets can be decoded from
    decode    the next targets -> their logits, and the cache with them in it
    extend    more inputs behind those of a cache, in structures with causal inputs and behind whole turns (options.turn); a
              bidirectional input is read anew

Letters: B batch, C slots for inputs, U new inputs, T slots for targets or new targets, D model width, N query heads, K
key-value heads, G = N/K, H head width, L layers, V vocabulary.

Each is compiled once for each shape: the rows of a batch are filled up from the right to C inputs, of which `lengths_B`
count (at least one in each row). What is behind them is never attended to, and the targets' positions go on where a
row's own inputs end. What the functions give is what lab.transformer gives of the same tokens, to rounding; they run on
one device and read the parameters as they are trained, layers stacked, whether the trainer scans over these or not: here they
always are scanned, which was measured up to 9 times faster a token on CPU (a scan reads a layer's matrices where they lie,
and what is cut from a stack in a straight program is copied) and compiles in a time that does not grow with depth.

What is kept is what serving_cost.conversation counts: of each layer that targets go through, what they read (`memory`) and
their own; and where more inputs can follow, what the inputs' own attention reads (`own`). Keys that a window has left behind
stay and are masked. Where learned matrices mix, keys have no width and a cache is of values: for each target a row of the
matrix is read.
Where both streams' projections are the same (structure.memory_is_free) memory and own are one.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from lab.attention import UNSEEN
from lab.layers import Layer, Mixing
from lab.positions import CROSS, Positions
from lab.seen import Rule, among_inputs
from lab.transformer import DTYPES, Params, Transformer

KeysValues = tuple[Array, Array]
SMALLEST_BUCKET = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["memory", "targets", "own", "lengths_B", "fed"],
    meta_fields=["inputs", "room"],
)
@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values that are kept; arrays of a program but for `inputs` and `room`, which belong to the shape.

    cross=merged: in each row of `memory` the targets lie right behind the row's inputs, so that one softmax reads one array.
    """

    memory: KeysValues  # [L, B, K, C, H], [1, ..] where it is one for all layers; cross=merged [L, B, K, C + T, H]
    targets: KeysValues | None  # [L, B, K, T, H]; None where cross=merged
    own: (
        KeysValues | None
    )  # [input layers whose output is needed, B, K, C, H]; None where memory serves, or all inputs see ahead
    lengths_B: Array  # int32: inputs that there are
    fed: Array  # int32: targets that there are, the same in all rows
    inputs: int  # C
    room: int  # T: more targets than these must not be decoded

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.memory, self.targets, self.own)))


def bucket(length: int) -> int:
    """The shape that a length is filled up to: at most a quarter more, and four shapes for each doubling."""
    step = max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length()) // 8
    return max(SMALLEST_BUCKET, -(-length // step) * step)


def prefill(
    model: Transformer, params: Params, tokens_BC: Int[Any, "B C"], lengths_B: Int[Any, "B"], *, room: int
) -> Cache:
    """Reads the inputs; `room` targets can then be decoded. Raises ValueError for more positions than the model has rows for."""
    if model.structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream to decode")
    _check_places(model, lengths_B, room)
    return _prefill(model, params, tokens_BC, lengths_B, room=room)


@partial(jax.jit, static_argnames=("model", "room"))
def _prefill(model: Transformer, params: Params, tokens_BC: Array, lengths_B: Array, *, room: int) -> Cache:
    B, C = tokens_BC.shape
    memory, own = _read_inputs(model, params, tokens_BC, jnp.asarray(lengths_B), None)
    merged = model.structure.cross == "merged"
    return Cache(
        memory=_widened(memory, C + room) if merged else memory,
        targets=None if merged else _zeros(model, B, room),
        own=own,
        lengths_B=jnp.asarray(lengths_B, jnp.int32),
        fed=jnp.zeros((), jnp.int32),
        inputs=C,
        room=room,
    )


def _check_places(model: Transformer, lengths_B: Any, room: int) -> None:
    """Nothing is checked of lengths that a program makes."""
    options = model.options
    if (options.encoding != "learned" and options.mixing != "dense") or isinstance(lengths_B, Tracer):
        return
    inputs = int(np.max(lengths_B))
    needed = inputs + room if options.positions == "continue" else max(inputs, room)
    if needed > model.places:
        name = "options.encoding = 'learned'" if options.encoding == "learned" else "options.mixing = 'dense'"
        raise ValueError(
            f"{name}: the model has {model.places} positions, and {inputs} inputs with {room} targets need {needed}: give it "
            "fewer of either, or train one with an encoding that any position has"
        )


def extend(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens_BU: Int[Any, "B U"],
    counts_B: Int[Any, "B"],
    *,
    room: int,
) -> Cache:
    """Reads `counts_B` more inputs of each row, behind those that there are, in a cache that is larger by U of them.

    Where a structure keeps replies (structure.keeps_replies) the targets that were decoded have become inputs; elsewhere
    they are forgotten, and belong in front of the new inputs. Raises ValueError for bidirectional inputs, where the inputs of
    a row are no whole number of turns (`forget` the rest), and for more positions than the model has rows for.
    """
    rule = among_inputs(model.structure, model.options)
    if not rule.causal:
        raise ValueError(
            "structure.inputs = 'bidirectional': earlier inputs see later ones; use prefill on all of them"
        )
    if not isinstance(cache.lengths_B, Tracer):
        before_B = np.asarray(cache.lengths_B)
        if np.any(before_B % rule.turn):
            raise ValueError(
                f"options.turn = {rule.turn}: rows have {before_B.tolist()} inputs, and the last of a turn that is not full "
                "would see the new ones; use forget, and give what is forgotten again, or prefill on all of them"
            )
        stay = np.asarray(cache.fed) if model.structure.keeps_replies(model.options.positions) else 0
        _check_places(model, before_B + stay + np.asarray(counts_B), room)
    return _extend(model, params, cache, tokens_BU, counts_B, room=room)


@partial(jax.jit, static_argnames=("model", "room"))
def _extend(model: Transformer, params: Params, cache: Cache, tokens_BU: Array, counts_B: Array, *, room: int) -> Cache:
    structure, B, U = model.structure, *tokens_BU.shape
    lengths_B, kept = cache.lengths_B, cache.inputs
    if structure.keeps_replies(model.options.positions):
        lengths_B, kept = lengths_B + cache.fed, kept + cache.room
    slots_BU = lengths_B[:, None] + np.arange(U)[None]
    old_memory, old_own = _narrowed(cache.memory, kept), cache.own
    memory, own = _read_inputs(
        model, params, tokens_BU, jnp.asarray(counts_B), (old_memory if old_own is None else old_own, lengths_B)
    )
    merged = structure.cross == "merged"
    return Cache(
        memory=_placed(_widened(old_memory, kept + U + (room if merged else 0)), memory, slots_BU),
        targets=None if merged else _zeros(model, B, room),
        own=None if own is None or old_own is None else _placed(_widened(old_own, kept + U), own, slots_BU),
        lengths_B=lengths_B + counts_B,
        fed=jnp.zeros((), jnp.int32),
        inputs=kept + U,
        room=room,
    )


def forget(cache: Cache, inputs: int) -> Cache:
    """The first `inputs` inputs of every row, which must have as many: more can follow (extend), and no target."""
    return replace(
        cache,
        memory=_narrowed(cache.memory, inputs),
        own=None if cache.own is None else _narrowed(cache.own, inputs),
        targets=None,
        lengths_B=jnp.full_like(cache.lengths_B, inputs),
        fed=jnp.zeros_like(cache.fed),
        inputs=inputs,
        room=0,
    )


@partial(jax.jit, static_argnames="model")
def decode(
    model: Transformer, params: Params, cache: Cache, tokens_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Cache]:
    """Feeds T more targets, of which the first ever is SEP: float32 logits of what follows each, and the cache with them.

    More targets than the cache has room for can not be refused in a program, and must not come.
    """
    structure, stack = model.structure, model.stacks[-1]
    merged, T = structure.cross == "merged", tokens_BT.shape[1]
    apart = None if merged else cache.memory
    one = None  # for all layers
    if apart and structure.memory_is_one(model.options.share_layers):
        apart, one = None, (apart[0][0], apart[1][0])
    place_T = cache.fed + np.arange(T)
    place_BT = cache.lengths_B[:, None] + place_T[None]
    positions = place_BT if model.options.positions == "continue" else place_T
    inputs_C = np.arange(cache.inputs)
    inputs_B1C, rule = (
        inputs_C[None, None] < cache.lengths_B[:, None, None],
        Rule(causal=True, window=model.options.window),
    )
    if merged:  # inputs and targets without a gap: all up to itself
        slots_BT, at, keys_at = place_BT, place_BT, np.arange(cache.inputs + cache.room)
    else:
        slots_BT, at, keys_at = jnp.broadcast_to(place_T[None], tokens_BT.shape), place_T[None], np.arange(cache.room)
    seen = rule.mask(at, keys_at[None])
    among, reading = (_relative(model, params, stack, *both) for both in ((at, keys_at), (place_BT, inputs_C)))
    reading = reading if model.options.encoding in CROSS else None
    written = cache.memory if cache.targets is None else cache.targets

    def layer_at(carry: tuple[Array, KeysValues], depth: tuple[Params | None, Array, KeysValues | None]):
        y_BTD, written = carry
        own, index, memory = depth
        memory = one or memory
        layer = model.layer(params, stack, own)
        normed_BTD = layer.before_attention(y_BTD)
        rows = np.arange(len(tokens_BT))[:, None]
        k, v = (
            kept.at[index, rows, :, slots_BT].set(new)
            for kept, new in zip(written, layer.attn.keys_values(normed_BTD, positions), strict=True)
        )
        if isinstance(layer.attn, Mixing):
            q_BTNH, mixed_BTNH = None, _weigh((layer.attn.weights(at, keys_at[None]), v[index], seen))
        else:
            q_BTNH = layer.attn.queries(normed_BTD, positions)
            mixed_BTNH = _attend(q_BTNH, (k[index], v[index], seen, among))
        read = None if memory is None else lambda q_BTNH: _attend(q_BTNH, (*memory, inputs_B1C, reading))
        return (layer.after_attention(y_BTD, normed_BTD, q_BTNH, mixed_BTNH, read, positions), (k, v)), None

    y_BTD, L = model._embed(params, "target_embedding", tokens_BT, positions), model.shape.L
    layers = (model.by_depth(params, stack, L), jnp.arange(L), apart)
    (y_BTD, written), _ = jax.lax.scan(layer_at, (y_BTD, written), layers)
    after = replace(cache, **{"memory" if merged else "targets": written}, fed=cache.fed + T)
    return model.head(params, model._top(params, stack, y_BTD)), after


@partial(jax.jit, static_argnames="model")
def logits(model: Transformer, params: Params, cache: Cache, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """What follows each of T targets that are known; the cache stays as it is, for other targets of the same inputs."""
    return decode(model, params, cache, tokens_BT)[0]


# ---- the input stream ------------------------------------------------------------------------------------------------


def _read_inputs(
    model: Transformer, params: Params, tokens_BU: Array, counts_B: Array, before: tuple[KeysValues, Array] | None
) -> tuple[KeysValues, KeysValues | None]:
    """Keys and values of new inputs, as in Cache, each [layers, B, K, U, H].

    before: what the inputs' own attention kept of earlier ones, and how many of them there are.
    """
    structure, U = model.structure, tokens_BU.shape[1]
    first, last = model.stacks[0], model.stacks[-1]
    rule, order = among_inputs(structure, model.options), np.arange(U)
    seen = rule.mask(order, order)[None]
    if not rule.causal or rule.turn > 1:  # else what a row is filled up with comes after all that counts
        seen = seen & (order[None, None] < counts_B[:, None, None])
    positions: Positions = order
    at: Any = order[None]
    among = _relative(model, params, first, order[None], order)
    earlier, earlier_seen, earlier_at, to_earlier = None, None, order, None
    if before is not None:
        earlier, lengths_B = before
        positions = at = lengths_B[:, None] + order[None]
        earlier_at = np.arange(earlier[0].shape[3])
        earlier_seen = earlier_at[None, None] < lengths_B[:, None, None]
        if rule.window is not None:
            earlier_seen = earlier_seen & replace(rule, causal=False).mask(positions, earlier_at[None])
        to_earlier = _relative(model, params, first, positions, earlier_at)

    def attended(layer: Layer, x_BUD: Array, normed_BUD: Array, kept: KeysValues | None) -> tuple[Array, KeysValues]:
        """The whole of a layer, and the keys and values of its attention."""
        own = _keys_values(layer.attn, normed_BUD, positions)
        q_BUNH = None
        if isinstance(layer.attn, Mixing):
            parts = [(layer.attn.weights(at, at), own[1], seen)]
            if kept is not None:
                parts.insert(0, (layer.attn.weights(at, earlier_at[None]), kept[1], earlier_seen))
            mixed_BUNH = _weigh(*parts)
        else:
            q_BUNH, parts = layer.attn.queries(normed_BUD, positions), [(*own, seen, among)]
            if kept is not None:
                parts.insert(0, (*kept, earlier_seen, to_earlier))
            mixed_BUNH = _attend(q_BUNH, *parts)
        return layer.after_attention(x_BUD, normed_BUD, q_BUNH, mixed_BUNH), own

    x_BUD = model._embed(params, "embedding", tokens_BU, positions)
    if structure.memory == "final":

        def alone(x_BUD: Array, depth: Any):
            parameters, kept = depth
            layer = model.layer(params, first, parameters)
            return attended(layer, x_BUD, layer.before_attention(x_BUD), kept)

        def memory_at(x_BUD: Array, parameters: Params | None):
            return x_BUD, _keys_values(model.layer(params, last, parameters).reader, x_BUD, positions)

        inputs, targets = model.depth(first), model.depth(last)
        x_BUD, own = jax.lax.scan(alone, x_BUD, (model.by_depth(params, first, inputs), earlier), length=inputs)
        x_BUD = model._top(params, first, x_BUD)
        layers, one = model.by_depth(params, last, targets), structure.memory_is_one(model.options.share_layers)
        _, memory = jax.lax.scan(memory_at, x_BUD, layers, length=1 if one else targets)
        if one and structure.cross == "merged":  # targets of each layer lie behind it
            memory = jax.tree.map(lambda kept: jnp.broadcast_to(kept, (targets, *kept.shape[1:])), memory)
        return memory, own if rule.causal else None

    free = structure.memory_is_free

    def both(x_BUD: Array, depth: Any):
        *parameters, kept = depth
        layer, reading = (model.layer(params, name, p) for name, p in zip((first, last), parameters, strict=True))
        normed_BUD = layer.before_attention(x_BUD)
        memory = None if free else _keys_values(reading.reader, normed_BUD, positions)
        x_BUD, own = attended(layer, x_BUD, normed_BUD, kept)
        return x_BUD, (own if memory is None else memory, None if free or not rule.causal else own)

    upper = model.shape.L - 1
    stacks = (model.by_depth(params, name, upper) for name in (first, last))
    before_last = jax.tree.map(lambda leaf: leaf[:upper], earlier)
    x_BUD, (memory, own) = jax.lax.scan(both, x_BUD, (*stacks, before_last), length=upper)
    # Of the last layer's inputs nothing is needed but what the targets read.
    layer, reading = (model.layer(params, name, jax.tree.map(lambda leaf: leaf[-1], params[name]["layers"]))
                      for name in (first, last))  # fmt: skip
    end = _keys_values(reading.reader, layer.before_attention(x_BUD), positions)
    k, v = (jnp.concatenate([kept, new[None]]) for kept, new in zip(memory, end, strict=True))
    return (k, v), own


# ---- keys and values ---------------------------------------------------------------------------------------------------


def _relative(model: Transformer, params: Params, stack: str, at_BT: Any, keys_at_S: np.ndarray) -> Array | None:
    """What a stack's heads add to scores, [B, N, T, S] (B may be 1)."""
    added = model.relative(params, stack, at_BT[:, :, None] - keys_at_S[None, None])
    return None if added is None else jnp.moveaxis(added, 0, 1)


def _keys_values(attention: Any, x_BUD: Array, positions: Positions) -> KeysValues:
    """[B, K, U, H]: as they are kept, and as a product over their length reads them without a copy."""
    k_BUKH, v_BUKH = attention.keys_values(x_BUD, positions)
    return k_BUKH.transpose(0, 2, 1, 3), v_BUKH.transpose(0, 2, 1, 3)


def _attend(
    q_BTNH: Float[Array, "B T N H"], *parts: tuple[Array, Array, Bool[Any, "B T S"], Float[Array, "B N T S"] | None]
) -> Float[Array, "B T N H"]:
    """One softmax over the keys of all parts (k_BKSH, v_BKSH, which of them are seen, what is added to their scores), each of
    which stays where it lies."""
    B, T, N, H = q_BTNH.shape
    K = parts[0][0].shape[1]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def scored(k_BKSH: Array, seen: Any, added: Array | None) -> Array:
        scores_BKGTS = product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
        if added is not None:
            scores_BKGTS += added.reshape(len(added), K, N // K, T, -1)
        # Finite: what only fills a row up may see nothing, and must not become NaN.
        return jnp.where(seen[:, None, None], scores_BKGTS, UNSEEN)

    scores = [scored(k_BKSH, seen, added) for k_BKSH, _, seen, added in parts]
    top_BKGT1 = jnp.max(jnp.concatenate(scores, axis=-1), axis=-1, keepdims=True)
    weights = [jnp.exp(part - top_BKGT1) for part in scores]
    total_BKGT1 = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    mixed_BKGTH: Array = sum(
        product("BKGTS,BKSH->BKGTH", part.astype(v_BKSH.dtype), v_BKSH)
        for part, (_, v_BKSH, *_) in zip(weights, parts, strict=True)
    )  # pyright: ignore[reportAssignmentType]
    out_BKGTH = (mixed_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _weigh(*parts: tuple[Array, Array, Bool[Any, "B T S"]]) -> Float[Array, "B T N H"]:
    """The values of all parts (weights [N, T, S] or [B, N, T, S], v_BKSH, which of them are seen), weighed as they are."""
    total: Any = 0.0
    for weights, v_BKSH, seen in parts:
        (N, T, S), (B, K) = weights.shape[-3:], v_BKSH.shape[:2]
        weights_BKGTS = jnp.where(seen[:, None], weights, 0.0).reshape(-1, K, N // K, T, S)
        weights_BKGTS = jnp.broadcast_to(weights_BKGTS, (B, *weights_BKGTS.shape[1:])).astype(v_BKSH.dtype)
        total += jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH, preferred_element_type=jnp.float32)
    return total.reshape(*total.shape[:2], -1, total.shape[-1]).astype(parts[0][1].dtype)


def _zeros(model: Transformer, B: int, slots: int) -> KeysValues:
    shape = model.shape
    empty = jnp.zeros((shape.L, B, shape.K, slots, shape.H), DTYPES[model.precision])
    return empty, empty


def _widened(kept: KeysValues, slots: int) -> KeysValues:
    k, v = (jnp.pad(array, [(0, 0)] * 3 + [(0, slots - array.shape[3]), (0, 0)]) for array in kept)
    return k, v


def _narrowed(kept: KeysValues, slots: int) -> KeysValues:
    k, v = (array[:, :, :, :slots] for array in kept)
    return k, v


def _placed(kept: KeysValues, new: KeysValues, slots_BU: Array) -> KeysValues:
    """`new` [layers, B, K, U, H] written into each row at its own slots."""
    rows = np.arange(len(slots_BU))[:, None]
    k, v = (
        array.at[:, rows, :, slots_BU].set(part.transpose(1, 3, 0, 2, 4)) for array, part in zip(kept, new, strict=True)
    )
    return k, v
