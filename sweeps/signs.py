"""How a run is doing, from what it wrote last: its speed, what is left of it, when it gave a sign of life."""

import contextlib
import time
from dataclasses import dataclass

from lab import records
from sweeps.claim import HEARTBEAT
from sweeps.files import Files
from sweeps.status import tail
from sweeps.store import Store


@dataclass(frozen=True, kw_only=True)
class Sign:
    """speed: tokens a second, over the last lines of metrics.jsonl. left: seconds to the run's end at that speed. ago: seconds
    since its worker's last heartbeat, by this machine's clock and the files' time, so that it is off where they differ."""

    speed: float | None = None
    left: float | None = None
    ago: float | None = None


def sign_of(store: Store, run_id: str, now: float | None = None) -> Sign:
    """Of a run that runs; nothing is known of one that ended just now, or that has written nothing yet. now: seconds since
    1970 (default: this moment)."""
    last = store.history(run_id).last()
    if last is None or last.kind != "attempt":
        return Sign()
    place, row = f"runs/{run_id}/{last.directory}", store.runs[run_id]
    beat = _modified(store.files, f"{place}/{HEARTBEAT}")
    ago = None if beat is None else max(0.0, (time.time() if now is None else now) - beat)
    lines = [line for line in tail(store.files, f"{place}/{records.METRICS}") if {"step", "seconds"} <= line.keys()]
    if len(lines) < 2 or not lines[-1]["seconds"] > lines[0]["seconds"] or not lines[-1]["step"] > lines[0]["step"]:
        return Sign(ago=ago)
    first, newest, steps = lines[0], lines[-1], row["planned"]["steps"]
    pace = (newest["step"] - first["step"]) / (newest["seconds"] - first["seconds"])
    left = max(0, steps - newest["step"]) / pace
    return Sign(speed=pace * row["planned"]["tokens"] / steps, left=left, ago=ago)


def _modified(files: Files, name: str) -> float | None:
    """As Files.modified; None too where that can not be told now."""
    with contextlib.suppress(OSError):
        return files.modified(name)
    return None
