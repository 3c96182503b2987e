"""How sure a fit is: the default intervals, sandwich covariance, leave-one-out and profile likelihood.

The estimator minimises a sum of Huber losses, so that its covariance is H^-1 M H^-1 (Huber 1967): H the slope of the
scores, M their covariance. With a delta far below the scatter that slope is a density of residuals at zero; it is
estimated in a window of the width that suits n rows, never from the few residuals that happen to be smaller than delta.

Letters: n rows, k free parameters, m draws or grid points.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from analysis import fit as fits
from analysis import newton, robust
from analysis.fit import Fit
from analysis.problem import natural_params, uncentred
from analysis.refusal import Refusal
from analysis.resample import EPSILON, Draws, cluster_bootstrap, codes, refuse_repeated, wild_cluster_bootstrap

_DRAWS = 2000


def leverage(fit: Fit) -> np.ndarray:
    """Share of its own residual that each row's fit takes up: shape (n,); they sum to k where all weights are one."""
    J_nk = newton.jacobian(fit.problem, fit.theta_k) * np.sqrt(fit.data.weights_n)[:, None]
    q_nk, r_kk = np.linalg.qr(J_nk)
    well = np.abs(np.diag(r_kk)) > 1e-10 * np.abs(np.diag(r_kk)).max()
    return (q_nk[:, well] ** 2).sum(axis=1)


def covariance(fit: Fit, clusters: Any = None, *, homoskedastic: bool = False) -> tuple[np.ndarray, int]:
    """Covariance (k, k) of the internal free parameters and its degrees of freedom.

    Clustered where `clusters` are given, with the factor G / (G - 1) (n - 1) / (n - k) and G - 1 degrees of freedom;
    else each row's score is divided by one minus its leverage (HC3, MacKinnon and White 1985), with n - k. With
    `homoskedastic` all rows are taken to scatter alike. Raises Refusal where the Hessian is singular or the fit lies on a
    bound.
    """
    J_nk = newton.jacobian(fit.problem, fit.theta_k)
    weights_n = fit.data.weights_n * ~fit.dropped_n
    residual_n = fit.residuals()
    n, k = int((weights_n > 0).sum()), fit.problem.k
    if n <= k:
        raise Refusal(f"{n} rows and {k} parameters leave no degree of freedom for a covariance; add runs")
    edge = (fit.theta_k <= fit.problem.low_k) | (fit.theta_k >= fit.problem.high_k)
    if edge.any():
        raise Refusal(f"{fit.free[int(np.argmax(edge))]} lies on its bound, where no covariance holds; use profile()")
    sd = robust.spread(residual_n[None], weights_n[None], k)[0]
    window = max(fit.delta, 1.06 * sd * n**-0.2)
    inside_n = weights_n * (np.abs(residual_n) < window) / window
    if fit.delta < fits.LEAST_SQUARES and inside_n.sum() > 0:
        # The average slope in every row: which rows happen to lie inside says nothing about them.
        inside_n = weights_n * inside_n.sum() / weights_n.sum()
    slope_kk = J_nk.T @ (inside_n[:, None] * J_nk)
    score_n = weights_n * np.clip(residual_n / fit.delta, -1, 1)
    if fit.quantile != 0.5:
        score_n = score_n * np.where(residual_n > 0, 2 * fit.quantile, 2 * (1 - fit.quantile))
    scale = np.sqrt(np.maximum(np.diag(slope_kk), 1e-300))
    if np.linalg.cond(slope_kk / np.outer(scale, scale)) > fits.MAX_CONDITION:
        raise Refusal(
            "the parameters are not identified (singular Hessian), so that no covariance holds; use profile()"
        )
    inverse_kk = np.linalg.inv(slope_kk / np.outer(scale, scale)) / np.outer(scale, scale)
    if homoskedastic:
        variance = (score_n**2).sum() / (n - k) / max((weights_n**2).sum() / n, 1e-300)
        middle_kk, dof = variance * (J_nk * weights_n[:, None] ** 2).T @ J_nk, n - k
    elif clusters is None:
        left_n = 1 - np.minimum(leverage(fit), 0.95)
        scored = J_nk * (score_n / left_n)[:, None]
        middle_kk, dof = scored.T @ scored, n - k
    else:
        labels_n, names = codes(clusters, fit, "clusters")
        scored = J_nk * score_n[:, None]
        summed = np.zeros((len(names), k))
        np.add.at(summed, labels_n, scored)
        G = int((np.abs(summed).sum(axis=1) > 0).sum())
        if G < 3:
            raise Refusal(f"{G} clusters: a clustered covariance needs 3 or more, and is poor below 10; add runs")
        middle_kk, dof = G / (G - 1) * (n - 1) / (n - k) * summed.T @ summed, G - 1
    return inverse_kk @ middle_kk @ inverse_kk, dof


