"""Measures reference times (lab.reference_times) on the device at hand: each operation that some runs need, by itself.

Compiled as training compiles it, run on one batch over and over, each run waited for (`block_until_ready`), a state handed on
from one to the next; compilation and the first runs are not counted. The median is what is charged; the mean and the number of
runs are recorded beside it. A device that is shared gives numbers of that hour: measure on an idle one.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab import cost, hardware, records, reference_times
from lab.checks import check_integer
from lab.compiled import compile_lowered, use_compilation_cache
from lab.cost import Active
from lab.forms import Form
from lab.ledger import method_of
from lab.method import Operation, Tools
from lab.objectives import Batch
from lab.optimizers import hyperparameters
from lab.program import Program, abstract_state, curvature, example_losses, loss_and_gradient, program, shapes, updated
from lab.spec import Budget, Run
from lab.transformer import Params
from lab.versions import versions

log = logging.getLogger(__name__)
WARM_UP = 3  # runs that are not counted


def machine() -> dict[str, Any]:
    return {"device": hardware.device(), "backend": jax.default_backend(), "versions": versions()}


def wanted(runs: Iterable[Run]) -> dict[str, tuple[Run, Operation, int]]:
    """By its key every operation that these runs can be charged, a run that has it, and the stage."""
    found: dict[str, tuple[Run, Operation, int]] = {}
    for run in runs:
        method = method_of(without_table(run))
        for stage, operation in method.every():
            of = method.stages[stage]
            subject = reference_times.subject_of(of, operation.form)
            key = f"{reference_times.key(of, operation, subject)} x{operation.examples}"
            found.setdefault(key, (without_table(run), operation, stage))
    return found


def without_table(run: Run) -> Run:
    """The run by steps, which need no reference times."""
    return replace(run, budget=Budget(unit="steps", amount=1000))


def calibrate(
    runs: Sequence[Run], out: Path, *, steps: int = 1000, on_progress: Callable[[str, int, int], None] | None = None
) -> reference_times.Table:
    """Writes the table of all that the runs need to `out`; one that is there, of the same machine, is added to. on_progress(key,
    number, of how many) is called before each measurement. Raises ValueError where `out` is another machine's."""
    check_integer("steps", steps, 1)
    use_compilation_cache()
    entries, here = _there(out), machine()
    todo = {key: of for key, of in wanted(runs).items() if key not in entries}
    for number, (key, (run, operation, stage)) in enumerate(todo.items()):
        if on_progress:
            on_progress(key, number, len(todo))
        entries[key] = measured(run, operation, stage, steps)
        reference_times.write(out, entries, machine=here, source="lab calibrate")
    return reference_times.read(out)


def _there(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    reference_times.read(out)
    content, here = records.read_json(out), _decisive(machine())
    there = _decisive(content["machine"])
    if other := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
        differ = ", ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in other)
        raise ValueError(f"{out}: was measured elsewhere ({differ}): write to another file")
    return dict(content["entries"])


def _decisive(machine: dict[str, Any]) -> dict[str, Any]:
    """What a time depends on: not the commit that the lab is at."""
    versions = {name: version for name, version in machine["versions"].items() if name not in ("git", "bitterlab")}
    return {**{name: value for name, value in machine.items() if name != "versions"}, **versions}


def measured(run: Run, operation: Operation, stage: int, steps: int) -> dict[str, Any]:
    """Seconds of one operation: {"seconds": what is charged, "mean", "steps", what it is of}. Of an update that does more every
    so many steps (SOAP's) the mean over such a period of its steps' medians."""
    work, arguments, p, fed_back = prepared(run, operation, stage)
    donated = () if fed_back is None else (fed_back,)
    compiled = compile_lowered(jax.jit(work, keep_unused=True, donate_argnums=donated).lower(*arguments))
    given, seconds = list(arguments), []
    period = int(run.optimizer.extra["interval"]) if operation.kind == "update" and _periodic(run) else 1
    runs = -(-steps // period) * period
    for index in range(WARM_UP + runs):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*given))
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
        if fed_back is not None:
            given[fed_back] = result
    return {
        "seconds": statistics.fmean(statistics.median(seconds[phase::period]) for phase in range(period)),
        "mean": statistics.fmean(seconds),
        "steps": runs,
        "shape": {"D": p.model.shape.D, "L": p.model.shape.L, "L_input": p.model.shape.L_input, "batch": run.batch},
        "precision": run.precision,
        "execution": p.execution.to_json(),
    }


