"""Fits of scaling laws: Huber loss of log-residuals, many starts, one batched float64 program.

The objective is that of Hoffmann et al. 2022 and Besiroglu et al. 2024 (arXiv:2404.10102): the SUM over runs of
huber(log predicted - log observed), delta 1e-3, which is nearly the sum of absolute deviations. Least squares on the
logarithm is `delta=LEAST_SQUARES`; `quantile=0.9` weights a loss above the curve nine times one below it. newton.py
minimises it. A fit has converged when the whole Newton step is small, a test that no scale of the objective changes
(stopping on the objective itself is what gave Hoffmann's published parameters).

Resamples are weights, so that every program has the shape of the data: one compilation serves the point fit, all
resamples, the sweep over delta and the fits that leave rows out.

Letters: n rows, k free parameters, m members of a batch (starts, or resamples).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis import newton, robust
from analysis.laws import LAWS, Law, by_arm
from analysis.newton import Problem, Solved, float64_on_cpu
from analysis.problem import Data, build, codes, free_names, natural_params, nearest, prepare, random_starts
from analysis.refusal import Refusal

DELTA = 1e-3
LEAST_SQUARES = 1e3  # no log-residual is as large, so that every one is squared
STARTS = 64
MAX_CONDITION = 1e10
FLAT = 1e-8  # an eigenvalue of the scaled Hessian, as a share of the largest, below which its direction is free
_MOVED = 1e-6


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. `params` are natural, in the units of the columns; one for each arm where the law says so.

    `gradient_norm` is of the summed objective by the internal parameters (logarithms, centred columns), `agree` the
    share of starts that end within 0.1% of the lowest objective, `condition` that of the Hessian scaled to a unit
    diagonal, `flat_directions` the parameters that can move together without changing the fit, `rms` the weighted root
    mean square of log-residuals. `status` is 'converged' or says what is wrong. `fixed` and `tied` are as they were
    asked for; `scatter` says that delta was taken from the residuals, `dropped_n` which rows the rule `outliers` left out.
    """

    law: Law
    params: Mapping[str, float | np.ndarray]
    arms: tuple[str, ...]
    objective: float
    gradient_norm: float
    agree: float
    condition: float
    flat_directions: tuple[str, ...]
    status: str
    rms: float
    rows: int
    delta: float
    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    data: Data = field(repr=False)
    problem: Problem = field(repr=False)
    theta_k: np.ndarray = field(repr=False)
    hessian_kk: np.ndarray = field(repr=False)
    dropped_n: np.ndarray = field(repr=False)
    scatter: bool = False
    outliers: str | None = None

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    @property
    def quantile(self) -> float:
        return self.problem.tau

    @property
    def free(self) -> tuple[str, ...]:
        """The names of the k free parameters, A[arm] where there is one for each arm."""
        return free_names(self.problem, self.arms)

    @property
    def flat(self) -> dict[str, float]:
        """Every parameter as one number, named A[arm] where there is one for each arm."""
        return flatten(self.law, self.params, self.arms)

    def predict(self, **columns: Any) -> np.ndarray:
        """Loss at the given columns, by the law's names; `arm` takes arms' names."""
        return predict(self.law, self.params, self.arms, columns)

    def residuals(self) -> np.ndarray:
        """log(observed) - log(fitted) of every row."""
        columns = dict(self.data.raw)
        if self.law.by_arm:
            columns["arm"] = np.asarray(self.arms)[self.data.arm_n]
        return self.data.log_loss_n - np.log(self.predict(**columns))