def sandwich(
    fit: Fit, clusters: Any = None, *, homoskedastic: bool = False, draws: int = _DRAWS, seed: int = 0
) -> Draws:
    """Draws of the parameters from a t distribution with the sandwich's covariance: intervals and predictions are read off
    as from a bootstrap, at no refit at all. Covers where the fit is close to linear in its parameters."""
    V_kk, dof = covariance(fit, clusters, homoskedastic=homoskedastic)
    what = "rows alike" if homoskedastic else "HC3" if clusters is None else f"clustered, {dof + 1} clusters"
    return _t_draws(fit, V_kk, dof, f"sandwich covariance ({what})", draws=draws, seed=seed)


def jackknife(fit: Fit, clusters: Any, *, draws: int = _DRAWS, seed: int = 0) -> Draws:
    """Draws from a t distribution with the covariance of the fits that leave out one cluster each: the clustered method
    that is least too sure with few clusters (CV3J of MacKinnon, Nielsen and Webb 2023, with G - 1 degrees of freedom).

    Every one of the G fits goes through the whole estimator. Where every row is a cluster of its own, the variance is taken
    times (n - k) / n, by which leaving single rows out overstates it (HC3 against HC2), with n - k degrees of freedom.
    With a delta far below the scatter the fits jump from point to point and this is not consistent: use delta="scatter".
    """
    labels_n, _ = codes(clusters, fit, "clusters")
    present = np.unique(labels_n[fit.data.weights_n > 0])
    G = len(present)
    if G < 3:
        raise Refusal(f"{G} clusters: a jackknife needs 3 or more, and is poor below 6; add runs")
    weights_gn = fit.data.weights_n * (labels_n[None] != present[:, None])
    solved, _ = fits.estimate(fit, weights_gn)
    apart_gk = solved.theta_mk - solved.theta_mk.mean(axis=0)
    V_kk, dof = (G - 1) / G * apart_gk.T @ apart_gk, G - 1
    if (fit.data.weights_n > 0).sum() == G:
        dof = max(1, G - fit.problem.k)
        V_kk = V_kk * dof / G
    draws_ = _t_draws(fit, V_kk, dof, f"leave-one-out of {G} clusters", draws=draws, seed=seed)
    return replace(draws_, converged=float(np.mean(solved.converged_m)))


def _t_draws(fit: Fit, V_kk: np.ndarray, dof: int, kind: str, *, draws: int, seed: int) -> Draws:
    values, vectors = np.linalg.eigh(V_kk)
    root_kk = vectors * np.sqrt(np.maximum(values, 0.0))
    rng = np.random.default_rng(seed)
    t_m = np.sqrt(dof / rng.chisquare(dof, draws))
    apart_mk = (t_m[:, None] * rng.standard_normal((draws, len(values)))) @ root_kk.T

    def at(share: float) -> dict[str, np.ndarray]:
        theta_mk = np.clip(fit.theta_k + share * apart_mk, fit.problem.low_k, fit.problem.high_k)
        return natural_params(fit.problem, fit.data, theta_mk)

    return Draws(
        fit=fit,
        kind=f"{kind}, t with {dof} degrees of freedom",
        params=at(1.0),
        converged=1.0,
        near=(at(EPSILON), at(-EPSILON)),
    )


def default_method(fit: Fit) -> str:
    """The method whose 95% intervals cover nearest to 95% in simulation (docs/coverage.md): the jackknife where delta is
    of the size of the scatter, the bootstrap where it is far below, since fits there jump from point to point."""
    kept_n = fit.data.weights_n * ~fit.dropped_n
    sd = robust.spread(fit.residuals()[None], kept_n[None], fit.problem.k)[0]
    return "jackknife" if fit.delta >= 0.5 * sd else "bootstrap"


def draw_parameters(
    fit: Fit, *, run_ids: Any = None, clusters: Any = None, method: str | None = None, draws: int = 1000, seed: int = 0
) -> Draws:
    """Draws of the fitted parameters by `method` (one of METHODS; by default the one that covers best).

    Rows are taken to be independent runs only where nothing is said of them, or where `run_ids` are all different; rows
    that share one are refused (Refusal) without `clusters`, which holds a label for each row.
    """
    method = default_method(fit) if method is None else method
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: use one of {', '.join(METHODS)}")
    rows = len(fit.data.log_loss_n)
    if clusters is None and run_ids is not None:
        refuse_repeated([str(run_id) for run_id in run_ids])
    return METHODS[method](fit, range(rows) if clusters is None else clusters, draws, seed)


def _sandwich(fit: Fit, clusters: Any, draws: int, seed: int) -> Draws:
    labels = [str(label) for label in clusters]
    return sandwich(fit, clusters if len(set(labels)) < len(labels) else None, draws=draws, seed=seed)


