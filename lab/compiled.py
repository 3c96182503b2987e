"""A program compiled ahead of time, for one run or several side by side, on the devices that are there; compiled programs are
kept for the process's life, and on disk between processes.

Letters as in lab.program.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab import evaluate, hardware, mesh
from lab.cache import cache_directory
from lab.forms import Form
from lab.mesh import ONE_DEVICE, Mesh
from lab.objectives import Batch
from lab.optimizers import Hyperparameters, no_numbers
from lab.program import (
    Program,
    abstract_state,
    advance,
    beside_params,
    initial_optimizer,
    shapes,
    token_losses,
    tools,
)
from lab.transformer import Params


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """init(seed): one run's state. enter(state, seed): that of the stage before, as it begins this one. advance(state, batches,
    hyper, rates, count, forms, fed) and target_losses(form, params, batch)
    take the host's arrays; of a batch, those rows that this host builds (`rows`). join and part: from the states of the runs of a
    pack to theirs together, and back to one, on the host."""

    init: Callable[[int], Any]
    enter: Callable[[Any, int], Any]
    advance: Callable[..., Any]
    target_losses: Callable[..., Any]
    join: Callable[[list[Any]], Any]
    part: Callable[[Any, int], Any]
    state: Any  # of one run: shapes, dtypes and where they lie
    rows: range
    seconds: float
    memory_bytes: int | None  # of one device, as the compiler counts it: arguments, results and temporary arrays


@functools.lru_cache(maxsize=128)
def compiled(p: Program) -> Compiled:
    """Ahead-of-time compilation; the result stays for the process's life, and on disk between processes."""
    start = time.monotonic()
    k, many = p.execution.steps_per_dispatch, (p.pack,) if p.pack > 1 else ()
    alone = ONE_DEVICE if many else p.mesh  # where one run by itself lies: its start, its evaluation, its checkpoint
    one = mesh.of_state(alone, abstract_state(p))
    together = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*many, *leaf.shape), leaf.dtype), one) if many else one
    together = mesh.of_state(p.mesh, together, pack=p.pack)

    # Results lie where arguments do; on one device JAX is told nothing.
    def jitted(function: Callable[..., Any], on: Mesh, results: Any, **options: Any) -> Any:
        return jax.jit(function, **options, **({} if on.devices == 1 else {"out_shardings": results}))

    with mesh.traced_on(alone):
        beside = {name: _places(part) for name, part in one.items() if name != "params"}
        start_beside = compile_lowered(jitted(functools.partial(beside_params, p), alone, beside).lower(one["params"]))

        def losses_of_targets(form: Form, params: Params, batch: Batch) -> jax.Array:
            return token_losses(p.model, form, params, batch)[:, -form.T :]

        held_out = mesh.of_batch(alone, evaluate.BATCH)
        evaluation = {
            form: compile_lowered(
                jitted(functools.partial(losses_of_targets, form), alone, mesh.everywhere(alone)).lower(
                    one["params"], shapes([form], (evaluate.BATCH,), held_out)
                )
            )
            for form in p.evaluated
        }

    def number(*leading: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leading, dtype)

    with mesh.traced_on(p.mesh, pack=p.pack):
        everywhere, by_step = mesh.everywhere(p.mesh), mesh.of_batches(p.mesh, pack=p.pack)
        lowered = jitted(
            functools.partial(advance, p), p.mesh, (_places(together), everywhere, everywhere), donate_argnums=0
        ).lower(
            together,
            shapes(p.forms, (k, *many, p.inside.examples), by_step),
            dict.fromkeys(no_numbers(p.optimizer), number(*many)),
            number(k, *many),
            number(dtype=jnp.int32),
            number(k, dtype=jnp.int32) if len(p.forms) > 1 else None,
            {name: number(k, *many, *shape) for name, shape in p.inside.fed},
        )
        step = compile_lowered(lowered)

    rows = mesh.my_rows(p.mesh, p.inside.examples) if not many else range(p.inside.examples)

    def advance_all(
        state: Any,
        batches: Batch,
        hyper: Hyperparameters,
        rates: Any,
        count: Any,
        chosen: np.ndarray | None = None,
        fed: dict[str, np.ndarray] | None = None,
    ) -> Any:
        given = dict(axis=1, first=rows.start, rows=p.inside.examples) if not many else {}
        placed = Batch(*(mesh.put(array, by_step, **given) for array in batches))
        return step(state, placed, hyper, rates, count, chosen if len(p.forms) > 1 else None, fed or {})

    def target_losses(form: Form, params: Params, batch: Batch) -> Any:
        return evaluation[replace(form, share=1)](params, Batch(*(mesh.put(array, held_out) for array in batch)))

    def init(seed: int) -> dict[str, Any]:
        params = p.model.init(seed) if p.whole is None else _first_layers(p.whole.init(seed), p.model.abstract())
        if alone.devices == 1:
            params = jax.device_put(params)
        else:
            params = jax.tree.map(lambda leaf, shape: mesh.put(leaf, shape.sharding), params, one["params"])
        return {"params": params, **start_beside(params)}

    def enter(before: Any, seed: int) -> dict[str, Any]:
        # Compiled, so that no two arrays of a state share what is donated to the next step.
        own = replace(tools(p), start=jax.jit(functools.partial(initial_optimizer, p)))
        entered = p.inside.enter(own, before, lambda: init(seed))
        if alone.devices == 1:
            return entered
        return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), entered, one)

    def join(states: list[Any]) -> Any:
        if not many:
            return states[0]
        stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *states)
        return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), stacked, together)

    take = jax.jit(lambda state, index: jax.tree.map(lambda leaf: leaf[index], state))

    def part(state: Any, index: int) -> Any:
        return jax.tree.map(np.asarray, take(state, np.int32(index))) if many else state

    return Compiled(
        init=init,
        enter=enter,
        advance=advance_all,
        target_losses=target_losses,
        join=join,
        part=part,
        state=one,
        rows=rows,
        seconds=time.monotonic() - start,
        memory_bytes=_memory(step),
    )


def _first_layers(params: Params, wanted: Any) -> Params:
    return jax.tree.map(lambda leaf, shape: leaf[: shape.shape[0]], params, wanted)


def _places(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def _memory(program: jax.stages.Compiled) -> int | None:
    """Where the backend tells: what the results reuse of the arguments (the state, donated) is counted once."""
    counted = program.memory_analysis()
    if counted is None:
        return None
    sizes = counted.argument_size_in_bytes + counted.output_size_in_bytes + counted.temp_size_in_bytes
    return int(sizes - counted.alias_size_in_bytes)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """With the options that suit the backend."""
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
