"""How often a launcher starts a worker again that died, and when it gives its place up."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

from sweeps.store import Store

log = logging.getLogger(__name__)
RESTARTS = 3  # of one place while the study does not go on: a machine that kills everything is not fought
GROUP_RESTARTS = 12  # where the worker is one of several hosts: each that starts again may find another's old end
BACKOFF_SECONDS = 1.0  # before the first restart; it doubles each time


class Progress(NamedTuple):
    """left: runs that have not ended. steps: of the newest checkpoints of those that were begun. deaths: of workers on the run
    that most of them died on, without a new checkpoint of it."""

    left: int
    steps: int
    deaths: int

    @staticmethod
    def of(store: Store) -> "Progress":
        left, begun = store.left(), set(store.files.names("runs"))
        steps, deaths = 0, 0
        for run_id in (run_id for run_id in left if run_id in begun):
            history = store.history(run_id)
            steps += store.checkpointed(run_id)
            deaths = max(deaths, history.deaths(history.last())[0])
        return Progress(len(left), steps, deaths)

    def is_beyond(self, before: "Progress") -> bool:
        """Whether a run has ended since, or got further, or one that kills its workers is nearer to being given up itself
        (sweeps.store.MAX_DEATHS): other runs are not to go without a worker because of it."""
        return self.left < before.left or self.steps > before.steps or self.deaths > before.deaths


class Restarts:
    """Of places, whatever names them, since the study last went on."""

    def __init__(self, store: Store, *, most: int = RESTARTS, backoff_seconds: float = BACKOFF_SECONDS):
        self.store, self.most, self.backoff_seconds = store, most, backoff_seconds
        self.progress = Progress.of(store)
        self._counts = Counter[Hashable]()
        self._said = set[str]()

    @property
    def left(self) -> int:
        """Runs, when that was last looked at."""
        return self.progress.left

    def attempt(self, ask: Callable[[], None]) -> None:
        """Does it, where that works: the workers are not stopped by a study that can not be read just now, which is said once."""
        try:
            ask()
        except (OSError, ValueError) as error:
            if (what := str(error)) not in self._said:
                self._said.add(what)
                log.warning("%s could not be looked at: %s; the workers go on", self.store.root, what)

    def look(self) -> None:
        self.attempt(self._look)

    def _look(self) -> None:
        now = Progress.of(self.store)
        if now.is_beyond(self.progress):
            self._counts.clear()
        self.progress = now

    def after(self, place: Hashable) -> float | None:
        """Seconds to wait before a worker is started again in this place; None where it has to be given up."""
        if self._counts[place] >= self.most:
            return None
        wait = self.backoff_seconds * 2 ** min(self._counts[place], RESTARTS)
        self._counts[place] += 1
        return wait