# From a fit, labels of clusters, a number of draws and a seed.
METHODS: dict[str, Callable[[Fit, Any, int, int], Draws]] = {
    "jackknife": lambda fit, clusters, draws, seed: jackknife(fit, clusters, draws=draws, seed=seed),
    "bootstrap": lambda fit, clusters, draws, seed: cluster_bootstrap(fit, clusters, draws=draws, seed=seed),
    "wild": lambda fit, clusters, draws, seed: wild_cluster_bootstrap(fit, clusters, draws=draws, seed=seed),
    "sandwich": _sandwich,
}


# What simulations saw nominal 95% intervals cover where that missed 93-97% (docs/fitting.md): by the draws' kind, whether
# delta is of the size of the scatter, and whether there are few (about ten) clusters of several rows.
_MISSES = {
    ("leave-one-out", True, True): "with about ten clusters they are a little wide for exponents (97-98%)",
    ("leave-one-out", False, False): "with a delta far below the scatter they cover 87-92%: too narrow",
    ("sandwich", False, False): "with a delta far below the scatter they cover 91-94%: too narrow",
    ("sandwich", True, True): "with about ten clusters they cover 85-93%: too narrow",
    ("residuals", True, False): "with 30 rows they cover 88-91%: too narrow",
    ("residuals", False, False): "with a delta far below the scatter they cover 76-80%: too narrow",
    ("residuals", True, True): "with about ten clusters they cover 76-86%: too narrow",
    ("resampled", False, False): "with a delta far below the scatter and 30 rows they cover 97-99%: too wide",
    ("resampled", True, True): "with about ten clusters they cover 90% for losses (too narrow) and 98% for exponents",
}
_FEW = 15


def coverage_note(draws: Draws) -> str | None:
    """What simulations say of these intervals where they miss their nominal 95%; None where they were near it or where
    nothing was simulated that is like this fit."""
    fit = draws.fit
    kind = next((name for name in ("leave-one-out", "sandwich", "residuals", "resampled") if name in draws.kind), None)
    rows = int((fit.data.weights_n > 0).sum())
    units = next((int(word) for word in draws.kind.replace(",", " ").split() if word.isdigit()), rows)
    clustered = "cluster" in draws.kind and units < rows
    if kind is None or (clustered and units > _FEW) or (not clustered and rows > 60):
        return None
    said = _MISSES.get((kind, default_method(fit) == "jackknife", clustered))
    return None if said is None else f"Intervals ({draws.kind}): in simulations, {said}."


