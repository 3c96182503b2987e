"""What is shown of one run: its state, and how far it is."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from lab import records
from sweeps.files import Files
from sweeps.index import Ended

TAIL_BYTES = 8192  # of metrics.jsonl: some 40 lines
State = Literal["waiting", "running", "done", "diverged", "failed", "cancelled", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Status:
    run_id: str
    state: State
    step: int | None = None
    loss: float | None = None
    share: float = 0.0  # of the run's budget that is spent
    held_by: str = ""
    attempts: int = 0
    reason: str = ""  # why it failed; of a damaged one, which file can not be read and what to do


def of_ended(e: Ended) -> Status:
    share = 1.0 if e.state in ("done", "diverged") else 0.0
    return Status(run_id=e.run_id, state=e.state, step=e.step, loss=e.loss, share=share, attempts=e.attempts,
                  reason=e.reason)  # fmt: skip


def last_metrics(files: Files, name: str) -> dict[str, Any]:
    """Step, loss and share of the last whole line with a training loss; {} where there is none."""
    for line in reversed(tail(files, name)):
        numbers = {k: line.get(k, 0) for k in ("step", "loss", "share")}
        if all(isinstance(value, int | float) for value in numbers.values()):
            return numbers
    return {}


def tail(files: Files, name: str) -> list[dict[str, Any]]:
    """The whole lines with a training loss at the end of a metrics.jsonl. Raises ValueError where the line with the schema lies
    there too, and is another version's."""
    try:
        texts = files.tail(name, TAIL_BYTES).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the first is cut; and the writer is at the last, or was killed
            continue
        if not records.check_metrics(line, f"{files}/{name}") and isinstance(line, dict) and "loss" in line:
            found.append(line)
    return found
