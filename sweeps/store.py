"""A study's directory: what is planned, who is at it, what is done. The directory is the truth, not any process.

    plan.json                         every run of the study
    runs/<run_id>/history/0001.json   what happened to the run, event by event (sweeps.history): the truth
                  attempts/<n>-*/     where one attempt trained: metrics.jsonl, checkpoints, result.json, log.txt
                  run.json            the Run
                  result.json         a copy of that of the attempt which counts; failed.json of the failure that does
    ended/<worker>.jsonl              which runs ended how: an index, so that nobody has to look at every run
    locks/                            who compiles what

An attempt is over when another event follows it, or when it is silent (sweeps.silence). That a worker only seemed dead costs
what it did since: it can not publish any more.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lab import records, spec
from sweeps.claim import BEATS_A_LEASE, Claim
from sweeps.compile_locks import CompileLocks
from sweeps.files import CONDITIONAL_PUT, Objects, check_name, files_at
from sweeps.history import Event, History, Owner
from sweeps.index import Ended, Index
from sweeps.mirror import Mirror
from sweeps.planned import Planned
from sweeps.silence import Silence
from sweeps.status import Status, last_metrics, of_ended

LOG = "log.txt"
LEASE_SECONDS = 60.0
MAX_DEATHS = 5  # of workers on one run, one after another, without a new checkpoint: it kills them
Reason = Literal["error", "out_of_memory", "hang", "crash"]
log = logging.getLogger(__name__)


class Store:
    """The directory of one study. lease: seconds after which a silent worker is given up, by this one, and this one by others.
    hang_seconds: without a step, after which a worker gives up its run (None: never)."""

    def __init__(
        self,
        root: Path | str,
        *,
        lease: float = LEASE_SECONDS,
        hang_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.files = files_at(root)
        self.root = root if isinstance(self.files, Objects) else Path(root)
        self.mirror = Mirror(self.files) if isinstance(self.files, Objects) else None
        self.local = self.mirror.local if self.mirror else Path(root)  # where this machine trains, and logs
        self.compiling = CompileLocks(self.local / "locks")
        self.lease, self.hang_seconds = lease, hang_seconds
        self.silence = Silence(self.files, lease=lease, clock=clock)
        self._planned = Planned(self.files)
        self.index = Index(self.files)

    # ---- plan ---------------------------------------------------------------------------------------------------

    def write_plan(self, plan: Mapping[str, Any], *, replace: bool = False) -> str:
        """As sweeps.planned.Planned.write."""
        return self._planned.write(plan, replace=replace)

    @property
    def plan(self) -> dict[str, Any]:
        return self._planned.content

    @property
    def runs(self) -> Mapping[str, dict[str, Any]]:
        """One row of the plan for each run, in order; parsed when it is asked for."""
        return self._planned.runs

    def directory(self, run_id: str) -> Path:
        """Where it lies on this machine."""
        return records.run_directory(self.local, run_id)

    def records(self) -> Path:
        """A directory of this machine with the plan and the results, for those who read files."""
        return self.mirror.records() if self.mirror else self.local

    def check_shared(self) -> None:
        """Raises ValueError where it can not be told which of several workers was first."""
        if not self.files.exclusive:
            ignores = isinstance(self.files, Objects) and self.files.conditional
            why = (
                "this server let one object be created twice, though asked to do so only where there was none (a put with "
                "If-None-Match), and so"
                if ignores
                else "this kind of store"
            )
            schemes = (
                "a server that keeps conditions"
                if ignores
                else "one of " + ", ".join(f"{s}://" for s in CONDITIONAL_PUT)
            )
            raise ValueError(
                f"{self.files}: {why} can not say which of two workers was first, so that only one may work on it: use "
                f"--workers 1, a directory, or {schemes}"
            )

    def check_alone(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Where that can not be told: raises ValueError if another worker's heartbeat changes within a lease."""
        while not self.files.exclusive and (others := self._running()):
            beats = {s.run_id: self.silence.seen(self._directory(s.run_id)) for s in others}
            sleep(self.lease / BEATS_A_LEASE)
            for s in self._running():
                if s.run_id in beats and self.silence.seen(self._directory(s.run_id)) != beats[s.run_id]:
                    log.error("%s is held by %s", s.run_id, s.held_by)
                    self.check_shared()

    def _running(self) -> list[Status]:
        return [s for s in self.status() if s.state == "running"]

    # ---- claims -------------------------------------------------------------------------------------------------

    def _directory(self, run_id: str) -> str:
        check_name("run_id", run_id)
        return f"runs/{run_id}"

    def history(self, run_id: str) -> History:
        return History(self.files, self._directory(run_id))

    def ended(self, run_id: str) -> bool:
        """Done, diverged, failed or cancelled: there is nothing to train."""
        if run_id in self.index and self.files.exists(self._directory(run_id)):
            return True
        last = self.history(run_id).last()
        return last is not None and last.kind in ("ended", "cancelled")

    def claim(self, run_id: str, owner: Owner | None = None) -> Claim | None:
        """The next attempt at a run, held by `owner` (default: this process); None if it is held, or has ended."""
        history, directory = self.history(run_id), self._directory(run_id)
        last = history.last()
        if last is not None and (
            last.kind in ("ended", "cancelled") or self.silence.holds(self._directory(run_id), last)
        ):
            return None
        earlier = self._earlier(run_id)
        from_step = self.checkpointed(run_id)
        deaths, began_at = history.deaths(last)
        if last is not None and deaths >= MAX_DEATHS and began_at == from_step:
            said = (
                f"{deaths} workers died on this run, one after another, without getting further than step {from_step}; "
                "their logs are in its attempts/; `lab retry` tries it again"
            )
            end = history.append(last, "ended", attempt=last.directory, status="failed", reason="crash", error=said)
            if end is not None:
                self._complete(run_id, end)
            return None
        event = history.attempt(last, owner or Owner.here(), from_step=from_step, lease=self.lease)
        if event is None:
            return None
        try:
            here = self.mirror.down(earlier) if self.mirror else [self.local / name for name in earlier]
        except BaseException:
            history.append(event, "released")
            raise
        return Claim(
            row=self.runs[run_id],
            files=self.files,
            directory=directory,
            run_dir=self.local / directory / event.directory,
            history=history,
            event=event,
            earlier=here,
            mirror=self.mirror,
            lease=self.lease,
            hang_seconds=self.hang_seconds,
            hung=lambda claim: self.fail(claim, f"no step for {claim.patience:.0f} s", reason="hang"),
        )

    def _earlier(self, run_id: str) -> list[str]:
        """The attempts so far, newest first."""
        place = f"{self._directory(run_id)}/{records.ATTEMPTS}"
        found = [(records.attempt_number(name), name) for name in self.files.names(place)]
        return [f"{place}/{name}" for number, name in sorted(found, reverse=True) if number]

    def checkpointed(self, run_id: str) -> int:
        """Steps of the run's newest finished checkpoint, whole or not, sent or only here; 0 where there is none."""
        from lab.checkpoint import CHECKSUMS

        earlier = self._earlier(run_id)
        names = (name for attempt in earlier for name in self.files.names(f"{attempt}/{CHECKSUMS}"))
        there = (int(step) for name in names if (step := name.removesuffix(".json")).isdigit())
        here = map(self.mirror.reached, earlier) if self.mirror else ()
        return max((*there, *here), default=0)

    def begin(self, claim: Claim) -> spec.Run:
        """Writes the claimed run's run.json and returns the Run.

        Raises ValueError if plan.json was edited, or if the directory holds another run's run.json.
        """
        run = spec.from_json(claim.row["run"])
        if run.run_id != claim.run_id:
            raise ValueError(
                f"{self.root}: plan.json was edited: {claim.run_id} now describes {run.run_id}; plan it again"
            )
        name, content = f"{self._directory(claim.run_id)}/{records.RUN}", spec.to_json(run)
        path = f"{self.files}/{name}"
        if self.files.exists(name):
            there = spec.from_text(self.files.read(name), path)
            if there.run_id != run.run_id:
                raise ValueError(f"{path}: describes {there.run_id}, not {run.run_id}; move that directory away")
            if spec.to_json(there) == content:
                return run
        self.files.write(name, json.dumps(content, indent=1).encode() + b"\n")
        return run

    # ---- ends ---------------------------------------------------------------------------------------------------

    def publish(self, claim: Claim) -> bool:
        """The claim's attempt has written its result.json: makes it the run's. False where the attempt no longer counts."""
        result = records.read_result(claim.run_dir)
        if result is None:
            raise ValueError(f"{claim.run_dir}: no {records.RESULT}, and so nothing to publish")
        claim.send()
        text = (claim.run_dir / records.RESULT).read_bytes()
        outcome = {"status": result["status"], "sha256": hashlib.sha256(text).hexdigest()}
        end = claim.follow("ended", attempt=claim.event.directory, **outcome)
        if end is None:
            log.warning("%s: the result of attempt %d comes too late, and is not accepted", claim.run_id, claim.attempt)
            return False
        self._complete(claim.run_id, end, result)
        return True

    def fail(self, claim: Claim, error: str, *, reason: Reason = "error") -> None:
        """Records why a run failed (a traceback); it is not tried again until `retry`."""
        claim.send()
        end = claim.follow("ended", attempt=claim.event.directory, status="failed", reason=reason, error=error)
        if end is not None:
            self._complete(claim.run_id, end)

    def _complete(
        self, run_id: str, last: Event, result: Mapping[str, Any] | None = None, *, reading: bool = False
    ) -> Ended:
        """Copies what the last event, the run's end, says to where people look for it. Done by who ended the run; and, where
        that one died in between, by whoever sees it: `reading`, perhaps where it may not write."""
        history, directory = self.history(run_id), self._directory(run_id)
        writing = contextlib.suppress(OSError) if reading else contextlib.nullcontext()
        if last.content["status"] == "failed":
            content = {"schema": records.SCHEMA, "attempts": self._attempts(history),
                       **{k: last.content[k] for k in ("reason", "error")}}  # fmt: skip
            with writing:
                self.files.write(f"{directory}/{records.FAILED}", json.dumps(content, indent=1).encode() + b"\n")
        else:
            name = f"{directory}/{last.content['attempt']}/{records.RESULT}"
            text = self.files.read(name) if self.files.exists(name) else b""
            if hashlib.sha256(text).hexdigest() != last.content["sha256"]:
                raise ValueError(
                    f"{self.files}/{name}: not what was published; restore it, or delete "
                    f"{self.files}/{directory} to train the run again"
                )
            with writing:
                self.files.write(f"{directory}/{records.RESULT}", text)
                self.files.remove(f"{directory}/{records.FAILED}")
            result = result or records.parse_json(text, name)
        outcome = (result or {}).get("outcome", {})
        own = outcome.get("spent", {}).get("exact", 0)
        ended = Ended(
            run_id=run_id,
            began=history.began(),
            event=last.number,
            state=last.content["status"],
            step=outcome.get("steps"),
            loss=outcome.get("loss"),
            exact=own + self._spent_in_vain(run_id, history, last),
            attempts=self._attempts(history),
            reason=last.content.get("reason", ""),
        )
        self.index.add(ended)
        return ended

    def failure(self, run_id: str) -> dict[str, Any] | None:
        """Why a run that has failed did; None for others."""
        last = self.history(run_id).last()
        if last is None or last.kind != "ended" or last.content["status"] != "failed":
            return None
        return {"attempts": self._attempts(self.history(run_id)), **last.content}

    def logs(self, run_id: str) -> dict[str, bytes]:
        """What each attempt logged, by where it lies, the first attempt first."""
        names = [f"{attempt}/{LOG}" for attempt in reversed(self._earlier(run_id))]
        return {f"{self.files}/{name}": self.files.read(name) for name in names if self.files.exists(name)}

    def retry(self, run_ids: Iterable[str] | None = None) -> int:
        """Lets failed runs be tried again (default: all of them); returns how many there were. A cancelled run has to be
        named. What is done or diverged is a result, and what is running or waiting needs no retry."""
        named = None if run_ids is None else list(run_ids)
        self._check_planned(named or ())
        again = 0
        wanted = ("failed",) if named is None else ("failed", "cancelled")
        for status in self.status():
            if status.state not in wanted or (named is not None and status.run_id not in named):
                continue
            history = self.history(status.run_id)
            last = history.last()
            if last is None or last.content.get("status", last.kind) not in wanted:
                continue  # somebody else has let it be tried again since, and it may have been begun
            event = history.append(last, "retry")
            if event is not None:
                self.files.remove(f"{self._directory(status.run_id)}/{records.FAILED}")
                self.index.add(Ended(run_id=status.run_id, began=history.began(), event=event.number, state="waiting"))
                again += 1
        return again

    def cancel(self, run_ids: Iterable[str]) -> int:
        """Runs that wait are not begun, those that run stop within a heartbeat; returns how many there were."""
        named = list(run_ids)
        self._check_planned(named)
        cancelled = 0
        for run_id in named:
            history = self.history(run_id)
            while (last := history.last()) is None or last.kind not in ("ended", "cancelled"):
                event = history.append(last, "cancelled", by=Owner.here().host)
                if event is not None:  # else something else happened to it just now: look again
                    self.index.add(
                        Ended(
                            run_id=run_id,
                            began=history.began(),
                            event=event.number,
                            state="cancelled",
                            exact=self._spent_in_vain(run_id, history, event),
                            attempts=self._attempts(history),
                        )
                    )
                    cancelled += 1
                    break
        return cancelled

    def _check_planned(self, run_ids: Iterable[str]) -> None:
        for run_id in run_ids:
            if run_id not in self.runs:
                raise ValueError(f"run_id = {run_id!r}: not in the plan; `lab status` lists its runs")

    def _attempts(self, history: History) -> int:
        return sum(history.read(number).kind == "attempt" for number in history.numbers())

    # ---- status -------------------------------------------------------------------------------------------------

    def spent(self) -> int:
        """Exact FLOPs of every attempt at a run of the plan: of results as they say, of others as far as their metrics say, where
        steps that were trained twice, after a death, count twice."""
        self.index.refresh()
        begun = self.files.names("runs")
        looked_at = (run_id for run_id in begun if run_id in self.runs and run_id not in self.index)
        spent = sum(self._spent(run_id) for run_id in list(looked_at))
        return spent + sum(one.exact for one in self.index if one.run_id in self.runs)

    def _spent(self, run_id: str) -> int:
        """By a run that is not in the index; 0 of one that then is."""
        try:
            history = self.history(run_id)
            last = history.last()
            if last is not None and last.kind == "ended":
                ended = self._complete(run_id, last, reading=True)
                return 0 if run_id in self.index else ended.exact
            return self._spent_in_vain(run_id, history, last)
        except (ValueError, FileNotFoundError):  # damaged, or being deleted: nobody knows
            return 0

    def _spent_in_vain(self, run_id: str, history: History, last: Event | None) -> int:
        """Exact FLOPs of the attempts at a run, beside those that its result, where one counts, says: each has spent what lies
        between the step that it began from and the one that it wrote of last. A result is of the run's every step."""
        counts = (
            last.content["attempt"] if last is not None and last.content.get("status") in ("done", "diverged") else None
        )
        planned, share = self.runs.get(run_id, {}).get("planned"), 0.0
        if planned is None:  # of an earlier plan
            return 0
        for number in history.numbers():
            event = history.read(number)
            if event.kind != "attempt":
                continue
            began = event.content.get("from_step", 0) / planned["steps"]
            if event.directory == counts:
                share -= began
                continue
            with contextlib.suppress(ValueError):  # metrics of another version
                line = last_metrics(self.files, f"{self._directory(run_id)}/{event.directory}/{records.METRICS}")
                share += max(0.0, line.get("share", 0.0) - began)
        return round(max(0.0, share) * planned["exact"])

    def left(self) -> list[str]:
        """Runs that have not ended, in the plan's order."""
        self.index.refresh()
        begun = set(self.files.names("runs"))
        return [i for i in self.runs if i not in begun or not (i in self.index or self._ended_or_damaged(i))]

    def _ended_or_damaged(self, run_id: str) -> bool:
        try:
            return self.ended(run_id)
        except FileNotFoundError:  # its directory is being deleted
            return False
        except ValueError:
            return True  # nobody can go on with it before somebody has looked

    def status(self) -> list[Status]:
        """Every run of the plan, in its order. Only runs that were begun and have not ended are looked at one by one."""
        self.index.refresh()
        begun = set(self.files.names("runs"))
        return [
            Status(run_id=run_id, state="waiting")
            if run_id not in begun
            else of_ended(self.index[run_id])
            if run_id in self.index
            else self._status(run_id)
            for run_id in self.runs
        ]

    def _status(self, run_id: str) -> Status:
        try:
            return self._look(run_id)
        except (ValueError, FileNotFoundError) as error:
            return Status(run_id=run_id, state="damaged", reason=str(error))

    def _look(self, run_id: str) -> Status:
        history = self.history(run_id)
        last = history.last()
        if last is None:
            return Status(run_id=run_id, state="waiting")
        if last.kind == "ended":
            return of_ended(self._complete(run_id, last, reading=True))
        attempts = self._attempts(history)
        if last.kind == "cancelled":
            return Status(run_id=run_id, state="cancelled", attempts=attempts)
        names = (f"{attempt}/{records.METRICS}" for attempt in self._earlier(run_id))
        line = next((found for name in names if (found := last_metrics(self.files, name))), {})
        running = self.silence.holds(self._directory(run_id), last)
        return Status(
            run_id=run_id,
            state="running" if running else "waiting",
            step=line.get("step"),
            loss=line.get("loss"),
            share=line.get("share", 0.0),
            held_by=f"{last.owner.host} process {last.owner.pid}" if running else "",
            attempts=attempts,
        )
