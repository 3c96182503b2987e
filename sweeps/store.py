"""A study's directory: what is planned, who is at it, what is done. The directory is the truth, not any process.

A run is done when its result.json is there and failed when its failed.json is. Who is at it is said by its claims:
claim-0001.json is the first attempt, claim-0002.json the second, and the highest number is the one that counts.

Attempt n begins by creating its file exclusively (a hard link to a whole file: one system call, of which exactly one
caller wins, on NFS too). Only its holder writes to it afterwards, to beat and to release, and no claim is ever removed.
So two that see the same stale attempt n both try to create n+1 and one of them fails; with one claim.json that is taken
away and made anew, the slower of the two would remove the winner's. No lock is held that could be left behind, and the
numbers grow, so that whatever is written under an attempt can be told from what a later one writes.

An attempt is over when it was released, or is stale. On the machine of its holder the kernel knows: stale is a process
that is gone (or its id is another's by now), and a living one keeps its run, however slow it is. On another machine
nobody knows, so stale is a heartbeat that has not changed for `lease` seconds of the observer's own clock; two
machines' clocks are never compared.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from lab import records, spec

FAILED = "failed.json"
CLAIM = re.compile(r"claim-(\d+)\.json")
OWN = ("runs", "logs", "locks")  # what may be there when the plan is not
LEASE_SECONDS = 60.0
BEATS_A_LEASE = 6
TAIL_BYTES = 8192  # of metrics.jsonl, read for its last line
UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system says to links and locks
State = Literal["waiting", "running", "done", "diverged", "failed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Status:
    run_id: str
    state: State
    step: int | None = None
    loss: float | None = None
    share: float = 0.0  # of the run's budget that is spent
    held_by: str = ""
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a claim. `machine` is where `pid` means one process; `token` is this one claim's own."""

    host: str
    machine: str
    pid: int
    started: int | None  # clock ticks after boot; tells a process from a later one of the same pid
    token: str

    @staticmethod
    def here() -> "Owner":
        pid, host, token = os.getpid(), socket.gethostname(), uuid.uuid4().hex
        process = _process(pid)
        return Owner(host=host, machine=_machine(), pid=pid, started=process[1] if process else None, token=token)

    def alive(self) -> bool | None:
        """Whether the process lives; None if it is another machine's, where this one can not look."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's, and alive
        state, started = _process(self.pid) or ("", None)
        # A zombie has ended; its parent has not looked yet.
        return state not in ("Z", "X") and (None in (started, self.started) or started == self.started)


@cache
def _machine() -> str:
    """One boot of one kernel and one namespace of process ids; host names are shared by containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, where the kernel shows them (proc(5): fields 3 and 22 of stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


class Claim:
    """One attempt at a run: `with claim:` renews it from a thread, and releases it at the end, however that comes.

    `lost` is set once a later attempt is seen: another machine held this one for dead. Nothing that is written for
    the run after that counts.
    """

    def __init__(self, *, row: dict[str, Any], directory: Path, owner: Owner, attempt: int, beat_seconds: float):
        self.row, self.directory, self.owner, self.attempt = row, directory, owner, attempt
        self.run_id: str = row["run_id"]
        self.lost = threading.Event()
        self._beat, self._beat_seconds, self._released = 0, beat_seconds, False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _path(self, attempt: int) -> Path:
        return self.directory / f"claim-{attempt:04d}.json"

    def _record(self) -> dict[str, Any]:
        owner = asdict(self.owner)
        return {"schema": records.SCHEMA, "owner": owner, "beat": self._beat, "released": self._released}

    def create(self) -> bool:
        """Whether this attempt is ours: its file was not there, and now it is, whole."""
        target = self._path(self.attempt)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        records.write_json(temporary, self._record())
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            # NFS may have done it and lost the answer; then ours has two names (link(2), open(2) on O_EXCL).
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            raise ValueError(f"{self.directory}: claims need hard links, not on this file system; use --out") from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def renew(self) -> bool:
        """Shows others a changed heartbeat; False if the run has been taken over."""
        if self._path(self.attempt + 1).exists():
            self.lost.set()
            return False
        self._beat += 1
        records.write_json(self._path(self.attempt), self._record())
        return True

    def release(self) -> None:
        """Lets others have the run. Safe to call again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self._released:
            self._released = True
            records.write_json(self._path(self.attempt), self._record())

    def _renew_until_released(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                if not self.renew():
                    log.error("%s: attempt %d was taken over by another worker", self.run_id, self.attempt)
                    return
            except OSError as error:
                # A full disk or a server that is away, perhaps for one beat only.
                log.warning("%s: the claim could not be renewed: %s", self.run_id, error)

    def __enter__(self) -> "Claim":
        self._thread = threading.Thread(target=self._renew_until_released, name=f"claim {self.run_id}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, kw_only=True)
class _Attempt:  # a claim as others read it
    number: int
    owner: Owner
    beat: int
    released: bool


def _last_attempt(directory: Path, names: Iterable[str]) -> _Attempt | None:
    numbers = {int(found[1]): name for name in names if (found := CLAIM.fullmatch(name))}
    if not numbers:
        return None
    number = max(numbers)
    path = directory / numbers[number]
    content = records.read_json(path)
    try:
        owner = Owner(**content["owner"])
        return _Attempt(number=number, owner=owner, beat=content["beat"], released=content["released"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a claim ({error}); delete it, once nobody works on this run") from error


class Store:
    """The directory of one study. lease: seconds after which another machine's silent worker is given up."""

    def __init__(self, root: Path, *, lease: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic):
        self.root, self.lease, self._clock = Path(root), lease, clock
        self._observed: dict[str, tuple[str, int, float]] = {}  # run: token, beat, when that was first seen
        self._results: dict[str, Status] = {}  # of runs that have a result, which does not change

    # ---- plan ---------------------------------------------------------------------------------------------------

    def write_plan(self, plan: Mapping[str, Any], *, replace: bool = False) -> str:
        """Writes plan.json and says what changed. What is done is kept: a run's id is its content.

        Refuses another study's directory, and, without `replace`, a plan that no longer has runs which were begun.
        """
        for row in plan["runs"]:
            _check_name("run_id", row["run_id"])
        if not (self.root / records.PLAN).exists():
            strange = [p.name for p in self.root.glob("*") if p.name not in OWN] if self.root.exists() else []
            if strange:
                raise ValueError(f"{self.root}: no study's directory, it holds {strange[0]}; give a new one (--out)")
            records.write_json(self.root / records.PLAN, plan)
            return f"new plan of {len(plan['runs'])} rows"
        old = records.read_plan(self.root)
        if old["study"]["name"] != plan["study"]["name"]:
            raise ValueError(
                f"{self.root}: holds study {old['study']['name']!r}, not {plan['study']['name']!r}; "
                "two studies can not share a directory: give another --out"
            )
        before, after = ({row["run_id"] for row in p["runs"]} for p in (old, plan))
        begun = sorted(i for i in before - after if self.directory(i).exists())
        difference = f"{len(after - before)} runs added, {len(before - after)} dropped, {len(before & after)} kept"
        if begun and not replace:
            raise ValueError(
                f"{self.root}: the plan changed under its runs: {difference}; {len(begun)} of the dropped ones were begun "
                f"({', '.join(begun[:3])}{', ...' if len(begun) > 3 else ''}). --replace-plan plans anew and keeps their "
                "directories; --out DIR leaves this study as it is"
            )
        if old != plan:
            records.write_json(self.root / records.PLAN, plan)
            for cached in ("plan", "runs"):
                self.__dict__.pop(cached, None)
        return difference

    @cached_property
    def plan(self) -> dict[str, Any]:
        return records.read_plan(self.root)

    @cached_property
    def runs(self) -> dict[str, dict[str, Any]]:
        """One row of the plan for each run, in order."""
        unique: dict[str, dict[str, Any]] = {}
        for row in self.plan["runs"]:
            _check_name("run_id", row["run_id"])
            unique.setdefault(row["run_id"], row)
        return unique

    def directory(self, run_id: str) -> Path:
        return records.run_directory(self.root, run_id)

    # ---- claims -------------------------------------------------------------------------------------------------

    def ended(self, run_id: str) -> bool:
        return (self.directory(run_id) / records.RESULT).exists() or (self.directory(run_id) / FAILED).exists()

    def claim(self, run_id: str, owner: Owner | None = None) -> Claim | None:
        """The next attempt at a run, held by `owner` (default: this process); None if it is held, or has ended."""
        directory = self.directory(run_id)
        if self.ended(run_id):
            return None
        directory.mkdir(parents=True, exist_ok=True)
        last = _last_attempt(directory, (p.name for p in directory.iterdir()))
        if last is not None and self._holds(run_id, last):
            return None
        claim = Claim(
            row=self.runs[run_id],
            directory=directory,
            owner=owner or Owner.here(),
            attempt=last.number + 1 if last else 1,
            beat_seconds=self.lease / BEATS_A_LEASE,
        )
        if not claim.create():
            return None
        if self.ended(run_id):  # between the look and the claim
            claim.release()
            return None
        return claim

    def next_claim(self, preference: Callable[[dict[str, Any]], Any]) -> Claim | None:
        """Claims the waiting run that `preference` puts first (then the plan's order), or None if all are held or ended."""
        waiting = [row for run_id, row in self.runs.items() if not self.ended(run_id)]
        for row in sorted(waiting, key=preference):
            if (claim := self.claim(row["run_id"])) is not None:
                return claim
        return None

    def begin(self, claim: Claim) -> spec.Run:
        """Writes the claimed run's run.json and returns the Run.

        Raises ValueError if plan.json was edited, or if the directory holds another run's run.json.
        """
        run = spec.from_json(claim.row["run"])
        if run.run_id != claim.run_id:
            raise ValueError(
                f"{self.root}: plan.json was edited: {claim.run_id} now describes {run.run_id}; plan it again"
            )
        path, content = claim.directory / records.RUN, spec.to_json(run)
        if path.exists():
            there = spec.read_run(path)
            if there.run_id != run.run_id:
                raise ValueError(f"{path}: describes {there.run_id}, not {run.run_id}; move that directory away")
            if spec.to_json(there) == content:
                return run
        records.write_json(path, content)
        return run

    def _holds(self, run_id: str, attempt: _Attempt) -> bool:
        if attempt.released:
            return False
        alive = attempt.owner.alive()
        if alive is not None:
            return alive
        now, shown = self._clock(), (attempt.owner.token, attempt.beat)
        before = self._observed.get(run_id)
        if before is None or before[:2] != shown:
            before = self._observed[run_id] = (*shown, now)
        return now - before[2] < self.lease

    def fail(self, claim: Claim, error: str) -> None:
        """Records why a run failed (a traceback); it is not tried again until `retry`."""
        if claim.lost.is_set():
            return  # a later attempt decides how the run ends
        content = {"schema": records.SCHEMA, "error": error, "attempts": claim.attempt}
        records.write_json(claim.directory / FAILED, content)

    def failure(self, run_id: str) -> dict[str, Any] | None:
        path = self.directory(run_id) / FAILED
        return records.read_json(path) if path.exists() else None

    def retry(self, run_ids: Iterable[str] | None = None) -> int:
        """Lets failed runs (default: all) be tried again; returns how many there were."""
        chosen = list(self.runs if run_ids is None else run_ids)
        for run_id in chosen:
            if run_id not in self.runs:
                raise ValueError(f"run_id = {run_id!r}: not in the plan; `lab status` lists its runs")
        failed = [run_id for run_id in chosen if (self.directory(run_id) / FAILED).exists()]
        for run_id in failed:
            (self.directory(run_id) / FAILED).unlink()
        return len(failed)

    # ---- compilation --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def compile_lock(self, key: str) -> Iterator[bool]:
        """Held by the worker that compiles a shape, so that the others find it in the cache; a dead one's is dropped.

        Yields False, at once, on a file system that has no locks: a shape is then compiled twice, which is only slower.
        """
        path = self._compile_lock(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                locked = False
            yield locked

    def is_compiling(self, key: str) -> bool:
        """Whether a living process holds that lock."""
        try:
            # A shared lock is enough to ask: those who ask do not see one another, and NFS gives it to readers.
            with self._compile_lock(key).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # no such lock yet, or none on this file system
        return False

    def _compile_lock(self, key: str) -> Path:
        _check_name("key", key)
        return self.root / "locks" / f"{key}.lock"

    # ---- status -------------------------------------------------------------------------------------------------

    def status(self) -> list[Status]:
        """Every run of the plan, in its order."""
        return [self._results.get(run_id) or self._status(run_id) for run_id in self.runs]

    def _status(self, run_id: str) -> Status:
        directory = self.directory(run_id)
        try:
            names = {path.name for path in directory.iterdir()}
        except FileNotFoundError:
            return Status(run_id=run_id, state="waiting")
        last = _last_attempt(directory, names)
        attempts = last.number if last else 0
        if records.RESULT in names:
            result = records.read_json(directory / records.RESULT)
            state, outcome = "done" if result["status"] == "done" else "diverged", result["outcome"]
            ended = Status(run_id=run_id, state=state, step=outcome["steps"], loss=outcome["loss"], share=1.0)
            self._results[run_id] = changed(ended, attempts=attempts)
            return self._results[run_id]
        if FAILED in names:
            return Status(run_id=run_id, state="failed", attempts=attempts)
        line = _last_metrics(directory / records.METRICS) if records.METRICS in names else {}
        running = last is not None and self._holds(run_id, last)
        return Status(
            run_id=run_id,
            state="running" if running else "waiting",
            step=line.get("step"),
            loss=line.get("loss"),
            share=line.get("share", 0.0),
            held_by=f"{last.owner.host} process {last.owner.pid}" if running and last else "",
            attempts=attempts,
        )


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line with a training loss, looked for at the file's end only."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # torn: the writer is at it, or was killed
            content = json.loads(line)
            if isinstance(content, dict) and "loss" in content:
                return content
    return {}


def _check_name(field: str, name: str) -> None:
    """A plan is data: its ids name files under the study's own directory and nothing else."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(
            f"{field} = {name!r}: letters, digits, '-', '_' and '.' only; this plan was not written by the lab"
        )
