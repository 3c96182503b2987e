"""What makes a comparison of arms unfair: one function and one line in GUARDS for each way.

A guard reads the plan's header (plan.json's `study`) and rows: those of a plan before anything is spent (sweeps.guards), or
those of a study that has run (analysis.gains, analysis.answer), which also know how each run ended. It yields the arm and
the reason, which names what is wrong and the way out. How grave that is stands in GUARDS: most can only be flagged in a
study of structures, and are refused in one that asks whether something trains faster (`Study(gains=...)`), whose answer they
would make worthless.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab.spec import Run

DECAYED = 1e-3  # share of its peak that a learning rate may have left at the end
AVERAGING = ("schedule_free_adamw",)  # optimizers whose average does what decay does for others
SAME = 1e-9  # of two budgets that are one
LEAST_SEEDS = 2  # without two the noise is unknown

Severity = Literal["refuse", "flag"]
Row = Mapping[str, Any]


def facts(run: Run) -> dict[str, Any]:
    """What guards, and tables of runs, know of a Run; numbers and strings."""
    optimizer, budget = run.optimizer, run.budget
    averages = optimizer.name in AVERAGING
    undecayed = optimizer.schedule == "constant" and not averages
    return {
        "D": run.shape.D,
        "L": run.shape.L,
        "S": run.objective.S,
        "T": run.objective.T,
        "objective": run.objective.name,
        "loss_on": run.objective.loss,
        "measure": run.measure,
        "corpus": run.data.manifest,
        "tokenizer": run.data.tokenizer,
        "evaluation_examples": run.evaluation.examples,
        "structure": run.structure.name,
        "cross": run.structure.cross,
        "stacks": run.structure.stacks,
        "memory": run.structure.memory,
        "inputs": run.structure.inputs,
        "learning_rate": optimizer.learning_rate,
        "batch": run.batch,
        "seed_init": run.seed.init,
        "seed_data": run.seed.data,
        "precision": run.precision,
        "unit": budget.unit if budget.unit != "flops" else f"flops ({budget.convention})",
        "amount": budget.amount,
        "optimizer": optimizer.name,
        "technique": run.technique.name if run.technique else None,
        "charged": run.technique.charged if run.technique else True,
        "schedule": optimizer.schedule,
        "final_rate": 1.0 if undecayed else optimizer.final,
        "held_out": run.data.held_out,
        "masks": str(run.objective),
        "model": f"{run.structure.name}, {run.shape}, {run.options}",
    }


@dataclass(frozen=True, kw_only=True)
class Finding:
    guard: str
    arm: str
    reason: str
    severity: Severity

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Case:
    """What guards look at: `study` is the header of plan.json; rows have run_id, arm, budget, rung, replicate, epochs and the
    `facts` of their run, and, once it has ended, status and loss."""

    study: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def gains(self) -> Mapping[str, Any] | None:
        return self.study.get("gains")

    def baseline_of(self, arm: str) -> str:
        return baseline_of(self.study, arm)

    def factor(self, arm: str) -> float:
        """Of a control arm, which is the baseline at a multiple of its budget."""
        return float((self.gains or {}).get("controls", {}).get(arm, 1.0))

    def cells(self) -> dict[tuple[str, float, int], list[Row]]:
        """Rows of each arm at each budget and rung."""
        found: dict[tuple[str, float, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["arm"], row["budget"], row["rung"]), []).append(row)
        return found

    def pairs(self) -> Iterator[tuple[str, str, list[Row], list[Row]]]:
        """Each cell of an arm beside its baseline's."""
        cells = self.cells()
        for (arm, budget, rung), rows in cells.items():
            baseline = self.baseline_of(arm)
            if arm != baseline and (theirs := cells.get((baseline, budget, rung))):
                yield arm, baseline, rows, theirs


def baseline_of(study: Mapping[str, Any], arm: str) -> str:
    """The arm that it is compared with: of plan.json's header."""
    against = study.get("against", {})
    if arm in against:
        return against[arm]
    return arm if arm in against.values() else study["baseline"]


# --- one function for each ------------------------------------------------------------------------------------------


