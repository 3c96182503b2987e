"""Before anything is trained: what would a planned grid tell?

Losses are simulated on it from a law with given parameters, and all simulations are refitted in one batch: the standard
error and bias of every parameter and of what is identified, the power to tell two arms apart, the smallest difference
that would be found. Simulations suppose that the law is true; what it misses comes on top. proposal.py proposes runs once
there are some.

Letters: n rows of the grid, m simulations, k free parameters.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import optimize, stats

from analysis import fit as fits
from analysis.curves import frontier, optimum
from analysis.fit import Fit, fit_law
from analysis.laws import Law, by_arm
from analysis.optimum import SIX_N, Cost, cost_of_token
from analysis.refusal import Refusal
from analysis.resample import Draws, interval

DRAWS = 1000
POWER = 0.8
SIZES, WITHIN = 5, 4.0  # of an iso-FLOP grid: sizes at a budget, and how far from the optimum as a factor
_SAME = 1e-3  # how nearly a fit without noise must return the truth

Noise = float | Callable[[np.ndarray], np.ndarray]
Unit = Literal["nats", "log"]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """A quantity over simulations: `low`, `high` hold 95% of its estimates."""

    name: str
    truth: float
    mean: float
    standard_error: float
    low: float
    high: float

    @property
    def bias(self) -> float:
        return self.mean - self.truth


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a grid of `rows` runs would recover. `converged` is the share of simulations whose fit converged; all are kept.
    `draws.params` are the estimates themselves."""

    law: Law
    rows: int
    parameters: tuple[Recovered, ...]
    quantities: tuple[Recovered, ...]
    converged: float
    draws: Draws = field(repr=False)

    def __getitem__(self, name: str) -> Recovered:
        known = {one.name: one for one in (*self.parameters, *self.quantities)}
        if name not in known:
            raise KeyError(f"{name!r}: use one of {', '.join(known)}")
        return known[name]

    @property
    def table(self) -> pd.DataFrame:
        rows = [{"quantity": r.name, "truth": r.truth, "mean": r.mean, "bias": r.bias, "standard_error": r.standard_error,
                 "low": r.low, "high": r.high} for r in (*self.parameters, *self.quantities)]  # fmt: skip
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        said = "; ".join(
            f"{q.name} {q.truth:.4g} ± {q.standard_error:.2g} (bias {q.bias:+.1g})" for q in self.quantities
        )
        return f"{self.rows} runs of {self.law.name}: {said}; {self.converged:.1%} of {len(self.draws)} fits converged."


