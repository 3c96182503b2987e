"""Two arms on one grid with a known answer: both of one law, or with a planted crossing."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.arms import compare_arms
from analysis.crossing import crossing_of, law_curves
from analysis.fit import fit_law
from analysis.laws import LAWS
from analysis.nested import levels_of, wild_tests
from analysis.uncertainty import draw_parameters
from simulated_coverage import TRUTH, optimum

C_RANGE = (1e18, 1e21)
CROSSES = 3e19
SD = 0.005  # of log loss


def steeper(C_star: float = CROSSES, *, alpha: float = 0.42, beta: float = 0.42) -> dict[str, float]:
    """An arm with larger exponents, A and B such that its best loss, and the size that has it, are TRUTH's at C_star."""
    N, L = optimum(TRUTH, C_star)
    # Of two powers at their optimum alpha A N^-alpha = beta B D^-beta, and they add up to L - E.
    part = (L - TRUTH["E"]) / (1 / alpha + 1 / beta)
    return {
        "E": TRUTH["E"],
        "A": part / alpha * N**alpha,
        "B": part / beta * (C_star / 6 / N) ** beta,
        "alpha": alpha,
        "beta": beta,
    }


def grid(laws: Mapping[str, Mapping[str, float]], *, budgets: int, sizes: int, rows: int = 1) -> dict[str, np.ndarray]:
    """Iso-FLOP grids of every arm, sizes within a factor of four of its best; a cluster is `rows` neighbours in budget of
    one arm and place in the grid."""
    found: dict[str, list[Any]] = {name: [] for name in ("arm", "N", "D", "C", "clean", "cluster")}
    for name, p in laws.items():
        for place, factor in enumerate(np.geomspace(0.25, 4, sizes)):
            for b, C in enumerate(np.geomspace(*C_RANGE, budgets)):
                N = optimum(p, C)[0] * factor
                D = C / 6 / N
                clean = math.log(p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"])
                for key, value in zip(found, (name, N, D, C, clean, f"{name} {place} {b // rows}"), strict=True):
                    found[key].append(value)
    return {name: np.asarray(values) for name, values in found.items()}


# Budgets, sizes and rows of a cluster of every arm.
DESIGNS = {"independent": (4, 5, 1), "clustered": (4, 5, 2), "few clusters": (4, 3, 4)}


def noise(
    table: Mapping[str, np.ndarray], simulations: int, rng: np.random.Generator, rows: int, sd: float = SD
) -> np.ndarray:
    own = rng.standard_normal((simulations, len(table["N"])))
    if rows == 1:
        return sd * own
    _, label = np.unique(table["cluster"], return_inverse=True)
    shared = rng.standard_normal((simulations, label.max() + 1))[:, label]
    return sd * math.sqrt(0.5) * (own + shared)


def nested_rates(
    design: str, simulations: int, *, null_draws: int, levels: tuple[str, ...] = ("identical",), seed: int = 0,
    against: tuple[str, ...] = ("shared exponents", "separate"),
) -> dict[str, float]:  # fmt: skip
    """Share of A/A simulations in which the identical law is rejected, all of them fitted in a few batches."""
    budgets, sizes, rows = DESIGNS[design]
    table = grid({"a": TRUTH, "b": TRUTH}, budgets=budgets, sizes=sizes, rows=rows)
    rng = np.random.default_rng([seed, 3, rows])
    first = {**table, "loss": np.exp(table["clean"] + noise(table, 1, rng, rows)[0])}
    own = levels_of(LAWS["chinchilla"])
    full = fit_law("chinchilla", first, per_arm=own["separate"], delta="scatter", starts=16)
    fuller = [fit_law("chinchilla", first, per_arm=own[name], delta=full.delta, starts=16) for name in against]
    restricted = fit_law("chinchilla", first, per_arm=own[levels[0]], delta=full.delta, starts=16)
    _, label = np.unique(table["cluster"], return_inverse=True)
    rejected = {name: 0 for name in against}
    batch = max(1, 20_000 // null_draws)
    for begin in range(0, simulations, batch):
        m = min(batch, simulations - begin)
        losses = table["clean"] + noise(table, m, rng, rows)
        for name, (_, p, _) in zip(
            against, wild_tests(restricted, fuller, losses, label, draws=null_draws, seed=begin), strict=True
        ):
            rejected[name] += int((p <= 0.05).sum())
    return {f"identical against {name}": count / simulations for name, count in rejected.items()}


def aa_rates(basis: str, simulations: int, *, seed: int = 0) -> float:
    """Share of whole comparisons of two arms of one law whose verdict calls them different (at most 5%)."""
    budgets, sizes, rows = DESIGNS["independent"]
    table = grid({"a": TRUTH, "b": TRUTH}, budgets=budgets, sizes=sizes, rows=rows)
    if basis == "law":  # budgets that no two arms share leave nothing to compare in range
        off = np.where(table["arm"] == "b", 1.3, 1.0)
        table = {**table, "D": table["D"] * off, "C": table["C"] * off}
        table["clean"] = np.log(
            TRUTH["E"] + TRUTH["A"] * table["N"] ** -TRUTH["alpha"] + TRUTH["B"] * table["D"] ** -TRUTH["beta"]
        )
    rng = np.random.default_rng([seed, 4])
    called = 0
    for _ in range(simulations):
        losses = np.exp(table["clean"] + noise(table, 1, rng, rows)[0])
        answer = compare_arms(
            {**table, "loss": losses}, "chinchilla" if basis == "law" else None, baseline="a", null_draws=99, draws=400,
            hold_out=False,
        )  # fmt: skip
        called += answer.verdicts[0].kind in ("A better", "B better", "crosses at")
    return called / simulations


def crossing_rates(simulations: int, *, draws: int = 400, level: str = "shared E", seed: int = 0) -> dict[str, float]:
    """A planted crossing in the middle of the grid, read off draws of one fit in which E is shared."""
    budgets, sizes, rows = DESIGNS["independent"]
    table = grid({"base": TRUTH, "arm": steeper()}, budgets=budgets, sizes=sizes)
    rng = np.random.default_rng([seed, 5])
    covered = located = right_sides = 0
    ratios = []
    for simulation in range(simulations):
        losses = np.exp(table["clean"] + noise(table, 1, rng, rows)[0])
        fit = fit_law("chinchilla", {**table, "loss": losses}, per_arm=levels_of(LAWS["chinchilla"])[level], delta="scatter",
                      starts=8, seed=simulation)  # fmt: skip
        drawn = draw_parameters(fit, draws=draws, seed=simulation)
        given = law_curves(drawn, arms=("base", "arm"), measured=C_RANGE, points=81)
        found = crossing_of(given, arm="arm", baseline="base")
        low, high = found.low or 0.0, found.high or math.inf
        covered += low <= CROSSES <= high
        located += found.low is not None and found.high is not None and not found.extrapolated
        right_sides += found.better[C_RANGE[0]] < 0.025 and found.better[C_RANGE[1]] > 0.975
        ratios.append(high / low if low > 0 else math.inf)
    return {
        "95% interval contains it": covered / simulations,
        "located inside the data": located / simulations,
        "both ends resolved": right_sides / simulations,
    }