def fit_law(
    law: Law | str,
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    arm: str = "arm",
    weights: Any = None,
    delta: float | str = DELTA,
    outliers: str | None = None,
    quantile: float = 0.5,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    per_arm: Sequence[str] = (),
    starts: int = STARTS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fits `law` (a Law or its name in LAWS) to a frame or a mapping of columns.

    `columns` maps the law's names to the table's where they differ, such as {"N": "parameters_body"}. `fixed` holds
    parameters at natural values ({"alpha": 0.35}, or {"rho_N[base]": 1.0} of one arm), `tied` makes one equal to another
    ({"beta": "alpha"}), `per_arm` gives every value of the column `arm` its own value of the named parameters.
    `delta="scatter"` takes Huber's constant from the residuals, `outliers` names a rule of robust.py. Raises ValueError
    for columns that are not there, not finite or not positive, and Refusal where there are too few rows or distinct
    values for the law.
    """
    law = by_arm(named(law), *per_arm) if per_arm else named(law)
    fixed, tied = dict(fixed or {}), dict(tied or {})
    if delta != robust.SCATTER and not (isinstance(delta, float | int) and 0 < delta <= LEAST_SQUARES):
        raise ValueError(f"delta = {delta!r}: use a number in (0, {LEAST_SQUARES:g}], 1e-3 is usual, or 'scatter'")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile = {quantile!r}: use a number between 0 and 1; 0.5 fits the median")
    if starts < 2:
        raise ValueError(f"starts = {starts!r}: use at least 2, so that starts can disagree")
    keep = robust.rule(outliers) if outliers is not None else None
    data = prepare(law, table, columns=columns, loss=loss, weights=weights, arm=arm)
    problem = build(law, data, fixed, tied, quantile)
    used = int((data.weights_n > 0).sum())
    if used <= problem.k:
        raise Refusal(
            f"{law.name} has {problem.k} parameters and {used} runs: fit at least {problem.k + 1} finished runs"
        )
    theta0_mk = random_starts(problem, data, starts, seed)

    def fitted(weights_n: np.ndarray, delta: float) -> Fit:
        return _fitted(problem, replace(data, weights_n=weights_n), theta0_mk, delta, fixed, tied, progress)

    if delta == robust.SCATTER:
        squares = fitted(data.weights_n, LEAST_SQUARES)
        delta = float(robust.huber_delta(squares.residuals()[None], data.weights_n[None], problem.k, DELTA)[0])
        fit = replace(fitted(data.weights_n, delta), scatter=True)
    else:
        fit = fitted(data.weights_n, float(delta))
    if keep is None:
        return fit
    kept_n = keep(fit.residuals()[None], data.weights_n[None], data.log_loss_n[None])[0]
    cut = fitted(data.weights_n * kept_n, fit.delta)
    return replace(cut, scatter=fit.scatter, outliers=outliers, data=data, dropped_n=~kept_n & (data.weights_n > 0))


def _fitted(
    problem: Problem,
    data: Data,
    theta0_mk: np.ndarray,
    delta: float,
    fixed: Mapping[str, float],
    tied: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> Fit:
    """The lowest optimum that the starts find, and what they and its Hessian say of it."""
    solved = newton.solve(
        problem,
        theta0_mk,
        data.weights_n[None],
        data.log_loss_n[None],
        deltas_sm=newton.deltas_down_to(delta),
        progress=progress,
    )
    best = int(np.argmin(np.where(np.isfinite(solved.objective_m), solved.objective_m, np.inf)))
    theta_k, lowest = solved.theta_mk[best], solved.objective_m[best]
    # Below the floor all objectives are rounding: data without noise.
    floor = 1e-20 * data.weights_n.sum()
    agree = float(np.mean(solved.objective_m <= lowest * 1.001 + floor))
    moved = float(np.abs(theta_k - theta0_mk[best]).max())
    condition, flat_directions = _conditioning(solved.hessian_mkk[best], free_names(problem, data.arms))
    params = natural_params(problem, data, theta_k[None])
    fit = Fit(
        law=problem.law,
        params={name: value[0] if value.ndim == 2 else float(value[0]) for name, value in params.items()},
        arms=data.arms,
        objective=float(lowest),
        gradient_norm=float(solved.gradient_m[best]),
        agree=agree,
        condition=condition,
        flat_directions=flat_directions,
        status=_status(problem, data, theta_k, solved, best, condition=condition, moved=moved, agree=agree),
        rms=0.0,
        rows=int((data.weights_n > 0).sum()),
        delta=delta,
        fixed=fixed,
        tied=tied,
        data=data,
        problem=problem,
        theta_k=theta_k,
        hessian_kk=solved.hessian_mkk[best],
        dropped_n=np.zeros(len(data.weights_n), bool),
    )
    return replace(fit, rms=float(np.sqrt(np.average(fit.residuals() ** 2, weights=data.weights_n))))


def refit(
    fit: Fit,
    weights_mn: np.ndarray,
    log_loss_mn: np.ndarray | None = None,
    *,
    theta0_mk: np.ndarray | None = None,
    delta: float | np.ndarray | None = None,
    low_mk: np.ndarray | None = None,
    high_mk: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Solved, dict[str, np.ndarray]]:
    """The law fitted again from the point fit (or `theta0_mk`) with each row of weights, of losses and of deltas (one, or
    one for each member): what the solver says of every member, and its natural parameters, of shape (m,) or (m, arms).
    `low_mk` and `high_mk` bound internal parameters; equal ones hold a parameter."""
    losses = fit.data.log_loss_n[None] if log_loss_mn is None else log_loss_mn
    deltas_sm = newton.deltas_down_to(fit.delta if delta is None else delta)
    sizes = [len(weights_mn), len(losses), deltas_sm.shape[1], *(len(a) for a in (theta0_mk, low_mk) if a is not None)]
    start = fit.theta_k if theta0_mk is None else theta0_mk
    solved = newton.solve(
        fit.problem,
        np.broadcast_to(start, (max(sizes), len(fit.theta_k))),
        weights_mn,
        losses,
        deltas_sm=deltas_sm,
        low_mk=low_mk,
        high_mk=high_mk,
        progress=progress,
    )
    return solved, natural_params(fit.problem, fit.data, solved.theta_mk)


def estimate(
    fit: Fit,
    weights_mn: np.ndarray,
    log_loss_mn: np.ndarray | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Solved, dict[str, np.ndarray]]:
    """The whole estimator applied to every member: as `refit`, with delta and the outlier rule found anew in each, where
    the fit has them."""
    if not fit.scatter and fit.outliers is None:
        return refit(fit, weights_mn, log_loss_mn, progress=progress)
    losses = fit.data.log_loss_n[None] if log_loss_mn is None else log_loss_mn
    delta: float | np.ndarray = fit.delta
    if fit.scatter:
        _, params = refit(fit, weights_mn, losses, delta=LEAST_SQUARES)
        delta = robust.huber_delta(residuals_of(fit, params, losses), weights_mn, fit.problem.k, DELTA)
    if fit.outliers is not None:
        _, params = refit(fit, weights_mn, losses, delta=delta)
        residual_mn = residuals_of(fit, params, losses)
        weights_mn = weights_mn * robust.rule(fit.outliers)(residual_mn, weights_mn, losses)
    return refit(fit, weights_mn, losses, delta=delta, progress=progress)


def residuals_of(fit: Fit, params: Mapping[str, np.ndarray], log_loss_mn: np.ndarray) -> np.ndarray:
    """log(observed) - log(fitted) of every member and row, for parameters that lead with the members' axis."""
    columns = dict(fit.data.raw)
    if fit.law.by_arm:
        columns["arm"] = np.asarray(fit.arms)[fit.data.arm_n]
    return log_loss_mn - np.log(predict(fit.law, params, fit.arms, columns))


def named(law: Law | str) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"law = {law!r}: {nearest(law, LAWS)}use one of {', '.join(LAWS)}, or pass a Law")
    return LAWS[law]