def mid_schedule(case: Case) -> Iterator[tuple[str, str]]:
    """A point that is not the end of a run of its own: schedules would be somewhere in their middle there."""
    at: dict[str, float] = {}
    for row in case.rows:
        arm, budget = row["arm"], row["budget"] * case.factor(row["arm"])
        if not math.isclose(row["amount"], budget, rel_tol=SAME):
            yield (
                arm,
                (
                    f"{arm} is compared at {budget:.4g} but its schedules end at {row['amount']:.4g}: a point in the middle of a "
                    "schedule is no result; train each budget as a run of its own"
                ),
            )
        elif at.setdefault(row["run_id"], row["budget"]) != row["budget"]:
            yield (
                arm,
                (
                    f"{arm}: one run stands for two budgets, {at[row['run_id']]:.4g} and {row['budget']:.4g}: it is fully "
                    "decayed at "
                    "one of them at most; train each budget as a run of its own"
                ),
            )


def _unequal(key: str, what: str, remedy: str) -> Callable[[Case], Iterator[tuple[str, str]]]:
    """A guard: a fact that an arm and its baseline must share."""

    def check(case: Case) -> Iterator[tuple[str, str]]:
        for arm, baseline, rows, theirs in case.pairs():
            ours, base = rows[0][key], theirs[0][key]
            if ours != base:
                yield arm, (f"{what} of arm {arm} is {ours!r} but {base!r} in the baseline {baseline}: {remedy}")

    return check


_NOT_COMPARABLE = (
    "their losses are not comparable; make them equal (evaluation.splits scores every objective on text alike), or "
    "two studies"
)


def data_order(case: Case) -> Iterator[tuple[str, str]]:
    """Arms of a replicate share parameters' and data's seeds, and so the order of the examples."""
    yield from _unequal("corpus", "data", _NOT_COMPARABLE)(case)
    for arm, baseline, rows, theirs in case.pairs():
        seeds = [{row["replicate"]: (row["seed_init"], row["seed_data"]) for row in side} for side in (rows, theirs)]
        for replicate in seeds[0].keys() & seeds[1].keys():
            if seeds[0][replicate] != seeds[1][replicate]:
                yield (
                    arm,
                    (
                        f"seed of arm {arm} is {seeds[0][replicate]} but {seeds[1][replicate]} in the baseline {baseline}: "
                        "they would "
                        "read other examples in another order; give both the same"
                    ),
                )
                break


def validation(case: Case) -> Iterator[tuple[str, str]]:
    """One fixed held-out set, scored alike: the same measure, as many examples, the same share held out, one tokenizer."""
    for key, what in (("measure", "the held-out loss"), ("evaluation_examples", "evaluation examples"),
                      ("held_out", "the held-out share"), ("tokenizer", "the tokenizer")):  # fmt: skip
        yield from _unequal(key, what, _NOT_COMPARABLE)(case)


def undecayed(case: Case) -> Iterator[tuple[str, str]]:
    """The baseline's rate at the end. A baseline that was not decayed is beaten by anything that is."""
    baselines = {case.baseline_of(row["arm"]) for row in case.rows}
    for row in case.rows:
        if row["arm"] in baselines and row["final_rate"] > DECAYED:
            yield (
                row["arm"],
                (
                    f"the baseline {row['arm']} is not decayed: its learning rate ends at {row['final_rate']:.2g} of its "
                    "peak (schedule "
                    f"{row['schedule']}), more than {DECAYED:g}; use a schedule that decays, with final = 0"
                ),
            )


def unlike_decay(case: Case) -> Iterator[tuple[str, str]]:
    """Rates that end at different shares of their peaks."""
    for arm, baseline, rows, theirs in case.pairs():
        ours, base = rows[0]["final_rate"], theirs[0]["final_rate"]
        if max(ours, base) > DECAYED and ours != base:
            yield (
                arm,
                (
                    f"{arm}'s learning rate ends at {ours:.2g} of its peak, that of the baseline {baseline} at "
                    f"{base:.2g}: part of "
                    "their difference is decay; let both decay to 0"
                ),
            )


def repeated_text(case: Case) -> Iterator[tuple[str, str]]:
    """Beyond one epoch, what regularises looks like what trains faster (No Train No Gain, appendix D.2)."""
    row = max(case.rows, key=lambda row: row["epochs"])
    if row["epochs"] > 1:
        yield (
            row["arm"],
            (
                f"text is read up to {row['epochs']:.2g} times ({row['arm']} at {row['budget']:.4g}): there a "
                "regulariser looks like a "
                "speed-up; use more text, or ask about repeated text as a question of its own"
            ),
        )


