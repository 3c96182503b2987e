"""One attempt at one run, as the host sees it: its data, its ledger, its records and its checkpoints.

What is on the device is lab.train's: there a run may be alone or train side by side with others, and nothing here can tell.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab import cost, evaluate, hardware, records, tracking
from lab.batches import Batches, epochs
from lab.checkpoint import Checkpoints
from lab.clock import Clock
from lab.data import load
from lab.execution import Execution
from lab.forms import Form
from lab.ledger import Ledger, simulated
from lab.method import NO_UPDATE
from lab.objectives import Batch
from lab.optimizers import Hyperparameters, hyperparameters, learning_rate
from lab.spec import Run, to_json
from lab.transformer import Params
from lab.versions import versions

log = logging.getLogger(__name__)
# A model that knows nothing is at ln V. Twice that in the second half of its budget: it is lost.
DIVERGED_AT_LN_V = 2.0
MEASURED = ("loss", "bits_per_byte", "loss_per_position", "loss_by_form", "loss_standard_error")


def parameter_hash(params: Params, gather: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """SHA-256 over every parameter's path and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(gather(leaf).tobytes())
    return digest.hexdigest()


class OutOfMemory(ValueError):
    """A run that does not fit, with half the microbatch either."""

    def __init__(self, run_id: str, of: str):
        remedy = "use remat, a mesh of more devices (--mesh), or a smaller shape"
        super().__init__(f"{run_id}: the device has no memory for {of}: {remedy}")


