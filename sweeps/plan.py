"""Study -> Plan: every run in full, what it costs, how nearly it matches. Nothing is trained and no device is touched."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lab import cost, hardware, records
from lab.batches import count_examples, epochs, left_out
from lab.data import describe
from lab.execution import Execution
from lab.forms import forms
from lab.memory import Memory, predict
from lab.plan_file import Rows
from lab.spec import Run, Seed, to_json
from lab.structure import canonical
from lab.technique import Technique
from sweeps import guards, ladder, match
from sweeps.study import OWN, TUNING_SEEDS, Study
from sweeps.tune.chosen import Chosen, chosen, described

# Muennighoff et al. 2023: up to four epochs, repeated text is worth nearly as much as new text.
MAX_EPOCHS = 4.0
UNEQUAL_EPOCHS = 2.0


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One row of the plan. Two arms that are the same run (an A/A comparison) are two rows with one run_id."""

    run_id: str
    arm: str
    budget: float
    rung: int
    replicate: int
    residual: float  # spent / budget - 1
    epochs: float
    seconds_estimated: float  # on one CPU core, without compilation
    planned: Mapping[str, int]  # FLOPs by convention, tokens, steps
    run: Run


@dataclass(frozen=True, kw_only=True)
class Plan:
    study: Study
    runs: tuple[PlannedRun, ...]
    warnings: tuple[str, ...]

    @cached_property
    def unique(self) -> dict[str, PlannedRun]:
        """One row for each run that will be trained, in the plan's order."""
        unique: dict[str, PlannedRun] = {}
        for row in self.runs:
            unique.setdefault(row.run_id, row)
        return unique

    def programs(self) -> int:
        """Shapes to compile: runs that differ only in budget, rate or seed share one."""
        return len(self.groups)

    @cached_property
    def groups(self) -> list[tuple[str, ...]]:
        """Ids of runs that one compiled program serves, and that can train side by side."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for run_id, row in self.unique.items():
            found.setdefault(_program(row.run), []).append(run_id)
        return [tuple(ids) for ids in found.values()]

    def memory(self, kind: str = "cpu", *, limit: int | None = None) -> tuple[Memory, Execution, PlannedRun]:
        """Predicted for the run that takes most, with the settings that suit devices of this kind and memory."""
        one_each = [self.unique[ids[0]] for ids in self.groups]
        found = [(row, hardware.choose(row.run, row.run.V, kind, limit=limit)) for row in one_each]
        sized = [(predict(row.run, row.run.V, settings), settings, row) for row, settings in found]
        return max(sized, key=lambda item: item[0].total)

    def needs(self, kind: str, limit: int) -> int:
        """Bytes of the largest run, with settings that suit a device of so many."""
        return self.memory(kind, limit=limit)[0].total

    def seconds(self, workers: int, kind: str = "cpu", *, peak: float | None = None) -> float:
        """Estimated seconds for all runs on `workers` cores or accelerators (peak: FLOP/s of one, where known), compilation
        included."""
        compiling = self.programs() * hardware.COMPILE_SECONDS[kind]
        cells = Counter((row.arm, row.budget, row.rung) for row in self.unique.values())
        first = {(row.arm, row.budget, row.rung): row.run for row in self.unique.values()}
        training = sum(
            count * hardware.estimate_seconds(first[cell], first[cell].V, kind, peak=peak)
            for cell, count in cells.items()
        )
        return (training + compiling) / workers

    def to_json(self) -> dict[str, Any]:
        """What lab.records calls plan.json."""
        study, data = self.study, self.runs[0].run.data
        return {
            "schema": records.SCHEMA,
            "study": {
                "name": study.name,
                "question": study.question,
                "command": f"lab run {study.source or study.name}",
                "baseline": study.baseline,
                "arms": _described(study),
                "match": {name: value for name, value in vars(study.match).items() if value is not None},
                **_asked(study),
                "data": {
                    "corpus": data.corpus,
                    "manifest": data.manifest,
                    "train_tokens": data.train_tokens,
                    "summary": str(describe(data.corpus, data.path, data.held_out, data.tokenizer)),
                },
                "notes": [*study.notes, *self.warnings],
            },
            "runs": Rows([row.run_id for row in self.runs], lambda index: _row(self.runs[index])),
        }


def _row(planned: PlannedRun) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(planned) if f.name not in ("run", "planned")]
    about = {name: getattr(planned, name) for name in names}
    return {**about, "learning_rate": planned.run.optimizer.learning_rate, "planned": dict(planned.planned),
            "run": to_json(planned.run)}  # fmt: skip


def plan(study: Study) -> Plan:
    """Solves every cell of the study; raises ValueError for cells that can not be matched, with their residuals, and for
    seeds that are kept for tuning trials."""
    if study.against and study.gains is None:
        raise ValueError(
            f"study {study.name}: study.against = {dict(study.against)}: curves and crossings are against the study's baseline "
            f"{study.baseline}; only a study with gains = Gains() has several"
        )
    if study.match.reference is not None and study.gains is None:
        raise ValueError(
            f"study {study.name}: match.quantity = 'reference_seconds': curves and crossings are of FLOPs; only a study with "
            "gains = Gains() has budgets of reference times"
        )
    solved = solve(study)
    for row in solved.runs:
        if max(row.run.seed.init, row.run.seed.data) >= TUNING_SEEDS:
            raise ValueError(
                f"study {study.name}: seed of arm {row.arm} = {row.run.seed}: seeds from 2^30 on are those of tuning trials, so "
                "that a rate is never judged by the runs that chose it; use smaller ones"
            )
    return solved


def solve(study: Study) -> Plan:
    """As `plan`, with any seeds."""
    _check_held_out(study)
    tuned = chosen(study)
    rows, unmatched, said = [], [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for budget_index, budget in enumerate(study.budgets):
            for rung in study.rungs(budget_index):
                cell = []
                for arm in study.arms:
                    found = list(_replicates(study, arm, budget_index, rung, _sized(study, arm, rung, budget, tuned)))
                    worst = max(found, key=lambda row: abs(row.residual))
                    if abs(off := worst.residual) > study.match.tolerance:
                        unmatched.append(f"{arm} rung {rung} (D={worst.run.shape.D}) at {budget:.3g}: {off:+.2%}")
                    cell += found
                rows += cell
    said += _shortened(sorted({str(w.message) for w in caught}))
    if unmatched:
        raise ValueError(
            f"study {study.name}: {len(unmatched)} cells can not be matched within {study.match.tolerance:.1%} by whole "
            f"steps: {'; '.join(unmatched[:6])}{' ...' if len(unmatched) > 6 else ''}; lower the batch, raise the budget, or "
            "drop the largest rungs"
        )
    said += tuned.notes((row.arm, row.run) for row in rows) if tuned else []
    said += _check_epochs(study, rows)
    said += guards.check(study.name, {"baseline": study.baseline, **_asked(study)}, rows)
    said += _left_out(study)
    said += _same_functions(study, rows)
    return Plan(study=study, runs=tuple(rows), warnings=tuple(said))


def _shortened(messages: list[str]) -> list[str]:
    """One message for each kind: those that differ in a number alone are counted."""
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(message.split(" and is asked at ")[0], []).append(message)
    return [first + (f" (and at {len(rest)} more sizes)" if rest else "") for first, *rest in kinds.values()]


def _program(run: Run) -> tuple[Any, ...]:
    return (
        run.structure,
        run.shape,
        run.options,
        run.objective,
        run.batch,
        run.precision,
        run.optimizer.name,
        run.technique,
    )


def describe_arm(template: Run) -> str:
    s = template.structure
    dials = (
        "one bidirectional stream"
        if s.encoder_only
        else f"{s.cross} cross-attention, {s.stacks} stacks, {s.memory} memory, {s.inputs} inputs"
    )
    o = template.objective
    options = f"; {template.options}" if str(template.options) else ""
    technique = f"; {_called(template.technique)}" if template.technique else ""
    return f"{dials}; {'' if o.name == 'lm' else f'objective {o.name}, '}loss on {o.loss}{options}{technique}"


def _described(study: Study) -> dict[str, str]:
    """What each arm is, with optimizer and depth where arms differ in them."""
    depths = {arm: sorted({shape.L for shape in study.sizes_of(arm)}) for arm in study.arms}
    more = {
        "optimizer": {arm: f"{t.optimizer.name}, {t.optimizer.schedule}" for arm, t in study.arms.items()},
        "depth": {arm: f"{' to '.join(map(str, depth[:1] + depth[1:][-1:]))} layers" for arm, depth in depths.items()},
    }
    told = [of for of in more.values() if len(set(of.values())) > 1]
    return {arm: "; ".join([describe_arm(t), *(of[arm] for of in told)]) for arm, t in study.arms.items()}


def _called(technique: Technique) -> str:
    settings = ", ".join(f"{name} {value:g}" for name, value in technique.settings.items())
    return technique.name + (f" ({settings})" if settings else "") + ("" if technique.charged else ", not charged")


def _sized(study: Study, arm: str, rung: int, budget: float, tuned: Chosen | None) -> Run:
    """The arm's template at this rung and budget, with its steps and its learning rate solved."""
    run = replace(study.arms[arm], shape=study.sizes_of(arm)[rung], batch=study.batch_of(arm))
    if study.match.quantity == "parameters":
        baseline = study.baseline_of(arm)
        base = study.arms[baseline]
        shape = study.sizes_of(baseline)[rung]
        target = cost.parameters(base.structure, shape, base.options, base.objective, base.V).body
        run = replace(run, shape=match.with_parameters(run, target, run.V, study.match.tolerance))
    if study.gains is not None:
        budget *= study.gains.controls.get(arm, 1.0)
    run = match.set_budget(run, budget, study.match)
    if isinstance(study.learning_rate, tuple) or study.learning_rate == OWN:
        return run
    if tuned is not None:
        return tuned.applied(arm, run)
    rate = ladder.learning_rate(study.learning_rate, run, run.V)
    return replace(run, optimizer=replace(run.optimizer, learning_rate=rate))


