"""A study in an object store: its runs train in a directory of this machine. What an attempt writes there goes up as it comes;
what earlier attempts saved comes down when a run goes on here."""

import contextlib
import hashlib
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lab import records
from lab.cache import cache_directory
from sweeps.files import Objects, check_path
from sweeps.history import History

UP_SECONDS = 10.0
HELD = 2  # earlier attempts with a checkpoint to go on from: should the newest be damaged, there is another
CHECKPOINTS, CHECKSUMS = "checkpoints", "checksums"  # as lab.checkpoint, which loads jax
log = logging.getLogger(__name__)


class Mirror:
    """Names are the same here (under `local`) and there."""

    def __init__(self, files: Objects):
        self.files = files
        self.local = cache_directory() / "studies" / hashlib.sha256(str(files).encode()).hexdigest()[:16]
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what was sent

    def up(self, name: str) -> None:
        """Sends what changed in this directory, and removes there what is gone here. A checkpoint is sent once it counts, which
        its checksums say; they go last."""
        here: dict[str, Path] = {}
        for path in sorted((self.local / name).rglob("*"), key=lambda p: (p.parent.name == CHECKSUMS, p)):
            parts = path.relative_to(self.local / name).parts
            if path.is_file() and not path.name.startswith(".") and self._counts(name, parts):
                here["/".join((name, *parts))] = path
        for one, path in here.items():
            with contextlib.suppress(FileNotFoundError):  # pruned just now
                stat = path.stat()
                if self._sent.get(one) != (stat.st_size, stat.st_mtime_ns):
                    self.files.send(path, one)
                    self._sent[one] = (stat.st_size, stat.st_mtime_ns)
        for one in sorted(self._sent, key=lambda one: f"/{CHECKSUMS}/" not in one):
            if one.startswith(f"{name}/") and one not in here:
                self.files.remove(one)
                del self._sent[one]

    def _counts(self, name: str, parts: tuple[str, ...]) -> bool:
        return parts[0] != CHECKPOINTS or (self.local / name / CHECKSUMS / f"{parts[1]}.json").exists()

    @contextlib.contextmanager
    def kept_up(self, name: str, stop: threading.Event) -> Iterator[None]:
        """Sends what changed from a thread, until `stop`. What can not be sent now is sent later."""
        over = threading.Event()

        def run() -> None:
            while not (over.wait(UP_SECONDS) or stop.is_set()):
                try:
                    self.up(name)
                except Exception as error:  # each store has its own
                    log.warning("%s: %s could not be sent to %s", name, error, self.files)

        thread = threading.Thread(target=run, name=f"mirror {name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def down(self, names: list[str]) -> list[Path]:
        """Those of these attempts' directories (given newest first) that a run goes on from, as they lie here now: the newest
        that have a checkpoint there, and those that got furthest here, perhaps never sent. The others are removed here. Raises
        ValueError where a key there would be a file outside of them here."""
        newest = list(islice((name for name in names if self.files.names(f"{name}/{CHECKSUMS}")), HELD))
        here = [name for name in names if self.reached(name)]
        kept = {*newest, *sorted(here, key=self.reached, reverse=True)[:HELD]}
        for name in newest:
            if not (self.local / name).exists():
                self._bring_attempt(name)
        for name in set(names) - kept:
            self.drop(name)
        return [self.local / name for name in names if name in kept]

    def reached(self, name: str) -> int:
        """Steps of the newest finished checkpoint in an attempt's directory here; 0 where there is none."""
        steps = (path.stem for path in (self.local / name / CHECKSUMS).glob("*.json"))
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def _bring_attempt(self, name: str) -> None:
        target = self.local / name
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        there = self.files.sizes(name)
        for one in there:
            check_path(one)
        for one in there:
            path = partial / one.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that is pruned there just now
                self.files.fetch(one, path)
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another worker of this machine was faster
            partial.rename(target)
        shutil.rmtree(partial, ignore_errors=True)

    def drop(self, name: str) -> None:
        """Removes a directory here, with all that it holds."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        self._sent = {one: sent for one, sent in self._sent.items() if not one.startswith(f"{name}/")}

    def tidy(self) -> None:
        """Removes what lies here of runs that have ended, or were deleted, elsewhere: what could not be sent, and what was
        brought here to go on from."""
        for path in (self.local / "runs").glob("*"):
            with contextlib.suppress(ValueError, FileNotFoundError):  # damaged: nobody knows
                last = History(self.files, f"runs/{path.name}").last()
                if last is None or last.kind == "ended":
                    self.drop(f"runs/{path.name}")

    def records(self) -> Path:
        """A directory of this machine with the study's plan and the results of its runs, for those who read files."""
        target, there = self.local / "records", set(self.files.names("runs"))
        self._bring(records.PLAN, target)
        for path in (target / "runs").glob("*"):
            if path.name not in there:  # deleted, to be trained again
                shutil.rmtree(path, ignore_errors=True)
        for run_id in there:
            for name in (records.RUN, records.RESULT, records.FAILED):
                self._bring(f"runs/{run_id}/{name}", target)
        return target

    def _bring(self, name: str, target: Path) -> None:
        check_path(name)
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            self.files.fetch(name, temporary)
            temporary.replace(path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        finally:
            temporary.unlink(missing_ok=True)
