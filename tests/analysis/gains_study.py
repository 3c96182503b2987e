"""Studies of gains with known answers: records as `lab run` writes them, and losses simulated from a baseline's curve."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.guards import facts
from lab import records
from lab.spec import Budget, Run, Seed, to_json
from runs import make_run
from sweeps.study import Gains

BUDGETS = (1e10, 4e10, 1.6e11)
SLOPE = 0.2  # nats for each factor e of budget: the baseline's loss is linear in log budget
BASE = "adamw"


def loss_of(budget: float, gain: float = 0.0) -> float:
    """Of an arm that is as good as the baseline at (1 + gain) times the budget."""
    return 5.0 - SLOPE * np.log((1 + gain) * budget / BUDGETS[0])


def simulate(
    gains: Mapping[str, Sequence[float]],
    *,
    seeds: int,
    rng: np.random.Generator,
    sd: float = 0.01,
    shared: float = 0.01,
    spread: float = 0.0,
    budgets: Sequence[float] = BUDGETS,
) -> dict[tuple[str, float], dict[int, float | None]]:
    """Losses of the baseline and of arms of these gains at each budget. sd: of a run, times exp(spread normal) of each arm;
    shared: what runs of one seed have in common."""
    common = shared * rng.standard_normal((len(budgets), seeds))
    found = {}
    for arm, planted in {BASE: [0.0] * len(budgets), **gains}.items():
        own = sd * float(np.exp(spread * rng.standard_normal()))
        for b, budget in enumerate(budgets):
            noise = common[b] + own * rng.standard_normal(seeds)
            found[arm, budget] = {s: float(loss_of(budget, planted[b]) + noise[s]) for s in range(seeds)}
    return found


def make(arm: str, budget: float, replicate: int, **parts: Any) -> Run:
    """Arms are told apart by their revision, so that they are other runs of the same kind."""
    run = make_run(budget=Budget(unit="flops", amount=budget), seed=Seed(init=replicate, data=replicate), **parts)
    return replace(run, revision=sum(arm.encode()))


def header(gains: Gains | None, arms: Sequence[str], **more: Any) -> dict[str, Any]:
    trials = {arm: {"trials": 12, "regret": {"beyond": 0}} for arm in arms}
    return {
        "name": "simulated", "question": "Does <it> train faster?", "baseline": BASE, "command": "lab run simulated",
        "arms": dict.fromkeys(arms, "simulated"), "notes": [],
        "match": {"quantity": "flops", "convention": "exact", "tolerance": 0.01},
        "learning_rates": {"rule": "tuned:zoo", "arms": trials},
        "data": {"corpus": "markov", "manifest": "0" * 64, "train_tokens": 10**8, "summary": "simulated losses"},
        **({} if gains is None else {"gains": asdict(gains)}), **more,
    }  # fmt: skip


def rows(
    losses: Mapping[tuple[str, float], Mapping[int, float | None]], change: Callable[[Run], Run] = lambda run: run
) -> list[dict[str, Any]]:
    """As guards read them. change: of the runs of arms other than the baseline."""
    made = []
    for (arm, budget), of in losses.items():
        for replicate, loss in of.items():
            run = make(arm, budget, replicate)
            run = run if arm == BASE else change(run)
            made.append({**facts(run), "run_id": run.run_id, "arm": arm, "budget": budget, "rung": 0, "replicate": replicate,
                         "epochs": 0.5, "loss": loss, "status": "diverged" if loss is None else "done"})  # fmt: skip
    return made


def write(
    path: Path, losses: Mapping[tuple[str, float], Mapping[int, float | None]], *, gains: Gains | None, factors: Any = None,
    same: Sequence[str] = (), missing: Sequence[tuple[str, float, int]] = (), change: Callable[[Run], Run] = lambda run: run,
    **more: Any,
) -> Path:  # fmt: skip
    """plan.json and every result.json. factors: {arm: of its budget}; same: arms that take the baseline's runs; change: of the
    runs of arms other than the baseline."""
    table = []
    for (arm, budget), of in losses.items():
        for replicate, loss in of.items():
            named, factor = BASE if arm in same else arm, (factors or {}).get(arm, 1.0)
            run = make(named, factor * budget, replicate)
            run = run if named == BASE else change(run)
            spent = {"exact": run.budget.amount, "dense": run.budget.amount, "6nd": run.budget.amount,
                     "textbook": run.budget.amount, "tokens": 4400, "steps": round(100 * factor)}  # fmt: skip
            table.append({"run_id": run.run_id, "arm": arm, "budget": budget, "rung": 0, "replicate": replicate, "residual": 0.0,
                          "learning_rate": run.optimizer.learning_rate, "epochs": 0.5, "seconds_estimated": 1.0,
                          "planned": spent, "run": to_json(run)})  # fmt: skip
            if (arm, budget, replicate) in missing:
                continue
            lost = loss is None
            outcome = {"steps": spent["steps"], "examples": 400, "tokens_seen": 4400, "target_tokens": 2000, "epochs": 0.5,
                       "spent": spent, "loss": loss, "bits_per_byte": None if lost else loss / np.log(2),
                       "loss_per_position": None if lost else [loss], "loss_standard_error": None if lost else 0.01,
                       "diverged_at": 7 if lost else None}  # fmt: skip
            measured = {"seconds": 10.0 * factor * (1.0 if named == BASE else 1.2), "tokens_per_second": 440.0,
                        "exact_flops_per_second": 1e9, "mfu": None, "seconds_by_part": {"step": 9.0}, "device": "cpu",
                        "versions": {"jax": "0", "git": "abc"}}  # fmt: skip
            records.write_json(
                records.run_directory(path, run.run_id) / records.RESULT,
                {"schema": 1, "run_id": run.run_id, "status": "diverged" if lost else "done", "outcome": outcome,
                 "parameters": {"total": 100, "body": 80, "embedding": 20}, "planned": spent, "measured": measured},
            )  # fmt: skip
    arms = list(dict.fromkeys(arm for arm, _ in losses))
    records.write_json(
        path / records.PLAN, {"schema": records.SCHEMA, "study": header(gains, arms, **more), "runs": table}
    )
    return path