class Attempt:
    """`running` until the budget is spent or the run has diverged; then `result` is there and on disk.

    earlier: directories of attempts before this one, newest first, from whose checkpoints it goes on. wanted: the settings
    of a run that starts; one that goes on keeps those that it was begun with. halve: but with half the microbatch, since the
    device ran out of memory. Raises OutOfMemory where that has been done, or can not be. track: trackers (lab.tracking) that
    show it, with these labels.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        *,
        wanted: Execution,
        earlier: Sequence[Path] = (),
        halve: bool = False,
        track: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ):
        self.run, self.run_dir, self.V = run, Path(run_dir), run.V
        # The same stream for every arm; the held-out examples do not depend on the run's seed.
        self.batches = Batches(run, load(run.data))
        self.writes = jax.process_index() == 0
        if self.writes:
            records.write_json(self.run_dir / records.RUN, to_json(run))
        self.checkpoints = Checkpoints(self.run_dir, run_id=run.run_id, earlier=earlier)
        self.note = note = self.checkpoints.note
        self.execution = Execution(**note["execution"]) if note else wanted
        if self.execution != wanted:
            log.warning(
                "%s goes on with the settings that it was begun with, %s, not %s", run.run_id, self.execution, wanted
            )
        self.out_of_memory = (note or {}).get("out_of_memory", 0)
        self.device = hardware.device()
        self.metrics: records.MetricsWriter | None = None
        if halve:
            self._halve()
        if note and note["device"] != self.device:
            log.warning(
                "%s was begun on %s and goes on on %s: equal to tolerance, not to the bit",
                run.run_id,
                note["device"],
                self.device,
            )
        self.ledger = Ledger(run, self.V)
        self.attempts, self.seconds_before, self.last_loss = 1, 0.0, None
        if note:
            self.ledger.restore(note["spent"], note["steps"])
            self.attempts, self.seconds_before = note["attempts"] + 1, note["seconds"]
            self.last_loss = note["last_loss"]
        self.stage = note["stage"] if note else 0  # of the state, which enters the next one where that begins
        self.dependent = self.ledger.method.dependent
        self.steps = cost.steps(run, self.V)
        self.hyper: Hyperparameters = hyperparameters(run.optimizer, steps=self.steps, seed=run.seed.data)
        times = run.evaluation.times
        self.evaluate_at = {self._reached(i / times) for i in range(1, times)}
        self.evaluate_at = {step for step in self.evaluate_at if step > self.ledger.method.first_step}
        self.diverged_at: int | None = None
        self.result: dict[str, Any] | None = None
        latest = self.checkpoints.latest
        lines = records.read_metrics(latest.run_dir if latest else self.run_dir)
        self.kept = [line for line in lines if line["step"] <= self.ledger.steps]
        self.evaluated = {line["step"] for line in self.kept if "held_out_loss" in line}
        if self.writes:
            self.metrics = records.MetricsWriter(self.run_dir, self.kept)
        self.track, self.labels = track, labels or {}
        self.mirrors: list[tracking.Mirror] = []
        self.spent_before = dict(self.ledger.spent)

    def _reached(self, share: float) -> int:
        """The step after which this share of the run is behind it: of its budget where steps cost differently by technique."""
        if self.run.technique is None or self.dependent:
            return math.ceil(self.steps * share)
        return simulated(self.run, self.V).reached(share)

    def _halve(self) -> None:
        parts = 2 * self.execution.microbatches
        if self.out_of_memory or self.run.batch % parts:
            self.close()
            why = "after they were halved" if self.out_of_memory else "which can not be halved"
            raise OutOfMemory(
                self.run.run_id, f"{self.run.batch // self.execution.microbatches} examples at once, {why}"
            )
        self.execution = replace(self.execution, microbatches=parts)
        self.out_of_memory += 1
        log.warning("%s: out of memory; %d microbatches from here on", self.run.run_id, parts)

    def begin(self, clock: Clock, *, sharing: int) -> None:
        """sharing: runs that train side by side; the seconds of each are its share of theirs."""
        self.clock, self.sharing, self.training_began = clock, sharing, time.monotonic()
        if self.writes and self.track:
            tracked = tracking.Tracked(run=self.run, run_dir=self.run_dir, kept=self.kept, labels=self.labels)
            self.mirrors = [tracking.Mirror(name, tracked) for name in self.track]

    @property
    def running(self) -> bool:
        return self.result is None

    @property
    def spends(self) -> bool:
        """Whether there is a step to take: not once the ledger is full, though the run has still to be finished, nor while
        this step's evaluation is to be made (a stop came before it)."""
        return self.running and self.diverged_at is None and self.ledger.fits and not self.evaluates

    @property
    def pauses(self) -> bool:
        """Whether the state is needed here: for an evaluation, or as the last."""
        return self.evaluates or not self.ledger.fits

    @property
    def enters(self) -> bool:
        """Whether the step that comes next is of another stage than the state is."""
        return self.spends and self.ledger.stage != self.stage

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation on the way is due after this step."""
        return self.ledger.steps in self.evaluate_at - self.evaluated

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.clock.elapsed / self.sharing

    def take(self, rows: range) -> tuple[float, int, Batch, dict[str, np.ndarray]]:
        """Learning rate, form, batch (those rows of it) and what the method hands it, of the step that comes next, which is
        charged."""
        rate = learning_rate(self.run.optimizer, self.ledger.share_in_step)
        form, batch = self.batches.step(self.ledger.steps, rows)
        fed = self.ledger.method.feed(self.ledger.moment) if self.run.technique else {}
        self.ledger.charge()
        return rate, form, batch, fed

    def absorb(self, first: int, rates: list[float], losses: np.ndarray, norms: np.ndarray) -> float | None:
        """Records the steps from `first` on; returns their mean loss, or None where they diverged or made no update."""
        losses, norms = losses[: len(rates)], norms[: len(rates)]
        if self.dependent:
            self.ledger.settle(bool(norms[0] != NO_UPDATE))
        bad = ~np.isfinite(losses) | ~np.isfinite(norms)
        second_half = first + np.arange(len(rates)) >= self.steps / 2  # an early spike may pass
        bad |= second_half & (losses > DIVERGED_AT_LN_V * math.log(self.V))
        if bad.any():
            self.diverged_at = first + int(np.argmax(bad))
            return None
        if norms[-1] == NO_UPDATE:
            return None
        self.last_loss = float(losses[-1])
        done = first + len(rates)
        mean = float(losses.mean())
        self._write(
            step=done,
            share=done / self.steps,
            loss=mean,
            gradient_norm=float(norms.mean()),
            learning_rate=rates[-1],
            seconds=round(self.seconds, 3),
        )
        return mean

    def evaluate(self, target_losses: Callable[[Form, Batch], Any], stopping: Callable[[], bool]) -> dict[str, Any]:
        """Raises evaluate.Interrupted once stopping() is true."""
        with self.clock("evaluate"):
            return evaluate.evaluate(
                target_losses, self.batches.held_out, tokenizer=self.batches.tokenizer, stopping=stopping
            )

    def record_evaluation(self, target_losses: Callable[[Form, Batch], Any], stopping: Callable[[], bool]) -> None:
        now = self.evaluate(target_losses, stopping)
        self.evaluated.add(self.ledger.steps)
        self._write(step=self.ledger.steps, share=self.ledger.steps / self.steps, held_out_loss=now["loss"])

    def _write(self, **values: float | int | None) -> None:
        if self.metrics is not None:
            self.metrics.write(**values)
        for mirror in self.mirrors:
            mirror.log({**values, "tokens_per_second": self.speed("tokens")} if "loss" in values else values)

    def save(self, state: Any) -> None:
        note = {
            "spent": self.ledger.spent,
            "steps": self.ledger.steps,
            "stage": self.stage,
            "execution": self.execution.to_json(),
            "device": self.device,
            "attempts": self.attempts,
            "seconds": self.seconds,
            "last_loss": self.last_loss,
            "out_of_memory": self.out_of_memory,
        }
        with self.clock("checkpoint"):
            self.checkpoints.save(self.ledger.steps, state, note)

    def speed(self, unit: str, seconds: float | None = None) -> float:
        """What this attempt spends a second (default: of all of its loop so far); those beside it have theirs."""
        seconds = time.monotonic() - self.training_began if seconds is None else seconds
        return (self.ledger.spent[unit] - self.spent_before[unit]) / max(seconds, 1e-9)

    def finish(self, final: dict[str, Any] | None, *, params_hash: str | None, measured: dict[str, Any]) -> None:
        """Writes result.json. final: the last evaluation; None where the run diverged."""
        if self.diverged_at is not None and not self.dependent:
            self.ledger = Ledger(self.run, self.V)
            for _ in range(self.diverged_at + 1):
                self.ledger.charge()
        run, steps, updates = self.run, self.ledger.steps, int(self.ledger.spent["steps"])
        counted = cost.parameters(run.structure, run.shape, run.options, run.objective, self.V)
        self.result = {
            "schema": records.SCHEMA,
            "run_id": run.run_id,
            "status": "done" if final else "diverged",
            "outcome": {
                "steps": self.ledger.steps,
                "updates": updates,
                "examples": updates * run.batch,
                "tokens_seen": self.ledger.spent["tokens"],
                "target_tokens": self.batches.target_tokens(updates),
                "epochs": epochs(run, steps),
                "spent": self.ledger.spent,
                **(final or dict.fromkeys(MEASURED)),
                "train_loss": self.last_loss if final else None,
                "parameter_hash": params_hash,
                "diverged_at": self.diverged_at,
            },
            "parameters": {
                "total": counted.total,
                "body": counted.body,
                "embedding": counted.embedding,
                "unused": counted.unused,
            },
            "planned": cost.planned(run, self.V),
            "planned_is": "expected" if cost.is_expected(run) else "exact",
            "measured": {
                "seconds": self.seconds,
                **measured,
                "peak_memory_bytes": hardware.peak_memory_bytes(),
                "out_of_memory": self.out_of_memory,
                "attempts": self.attempts,
                "device": self.device,
                "versions": versions(),
                "execution": self.execution.to_json(),
            },
        }
        self.checkpoints.wait()  # a run whose last save failed has not ended
        if self.writes:
            records.write_json(self.run_dir / records.RESULT, self.result)
        for mirror in self.mirrors:
            mirror.finish(self.result)

    def close(self) -> None:
        """Raises what the last save failed with."""
        if self.metrics is not None:
            self.metrics.close()
        self.checkpoints.close()
