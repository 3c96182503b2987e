"""One attempt at a run, as its worker holds it: a heartbeat, and a look at whether it is still the one that counts."""

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import records
from lab.preemption import AGAIN
from sweeps.files import Files
from sweeps.history import Event, History, Kind
from sweeps.mirror import Mirror

log = logging.getLogger(__name__)


HEARTBEAT = "heartbeat.json"


class Claim:
    """`with claim:` renews it from a thread, and releases it at the end, however that comes.

    `lost` is set once another event follows this attempt: another worker held this one for dead, or the run was cancelled.
    Nothing that is written for the run after that counts. `progress()` says that the run goes on; where nothing has said so
    for `hang_seconds`, `hung(claim)` records it and the process is ended, since a thread that hangs can not be.
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
        beat_seconds: float,
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
        self._files, self._beat, self._beat_seconds, self._over = files, 0, beat_seconds, False
        self._moved = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._mirror, self._mirroring = mirror, contextlib.ExitStack()

    def progress(self) -> None:
        self._moved = time.monotonic()

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
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if not self._over:
            self.send()
            self.follow("released")

    def _renew_until_released(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                if not self.renew():
                    log.error(
                        "%s: attempt %d is over: the run was taken over, cancelled or deleted",
                        self.run_id,
                        self.attempt,
                    )
                    return
            except OSError as error:
                # A full disk or a server that is away, perhaps for one beat only.
                log.warning("%s: the claim could not be renewed: %s", self.run_id, error)
            if self.hang_seconds is not None and time.monotonic() - self._moved > self.hang_seconds:
                log.error("%s: no step for %.0f s: this worker ends itself", self.run_id, self.hang_seconds)
                faulthandler.dump_traceback(all_threads=True)
                try:
                    if self.hung is not None:
                        self.hung(self)
                finally:
                    os._exit(AGAIN)

    def __enter__(self) -> "Claim":
        self.progress()
        self._thread = threading.Thread(target=self._renew_until_released, name=f"claim {self.run_id}", daemon=True)
        self._thread.start()
        if self._mirror is not None:
            self._mirroring.enter_context(self._mirror.kept_up(self._name, self.lost))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.release()
        except OSError as error:
            # It beats no more, and so is given up after a lease.
            log.warning("%s: the claim could not be released: %s", self.run_id, error)
        finally:
            self._mirroring.close()
            if self._mirror is not None:
                self._mirror.drop(self._run if self._ended else self._name)
