"""Training, top to bottom: program -> state -> resume -> loop -> evaluate -> result.

`train(run, run_dir)` is always a resume: it goes on from the newest checkpoint in `run_dir`, or starts. The batch is a
function of (seed, step), so there is no data state to save. Killed and started again, a run ends in the same parameters
and the same `outcome`, bit for bit on CPU given the same versions, execution settings and devices.

`train_together` trains runs of one program side by side, each with its own records, checkpoints and fate. Over several
processes (`jax.distributed`) each calls the same function with the same arguments and one directory that all see.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab import hardware, memory, mesh, records, tracking
from lab.attempt import Attempt, OutOfMemory, parameter_hash
from lab.checkpoint import Checkpoints
from lab.clock import Clock
from lab.compiled import Compiled, compiled, use_compilation_cache
from lab.evaluate import Interrupted
from lab.execution import Execution
from lab.forms import Form
from lab.mesh import Mesh
from lab.objectives import Batch
from lab.preemption import Preempted, Superseded, stop_flag
from lab.program import Program, abstract_state, program, reported, shapes
from lab.spec import Run
from lab.transformer import Params, Transformer

log = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 60.0
PROFILE = "profile"
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # what XLA's error begins with, on every backend


def train(
    run: Run,
    run_dir: Path,
    *,
    on_progress: Callable[[int, int, float | None, float], None] | None = None,
    compile_lock: Callable[[str], AbstractContextManager[Any]] | None = None,
    execution: Execution | None = None,
    on: Mesh | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    profile: bool = False,
    earlier: Sequence[Path] = (),
    superseded: Callable[[], bool] = lambda: False,
    track: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Trains `run` in `run_dir` and returns its result (lab.records); a run that has ended is not trained again.

    on_progress(step, steps, loss, tokens per second) is called after each dispatch. compile_lock(key) guards the compilation
    of a program, of each stage's too, so that workers do not compile it twice at once. on: the devices (default: all that JAX
    sees).
    profile: the second dispatch (or the only one) is traced into run_dir/profile, for XProf or `jax.profiler.ProfileData`.
    earlier: directories of attempts before this one, newest first; the newest whole checkpoint of all is where it goes on.
    track: names of trackers (lab.tracking), which are told the labels ("study", "arm") too; a tracker that fails stops nothing.
    Raises Preempted after a signal (lab.preemption), with everything saved, and Superseded once superseded(). Where the device
    runs out of memory the microbatch is halved, once, and the run goes on from its last checkpoint.
    """
    (result,) = train_together(
        [run],
        [run_dir],
        on_progress=on_progress,
        compile_lock=compile_lock,
        execution=execution,
        on=on,
        checkpoint_seconds=checkpoint_seconds,
        profile=profile,
        earlier=[earlier],
        superseded=superseded,
        track=track,
        labels=[labels or {}],
    )
    return result


