"""Fits of scaling laws: Huber loss of log-residuals, many starts, one batched float64 program.

The objective is that of Hoffmann et al. 2022 and Besiroglu et al. 2024 (arXiv:2404.10102): the SUM over runs of
huber(log predicted - log observed), delta 1e-3, which is nearly the sum of absolute deviations. It is minimised by a
damped Newton method with exact derivatives from all starts at once, while delta falls from 0.1 to its value. A fit has
converged when the whole Newton step is small, a test that no scale of the objective changes (stopping on the objective
itself is what gave Hoffmann's published parameters). Least squares on the logarithm is `delta=LEAST_SQUARES`.

Resamples are weights, so that every program has the shape of the data: one compilation serves the point fit, all
resamples, the sweep over delta and the fits that leave rows out.

Letters: n rows, k free parameters, b batch (starts, or starts of every resample).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.laws import LAWS, Law, Parameter, Values
from analysis.refusal import Refusal

DELTA = 1e-3
LEAST_SQUARES = 1e3  # no log-residual is as large, so that every one is squared
STARTS = 64
STEP_TOLERANCE = 1e-7  # of the Newton step, in logarithms of parameters
MAX_CONDITION = 1e10
# Iterations at each delta above the last, and at the last. Resamples start near their optimum and need fewer.
_ANNEALING_STEPS, _FINAL_STEPS = 12, 400
_WARM_ANNEALING_STEPS, _WARM_FINAL_STEPS = 4, 120


@contextmanager
def float64_on_cpu() -> Iterator[None]:
    """float64 for what runs inside, on the CPU; the caller's precision and device are as before afterwards."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "JAX_PLATFORMS leaves out the CPU, where fits run in float64; add 'cpu' to its list"
        ) from error
    with jax.enable_x64(True), jax.default_device(cpu), jax.numpy_rank_promotion("allow"):
        yield


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. `params` are natural, in the units of the columns; one for each arm where the law says so.

    `gradient_norm` is of the summed objective by the internal parameters (logarithms, centred columns), `agree` the
    share of starts that end within 0.1% of the lowest objective, `condition` that of the Hessian scaled to a unit
    diagonal, `rms` the weighted root mean square of log-residuals. `status` is 'converged' or says what is wrong.
    """

    law: Law
    params: Mapping[str, float | np.ndarray]
    arms: tuple[str, ...]
    objective: float
    gradient_norm: float
    agree: float
    condition: float
    status: str
    rms: float
    rows: int
    delta: float
    data: "Data" = field(repr=False)
    theta_k: np.ndarray = field(repr=False)

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    @property
    def flat(self) -> dict[str, float]:
        """Every parameter as one number, named A[arm] where there is one for each arm."""
        return flatten(self.params, self.arms)

    def predict(self, **columns: Any) -> np.ndarray:
        """Loss at the given columns, by the law's names; `arm` takes arms' names."""
        columns_n = {name: np.asarray(value, float) for name, value in columns.items() if name != "arm"}
        if self.law.by_arm:
            columns_n["arm"] = codes(columns["arm"], self.arms)
        with float64_on_cpu():
            return np.asarray(self.law.predict(self.params, columns_n))

    def residuals(self) -> np.ndarray:
        """log(observed) - log(fitted) of every row."""
        with float64_on_cpu():
            fitted = self.law.predict(self.params, self.data.raw)
        return self.data.log_loss_n - np.log(np.asarray(fitted))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Columns of n rows that passed every check: `raw` as given, `centred` divided by their geometric means."""

    raw: Mapping[str, np.ndarray]
    centred: Mapping[str, np.ndarray]
    centre: Mapping[str, float]
    log_loss_n: np.ndarray
    weights_n: np.ndarray
    arms: tuple[str, ...]


