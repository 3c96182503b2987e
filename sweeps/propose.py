"""Runs that analysis proposes -> runs that can be trained, added to the plan of their study.

Analysis asks for an arm, a size and a budget; here they become the nearest legal shape, the study's learning rate at that
size, whole steps, exact cost. The study's plan keeps what it has and gains rows, so that `lab run DIR` trains what is
missing and `lab report DIR` sees it all.
"""

import dataclasses
import math
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lab import cost, plan_file, spec
from lab.checks import nearest
from lab.spec import Run, Shape
from sweeps import ladder
from sweeps.plan import Plan, PlannedRun, plan, planned_run, with_seed
from sweeps.store import Store
from sweeps.study import Match, Study, load

_STEP = 1.5  # from the largest size to one beyond it, where a ladder has one size only
_WIDEST = 4  # widths are searched up to this many times the ladder's largest


@dataclass(frozen=True, kw_only=True)
class Written(Plan):
    """A plan as it was written to a directory, runs that were added to it included."""

    content: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.content)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run that was asked for, and the one that comes nearest: `off_N` and `off_budget` are what it has over what was
    asked, less 1."""

    N: float
    row: PlannedRun
    off_N: float

    @property
    def off_budget(self) -> float:
        return self.row.residual


def read(directory: str | Path) -> Written:
    """The plan in a study's directory; it can be shown and run. Its study is made of what the plan says: sizes and budgets
    are those of its runs, and it has no learning-rate rule."""
    content = plan_file.read(Path(directory))
    about = content["study"]
    rows = tuple(_planned_run(row) for row in content["runs"])
    if not rows:
        raise ValueError(f"{directory}: its plan has no runs; plan at least one")
    first = {name: next(row.run for row in rows if row.arm == name) for name in about["arms"]}
    study = Study(
        name=about["name"],
        question=about["question"],
        arms=first,
        baseline=about["baseline"],
        budgets=tuple(sorted({row.budget for row in rows})),
        sizes={name: tuple(dict.fromkeys(row.run.shape for row in rows if row.arm == name)) for name in first},
        batch={name: run.batch for name, run in first.items()},
        window=1,
        match=Match(**about["match"]),
        source=str(directory),
    )
    return Written(study=study, runs=rows, warnings=(), content=content)


def study_of(directory: str | Path, name: str | None = None) -> Study:
    """The study that made a directory's plan, from its shipped name or its file: it knows the ladder and the learning-rate
    rule, which a plan does not. `name` says where it is if that has changed; preset and text are the plan's. Raises
    ValueError where it would now plan other runs."""
    written = read(directory)
    command = shlex.split(written.content["study"]["command"])
    words = command[2:] if command[:2] == ["lab", "run"] else []
    if name is None:
        if not words:
            raise ValueError(f"{directory}: its plan does not say which study made it; give --study")
        name = words[0]
    preset = words[words.index("--preset") + 1] if "--preset" in words else "small"
    text = written.runs[0].run.data if "--data" in words else None
    tokenizer = words[words.index("--tokenizer") + 1] if "--tokenizer" in words else None
    study = load(name, preset, text, tokenizer=tokenizer)
    if isinstance(study.learning_rate, tuple):
        raise ValueError(
            f"study {study.name} sweeps learning rates: runs are proposed for studies with a rule or one rate"
        )
    there = {row.run_id for row in written.runs}
    now = [row.run_id for row in plan(study).runs]
    lost = [run_id for run_id in now if run_id not in there]
    if lost:
        raise ValueError(
            f"study {name!r} now plans other runs than {directory} has ({len(lost)} of {len(now)} differ, the first is "
            f"{lost[0]}): its file, its corpus or the lab changed; give the study that made it with --study"
        )
    return study


def cells(study: Study, *, beyond: int = 1) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """What could be run next: every arm at every size of its ladder and `beyond` larger ones, at every budget and as many
    larger ones in the same ratio. Columns: arm, N (body parameters), D (tokens), flops (exact), budget, residual. Also the
    reasons for cells that can not be matched, or would repeat the corpus too often."""
    rows, left_out = [], []
    for arm in study.arms:
        for shape in (*study.sizes_of(arm), *_larger(study, arm, beyond)):
            for budget in _budgets(study, beyond):
                try:
                    row = _cell(study, arm, shape, budget)
                except ValueError as error:
                    left_out.append(str(error))
                    continue
                rows.append(
                    {
                        "arm": arm,
                        "N": float(_body(row.run)),
                        "D": float(row.planned["tokens"]),
                        "flops": float(row.planned["exact"]),
                        "budget": budget,
                        "residual": row.residual,
                    }
                )
    if not rows:
        raise ValueError(f"study {study.name}: no cell can be run: {left_out[0]}")
    return pd.DataFrame(rows), tuple(left_out)


def runs(study: Study, table: pd.DataFrame, existing: Iterable[PlannedRun] = ()) -> list[Asked]:
    """A run for each row of `table`: its arm, N (body parameters), and `budget` in the study's unit (or flops, or D where
    the study matches tokens). Rows that ask for a cell that is there, or twice, become replicates with their own seeds."""
    have = list(existing)
    unit = "flops" if study.match.quantity == "flops" else "D"
    column = "budget" if "budget" in table else unit
    missing = [name for name in ("arm", "N", column) if name not in table]
    if missing:
        raise ValueError(
            f"column {missing[0]!r} is not in the table of proposed runs; it has {', '.join(map(str, table))}"
        )
    asked = []
    for entry in table.to_dict("records"):
        arm, N, budget = str(entry["arm"]), float(entry["N"]), float(entry[column])
        if arm not in study.arms:
            raise ValueError(f"arm = {arm!r}: {nearest(arm, list(study.arms))}")
        budget = next(
            (known for known in study.budgets if math.isclose(known, budget, rel_tol=study.match.tolerance)), budget
        )
        shape = nearest_shape(study, arm, N)
        row = _cell(study, arm, shape, budget)
        row = replace(row, rung=_rung(study, arm, shape, have))
        taken = [r.replicate for r in have if (r.arm, r.budget, r.rung) == (arm, row.budget, row.rung)]
        replicate = max(taken, default=-1) + 1
        run = with_seed(row.run, replicate)
        row = replace(planned_run(run, arm=arm, budget=row.budget, rung=row.rung), replicate=replicate)
        have.append(row)
        asked.append(Asked(N=N, row=row, off_N=_body(run) / N - 1))
    return asked


def extended(directory: str | Path, study: Study, rows: Iterable[PlannedRun], note: str) -> Written:
    """The directory's plan with these rows after its own, and a note on where they come from. Nothing is written:
    `Store(directory).write_plan(extended(...).to_json())` does."""
    written, new = read(directory), tuple(rows)
    added = Plan(study=study, runs=new, warnings=()).to_json()["runs"]
    about = dict(written.content["study"])
    about["notes"] = [*about["notes"], note]
    content = {**written.content, "study": about, "runs": [*written.content["runs"], *added]}
    return replace(written, runs=(*written.runs, *new), content=content)


def write(directory: str | Path, plan: Written) -> str:
    """Writes the plan to its study's directory and says what changed."""
    return Store(Path(directory)).write_plan(plan.to_json())


