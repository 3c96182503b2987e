"""CPU seconds of our fits beside those of the peers, on the same points, in one process tree.

    python tests/benchmarks/fits.py [--points TABLE.csv] [--share 0.05]

TABLE.csv has columns N, D and loss (and `kept`, where some rows are left out), such as the digitised Chinchilla points
(Besiroglu et al. 2024); without it 240 points are drawn from their fit with 0.75% noise. The peers are slow: each is given
`share` of the starts or resamples, and its time is scaled up, which the table says. `pip install chinchilla` adds that
peer. CPU seconds are of this process and its children; a first fit includes compilation. What a resample converged to is
compared with SciPy's least squares of the same resample from our optimum and from a start moved at random.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads of the peers would be counted as work

import argparse
import importlib.util
import itertools
import logging
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from analysis.fit import fit_law, refit
from analysis.laws import LAWS
from analysis.resample import cluster_bootstrap
from analysis.uncertainty import jackknife

STARTS, RESAMPLES, DELTA = 4500, 4000, 1e-3
GRID = [range(0, 30, 5), range(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5)]


def cpu() -> float:
    """User and system seconds of this process and of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def timed(make: Callable[[], Any], repeats: int = 1) -> tuple[Any, float, float]:
    """The result, and medians of CPU and wall seconds."""
    spent, result = [], None
    for _ in range(repeats):
        c, w = cpu(), time.perf_counter()
        result = make()
        spent.append((cpu() - c, time.perf_counter() - w))
    return result, statistics.median(c for c, _ in spent), statistics.median(w for _, w in spent)


def points(path: str | None) -> pd.DataFrame:
    if path is not None:
        table = pd.read_csv(path)
        return table[table["kept"].astype(bool)] if "kept" in table else table
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(np.log(5e7), np.log(1.5e10), 240)), np.exp(rng.uniform(np.log(3e8), np.log(3e11), 240))
    loss = 1.8172 + 482.01 * N**-0.3478 + 2085.43 * D**-0.3658
    return pd.DataFrame({"N": N, "D": D, "loss": loss * np.exp(0.0075 * rng.standard_normal(240))})


