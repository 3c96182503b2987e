"""Approaches 1 and 2 to the compute optimum, power laws through points, and all three side by side.

    envelope(table)                      1: the runs that no cheaper run beats
    isoflop_optimum(isoflop_minima(...)) 2: the least loss over sizes at each budget
    optima(table)                        1, 2, and 3 (optimum.parametric) of one table

Letters: m members (the point estimate, then draws), c budgets or values of compute, g groups of runs of equal compute.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np

from analysis import fit as fits
from analysis.fit import LEAST_SQUARES, Fit, fit_law
from analysis.isoflop import TOLERANCE, IsoFlop, Method, Noise, budgets, isoflop_minima
from analysis.laws import Law
from analysis.optimum import CAVEATS, SIX_N, Cost, Optimum, bounded, cost_of_token, parametric, with_compute
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import cluster_bootstrap

DRAWS = 1000


def optima(
    table: Any,
    *,
    law: Law | str = "chinchilla",
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    clusters: Any = None,
    noise: Noise | None = None,
    method: Method = "akima",
    flops_per_token: Cost = SIX_N,
    tolerance: float = TOLERANCE,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
    **of_fit: Any,
) -> dict[str, Optimum | Refused]:
    """The three approaches on one table (columns N, D, loss, and C where it is not flops_per_token(N) D).

    `clusters` labels rows that are one run; without it every row is one. `of_fit` goes to fit_law.
    """
    full = with_compute(table, columns=columns, loss=loss, flops_per_token=flops_per_token)
    labels = np.arange(len(full["loss"])) if clusters is None else clusters

    def fitted() -> Optimum:
        others = {name: (columns or {}).get(name, name) for name in fits.named(law).columns if name not in full}
        every = {**{str(name): table[name] for name in table}, **full}
        point = fit_law(law, every, columns=others, seed=seed, **of_fit)
        resampled = cluster_bootstrap(point, clusters=labels, draws=draws, seed=seed)
        return parametric(resampled, flops_per_token=flops_per_token, level=level)

    def grouped() -> Optimum:
        found = isoflop_minima(full, noise=noise, method=method, tolerance=tolerance, draws=draws, seed=seed)
        return isoflop_optimum(found, flops_per_token=flops_per_token, level=level)

    first = attempt(
        lambda: envelope(
            full,
            clusters=labels,
            tolerance=tolerance,
            flops_per_token=flops_per_token,
            draws=draws,
            level=level,
            seed=seed,
        )
    )
    return {"envelope": first, "iso-FLOP": attempt(grouped), "parametric": attempt(fitted)}


# --- approach 1 ------------------------------------------------------------------------------------------------------


def envelope(
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    clusters: Any = None,
    flops_per_token: Cost = SIX_N,
    tolerance: float = TOLERANCE,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Optimum:
    """Approach 1: the best run at each compute that no cheaper one beats. A plot rather than an estimate: optimistic,
    since it is a minimum over noise. Draws resample rows, or whole clusters. Raises Refusal where fewer than 3 runs
    remain."""
    full = with_compute(table, columns=columns, loss=loss, flops_per_token=flops_per_token)
    label_n = budgets(full["C"], tolerance)
    groups = label_n.max() + 1
    log_C_g = np.bincount(label_n, weights=np.log(full["C"])) / np.bincount(label_n)
    _, cluster_n = np.unique(
        np.arange(len(label_n)) if clusters is None else [str(name) for name in clusters], return_inverse=True
    )
    if len(cluster_n) != len(label_n):
        raise ValueError(f"clusters has {len(cluster_n)} labels: give one for each of the {len(label_n)} rows")
    count = cluster_n.max() + 1
    rng = np.random.default_rng(seed)
    drawn_mk = np.ones((1 + draws, count))
    drawn_mk[1:] = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    log_N_mg, loss_mg = np.zeros((2, 1 + draws, groups))
    for g in range(groups):
        rows = np.flatnonzero(label_n == g)
        loss_mr = np.where(drawn_mk[:, cluster_n[rows]] > 0, full["loss"][rows], np.inf)
        best_m = loss_mr.argmin(axis=1)
        log_N_mg[:, g], loss_mg[:, g] = np.log(full["N"][rows[best_m]]), loss_mr.min(axis=1)
    before_mg = np.minimum.accumulate(np.concatenate([np.full((1 + draws, 1), np.inf), loss_mg], axis=1), axis=1)[
        :, :-1
    ]
    weights_mg = (loss_mg < before_mg).astype(float)
    points = int(weights_mg[0].sum())
    if points < 3:
        raise Refusal(f"{points} runs are better than every cheaper one and a power law needs 3: run more budgets")
    return _power_law(
        approach="envelope",
        log_C=log_C_g,
        log_N_mc=log_N_mg,
        loss_mc=loss_mg,
        weights_mc=weights_mg,
        flops_per_token=flops_per_token,
        level=level,
        kind=f"percentile, {'rows' if clusters is None else f'{count} clusters'} resampled",
    )


# --- approach 2 ------------------------------------------------------------------------------------------------------


def isoflop_optimum(
    minima: Mapping[tuple[str, float], IsoFlop | Refused],
    *,
    arm: str | None = None,
    flops_per_token: Cost = SIX_N,
    weighted: bool = True,
    level: float = 0.95,
) -> Optimum:
    """Approach 2: log N* regressed on log C over the minima of one arm, weighted by 1 / sd(log N*)^2 (Porian et al.
    2024).

    The point goes through the medians of the minima's draws, each draw through one draw of every budget; a draw at the
    edge of the sizes is taken at the edge. Biased as `caveat` says: `parametric` is the estimate to report. Raises
    Refusal with fewer than 3 minima.
    """
    arms = sorted({name for name, _ in minima})
    if arm is None and len(arms) > 1:
        raise ValueError(f"minima of several arms, {', '.join(arms)}: name one with arm=")
    of_arm = [m for (name, _), m in sorted(minima.items(), key=lambda item: item[0][1]) if arm in (None, name)]
    found = [m for m in of_arm if isinstance(m, IsoFlop)]
    if len(found) < 3:
        why = "; ".join(m.reason for m in of_arm if isinstance(m, Refused))
        raise Refusal(
            f"{len(found)} budgets have a minimum over sizes and a power law needs 3" + (f": {why}" if why else "")
        )
    log_N_mc = np.log([[m.N_median for m in found]])
    loss_mc = np.array([[m.loss for m in found]])
    if all(m.log_N_b.size for m in found):
        edges = np.log([m.N_range for m in found])
        log_N_mc = np.vstack(
            [log_N_mc, np.clip(np.stack([m.log_N_b for m in found], axis=1), edges[:, 0], edges[:, 1])]
        )
        loss_mc = np.vstack([loss_mc, np.exp(np.stack([m.log_loss_b for m in found], axis=1))])
    sd = np.array([m.log_N_sd for m in found])
    weights = 1 / sd**2 if weighted else np.ones(len(sd))
    return _power_law(
        approach="iso-FLOP",
        log_C=np.log([m.C for m in found]),
        log_N_mc=log_N_mc,
        loss_mc=loss_mc,
        weights_mc=np.broadcast_to(weights / weights.max(), log_N_mc.shape),
        flops_per_token=flops_per_token,
        level=level,
        kind=f"percentile, noise of runs added ({found[0].noise:.2g} nats, {found[0].noise_source})",
    )


def _power_law(
    *,
    approach: Literal["envelope", "iso-FLOP"],
    log_C: np.ndarray,
    log_N_mc: np.ndarray,
    loss_mc: np.ndarray,
    weights_mc: np.ndarray,
    flops_per_token: Cost,
    level: float,
    kind: str,
) -> Optimum:
    log_D_mc = log_C - np.log(cost_of_token(flops_per_token, np.exp(log_N_mc)))
    (N_at_0, a_m), (D_at_0, b_m) = (_regressed(log_C, y_mc, weights_mc) for y_mc in (log_N_mc, log_D_mc))
    used = np.exp(log_C[weights_mc[0] > 0])
    proportional = not callable(flops_per_token)

    def sizes_at(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = np.log(C)
        return np.exp(N_at_0[:, None] + a_m[:, None] * x), np.exp(D_at_0[:, None] + b_m[:, None] * x)

    @cache
    def curve() -> tuple[Fit, dict[str, np.ndarray]] | Refused:
        return attempt(lambda: _loss_curve(np.exp(log_C), loss_mc, weights_mc))

    def losses_at(C: np.ndarray) -> np.ndarray:
        made = curve()
        if isinstance(made, Refused):
            raise Refusal(made.reason)
        fit, params = made
        return fits.predict(fit.law, params, fit.arms, {"C": C})

    return Optimum(
        approach=approach,
        a=float(a_m[0]),
        b=float(b_m[0]),
        a_interval=bounded(a_m[1:], level),
        b_interval=bounded(b_m[1:], level),
        interval_kind=kind if len(a_m) > 1 else "none: the noise of a run is unknown",
        level=level,
        caveat=CAVEATS[approach],
        measured=(float(used.min()), float(used.max())),
        points=len(used),
        G=float(np.exp(N_at_0[0] + a_m[0] * np.log(6))) if proportional else None,
        sizes_at=sizes_at,
        losses_at=losses_at,
    )


def _regressed(x: np.ndarray, y_mc: np.ndarray, weights_mc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope of each member; NaN where it has no two points of weight."""
    total = weights_mc.sum(axis=1)
    x_mean, y_mean = (weights_mc * x).sum(axis=1) / total, (weights_mc * y_mc).sum(axis=1) / total
    dx = x - x_mean[:, None]
    squares = (weights_mc * dx**2).sum(axis=1)
    enough = (weights_mc > 0).sum(axis=1) > 1
    slope = np.where(
        enough, (weights_mc * dx * (y_mc - y_mean[:, None])).sum(axis=1) / np.where(enough, squares, 1), np.nan
    )
    return y_mean - slope * x_mean, slope


def _loss_curve(C: np.ndarray, loss_mc: np.ndarray, weights_mc: np.ndarray) -> tuple[Fit, dict[str, np.ndarray]]:
    """L(C) through the least losses of each member, by least squares: their noise is close to normal."""
    reasons = []
    used_mc = (weights_mc > 0) & np.isfinite(loss_mc)
    table = {"C": C, "loss": np.where(np.isfinite(loss_mc[0]), loss_mc[0], 1.0)}
    for law in ("power_law_with_asymptote", "power_law"):
        fit = attempt(lambda law=law: fit_law(law, table, weights=used_mc[0].astype(float), delta=LEAST_SQUARES))
        if isinstance(fit, Fit) and fit.converged:
            log_loss_mc = np.log(np.where(used_mc, loss_mc, 1.0))
            _, params = fits.refit(fit, used_mc.astype(float), log_loss_mc)
            return fit, params
        reasons.append(fit.reason if isinstance(fit, Refused) else f"{law}: {fit.status}")
    raise Refusal(f"no curve of the least loss: {'; '.join(reasons)}")
