"""What one device must hold to train a run, from its spec and the settings alone: nothing is compiled, no device is touched.

An estimate to choose settings by, of the fullest moment of a step. How often each kind of array is there at once was fitted
to what XLA allocates on a processor for 50 shapes and structures, and is within a fifth of it for all of them
(`python tests/benchmarks/memory.py`); accelerators, whose fused kernels hold less, were not measured.

    state         parameters and what the optimizer keeps, float32: the very arrays, as a program would make them
    gradients     of each parameter; with microbatches their sum as well
    activations   what every layer keeps for its gradient (with remat: its input), and what is there inside of one
    attention     query-key weights: XLA keeps those of all unrolled layers, of a scan one layer's are there at a time
    logits        of as many positions as the head takes at once, and their gradient

Letters as in lab.cost.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

from lab import cost, seen
from lab.execution import Execution
from lab.forms import Form, forms
from lab.ledger import method_of
from lab.spec import Options, Run, Shape
from lab.structure import Structure

F32 = 4
ACTIVATION = {"f32": 4, "bf16": 2}
LOGITS_AT_ONCE = 2**25  # 128 MB in float32: above it the head runs over parts of the positions
HALF_A_BLOCK = 32  # of the queries in a block of lab.attention: pairs that are computed and not attended

# Numbers that these keep for each parameter; of the others it depends on the shapes, and is asked.
MOMENTS = {"adamw": 2, "nadamw": 2, "cautious_adamw": 2, "adamw_scale": 2, "lion": 1, "sophia_g": 2, "sophia_h": 2,
           "schedule_free_adamw": 2, "ademamix": 3, "prodigy": 4}  # fmt: skip
GRADIENTS = 1.8  # with the updates that are made of them
LOGITS = 2.6
PAIRS = {"unrolled": 2.5, "scan": 2.1, "reference": 1.8}
INSIDE = {"unrolled": 0.0, "scan": 0.5, "remat": 1.6}  # of what one layer keeps


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    state: int
    gradients: int
    activations: int
    attention: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in asdict(self).items())
        return f"{self.total / 2**20:,.0f} MiB ({parts})"


def predict(
    run: Run,
    V: int,
    execution: Execution,
    *,
    by_batch: int = 1,
    by_matrix: int = 1,
    pack: int = 1,
) -> Memory:
    """by_batch: devices that share the batch. by_matrix: devices that share each matrix. pack: runs side by side. Where steps
    take several forms, of the one that takes most."""
    each = [
        _of_form(run, form, V, execution, by_batch=by_batch, by_matrix=by_matrix, pack=pack)
        for form in forms(run.objective)
    ]
    return max(each, key=lambda memory: memory.total)


def _of_form(run: Run, form: Form, V: int, execution: Execution, *, by_batch: int, by_matrix: int, pack: int) -> Memory:
    s, T, scan, remat = run.shape, form.T, execution.scan, execution.remat and execution.scan
    inside = INSIDE["remat" if remat else "scan" if scan else "unrolled"]
    examples, size = run.batch / execution.microbatches / by_batch, ACTIVATION[run.precision]
    streams = _streams(run, form, execution.attention)
    last = run.structure.memory == "same" and form.loss == "targets" and not run.structure.encoder_only
    depths = (s.L_input - last, s.L) if len(streams) == 2 else (s.L,)
    weights = "scan" if scan else "reference" if execution.attention == "reference" else "unrolled"
    every = [sum(depth * stream[i] for depth, stream in zip(depths, streams, strict=True)) for i in range(2)]
    together = sum if run.structure.memory == "same" else max  # both streams in one layer, or one after the other
    one = [together(stream[i] for stream in streams) for i in range(2)]
    inputs = sum(depth * n * s.D for depth, n in zip(depths, (form.S, T), strict=False))
    kept = inputs if remat else every[0]
    scored = examples * form.scored
    counted = cost.parameters(run.structure, s, run.options, run.objective, V).total / by_matrix
    return Memory(
        state=int(pack * F32 * (counted + _kept(run, V) / by_matrix)),
        gradients=int(pack * F32 * (GRADIENTS + (execution.microbatches > 1)) * counted),
        activations=int(pack * size * examples * (kept + inside * one[0])),
        attention=int(pack * F32 * examples * PAIRS[weights] * (one if scan else every)[1]),
        logits=int(F32 * LOGITS * min(pack * scored * V, LOGITS_AT_ONCE)),
    )


def _kept(run: Run, V: int) -> int:
    """Numbers in the optimizer's state, and in a technique's."""
    if run.technique is not None:
        copies = method_of(run).copies
        whole = cost.parameters(run.structure, run.shape, run.options, run.objective, V).total
        return copies * whole + _kept(replace(run, technique=None), V)
    if run.optimizer.name in MOMENTS:  # for every parameter
        return (
            MOMENTS[run.optimizer.name] * cost.parameters(run.structure, run.shape, run.options, run.objective, V).total
        )
    places = seen.places(run.objective, run.options)
    return _in_state(run.structure, run.shape, run.options, V, places, run.optimizer.name)


@lru_cache(maxsize=4096)
def _in_state(structure: Structure, shape: Shape, options: Options, V: int, places: int, optimizer: str) -> int:
    import jax

    from lab.optimizers import OPTIMIZERS, no_numbers
    from lab.transformer import Transformer

    model = Transformer(structure=structure, shape=shape, options=options, V=V, sep=0, pad=0, places=places)
    made = OPTIMIZERS[optimizer](no_numbers(optimizer), 0.0, None)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(made.init, model.abstract())))


def _streams(run: Run, form: Form, attention: str) -> list[tuple[float, float]]:
    """Of one layer of each stream, for one example: numbers that are kept, and query-key pairs of all heads."""
    s, st, S, T = run.shape, run.structure, form.S, form.T
    heads = (3 + run.options.qk_norm) * s.N * s.H + (1 + run.options.qk_norm) * s.K * s.H
    if run.options.mixing == "dense":
        heads = s.N * s.H + s.K * s.H
    mlp = (cost.MLP_MATRICES[run.options.mlp] + 1) * s.F
    kept = 4 * s.D + heads + mlp

    def pairs(queries: int, keys: int, *, causal: bool, window: int | None = run.options.window) -> float:
        if run.options.mixing == "dense" or (attention == "fused" and _fuses(run)):
            return 0.0
        if attention == "reference" or (not causal and window is None):
            return s.N * queries * keys
        if window is not None:
            keys = min(keys, (1 if causal else 2) * (window + HALF_A_BLOCK))
        if keys < queries or not causal:
            return s.N * queries * keys
        return s.N * (queries * (keys - queries) + cost.triangle(queries) + queries * min(HALF_A_BLOCK, queries / 2))

    inputs = (S * kept, pairs(S, S, causal=st.inputs == "causal"))
    if st.encoder_only:
        return [inputs]
    if st.cross in ("separate", "tied"):
        reading = T * (4 * s.D + (1 + run.options.qk_norm) * s.N * s.H)
        return [inputs, (T * kept + reading, pairs(T, T, causal=True) + pairs(T, S, causal=False, window=None))]
    return [inputs, (T * kept, pairs(T, S + T, causal=True))]


def _fuses(run: Run) -> bool:
    """Whether a fused kernel takes what is seen (lab.attention.fused): else blocks are computed in its place."""
    o = run.options
    apart = o.window is not None and run.structure.inputs == "bidirectional"
    return o.encoding not in ("alibi", "t5") and o.turn is None and not apart
