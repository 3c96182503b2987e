"""How a run is asked to stop: a signal sets a flag, the loop and its evaluations look at it, save and leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator

AGAIN = 75  # exit status that asks to be started again (EX_TEMPFAIL)


class Preempted(SystemExit):
    """The run was asked to stop, has saved, and wants to be started again."""

    def __init__(self):
        super().__init__(AGAIN)


class Superseded(Exception):
    """Another attempt goes on with this run, or it was cancelled: what this one writes no longer counts."""


# SIGUSR1 and SIGUSR2 are what Slurm sends ahead of a time limit (--signal).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


_flag: threading.Event | None = None  # while the handlers are in place


@contextlib.contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that SIGNALS set, where signals can be handled (the main thread). Inside of another it is the same one, so that a
    signal which came before is seen. Nothing is raised where the signal finds the program: that may be in a callback which
    swallows it."""
    global _flag
    if _flag is not None:
        yield _flag
        return
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    _flag = flag
    before = {number: signal.signal(number, lambda *_: flag.set()) for number in SIGNALS}
    try:
        yield flag
    finally:
        _flag = None
        for number, handler in before.items():
            signal.signal(number, handler)