def train_together(
    runs: Sequence[Run],
    run_dirs: Sequence[Path],
    *,
    on_progress: Callable[[int, int, float | None, float], None] | None = None,
    compile_lock: Callable[[str], AbstractContextManager[Any]] | None = None,
    execution: Execution | None = None,
    on: Mesh | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    profile: bool = False,
    earlier: Sequence[Sequence[Path]] | None = None,
    superseded: Callable[[], bool] = lambda: False,
    alive: Callable[[], None] = lambda: None,
    track: Sequence[str] = (),
    labels: Sequence[Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """As `train`, for runs that differ in nothing but seeds, budgets and what the optimizer takes as arrays: their states
    are stacked, one program advances them all. Raises ValueError for runs of different programs.

    Each ends at its own time: its result is written then, and the others go on. A pack that the device has no memory for,
    or whose runs were begun with other settings, is cut in halves that are trained one after another. alive() is called
    whenever they got further: after a dispatch, a batch of an evaluation, a checkpoint.
    """
    track = tracking.read(track)
    results = [_finished(run, Path(run_dir)) for run, run_dir in zip(runs, run_dirs, strict=True)]
    left = [i for i, result in enumerate(results) if result is None]
    if not left:
        return [result for result in results if result]
    settings: dict[str, Any] = dict(
        execution=execution,
        on=on,
        compile_lock=compile_lock,
        checkpoint_seconds=checkpoint_seconds,
        superseded=superseded,
        alive=alive,
        track=track,
    )
    use_compilation_cache()
    before, named = earlier or [()] * len(runs), labels or [{}] * len(runs)
    chosen = [(runs[i], Path(run_dirs[i]), before[i], named[i]) for i in left]
    made: list[dict[str, Any]] | None = None
    why = ""
    try:
        made = _train(chosen, on_progress=on_progress, profile=profile, **settings)
    except (jax.errors.JaxRuntimeError, _Different) as error:
        if OUT_OF_MEMORY not in str(error) and not isinstance(error, _Different):
            raise
        why = str(error).partition("\n")[0][:300]
    # Here the error is gone, and with it what its frames held on the device.
    if made is None and len(chosen) > 1:
        half = len(chosen) // 2
        log.warning("%d runs do not train side by side; %d and the others do: %s", len(chosen), half, why)
        made = []
        for some in (chosen[:half], chosen[half:]):
            those, directories, befores, names = zip(*some, strict=True)
            made += train_together(
                those, directories, on_progress=on_progress, earlier=befores, labels=names, **settings
            )
    elif made is None:
        log.warning("%s: %s", chosen[0][0].run_id, why)
        try:
            made = _train(chosen, on_progress=on_progress, halve=True, **settings)
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            raise OutOfMemory(chosen[0][0].run_id, "half the examples at once either") from error
    for i, result in zip(left, made, strict=True):
        results[i] = result
    return [result for result in results if result]


class _Different(ValueError):
    """Runs that can not train side by side, since they were begun with other settings."""


def _finished(run: Run, run_dir: Path) -> dict[str, Any] | None:
    finished = records.read_result(run_dir)
    if finished is not None and finished["run_id"] != run.run_id:
        raise ValueError(f"{run_dir}: holds the result of {finished['run_id']}, not of {run.run_id}; use another --out")
    return finished


def _train(
    chosen: Sequence[tuple[Run, Path, Sequence[Path], Mapping[str, str]]],
    *,
    on_progress: Callable[[int, int, float | None, float], None] | None,
    compile_lock: Callable[[str], AbstractContextManager[Any]] | None,
    execution: Execution | None,
    on: Mesh | None,
    checkpoint_seconds: float,
    superseded: Callable[[], bool],
    alive: Callable[[], None],
    track: Sequence[str],
    profile: bool = False,
    halve: bool = False,
) -> list[dict[str, Any]]:
    clock = Clock()
    attempts: list[Attempt] = []

    def build(p: Program) -> Compiled:
        with clock("compile"), compile_lock(p.key) if compile_lock else contextlib.nullcontext():
            return compiled(p)

    try:
        for run, run_dir, before, named in chosen:
            rows = on.data * on.fsdp if on else math.gcd(run.batch, jax.device_count())
            wanted = execution or hardware.choose(
                run, run.V, jax.default_backend(), limit=hardware.memory_limit(), rows=rows
            )
            attempts.append(
                Attempt(run, run_dir, wanted=wanted, earlier=before, halve=halve, track=track, labels=named)
            )
        where = on or _place(attempts)
        p = _one_program(attempts, where)
        _loop(attempts, p, build, clock, on_progress, checkpoint_seconds, superseded, alive, profile)
    finally:
        with contextlib.ExitStack() as closing:  # all of them, whatever one of them raises
            closing.callback(
                lambda: tracking.finish([mirror for a in attempts for mirror in a.mirrors])
            )  # after all else
            for attempt in attempts:
                closing.callback(attempt.close)
    return [attempt.result for attempt in attempts if attempt.result]


def _place(attempts: list[Attempt]) -> Mesh:
    """Of all devices that JAX sees; the matrices are cut where one device is predicted not to hold them."""
    run, execution, limit = attempts[0].run, attempts[0].execution, hardware.memory_limit()
    share = mesh.choose(run.batch // execution.microbatches, jax.device_count(), pack=len(attempts))
    if len(attempts) > 1 or share.devices == 1 or limit is None:
        return share
    whole = memory.predict(run, attempts[0].V, execution, by_batch=share.data)
    crowded = whole.total > hardware.SHARE_OF_MEMORY * limit
    return mesh.choose(run.batch // execution.microbatches, jax.device_count(), cut_matrices=crowded)


def _one_program(attempts: list[Attempt], where: Mesh) -> Program:
    programs = {program(a.run, a.execution, on=where, pack=len(attempts), stage=a.stage): a for a in attempts}
    if len(programs) == 1:
        return next(iter(programs))
    one, other, *_ = programs
    if replace(one, execution=other.execution, model=other.model) == other and _same_model(one, other):
        raise _Different("they were begun with other settings of the execution")
    a, b, *_ = (attempt.run.run_id for attempt in programs.values())
    raise ValueError(f"{a} and {b} are runs of different programs: train together what has one shape and objective")


def _same_model(one: Program, other: Program) -> bool:
    return all(getattr(one.model, x) == getattr(other.model, x) for x in ("structure", "shape", "options", "V"))


def _loop(
    attempts: list[Attempt],
    p: Program,
    build: Callable[[Program], Compiled],
    clock: Clock,
    on_progress: Callable[[int, int, float | None, float], None] | None,
    checkpoint_seconds: float,
    superseded: Callable[[], bool],
    alive: Callable[[], None],
    profile: bool,
) -> None:
    """Advances all attempts until each has its result. A run whose method has stages trains alone."""
    built = build(p)
    state = built.join(
        [a.checkpoints.latest_state(built.state) if a.note else built.init(a.run.seed.init) for a in attempts]
    )
    hyper = jax.tree.map(lambda *leaves: np.stack(leaves) if p.pack > 1 else leaves[0], *[a.hyper for a in attempts])
    gather = mesh.gather(p.mesh)
    for attempt in attempts:
        attempt.begin(clock, sharing=len(attempts))

    def absorb(sent: _Dispatch) -> None:
        """Reads the metrics of a dispatch that was sent off earlier."""
        losses, norms = np.asarray(sent.losses), np.asarray(sent.norms)
        alive()
        for lane, (first, rates) in sent.taken.items():
            attempt, column = attempts[lane], (..., lane) if p.pack > 1 else ...
            if attempt.diverged_at is not None:
                continue
            mean = attempt.absorb(first, rates, losses[column], norms[column])
            if mean is not None and on_progress:
                on_progress(first + len(rates), attempt.steps, mean, attempt.speed("tokens"))

    def losses_of(params: Params) -> Callable[[Form, Batch], Any]:
        def target_losses(form: Form, batch: Batch) -> Any:
            alive()  # the batch before this one has been read
            return built.target_losses(form, params, batch)

        return target_losses

    def save(attempt: Attempt, own: Any) -> None:
        attempt.save(own)
        alive()

    def finish(lane: int) -> None:
        """An attempt that has spent its budget or diverged: saved, evaluated and written down."""
        attempt, final, digest = attempts[lane], None, None
        trained = clock.elapsed - began
        share = {name: seconds / len(attempts) for name, seconds in clock.parts(trained).items()}
        speed, peak, tokens = attempt.speed("exact", trained), hardware.peak_flops(), attempt.speed("tokens", trained)
        if attempt.diverged_at is None:
            own = built.part(state, lane)
            save(attempt, own)
            params = reported(p, attempt.run, own)
            final = attempt.evaluate(losses_of(params), asked)
            digest = parameter_hash(params, gather)
            for name in ("evaluate", "checkpoint"):  # what ending took belongs to the whole, not to the loop
                share[name] = clock.seconds[name] / len(attempts)
        measured = {
            "compile_seconds": built.seconds,
            "seconds_by_part": share,
            "tokens_per_second": tokens,
            "exact_flops_per_second": speed,
            "mfu": speed * len(attempts) / peak if peak else None,
            "program_memory_bytes": built.memory_bytes,
            "mesh": str(p.mesh),
            "pack": len(attempts),
        }
        attempt.finish(final, params_hash=digest, measured=measured)

    with stop_flag() as stop:
        # Hosts that stop in an evaluation at different batches would wait for each other.
        asked = (lambda: stop.is_set() or superseded()) if jax.process_count() == 1 else (lambda: False)
        pending, saved_at, dispatches, began = None, time.monotonic(), 0, clock.elapsed
        while any(attempt.running for attempt in attempts):
            if attempts[0].enters:
                if pending:
                    absorb(pending)
                    pending = None
                p, built, state = _enter_stage(attempts[0], p, state, build)
            live = [lane for lane, attempt in enumerate(attempts) if attempt.spends]
            if live:
                with clock("data"):  # the device is at work on the dispatch before
                    taken, batches, rates, chosen, fed = _next_steps(attempts, live, p, built.rows)
                count, dispatches = np.int32(max(len(r) for _, r in taken.values())), dispatches + 1
                last = not any(attempts[lane].spends for lane in live)
                traced = profile and (dispatches == 2 or (dispatches == 1 and last))
                with jax.profiler.trace(str(attempts[0].run_dir / PROFILE)) if traced else contextlib.nullcontext():
                    state, losses, norms = built.advance(state, batches, hyper, rates, count, chosen, fed)
                    if traced:
                        jax.block_until_ready(losses)
                if pending:
                    absorb(pending)  # one dispatch late, so that the device never waits for the host
                pending = _Dispatch(taken, losses, norms)
                if attempts[0].dependent:  # what was spent is known once it is done
                    absorb(pending)
                    pending = None
            due, stopping, ousted = _on_any_host(
                time.monotonic() - saved_at > checkpoint_seconds, stop.is_set(), superseded()
            )
            pausing = [lane for lane, a in enumerate(attempts) if a.running and (a.pauses or a.diverged_at is not None)]
            if not (pausing or due or stopping or ousted):
                continue
            if pending:
                absorb(pending)
                pending = None
            for lane, attempt in enumerate(attempts):
                if not attempt.running:
                    continue
                try:
                    if attempt.diverged_at is None and attempt.evaluates:
                        params = reported(p, attempt.run, built.part(state, lane))
                        attempt.record_evaluation(losses_of(params), asked)
                    if not attempt.spends:
                        finish(lane)
                        continue
                except Interrupted:
                    stopping, ousted = stopping or stop.is_set(), ousted or superseded()
            if due or stopping or ousted:  # also those that were evaluated before the one that was stopped in it
                for lane, attempt in enumerate(attempts):
                    if attempt.running:
                        save(attempt, built.part(state, lane))
            if due:
                saved_at = time.monotonic()
            if any(attempt.running for attempt in attempts):
                if stopping:
                    raise Preempted()
                if ousted:
                    raise Superseded()


def _enter_stage(
    attempt: Attempt, p: Program, state: Any, build: Callable[[Program], Compiled]
) -> tuple[Program, Compiled, Any]:
    """The program of the stage that the next step is of, and the state as it begins it. Compiling is charged to no budget."""
    attempt.stage = attempt.ledger.stage
    p = program(attempt.run, attempt.execution, on=p.mesh, stage=attempt.stage)
    built = build(p)
    log.info("%s: stage %d begins at step %d", attempt.run.run_id, attempt.stage, attempt.ledger.steps)
    return p, built, built.enter(state, attempt.run.seed.init)


class _Dispatch:
    """Steps that were sent off: of each attempt the first and the learning rates, of all the metrics to come."""

    def __init__(self, taken: dict[int, tuple[int, list[float]]], losses: Any, norms: Any):
        self.taken, self.losses, self.norms = taken, losses, norms


def _next_steps(
    attempts: list[Attempt], live: list[int], p: Program, rows: range
) -> tuple[dict[int, tuple[int, list[float]]], Batch, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Steps until the dispatch is full or the state of one attempt is needed, stacked; of attempts that have ended zeros.
    Of each step the batch fills the room of its form, the last but one of what is returned; the last is what their method hands
    them."""
    room, many = p.execution.steps_per_dispatch, (p.pack,) if p.pack > 1 else ()
    batches = [
        np.zeros((s.shape[0], *many, len(rows), s.shape[-1]), np.int32)
        for s in shapes(p.forms, (room, p.inside.examples))
    ]
    fed = {name: np.zeros((room, *many, *shape), np.float32) for name, shape in p.inside.fed}
    chosen, rates = np.zeros(room, np.int32), np.zeros((room, *many), np.float32)
    taken: dict[int, tuple[int, list[float]]] = {lane: (attempts[lane].ledger.steps, []) for lane in live}
    for step in range(room):
        for lane in live:
            rate, chosen[step], batch, given = attempts[lane].take(rows)
            place = (step, lane) if many else (step,)
            rates[place] = rate
            taken[lane][1].append(rate)
            for name, array in given.items():
                fed[name][place] = array
            for array, part in zip(batches, batch, strict=True):
                array[(*place, slice(None), slice(0, part.shape[-1]))] = part
        if any(attempts[lane].pauses or attempts[lane].enters for lane in live):
            break
    return taken, Batch(*batches), rates, chosen, fed


def _on_any_host(*flags: bool) -> tuple[bool, ...]:
    """A save is everybody's: the hosts' clocks and signals differ, and one that waited for the others would wait forever."""
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    seen: Any = multihost_utils.process_allgather(np.array(flags))  # [hosts, flags]
    return tuple(any(column) for column in zip(*np.asarray(seen).tolist(), strict=True))


def restore_parameters(run: Run, run_dir: Path) -> tuple[Transformer, Params]:
    """The model and the parameters of the newest checkpoint of a run."""
    newest, *earlier = records.attempts(run_dir)
    checkpoints = Checkpoints(newest, run_id=run.run_id, earlier=earlier, reads_only=True)
    try:
        if checkpoints.note is None:
            raise ValueError(f"{run_dir}: no checkpoint here; train the run first (`lab run` or `lab train`)")
        p = program(run, Execution(**checkpoints.note["execution"]), stage=checkpoints.note["stage"])
        state = checkpoints.latest_state(abstract_state(p))
    finally:
        checkpoints.close()
    return p.model, reported(p, run, state)
