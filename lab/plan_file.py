"""plan.json: one JSON object whose `runs` lie one on a line, so that a plan of 100,000 runs is read without parsing them all.

{
 "schema": 1,
 "study": {...},
 "runs": [
{"run_id": "...", "arm": ...},
{"run_id": "...", "arm": ...}
 ]
}
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from lab.records import PLAN, parse_json

NEWLINE = b"\n"
REMEDY = "restore it, or delete it and write the plan again with `lab plan STUDY --out DIR`, which keeps what is done"
RUNS, END = b'"runs": [\n', b"\n ]\n}\n"
ID = re.compile(rb'^\{"run_id": "([^"\\]*)".*\}(,?)$', re.MULTILINE)


class Rows(Sequence[dict[str, Any]]):
    """The rows of a plan, made when they are asked for. `ids`: the run of each, in the plan's order."""

    def __init__(self, ids: Iterable[str], row: Callable[[int], dict[str, Any]]):
        self.ids, self._row = tuple(ids), row

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        chosen = range(len(self))[index]
        return self._row(chosen) if isinstance(chosen, int) else [self._row(i) for i in chosen]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def read(study: Path) -> dict[str, Any]:
    """The plan in a study's directory: `schema`, `study` and `runs`, its Rows."""
    path = Path(study) / PLAN
    if not path.exists():
        raise ValueError(f"{study}: no {PLAN} here; give the directory that `lab run` or `lab plan --out` wrote")
    return from_text(path.read_bytes(), path)


def matched_on(match: Mapping[str, Any]) -> str:
    """What a plan says of `match`, in words."""
    if match["quantity"] == "flops":
        return f"flops ({match['convention']})"
    return f"{match['quantity']} of {Path(match['reference']).name}" if match.get("reference") else match["quantity"]


def to_text(plan: Mapping[str, Any]) -> bytes:
    """The file's content; plan["runs"] may be any iterable of rows. Raises ValueError on NaN or infinity."""
    about = {name: value for name, value in plan.items() if name != "runs"}
    head = json.dumps(about, indent=1, allow_nan=False)[: -len("\n}")].encode()
    rows: Iterable[Mapping[str, Any]] = plan["runs"]
    encode = json.JSONEncoder(allow_nan=False).encode
    lines = b",\n".join(encode({"run_id": row["run_id"], **row}).encode() for row in rows)
    return head + b",\n " + RUNS + lines + END


def from_text(text: bytes, path: Path | str) -> dict[str, Any]:
    """What `to_text` wrote, its rows parsed when they are asked for; any other JSON is parsed at once. Raises ValueError,
    naming the path, for a file that is torn."""
    start = text.find(RUNS + b'{"run_id"')
    if start < 0:
        plan = parse_json(text, path)
        try:
            rows: list[dict[str, Any]] = plan["runs"]
            plan["runs"] = Rows([row["run_id"] for row in rows], rows.__getitem__)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a plan (no {error}); {REMEDY}") from error
        return plan
    if not text.endswith(END):
        raise ValueError(f"{path}: it ends in the midst of a plan; {REMEDY}")
    start, end = start + len(RUNS), len(text) - len(END)
    plan = parse_json(text[:start] + b"]}", path)
    ids: list[str] = []
    spans: list[tuple[int, int]] = []
    at = start
    for found in ID.finditer(text, start, end):
        if found.start() != at or bool(found[2]) == (found.end() == end):
            break
        ids.append(found[1].decode())
        spans.append((at, found.end() - len(found[2])))
        at = found.end() + 1

    def line(at: int) -> str:
        return f"{path}: line {text.count(NEWLINE, 0, at) + 1}"

    if at != end + 1:
        raise ValueError(f"{line(at)} is not a row of a plan; {REMEDY}")

    def row(index: int) -> dict[str, Any]:
        start, end = spans[index]
        try:
            return json.loads(text[start:end])
        except ValueError as error:
            raise ValueError(f"{line(start)} is not JSON ({error}); {REMEDY}") from error

    plan["runs"] = Rows(ids, row)
    return plan