def _replicates(study: Study, arm: str, budget: int, rung: int, run: Run) -> Iterable[PlannedRun]:
    """Seeds of a cell (init and data together, the same for every arm), at each learning rate that is swept."""
    own = run.optimizer.learning_rate
    rates = study.learning_rate if isinstance(study.learning_rate, tuple) else (own,)
    if study.relative:
        rates = tuple(float(f"{own * rate:.6g}") for rate in rates)
    row: PlannedRun | None = None
    for replicate in range(study.replicates(budget, rung)):
        seeded = with_seed(run, replicate)
        # Which forms the steps take and which layers are dropped, and so what they cost, is the seed's.
        if row is None or len(forms(run.objective)) > 1 or run.technique is not None:
            row = planned_run(seeded, arm=arm, budget=study.budgets[budget], rung=rung)
        for rate in rates:
            one = replace(seeded, optimizer=replace(run.optimizer, learning_rate=rate))
            yield replace(row, run=one, run_id=one.run_id, replicate=replicate)


def with_seed(run: Run, replicate: int) -> Run:
    """The template's run of this replicate."""
    return replace(run, seed=Seed(init=run.seed.init + replicate, data=run.seed.data + replicate))


def planned_run(run: Run, *, arm: str, budget: float, rung: int) -> PlannedRun:
    """A row of the plan, with what this very run spends."""
    planned = cost.planned(run, run.V)
    return PlannedRun(
        run_id=run.run_id,
        arm=arm,
        budget=budget,
        rung=rung,
        replicate=0,
        residual=match.residual(run, run.V),
        epochs=epochs(run, planned["steps"]),
        seconds_estimated=hardware.estimate_seconds(run, run.V),
        planned=planned,
        run=run,
    )