def fit_law(
    law: Law | str,
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    weights: Any = None,
    delta: float = DELTA,
    starts: int = STARTS,
    seed: int = 0,
) -> Fit:
    """Fits `law` (a Law or its name in LAWS) to a frame or a mapping of columns.

    `columns` maps the law's names to the table's where they differ, such as {"N": "parameters_body"}; laws by arm
    read the column `arm`. Raises ValueError for columns that are not there, not finite or not positive, and Refusal
    where there are too few rows or distinct values for the law.
    """
    law = named(law)
    if not 0 < delta <= LEAST_SQUARES:
        raise ValueError(f"delta = {delta!r}: use a number in (0, {LEAST_SQUARES:g}]; 1e-3 is usual")
    if starts < 2:
        raise ValueError(f"starts = {starts!r}: use at least 2, so that starts can disagree")
    data = prepare(law, table, columns=columns, loss=loss, weights=weights)
    theta0_bk = random_starts(law, len(data.arms), starts, seed)
    solved = solve(law, data, theta0_bk, data.weights_n[None], data.log_loss_n[None], delta=delta)
    best = int(np.argmin(solved.objective_b))
    theta_k = solved.theta_bk[best]
    lowest = solved.objective_b[best]
    # Below the floor all objectives are rounding: data without noise.
    floor = 1e-20 * data.weights_n.sum()
    agree = float(np.mean(solved.objective_b <= lowest * 1.001 + floor))
    moved = float(np.abs(theta_k - theta0_bk[best]).max())
    condition = _condition(solved.hessian_bkk[best])
    params = natural_params(law, theta_k[None], data.centre, len(data.arms))
    fit = Fit(
        law=law,
        params={name: value[0] if value.ndim == 2 else float(value[0]) for name, value in params.items()},
        arms=data.arms,
        objective=float(lowest),
        gradient_norm=float(solved.gradient_b[best]),
        agree=agree,
        condition=condition,
        status=_status(
            law, data.arms, theta_k, solved, best, condition=condition, moved=moved, agree=agree, starts=starts
        ),
        rms=0.0,
        rows=int((data.weights_n > 0).sum()),
        delta=delta,
        data=data,
        theta_k=theta_k,
    )
    rms = float(np.sqrt(np.average(fit.residuals() ** 2, weights=data.weights_n)))
    return Fit(**{**fit.__dict__, "rms": rms})


def named(law: Law | str) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"law = {law!r}: use one of {', '.join(LAWS)}, or pass a Law")
    return LAWS[law]


def codes(arm: Any, arms: Sequence[str]) -> np.ndarray:
    """Arms' names as indices into `arms`."""
    known = {name: index for index, name in enumerate(arms)}
    unknown = sorted({str(name) for name in np.atleast_1d(arm)} - set(known))
    if unknown:
        raise ValueError(f"arm = {unknown[0]!r}: the fit has {', '.join(arms)}")
    return np.asarray([known[str(name)] for name in np.atleast_1d(arm)]).reshape(np.shape(arm))


def flatten(params: Mapping[str, Any], arms: Sequence[str]) -> dict[str, float]:
    flat = {}
    for name, value in params.items():
        if np.ndim(value):
            flat |= {f"{name}[{arm}]": float(value[index]) for index, arm in enumerate(arms)}
        else:
            flat[name] = value
    return flat


def prepare(law: Law, table: Any, *, columns: Mapping[str, str] | None, loss: str, weights: Any) -> Data:
    """The law's columns of `table`, checked, with zero-weight rows kept."""
    columns = columns or {}
    raw = {name: _column(table, columns.get(name, name)) for name in law.columns}
    loss_n = _column(table, loss)
    weights_n = np.ones(len(loss_n)) if weights is None else np.asarray(weights, float)
    if weights_n.shape != loss_n.shape or not np.all(np.isfinite(weights_n)) or np.any(weights_n < 0):
        raise ValueError(f"weights of shape {weights_n.shape}: give {len(loss_n)} finite numbers that are not negative")
    used = weights_n > 0
    arms: tuple[str, ...] = ()
    if law.by_arm:
        names = [str(name) for name in table["arm"]]
        arms = tuple(dict.fromkeys(names))
        raw["arm"] = codes(names, arms)
        lost = [arm for index, arm in enumerate(arms) if not np.any(used & (raw["arm"] == index))]
        if lost:
            raise Refusal(f"arm {lost[0]!r} has no row with weight, so its parameters are not determined")
    for name, least in law.distinct:
        # Sizes that differ by rounding are one size.
        found = len(np.unique(np.round(np.log(raw[name][used]), 6)))
        if found < least:
            raise Refusal(f"{law.name} needs {least} distinct values of {name} and has {found}: add sizes or budgets")
    free = sum(len(arms) if parameter.per_arm else 1 for parameter in law.parameters)
    if used.sum() <= free:
        raise Refusal(f"{law.name} has {free} parameters and {used.sum()} runs: fit at least {free + 1} finished runs")
    centre = {name: 1.0 for name in law.columns}
    if law.natural is not None:
        centre = {name: float(np.exp(np.log(raw[name][used]).mean())) for name in law.columns}
    centred = {name: value / centre[name] if name in centre else value for name, value in raw.items()}
    return Data(raw=raw, centred=centred, centre=centre, log_loss_n=np.log(loss_n), weights_n=weights_n, arms=arms)


def _column(table: Any, name: str) -> np.ndarray:
    if name not in table:
        raise ValueError(f"column {name!r} is not in the table: it has {', '.join(map(str, table))}; see columns=")
    values = np.asarray(table[name], float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] = {values[bad[0]]}: laws are fitted to positive finite numbers; drop the "
            f"{bad.size} such rows (a diverged run has no loss)"
        )
    return values


