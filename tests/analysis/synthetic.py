"""Study directories with known answers: records as `lab run` writes them, losses simulated from a law."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lab import records
from lab.spec import Budget, Objective, Optimizer, Seed, Shape, to_json
from runs import make_run

S, T = 48, 16
BUDGETS = (4e10, 1.6e11, 6.4e11)
E, ALPHA, BETA = 1.4, 0.34, 0.30


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Loss E + A N^-alpha + B D^-beta, at 6 N `cost` FLOPs a token; `textbook` is what another count multiplies it
    by."""

    A: float = 25.0
    B: float = 40.0
    cost: float = 1.15
    alpha: float = ALPHA
    textbook: float = 1.0
    structure: str = "decoder_only"


@dataclass(frozen=True, kw_only=True)
class Study:
    arms: Mapping[str, Arm]
    baseline: str
    budgets: tuple[float, ...] = BUDGETS
    sizes: int = 4
    seeds: int = 3  # at the third size of the middle budget; one elsewhere
    noise: float = 0.003
    shared_noise: float = 0.0  # part of the noise that arms of a replicate share
    seed: int = 0
    same_runs: tuple[str, ...] = ()  # arms that take the baseline's runs
    missing: tuple[int, ...] = ()
    diverged: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    question: str = "Does bidirectional attention among the inputs still pay when compute grows?"
    notes: tuple[str, ...] = ()
    header: Mapping[str, Any] = field(default_factory=dict)  # what plan.json's study has besides
    change: Callable[[dict[str, Any]], None] = field(default=lambda result: None)


def body(width: int) -> float:
    return 2.0 * 12 * width**2


def true_loss(arm: Arm, N: Any, C: float) -> Any:
    """At budget C (FLOPs) and size N, so D = C / (6 N cost) tokens."""
    return E + arm.A * N**-arm.alpha + arm.B * (C / (6 * N * arm.cost)) ** -BETA


def true_best(arm: Arm, C: float) -> float:
    return float(true_loss(arm, np.geomspace(1e2, 1e9, 20001), C).min())


def write(path: Path, study: Study) -> Path:
    """Writes plan.json and every result.json; returns `path`."""
    rng = np.random.default_rng(study.seed)
    shared = rng.standard_normal((len(study.budgets), study.sizes, study.seeds))
    rows, results = [], {}
    for name, arm in study.arms.items():
        for b, budget in enumerate(study.budgets):
            # Centred on the true best size, within a factor of about 4 either way, in steps of whole widths.
            N = np.geomspace(1e2, 1e9, 20001)
            centre = float(N[true_loss(arm, N, budget).argmin()])
            widths = [2 * round((centre * f / 24) ** 0.5 / 2) for f in np.geomspace(0.25, 4.0, study.sizes)]
            for rung, width in enumerate(widths):
                replicated = b == len(study.budgets) // 2 and rung == min(2, study.sizes - 1)
                for replicate in range(study.seeds if replicated else 1):
                    noise = study.noise * rng.standard_normal() + study.shared_noise * shared[b, rung, replicate]
                    row, result = _records(name, arm, budget, rung, width, replicate, float(noise))
                    if name in study.same_runs:
                        twin = next(
                            r
                            for r in rows
                            if r["arm"] == study.baseline
                            and (r["budget"], r["rung"], r["replicate"]) == (budget, rung, replicate)
                        )
                        rows.append({**twin, "arm": name})
                        continue
                    rows.append(row)
                    results[row["run_id"]] = result
    for index, row in enumerate(rows):
        run_dir = records.run_directory(path, row["run_id"])
        result = results[row["run_id"]]
        if index in study.missing:
            continue
        if index in study.failed:
            records.write_json(run_dir / "failed.json", {"schema": 1, "error": "out of memory", "attempts": 3})
            continue
        if index in study.diverged:
            result["status"] = "diverged"
            result["outcome"] |= {"loss": None, "bits_per_byte": None, "diverged_at": 7, "loss_standard_error": None}
            result["outcome"]["loss_per_position"] = None
            result["outcome"]["spent"] = {k: v / 2 for k, v in result["planned"].items()}
        study.change(result)
        records.write_json(run_dir / records.RESULT, result)
    records.write_json(path / records.PLAN, {"schema": 1, "study": _header(study), "runs": rows})
    return path