def huber_in_logs(theta: np.ndarray, log_N, log_D, log_loss, weights) -> tuple[float, np.ndarray]:
    """Besiroglu et al.'s objective over delta, and its gradient: parameters log A, log B, log E, alpha, beta."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_N, b - beta * log_D, np.full_like(log_N, e)])
    predicted = special.logsumexp(terms, axis=0)
    residual = predicted - log_loss
    share = np.exp(terms - predicted)
    size = np.abs(residual)
    value = np.where(size <= DELTA, residual**2 / (2 * DELTA), size - DELTA / 2)
    slope = weights * np.clip(residual / DELTA, -1, 1)
    gradient = np.array(
        [slope @ share[0], slope @ share[1], slope @ share[2], -slope @ (share[0] * log_N), -slope @ (share[1] * log_D)]
    )
    return float(weights @ value), gradient


def scipy_fit(start, data, weights, *, analytic: bool) -> optimize.OptimizeResult:
    if analytic:
        return optimize.minimize(huber_in_logs, start, (*data, weights), method="L-BFGS-B", jac=True)
    # As published: the objective itself, whose smallness the stopping rule then mistakes for convergence.
    return optimize.minimize(lambda theta: DELTA * huber_in_logs(theta, *data, weights)[0], start, method="L-BFGS-B")


def kyo_takano(table: pd.DataFrame, starts: int) -> tuple[Callable[[], Any], Callable[[Any], float]] | None:
    """The packaged toolkit with the published loss, on as many starts of a grid."""
    if importlib.util.find_spec("chinchilla") is None:
        return None
    import chinchilla  # pyright: ignore[reportMissingImports]
    from chinchilla._metrics import log_huber  # pyright: ignore[reportMissingImports]

    logging.disable(logging.CRITICAL)
    side = max(2, round(starts ** (1 / 5)))
    grid = {
        "e": np.linspace(0, 1, side),
        "a": np.linspace(1, 10, side),
        "b": np.linspace(1, 10, side),
        "alpha": np.linspace(0.1, 0.7, side),
        "beta": np.linspace(0.1, 0.7, side),
    }

    def fit() -> Any:
        toolkit = chinchilla.Chinchilla(
            project_dir=tempfile.mkdtemp(),
            param_grid=grid,
            seed_ranges={"C": (1e18, 1e22), "N_to_D": (1, 100)},
            loss_fn=lambda y_true, y_pred: log_huber(y_true, y_pred, DELTA),
            log_level=50,
        )
        toolkit.database.df = pd.DataFrame(
            {"C": 6.0 * table["N"] * table["D"], "N": table["N"], "D": table["D"], "loss": table["loss"]}
        )
        toolkit.fit(parallel=False)
        return toolkit, side**5

    def objective(fitted: Any) -> float:
        p = fitted[0].params
        theta = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]], float)
        logs = (np.log(table[name].to_numpy()) for name in ("N", "D", "loss"))
        return DELTA * huber_in_logs(theta, *logs, np.ones(len(table)))[0]

    return fit, objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=None)
    parser.add_argument("--share", type=float, default=0.05)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = points(options.points)
    n = len(table)
    data = tuple(np.log(table[name].to_numpy(float)) for name in ("N", "D", "loss"))
    rows: list[tuple[str, str, float, float, str]] = []

    def say(what: str, count: str, cpu_s: float, wall_s: float, quality: str) -> None:
        rows.append((what, count, cpu_s, wall_s, quality))
        print(f"{what:58s} {count:>14s} {cpu_s:9.2f} {wall_s:9.2f}  {quality}", flush=True)

    print(f"{n} points{'' if options.points else ' (simulated)'}, Huber delta {DELTA:g} on log loss\n")
    print(f"{'what':58s} {'how many':>14s} {'CPU s':>9s} {'wall s':>9s}  quality")
    fit, c, w = timed(lambda: fit_law("chinchilla", table))
    say("ours, first fit, compilation included", f"{64} starts", c, w, fit.status)
    fit, c, w = timed(lambda: fit_law("chinchilla", table), 5)
    say("ours, again", "64 starts", c, w, f"objective {fit.objective:.10e}")
    many, ours_point, w = timed(lambda: fit_law("chinchilla", table, starts=STARTS), 3)
    say("ours, point fit", f"{STARTS} starts", ours_point, w, f"{many.agree:.1%} of starts at the optimum")
    refit(fit, np.ones((64, n)))
    draws, ours_boot, w = timed(lambda: cluster_bootstrap(fit, range(n), draws=RESAMPLES), 3)
    gap = largest_gap(fit, n)
    say(
        "ours, bootstrap of runs",
        f"{RESAMPLES} resamples",
        ours_boot,
        w,
        f"all converged: {draws.converged:.1%}, gap {gap:.0e}",
    )
    _, c, w = timed(lambda: cluster_bootstrap(fit, np.arange(n) // 5, draws=RESAMPLES), 3)
    say(
        "ours, bootstrap of clusters of five", f"{RESAMPLES} resamples", c, w, f"{c / ours_boot:.2f} times that of runs"
    )
    scattered = fit_law("chinchilla", table, delta="scatter")
    jackknife(scattered, range(n))
    _, c, w = timed(lambda: jackknife(scattered, range(n)), 3)
    say("ours, the default intervals (leave-one-out)", f"{n} fits", c, w, "")
    wide_deep(table, say)

    starts = list(itertools.product(*GRID))
    rng = np.random.default_rng(1)
    few = max(20, int(options.share * STARTS))
    chosen = rng.choice(len(starts), few, replace=False)
    for analytic in (False, True):
        found, c, w = timed(
            lambda analytic=analytic: [scipy_fit(starts[i], data, np.ones(n), analytic=analytic) for i in chosen]
        )
        values = np.array([DELTA * huber_in_logs(f.x, *data, np.ones(n))[0] for f in found])
        near = np.mean(values <= fit.objective * 1.001)
        scale = STARTS / few
        name = "SciPy L-BFGS-B, " + ("analytic gradient" if analytic else "numeric gradient, as published")
        say(
            f"{name} ({few} timed)",
            f"{STARTS} starts",
            c * scale,
            w * scale,
            f"{near:.1%}; {c * scale / ours_point:.0f} times ours",
        )
    start = [
        np.log(fit.params["A"]),
        np.log(fit.params["B"]),
        np.log(fit.params["E"]),
        fit.params["alpha"],
        fit.params["beta"],
    ]
    few = max(20, int(options.share * RESAMPLES))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=few).astype(float)
    for analytic in (False, True):
        found, c, w = timed(
            lambda analytic=analytic: [scipy_fit(start, data, weights, analytic=analytic) for weights in counts]
        )
        best = refit(fit, counts)[0].objective_m
        theirs = np.array(
            [DELTA * huber_in_logs(f.x, *data, weights)[0] for f, weights in zip(found, counts, strict=True)]
        )
        scale = RESAMPLES / few
        name = "SciPy loop, " + ("analytic gradient" if analytic else "numeric gradient")
        quality = f"largest gap {np.max(theirs - best):.0e}; {c * scale / ours_boot:.0f} times ours"
        say(f"{name} ({few} timed)", f"{RESAMPLES} resamples", c * scale, w * scale, quality)
    peer = kyo_takano(table, max(32, int(options.share * 3125)))
    if peer is None:
        print("kyo-takano/chinchilla is not installed: pip install chinchilla")
    else:
        make, objective = peer
        fitted, c, w = timed(make)
        scale = STARTS / fitted[1]
        quality = f"objective {objective(fitted) / fit.objective:.3f} of ours; {c * scale / ours_point:.0f} times ours"
        say(f"kyo-takano/chinchilla, log-Huber ({fitted[1]} timed)", f"{STARTS} starts", c * scale, w * scale, quality)
    print("\n| what | how many | CPU s | wall s | quality |\n|---|---|---|---|---|")
    for what, count, c, w, quality in rows:
        print(f"| {what} | {count} | {c:.2f} | {w:.2f} | {quality} |")


def largest_gap(fit: Any, n: int) -> float:
    """Over 4000 resamples, how far above the best of four descents from other places any resample ended."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
    ours = refit(fit, counts)[0].objective_m
    best = ours.copy()
    for seed, spread in enumerate((0.02, 0.1, 0.3)):
        rng = np.random.default_rng([seed, 7])
        moved = fit.theta_k + spread * rng.standard_normal((RESAMPLES, len(fit.theta_k)))
        best = np.minimum(best, refit(fit, counts, theta0_mk=moved)[0].objective_m)
    return float(np.max(ours - best))


def wide_deep(table: pd.DataFrame, say: Callable[..., None]) -> None:
    """The width/depth law on shapes that give the table's sizes, with losses that follow it."""
    if "width_depth" not in LAWS:
        return
    rng = np.random.default_rng(2)
    depth = rng.integers(6, 48, len(table))
    width = np.sqrt(table["N"].to_numpy() / 12 / depth)
    loss = 1.7 + 18 * width**-0.45 + 0.9 * depth**-0.6 + 1500 * table["D"].to_numpy() ** -0.36
    shapes = table.assign(width=width, depth=depth, loss=loss * np.exp(0.0075 * rng.standard_normal(len(table))))
    fit_law("width_depth", shapes)
    fit, c, w = timed(lambda: fit_law("width_depth", shapes, starts=STARTS))
    say("ours, width/depth law", f"{STARTS} starts", c, w, f"{fit.agree:.1%} of starts at the optimum")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