def _periodic(run: Run) -> bool:
    """Whether some updates do more than others; an estimate of the Hessian is an operation of its own."""
    return "interval" in run.optimizer.extra and not run.optimizer.curvature


def prepared(
    run: Run, operation: Operation, stage: int
) -> tuple[Callable[..., Any], tuple[Any, ...], Program, int | None]:
    """What an operation executes, as a function of arrays, arrays to call it with, and which of these its result takes the
    place of, as a training state does (None: of none)."""
    execution = hardware.choose(run, run.V, jax.default_backend(), limit=hardware.memory_limit())
    p = program(run, execution, stage=stage)
    form, kind = p.forms[operation.form], operation.kind
    params = _filled(p.model.abstract())
    batch = _tokens(p, operation.examples or run.batch, form)
    if kind == "train":
        keep = _keep(p, operation.active)
        return (
            lambda params, batch, keep: loss_and_gradient(p, params, batch, form, keep),
            (params, batch, keep),
            p,
            None,
        )
    if kind == "forward":
        return functools.partial(example_losses, p), (params, batch), p, None
    if kind == "hessian":
        return functools.partial(curvature, p), (params, _tokens(p, run.batch, form), jax.random.key(0)), p, None
    state = {name: _filled(part) for name, part in abstract_state(p).items()}
    if kind == "average":
        fed = {name: jnp.ones(shape, jnp.float32) for name, shape in p.inside.fed}
        core = {name: state.pop(name) for name in ("params", "optimizer")}

        def average(core: dict[str, Any], own: dict[str, Any]) -> Any:  # a step whose every other part takes no time
            tools = Tools(plain=lambda *_: (core, 0.0, 0.0), losses=lambda *_: None, start=lambda _: None)
            after, *_ = p.inside.step(tools, {**core, **own}, batch, fed)
            return {name: after[name] for name in own}

        return average, (core, state), p, 1
    assert kind == "update", kind
    hyper = hyperparameters(run.optimizer, steps=cost.steps(run, run.V), seed=run.seed.data)

    def update(state: dict[str, Any], gradient: Params) -> Any:
        extra = {"curvature": lambda _: gradient} if p.hessian_examples else {}  # its estimate is measured by itself
        return {**state, **updated(p, state, gradient, hyper, jnp.float32(1e-3), **extra)}

    return update, (state, params), p, 0


def _filled(tree: Any) -> Any:
    def fill(leaf: Any) -> jax.Array:
        number = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1  # a counter of 1: no estimate is due
        return jnp.full(leaf.shape, number, leaf.dtype)

    return jax.tree.map(fill, tree)


def _tokens(p: Program, examples: int, form: Form) -> Batch:
    """Random ids of text; of masked_lm, whose targets are places, such places."""
    rng = np.random.default_rng(0)
    highest = Batch(p.model.sep, form.S if form.name == "masked_lm" else p.model.sep, p.model.sep)
    arrays = (
        rng.integers(0, most, (examples, shape.shape[-1])).astype(np.int32)
        for most, shape in zip(highest, shapes([form], (examples,)), strict=True)
    )
    return Batch(*(jnp.asarray(array) for array in arrays))


def _keep(p: Program, active: Active | None) -> dict[str, jax.Array] | None:
    """The first layers of each stream, as many as run."""
    if active is None:
        return None
    shape = p.model.shape
    counts = {"inputs": (active.all_inputs, shape.L_input), "targets": (active.targets, shape.L)}
    return {name: jnp.arange(depth) < count for name, (count, depth) in counts.items()}
