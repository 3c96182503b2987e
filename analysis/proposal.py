"""After a study: which next runs shrink what one wants to know most, per FLOP?

V-optimal choice over the current draws. A run at x is an observation y = f(x) + noise; over draws of the parameters, seeing
it takes Cov(target, f(x))^2 / (Var f(x) + noise^2) off the target's variance. Runs are taken one after the other, and after
each the draws are moved as if it had been seen (the square root filter of Whitaker and Hamill 2002: their covariance is
then the exact posterior's where f is linear), so that the next is chosen for what is left. No loss needs to be known for
that, so that the whole table is made before anything is trained.

It is exact for a law that is linear in its parameters over the draws, with normal noise, and supposes that the law is
right: it favours the corners of the candidates, so let those be runs that one would make.

Letters: b draws, m candidates, q targets.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis import fit as fits
from analysis.curves import Curves, OfArms, cost_of_arm, frontier, optimum
from analysis.design import SIZES, WITHIN
from analysis.forecast import last_overtaking
from analysis.optimum import SIX_N, Cost, cost_of_token
from analysis.refusal import Refusal
from analysis.resample import Draws

_FAR = 6.0  # robust standard deviations beyond which a draw is moved in: a fit that failed is not a prior
_LEAST = 1e-4  # share of the variance below which a run is not worth a line
_BUDGETS = 8
_MAD = 1.482602218505602  # sd of a normal distribution over its median absolute deviation


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be known better: `values` (b,) or (b, q) for every draw. With several, their mean variance is shrunk."""

    name: str
    values: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Runs in the order in which to make them. `table` has the candidates' columns, `flops`, `share` (of the target's
    variance that this run takes away, after those above it) and `cumulative`. `sd`, `sd_after` are of the target before
    and after all of them; `noise` is that of one run, in log loss; `moved` the share of entries of the draws that lay far
    off and were moved in."""

    target: str
    table: pd.DataFrame = field(repr=False)
    sd: float
    sd_after: float
    noise: float
    budget_flops: float
    moved: float

    @property
    def flops(self) -> float:
        return float(self.table["flops"].sum())

    def __str__(self) -> str:
        return (
            f"{len(self.table)} runs of {self.flops:.3g} FLOPs in all are expected to take the standard deviation of "
            f"{self.target} from {self.sd:.3g} to {self.sd_after:.3g}, {1 - (self.sd_after / self.sd) ** 2:.0%} of its "
            "variance, if the law is right."
        )


def propose(
    draws: Draws | Mapping[str, Draws],
    candidates: pd.DataFrame,
    *,
    target: Target | Callable[[Mapping[str, Any]], Any],
    budget_flops: float,
    noise: float | None = None,
    runs: int = 20,
    repeats: int = 1,
    columns: Mapping[str, str] | None = None,
) -> Proposal:
    """Chooses among `candidates` (the law's columns, `arm` where there are arms, `flops` or else 6 N D) while
    `budget_flops` last, at most `runs` of them and each at most `repeats` times.

    `target` is a Target or a function of the parameters of Draws. `noise` is the standard deviation of one run's log loss,
    the fits' rms by default, which contains what the law misses. Greedy by the gain per FLOP, and by the gain alone: the
    choice that leaves less variance is returned (a cheap first choice may else leave no money for the good one).
    Raises Refusal where no candidate says anything about the target or none can be paid.
    """
    if not (np.isfinite(budget_flops) and budget_flops > 0):
        raise ValueError(f"budget_flops = {budget_flops!r}: use the FLOPs that the next runs may cost together")
    if runs < 1 or repeats < 1:
        raise ValueError(f"runs = {runs}, repeats = {repeats}: use at least 1")
    table = candidates.reset_index(drop=True)
    renamed = columns or {}
    cost_m = _flops(table, renamed)
    Y_bm, noise_m = _predictions(draws, table, renamed, noise)
    if isinstance(target, Target):
        name, values = target.name, np.asarray(target.values, float)
    elif isinstance(draws, Draws):
        name, values = getattr(target, "__name__", "target"), draws.values(target)
    else:
        raise ValueError("target: with draws for each arm give a Target, such as crossing_target(curves(draws), ...)")
    T_bq = values.reshape(len(values), -1)
    if len(T_bq) != len(Y_bm):
        raise ValueError(f"target has {len(T_bq)} draws and the law {len(Y_bm)}: make it of the same draws")
    if not np.isfinite(T_bq).all():
        raise Refusal(
            f"{name} is infinite in some draws, so that it has no variance; target a difference at one C instead"
        )
    Y_bm, moved_Y = _moved_in(Y_bm)
    T_bq, moved_T = _moved_in(T_bq)
    before = _variance(T_bq)
    if not before > 0:
        raise Refusal(f"{name} is the same in every draw: there is nothing left to learn about it")
    if not (cost_m <= budget_flops).any():
        raise Refusal(
            f"budget_flops = {budget_flops:.3g}: the cheapest candidate costs {cost_m.min():.3g}; raise it, or add smaller runs"
        )
    plans = [
        _greedy(Y_bm, T_bq, noise_m**2, cost_m, by_cost=by_cost, budget=budget_flops, runs=runs, repeats=repeats)
        for by_cost in (True, False)
    ]
    chosen, gains = max(plans, key=lambda plan: sum(plan[1]))
    if not chosen:
        raise Refusal(f"no candidate that can be paid says anything about {name}; give others, or a larger budget")
    rows = table.loc[chosen].reset_index(drop=True)
    rows["flops"] = cost_m[chosen]
    rows["share"] = np.asarray(gains) / before
    rows["cumulative"] = rows["share"].cumsum()
    per = T_bq.shape[1]
    return Proposal(
        target=name,
        table=rows,
        sd=math.sqrt(before / per),
        sd_after=math.sqrt(max(0.0, before - sum(gains)) / per),
        noise=float(noise_m[chosen].mean()),
        budget_flops=float(budget_flops),
        moved=float((moved_Y * Y_bm.size + moved_T * T_bq.size) / (Y_bm.size + T_bq.size)),
    )


def crossing_target(given: Curves, more: str, less: str) -> Target:
    """The difference of two arms at their median crossing: to first order the crossing's log C is that difference over its
    slope, and the difference has a variance where draws cross nowhere. Where half of the draws or more do not cross within
    the curves, at the largest measured budget."""
    C_b = last_overtaking(given.C, given.difference(more, less))
    C = float(np.quantile(C_b, 0.5, method="inverted_cdf"))
    if not 0 < C < np.inf:
        return difference_target(given, more, less, given.measured[1])
    values = difference_target(given, more, less, C).values
    return Target(name=f"the crossing of {more} and {less} (their difference at {C:.2g} FLOPs)", values=values)


def difference_target(given: Curves, more: str, less: str, C: Any) -> Target:
    """Best loss of `less` minus that of `more`, nats, at C FLOPs; at several C their mean variance is what shrinks."""
    values = given.at(C, less) - given.at(C, more)
    where = ", ".join(f"{value:.2g}" for value in np.atleast_1d(C))
    return Target(name=f"the difference of {less} and {more} at {where} FLOPs", values=values)


def loss_target(draws: Draws, C: Any, *, arm: str | None = None, flops_per_token: Cost = SIX_N) -> Target:
    """L*(C), nats, of one arm, at one or several C."""
    at = np.atleast_1d(np.asarray(C, float))
    values = frontier(draws, at, arm=arm, flops_per_token=flops_per_token)
    return Target(
        name=f"L*({', '.join(f'{value:.2g}' for value in at)})" + (f" of {arm}" if arm else ""), values=values
    )


def candidate_runs(
    draws: Draws | Mapping[str, Draws],
    *,
    budgets: Sequence[float] | None = None,
    beyond: int = 1,
    sizes: int = SIZES,
    within: float = WITHIN,
    flops_per_token: OfArms = SIX_N,
) -> pd.DataFrame:
    """Runs one would make: for every arm and budget, `sizes` of them at even steps of log N within a factor `within` of
    the fitted N*(C). Default budgets: those of the fitted runs (eight over their range where there are more), and `beyond`
    larger ones in the same ratio. A law of C has one candidate at each budget."""
    of = draws if isinstance(draws, Mapping) else dict.fromkeys(draws.fit.arms or ("",), draws)
    rows = []
    for arm, one in of.items():
        cost = cost_of_arm(flops_per_token, arm)
        named = {"arm": arm} if arm else {}
        chosen = list(budgets) if budgets is not None else _budgets(one, arm, cost, beyond)
        if one.law.columns == ("C",):
            rows += [{**named, "C": C, "flops": C} for C in chosen]
            continue
        point = {key: np.asarray(value)[None] for key, value in one.fit.params.items()}
        best = optimum(one.law, point, chosen, arms=one.fit.arms, arm=arm or None, flops_per_token=cost)[1][0]
        for C, centre in zip(chosen, best, strict=True):
            for N in centre * np.geomspace(1 / within, within, sizes):
                rows.append({**named, "N": float(N), "D": float(C / cost_of_token(cost, N)), "flops": float(C)})
    return pd.DataFrame(rows)


def _budgets(draws: Draws, arm: str, cost: Cost, beyond: int) -> list[float]:
    data = draws.fit.data
    used = (data.weights_n > 0) & ((data.arm_n == draws.fit.arms.index(arm)) if draws.law.by_arm else True)
    C = (data.raw["C"] if "C" in data.raw else cost_of_token(cost, data.raw["N"]) * data.raw["D"])[used]
    # Budgets within a few per cent are one.
    steps = np.sort(np.log(C))
    groups = np.split(steps, np.flatnonzero(np.diff(steps) > 0.1) + 1)
    found = np.exp([group.mean() for group in groups])
    if len(found) > _BUDGETS:
        found = np.geomspace(found[0], found[-1], _BUDGETS)
    ratio = found[-1] / found[-2] if len(found) > 1 else 4.0
    return [float(C) for C in (*found, *(found[-1] * ratio ** np.arange(1, beyond + 1)))]


def _flops(table: pd.DataFrame, renamed: Mapping[str, str]) -> np.ndarray:
    if "flops" in table:
        cost_m = np.asarray(table["flops"], float)
    elif {renamed.get("N", "N"), renamed.get("D", "D")} <= set(table):
        cost_m = 6.0 * np.asarray(table[renamed.get("N", "N")], float) * np.asarray(table[renamed.get("D", "D")], float)
    else:
        raise ValueError(f"candidates have no column 'flops', nor N and D: they have {', '.join(map(str, table))}")
    if not len(cost_m) or not (np.isfinite(cost_m).all() and (cost_m > 0).all()):
        raise ValueError("candidates: give at least one, each of positive finite flops")
    return cost_m


def _predictions(
    draws: Draws | Mapping[str, Draws], table: pd.DataFrame, renamed: Mapping[str, str], noise: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Log losses (b, m) of the candidates, and the noise of a run at each."""
    if noise is not None and not (np.isfinite(noise) and noise > 0):
        raise ValueError(f"noise = {noise!r}: use the positive standard deviation of a run's log loss")
    arms = None if "arm" not in table else [str(name) for name in table["arm"]]
    several = isinstance(draws, Mapping)
    if arms is None and (several or draws.law.by_arm):
        raise ValueError("candidates have no column 'arm', and the draws are of several arms")
    of = draws if several else {"": draws}
    unknown = sorted(set(arms) - set(of)) if several and arms is not None else []
    if unknown:
        raise ValueError(f"candidates: arm {unknown[0]!r} has no draws; there are {', '.join(of)}")
    Y_bm = np.empty((len(next(iter(of.values()))), len(table)))
    noise_m = np.empty(len(table))
    for arm, one in of.items():
        rows = np.asarray([name == arm for name in arms]) if several and arms is not None else np.ones(len(table), bool)
        if not rows.any():
            continue
        missing = [renamed.get(c, c) for c in one.law.columns if renamed.get(c, c) not in table]
        if missing:
            raise ValueError(f"candidates have no column {missing[0]!r}: {one.law.name} predicts from it")
        x = {c: np.asarray(table[renamed.get(c, c)], float)[rows] for c in one.law.columns}
        if one.law.by_arm and arms is not None:
            x |= {"arm": np.asarray(arms)[rows]}
        Y_bm[:, rows] = one.values(lambda p, one=one, x=x: np.log(fits.predict(one.law, p, one.fit.arms, x)))
        noise_m[rows] = noise if noise is not None else one.fit.rms
    if not (noise_m > 0).all():
        raise Refusal("the fit leaves no residual, so that the noise of a run is unknown; give noise=")
    return Y_bm, noise_m


def _moved_in(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Each column about its mean, entries far from the median moved in; and their share."""
    middle = np.median(values, axis=0)
    spread = _MAD * np.median(np.abs(values - middle), axis=0)
    reach = np.where(spread > 0, _FAR * spread, np.inf)
    clipped = np.clip(values, middle - reach, middle + reach)
    return clipped - clipped.mean(axis=0), float(np.mean(clipped != values))


def _variance(T_bq: np.ndarray) -> float:
    return float((T_bq**2).sum() / (len(T_bq) - 1))


def _greedy(
    Y_bm: np.ndarray,
    T_bq: np.ndarray,
    noise2_m: np.ndarray,
    cost_m: np.ndarray,
    *,
    by_cost: bool,
    budget: float,
    runs: int,
    repeats: int,
) -> tuple[list[int], list[float]]:
    """Indices in the order of choice, and what each takes off the targets' summed variance."""
    Y_bm, T_bq = Y_bm.copy(), T_bq.copy()
    dof, left, before = len(Y_bm) - 1, budget, _variance(T_bq)
    taken_m = np.zeros(len(cost_m), int)
    chosen, gains = [], []
    while len(chosen) < runs:
        total_m = (Y_bm**2).sum(axis=0) / dof + noise2_m
        gain_m = ((T_bq.T @ Y_bm / dof) ** 2).sum(axis=0) / total_m
        allowed_m = (cost_m <= left) & (taken_m < repeats) & (gain_m >= _LEAST * before)
        if not allowed_m.any():
            break
        j = int(np.where(allowed_m, gain_m / (cost_m if by_cost else 1.0), -1.0).argmax())
        chosen.append(j)
        gains.append(float(gain_m[j]))
        taken_m[j] += 1
        left -= cost_m[j]
        h_b = Y_bm[:, j].copy()
        damped_b = h_b / (1 + math.sqrt(noise2_m[j] / total_m[j])) / total_m[j] / dof
        T_bq -= np.outer(damped_b, h_b @ T_bq)
        Y_bm -= np.outer(damped_b, h_b @ Y_bm)
    return chosen, gains
