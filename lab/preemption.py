"""How a run is asked to stop: a signal sets a flag, the loop looks at it, saves and leaves."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Preempted(SystemExit):
    """The run was asked to stop, has saved, and wants to be started again (exit status 75, EX_TEMPFAIL)."""

    def __init__(self):
        super().__init__(75)


@contextlib.contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, where signals can be handled (the main thread)."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, lambda *_: flag.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
