"""What is shown of one run: its state, and how far it is."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from sweeps.files import Files
from sweeps.index import Ended

TAIL_BYTES = 8192  # of metrics.jsonl, read for its last line
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
    """The last whole line with a training loss, looked for at the file's end only."""
    try:
        lines = files.tail(name, TAIL_BYTES).splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):  # torn: the writer is at it, or was killed
            content = json.loads(line)
            if isinstance(content, dict) and "loss" in content:
                numbers = {k: content.get(k, 0) for k in ("step", "loss", "share")}
                if all(isinstance(value, int | float) for value in numbers.values()):
                    return numbers
    return {}
