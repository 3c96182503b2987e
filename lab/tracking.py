"""Trackers: TensorBoard and Weights & Biases show what a run writes to metrics.jsonl and result.json, which stay the truth.

A tracker is a class with `log` and `finish` and one line in TRACKERS. Each tracker of a run works in a daemon thread, fed by a
bounded queue, so that training never waits for it. What it raises, and what it hangs in, is said once and ends the tracking of
that run, never the run.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lab import spec
from lab.checks import nearest
from lab.secrets import redacted
from lab.spec import Run

log = logging.getLogger(__name__)
QUEUE = 10_000  # lines that a slow tracker may be behind
PATIENCE = 60.0  # seconds that one call of a tracker may take
FINISH_SECONDS = 20.0  # that the end of runs waits for their trackers, all together
INIT_SECONDS, UPLOAD_SECONDS = (
    30.0,
    15.0,
)  # that W&B may take to reach its server, and to upload what is left at the end
TAG_LENGTH = 64  # characters of a W&B tag
TENSORBOARD = "tensorboard"

Line = Mapping[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker is told of one attempt at a run. kept: lines of the attempts before it, up to the checkpoint that it goes
    on from. labels: where the run belongs, as far as it is known ("study", "arm")."""

    run: Run
    run_dir: Path
    kept: Sequence[Line] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """All of it is called in one thread; what it raises switches it off."""

    def log(self, line: Line) -> None:
        """One line of metrics.jsonl: `step` and what was measured there."""
        ...

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """result: as in result.json; None where the attempt stopped before the run's end."""
        ...


class TensorBoard:
    """Event files in the attempt's own directory, which has one writer and goes where the attempt goes.

    Each begins with the lines that metrics.jsonl begins with, and with the mark on which TensorBoard drops what is in older files
    of the directory: the newest file is always the whole curve.
    """

    def __init__(self, tracked: Tracked):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        protos: Any = event_pb2, summary_pb2  # made at run time, without types
        self.Event, self.Summary, SessionLog = protos[0].Event, protos[1].Summary, protos[0].SessionLog
        directory = tracked.run_dir / TENSORBOARD
        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter would write from a thread whose errors nobody sees.
        self.events = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self.events.write_event(self.Event(wall_time=time.time(), step=0, session_log=start))
        settings = {"run_id": tracked.run.run_id, **flat(spec.to_json(tracked.run)), **tracked.labels}
        experiment, began, self.ended = summary.hparams(
            settings, dict.fromkeys(("loss", "held_out_loss", "outcome.loss"))
        )
        for part in (experiment, began):
            self._write(part)
        for line in tracked.kept:
            self.log(line)
        self.events.flush()

    def _write(self, summary: Any, step: int = 0) -> None:
        self.events.write_event(self.Event(wall_time=time.time(), step=step, summary=summary))

    def log(self, line: Line) -> None:
        values = [
            self.Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name != "step" and value is not None
        ]
        self._write(self.Summary(value=values), int(line["step"] or 0))
        self.events.flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.log({"step": result["outcome"]["steps"], **numbers(result, "outcome", "measured")})
            self._write(self.ended)
        self.events.close()


