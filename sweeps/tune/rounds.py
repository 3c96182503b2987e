"""Round after round: trials are trained, and grids are moved for every arm alike until no best rate lies at an edge.

What there is to do follows from the tuning and from the results in its directory, so that the same command always goes on.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import plan_file, records
from sweeps import propose
from sweeps.files import files_at
from sweeps.plan import Plan
from sweeps.store import Store
from sweeps.tune import conclude
from sweeps.tune.conclude import Outcome, Outcomes, Tuned
from sweeps.tune.optima import Edge, Optimum
from sweeps.tune.rules import Source
from sweeps.tune.trials import Trials, grid_trials, moved, with_coordinates
from sweeps.tune.tuning import Tuning

log = logging.getLogger(__name__)
Train = Callable[[Plan], None]  # trains what has not ended of a plan, in the tuning's directory


def tune(tuning: Tuning, out: str | Path, train: Train, *, say: Callable[[str], None] = log.info) -> Tuned | None:
    """What was found; None where trials are left, since a budget is spent or they were submitted to a queue: call it again.

    Raises ValueError where trials failed, and, naming the cells, where a best rate is at the edge after `tuning.moves` moves.
    """
    grids, moves = tuning.grids, 0
    while True:
        trials = grid_trials(tuning, grids)
        outcomes = trained(trials, out, train)
        if outcomes is None:
            return None
        found, _ = conclude.optima(trials, outcomes)
        edges = [(at, value) for at, value in found.items() if isinstance(value, Edge)]
        if not edges:
            rates = {at: value.rate for at, value in found.items() if isinstance(value, Optimum)}
            trials = with_coordinates(trials, rates)
            outcomes = trained(trials, out, train)
            return None if outcomes is None else conclude.conclude(trials, outcomes)
        where = "; ".join(f"{arm}, {cell}: {value.side} edge, {value.rate:.3g}" for (arm, cell), value in edges)
        if moves == tuning.moves:
            raise ValueError(
                f"tuning {tuning.name}: after {moves} moves of the grids the best rate is still at an edge in {where}; give "
                "other tuning.rates, or more tuning.moves"
            )
        say(f"{len(edges)} best rates lie at an edge, so these grids are moved for every arm: {where}")
        grids, moves = moved(grids, [(cell, value) for (_, cell), value in edges]), moves + 1


def trained(trials: Trials, out: str | Path, train: Train) -> Outcomes | None:
    """How every trial ended, after those that had not were trained; None where some still have not."""
    store = Store(out)
    ended = _read(trials, store)
    if ended is None:
        # A later round's plan has this one's runs and more: it is gone on with, and never made smaller.
        written = files_at(out).exists(records.PLAN) and set(trials.unique) <= set(store.runs)
        train(propose.read(store.records()) if written else trials)
        ended = _read(trials, Store(out))
    return ended


def _read(trials: Trials, store: Store) -> Outcomes | None:
    if not store.files.exists(records.PLAN):
        return None
    directory, found, failed = store.records(), {}, []
    for run_id in trials.unique:
        run_dir = records.run_directory(directory, run_id)
        result = records.read_published(run_dir)
        if result is not None:
            found[run_id] = outcome(result)
        elif (records.last_event(run_dir) or {}).get("kind") == "ended":
            failed.append(run_id)
    if failed and len(found) + len(failed) == len(trials.unique):
        raise ValueError(
            f"{store.root}: {len(failed)} trials failed, such as {failed[0]}, and a tuning leaves none out; `lab logs` says why, "
            "and --retry tries them again"
        )
    return found if len(found) == len(trials.unique) else None


def outcome(result: dict[str, Any]) -> Outcome:
    """Of a result.json: a trial that diverged has an infinite loss."""
    loss = result["outcome"]["loss"] if result["status"] == "done" else math.inf
    return Outcome(loss=loss, flops=float(result["outcome"]["spent"]["exact"]), seconds=result["measured"]["seconds"])


def source(tuned: Tuned, out: str | Path) -> Source:
    """Where the rules come from: the command, the plan's hash, the text, and what trained on it."""
    directory, first = Store(out).records(), next(iter(tuned.outcomes))
    about = plan_file.read(directory)["study"]
    measured = (records.read_published(records.run_directory(directory, first)) or {}).get("measured", {})
    return Source(
        command=about["command"],
        study=about["name"],
        plan_sha256=hashlib.sha256((directory / records.PLAN).read_bytes()).hexdigest(),
        data=about["data"],
        versions=measured.get("versions", {}),
        device=str(measured.get("device")),
    )
