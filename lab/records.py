"""What a run and a study write down, and how it is read back.

    runs/<study>/plan.json                     every run of the study, complete, and its arm, budget, rung and replicate
    runs/<study>/runs/<run_id>/run.json        one Run (lab.spec), complete
                               result.json     how it ended: `outcome` is deterministic, `measured` is not
                               failed.json     or why it failed
                               history/        who held the run and which result counts (sweeps.history)
                               attempts/<n>-*/ where each attempt trained; its own run.json and result.json, and
                                 metrics.jsonl a line with the schema, then one per logged block of steps
                                 checkpoints/  Orbax; checksums/ says which are whole

`lab train` has neither history nor attempts: all of it lies in the run's directory.

Every file is written whole or not at all (a temporary name, then a rename). JSON has no infinities and no NaN: a loss
that does not exist is null.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
METRICS_SCHEMA = 1  # of metrics.jsonl, which says so in its first line
PLAN, RUN, METRICS, RESULT, FAILED = "plan.json", "run.json", "metrics.jsonl", "result.json", "failed.json"
ATTEMPTS, HISTORY = "attempts", "history"
PLACE = re.compile(rf"{ATTEMPTS}/[0-9]{{4,}}-[0-9a-f]{{8}}")  # of an attempt, in its run's directory


def run_directory(study: Path, run_id: str) -> Path:
    return Path(study) / "runs" / run_id


def attempts(run_dir: Path) -> list[Path]:
    """Where a run was trained, newest first: its attempts/<n>-<token>, or the directory itself where there are none
    (`lab train`)."""
    found = [(attempt_number(path.name), path) for path in (Path(run_dir) / ATTEMPTS).glob("*")]
    return [path for number, path in sorted(found, reverse=True) if number] or [Path(run_dir)]


def attempt_number(name: str) -> int:
    """Of a directory in attempts/; 0 of what is none."""
    number, _, token = name.partition("-")
    return int(number) if number.isdigit() and token else 0


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` to `path` atomically and durably; raises ValueError on NaN or infinity."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically and durably."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads one record; raises ValueError naming the path where it is torn or of another schema."""
    return parse_json(Path(path).read_bytes(), path)


def parse_json(text: bytes, path: Path | str) -> dict[str, Any]:
    """As read_json, of what was read from `path`."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); restore it, or delete it to run again") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{path}: schema {found!r}, this version reads {SCHEMA}; read it with the version that wrote it"
        )
    return value


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json of one run, or None where the run has not ended."""
    path = Path(run_dir) / RESULT
    return read_json(path) if path.exists() else None


def last_event(run_dir: Path) -> dict[str, Any] | None:
    """What happened to a run last, as its history says (sweeps.history); None where it has none, as after `lab train`. Raises
    ValueError where an event before it is missing: what followed can not be trusted."""
    place = Path(run_dir) / HISTORY
    found = {int(path.stem): path for path in place.glob("*.json") if path.stem.isdecimal()}
    missing = next((number for number in range(1, max(found, default=0)) if number not in found), None)
    if missing is not None:
        raise ValueError(f"{place}/{missing:04d}.json: is missing, while a later one is there; {_anew(run_dir)}")
    return read_json(found[max(found)]) if found else None


def read_published(run_dir: Path) -> dict[str, Any] | None:
    """As read_result, where the run has a history only the very bytes that it says were published; without their copy in
    `run_dir`, the attempt's own. Raises ValueError, naming the file, for a result that was changed or lost since."""
    event, path = last_event(run_dir), Path(run_dir) / RESULT
    if event is None:
        return read_result(run_dir)
    if event.get("kind") != "ended" or event.get("status") == "failed":
        if path.exists():
            raise ValueError(
                f"{path}: the run's history says of no attempt that it published this; move the file away, and `lab run` "
                "trains what is left"
            )
        return None
    attempt, digest = str(event.get("attempt")), event.get("sha256")
    if not PLACE.fullmatch(attempt):
        raise ValueError(f"{Path(run_dir) / HISTORY}: its last event names no attempt ({attempt!r}); {_anew(run_dir)}")
    own = Path(run_dir) / attempt / RESULT
    found = {where: where.read_bytes() for where in (path, own) if where.exists()}
    whole = [where for where, text in found.items() if hashlib.sha256(text).hexdigest() == digest]
    if path in found and path not in whole:
        way_out = f"copy {own} over it, which is whole" if whole else _anew(run_dir)
        raise ValueError(f"{path}: not what the run published, it was changed or torn since; {way_out}")
    if not whole:
        raise ValueError(f"{path}: gone, or not what the run published, and so is {own}; {_anew(run_dir)}")
    return parse_json(found[whole[0]], whole[0])


def _anew(run_dir: Path) -> str:
    return f"restore it, or delete {run_dir} to train the run again"


class MetricsWriter:
    """metrics.jsonl, which begins with its schema and the lines `kept` (of a run that goes on: those up to its checkpoint)."""

    def __init__(self, run_dir: Path, kept: Sequence[Mapping[str, Any]] = ()):
        self.path = Path(run_dir) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{METRICS}.{uuid.uuid4().hex[:8]}")
        lines = [{"schema": METRICS_SCHEMA}, *kept]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, **values: float | int | None) -> None:
        self.file.write(json.dumps(values, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl up to the first that is torn, is no UTF-8 or is no object with a step, as a killed writer
    or a broken disk leave them. Raises ValueError where the first names another schema; those of before name none."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines()):
        try:
            line = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):  # of which JSON's and UTF-8's errors are kinds
            break
        if number == 0 and check_metrics(line, path):
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), (int, float)):
            break
        lines.append(line)
    return lines


def check_metrics(line: Any, path: Path | str) -> bool:
    """Whether a line of metrics.jsonl is its first, with the schema; raises ValueError where that is another version's."""
    if not isinstance(line, dict) or "schema" not in line:
        return False
    if line["schema"] != METRICS_SCHEMA:
        raise ValueError(
            f"{path}: schema {line['schema']!r}, this version reads {METRICS_SCHEMA}; read it with the version that wrote it, "
            "or move the file away to go on without its lines"
        )
    return True