def unequal_tuning(case: Case) -> Iterator[tuple[str, str]]:
    """Trials by which each arm's rate was found."""
    trials = _trials(case.study)
    for arm, baseline in _arms(case):
        ours, base = trials.get(arm), trials.get(baseline)
        if ours != base:
            yield (
                arm,
                (
                    f"{arm} was tuned by {ours or 0} trials and its baseline {baseline} by {base or 0}: the one that was "
                    "tuned more wins; tune them together (`lab tune`), or take one rule for both (study.rules)"
                ),
            )


def borrowed_rule(case: Case) -> Iterator[tuple[str, str]]:
    """Arms whose rate was found for another."""
    for arm, said in case.study.get("learning_rates", {}).get("arms", {}).items():
        if differences := said.get("borrowed"):
            yield (
                arm,
                (
                    f"{arm} takes the rule of {said['rule']} and was not tuned itself ({'; '.join(differences)}): part of its "
                    "difference may be the rate; tune it with the others (`lab tune`)"
                ),
            )


def ablation(case: Case) -> Iterator[tuple[str, str]]:
    """An arm whose technique is not charged is no claim about budgets, and is to be called what it is."""
    free = (case.gains or {}).get("free", ())
    for (arm, _, _), rows in case.cells().items():
        if not rows[0].get("charged", True) and arm not in free:
            yield (
                arm,
                f"{arm} is not charged what its technique executes; name it in gains.free, which labels it an ablation",
            )


def untuned(case: Case) -> Iterator[tuple[str, str]]:
    """No arm has a rate that was found for it."""
    if not _trials(case.study):
        yield (
            "",
            (
                "no arm's learning rate was tuned: a verdict is one on the rates as well; run `lab tune` and use "
                "learning_rate='tuned:NAME'"
            ),
        )


def edge(case: Case) -> Iterator[tuple[str, str]]:
    """A best rate at the end of what was tried: the arm may be better beyond."""
    for arm, said in case.study.get("learning_rates", {}).get("arms", {}).items():
        regret = said.get("regret") or {}
        if beyond := regret.get("beyond", 0) + regret.get("diverged", 0):
            yield (
                arm,
                f"{arm}'s rule leaves the rates that were tried, or diverges, in {beyond} of its cells; tune it on a wider grid",
            )
    for (arm, budget, _), rows in case.cells().items():
        losses: dict[float, list[float]] = {}
        for row in rows:
            if row.get("status") == "done":
                losses.setdefault(row["learning_rate"], []).append(row["loss"])
        if len(losses) < 3:
            continue
        best = min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))
        if best in (min(losses), max(losses)):
            yield (
                arm,
                (
                    f"{arm}'s best learning rate at {budget:.4g}, {best:.3g}, is at the edge of those that were tried; try rates "
                    "beyond it"
                ),
            )


def chosen_in_place(case: Case) -> Iterator[tuple[str, str]]:
    """Rates tried in the very runs that are compared: the best of several looks better than it is."""
    for (arm, budget, _), rows in case.cells().items():
        if len(rates := {row["learning_rate"] for row in rows}) > 1:
            yield (
                arm,
                (
                    f"{arm} has {len(rates)} learning rates at {budget:.4g}: the best of several is lucky too; find one "
                    "with `lab tune`, "
                    "on seeds of its own"
                ),
            )


def few_seeds(case: Case) -> Iterator[tuple[str, str]]:
    for (arm, budget, _), rows in case.cells().items():
        if len({row["replicate"] for row in rows}) < LEAST_SEEDS:
            yield arm, f"{arm} has one seed at {budget:.4g}: the noise of a run stays unknown; use seeds = 3 or more"


