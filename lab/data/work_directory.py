"""Directories in which work lies until it is whole: one process at a time holds one, by a lock that ends with it."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def alone(work: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the work directory, made if need be, until the end; BlockingIOError where another does and `wait` is false."""
    stream = None
    while stream is None:
        work.mkdir(parents=True, exist_ok=True)
        stream = _locked(work / "lock", wait)
    with stream:
        yield


def _locked(file: Path, wait: bool) -> TextIO | None:
    """The file, open and locked; None where whoever held it has ended, and removed the directory."""
    import fcntl

    with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
        stream = opened.enter_context(file.open("a"))
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            opened.pop_all()
            return stream
    return None


def remove_abandoned(root: Path, pattern: str, seconds: float, but: Path | None = None) -> None:
    """Removes what matches, was not touched for so many seconds, and is held by nobody."""
    for left in root.glob(pattern):
        # Another process may end its work, and with it the directory, meanwhile.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            if left != but and time.time() - left.stat().st_mtime >= seconds:
                with alone(left, wait=False):
                    shutil.rmtree(left, ignore_errors=True)