# --- profile likelihood ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The objective minimised over all else with one parameter held on a grid.

    `statistic_m` is twice its rise over the minimum, scaled so that it is F(1, dof) where the held value is true;
    `low` and `high` are where it crosses `threshold`, None where it does not before the end of the grid: that side is
    OPEN, the data do not bound the parameter there.
    """

    name: str
    estimate: float
    value_m: np.ndarray = field(repr=False)
    objective_m: np.ndarray = field(repr=False)
    statistic_m: np.ndarray = field(repr=False)
    threshold: float
    low: float | None
    high: float | None
    level: float
    better: float | None  # the held value at which the objective is lower than the fit's: the fit was no optimum

    def __str__(self) -> str:
        low = f"below {self.value_m[0]:.3g}" if self.low is None else f"{self.low:.6g}"
        high = f"above {self.value_m[-1]:.3g}" if self.high is None else f"{self.high:.6g}"
        sides = [side for side, end in (("below", self.low), ("above", self.high)) if end is None]
        note = f" (open {' and '.join(sides)})" if sides else ""
        return f"{self.name} = {self.estimate:.6g}, {self.level:.0%} profile interval {low} to {high}{note}"


def profile(
    fit: Fit,
    name: str,
    *,
    clusters: Any = None,
    points: int = 41,
    reach: float = 8.0,
    span: tuple[float, float] | None = None,
    level: float = 0.95,
) -> Profile:
    """Profile likelihood of one free parameter (`fit.free` names them), which may have open ends.

    The grid reaches `reach` standard errors to either side, or over `span` (natural values), and is refitted in one batch
    outwards from the point fit. The rise of the objective is scaled by the residuals' own density and score variance, so
    that it needs no distribution of the noise, and by the clustered variance of the parameter where `clusters` are given.
    """
    if name not in fit.free:
        raise ValueError(f"name = {name!r}: use one of the free parameters {', '.join(fit.free)}")
    problem, theta_k = uncentred(fit.problem, fit.data, fit.theta_k, name)
    fit = replace(fit, problem=problem, theta_k=theta_k)
    u = fit.free.index(name)
    p = next(p for p in fit.law.parameters if p.name == name.split("[")[0])
    at = theta_k[u]
    if span is not None:
        ends = np.log(span) if p.positive else np.asarray(span, float)
        grid_m = np.linspace(ends[0], ends[1], points)
    else:
        error = _standard_error(fit, u)
        # A square-root spacing has many points near the estimate and still reaches far.
        out = reach * error * np.linspace(0, 1, points // 2 + 1)[1:] ** 2
        grid_m = np.concatenate([at - out[::-1], [at], at + out])
    grid_m = np.unique(np.clip(grid_m, problem.low_k[u], problem.high_k[u]))
    held = np.broadcast_to(theta_k, (len(grid_m), len(theta_k))).copy()
    held[:, u] = grid_m
    low_mk = np.broadcast_to(problem.low_k, held.shape).copy()
    high_mk = np.broadcast_to(problem.high_k, held.shape).copy()
    low_mk[:, u] = high_mk[:, u] = grid_m
    weights = (fit.data.weights_n * ~fit.dropped_n)[None]
    # From the point fit, and from the whole path of an earlier pass: a profile is the lower envelope of its starts.
    solved, _ = fits.refit(fit, weights, theta0_mk=held, low_mk=low_mk, high_mk=high_mk)
    again = solved.theta_mk.copy()
    order = np.argsort(np.abs(grid_m - at))
    neighbour = {int(m): int(order[max(0, place - 1)]) for place, m in enumerate(order)}
    again = np.stack([solved.theta_mk[neighbour[m]] for m in range(len(grid_m))])
    again[:, u] = grid_m
    second, _ = fits.refit(fit, weights, theta0_mk=again, low_mk=low_mk, high_mk=high_mk)
    objective_m = np.minimum(solved.objective_m, second.objective_m)
    lowest = min(fit.objective, float(objective_m.min()))
    dof = _dof(fit, clusters)
    statistic_m = 2 * (objective_m - lowest) / _score_scale(fit, u, clusters)
    threshold = float(stats.f.ppf(level, 1, dof))
    value_m = np.exp(grid_m) if p.positive else grid_m
    best = int(np.argmin(objective_m))
    low, high = _ends(grid_m, statistic_m, threshold, best)
    better = float(value_m[best]) if objective_m[best] < fit.objective * (1 - 1e-9) else None
    return Profile(
        name=name,
        estimate=float(np.exp(at) if p.positive else at),
        value_m=value_m,
        objective_m=objective_m,
        statistic_m=statistic_m,
        threshold=threshold,
        low=None if low is None else float(np.exp(low) if p.positive else low),
        high=None if high is None else float(np.exp(high) if p.positive else high),
        level=level,
        better=better,
    )


def _standard_error(fit: Fit, u: int) -> float:
    """For the reach of a grid: where the covariance is refused the whole box is searched."""
    try:
        V_kk, _ = covariance(fit, homoskedastic=True)
        return float(np.sqrt(V_kk[u, u]))
    except Refusal:
        return 0.5


def _dof(fit: Fit, clusters: Any) -> int:
    kept = (fit.data.weights_n > 0) & ~fit.dropped_n
    if clusters is not None:
        return max(1, len({str(c) for c, k in zip(clusters, kept, strict=True) if k}) - 1)
    return max(1, int(kept.sum()) - fit.problem.k)


def _score_scale(fit: Fit, u: int, clusters: Any) -> float:
    """E psi^2 / E psi', by which twice the rise of the objective is divided (Ronchetti 1982); times the clustered over the
    unclustered variance of the parameter."""
    weights_n = fit.data.weights_n * ~fit.dropped_n
    residual_n, k = fit.residuals(), fit.problem.k
    n = int((weights_n > 0).sum())
    sd = robust.spread(residual_n[None], weights_n[None], k)[0]
    window = max(fit.delta, 1.06 * sd * n**-0.2)
    slope = float((weights_n * (np.abs(residual_n) < window)).sum() / weights_n.sum() / window)
    square = float((weights_n * np.clip(residual_n / fit.delta, -1, 1) ** 2).sum() / weights_n.sum())
    scale = square * n / max(1, n - k) / max(slope, 1e-300)
    if clusters is not None:
        alike, clustered = (covariance(fit, homoskedastic=True)[0], covariance(fit, clusters)[0])
        scale *= clustered[u, u] / alike[u, u]
    return scale * fit.delta


def _ends(
    grid_m: np.ndarray, statistic_m: np.ndarray, threshold: float, best: int
) -> tuple[float | None, float | None]:
    """Where the statistic crosses the threshold outwards from its minimum, linear between grid points."""

    def walk(path: range) -> float | None:
        for before, after in itertools.pairwise(path):
            if statistic_m[after] > threshold:
                share = (threshold - statistic_m[before]) / (statistic_m[after] - statistic_m[before])
                return float(grid_m[before] + share * (grid_m[after] - grid_m[before]))
        return None

    return walk(range(best, -1, -1)), walk(range(best, len(grid_m)))
