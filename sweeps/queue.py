"""Which run a worker takes next. Looks at a window of the plan, never at all of it, so that a claim costs the same in a study
of 100,000 runs as in one of ten."""

import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from sweeps.claim import Claim
from sweeps.store import Store

log = logging.getLogger(__name__)
WINDOW = 512  # runs that are looked at together; those of one program are then taken one after another

Row = dict[str, Any]


class Queue:
    """The runs of a study that this worker has not seen ended, in the plan's order.

    What other workers hold goes to the end and is looked at again, since they may die. So does what dead workers held, since
    it may have killed them: all else is trained first, and it is taken alone, never together with others.
    """

    def __init__(self, store: Store):
        self.store = store
        store.index.refresh()
        self._begun = begun = set(store.files.names("runs"))
        left = (run_id for run_id in store.runs if not (run_id in store.index and run_id in begun))
        self._later: deque[str] = deque(left)
        self._window: dict[str, Row] = {}
        self._held: dict[str, Row] = {}
        self._deaths: dict[str, int] = {}  # of what is in _held: attempts that came to nothing, or are under way
        self.program: dict[str, str] = {}  # of the runs that were looked at

    def __bool__(self) -> bool:
        """Whether a run may still have to be trained."""
        return bool(self._window or self._later or self._held)

    def next(self, preference: Callable[[Row], Any]) -> Claim | None:
        """Claims the run of the window that `preference` puts first (then the plan's order); None if all are held or ended."""
        while True:
            while self._later and len(self._window) < WINDOW:
                self._look_at(self._later.popleft())
            if not self._window:
                break
            row = min(self._window.values(), key=preference)  # the first of equals
            if (claim := self._of_window(row)) is not None:
                return claim
        self.store.index.refresh()
        for row in sorted(self._held.values(), key=lambda row: (*self._suspicion(row), preference(row))):
            if (claim := self._claim(row)) is not None:
                return claim
        return None

    def _look_at(self, run_id: str) -> None:
        row = self.store.runs[run_id]
        self.program[run_id] = program_of(row)
        if not (run_id in self._begun and self._is_suspect(row)):
            self._window[run_id] = row

    def _is_suspect(self, row: Row) -> bool:
        """Whether a worker may have died of it, or has it; it is then held back."""
        run_id = row["run_id"]
        with contextlib.suppress(ValueError, FileNotFoundError):  # damaged, which is said when it is claimed
            history = self.store.history(run_id)
            if deaths := history.deaths(history.last())[0]:
                self._held[run_id], self._deaths[run_id] = row, deaths
                return True
        return False

    def _suspicion(self, row: Row) -> tuple[bool, int]:
        """What nobody died of comes first; of the others the worst, so that it is done with before the next is tried."""
        deaths = self._deaths.get(row["run_id"], 0)
        return deaths > 0, -deaths

    def like(self, row: Row, most: int) -> Iterator[Claim]:
        """Claims up to `most` more runs of the window that share a program with `row`."""
        for other in self._like(row)[:most]:
            if (claim := self._of_window(other)) is not None:
                yield claim

    def share(self, row: Row, workers: int) -> int:
        """Of the runs of the window that share a program with `row`, and itself, how many one of `workers` workers takes
        together, so that all have something to do: all of them where there are programs for every worker."""
        others = {self.program[run_id] for run_id in self._window} - {self.program[row["run_id"]]}
        return -(-(1 + len(self._like(row))) // -(-workers // (1 + len(others))))

    def _like(self, row: Row) -> list[Row]:
        program = self.program[row["run_id"]]
        return [other for run_id, other in self._window.items() if self.program[run_id] == program]

    def back(self, claim: Claim) -> None:
        """It was released without an end."""
        self._held[claim.run_id] = claim.row

    def _of_window(self, row: Row) -> Claim | None:
        """Claims it, unless another worker took it since it was looked at, and may have died of it."""
        del self._window[row["run_id"]]
        return None if self._is_suspect(row) else self._claim(row)

    def _claim(self, row: Row) -> Claim | None:
        run_id = row["run_id"]
        self._held.pop(run_id, None)
        try:
            claim = self.store.claim(run_id)
            if claim is None and not self.store.ended(run_id):
                self._held[run_id] = row
        except FileNotFoundError:  # its directory is being deleted: look again
            self._held[run_id] = row
            return None
        except ValueError as error:
            log.error("%s is left out: %s", run_id, error)
            return None
        return claim


def program_of(row: Row) -> str:
    """What two runs share that one compiled program serves: all but seeds, budget, evaluation and the optimizer's numbers."""
    run = row["run"]
    parts = {name: run[name] for name in ("structure", "shape", "options", "objective", "batch", "precision")}
    return json.dumps([parts, run["optimizer"]["name"], run["data"]["vocabulary"]], sort_keys=True)