def _header(study: Study) -> dict[str, Any]:
    return {
        "name": "synthetic",
        "question": study.question,
        "baseline": study.baseline,
        "arms": {name: f"{arm.structure}, simulated" for name, arm in study.arms.items()},
        "match": {"quantity": "flops", "convention": "exact", "tolerance": 0.01},
        "command": "lab run synthetic",
        "data": {"corpus": "markov", "manifest": "0" * 64, "train_tokens": 10**8, "summary": "simulated losses"},
        "notes": list(study.notes),
        **study.header,
    }


def _records(
    name: str, arm: Arm, budget: float, rung: int, width: int, replicate: int, noise: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    N = body(width)
    examples = round(budget / (6 * N * arm.cost * (S + T)))
    tokens = examples * (S + T)
    exact = 6 * N * arm.cost * tokens
    spent = {
        "exact": exact,
        "dense": 1.1 * exact,
        "6nd": 6 * N * tokens,
        "textbook": arm.textbook * exact,
        "tokens": tokens,
        "steps": examples,
    }
    shape = Shape(D=width, F=4 * width, N=1, K=1, H=width, L=2, L_input=2)
    run = make_run(
        arm.structure,
        shape=shape,
        objective=Objective(S=S, T=T),
        budget=Budget(unit="flops", amount=budget),
        optimizer=Optimizer(learning_rate=3e-3),
        seed=Seed(init=replicate, data=replicate),
    )
    # Arms are told apart by revision, so that two with the same structure are still two runs.
    run = replace(run, revision=sum(name.encode()))
    loss = E + arm.A * N**-arm.alpha + arm.B * tokens**-BETA + noise
    row = {
        "run_id": run.run_id,
        "arm": name,
        "budget": budget,
        "rung": rung,
        "replicate": replicate,
        "residual": exact / budget - 1,
        "learning_rate": 3e-3,
        "epochs": tokens / 1e8,
        "seconds_estimated": exact / 1e10,
        "planned": spent,
        "run": to_json(run),
    }
    result = {
        "schema": 1,
        "run_id": run.run_id,
        "status": "done",
        "outcome": {
            "steps": examples,
            "examples": examples,
            "tokens_seen": tokens,
            "target_tokens": examples * T,
            "epochs": tokens / 1e8,
            "spent": spent,
            "loss": loss,
            "bits_per_byte": loss / np.log(2),
            "loss_per_position": [loss + 0.6 / (t + 1) - 0.12 for t in range(T)],
            "loss_standard_error": 0.01,
            "train_loss": loss - 0.02,
            "parameter_hash": "0" * 16,
            "diverged_at": None,
        },
        "parameters": {"total": N + 300 * width, "body": N, "embedding": 300 * width},
        "planned": dict(spent),
        "measured": {
            "seconds": exact / 1e10,
            "compile_seconds": 2.0,
            "tokens_per_second": 1e5,
            "exact_flops_per_second": 1e10 / (1.05 if name == "prefix_lm" else 1.0),
            "mfu": None,
            "seconds_by_part": {"compile": 1.0, "data": 0.5, "step": 8.0, "evaluate": 0.25, "checkpoint": 0.25},
            "peak_memory_bytes": 10**8,
            "attempts": 1,
            "device": "cpu",
            "versions": {"jax": "0.10.2", "bitterlab": "0.1.0"},
            "execution": {"threads": 2},
        },
    }
    return row, result


FOUR_ARMS: dict[str, Arm] = {
    "encoder_decoder": Arm(A=27.5, B=39.0, cost=1.0, structure="encoder_decoder"),
    "shared_stacks": Arm(A=25.5, B=40.0, structure="shared_stacks"),
    "prefix_lm": Arm(A=24.0, B=38.5, textbook=1.1, structure="prefix_lm"),
    "decoder_only": Arm(),
}
