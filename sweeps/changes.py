"""What a new plan changes in a study's directory, in words, before it is written there."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lab import records
from sweeps.plan import Plan
from sweeps.store import Store

SHOWN = 12  # cells of each kind
Cell = tuple[str, float]


def changes(store: Store, plan: Plan) -> list[str]:
    """How many runs are new, dropped and kept, and then which, by arm and budget; nothing where no plan is there, or where
    its runs are these. Raises ValueError for a plan that can not be read."""
    if not store.files.exists(records.PLAN):
        return []
    before = set(store.runs)
    new = [row for run_id, row in plan.unique.items() if run_id not in before]
    dropped = [run_id for run_id in store.runs if run_id not in plan.unique]
    if not new and not dropped:
        return []
    kept = [row for run_id, row in plan.unique.items() if run_id in before]
    head = f"the plan in {store.root} changes: {len(new)} runs new, {len(dropped)} dropped, {len(kept)} kept"
    cells = {
        "new": Counter((row.arm, row.budget) for row in new),
        "dropped": Counter(_cell(store.runs[run_id]) for run_id in dropped),
        "kept": Counter((row.arm, row.budget) for row in kept),
    }
    return [head, *(line for kind, of_kind in cells.items() for line in _lines(kind, of_kind))]


def outside(store: Store) -> list[str]:
    """Ids of runs that have a directory here and are not in the plan: an earlier plan had them, and they are kept."""
    return sorted(name for name in store.files.names("runs") if name not in store.runs and not name.startswith("."))


def _cell(row: Mapping[str, Any]) -> Cell:
    """Of a row as it was written, perhaps by hand."""
    return str(row.get("arm", "?")), float(row.get("budget", 0))


def _lines(kind: str, cells: Mapping[Cell, int]) -> list[str]:
    """One for each arm and budget; those beyond the first few are counted."""
    named = [f"  {kind}: {count} of {arm} at {budget:.3g}" for (arm, budget), count in cells.items()]
    if len(named) <= SHOWN:
        return named
    return [*named[:SHOWN], f"  {kind}: {sum(list(cells.values())[SHOWN:])} more in {len(named) - SHOWN} other cells"]
