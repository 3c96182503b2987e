"""A tuning's trials as a Plan. Nothing is trained here and no device is touched."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sweeps.grid import override
from sweeps.plan import Plan, PlannedRun, planned_run, solve
from sweeps.tune.optima import Edge
from sweeps.tune.tuning import RATE, Cell, Grids, Tuning


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the tuning. `path` and `value`: the coordinate that is tried; stage centre is the trial at a cell's best
    rate, with nothing else changed, that coordinates are compared with."""

    row: PlannedRun
    cell: Cell
    stage: Literal["grid", "centre", "coordinate"] = "grid"
    path: str = ""
    value: Any = None

    @property
    def arm(self) -> str:
        return self.row.arm

    @property
    def rate(self) -> float:
        return self.row.run.optimizer.learning_rate


@dataclass(frozen=True, kw_only=True)
class Trials(Plan):
    tuning: Tuning
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        content = super().to_json()
        command = f"lab tune {self.tuning.source or self.tuning.name}"
        return {**content, "study": {**content["study"], "command": command}}

    def of(self, arm: str, cell: Cell) -> list[Trial]:
        """The grid's."""
        return [t for t in self.trials if t.stage == "grid" and t.arm == arm and t.cell == cell]

    def per_arm(self) -> dict[str, int]:
        return {arm: sum(t.arm == arm for t in self.trials) for arm in self.tuning.arms}


def grid_trials(tuning: Tuning, grids: Grids) -> Trials:
    """Every arm at every rate of each cell's grid, with the same seeds. Raises ValueError as sweeps.plan does."""
    trials: list[Trial] = []
    said: dict[str, None] = {}
    for cell in tuning.cells:
        solved = solve(tuning.study(cell, grids[cell]))
        trials += [Trial(row=replace(row, rung=cell.rung), cell=cell) for row in solved.runs]
        said |= dict.fromkeys(solved.warnings)
    whole = replace(
        tuning.study(tuning.cells[0], tuning.rates),
        budgets=tuple(sorted({cell.budget for cell in tuning.cells})),
        sizes={arm: tuple(tuning.shape(arm, c) for c in _one_a_rung(tuning.cells)) for arm in tuning.arms},
    )
    rows = tuple(trial.row for trial in trials)
    return _checked(Trials(study=whole, runs=rows, warnings=tuple(said), tuning=tuning, trials=tuple(trials)))


def with_coordinates(trials: Trials, rates: Mapping[tuple[str, Cell], float]) -> Trials:
    """And every coordinate's other values, one at a time, at the best rate of each fitted cell, beside a trial with none of
    them changed."""
    tuning = trials.tuning
    if not tuning.coordinates:
        return trials
    tried = [("centre", "", None)]
    tried += [("coordinate", path, value) for path, values in tuning.coordinates.items() for value in values]
    added: list[Trial] = []
    for cell in tuning.fitted:
        for arm in tuning.arms:
            first = trials.of(arm, cell)[0].rate
            rate = float(f"{rates[arm, cell]:.6g}")
            for trial in (t for t in trials.of(arm, cell) if t.rate == first):
                for stage, path, value in tried:
                    run = override(trial.row.run, {RATE: rate} | ({path: value} if path else {}))
                    row = planned_run(run, arm=arm, budget=cell.budget, rung=cell.rung)
                    if abs(row.residual) > tuning.match.tolerance:
                        raise ValueError(
                            f"tuning {tuning.name}: {path} = {value!r} in {arm}, {cell}, misses its budget by "
                            f"{row.residual:+.1%}, because a run takes whole steps; give a smaller batch"
                        )
                    row = replace(row, replicate=trial.row.replicate)
                    added.append(Trial(row=row, cell=cell, stage=stage, path=path, value=value))  # pyright: ignore[reportArgumentType]
    runs = (*trials.runs, *(trial.row for trial in added))
    return _checked(replace(trials, runs=runs, trials=(*trials.trials, *added)))


def moved(grids: Grids, edges: Iterable[tuple[Cell, Edge]]) -> dict[Cell, tuple[float, ...]]:
    """The grids with one more rate on each side at which an arm's best rate lies at the edge, for every arm alike."""
    found = dict(grids)
    for cell, side in dict.fromkeys((cell, edge.side) for cell, edge in edges):
        grid = found[cell]
        beyond = grid[0] ** 2 / grid[1] if side == "lower" else grid[-1] ** 2 / grid[-2]
        rate = float(f"{beyond:.6g}")
        found[cell] = (rate, *grid) if side == "lower" else (*grid, rate)
    return found


def _one_a_rung(cells: Iterable[Cell]) -> list[Cell]:
    return list({cell.rung: cell for cell in cells}.values())


def _checked(trials: Trials) -> Trials:
    counts = trials.per_arm()
    assert len(set(counts.values())) == 1, f"arms have unequal numbers of trials: {counts}"
    return trials
