"""Where an attempt's time goes."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds since it was made, and by what they were spent on; a result's `seconds` are those of all attempts."""

    def __init__(self):
        self.began = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(("compile", "data", "evaluate", "checkpoint"), 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - start

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def parts(self, training: float) -> dict[str, float]:
        """With what is left of `training` seconds in the loop as `step`: waiting for the device."""
        inside = sum(self.seconds[part] for part in ("data", "evaluate", "checkpoint"))
        return {**self.seconds, "step": max(training - inside, 0.0)}
