"""Training one run, top to bottom: program -> state -> resume -> loop -> evaluate -> result.

`train(run, run_dir)` is always a resume: it goes on from the newest checkpoint in `run_dir`, or starts. The batch is a
function of (seed, step), so there is no data state to save. Killed and started again, a run ends in the same parameters
and the same `outcome`, bit for bit on CPU given the same versions and execution settings.

Letters: B batch, T target length, P predicted positions, V vocabulary.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab import cost, evaluate, hardware, records
from lab.checkpoint import Checkpoints
from lab.data import load
from lab.data.examples import Examples
from lab.data.tokenizers import TOKENIZERS
from lab.hardware import Execution
from lab.ledger import STEP, Ledger
from lab.objectives import Batch, build
from lab.optimizers import Hyperparameters, learning_rate
from lab.preemption import Preempted, stop_flag
from lab.program import Compiled, abstract_state, compiled, program, use_compilation_cache
from lab.spec import Run, to_json
from lab.transformer import Params, Transformer
from lab.versions import versions

log = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 60.0
PROFILE = "profile"
# A model that knows nothing is at ln V. Twice that in the second half of its budget: it is lost.
DIVERGED_AT_LN_V = 2.0


def parameter_hash(params: Params) -> str:
    """SHA-256 over every parameter's path and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class Clock:
    """Seconds of this attempt by what they were spent on; `seconds` in a result are those of all attempts."""

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys(("compile", "data", "evaluate", "checkpoint"), 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - start

    def left(self, training: float) -> float:
        """What is left of `training` seconds in the loop: waiting for the device."""
        return max(training - sum(self.seconds[part] for part in ("data", "evaluate", "checkpoint")), 0.0)


def train(
    run: Run,
    run_dir: Path,
    *,
    on_progress: Callable[[int, int, float | None, float], None] | None = None,
    compile_lock: Callable[[str], AbstractContextManager[Any]] | None = None,
    execution: Execution | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains `run` in `run_dir` and returns its result (lab.records); a run that has ended is not trained again.

    on_progress(step, steps, loss, tokens per second) is called after each dispatch. compile_lock(key) guards the first
    compilation of a shape, so that workers do not compile it twice at once. profile: the second dispatch (or the only one)
    is traced into run_dir/profile, for XProf or `jax.profiler.ProfileData`. Raises Preempted after SIGTERM or SIGINT,
    with everything saved.
    """
    run_dir = Path(run_dir)
    finished = records.read_result(run_dir)
    if finished is not None:
        if finished["run_id"] != run.run_id:
            raise ValueError(
                f"{run_dir}: holds the result of {finished['run_id']}, not of {run.run_id}; use another --out"
            )
        return finished
    began, clock = time.monotonic(), Clock()
    use_compilation_cache()
    kind = jax.default_backend()
    V = TOKENIZERS[run.data.tokenizer].V

    # Data: the same stream for every arm; the held-out examples do not depend on the run's seed.
    corpus = load(run.data)
    examples = Examples(corpus, run.objective.length, run.seed.data)
    tokenizer = TOKENIZERS[run.data.tokenizer]
    held_out = build(run.objective, examples.held_out(run.evaluation.examples), tokenizer, seed=0, first=0)

    # Resume, with the settings that the run was begun with.
    records.write_json(run_dir / records.RUN, to_json(run))
    checkpoints = Checkpoints(run_dir, run_id=run.run_id)
    note = checkpoints.latest_note()
    wanted = execution or hardware.choose(run, V, kind)
    execution = Execution(**note["execution"]) if note else wanted
    if execution != wanted:
        log.warning("%s goes on with the settings that it was begun with, %s, not %s", run.run_id, execution, wanted)
    device = hardware.device()
    if note and note["device"] != device:
        log.warning(
            "%s was begun on %s and goes on on %s: equal to tolerance, not to the bit",
            run.run_id,
            note["device"],
            device,
        )
    p = program(run, execution)
    with clock("compile"), compile_lock(p.key) if compile_lock else contextlib.nullcontext():
        built = compiled(p)
    ledger = Ledger(run, V)
    attempts, seconds_before, last_loss = 1, 0.0, None
    if note:
        state = checkpoints.latest_state(built.state)
        ledger.restore(note["spent"])
        attempts, seconds_before, last_loss = note["attempts"] + 1, note["seconds"], note["last_loss"]
    else:
        state = built.init(run.seed.init)
    metrics = records.MetricsWriter(run_dir, resume_step=ledger.steps)
    hyper = Hyperparameters.of(run.optimizer)
    steps = cost.steps(run, V)
    evaluate_at = {math.ceil(steps * i / run.evaluation.times) for i in range(1, run.evaluation.times)}
    diverged_at: int | None = None
    tokens_before, exact_before, training_began = ledger.spent["tokens"], ledger.spent["exact"], time.monotonic()

    def save() -> None:
        note = {
            "spent": ledger.spent,
            "execution": execution.to_json(),
            "device": device,
            "attempts": attempts,
            "seconds": seconds_before + time.monotonic() - began,
            "last_loss": last_loss,
        }
        with clock("checkpoint"):
            checkpoints.save(ledger.steps, state, note)

    def absorb(pending: tuple[int, list[float], Any, Any]) -> None:
        """Reads the metrics of a dispatch that was sent off earlier."""
        nonlocal diverged_at, last_loss
        first, rates, losses, norms = pending
        losses, norms = np.asarray(losses)[: len(rates)], np.asarray(norms)[: len(rates)]
        bad = ~np.isfinite(losses) | ~np.isfinite(norms)
        second_half = first + np.arange(len(rates)) >= steps / 2  # an early spike may pass
        bad |= second_half & (losses > DIVERGED_AT_LN_V * math.log(V))
        if bad.any():
            diverged_at = first + int(np.argmax(bad))
            return
        last_loss = float(losses[-1])
        speed = (ledger.spent["tokens"] - tokens_before) / max(time.monotonic() - training_began, 1e-9)
        metrics.write(
            step=first + len(rates),
            share=(first + len(rates)) / steps,
            loss=float(losses.mean()),
            gradient_norm=float(norms.mean()),
            learning_rate=rates[-1],
            seconds=round(seconds_before + time.monotonic() - began, 3),
        )
        if on_progress:
            on_progress(first + len(rates), steps, float(losses.mean()), speed)

    try:
        with stop_flag() as stop:
            pending, saved_at, dispatches = None, time.monotonic(), 0
            while diverged_at is None and ledger.fits(STEP):
                first, batches, rates = ledger.steps, [], []
                # The device is at work on the dispatch before.
                with clock("data"):
                    while len(rates) < execution.steps_per_dispatch and ledger.fits(STEP):
                        rates.append(learning_rate(run.optimizer, ledger.share_in(STEP)))
                        tokens = examples.batch(ledger.steps, run.batch)
                        batches.append(
                            build(run.objective, tokens, tokenizer, seed=run.seed.data, first=ledger.steps * run.batch)
                        )
                        ledger.charge(STEP)
                        if ledger.steps in evaluate_at:
                            break
                    stacked = _stack(batches, execution.steps_per_dispatch)
                count, dispatches = np.int32(len(rates)), dispatches + 1
                traced = profile and (dispatches == 2 or (dispatches == 1 and not ledger.fits(STEP)))
                with jax.profiler.trace(str(run_dir / PROFILE)) if traced else contextlib.nullcontext():
                    state, losses, norms = built.advance(state, stacked, hyper, _pad(rates, execution), count)
                    if traced:
                        jax.block_until_ready(losses)
                if pending:
                    absorb(pending)  # one dispatch late, so that the device never waits for the host
                pending = (first, rates, losses, norms)
                due = time.monotonic() - saved_at > checkpoint_seconds
                if ledger.steps in evaluate_at or due or stop.is_set():
                    absorb(pending)
                    pending = None
                    if diverged_at is None and ledger.steps in evaluate_at:
                        with clock("evaluate"):
                            now = _evaluate(built, state, held_out, tokenizer)
                        metrics.write(step=ledger.steps, share=ledger.steps / steps, held_out_loss=now["loss"])
                    if diverged_at is None and (due or stop.is_set()):
                        save()
                        saved_at = time.monotonic()
                if stop.is_set() and diverged_at is None:
                    raise Preempted()
            if pending and diverged_at is None:
                absorb(pending)
            stepped = clock.left(trained := time.monotonic() - training_began)
            final = None
            if diverged_at is None:
                save()
                with clock("evaluate"):
                    final = _evaluate(built, state, held_out, tokenizer)
    finally:
        metrics.close()
        checkpoints.close()

    nothing = {"loss": None, "bits_per_byte": None, "loss_per_position": None, "loss_standard_error": None}
    if diverged_at is not None:
        ledger = _ledger_at(run, V, diverged_at + 1)
    speed, peak = (ledger.spent["exact"] - exact_before) / max(trained, 1e-9), hardware.peak_flops()
    result = {
        "schema": records.SCHEMA,
        "run_id": run.run_id,
        "status": "done" if final else "diverged",
        "outcome": {
            "steps": ledger.steps,
            "examples": ledger.steps * run.batch,
            "tokens_seen": ledger.spent["tokens"],
            "target_tokens": ledger.steps * run.batch * run.objective.T,
            "epochs": examples.epochs(ledger.steps * run.batch),
            "spent": ledger.spent,
            **(final or nothing),
            "train_loss": last_loss if final else None,
            "parameter_hash": parameter_hash(state["params"]) if final else None,
            "diverged_at": diverged_at,
        },
        "parameters": _parameters(run, V),
        "planned": cost.planned(run, V),
        "measured": {
            "seconds": seconds_before + time.monotonic() - began,
            "compile_seconds": built.seconds,
            "seconds_by_part": {**clock.seconds, "step": stepped},
            "tokens_per_second": (ledger.spent["tokens"] - tokens_before) / max(trained, 1e-9),
            "exact_flops_per_second": speed,
            "mfu": speed / peak if peak else None,
            "peak_memory_bytes": hardware.peak_memory_bytes(),
            "attempts": attempts,
            "device": device,
            "versions": versions(),
            "execution": execution.to_json(),
        },
    }
    records.write_json(run_dir / records.RESULT, result)
    return result


def _stack(batches: list[Batch], room: int) -> Batch:
    """Batches of consecutive steps with a leading axis, filled up with zeros to the room of one dispatch."""
    arrays = []
    for parts in zip(*batches, strict=True):
        array = np.zeros((room, *parts[0].shape), np.int32)
        array[: len(parts)] = parts
        arrays.append(array)
    return Batch(*arrays)


def _pad(rates: list[float], execution: Execution) -> np.ndarray:
    padded = np.zeros(execution.steps_per_dispatch, np.float32)
    padded[: len(rates)] = rates
    return padded


def _evaluate(built: Compiled, state: dict[str, Any], held_out: Batch, tokenizer: Any) -> dict[str, Any]:
    return evaluate.evaluate(
        lambda batch: built.target_losses(state["params"], batch), held_out, bytes_per_token=tokenizer.bytes_per_token
    )


def _ledger_at(run: Run, V: int, steps: int) -> Ledger:
    ledger = Ledger(run, V)
    for _ in range(steps):
        ledger.charge(STEP)
    return ledger


def _parameters(run: Run, V: int) -> dict[str, int]:
    counted = cost.parameters(run.structure, run.shape, run.options, run.objective, V)
    return {"total": counted.total, "body": counted.body, "embedding": counted.embedding, "unused": counted.unused}


def restore_parameters(run: Run, run_dir: Path) -> tuple[Transformer, Params]:
    """The model and the parameters of the newest checkpoint of a run."""
    checkpoints = Checkpoints(run_dir, run_id=run.run_id)
    note = checkpoints.latest_note()
    if note is None:
        raise ValueError(f"{run_dir}: no checkpoint here; train the run first (`lab run` or `lab train`)")
    p = program(run, Execution(**note["execution"]))
    state = checkpoints.latest_state(abstract_state(p))
    checkpoints.close()
    return p.model, state["params"]
