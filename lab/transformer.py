"""The one transformer that every structure is a setting of: inputs x and targets y, two streams.

Letters: B batch, S input length, T target length, D model width, L layers, V vocabulary, A positions in a table, R relative
distances.

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

from lab.attention import Segments
from lab.forms import Form
from lab.layers import Layer
from lab.mesh import by_batch, whole
from lab.norms import NORMS
from lab.positions import ABSOLUTE, RELATIVE, Positions
from lab.seen import BUCKETS
from lab.spec import Options, Shape
from lab.streams import joint_layer, last_joint_layer, self_layer, target_layer, within_inputs
from lab.structure import Structure
from lab.weights import Draw, matmul

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
    places: int = 0  # A: positions that there are for (lab.seen.places), where a table or a matrix has a row for each

    @property
    def stacks(self) -> tuple[str, ...]:
        if self.structure.encoder_only:
            return ("input",)
        return ("shared",) if self.structure.stacks == "shared" else ("input", "target")

    def depth(self, stack: str) -> int:
        return self.shape.L_input if stack == "input" else self.shape.L

    def held(self, stack: str) -> int:
        """Layers of a stack that the parameters hold: one where it serves at every depth (Lan et al. 2019, ALBERT)."""
        return 1 if self.options.share_layers else self.depth(stack)

    def _layer(self, stack: str, draw: Draw) -> Layer:
        own_softmax = stack != "input" and self.structure.cross in ("separate", "tied")
        cross = self.structure.cross if own_softmax else "none"
        return Layer(
            self.shape,
            self.options,
            cross=cross,
            depth=self.depth(stack),
            attention=self.attention,
            draw=draw,
            places=self.places,
        )

    @cached_property
    def _graph(self) -> dict[str, nnx.GraphDef]:
        """What makes a Layer of a layer's parameters, for each stack."""
        return {name: nnx.split(self._layer(name, _zeros))[0] for name in self.stacks}

    def _tree(self, draw: Callable[[str], Draw], stack: Callable[[Callable[[int], Params], int], Params]) -> Params:
        """The parameters; `draw(part)` makes the numbers of a part, `stack(layer, held)` stacks so many layers."""
        D, V, E = self.shape.D, self.V, self.options.embedding_width
        deviation = self.options.parametrization.table_width(D) ** -0.5

        def table(part: str) -> Params:
            # Unit-variance rows at the input (scaled by sqrt(D) there) and unit-variance logits at a tied head.
            numbers = draw(part)
            if E is None:
                return {f"{part}_VD": numbers((V, D), deviation)}
            return {f"{part}_VE": numbers((V, E), E**-0.5), f"{part}_ED": numbers((E, D), deviation)}

        params = table("embedding")
        if not self.options.tied_embeddings:
            params |= table("head")
            if "target" in self.stacks:
                params |= table("target_embedding")
        if self.options.encoding == "learned":
            params["place_AD"] = draw("places")((self.places, D), deviation)  # as the tokens', and scaled like them
        for name in self.stacks:
            part = "target" if name == "target" else "first_stack"

            def layer(index: int, name: str = name, part: str = part) -> Params:
                return nnx.to_pure_dict(nnx.state(self._layer(name, draw(f"{part}/{index}"))))

            params[name] = {"layers": stack(layer, self.held(name))}
            if self.options.norm_place != "post":
                params[name]["norm_D"] = np.ones(D, np.float32)
            if self.options.encoding == "t5":
                params[name]["relative_NR"] = draw(f"{part}/relative")((self.shape.N, BUCKETS), deviation)
        return params

    def init(self, seed: int) -> Params:
        """Float32 parameters as numpy arrays. A part's numbers depend on the seed and the part's name alone, so what two
        arms have in common starts alike in both."""

        def draw(part: str) -> Draw:
            key = hashlib.sha256(f"{seed}/{part}".encode()).digest()[:16]
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            return lambda shape, deviation: generator.standard_normal(shape, np.float32) * np.float32(deviation)

        def stack(layer: Callable[[int], Params], held: int) -> Params:
            return jax.tree.map(lambda *leaves: np.stack(leaves), *(layer(index) for index in range(held)))

        return self._tree(draw, stack)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters; nothing is drawn, no memory is filled and no device is touched."""

        def stack(layer: Callable[[int], Params], held: int) -> Params:
            return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (held, *leaf.shape)), layer(0))

        tree = self._tree(lambda part: _zeros, stack)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def _table(self, params: Params, name: str) -> tuple[Array, Array | None]:
        """Of a part that has a token table, or of the embedding that serves in its place: V x D and nothing, or its factors
        V x E and E x D."""
        width = "VD" if self.options.embedding_width is None else "VE"
        name = name if f"{name}_{width}" in params else "embedding"
        return params[f"{name}_{width}"], params.get(f"{name}_ED")

    def _embed(self, params: Params, name: str, tokens: Array, positions: Positions) -> Array:
        """What enters the first layer. Rows of positions are of width D, and are added to the product of a table's factors."""
        (table, factor_ED), D, dtype = self._table(params, name), self.shape.D, DTYPES[self.precision]
        scale = self.options.parametrization.table_width(D) ** 0.5
        embedded = whole(table)[tokens] * scale
        if factor_ED is not None:
            embedded = matmul(embedded.astype(dtype), factor_ED)
        if (rows := ABSOLUTE.get(self.options.encoding)) is not None:
            places = params.get("place_AD")
            embedded = embedded + rows(None if places is None else whole(places) * scale, positions, D)
        return by_batch(embedded.astype(dtype))

    def relative(self, params: Params, stack: str, distance: np.ndarray | Array) -> Array | None:
        """What a stack's heads add to the scores at these distances between query and key: [N, ...], or nothing."""
        if (number := RELATIVE.get(self.options.encoding)) is None:
            return None
        # As in T5's own code, of one stack for both streams the inputs decide.
        ahead = stack != "target" and self.structure.inputs == "bidirectional"
        return number(distance, self.shape.N, params[stack].get("relative_NR"), ahead=ahead)

    def _relative(self, params: Params, stack: str, n: int) -> Array | None:
        """As lab.attention takes it, of n positions."""
        return self.relative(params, stack, np.arange(1 - n, n))

    def _absolute(self, form: Form, inputs_BS: Array, targets_BT: Array) -> tuple[Positions, Positions]:
        """The positions that are added to embeddings: a padded source begins at 0, and so does every document of a packed row."""
        S, T = inputs_BS.shape[1], targets_BT.shape[1]
        at_S, at_T = np.arange(S), self._of_targets(S, T)
        if self.options.encoding in ABSOLUTE and form.name == "pairs":
            pads_B1 = jnp.sum(inputs_BS == self.pad, axis=1, keepdims=True)
            return jnp.maximum(at_S[None] - pads_B1, 0), at_T[None] - pads_B1
        if self.options.encoding in ABSOLUTE and form.name == "causal_lm":
            return at_S, at_T[None] - jax.lax.cummax(jnp.where(targets_BT == self.sep, at_T[None], 0), axis=1)
        return at_S, at_T

    def _of_targets(self, S: int, T: int) -> np.ndarray:
        return np.arange(T) + (S if self.options.positions == "continue" else 0)

    def head(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits; below the cap in size where there is one (Gemma 2)."""
        table, factor_ED = self._table(params, "head")
        if (wider := self.options.parametrization.width(self.shape.D)) != 1:
            hidden = hidden / wider
        hidden = hidden if factor_ED is None else matmul(hidden, factor_ED.T)
        logits = jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.options.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _top(self, params: Params, stack: str, x_BSD: Array) -> Array:
        """What a stack hands on: its final norm's output; where norms follow the sums, its last layer's."""
        return x_BSD if self.options.norm_place == "post" else NORMS[self.options.norm](x_BSD, params[stack]["norm_D"])

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
        positions_S, positions_T = np.arange(S), self._of_targets(S, T)
        at_S, at_T = self._absolute(form, inputs_BS, targets_BT)
        x_BSD = self._embed(params, "embedding", inputs_BS, at_S)
        if self.structure.encoder_only:
            x_BSD = self._run_alone(params, "input", x_BSD, positions_S)
            return jnp.take_along_axis(x_BSD, targets_BT[:, :, None], axis=1)
        y_BTD = self._embed(params, "target_embedding", targets_BT, at_T)
        if form.name == "causal_lm":
            documents = jnp.cumsum(targets_BT == self.sep, axis=1)
            return self._run_alone(params, "shared", y_BTD, np.arange(T), (documents, documents))
        segments = None
        if form.name == "pairs":
            segments = (inputs_BS != self.pad).astype(jnp.int32), jnp.ones_like(targets_BT)
        score_inputs = form.loss == "all"
        streams = self._advance_both if self.structure.memory == "same" else self._advance_in_turn
        x_BSD, y_BTD = streams(params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs)
        return jnp.concatenate([x_BSD[:, :-1], y_BTD], axis=1) if score_inputs else y_BTD

    # ---- depth -----------------------------------------------------------------------------------------------------

    def layer(self, params: Params, stack: str, own: Params | None) -> Layer:
        """The layer with these parameters of its own; where it has none, the one that serves at every depth."""
        if own is None:
            own = jax.tree.map(lambda leaf: leaf[0], params[stack]["layers"])
        return nnx.merge(self._graph[stack], own)

    def by_depth(self, params: Params, stack: str, depth: int) -> Params | None:
        """What a scan over a stack's first layers takes apart for `layer`: nothing where all depths share one."""
        if self.options.share_layers:
            return None
        layers = params[stack]["layers"]
        return layers if depth == self.depth(stack) else jax.tree.map(lambda leaf: leaf[:depth], layers)

    def _fold(self, body, carry, params: Params, stacks: tuple[str, ...], depth: int):
        """Applies `body(layers, carry)` at the first `depth` depths; `layers` are the Layer modules of the stacks there. Where
        only some run (KEEP), the others are not executed, and hand on what they are given."""

        def at_depth(carry, params, at):
            own, kept = at
            layers = [self.layer(params, name, p) for name, p in zip(stacks, own, strict=True)]
            return _unless_skipped(kept, partial(body, layers), carry, lambda carry: carry)

        if depth == 0:
            return carry
        if self.remat:
            at_depth = jax.checkpoint(at_depth, prevent_cse=not self.scan)
        shared = {name: params[name] for name in stacks} if self.options.share_layers else {}
        keep = self._kept(params, stacks)
        layers = [self.by_depth(params, name, depth) for name in stacks], None if keep is None else keep[:depth]
        if self.scan:
            return jax.lax.scan(
                lambda carry, own: (at_depth(carry, shared, own), None), carry, layers, length=depth, unroll=self.unroll
            )[0]
        for index in range(depth):
            carry = at_depth(carry, shared, jax.tree.map(lambda p, i=index: p[i], layers))
        return carry

    def _at_the_end(self, body, carry, params: Params, stacks: tuple[str, ...], skipped):
        """Applies `body(layers, carry)` with the last layer of each stack, as `_fold` does at its depths; skipped(carry): what
        a layer that does not run hands on."""
        keep = self._kept(params, stacks)

        def last(carry, own):
            layers = [self.layer(params, name, p) for name, p in zip(stacks, own, strict=True)]
            return _unless_skipped(None if keep is None else keep[-1], partial(body, layers), carry, skipped)

        layers = [jax.tree.map(lambda p: p[-1], params[name]["layers"]) for name in stacks]
        return (jax.checkpoint(last) if self.remat else last)(carry, layers)

    def _kept(self, params: Params, stacks: tuple[str, ...]) -> Array | None:
        """[depth], which layers of the stacks run; None where all do. It comes with the parameters, and is none of them."""
        alone = stacks == ("input",) and not self.structure.encoder_only
        return params[KEEP]["inputs" if alone else "targets"] if KEEP in params else None

    def _run_alone(
        self, params: Params, stack: str, x_BSD: Array, positions_S: np.ndarray, segments: Segments = None
    ) -> Array:
        """A stack to its end over one stream, then its final norm."""
        causal, relative_NR = self.structure.inputs == "causal", self._relative(params, stack, len(positions_S))
        x_BSD = self._fold(
            lambda layers, x: self_layer(layers[0], x, positions_S, segments, relative_NR, causal=causal),
            x_BSD,
            params,
            (stack,),
            self.depth(stack),
        )
        return self._top(params, stack, x_BSD)

    def _advance_in_turn(self, params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs):
        """memory=final: all of the input stack, then the target stack over its output."""
        memory_BSD = self._run_alone(params, self.stacks[0], x_BSD, positions_S, within_inputs(segments))
        merged = self.structure.cross == "merged"
        stack, one = self.stacks[-1], None
        relative_NR = self._relative(params, stack, len(positions_S) + len(positions_T))
        if self.structure.memory_is_one(self.options.share_layers):
            one = self.layer(params, stack, None).reader.keys_values(memory_BSD, positions_S)
        y_BTD = self._fold(
            lambda layers, y: target_layer(
                layers[0],
                y,
                one or layers[0].reader.keys_values(memory_BSD, positions_S),
                positions_T,
                segments,
                relative_NR,
                merged=merged,
            ),
            y_BTD,
            params,
            (stack,),
            self.depth(stack),
        )
        return memory_BSD, self._top(params, stack, y_BTD)

    def _advance_both(self, params, x_BSD, y_BTD, positions_S, positions_T, segments, score_inputs):
        """memory=same: both streams, layer by layer; the last layer's inputs are dropped where nothing reads them."""
        S, merged, causal = x_BSD.shape[1], self.structure.cross == "merged", self.structure.inputs == "causal"
        first, last = self.stacks[0], self.stacks[-1]
        depth = self.shape.L if score_inputs else self.shape.L - 1
        relative_NR = self._relative(params, last, S + len(positions_T))

        if self.structure.stacks == "shared":
            positions_n = np.concatenate([positions_S, positions_T])
            z_BnD = self._fold(
                lambda layers, z: joint_layer(
                    layers[0], z, positions_n, S, segments, relative_NR, merged=merged, causal=causal
                ),
                jnp.concatenate([x_BSD, y_BTD], axis=1),
                params,
                self.stacks,
                depth,
            )
            if not score_inputs:
                y_BTD = self._at_the_end(
                    lambda layers, z: last_joint_layer(
                        layers[0], z, positions_n, S, segments, relative_NR, merged=merged
                    ),
                    z_BnD,
                    params,
                    self.stacks,
                    lambda z: z[:, S:],
                )
                return x_BSD, self._top(params, last, y_BTD)
            z_BnD = self._top(params, first, z_BnD)
            return z_BnD[:, :S], z_BnD[:, S:]

        relative_of_inputs = self._relative(params, first, S)

        def advance(layers: list[Layer], xy: tuple[Array, Array], keep_inputs: bool = True) -> tuple[Array, Array]:
            x, y = xy
            memory = layers[1].reader.keys_values(layers[0].before_attention(x), positions_S)
            y = target_layer(layers[1], y, memory, positions_T, segments, relative_NR, merged=merged)
            if keep_inputs:
                x = self_layer(layers[0], x, positions_S, within_inputs(segments), relative_of_inputs, causal=causal)
            return x, y

        x_BSD, y_BTD = self._fold(advance, (x_BSD, y_BTD), params, self.stacks, depth)
        if not score_inputs:
            at_the_end = partial(advance, keep_inputs=False)
            x_BSD, y_BTD = self._at_the_end(at_the_end, (x_BSD, y_BTD), params, self.stacks, lambda xy: xy)
        return self._top(params, first, x_BSD), self._top(params, last, y_BTD)


def _unless_skipped(kept: Array | None, run: Callable[[Any], Any], carry: Any, skipped: Callable[[Any], Any]) -> Any:
    return run(carry) if kept is None else jax.lax.cond(kept, run, skipped, carry)


def _zeros(shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Numbers of a shape where only the shape counts: no memory is written."""
    return np.broadcast_to(np.float32(0), shape)
