"""Which runs of a study ended, and how: lines that workers append to a file each, so that nobody has to look at every run.

It is a copy of what the runs' histories say, and only that: a line that is missing or torn costs a look at one directory.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sweeps.files import Directory, Files

DIRECTORY = "ended"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """state: done, diverged, failed or cancelled; waiting, where it is to be tried again. event: which of its history's;
    began: which history, since a directory may have been deleted and begun anew."""

    run_id: str
    began: str
    event: int
    state: Any
    step: int | None = None
    loss: float | None = None
    exact: int = 0  # FLOPs spent
    attempts: int = 0
    reason: str = ""


STATES = ("done", "diverged", "failed", "cancelled", "waiting")


def _is_whole(one: Ended) -> bool:
    """Whether each field is what the class says: a line is data, and may have been edited or mixed up on the disk."""
    texts, counts = (one.run_id, one.began, one.reason), (one.event, one.exact, one.attempts)
    numbers = [*counts, *(value for value in (one.step, one.loss) if value is not None)]
    return (
        one.state in STATES
        and all(isinstance(value, str) for value in texts)
        and all(isinstance(value, int) for value in counts)
        and all(isinstance(value, int | float) for value in numbers)
    )


class Index:
    def __init__(self, files: Files):
        self.files, self._name = files, f"{DIRECTORY}/{uuid.uuid4().hex}.jsonl"
        self._ended: dict[str, Ended] = {}
        self._unclear: set[str] = set()  # runs of several histories, of which it can not tell the newest
        self._read: dict[str, int] = {}  # bytes of each file that were read

    def __contains__(self, run_id: object) -> bool:
        one = self._ended.get(str(run_id))
        return one is not None and one.state != "waiting" and run_id not in self._unclear

    def __getitem__(self, run_id: str) -> Ended:
        return self._ended[run_id]

    def __iter__(self) -> Iterator[Ended]:
        return (one for one in self._ended.values() if one.run_id in self)

    def add(self, one: Ended) -> None:
        """Remembers it, and writes it down; where that fails nobody misses it."""
        if self._put(one):
            with contextlib.suppress(OSError):
                self.files.append(self._name, json.dumps(asdict(one)).encode() + b"\n")

    def _put(self, one: Ended) -> bool:
        before = self._ended.get(one.run_id)
        if before is not None and before.began != one.began:
            self._unclear.add(one.run_id)
        elif before is not None and before.event >= one.event:
            return False
        self._ended[one.run_id] = one
        return True

    def refresh(self) -> None:
        """Reads what was added since."""
        for name in self.files.names(DIRECTORY):
            done = self._read.get(name, 0)
            new = self._from(f"{DIRECTORY}/{name}", done)
            whole = new[: new.rfind(b"\n") + 1]  # its writer may be at the last line
            self._read[name] = done + len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    if _is_whole(one := Ended(**json.loads(line))):
                        self._put(one)

    def _from(self, name: str, start: int) -> bytes:
        if isinstance(self.files, Directory):
            with self.files.path(name).open("rb") as file:
                file.seek(start)
                return file.read()
        return self.files.read(name)[start:]
