"""How a run is doing, or how far it came, from what it wrote last: its speed, what is left of it, when it gave a sign of life."""

import contextlib
import json
import time
from dataclasses import dataclass
from typing import Any

from lab import records
from sweeps.claim import HEARTBEAT
from sweeps.files import Directory, Files
from sweeps.store import Store

TAIL_BYTES = 8192  # of metrics.jsonl: some 40 lines


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
    lines = _lines(store.files, f"{place}/{records.METRICS}")
    if len(lines) < 2 or not lines[-1]["seconds"] > lines[0]["seconds"] or not lines[-1]["step"] > lines[0]["step"]:
        return Sign(ago=ago)
    first, newest, steps = lines[0], lines[-1], row["planned"]["steps"]
    pace = (newest["step"] - first["step"]) / (newest["seconds"] - first["seconds"])
    left = max(0, steps - newest["step"]) / pace
    return Sign(speed=pace * row["planned"]["tokens"] / steps, left=left, ago=ago)


def lost_flops(store: Store) -> float:
    """Exact FLOPs that runs which failed or were cancelled have spent, as far as their attempts' metrics say."""
    given_up = [s.run_id for s in store.status() if s.state in ("failed", "cancelled")]
    return sum(_furthest(store, run_id) * store.runs[run_id]["planned"]["exact"] for run_id in given_up)


def _furthest(store: Store, run_id: str) -> float:
    """The share of its budget that any attempt at a run came to: each goes on from the one before."""
    place = f"runs/{run_id}/{records.ATTEMPTS}"
    names = [f"{place}/{attempt}/{records.METRICS}" for attempt in store.files.names(place)]
    return max((line.get("share", 0.0) for name in names for line in _lines(store.files, name)[-1:]), default=0.0)


def _lines(files: Files, name: str) -> list[dict[str, Any]]:
    """The last whole lines with a training loss."""
    found = []
    try:
        texts = files.tail(name, TAIL_BYTES).splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):  # the first is cut, and the writer may be at the last
            line = json.loads(text)
            if isinstance(line, dict) and {"loss", "step", "seconds"} <= line.keys():
                found.append(line)
    return found


def _modified(files: Files, name: str) -> float | None:
    """When a file was written, in seconds since 1970; None where it is not there or the store does not say."""
    with contextlib.suppress(OSError, NotImplementedError, AttributeError):
        if isinstance(files, Directory):
            return files.path(name).stat().st_mtime
        system: Any = getattr(files, "system", None)
        return system.modified(f"{getattr(files, 'prefix', '')}/{name}").timestamp()
    return None
