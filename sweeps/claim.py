"""One attempt at a run, as its worker holds it: a heartbeat, and a look at whether it is still the one that counts."""

import contextlib
import faulthandler
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab import records
from lab.preemption import AGAIN
from sweeps.files import Files
from sweeps.history import Event, History, Kind
from sweeps.mirror import Mirror

log = logging.getLogger(__name__)


HEARTBEAT = "heartbeat.json"
BEATS_A_LEASE = 6
LOOKS = 8  # of the watchdog, in the time that it allows
COMPILING = 4.0  # times hang_seconds that the first compilation, and waiting for who compiles, may take
LAST_SECONDS = 60.0  # that a process which ends itself has to say so: that is written to what may hang too


class Claim:
    """`with claim:` renews it from a thread, and releases it at the end, however that comes.

    `lost` is set once another event follows this attempt: another worker held this one for dead, or the run was cancelled.
    Nothing that is written for the run after that counts. It is set too where no heartbeat could be written for `lease`
    seconds, since others may take the run then.

    While the run is `watched()`, `progress()` says that it goes on; where nothing has said so for `hang_seconds` (`COMPILING`
    times as long in `compiling()`), `hung(claim)` records it and the process is ended, since a thread that hangs can not be.
    Of runs that train side by side nobody can tell which one hangs: none is blamed, and the process ends as if it was
    killed, so that each is tried by itself (sweeps.queue). A thread that touches no file watches over both, and counts only
    seconds in which it ran: a process that was stopped meanwhile has not hung.
    """

    def __init__(
        self,
        *,
        row: dict[str, Any],
        files: Files,
        directory: str,
        run_dir: Path,
        history: History,
        event: Event,
        earlier: list[Path],
        lease: float,
        hang_seconds: float | None = None,
        hung: Callable[["Claim"], None] | None = None,
        mirror: Mirror | None = None,
    ):
        self.row, self.history, self.event, self.earlier = row, history, event, earlier
        self.run_id: str = row["run_id"]
        self.attempt = event.number
        self.run_dir = run_dir  # of this attempt, where it trains
        self._name = f"{directory}/{event.directory}"  # the same, in the store
        self._run, self._ended = directory, False
        self.lost = threading.Event()
        self.hang_seconds, self.hung = hang_seconds, hung
        self._files, self._beat, self._over = files, 0, False
        self._lease, self._beat_seconds = lease, lease / BEATS_A_LEASE
        self._look_seconds = min(lease, hang_seconds or lease) / LOOKS
        self._silent = self._idle = 0.0  # seconds without a heartbeat, and without progress, that the watchdog counted
        self.patience: float | None = None  # seconds without progress; None: not watched
        self._alone = True
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._mirror, self._mirroring = mirror, contextlib.ExitStack()

    def progress(self) -> None:
        self._idle = 0.0

    @contextlib.contextmanager
    def watched(self, *, alone: bool) -> Iterator[None]:
        """While it trains: a claim that waits for its turn does not hang. alone: whether no other run trains beside it."""
        self._alone = alone
        with self._patient(self.hang_seconds):
            yield

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Nothing tells a compiler that is slow from one that hangs but time."""
        with self._patient(self.hang_seconds and COMPILING * self.hang_seconds):
            yield

    @contextlib.contextmanager
    def _patient(self, seconds: float | None) -> Iterator[None]:
        before = self.patience
        self.progress()
        self.patience = seconds
        try:
            yield
        finally:
            self.progress()
            self.patience = before

    def renew(self) -> bool:
        """Shows others a changed heartbeat; False if the run has been taken over, cancelled or deleted."""
        if self._files.exists(self.history.name(self.attempt + 1)) or not self._is_there():
            self.lost.set()
            return False
        self._beat += 1
        content = {"schema": records.SCHEMA, "beat": self._beat}
        self._files.write(f"{self._name}/{HEARTBEAT}", json.dumps(content).encode())
        return True

    def _is_there(self) -> bool:
        """Whether this attempt's event is: a run's directory may be deleted, and be begun anew by another."""
        try:
            return self.history.read(self.attempt).content == self.event.content
        except FileNotFoundError:
            return False

    def follow(self, kind: Kind, **content: Any) -> Event | None:
        """Says what comes after this attempt, once; None (and lost) where something else came first."""
        if self._over or self.lost.is_set():
            return None
        self._over = True
        event = self.history.append(self.event, kind, **content) if self._is_there() else None
        self._ended = event is not None and kind == "ended"
        if event is None:
            self.lost.set()
        return event

    def send(self) -> None:
        """Makes sure that what this attempt wrote lies in the store, where that is not this machine's directory."""
        self._mirroring.close()
        if self._mirror is not None and not self.lost.is_set():
            self._mirror.up(self._name)

    def release(self) -> None:
        """Lets others have the run, where this attempt has not ended. Safe to call again."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._lease)  # no longer: a file system that hangs may hold it
        if not self._over:
            self.send()
            if self._mirror is not None and not self.lost.is_set():
                self._mirror.drop(self._name)  # before another has the run, who may look for it on this machine
            self.follow("released")

    def _put_away(self) -> None:
        """Of a run that ended, or an attempt that is lost: what lies on this machine is removed, once it lies in the store. What
        can not be sent stays, and so does what an attempt after this one may go on from here (Mirror.down, Mirror.tidy)."""
        self._mirroring.close()
        if self._mirror is None or not (self._ended or self.lost.is_set()):
            return
        if self._ended:
            self._mirror.drop(self._run)
            return
        try:
            last = self.history.last() if self._is_there() else None
            if last is not None and last.kind == "attempt" and last.number > self.attempt:
                return
            if last is not None and last.kind != "ended":
                self._mirror.up(self._name)
            self._mirror.drop(self._name)
        except Exception as error:  # each store has its own
            log.warning("%s: what this attempt wrote stays in %s: %s", self.run_id, self.run_dir, error)

    def _beat_until_released(self) -> None:
        said = False
        while not self._stop.wait(self._beat_seconds):
            try:
                if not self.renew():
                    log.error(
                        "%s: attempt %d is over: the run was taken over, cancelled or deleted",
                        self.run_id,
                        self.attempt,
                    )
                    return
                self._silent, said = 0.0, False
            except Exception as error:  # of a full disk or a server that is away, for which each store has its own
                if not said:
                    log.warning("%s: the claim could not be renewed, and is tried again: %s", self.run_id, error)
                said = True

    def _watch_until_released(self) -> None:
        while not self._stop.wait(self._look_seconds):
            self._silent += self._look_seconds
            self._idle += self._look_seconds
            if self._silent > self._lease and not self.lost.is_set():
                self.lost.set()
                _aside(lambda: log.error("%s: no heartbeat for %.0f s: others may have it", self.run_id, self._lease))
            if self.patience is not None and self._idle > self.patience:
                try:
                    _aside(self._say_that_it_hangs).join(LAST_SECONDS)
                finally:
                    os._exit(AGAIN)

    def _say_that_it_hangs(self) -> None:
        beside = "" if self._alone else ", beside others: each is tried by itself"
        log.error("%s: no step for %.0f s%s; this worker ends itself", self.run_id, self.patience, beside)
        faulthandler.dump_traceback(all_threads=True)
        if self.hung is not None and self._alone:
            self.hung(self)

    def __enter__(self) -> "Claim":
        for target in (self._beat_until_released, self._watch_until_released):
            self._threads.append(threading.Thread(target=target, name=f"claim {self.run_id}", daemon=True))
            self._threads[-1].start()
        if self._mirror is not None:
            self._mirroring.enter_context(self._mirror.kept_up(self._name, self.lost))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.release()
            self._put_away()
        except OSError as error:
            # It beats no more, and so is given up after a lease.
            log.warning("%s: the claim could not be released: %s", self.run_id, error)
        finally:
            self._mirroring.close()


def _aside(what: Callable[[], None]) -> threading.Thread:
    """Begins it in a thread of its own, which may never end."""
    thread = threading.Thread(target=what, name="last words", daemon=True)
    thread.start()
    return thread