def dropped_seeds(case: Case) -> Iterator[tuple[str, str]]:
    """Runs that were planned and have no loss. What diverged is a result, and what failed is not left out either."""
    for (arm, budget, _), rows in case.cells().items():
        lost: dict[str, int] = {}
        for row in rows:
            if row.get("status", "done") != "done":
                lost[row["status"]] = lost.get(row["status"], 0) + 1
        if lost:
            said = ", ".join(f"{count} {status}" for status, count in lost.items())
            yield (
                arm,
                (
                    f"{arm} at {budget:.4g}: {said} of {len(rows)} runs: nothing is said of the others alone, which are "
                    "those that went "
                    "well"
                ),
            )


def overfit(case: Case) -> Iterator[tuple[str, str]]:
    """A baseline that more budget does not help: a gain in budget has no meaning there."""
    mean: dict[str, dict[float, float]] = {}
    for (arm, budget, _), rows in case.cells().items():
        if arm == case.baseline_of(arm) and all(row.get("status") == "done" for row in rows):
            mean.setdefault(arm, {})[budget] = sum(row["loss"] for row in rows) / len(rows)
    for arm, by_budget in mean.items():
        for budget, more in zip(sorted(by_budget), sorted(by_budget)[1:], strict=False):
            if by_budget[more] >= by_budget[budget]:
                yield (
                    arm,
                    (
                        f"the baseline {arm} is no better at {more:.4g} than at {budget:.4g}: it overfits, or noise hides its "
                        "progress, "
                        "and a gain in budget can not be measured; use more text or budgets further apart"
                    ),
                )


def _trials(study: Mapping[str, Any]) -> dict[str, int]:
    return {arm: said["trials"] for arm, said in study.get("learning_rates", {}).get("arms", {}).items()}


def _arms(case: Case) -> list[tuple[str, str]]:
    arms = dict.fromkeys(row["arm"] for row in case.rows)
    return [(arm, baseline) for arm in arms if arm != (baseline := case.baseline_of(arm))]


@dataclass(frozen=True)
class Guard:
    check: Callable[[Case], Iterable[tuple[str, str]]]
    gains: Severity  # in a study of gains
    elsewhere: Severity | None  # None: not asked


GUARDS: dict[str, Guard] = {
    "mid_schedule": Guard(mid_schedule, "refuse", "refuse"),
    "units": Guard(_unequal("unit", "the budget's unit", "equal amounts of it are not equal"), "refuse", "refuse"),
    "precision": Guard(_unequal("precision", "precision", _NOT_COMPARABLE), "refuse", "refuse"),
    "data_order": Guard(data_order, "refuse", "refuse"),
    "validation": Guard(validation, "refuse", "refuse"),
    "masks": Guard(
        _unequal("masks", "the objective", "they would be trained on other tokens, or other masks; use one objective"),
        "refuse",
        None,
    ),
    "undecayed": Guard(undecayed, "refuse", "flag"),
    "unlike_decay": Guard(unlike_decay, "flag", "flag"),
    "model": Guard(
        _unequal("model", "the model", "part of their difference is capacity; say so, or give both the same"),
        "flag",
        None,
    ),
    "batch": Guard(
        _unequal("batch", "the batch", "part of their difference is the batch; say so, or give both the same"),
        "flag",
        None,
    ),
    "repeated_text": Guard(repeated_text, "refuse", None),
    "unequal_tuning": Guard(unequal_tuning, "refuse", "refuse"),
    "borrowed_rule": Guard(borrowed_rule, "flag", "flag"),
    "untuned": Guard(untuned, "flag", None),
    "ablation": Guard(ablation, "refuse", "flag"),
    "edge": Guard(edge, "refuse", "flag"),
    "chosen_in_place": Guard(chosen_in_place, "refuse", None),
    "few_seeds": Guard(few_seeds, "refuse", None),
    "dropped_seeds": Guard(dropped_seeds, "flag", None),
    "overfit": Guard(overfit, "flag", None),
}


def find(case: Case) -> list[Finding]:
    """What the guards say, each reason once. Those that the study allows (`gains.allow`) are flagged where they would refuse."""
    found: dict[tuple[str, str], Finding] = {}
    allowed = (case.gains or {}).get("allow", ())
    for name, guard in GUARDS.items():
        severity = guard.elsewhere if case.gains is None else guard.gains
        if severity is None:
            continue
        severity = "flag" if name in allowed else severity
        for arm, reason in guard.check(case):
            found.setdefault((name, reason), Finding(guard=name, arm=arm, reason=reason, severity=severity))
    return list(found.values())