def recovery(
    law: Law | str,
    truth: Mapping[str, Any],
    grid: Any,
    noise: Noise,
    *,
    unit: Unit = "nats",
    quantities: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
    C: Sequence[float] | None = None,
    columns: Mapping[str, str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    **options: Any,
) -> Recovery:
    """Simulates `draws` studies on `grid` (a table with the law's columns, and `arm` where parameters are by arm) and
    refits them. `truth` names every parameter, A[arm] where arms differ. `noise` is the standard deviation of one run in
    `unit` (nats, or log: of log loss), a number or a function of the losses. `quantities` adds functions of the parameters
    to those reported: a = beta / (alpha + beta), the loss at the grid's centre, L*(C) at `C` (default: the grid's largest
    6 N D and ten times that). `options` go to fit_law: the estimator that the study will use.

    Every simulation is fitted from the truth: that starts may end elsewhere is not in these errors. Raises Refusal where
    the law can not be fitted to the grid, or a fit without any noise does not return the truth.
    """
    fit, exact = _without_noise(law, truth, grid, columns, options)
    losses = _simulated(fit.data.log_loss_n, noise, unit, draws, seed)
    solved, params = fits.estimate(fit, fit.data.weights_n[None], losses)
    made = Draws(
        fit=fit, kind=f"{draws} simulated studies", params=params, converged=float(np.mean(solved.converged_m))
    )
    said = _quantities(fit, C) | {name: _of_params(function) for name, function in (quantities or {}).items()}
    return Recovery(
        law=fit.law,
        rows=fit.rows,
        parameters=tuple(_recovered(name, made.flat[name], exact.flat[name][0]) for name in made.flat),
        quantities=tuple(_recovered(name, function(made), function(exact)[0]) for name, function in said.items()),
        converged=made.converged,
        draws=made,
    )


@dataclass(frozen=True, kw_only=True)
class Power:
    """Can a planned grid tell two arms apart? `power` is the share of simulated studies in which a true `gap` (a share of
    the loss, at the centre of the grid) is found at `level`; `detectable` the gap that is found with 80% power, and
    `copies` how many copies of the grid (seeds of every run) would find the asked one so. The test knows the noise: one
    that must estimate it from few runs finds a little less."""

    gap: float
    level: float
    power: float
    detectable: float
    standard_error: float  # of the difference in log loss
    copies: int
    converged: float
    rows: int

    def __str__(self) -> str:
        return (
            f"{self.rows} runs find a difference of {self.gap:.2%} of the loss with {self.power:.0%} power at level "
            f"{self.level:g}; with {POWER:.0%} they find {self.detectable:.2%}"
            + (f", and {self.copies} times the runs find {self.gap:.2%}." if self.copies > 1 else ".")
        )


def power(
    law: Law | str,
    truth: Mapping[str, Any],
    grid: Any,
    noise: Noise,
    *,
    gap: float = 0.01,
    per_arm: Sequence[str] = (),
    level: float = 0.05,
    unit: Unit = "nats",
    columns: Mapping[str, str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    **options: Any,
) -> Power:
    """Power to find that one of two arms has a loss greater by `gap` (0.01 is 1%) at the centre of the grid.

    `truth` is the first arm's; the second has the parameters `per_arm` (default: the law's amplitudes A and B) greater by
    the factor that makes the gap. `grid` is each arm's, or has a column `arm` with two names. Both the null distribution
    of the fitted difference and the one under the gap are simulated, in one batch.
    """
    if not 0 < gap < 1:
        raise ValueError(f"gap = {gap!r}: use a share of the loss between 0 and 1; 0.01 is 1%")
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: use a number between 0 and 1; 0.05 is usual")
    shared = fits.named(law)
    names = tuple(per_arm) or tuple(p.name for p in shared.parameters if p.name in ("A", "B"))
    if not names:
        raise ValueError(f"per_arm: {shared.name} has no amplitude A or B; name what differs between arms")
    table = _two_arms(pd.DataFrame(dict(grid)))
    arms = list(dict.fromkeys(table["arm"]))
    both = by_arm(shared, *names)
    renamed = columns or {}
    centre = {c: float(np.exp(np.log(np.asarray(table[renamed.get(c, c)], float)).mean())) for c in both.columns}
    at = {name: np.full(2, value) for name, value in centre.items()} | {"arm": np.asarray(arms)}

    def scaled(factor: float) -> dict[str, Any]:
        return {
            p.name: np.array([1.0, factor]) * truth[p.name] if p.per_arm else truth[p.name] for p in both.parameters
        }

    def off(log_factor: float) -> float:
        a, b = fits.predict(both, scaled(math.exp(log_factor)), arms, at)
        return float(b / a - 1 - gap)

    missing = [p.name for p in both.parameters if p.name not in truth]
    if missing:
        raise ValueError(f"truth has no {missing[0]!r}: {both.name} needs {', '.join(p.name for p in both.parameters)}")
    if not off(-20.0) * off(20.0) < 0:
        raise Refusal(
            f"no factor on {', '.join(names)} makes a gap of {gap:.2%} at the grid's centre; ask for a smaller one"
        )
    factor = math.exp(optimize.brentq(off, -20.0, 20.0))
    fit, _ = _without_noise(both, scaled(1.0), table, columns, options)
    moved = np.log(fits.predict(both, scaled(factor), arms, {**fit.data.raw, "arm": np.asarray(arms)[fit.data.arm_n]}))
    losses = np.concatenate(
        [
            _simulated(fit.data.log_loss_n, noise, unit, draws, seed),
            _simulated(moved, noise, unit, draws, seed + 1),
        ]
    )
    solved, params = fits.estimate(fit, fit.data.weights_n[None], losses)
    log_at = np.log(fits.predict(both, params, arms, at))
    null, found = np.split(log_at[:, 1] - log_at[:, 0], 2)
    critical = float(np.quantile(np.abs(null), 1 - level))
    error = float(null.std(ddof=1))
    detectable = math.expm1((stats.norm.isf(level / 2) + stats.norm.ppf(POWER)) * error)
    return Power(
        gap=gap,
        level=level,
        power=float(np.mean(np.abs(found) > critical)),
        detectable=detectable,
        standard_error=error,
        copies=max(1, math.ceil((math.log1p(detectable) / math.log1p(gap)) ** 2)),
        converged=float(np.mean(solved.converged_m)),
        rows=len(table),
    )


def isoflop_grid(
    law: Law | str,
    truth: Mapping[str, Any],
    budgets: Sequence[float],
    *,
    sizes: int = SIZES,
    within: float = WITHIN,
    replicates: int = 1,
    arms: Sequence[str] = (),
    flops_per_token: Cost = SIX_N,
) -> pd.DataFrame:
    """N, D and C of runs at every budget (FLOPs), `sizes` of them at even steps of log N from N* / within to N* within,
    `replicates` times, and for each of `arms` where they are named. `truth` may have parameters A[arm]."""
    law = fits.named(law)
    if sizes < 1 or not within > 1 or replicates < 1:
        raise ValueError(
            f"sizes = {sizes}, within = {within}, replicates = {replicates}: use at least 1, and within > 1"
        )
    values = {name: np.asarray(value, float)[None] for name, value in _named(law, truth, arms).items()}
    rows = []
    for arm in arms or (None,):
        best = optimum(law, values, budgets, arms=arms, arm=arm, flops_per_token=flops_per_token)[1][0]
        for C, centre in zip(budgets, best, strict=True):
            for N in centre * np.geomspace(1 / within, within, sizes) if sizes > 1 else [centre]:
                row = {"N": float(N), "D": float(C / cost_of_token(flops_per_token, N)), "C": float(C)}
                rows += [({} if arm is None else {"arm": arm}) | row] * replicates
    return pd.DataFrame(rows)


# --- simulation ------------------------------------------------------------------------------------------------------


def _without_noise(
    law: Law | str, truth: Mapping[str, Any], grid: Any, columns: Mapping[str, str] | None, options: Mapping[str, Any]
) -> tuple[Fit, Draws]:
    """The fit to exact losses, which must return the truth, and the truth as one draw."""
    law = fits.named(law)
    law = by_arm(law, *options["per_arm"]) if options.get("per_arm") else law
    renamed, arm = columns or {}, options.get("arm", "arm")
    table = {c: np.asarray(grid[renamed.get(c, c)], float) for c in law.columns if renamed.get(c, c) in grid}
    arms: tuple[str, ...] = ()
    if law.by_arm:
        if arm not in grid:
            raise ValueError(f"column {arm!r} is not in the grid, and {law.name} has parameters by arm")
        table[arm] = np.asarray([str(name) for name in grid[arm]])
        arms = tuple(dict.fromkeys(table[arm]))
    values = _named(law, truth, arms)
    at = {"arm" if name == arm else name: column for name, column in table.items()}
    loss = fits.predict(law, values, arms, at)
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise ValueError(
            f"truth = {dict(truth)}: {law.name} is not positive and finite on this grid; check its parameters"
        )
    fit = fit_law(law, {**table, "loss": loss}, **options)
    exact = Draws(
        fit=fit, kind="truth", params={name: np.asarray(v, float)[None] for name, v in values.items()}, converged=1.0
    )
    found, wanted = fit.flat, exact.flat
    off = {name: abs(found[name] / wanted[name][0] - 1) for name in found if wanted[name][0]}
    worst = max(off, key=lambda name: off[name])
    if not off[worst] < _SAME:
        raise Refusal(
            f"this grid does not determine {law.name}: without any noise {worst} comes out as {found[worst]:.4g} instead of "
            f"{wanted[worst][0]:.4g} ({fit.status}); vary the columns more, or fix or tie a parameter"
        )
    return fit, exact


def _named(law: Law, truth: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """The law's parameters, those by arm as arrays in the order of `arms`: from A[arm], from an array, or one for all."""
    values, known = {}, set()
    for p in law.parameters:
        split = [f"{p.name}[{arm}]" for arm in arms]
        if p.per_arm and all(name in truth for name in split):
            values[p.name], used = np.array([float(truth[name]) for name in split]), set(split)
        elif p.name in truth:
            value = np.asarray(truth[p.name], float)
            values[p.name], used = np.broadcast_to(value, len(arms)) if p.per_arm else float(value), {p.name}
        else:
            raise ValueError(f"truth has no {p.name!r}: {law.name} needs {', '.join(q.name for q in law.parameters)}")
        known |= used
    unknown = [name for name in truth if name not in known]
    if unknown:
        raise ValueError(f"truth: {unknown[0]!r} is not one of {', '.join(sorted(known))}")
    return values


def _simulated(log_loss_n: np.ndarray, noise: Noise, unit: Unit, draws: int, seed: int) -> np.ndarray:
    """Log losses (m, n) with normal noise."""
    if unit not in ("nats", "log"):
        raise ValueError(f"unit = {unit!r}: use 'nats' for noise of the loss, 'log' for noise of its logarithm")
    loss_n = np.exp(log_loss_n)
    sd_n = np.broadcast_to(np.asarray(noise(loss_n) if callable(noise) else noise, float), loss_n.shape)
    if not (np.isfinite(sd_n).all() and (sd_n > 0).all()):
        raise ValueError(
            f"noise = {noise!r}: use a positive standard deviation, or a function that makes one of losses"
        )
    error_mn = sd_n * np.random.default_rng(seed).standard_normal((draws, len(loss_n)))
    return log_loss_n + error_mn if unit == "log" else np.log(np.maximum(loss_n + error_mn, 1e-6 * loss_n))


def _quantities(fit: Fit, C: Sequence[float] | None) -> dict[str, Callable[[Draws], np.ndarray]]:
    names = {p.name for p in fit.law.parameters}
    raw, arms = fit.data.raw, fit.arms if fit.law.by_arm else (None,)
    said: dict[str, Callable[[Draws], np.ndarray]] = {}
    if {"alpha", "beta"} <= names:
        exponents = any(p.per_arm for p in fit.law.parameters if p.name in ("alpha", "beta"))
        for index, arm in enumerate(arms if exponents else (None,)):
            said[_label("a", arm)] = lambda d, index=index: _compute_exponent(d, index)
    centre = {c: np.array([np.exp(np.log(raw[c]).mean())]) for c in fit.law.columns}
    if set(fit.law.columns) == {"N", "D"}:
        top = float((6.0 * raw["N"] * raw["D"]).max())
    else:
        top = float(raw["C"].max()) if fit.law.columns == ("C",) else math.nan
    for arm in arms:
        named = {} if arm is None else {"arm": np.array([arm])}
        said[_label("loss at the centre", arm)] = lambda d, named=named: d.predict(**centre, **named)[:, 0]
        for budget in (C or (top, 10 * top)) if math.isfinite(top) else ():
            at = np.array([float(budget)])
            said[_label(f"L*({budget:.3g})", arm)] = lambda d, at=at, arm=arm: frontier(d, at, arm=arm)[:, 0]
    return said


def _compute_exponent(draws: Draws, arm: int) -> np.ndarray:
    """a = beta / (alpha + beta), of N* proportional to C^a."""
    alpha, beta = (np.asarray(draws.params[name]) for name in ("alpha", "beta"))
    alpha, beta = (value[:, arm] if value.ndim == 2 else value for value in (alpha, beta))
    return beta / (alpha + beta)


def _of_params(function: Callable[[Mapping[str, Any]], Any]) -> Callable[[Draws], np.ndarray]:
    return lambda draws: np.asarray(function(draws.params), float)


def _label(name: str, arm: str | None) -> str:
    return name if arm is None else f"{name}[{arm}]"


def _recovered(name: str, values: np.ndarray, truth: float) -> Recovered:
    low, high = interval(values)
    return Recovered(
        name=name,
        truth=float(truth),
        mean=float(values.mean()),
        standard_error=float(values.std(ddof=1)),
        low=low,
        high=high,
    )


def _two_arms(grid: pd.DataFrame) -> pd.DataFrame:
    if "arm" not in grid:
        return pd.concat([grid.assign(arm=name) for name in ("A", "B")], ignore_index=True)
    names = list(dict.fromkeys(str(name) for name in grid["arm"]))
    if len(names) != 2:
        raise ValueError(f"arm: the grid has {', '.join(names)}; power is of two arms: keep the rows of two")
    return grid.assign(arm=[str(name) for name in grid["arm"]])
