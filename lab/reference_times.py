"""Reference System Time: what an operation takes on a reference machine, in seconds (Kaddour et al. 2023, "No Train No Gain",
arXiv 2307.06440, section 2).

A table is a JSON file that `lab calibrate` measures on the device at hand, or one of the published ones that are shipped. A
run that refers to one (by the SHA-256 of its bytes) counts the seconds of all that it executes, wherever it really runs; a
budget of reference_seconds is one of them. An operation that the table lacks is refused by its key: nothing is guessed.

A key is `subject/kind/layers xexamples`. The subject says what is computed (structure, sizes but for depth, options, lengths,
vocabulary, precision); updates, averages and estimates of the Hessian also name the optimizer or technique. Of published tables
the subject is `*`: they are of the model that their source describes. Where `microbatch` is true an operation on n times as many
examples costs n times as much, as it does for a batch that is cut in parts; else the number has to be the very one.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.checks import nearest
from lab.forms import forms
from lab.records import write_json
from lab.spec import Budget, Run, to_json

if TYPE_CHECKING:
    from lab.method import Operation

SHIPPED = Path(__file__).parent / "reference_tables"
SCHEMA = 1
ANY = "*"
WORK = ("interval", "iterations", "window")  # settings of optimizers and techniques that change what is computed


@dataclass(frozen=True, kw_only=True)
class Table:
    """entries: seconds by key. machine: what they were measured on. sha256: of the file."""

    entries: Mapping[str, float]
    microbatch: bool
    machine: Mapping[str, Any]
    source: str
    sha256: str
    path: str

    def get(self, key: str, examples: int) -> float | None:
        """Of a key without its examples; None where it is not there."""
        if (exact := self.entries.get(f"{key} x{examples}")) is not None or not self.microbatch:
            return exact
        for known, seconds in self.entries.items():
            of, _, size = known.rpartition(" x")
            if of == key and int(size) and examples % int(size) == 0:
                return examples // int(size) * seconds
        return None

    def seconds(self, run: Run, operation: "Operation") -> float:
        """Raises ValueError naming a key that is not there."""
        subject = subject_of(run, operation.form)
        for name in (subject, ANY):
            if (found := self.get(key(run, operation, name), operation.examples)) is not None:
                return found
        raise ValueError(
            f"budget.reference: {self.path} has no reference time of '{key(run, operation, subject)} x{operation.examples}': "
            "measure it with `lab calibrate`, or use a table that has it"
        )


def subject_of(run: Run, form: int) -> str:
    """A name for what is computed, whatever the depth: a slug and a hash."""
    content = to_json(run)
    shape = {name: size for name, size in content["shape"].items() if name not in ("L", "L_input")}
    of = forms(run.objective)[form]
    parts = [content["structure"], shape, content["options"], vars(replace(of, share=1)), run.V, run.precision]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{run.structure.name}-d{run.shape.D}-{of.S}+{of.T}-{run.precision}-{digest[:8]}"


def key(run: Run, operation: "Operation", subject: str) -> str:
    """Without its examples. Of layers that run it says how many, not which; of two depths the input stream's first. Numbers
    that say how much work it is are part of it (not of published tables)."""
    kind, active = operation.kind, operation.active
    targets, inputs = (active.targets, active.all_inputs) if active else (run.shape.L, run.shape.L_input)
    layers = str(targets) if targets == inputs or run.structure.encoder_only else f"{inputs}+{targets}"
    numbers: Mapping[str, float] = {}
    if kind in ("update", "hessian"):
        kind, numbers = f"{kind}/{run.optimizer.name}", {} if run.optimizer.curvature else run.optimizer.extra
    if kind == "average":
        kind, numbers = (
            f"{kind}/{run.technique.name if run.technique else ''}",
            run.technique.settings if run.technique else {},
        )
    if subject != ANY:
        kind += "".join(f",{name}={numbers[name]:g}" for name in WORK if name in numbers)
    return f"{subject}/{kind}/{layers}"


def shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def read(name: str | Path) -> Table:
    """A table by its path, or a shipped one by its name; raises ValueError for what is none."""
    path = shipped().get(str(name), Path(name))
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"reference times {str(name)!r}: no such file; {nearest(str(name), list(shipped()))}, or give the path "
                         "of one that `lab calibrate` made") from error  # fmt: skip
    return _read(path.absolute(), status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(path: Path, _: int) -> Table:
    text = path.read_bytes()
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise KeyError(f"schema {content['schema']!r}; this version reads {SCHEMA}")
        entries = content["entries"]
        seconds = {
            name: float(entry["seconds"] if isinstance(entry, dict) else entry) for name, entry in entries.items()
        }
        table = Table(entries=seconds, microbatch=content["microbatch"], machine=content["machine"],
                      source=content["source"], sha256=hashlib.sha256(text).hexdigest(), path=str(path))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of reference times ({error})") from error
    for name, value in seconds.items():
        if not (0 <= value < float("inf") and name.rpartition(" x")[2].isdigit()):
            raise ValueError(
                f"{path}: not a table of reference times: '{name}' is {value!r} (keys end in ' x' and a number, and seconds are "
                "finite and not negative)"
            )
    return table


def of(budget: Budget) -> Table | None:
    """The table that a budget refers to; raises ValueError where it is not there, or is another."""
    if budget.reference is None:
        return None
    return _of(budget.reference, budget.reference_path)


@functools.lru_cache(maxsize=64)
def _of(sha256: str, path: str | None) -> Table:
    found = [read(path)] if path else [read(name) for name in shipped()]
    for table in found:
        if table.sha256 == sha256:
            return table
    where = path or f"the shipped tables, {', '.join(shipped())},"
    raise ValueError(f"budget.reference = {sha256[:12]}...: {where} is another table: give budget.reference_path the file that "
                     "the run was planned with, or plan it anew")  # fmt: skip


def budget(table: Table | str | Path, amount: float) -> Budget:
    """So many seconds of a table: one that was read, or its path or shipped name."""
    table = table if isinstance(table, Table) else read(table)
    here = None if Path(table.path).parent == SHIPPED else table.path
    return Budget(unit="reference_seconds", amount=amount, reference=table.sha256, reference_path=here)


def write(path: Path, entries: Mapping[str, Any], *, machine: Mapping[str, Any], source: str) -> Table:
    """entries: {key: {"seconds": those that are charged, ...}}."""
    write_json(path, {"schema": SCHEMA, "source": source, "machine": dict(machine), "microbatch": False,
                      "entries": dict(sorted(entries.items()))})  # fmt: skip
    return read(path)
