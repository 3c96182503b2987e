"""The guards of analysis.guards over a plan: what makes its comparisons worthless is refused before anything is spent."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from analysis.guards import Case, facts, find
from lab.spec import Run


class Planned(Protocol):
    """A row of a plan (sweeps.plan.PlannedRun)."""

    @property
    def run_id(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def budget(self) -> float: ...
    @property
    def rung(self) -> int: ...
    @property
    def replicate(self) -> int: ...
    @property
    def epochs(self) -> float: ...
    @property
    def run(self) -> Run: ...


def check(name: str, study: Mapping[str, Any], rows: Iterable[Planned]) -> list[str]:
    """What is flagged. Raises ValueError for what is refused, naming the study `name` and how many more reasons there are.

    study: the header that the plan will have, as far as guards read it (baseline, against, gains, learning_rates).
    """
    findings = find(Case(study=study, rows=_rows(rows)))
    if refused := [finding for finding in findings if finding.severity == "refuse"]:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        allowed = f"; gains.allow = ({refused[0].guard!r},) flags it instead" if study.get("gains") is not None else ""
        raise ValueError(f"study {name}: {refused[0].reason}{allowed}{more}")
    return [finding.reason for finding in findings]


def _rows(rows: Iterable[Planned]) -> list[dict[str, Any]]:
    """Facts of a cell are made once: its runs differ in seed and rate alone, and plans have many."""
    of_cell: dict[tuple[str, float, int], dict[str, Any]] = {}
    made = []
    for row in rows:
        cell = (row.arm, row.budget, row.rung)
        if cell not in of_cell:
            of_cell[cell] = facts(row.run)
        made.append(
            of_cell[cell]
            | {
                "run_id": row.run_id,
                "arm": row.arm,
                "budget": row.budget,
                "rung": row.rung,
                "replicate": row.replicate,
                "epochs": row.epochs,
                "learning_rate": row.run.optimizer.learning_rate,
                "seed_init": row.run.seed.init,
                "seed_data": row.run.seed.data,
            }
        )
    return made
