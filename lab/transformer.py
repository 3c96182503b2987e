"""The one transformer that every structure is a setting of: inputs x and targets y, two streams.

Letters: B batch, S input length, T target length, D model width, L layers, V vocabulary.

At each depth x attends to x (bidirectional or causal) and y attends to [memory ; y], where the memory is what the input
stack hands over: its final norm's output (memory=final), or what its layer at the same depth is about to read
(memory=same: the stream that enters that layer, after its attention norm). No mask over S+T positions is needed.

    inputs x ---> [layer] ---> [layer] ---> norm          targets y_0 = SEP, y_1 .. y_{T-1}
                     |  same      |  same    | final                 |
                     +------------+----------+----> keys, values --> [layer] -> [layer] -> norm -> head

With stacks=shared and memory=same the streams advance together and each projection runs once over both. If only targets
are scored, the last input layer is then needed for its keys and values alone, and nothing else of it is executed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from lab.attention import Segments, attend
from lab.forms import Form
from lab.layers import Draw, Layer, rms_norm
from lab.mesh import by_batch, whole
from lab.spec import Options, Shape
from lab.structure import Structure

Params = dict[str, Any]
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
KEEP = "keep"  # beside the parameters: {"inputs", "targets": [depth]}, which layers run (lab.techniques)


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Static description of the model; parameters are a plain pytree, `init` makes them and `__call__` uses them.

    scan: one compiled layer body for the whole depth instead of one for each layer. Compiles in a time that does not
    grow with depth; on CPU over few layers it runs slower. unroll: so many layers in one turn of that scan.
    remat: keep what enters a layer and compute the rest again in the backward pass (Chen et al. 2016).
    """

    structure: Structure
    shape: Shape
    options: Options
    V: int
    sep: int  # ids of the tokenizer that begin a document, and that fill up
    pad: int
    precision: str = "f32"
    scan: bool = False
    unroll: int = 1
    remat: bool = False
    attention: str = "reference"

    @property
    def stacks(self) -> tuple[str, ...]:
        if self.structure.encoder_only:
            return ("input",)
        return ("shared",) if self.structure.stacks == "shared" else ("input", "target")

    def depth(self, stack: str) -> int:
        return self.shape.L_input if stack == "input" else self.shape.L

    def _layer(self, stack: str, draw: Draw) -> Layer:
        own_softmax = stack != "input" and self.structure.cross in ("separate", "tied")
        cross = self.structure.cross if own_softmax else "none"
        return Layer(
            self.shape, self.options, cross=cross, depth=self.depth(stack), attention=self.attention, draw=draw
        )

    @cached_property
    def _graph(self) -> dict[str, nnx.GraphDef]:
        """What makes a Layer of a layer's parameters, for each stack."""
        return {name: nnx.split(self._layer(name, _zeros))[0] for name in self.stacks}

    def _tree(self, draw: Callable[[str], Draw], stack: Callable[[Callable[[int], Params], int], Params]) -> Params:
        """The parameters; `draw(part)` makes the numbers of a part, `stack(layer, depth)` stacks layers of a depth."""
        D, V = self.shape.D, self.V
        deviation = self.options.parametrization.table_width(D) ** -0.5

        def table(part: str) -> Array:
            # Unit-variance rows at the input (scaled by sqrt(D) there) and unit-variance logits at a tied head.
            return draw(part)((V, D), deviation)

        params: Params = {"embedding_VD": table("embedding")}
        if not self.options.tied_embeddings:
            params["head_VD"] = table("head")
            if "target" in self.stacks:
                params["target_embedding_VD"] = table("target_embedding")
        for name in self.stacks:
            part = "target" if name == "target" else "first_stack"

            def layer(index: int, name: str = name, part: str = part) -> Params:
                return nnx.to_pure_dict(nnx.state(self._layer(name, draw(f"{part}/{index}"))))

            params[name] = {"layers": stack(layer, self.depth(name)), "norm_D": np.ones(D, np.float32)}
        return params

    def init(self, seed: int) -> Params:
        """Float32 parameters as numpy arrays. A part's numbers depend on the seed and the part's name alone, so what two
        arms have in common starts alike in both."""

        def draw(part: str) -> Draw:
            key = hashlib.sha256(f"{seed}/{part}".encode()).digest()[:16]
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            return lambda shape, deviation: generator.standard_normal(shape, np.float32) * np.float32(deviation)

        def stack(layer: Callable[[int], Params], depth: int) -> Params:
            return jax.tree.map(lambda *leaves: np.stack(leaves), *(layer(index) for index in range(depth)))

        return self._tree(draw, stack)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters; nothing is drawn, no memory is filled and no device is touched."""

        def stack(layer: Callable[[int], Params], depth: int) -> Params:
            return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (depth, *leaf.shape)), layer(0))

        tree = self._tree(lambda part: _zeros, stack)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def _embed(self, params: Params, table: str, tokens: Array) -> Array:
        rows = whole(params.get(table, params["embedding_VD"]))[tokens]
        scale = self.options.parametrization.table_width(self.shape.D) ** 0.5
        return by_batch((rows * scale).astype(DTYPES[self.precision]))

    def head(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits."""
        table_VD = params.get("head_VD", params["embedding_VD"])
        if (wider := self.options.parametrization.width(self.shape.D)) != 1:
            hidden = hidden / wider
        return jnp.einsum("...D,VD->...V", hidden, table_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        params: Params,
        form: Form,
        inputs_BS: Int[Array, "B S"],
        targets_BT: Int[Array, "B T"],
    ) -> Float[Array, "B P V"]:
        """Float32 logits of the P scored positions, and of no other."""
        return self.head(params, self.hidden(params, form, inputs_BS, targets_BT))

    def hidden(
        self,
        params: Params,
        form: Form,
        inputs_BS: Int[Array, "B S"],
        targets_BT: Int[Array, "B T"],
    ) -> Float[Array, "B P D"]:
        """What the head reads at the P scored positions.

        `targets_BT` is [SEP, y_1 .. y_{T-1}] and the T last positions predict y_1 .. y_T; with loss=all they are
        preceded by S-1 that predict x_2 .. x_S. masked_lm: `targets_BT` holds the positions of the T masked tokens.
        pairs: inputs of PAD (`self.pad`) are seen by nothing. causal_lm: no inputs, and each SEP begins a document.
        """
        S, T = inputs_BS.shape[1], targets_BT.shape[1]
        x_BSD = self._embed(params, "embedding_VD", inputs_BS)
        positions_S = np.arange(S)
        if self.structure.encoder_only:
            x_BSD = self._run_alone(params, "input", x_BSD, positions_S)
            return jnp.take_along_axis(x_BSD, targets_BT[:, :, None], axis=1)
        y_BTD = self._embed(params, "target_embedding_VD", targets_BT)
        if form.name == "causal_lm":
            documents = jnp.cumsum(targets_BT == self.sep, axis=1)
            return self._run_alone(params, "shared", y_BTD, np.arange(T), (documents, documents))
        segments = None
        if form.name == "pairs":
            segments = (inputs_BS != self.pad).astype(jnp.int32), jnp.ones_like(targets_BT)
        positions_T = np.arange(T) + (S if self.options.positions == "continue" else 0)
        score_inputs = form.loss == "all"
        streams = self._advance_both if self.structure.memory == "same" else self._advance_in_turn
        x_BSD, y_BTD = streams(params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs)
        return jnp.concatenate([x_BSD[:, :-1], y_BTD], axis=1) if score_inputs else y_BTD

    # ---- depth -----------------------------------------------------------------------------------------------------

    def _fold(self, body, carry, stacks: list[tuple[str, Any]], keep: Array | None = None):
        """Applies `body(layers, carry)` at each depth; `layers` are the Layer modules of the given stacks there. keep: [depth],
        whether they run; those that do not are not executed, and hand on what they are given."""

        def at_depth(carry, at):
            params_at_depth, kept = at
            merged = [nnx.merge(self._graph[name], p) for (name, _), p in zip(stacks, params_at_depth, strict=True)]
            return _unless_skipped(kept, partial(body, merged), carry, lambda carry: carry), None

        layers = [p for _, p in stacks]
        if (depth := jax.tree.leaves(layers)[0].shape[0]) == 0:
            return carry
        layers = layers, None if keep is None else keep[:depth]
        if self.remat:
            at_depth = jax.checkpoint(at_depth, prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(at_depth, carry, layers, unroll=self.unroll)[0]
        for index in range(jax.tree.leaves(layers)[0].shape[0]):
            carry, _ = at_depth(carry, jax.tree.map(lambda p, i=index: p[i], layers))
        return carry

    def _at_the_end(self, body, carry, stacks: list[tuple[str, Any]], keep: Array | None, skipped):
        """Applies `body(layers, carry)` with the last layer of each stack, as `_fold` does at its depths; skipped(carry): what
        a layer that does not run hands on."""

        def last(carry, layers):
            merged = [nnx.merge(self._graph[name], p) for (name, _), p in zip(stacks, layers, strict=True)]
            return _unless_skipped(None if keep is None else keep[-1], partial(body, merged), carry, skipped)

        layers = [jax.tree.map(lambda p: p[-1], p) for _, p in stacks]
        return (jax.checkpoint(last) if self.remat else last)(carry, layers)

    def _run_alone(
        self, params: Params, stack: str, x_BSD: Array, positions_S: np.ndarray, segments: Segments = None
    ) -> Array:
        """A stack to its end over one stream, then its final norm."""
        causal = self.structure.inputs == "causal"
        x_BSD = self._fold(
            lambda layers, x: _self_layer(layers[0], x, positions_S, causal=causal, segments=segments),
            x_BSD,
            [(stack, params[stack]["layers"])],
            _kept(params, "inputs" if stack == "input" and not self.structure.encoder_only else "targets"),
        )
        return rms_norm(x_BSD, params[stack]["norm_D"])

    def _advance_in_turn(self, params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs):
        """memory=final: all of the input stack, then the target stack over its output."""
        memory_BSD = self._run_alone(params, self.stacks[0], x_BSD, positions_S, _among_inputs(segments))
        merged = self.structure.cross == "merged"
        stack = self.stacks[-1]
        y_BTD = self._fold(
            lambda layers, y: _target_layer(
                layers[0],
                y,
                layers[0].reader.keys_values(memory_BSD, positions_S),
                positions_T,
                merged=merged,
                segments=segments,
            ),
            y_BTD,
            [(stack, params[stack]["layers"])],
            _kept(params, "targets"),
        )
        return memory_BSD, rms_norm(y_BTD, params[stack]["norm_D"])

    def _advance_both(self, params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs):
        """memory=same: both streams, layer by layer; the last layer's inputs are dropped where nothing reads them."""
        S, merged, causal = x_BSD.shape[1], self.structure.cross == "merged", self.structure.inputs == "causal"
        stacks = [(name, params[name]["layers"]) for name in self.stacks]
        whole = stacks if score_inputs else [(name, jax.tree.map(lambda p: p[:-1], p)) for name, p in stacks]
        first_norm, last_norm = params[self.stacks[0]]["norm_D"], params[self.stacks[-1]]["norm_D"]
        keep = _kept(params, "targets")

        if self.structure.stacks == "shared":
            positions_n = np.concatenate([positions_S, positions_T])
            z_BnD = self._fold(
                lambda layers, z: _joint_layer(layers[0], z, positions_n, S, segments, merged=merged, causal=causal),
                jnp.concatenate([x_BSD, y_BTD], axis=1),
                whole,
                keep,
            )
            if not score_inputs:
                y_BTD = self._at_the_end(
                    lambda layers, z: _last_joint_layer(layers[0], z, positions_n, S, segments, merged=merged),
                    z_BnD,
                    stacks,
                    keep,
                    lambda z: z[:, S:],
                )
                return x_BSD, rms_norm(y_BTD, last_norm)
            z_BnD = rms_norm(z_BnD, first_norm)
            return z_BnD[:, :S], z_BnD[:, S:]

        def advance(layers: list[Layer], xy: tuple[Array, Array], keep_inputs: bool = True) -> tuple[Array, Array]:
            x, y = xy
            memory = layers[1].reader.keys_values(layers[0].before_attention(x), positions_S)
            y = _target_layer(layers[1], y, memory, positions_T, merged=merged, segments=segments)
            if keep_inputs:
                x = _self_layer(layers[0], x, positions_S, causal=causal, segments=_among_inputs(segments))
            return x, y

        xy = self._fold(advance, (x_BSD, y_BTD), whole, keep)
        if not score_inputs:
            xy = self._at_the_end(partial(advance, keep_inputs=False), xy, stacks, keep, lambda xy: xy)
        x_BSD, y_BTD = xy
        return rms_norm(x_BSD, first_norm), rms_norm(y_BTD, last_norm)


def _kept(params: Params, stream: str) -> Array | None:
    """[depth], whether the layers of a stream run; None where all do. It comes with the parameters, and is none of them."""
    return params[KEEP][stream] if KEEP in params else None


def _unless_skipped(kept: Array | None, run: Callable[[Any], Any], carry: Any, skipped: Callable[[Any], Any]) -> Any:
    return run(carry) if kept is None else jax.lax.cond(kept, run, skipped, carry)


def _zeros(shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Numbers of a shape where only the shape counts: no memory is written."""
    return np.broadcast_to(np.float32(0), shape)


def _among_inputs(segments: Segments) -> Segments:
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
    """Of targets over inputs."""
    return None if segments is None else (segments[1], segments[0])


def _self_layer(layer: Layer, x_BSD: Array, positions_S: np.ndarray, *, causal: bool, segments: Segments) -> Array:
    normed = layer.before_attention(x_BSD)
    q = layer.attn.queries(normed, positions_S)
    keys_values = layer.attn.keys_values(normed, positions_S)
    mixed = attend(q, *keys_values, causal=causal, how=layer.attention, segments=segments)
    return layer.feed_forward(x_BSD + layer.attn.out(mixed))


def _target_layer(
    layer: Layer,
    y_BTD: Array,
    memory: tuple[Array, Array],
    positions_T: np.ndarray,
    *,
    merged: bool,
    segments: Segments,
) -> Array:
    normed = layer.before_attention(y_BTD)
    q = layer.attn.queries(normed, positions_T)
    own = layer.attn.keys_values(normed, positions_T)
    if merged:
        own = _join(memory, own)
    over = _over_both(segments) if merged else None  # targets by themselves are of one number
    y_BTD = y_BTD + layer.attn.out(attend(q, *own, causal=True, how=layer.attention, segments=over))
    if not merged:
        y_BTD = layer.read(y_BTD, memory, positions_T, _reading(segments))
    return layer.feed_forward(y_BTD)


def _joint_layer(
    layer: Layer,
    z_BnD: Array,
    positions_n: np.ndarray,
    S: int,
    segments: Segments,
    *,
    merged: bool,
    causal: bool,
) -> Array:
    """One shared layer over both streams z = [x ; y], each projection once over all n = S+T positions."""
    attention = partial(attend, how=layer.attention)
    normed_BnD = layer.before_attention(z_BnD)
    q, (k, v) = layer.attn.queries(normed_BnD, positions_n), layer.attn.keys_values(normed_BnD, positions_n)
    memory = None if layer.cross is None else layer.cross.keys_values(normed_BnD[:, :S], positions_n[:S])
    if merged and causal and layer.attention != "reference":  # one rule for both streams; the reference does not skip
        mixed = attention(q, k, v, causal=True, segments=_over_all(segments))
    else:
        mixed_x = attention(q[:, :S], k[:, :S], v[:, :S], causal=causal, segments=_among_inputs(segments))
        # The keys and values of a merged softmax are those of both streams, as they lie.
        first = 0 if merged else S
        over = _over_both(segments) if merged else None
        mixed_y = attention(q[:, S:], k[:, first:], v[:, first:], causal=True, segments=over)
        mixed = jnp.concatenate([mixed_x, mixed_y], axis=1)
    z_BnD = z_BnD + layer.attn.out(mixed)
    if not merged:
        memory = memory or (k[:, :S], v[:, :S])
        y_BTD = layer.read(z_BnD[:, S:], memory, positions_n[S:], _reading(segments))
        z_BnD = jnp.concatenate([z_BnD[:, :S], y_BTD], axis=1)
    return layer.feed_forward(z_BnD)


def _last_joint_layer(
    layer: Layer, z_BnD: Array, positions_n: np.ndarray, S: int, segments: Segments, *, merged: bool
) -> Array:
    """A shared layer whose inputs nothing reads: of x its keys and values alone."""
    normed_BnD = layer.before_attention(z_BnD)
    positions_T, normed_BTD, y_BTD = positions_n[S:], normed_BnD[:, S:], z_BnD[:, S:]
    if layer.cross is None:
        k, v = layer.attn.keys_values(normed_BnD, positions_n)
        memory, own = (k[:, :S], v[:, :S]), (k, v) if merged else (k[:, S:], v[:, S:])
    else:
        memory = layer.cross.keys_values(normed_BnD[:, :S], positions_n[:S])
        own = layer.attn.keys_values(normed_BTD, positions_T)
    q, over = layer.attn.queries(normed_BTD, positions_T), _over_both(segments) if merged else None
    y_BTD = y_BTD + layer.attn.out(attend(q, *own, causal=True, how=layer.attention, segments=over))
    return layer.feed_forward(y_BTD if merged else layer.read(y_BTD, memory, positions_T, _reading(segments)))


def _join(memory: tuple[Array, Array], own: tuple[Array, Array]) -> tuple[Array, Array]:
    """Keys and values of [memory ; targets]."""
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(memory, own, strict=True))
    return k, v