class WeightsAndBiases:
    """One W&B run for a run, however many attempts it takes: its id is the run's.

    Steps are values, not W&B's own count, which drops what comes again: after a resume the lines past the checkpoint are
    repeated, and equal.
    """

    _one_at_a_time = threading.Lock()  # wandb.setup and wandb.init change globals

    def __init__(self, tracked: Tracked):
        import wandb

        run, labels, given = tracked.run, tracked.labels, os.environ
        silent = given.get("WANDB_SILENT", "true").lower() not in ("false", "0")
        settings = wandb.Settings(
            console="off",  # W&B would take over stdout and stderr
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
            silent=silent,
        )
        with self._one_at_a_time:
            wandb.setup(
                wandb.Settings(silent=silent)
            )  # where it is not silent a missing key is asked for at the terminal
            self.run = wandb.init(
                project=given.get("WANDB_PROJECT") or labels.get("study") or "bitterlab",
                id=run.run_id,
                name=given.get("WANDB_NAME") or run.run_id,
                group=given.get("WANDB_RUN_GROUP") or labels.get("arm"),
                tags=None if "WANDB_TAGS" in given else [value[:TAG_LENGTH] for value in labels.values()],
                dir=given.get("WANDB_DIR") or str(tracked.run_dir),
                config={"run_id": run.run_id, **flat(spec.to_json(run)), **labels},
                resume="allow",
                reinit="create_new",  # beside those of other runs in this process
                settings=settings,
            )
        self.run.define_metric("*", step_metric="step")

    def log(self, line: Line) -> None:
        self.run.log(dict(line))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.run.summary.update(flat(result))
        self.run.finish(exit_code=0 if result is not None else 1)


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def read(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of trackers, or one string with commas; raises ValueError for one that is unknown."""
    given = names.split(",") if isinstance(names, str) else names or ()
    wanted = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in wanted:
        if name not in TRACKERS:
            raise ValueError(f"track = {name!r}: {nearest(name, list(TRACKERS))}")
    return wanted


class Mirror:
    """One tracker of one attempt, in a thread of its own. Nothing here raises, and only `finish` below waits."""

    def __init__(self, name: str, tracked: Tracked):
        self.name, self.tracked = name, tracked
        self.over = threading.Event()  # finished or switched off
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(QUEUE)
        self._busy_since: float | None = time.monotonic()
        self._first, self._ending = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name=f"{name} {tracked.run.run_id}", daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        self._put(False, line)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Does not wait; the first call counts."""
        if not self._ending:
            self._ending = True
            self._put(True, result)

    def wait(self, until: float) -> None:
        """Until the tracker has finished, or `until` (of time.monotonic)."""
        if not self.over.wait(max(until - time.monotonic(), 0.0)):
            self._switch_off(f"it had not finished {FINISH_SECONDS:.0f} s after the run")

    def _put(self, last: bool, value: Any) -> None:
        if self.over.is_set():
            return
        busy = self._busy_since
        if busy is not None and time.monotonic() - busy > PATIENCE:
            self._switch_off(f"no answer for {PATIENCE:.0f} s")
            return
        try:
            self._queue.put_nowait((last, value))
        except queue.Full:
            self._switch_off(f"it is {QUEUE} lines behind")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self.name](self.tracked)
            while not self.over.is_set():
                self._busy_since = None
                last, value = self._queue.get()
                self._busy_since = time.monotonic()
                if last:
                    tracker.finish(value)
                    self.over.set()
                else:
                    tracker.log(value)
        except BaseException as error:  # SystemExit too: this thread is all that it may end
            self._switch_off(f"{type(error).__name__}: {error}", missing=isinstance(error, ImportError))

    def _switch_off(self, why: str, *, missing: bool = False) -> None:
        if not self._first.acquire(blocking=False):
            return  # it was said, or is being said
        way_out = "pip install 'bitterlab[track]'" if missing else "leave it out of --track, or mend it and run again"
        if self.name == "wandb" and not missing:
            way_out = "WANDB_MODE=offline needs no network and no key, and `wandb sync` sends it later; or " + way_out
        log.warning(
            "%s: %s is off for this run, which goes on without it (%s). %s",
            self.tracked.run.run_id,
            self.name,
            redacted(" ".join(why.split()))[:500],
            way_out,
        )
        self.over.set()


def finish(mirrors: Sequence[Mirror]) -> None:
    """Ends what has not ended, and waits for all together."""
    for mirror in mirrors:
        mirror.finish(None)
    until = time.monotonic() + FINISH_SECONDS
    for mirror in mirrors:
        mirror.wait(until)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | int | bool | None]:
    """{"shape": {"D": 8}} -> {"shape.D": 8}; lists are left out."""
    items: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            items |= flat(item, f"{prefix}{name}.")
        elif not isinstance(item, (list, tuple)):
            items[prefix + name] = item
    return items


def numbers(value: Mapping[str, Any], *parts: str) -> dict[str, float | int]:
    """Of these parts of `value`, flat, what is a number."""
    items = flat({part: value[part] for part in parts})
    return {name: item for name, item in items.items() if isinstance(item, (int, float)) and not isinstance(item, bool)}
