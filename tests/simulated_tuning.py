"""A tuning whose trials are simulated from a law that is known."""

import math
from pathlib import Path

import numpy as np

import sweeps
from lab import records
from sweeps.ladder import Size
from sweeps.store import Store
from sweeps.tune.conclude import Tuned
from sweeps.tune.rounds import tune
from sweeps.tune.tuning import Tuning

MINE = """
from sweeps import Study, Tuning, arm, corpus
from sweeps.ladder import ladder, shape

def arms():
    data = corpus("markov")
    return {name: arm(name, data, S=8, T=8) for name in ("prefix_lm", "decoder_only")}

def tuning(preset="small"):
    return Tuning(name="mine", arms=arms(), budgets=(1e8, 4e8), sizes=ladder(8, 16, 24, depth=1, head_width=8), batch=2,
                  rates=(0.005, 0.01, 0.02, 0.04, 0.08), hold_out=(4e8, shape(32, 1, head_width=8)))

def study(preset="small"):
    return Study(name="mine", question="?", arms=arms(), baseline="decoder_only", budgets=(1e8, 4e8), window=3, batch=2,
                 sizes=ladder(8, 16, 24, depth=1, head_width=8), learning_rate="tuned:runs/tune-mine/rules.json")
"""
# Of each arm: its best rate is c size^a tokens^b, and losses are CURVATURE (log rate - log best)^2 above 2.
LAWS = {"prefix_lm": (1.2, -0.4, 0.0), "decoder_only": (0.4, -0.35, 0.02)}
CURVATURE, NOISE = 0.2, 1e-4


class Simulated:
    """Trains in no time what has not ended: losses of the law, diverged from `cliff` on. `ask` are the plans it was given."""

    def __init__(
        self, out: Path, laws=LAWS, cliff: float = math.inf, better: str = "", left: int = 0, failing: str = ""
    ):
        self.out, self.laws, self.cliff, self.better, self.left, self.failing = out, laws, cliff, better, left, failing
        self.asked: list[sweeps.Plan] = []

    def __call__(self, plan: sweeps.Plan) -> None:
        self.asked.append(plan)
        store = Store(self.out)
        store.write_plan(plan.to_json())
        for row in list(plan.unique.values())[: len(plan.unique) - self.left]:
            run_dir = records.run_directory(self.out, row.run_id)
            if row.run_id.startswith(self.failing) and self.failing:
                claim = store.claim(row.run_id)
                assert claim is not None
                store.fail(claim, "broken")
            elif not (run_dir / records.RESULT).exists():
                records.write_json(run_dir / records.RESULT, self.result(row))

    def result(self, row) -> dict:
        (c, a, b), size = self.laws[row.arm], Size.of(row.run, row.run.V)
        best = c * size.body_flops**a * size.tokens**b
        rng = np.random.default_rng(int(row.run_id[-8:], 16))
        rate = row.run.optimizer.learning_rate
        loss = 2 + CURVATURE * math.log(rate / best) ** 2 + NOISE * rng.standard_normal() + 0.1 * row.replicate
        loss -= 0.05 if self.better == row.arm and row.run.optimizer.beta2 == 0.99 else 0.0
        lost = rate >= self.cliff
        spent = {"exact": row.planned["exact"] / (2 if lost else 1)}
        return {"schema": 1, "run_id": row.run_id, "status": "diverged" if lost else "done",
                "outcome": {"loss": None if lost else loss, "spent": spent, "steps": row.planned["steps"]},
                "measured": {"seconds": 36.0, "versions": {"jax": "0"}, "device": "none"}}  # fmt: skip


def tuned(tuning: Tuning, out: Path, **how) -> tuple[Tuned, Simulated]:
    train = Simulated(out, **how)
    found = tune(tuning, out, train)
    assert found is not None
    return found, train
