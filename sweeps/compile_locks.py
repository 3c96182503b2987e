"""Who compiles which program on this machine, so that other workers wait for it, and find it in the cache, or take another."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sweeps.files import UNSUPPORTED, check_name


class CompileLocks:
    def __init__(self, directory: Path):
        self.directory = directory

    @contextlib.contextmanager
    def hold(self, key: str) -> Iterator[bool]:
        """Held by the worker that compiles the program; a dead one's is dropped.

        Yields False, at once, on a file system that has no locks: a program is then compiled twice, which is only slower.
        """
        path = self._path(key)
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

    def held(self, key: str) -> bool:
        """Whether a living process holds it."""
        try:
            # A shared lock is enough to ask: those who ask do not see one another, and NFS gives it to readers.
            with self._path(key).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # no such lock yet, or none on this file system
        return False

    def _path(self, key: str) -> Path:
        check_name("key", key)
        return self.directory / f"{key}.lock"