def _asked(study: Study) -> dict[str, Any]:
    """What guards and reports read of the header of plan.json, beside the baseline."""
    gains = {} if study.gains is None else {"gains": dataclasses.asdict(study.gains)}
    against = {"against": dict(study.against)} if study.against else {}
    steps = {"steps": [list(pair) for pair in study.steps]} if study.steps else {}
    return {"learning_rates": described(study), **against, **steps, **gains}


def _check_held_out(study: Study) -> None:
    for template in {(a.data, a.objective): a for a in study.arms.values()}.values():
        wanted, (_, held_out) = template.evaluation.examples, count_examples(template.data, template.objective)
        if held_out < wanted:
            raise ValueError(
                f"evaluation.examples = {wanted}: the held-out share ({template.data.held_out:g}) of this text has {held_out} "
                f"examples of {template.objective.length} tokens; lower it, raise data.held_out, or use more text"
            )


def _check_epochs(study: Study, rows: list[PlannedRun]) -> list[str]:
    said = []
    most = max(rows, key=lambda row: row.epochs)
    if most.epochs > MAX_EPOCHS:
        if not most.run.data.allow_repeat:
            raise ValueError(
                f"study {study.name}: {most.arm} at {most.budget:.3g} would see its corpus {most.epochs:.1f} times, more than "
                f"{MAX_EPOCHS:g}: use a larger corpus or smaller budgets, or set data.allow_repeat"
            )
        said.append(f"up to {most.epochs:.1f} epochs: repeated text is worth less than new text")
    by_cell: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        by_cell.setdefault((row.budget, row.rung), []).append(row.epochs)
    if any(max(epochs) > 1 and max(epochs) > UNEQUAL_EPOCHS * min(epochs) for epochs in by_cell.values()):
        said.append(f"compared arms repeat their text unequally, by more than a factor of {UNEQUAL_EPOCHS:g}")
    return said


def _left_out(study: Study) -> list[str]:
    """Pairs that the buckets of an objective do not take are neither trained on nor evaluated."""
    said = set()
    for template in study.arms.values():
        if left := left_out(template.data, template.objective):
            said.add(
                f"{left:,} training pairs fit no bucket of {template.measure} and are left out, as are such held-out ones"
            )
    return sorted(said)


def _same_functions(study: Study, rows: list[PlannedRun]) -> list[str]:
    """Arms that differ in dials which have no effect at some rung, so that they are one function there."""
    said = set()
    cells: dict[tuple[float, int], dict[str, PlannedRun]] = {}
    for row in rows:
        cells.setdefault((row.budget, row.rung), {}).setdefault(row.arm, row)
    for (_, rung), of_arms in cells.items():
        members = list(of_arms.values())
        for i, a in enumerate(members):
            for b in members[i + 1 :]:
                alike = all(getattr(a.run, part) == getattr(b.run, part) for part in ("objective", "shape", "options"))
                if alike and a.run.structure != b.run.structure:
                    longest = max(form.S for form in forms(a.run.objective))
                    one, other = (canonical(x.run.structure, L=x.run.shape.L, S=longest, loss=x.run.objective.loss)
                                  for x in (a, b))  # fmt: skip
                    if one == other:
                        said.add(f"{a.arm} and {b.arm} are the same function at rung {rung} ({a.run.shape.L} layers)")
    return sorted(said)
