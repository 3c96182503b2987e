"""What is compiled for a run, once for each shape: the initial state, several training steps in one call, the evaluation.

Learning rates, seeds and decay are arrays, and budgets are the host's business: none of them is part of the program, so
runs that differ in nothing else share it. Flax modules are taken apart once; what is traced are plain pytrees.

Letters: B batch, S input length, T target length, P predicted positions, V vocabulary, k steps in one dispatch.
"""

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab import evaluate, hardware
from lab.attention import ATTENTION
from lab.cache import cache_directory
from lab.data.tokenizers import TOKENIZERS
from lab.hardware import Execution
from lab.objectives import Batch, predicted_positions
from lab.optimizers import OPTIMIZERS, Hyperparameters
from lab.spec import Objective, Run, nearest
from lab.transformer import Params, Transformer
from lab.versions import versions

LOGITS_AT_ONCE = 2**25  # 128 MB in float32


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything static. Seeds, learning rates, decay, budgets are arrays or numbers of the host: none of them is here."""

    model: Transformer
    objective: Objective
    batch: int
    optimizer: str
    execution: Execution

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self, versions()["jax"])).encode()).hexdigest()[:16]


def program(run: Run, execution: Execution) -> Program:
    if run.optimizer.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name = {run.optimizer.name!r}: {nearest(run.optimizer.name, list(OPTIMIZERS))}")
    if execution.attention not in ATTENTION:
        raise ValueError(
            f"execution.attention = {execution.attention!r}: {nearest(execution.attention, list(ATTENTION))}"
        )
    if run.batch % execution.microbatches:
        raise ValueError(f"execution.microbatches = {execution.microbatches}: use a divisor of batch = {run.batch}")
    model = Transformer(
        structure=run.structure,
        shape=run.shape,
        options=run.options,
        V=TOKENIZERS[run.data.tokenizer].V,
        precision=run.precision,
        scan=execution.scan,
        unroll=execution.unroll,
        remat=execution.remat,
        attention=execution.attention,
    )
    return Program(
        model=model, objective=run.objective, batch=run.batch, optimizer=run.optimizer.name, execution=execution
    )


def token_losses(
    model: Transformer, objective: Objective, params: Params, batch: Batch, *, at_once: int = LOGITS_AT_ONCE
) -> jax.Array:
    """(B, P) negative log-likelihoods in nats, float32, of every scored position.

    Where there are more than `at_once` logits the head runs over equal parts of the positions, and again over each in
    the backward pass: the logits of all of them are never there together.
    """
    hidden_BPD = model.hidden(params, objective, jnp.asarray(batch.inputs), jnp.asarray(batch.targets))
    labels_BP = jnp.asarray(batch.labels)

    def losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, labels = part
        logits = model.head(params, hidden)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    parts = _parts(labels_BP.size, at_once // model.V)
    if parts == 1:
        return losses((hidden_BPD, labels_BP))
    cut = hidden_BPD.reshape(parts, -1, hidden_BPD.shape[-1]), labels_BP.reshape(parts, -1)
    return jax.lax.map(jax.checkpoint(losses), cut).reshape(labels_BP.shape)


def _parts(rows: int, most: int) -> int:
    """The least number of equal parts of at most `most` rows."""
    return next(n for n in range(max(1, -(-rows // max(most, 1))), rows + 1) if rows % n == 0)


def loss_and_gradient(p: Program, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    """Mean loss over all scored tokens. Sums over microbatches are divided once, so that 1x8 = 2x4 = 8x1."""
    scored = p.batch * predicted_positions(p.objective)

    def total(params: Params, part: Batch) -> jax.Array:
        return jnp.sum(token_losses(p.model, p.objective, params, part))

    parts = p.execution.microbatches
    if parts == 1:
        value, gradient = jax.value_and_grad(total)(params, batch)
    else:
        split = jax.tree.map(lambda a: a.reshape(parts, p.batch // parts, *a.shape[1:]), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(total)(params, part)), None

        (value, gradient), _ = jax.lax.scan(add, zero, split)
    return value / scored, jax.tree.map(lambda g: g / scored, gradient)


def train_step(p: Program, state: dict[str, Any], batch: Batch, hyper: Hyperparameters, rate: jax.Array):
    """One optimizer step: (state, loss, gradient norm before clipping)."""
    loss, gradient = loss_and_gradient(p, state["params"], batch)
    optimizer = OPTIMIZERS[p.optimizer](hyper, rate)
    update, inner = optimizer.update(gradient, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], update)
    return {"params": params, "optimizer": inner}, loss, optax.tree.norm(gradient)


def initial_optimizer(p: Program, params: Params) -> Any:
    return OPTIMIZERS[p.optimizer](Hyperparameters(*[0.0] * 5), 0.0).init(params)


def abstract_state(p: Program) -> dict[str, Any]:
    """Shapes and dtypes of the training state."""
    params = p.model.abstract()
    return {"params": params, "optimizer": jax.eval_shape(functools.partial(initial_optimizer, p), params)}


def advance(p: Program, state, batches: Batch, hyper: Hyperparameters, rates: jax.Array, count: jax.Array):
    """`count` steps in one call; arrays have room for `steps_per_dispatch`. Returns losses and gradient norms by step."""

    def body(index, carry):
        state, losses, norms = carry
        batch = Batch(*(array[index] for array in batches))
        state, loss, norm = train_step(p, state, batch, hyper, rates[index])
        return state, losses.at[index].set(loss), norms.at[index].set(norm)

    empty = jnp.full(p.execution.steps_per_dispatch, jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, count, body, (state, empty, empty))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    init: Callable[..., Any]
    advance: Callable[..., Any]
    target_losses: Callable[..., Any]
    state: Any  # shapes and dtypes
    seconds: float


def shapes(p: Program, leading: tuple[int, ...]) -> Batch:
    S, T, P = p.objective.S, p.objective.T, predicted_positions(p.objective)
    return Batch(*(jax.ShapeDtypeStruct((*leading, n), jnp.int32) for n in (S, T, P)))


@functools.lru_cache(maxsize=128)
def compiled(p: Program) -> Compiled:
    """Ahead-of-time compilation; the result stays for the process's life, and on disk between processes."""
    start = time.monotonic()
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    k = p.execution.steps_per_dispatch
    state = abstract_state(p)
    start_optimizer = _compile(jax.jit(functools.partial(initial_optimizer, p)).lower(state["params"]))

    def init(seed: int) -> dict[str, Any]:
        params = jax.device_put(p.model.init(seed))
        return {"params": params, "optimizer": start_optimizer(params)}

    step = jax.jit(functools.partial(advance, p), donate_argnums=0)
    rates = jax.ShapeDtypeStruct((k,), jnp.float32)
    step = _compile(step.lower(state, shapes(p, (k, p.batch)), Hyperparameters(*[scalar] * 5), rates, integer))

    def losses_of_targets(params: Params, batch: Batch) -> jax.Array:
        return token_losses(p.model, p.objective, params, batch)[:, -p.objective.T :]

    evaluation = _compile(jax.jit(losses_of_targets).lower(state["params"], shapes(p, (evaluate.BATCH,))))
    seconds = time.monotonic() - start
    return Compiled(init=init, advance=step, target_losses=evaluation, state=state, seconds=seconds)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=hardware.COMPILER_OPTIONS.get(jax.default_backend()))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # another version of XLA


def use_compilation_cache() -> None:
    """Compiled programs are kept on disk and shared by all processes; a user's own JAX setting stands."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def program_key(run: Run) -> str:
    """What two runs must share for one compiled program to serve both, on the device at hand."""
    V = TOKENIZERS[run.data.tokenizer].V
    return program(run, hardware.choose(run, V, jax.default_backend())).key