# --- parameters as one vector
# ------------------------------------------------------------------------------------------


def _expanded(law: Law, arms: int) -> list[Parameter]:
    return [p for p in law.parameters for _ in range(arms if p.per_arm else 1)]


def _box(law: Law, arms: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = zip(*(np.log(p.bounds) if p.positive else p.bounds for p in _expanded(law, arms)), strict=True)
    return np.asarray(low, float), np.asarray(high, float)


def random_starts(law: Law, arms: int, starts: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = []
    for p in _expanded(law, arms):
        low, high = np.log(p.start) if p.positive else p.start
        columns.append(rng.uniform(low, high, starts))
    return np.stack(columns, axis=1)


def _named_params(law: Law, arms: int, theta_k: Any) -> dict[str, Any]:
    params, at = {}, 0
    for p in law.parameters:
        size = arms if p.per_arm else 1
        value = theta_k[..., at : at + size] if p.per_arm else theta_k[..., at]
        params[p.name] = jnp.exp(value) if p.positive else value
        at += size
    return params


def natural_params(law: Law, theta_bk: np.ndarray, centre: Values, arms: int) -> dict[str, np.ndarray]:
    """Parameters in the columns' own units: shape (b,), or (b, arms)."""
    with float64_on_cpu():
        one = partial(_named_params, law, arms)
        natural = law.natural or (lambda params, _: params)
        params = jax.vmap(lambda theta_k: natural(one(theta_k), centre))(jnp.asarray(theta_bk))
        return {name: np.asarray(value) for name, value in params.items()}


# --- the program
# -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where each member of the batch ended. `step_b` is its last whole Newton step, infinite where there is none;
    `hessian_bkk` is that of the objective divided by delta."""

    theta_bk: np.ndarray
    objective_b: np.ndarray
    gradient_b: np.ndarray
    step_b: np.ndarray
    hessian_bkk: np.ndarray


def solve(
    law: Law,
    data: Data,
    theta0_bk: np.ndarray,
    weights_bn: np.ndarray,
    log_loss_bn: np.ndarray,
    *,
    delta: float,
    warm: bool = False,
) -> Solved:
    """Minimises from every start; `weights_bn` and `log_loss_bn` have one row, or one for each start. `warm` says that
    starts lie near their optimum."""
    annealing, final = (_WARM_ANNEALING_STEPS, _WARM_FINAL_STEPS) if warm else (_ANNEALING_STEPS, _FINAL_STEPS)
    annealed = np.geomspace(max(0.1, delta), delta, 4)[:-1]
    deltas = np.concatenate([np.repeat(annealed, annealing), np.full(final, delta)])
    low, high = _box(law, len(data.arms))
    columns = {name: np.asarray(value) for name, value in data.centred.items()}
    batch = len(theta0_bk)
    with float64_on_cpu():
        out = _minimise(
            law,
            len(data.arms),
            jnp.asarray(theta0_bk),
            columns,
            jnp.asarray(np.broadcast_to(weights_bn, (batch, weights_bn.shape[1]))),
            jnp.asarray(np.broadcast_to(log_loss_bn, (batch, log_loss_bn.shape[1]))),
            jnp.asarray(deltas),
            jnp.asarray(low),
            jnp.asarray(high),
        )
        theta, objective, gradient, step, hessian = (np.asarray(value) for value in out)
    return Solved(theta_bk=theta, objective_b=objective, gradient_b=gradient, step_b=step, hessian_bkk=hessian)


def _newton_step(gradient_k, hessian_kk):
    """hessian^-1 gradient by elimination, NaN where the Hessian is not positive definite.

    Not jnp.linalg: as whole-batch arithmetic it is faster for matrices this small, and a program that scans over
    batched LAPACK calls was seen to hang for good on a busy machine with two cores (jaxlib 0.10.2).
    """

    def eliminate(i, system):
        rows, positive = system
        pivot = rows[i, i]
        row = rows[i] / pivot
        cleared = rows - rows[:, i][:, None] * row[None, :]
        return cleared.at[i].set(row), positive & (pivot > 0)

    augmented = jnp.concatenate([hessian_kk, gradient_k[:, None]], axis=1)
    rows, positive = jax.lax.fori_loop(0, len(gradient_k), eliminate, (augmented, jnp.asarray(True)))
    return jnp.where(positive, rows[:, -1], jnp.nan)


@partial(jax.jit, static_argnums=(0, 1))
def _minimise(law, arms, theta0_bk, columns, weights_bn, log_loss_bn, deltas, low, high):
    def objective(theta_k, weights_n, log_loss_n, delta):
        predicted = law.predict(_named_params(law, arms, theta_k), columns)
        # A user's law may go negative on the way; the floor keeps the logarithm finite and far from any optimum.
        residual = jnp.log(jnp.maximum(predicted, 1e-30)) - log_loss_n
        size = jnp.abs(residual)
        near = jnp.minimum(size, delta)
        # Divided by delta, least absolute deviations and least squares have derivatives of like size.
        return jnp.sum(weights_n * near * (size - near / 2)) / delta

    def derivatives(theta_k, weights_n, log_loss_n, delta):
        """Value, gradient and Hessian; parameters on a bound that the gradient holds there take no part in a step."""
        rest = (weights_n, log_loss_n, delta)
        value, gradient = jax.value_and_grad(objective)(theta_k, *rest)
        hessian = jax.jacfwd(jax.grad(objective))(theta_k, *rest)
        held = ((theta_k <= low) & (gradient > 0)) | ((theta_k >= high) & (gradient < 0))
        keep = (~held).astype(theta_k.dtype)
        return value, gradient * keep, hessian * keep[:, None] * keep[None, :] + jnp.diag(1 - keep)

    def iterate(carry, delta, weights_n, log_loss_n):
        (theta_k, damping), _ = carry
        value, gradient, hessian = derivatives(theta_k, weights_n, log_loss_n, delta)
        scale = jnp.maximum(jnp.abs(jnp.diag(hessian)), 1e-12 * (1e-30 + jnp.abs(jnp.diag(hessian)).max()))
        step = _newton_step(gradient, hessian + damping * jnp.diag(scale))
        step = step * jnp.minimum(1.0, 2.0 / jnp.maximum(jnp.abs(step).max(), 1e-300))
        trial = jnp.clip(theta_k - step, low, high)
        better = objective(trial, weights_n, log_loss_n, delta) <= value  # false for NaN
        damping = jnp.clip(jnp.where(better, damping / 6, damping * 5), 1e-14, 1e12)
        # What was computed at the place that is left goes along, so that the last one need not be compiled again.
        return (jnp.where(better, trial, theta_k), damping), (theta_k, value, gradient, hessian)

    def one(theta0_k, weights_n, log_loss_n):
        theta0_k = jnp.clip(theta0_k, low, high)
        nothing = (theta0_k, jnp.zeros(()), jnp.zeros_like(theta0_k), jnp.zeros(theta0_k.shape * 2))
        carry = ((theta0_k, jnp.ones(())), nothing)
        carry, _ = jax.lax.scan(lambda c, d: (iterate(c, d, weights_n, log_loss_n), None), carry, deltas)
        (_, (theta_k, value, gradient, hessian)), delta = carry, deltas[-1]
        step = jnp.abs(_newton_step(gradient, hessian)).max()
        step = jnp.where(jnp.isfinite(step), step, jnp.inf)
        # Reported in the units of the published objective, which is not divided by delta.
        return theta_k, value * delta, jnp.linalg.norm(gradient) * delta, step, hessian

    return jax.vmap(one)(theta0_bk, weights_bn, log_loss_bn)


def _condition(hessian_kk: np.ndarray) -> float:
    scale = np.sqrt(np.maximum(np.diag(hessian_kk), 1e-300))
    scaled = hessian_kk / np.outer(scale, scale)
    if not np.isfinite(scaled).all():
        return np.inf
    eigenvalues = np.linalg.eigvalsh(scaled)
    return float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else np.inf


def _status(
    law: Law,
    arms: tuple[str, ...],
    theta_k: np.ndarray,
    solved: Solved,
    best: int,
    *,
    condition: float,
    moved: float,
    agree: float,
    starts: int,
) -> str:
    low, high = _box(law, len(arms))
    names = [name for p in law.parameters for name in ([f"{p.name}[{a}]" for a in arms] if p.per_arm else [p.name])]
    on_bound = [name for name, at, lo, hi in zip(names, theta_k, low, high, strict=True) if at <= lo or at >= hi]
    if not np.isfinite(solved.objective_b[best]):
        return "no finite objective: the law is not defined on these columns"
    if moved < 1e-6:
        return "did not move from its start"
    if on_bound:
        return f"{', '.join(on_bound)} on a bound: the data do not determine it"
    if not solved.step_b[best] < STEP_TOLERANCE:
        return f"not converged: the last Newton step is {solved.step_b[best]:.1e}"
    if not condition < MAX_CONDITION:
        return f"not identified: condition number {condition:.1e}"
    if agree < 1.5 / starts:
        return f"one of {starts} starts found it: there may be a lower optimum"
    return "converged"
