"""One row per planned run, with what was planned, what was spent and how it ended."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.guards import facts
from analysis.refusal import Refusal
from lab import plan_file, records, spec

CONVENTIONS = ("exact", "dense", "6nd", "textbook")
SPENT = (*CONVENTIONS, "tokens", "steps")
DESIGN = ("structure", "options", "objective", "optimizer", "technique", "precision")  # parts of a run's JSON
DEPTHS = ("L", "L_input")
SOLVED = ("optimizer.learning_rate",)  # what each run has its own of
# What a run did not spend as planned is another run; the tolerance is for floats that went through JSON.
TOLERANCE = 1e-9


def load(path: str | Path, *, damaged: Literal["refuse", "keep"] = "refuse") -> pd.DataFrame:
    """Reads plan.json and every result.json of the study in directory `path`.

    `status` is done, diverged, failed, cancelled or missing; with damaged="keep" also damaged, and `reason` says why. A result
    counts only as it was published: its SHA-256 stands in the run's history, where it has one (`lab train` writes none).
    Losses are nats per target token on held-out text and are NaN unless the run is done. `flops_*`, `tokens_seen` and `steps`
    are what was spent, and NaN where there is no result; `planned_*` is always there. `D` and `L` are the model's width and
    depth, `S` and `T` its input and target length, `measure` and `corpus` what the loss is of (analysis.guards.facts),
    `examples` the training examples seen. Arms that share a run (A/A) each have a row with the same run_id.
    `attrs["study"]` is the plan's study, `attrs["designs"]` what each arm is (`design`). Raises ValueError, naming the file and
    the way out, for records that are torn, were changed, disagree with the plan, or are of another schema.
    """
    study = Path(path)
    plan = plan_file.read(study)
    where = study / records.PLAN
    try:
        name, arms, baseline = (plan["study"][key] for key in ("name", "arms", "baseline"))
        rows = plan["runs"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: no {error}; {plan_file.REMEDY}") from error
    if baseline not in arms:
        raise ValueError(f"{where}: study.baseline = {baseline!r}: use one of the arms {', '.join(arms)}")
    if not rows:
        raise ValueError(f"{where}: the plan of {name!r} has no runs; plan at least one")
    results: dict[str, dict[str, Any]] = {}
    table = []
    for row in rows:
        run_id = row["run_id"]
        if row["arm"] not in arms:
            raise ValueError(f"{where}: run {run_id}: arm = {row['arm']!r}: use one of {', '.join(arms)}")
        if run_id not in results:
            results[run_id] = _read(records.run_directory(study, run_id), run_id, damaged)
        table.append(_row(where, row, results[run_id], damaged))
    frame = pd.DataFrame(table)
    frame.attrs["study"] = plan["study"]
    first = {row["arm"]: row["run"] for row in reversed(rows)}
    frame.attrs["designs"] = {arm: design(first[arm]) for arm in arms if arm in first}
    return frame


def design(run: Mapping[str, Any]) -> dict[str, str]:
    """What an arm is, from the JSON of its first run: each leaf by its path. Widths and learning rates are not part of it."""
    leaves = {path: value for part in DESIGN for path, value in _leaves(part, run.get(part))}
    leaves |= {name: str(run["shape"][name]) for name in DEPTHS} | {"batch": str(run["batch"])}
    return {path: value for path, value in leaves.items() if path not in SOLVED}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(f"{path}.{name}", part)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _read(run_dir: Path, run_id: str, damaged: str) -> dict[str, Any]:
    try:
        return _result(run_dir, run_id)
    except ValueError as error:
        if damaged == "refuse":
            raise
        return {"status": "damaged", "reason": str(error)}


def _result(run_dir: Path, run_id: str) -> dict[str, Any]:
    result = records.read_published(run_dir)
    if result is None:
        last = records.last_event(run_dir) or {}
        failed = (run_dir / records.FAILED).exists() or last.get("kind") == "ended"
        return {"status": "failed" if failed else "cancelled" if last.get("kind") == "cancelled" else "missing"}
    where = run_dir / records.RESULT
    if result.get("run_id") != run_id:
        raise ValueError(f"{where}: run_id = {result.get('run_id')!r}, expected {run_id!r}; delete it to run again")
    if result.get("status") not in ("done", "diverged"):
        raise ValueError(
            f"{where}: status = {result.get('status')!r}: expected done or diverged; delete it to run again"
        )
    return result


def _row(where: Path, row: dict[str, Any], result: dict[str, Any], damaged: str) -> dict[str, Any]:
    try:
        run = spec.from_json(row["run"])
    except ValueError as error:
        raise ValueError(f"{where}: run {row['run_id']}: {error}") from error
    try:
        return _columns(where, row, run, result)
    except (ValueError, KeyError, TypeError) as error:
        if damaged == "refuse":
            raise
        return _columns(where, row, run, {"status": "damaged", "reason": str(error)})


def _columns(where: Path, row: dict[str, Any], run: spec.Run, result: dict[str, Any]) -> dict[str, Any]:
    outcome, parameters = result.get("outcome", {}), result.get("parameters", {})
    measured, spent = result.get("measured", {}), result.get("outcome", {}).get("spent", {})
    done = result["status"] == "done"
    if done:
        _check_spent(where, row, result)
        if outcome["loss"] is None:
            raise ValueError(f"{where}: run {row['run_id']} is done but has no loss; delete its result to run again")
    number = math.nan
    return {
        "run_id": row["run_id"],
        "arm": row["arm"],
        "budget": float(row["budget"]),
        "rung": int(row["rung"]),
        "replicate": int(row["replicate"]),
        "status": result["status"],
        "reason": result.get("reason", ""),
        "loss": outcome["loss"] if done else number,
        "bits_per_byte": outcome["bits_per_byte"] if done else number,
        "loss_standard_error": outcome["loss_standard_error"] if done else number,
        "loss_per_position": outcome["loss_per_position"] if done else None,
        "diverged_at": outcome.get("diverged_at"),
        **{f"flops_{name}": spent.get(name, number) for name in CONVENTIONS},
        **{f"planned_{name}": row["planned"][name] for name in SPENT},
        **{f"parameters_{name}": parameters.get(name, number) for name in ("total", "body", "embedding")},
        **facts(run),
        "tokens_seen": outcome.get("tokens_seen", number),
        "target_tokens": outcome.get("target_tokens", number),
        "examples": outcome.get("examples", number),
        "steps": outcome.get("steps", number),
        "epochs": row["epochs"],
        "seconds": measured.get("seconds", number),
        "tokens_per_second": measured.get("tokens_per_second", number),
        "exact_flops_per_second": measured.get("exact_flops_per_second", number),
        "mfu": measured.get("mfu") or number,
        "seconds_by_part": measured.get("seconds_by_part"),
        "device": measured.get("device"),
        "versions": measured.get("versions"),
        "residual": row["residual"],
    }


def _check_spent(where: Path, row: dict[str, Any], result: dict[str, Any]) -> None:
    """A finished run has spent what was planned, in every convention, or it is not the run of this plan. What is planned as an
    expected value (lab.cost.is_expected) is not held against what was spent."""
    if result.get("planned_is", "exact") == "expected":
        return
    spent = result["outcome"]["spent"]
    for source, planned in (("plan.json", row["planned"]), ("its result", result["planned"])):
        for name in SPENT:
            if not math.isclose(planned[name], spent[name], rel_tol=TOLERANCE):
                raise ValueError(
                    f"{where}: run {row['run_id']} spent {spent[name]!r} {name}, {source} planned {planned[name]!r}: "
                    "the plan or lab.cost changed since; plan into a new directory and run there"
                )


def not_comparable(table: Any, arm: str, baseline: str, column: str = "arm") -> str | None:
    """Why the losses of two arms are not of one thing; None where they are, or where the table does not say.

    A difference of losses means something where both are of the same targets given the same inputs, in the same held-out
    text: `measure` (lab.spec.Run.measure), `corpus`, `tokenizer` and `evaluation_examples` must be one value over both arms.
    """
    for name, what in (
        ("measure", "held-out losses are of different things"),
        ("corpus", "texts are different"),
        ("tokenizer", "losses are of different tokens"),
        ("evaluation_examples", "losses are of different numbers of held-out examples"),
    ):
        if name in table:
            found = {str(value) for value, of in zip(table[name], table[column], strict=True) if of in (arm, baseline)}
            if len(found) > 1:
                values = "; ".join(sorted(value if len(value) < 80 else f"{value[:60]}..." for value in found))
                return f"{arm} and {baseline}: their {what} ({values}); evaluate both alike (evaluation.splits) on one corpus"
    return None


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a loss."""
    kept = frame.loc[frame["status"] == "done", :].copy()
    kept.attrs = frame.attrs
    return kept


def for_laws(frame: pd.DataFrame) -> pd.DataFrame:
    """`finished`. Raises Refusal where there is no row, or a loss of 0, of which a law of log losses can say nothing."""
    rows = finished(frame)
    if rows.empty:
        raise Refusal("no run has finished, so there is nothing to fit")
    if none := int((rows["loss"] <= 0).sum()):
        raise Refusal(f"{none} of {len(rows)} runs reached a loss of 0, and laws are fitted to logarithms of losses")
    return rows


def compact(value: float) -> str:
    """Two digits of a large number: 6.4e11."""
    return f"{value:.2g}".replace("e+", "e")
