"""How often intervals contain the truth that a simulation planted, for every method that analysis offers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.fit import Fit, fit_law
from analysis.refusal import Refusal
from analysis.resample import Draws, cluster_bootstrap, wild_cluster_bootstrap
from analysis.uncertainty import jackknife, sandwich

TRUTH = {"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}  # Besiroglu et al. 2024
SD = 0.01  # of log loss
C_RANGE = (1e18, 1e22)
# Rows of a cluster share half of the variance.
SHAPES = {
    ("independent", 30): (30, 1),
    ("independent", 240): (240, 1),
    ("clustered", 30): (10, 3),
    ("clustered", 240): (40, 6),
}


def design(kind: str, n: int) -> dict[str, np.ndarray]:
    """Iso-FLOP grids: budgets over four decades, sizes within a factor of four of the best; a cluster is a size at
    several budgets nearby."""
    clusters, rows = SHAPES[kind, n]
    budgets = 6 if n == 30 else 12
    sizes = clusters * rows // budgets
    C = np.geomspace(*C_RANGE, budgets).repeat(sizes)
    off = np.tile(np.geomspace(0.25, 4, sizes), budgets)
    N = optimum(TRUTH, C)[0] * off
    order = np.argsort(np.tile(np.arange(sizes), budgets), kind="stable") if rows > 1 else np.arange(n)
    return {"N": N[order], "D": (C / 6 / N)[order], "cluster": np.arange(n) // rows}


def optimum(p: Any, C: Any) -> tuple[Any, Any]:
    """N* and L*(C) of the five-parameter law where C = 6 N D (Hoffmann et al. 2022, equation 4)."""
    total = p["alpha"] + p["beta"]
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / total)
    N = G * (C / 6) ** (p["beta"] / total)
    return N, p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * (C / 6 / N) ** -p["beta"]


CENTRE = 1e20
QUANTITIES: dict[str, Callable[[Any], Any]] = {
    "a": lambda p: p["beta"] / (p["alpha"] + p["beta"]),
    "loss at the centre": lambda p: (
        p["E"]
        + p["A"] * optimum(TRUTH, CENTRE)[0] ** -p["alpha"]
        + p["B"] * (CENTRE / 6 / optimum(TRUTH, CENTRE)[0]) ** -p["beta"]
    ),
    "L*(1e22)": lambda p: optimum(p, 1e22)[1],
    "L*(1e23)": lambda p: optimum(p, 1e23)[1],
    "alpha": lambda p: p["alpha"],
    "beta": lambda p: p["beta"],
    "E": lambda p: p["E"],
}


def methods(fit: Fit, cluster: np.ndarray, draws: int, seed: int) -> dict[str, Callable[[], Draws]]:
    alone = len(set(cluster.tolist())) == len(cluster)
    return {
        "bootstrap of clusters": lambda: cluster_bootstrap(fit, cluster, draws=draws, seed=seed),
        "wild bootstrap": lambda: wild_cluster_bootstrap(fit, cluster, draws=draws, seed=seed),
        "jackknife, t": lambda: jackknife(fit, cluster, seed=seed),
        "sandwich, t": lambda: sandwich(fit, None if alone else cluster, seed=seed),
        "sandwich, rows alike, t": lambda: sandwich(fit, homoskedastic=True, seed=seed),
    }


def coverage(
    kind: str, n: int, simulations: int, *, delta: float | str, draws: int, only: Sequence[str] = (), seed: int = 0
) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Share of simulations whose 95% interval covers, the interval's median width, and how many could be had, for each
    method and quantity."""
    rng = np.random.default_rng([seed, n, kind == "clustered"])
    x = design(kind, n)
    clean = np.log(TRUTH["E"] + TRUTH["A"] * x["N"] ** -TRUTH["alpha"] + TRUTH["B"] * x["D"] ** -TRUTH["beta"])
    truth = {name: float(of(TRUTH)) for name, of in QUANTITIES.items()}
    clusters, rows = SHAPES[kind, n]
    covered: dict[tuple[str, str], list[bool]] = {}
    widths: dict[tuple[str, str], list[float]] = {}
    for simulation in range(simulations):
        own = rng.standard_normal(n)
        if rows > 1:
            own = math.sqrt(0.5) * own + math.sqrt(0.5) * rng.standard_normal(clusters)[x["cluster"]]
        fit = fit_law("chinchilla", {**x, "loss": np.exp(clean + SD * own)}, delta=delta, starts=8, seed=simulation)
        for method, make in methods(fit, x["cluster"], draws, simulation).items():
            if only and method not in only:
                continue
            try:
                drawn = make()
            except Refusal:
                for name in QUANTITIES:
                    covered.setdefault((method, name), []), widths.setdefault((method, name), [])
                continue
            for name, of in QUANTITIES.items():
                low, high = drawn.of(of)
                covered.setdefault((method, name), []).append(low <= truth[name] <= high)
                widths.setdefault((method, name), []).append(high - low)
    return {
        key: (float(np.mean(hit)) if hit else math.nan, float(np.median(widths[key])) if hit else math.nan, len(hit))
        for key, hit in covered.items()
    }