def predict(law: Law, params: Mapping[str, Any], arms: Sequence[str], columns: Mapping[str, Any]) -> np.ndarray:
    """Loss at `columns`, which broadcast together. Parameters have no axis, or lead with one for draws: the result then
    is (draws, *shape). Those with one for each arm have that axis last, and `columns["arm"]` names the arms."""
    missing = [name for name in (*law.columns, *(("arm",) if law.by_arm else ())) if name not in columns]
    if missing:
        raise ValueError(f"column {missing[0]!r} is missing: {law.name} predicts from {', '.join(law.columns)}")
    x = {name: np.asarray(columns[name], float) for name in law.columns}
    shape = np.broadcast_shapes(*(value.shape for value in x.values()), np.shape(columns.get("arm", 0)))
    values = {}
    for p in law.parameters:
        value = np.asarray(params[p.name], float)
        if p.per_arm:
            value = value[..., np.broadcast_to(codes(columns["arm"], arms), shape)]
        else:
            value = value.reshape(value.shape + (1,) * len(shape))
        values[p.name] = value
    with float64_on_cpu():
        return np.asarray(law.predict(values, x))


def flatten(law: Law, params: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """One entry for each number (or array of draws): those with one for each arm are split as A[arm]."""
    flat: dict[str, Any] = {}
    for p in law.parameters:
        value = params[p.name]
        if p.per_arm:
            flat |= {f"{p.name}[{arm}]": value[..., index] for index, arm in enumerate(arms)}
        else:
            flat[p.name] = value
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in flat.items()}


# --- whether to trust it ---------------------------------------------------------------------------------------------


def _conditioning(hessian_kk: np.ndarray, names: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """Condition number of the Hessian scaled to a unit diagonal, and what its flat directions are made of."""
    scale = np.sqrt(np.maximum(np.diag(hessian_kk), 1e-300))
    scaled = hessian_kk / np.outer(scale, scale)
    if not np.isfinite(scaled).all():
        return np.inf, ()
    values, vectors = np.linalg.eigh(scaled)
    flat = []
    for value, vector in zip(values, vectors.T, strict=True):
        if value < FLAT * values[-1]:
            part = [
                name for name, share in zip(names, np.abs(vector), strict=True) if share > 0.3 * np.abs(vector).max()
            ]
            flat.append(" with ".join(part))
    return float(values[-1] / values[0]) if values[0] > 0 else np.inf, tuple(flat)


def _status(
    problem: Problem, data: Data, theta_k: np.ndarray, solved: Solved, best: int, *, condition: float, moved: float,
    agree: float,
) -> str:  # fmt: skip
    names, starts = free_names(problem, data.arms), len(solved.objective_m)
    edges = zip(names, theta_k, problem.low_k, problem.high_k, strict=True)
    on_bound = [name for name, at, low, high in edges if at <= low or at >= high]
    if not np.isfinite(solved.objective_m[best]):
        return "no finite objective: the law is not defined on these columns"
    if moved < _MOVED:
        return "did not move from its start"
    if on_bound:
        return f"{', '.join(on_bound)} on a bound: the data do not determine it"
    if not solved.converged_m[best]:
        return f"not converged: the last Newton step is {solved.step_m[best]:.1e}"
    if not condition < MAX_CONDITION:
        return f"not identified: condition number {condition:.1e}"
    if agree < 1.5 / starts:
        return f"one of {starts} starts found it: there may be a lower optimum"
    return "converged"