def nearest_shape(study: Study, arm: str, N: float) -> Shape:
    """The shape whose body is nearest to N parameters, on a log scale: one of the arm's ladder, or one as wide as is legal
    between or beyond its sizes, with the depth and the head width of the nearest."""
    if not (math.isfinite(N) and N > 0):
        raise ValueError(f"N = {N!r}: use a positive number of body parameters")
    known = list(study.sizes_of(arm))

    def off(shape: Shape) -> float:
        return abs(math.log(_body(replace(study.arms[arm], shape=shape)) / N))

    nearest = min(known, key=off)
    if study.match.quantity == "parameters":
        return nearest  # its width is solved for the baseline's parameters
    # A ladder's own size is preferred to one that is hardly nearer: it is compiled already, and other arms have it.
    between = [shape for D in range(2, _WIDEST * known[-1].D + 1) if (shape := _widened(nearest, D)) is not None]
    best = min(between, key=off, default=nearest)
    return best if off(best) < off(nearest) - 0.1 else nearest


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell(study: Study, arm: str, shape: Shape, budget: float) -> PlannedRun:
    """One run of one arm, solved and checked as the whole study's plan would be; raises ValueError where it is refused."""
    known = study.sizes_of(arm)
    arms, sizes = {arm: study.arms[arm]}, {arm: (shape,)}
    if study.match.quantity == "parameters" and arm != study.baseline:
        arms[study.baseline] = study.arms[study.baseline]
        sizes[study.baseline] = (study.sizes_of(study.baseline)[known.index(shape)] if shape in known else shape,)
    one = replace(
        study,
        arms=arms,
        baseline=study.baseline if study.baseline in arms else arm,
        budgets=(budget,),
        sizes=sizes,
        rules={name: other for name, other in study.rules.items() if name in arms},
        window=1,
        seeds=1,
        extra_seeds={},
        against={},
        gains=None,
        steps=(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole plan's warnings are said once, by `lab plan`
        row = next(row for row in plan(one).runs if row.arm == arm)
    return replace(row, rung=known.index(shape) if shape in known else len(known))


def _budgets(study: Study, beyond: int) -> tuple[float, ...]:
    *smaller, last = study.budgets
    ratio = last / smaller[-1] if smaller else 4.0
    return (*study.budgets, *(last * ratio**step for step in range(1, beyond + 1)))


def _larger(study: Study, arm: str, count: int) -> list[Shape]:
    """Shapes beyond the arm's ladder, wider in the ratio of its last two."""
    if study.match.quantity == "parameters":
        return []
    *smaller, last = study.sizes_of(arm)
    ratio = last.D / smaller[-1].D if smaller else _STEP
    found: list[Shape] = []
    for _ in range(count):
        goal = last.D * ratio
        wider = [shape for D in range(last.D + 1, round(2 * goal)) if (shape := _widened(last, D)) is not None]
        if not wider:
            break
        last = min(wider, key=lambda shape, goal=goal: abs(math.log(shape.D / goal)))
        found.append(last)
    return found


def _widened(like: Shape, D: int) -> Shape | None:
    """The ladder's shape of width D with the depth of `like`, or None where no number of heads divides it, or where `like`
    is no ladder's shape, so that there is no rule for its others."""

    def made(width: int) -> Shape:
        return ladder.shape(width, like.L, L_input=like.L_input, head_width=like.H)

    try:
        return made(D) if made(like.D) == like else None
    except ValueError:
        return None


def _rung(study: Study, arm: str, shape: Shape, have: list[PlannedRun]) -> int:
    """The ladder's, or the one that an added run of the shape has, or a new one: a rung is one shape of an arm."""
    known = study.sizes_of(arm)
    if shape in known:
        return known.index(shape)
    added = [row for row in have if row.run.shape == shape and row.rung >= len(known)]
    if added:
        return added[0].rung
    return max([len(sizes) for sizes in map(study.sizes_of, study.arms)] + [row.rung + 1 for row in have])


def _body(run: Run) -> int:
    parts = (run.structure, run.shape, run.options, run.objective)
    return cost.parameters(*parts, run.V).body


def _planned_run(row: Mapping[str, Any]) -> PlannedRun:
    names = {field.name for field in dataclasses.fields(PlannedRun)} - {"run"}
    return PlannedRun(**{name: row[name] for name in names}, run=spec.from_json(row["run"]))
