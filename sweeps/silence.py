"""Which of those that hold a run are silent, and so are given up.

On the machine of the holder the kernel knows: a process that is gone (or its id is another's by now) is silent at once. Otherwise
silent is a heartbeat that has not changed for `lease` seconds of the observer's own monotonic clock, the observer's lease or the
holder's, which its event says, whichever is longer. Two machines' clocks are never compared.
"""

from collections.abc import Callable
from typing import NamedTuple

from sweeps.claim import HEARTBEAT
from sweeps.files import Files
from sweeps.history import Event


class Seen(NamedTuple):
    """What an attempt last showed, and when this observer first saw it, in seconds of its clock."""

    token: str
    heartbeat: bytes
    since: float


class Silence:
    def __init__(self, files: Files, *, lease: float, clock: Callable[[], float]):
        self.files, self.lease, self._clock = files, lease, clock
        self._seen: dict[str, Seen] = {}

    def seen(self, directory: str) -> Seen | None:
        """Of the run in this directory; None where nobody was seen to hold it."""
        return self._seen.get(directory)

    def holds(self, directory: str, event: Event) -> bool:
        """Whether `event`, the last one of the run in this directory, is an attempt under way."""
        if event.kind != "attempt" or event.owner.alive() is False:
            return False
        try:
            heartbeat = self.files.read(f"{directory}/{event.directory}/{HEARTBEAT}")  # only whether it changes matters
        except FileNotFoundError:
            heartbeat = b""
        now, before = self._clock(), self._seen.get(directory)
        if before is None or before[:2] != (event.owner.token, heartbeat):
            before = self._seen[directory] = Seen(event.owner.token, heartbeat, now)
        return now - before.since < max(self.lease, event.content.get("lease", 0.0))
