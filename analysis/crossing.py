"""Best loss of an arm as a function of compute, read off L(N, D), and where the curves of two arms cross.

Arms that share E, alpha and beta have frontiers E + G C^-(alpha beta / (alpha + beta)) wherever their costs of a token are
proportional: such curves never cross, whatever the data say. A crossing is therefore read off the measured differences
(`measured_draws`), or off fits in which exponents differ by arm, never off `chinchilla_by_arm`.

For a study's records (`frontier`) an arm's cost of a token as a function of its size is not assumed to be 6 N:
log(FLOPs per token) is interpolated in log N over the arm's own runs. Sizes are searched inside those that the arm has
run. For any table, `law_curves` draws each arm's compute-optimal frontier, or its losses along a given path of sizes,
from draws of fits whose exponents or asymptotes are each arm's own, and `crossing_of` reads the crossing off.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import interpolate

from analysis.compare import Difference
from analysis.curves import BELOW, Curves, OfArms, apart, cost_of_arm, curves
from analysis.fit import Fit
from analysis.frame import compact, finished
from analysis.isoflop import SIZE
from analysis.laws import LAWS
from analysis.optimum import SIX_N
from analysis.refusal import Refusal
from analysis.resample import Draws

Path = Callable[
    [np.ndarray], Mapping[str, Any]
]  # from C to the law's columns, such as N and D at 20 tokens per parameter

COLUMNS = {"N": SIZE, "D": "tokens_seen"}  # what the law's letters are in a frame
_SIZES = 48
_GRID = 241
_SAME = 0.02  # budgets that differ by less are one


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where arm and baseline are equally good, FLOPs, over draws of the fitted law.

    `low`, `high` bound 95% of the draws; None where that end lies beyond the searched range. `median` is None where half
    of the draws cross nowhere in it. `none_in_range` is the share of draws without a crossing between the smallest and the
    largest budget, `better` the share in which the arm is better at each budget. `extrapolated` says that the median lies
    outside of the measured budgets.
    """

    arm: str
    baseline: str
    median: float | None
    low: float | None
    high: float | None
    none_in_range: float
    better: dict[float, float]
    extrapolated: bool
    measured: tuple[float, float]

    def __str__(self) -> str:
        first, last = (compact(budget) for budget in self.measured)
        shares = ", ".join(f"{share:.0%} at {compact(budget)}" for budget, share in self.better.items())
        inside = f"{self.none_in_range:.0%} of the draws do not cross between {first} and {last} FLOPs"
        text = f"{self.arm} is better in {shares} FLOPs of the draws; {inside}. "
        if self.median is None:
            return f"{text}No crossing can be located."
        low = "below the searched range" if self.low is None else compact(self.low)
        high = "above the searched range" if self.high is None else compact(self.high)
        where = " (an extrapolation beyond the measured range)" if self.extrapolated else ""
        return f"{text}Median crossing: {compact(self.median)} FLOPs{where}, 95% interval {low} to {high}."


def frontier(law: Fit | Draws, frame: pd.DataFrame, arm: str, C: Sequence[float] | np.ndarray) -> np.ndarray:
    """L*(C) = min over N of L(N, C / cost(N)), nats; of shape (C,) for a Fit and (draws, C) for Draws."""
    rows = finished(frame)
    rows = rows[rows["arm"] == arm]
    cost = (rows["flops_exact"] / rows["tokens_seen"]).groupby(rows[SIZE]).mean()
    log_N = np.log(np.asarray(cost.index, float))
    grid = np.linspace(log_N[0], log_N[-1], _SIZES)
    log_cost = np.interp(grid, log_N, np.log(cost.to_numpy(float)))
    C = np.asarray(C, float)
    D = np.exp(np.log(C)[:, None] - log_cost[None, :])
    N = np.broadcast_to(np.exp(grid), D.shape)
    names = {"arm": np.full(D.size, arm)} if law.law.by_arm else {}
    loss = law.predict(N=N.ravel(), D=D.ravel(), **names)
    return _least(loss.reshape(*loss.shape[:-1], *D.shape))


def _least(loss: np.ndarray) -> np.ndarray:
    """Minimum along the last axis: of the parabola through the least point and its neighbours, or the end where it is one."""
    i = np.clip(loss.argmin(axis=-1), 1, loss.shape[-1] - 2)
    left, middle, right = (np.take_along_axis(loss, (i + k)[..., None], axis=-1)[..., 0] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    inside = (middle <= left) & (middle <= right) & (bend > 0)
    vertex = middle - (left - right) ** 2 / (8 * np.where(inside, bend, 1.0))
    return np.where(inside, vertex, np.minimum(middle, np.minimum(left, right)))


def measured_draws(
    compared: Sequence[Difference], *, draws: int = 4000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """C and differences (draws, C) between the measured budgets: each budget's difference with its noise, and a monotone
    curve in log C in between (Fritsch and Carlson 1980; a line between two budgets). The noise's own uncertainty is drawn
    with it, so that one budget alone has its t-interval; what interpolation may miss is not in the draws."""
    ordered = sorted(compared, key=lambda difference: difference.budget)
    rng = np.random.default_rng(seed)
    budgets = np.array([difference.budget for difference in ordered])
    values = np.array([difference.value for difference in ordered])
    errors = np.array([difference.standard_error for difference in ordered])
    dof = ordered[0].dof
    scale = np.sqrt(dof / rng.chisquare(dof, draws))
    at_budgets = values + scale[:, None] * errors * rng.standard_normal((draws, len(ordered)))
    C = np.unique(np.concatenate([np.geomspace(budgets[0], budgets[-1], _GRID), budgets]))
    log_C = np.clip(np.log(C), np.log(budgets[0]), np.log(budgets[-1]))
    return C, np.asarray(interpolate.pchip_interpolate(np.log(budgets), at_budgets, log_C, axis=1))


def crossing(
    C: np.ndarray, difference_bC: np.ndarray, *, arm: str, baseline: str, budgets: Sequence[float]
) -> Crossing:
    """From differences arm minus baseline of every draw on the grid C, which contains the budgets."""
    budgets = sorted(float(budget) for budget in budgets)
    sign = np.sign(difference_bC)
    located = _first_crossing(C, difference_bC)
    # A draw that never crosses lies beyond the end at which its sign differs from that of most draws.
    usual_end = 1.0 if np.mean(sign[:, -1] > 0) >= 0.5 else -1.0
    never = np.isnan(located)
    located[never] = np.where(sign[never, -1] == usual_end, -np.inf, np.inf)
    # An order statistic, since interpolation between infinities is not a number.
    low, median, high = (float(value) for value in np.quantile(located, [0.025, 0.5, 0.975], method="inverted_cdf"))
    inside = (located >= budgets[0]) & (located <= budgets[-1])
    at = {budget: int(np.argmin(np.abs(np.log(C / budget)))) for budget in budgets}
    return Crossing(
        arm=arm,
        baseline=baseline,
        median=median if math.isfinite(median) else None,
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
        none_in_range=float(1 - inside.mean()),
        better={budget: float(np.mean(difference_bC[:, index] < 0)) for budget, index in at.items()},
        extrapolated=math.isfinite(median) and not budgets[0] <= median <= budgets[-1],
        measured=(budgets[0], budgets[-1]),
    )


def _first_crossing(C: np.ndarray, difference_bC: np.ndarray) -> np.ndarray:
    """Linear in log C between the points of the grid; NaN where a draw does not cross."""
    change = np.sign(difference_bC[:, :-1]) * np.sign(difference_bC[:, 1:]) < 0
    i = change.argmax(axis=1)[:, None]
    before, after = (np.take_along_axis(difference_bC, i + k, axis=1)[:, 0] for k in (0, 1))
    crosses = change.any(axis=1)
    share = before / np.where(crosses, before - after, 1.0)
    log_C = np.log(C)
    at = log_C[i[:, 0]] + share * (log_C[i[:, 0] + 1] - log_C[i[:, 0]])
    return np.where(crosses, np.exp(at), np.nan)


# --- from draws of fitted laws ---------------------------------------------------------------------------------------


def law_curves(
    draws: Draws | Mapping[str, Draws],
    *,
    arms: Sequence[str],
    measured: tuple[float, float],
    path: Path | None = None,
    flops_per_token: OfArms = SIX_N,
    paired: bool = False,
    reach: float = 100.0,
    points: int = _GRID,
) -> Curves:
    """Loss against compute of every draw and arm, from a tenth of the smallest `measured` compute to `reach` times the
    largest: along the compute-optimal frontier, or along `path`.

    `draws` are of one fit with parameters by arm, or one Draws for each arm. Draws of one fit are as paired as its
    clusters: a label that two arms share is resampled in both. Separate Draws are put out of step unless `paired`, which
    is right only where their runs are (equal resample indices).
    """
    of: dict[str, Draws] = dict(draws) if isinstance(draws, Mapping) else dict.fromkeys(arms, draws)
    unknown = [name for name in arms if name not in of or (of[name].law.by_arm and name not in of[name].fit.arms)]
    if unknown:
        raise ValueError(f"arm = {unknown[0]!r}: there are no draws of it")
    of = {name: of[name] for name in arms}
    five = all(one.law.predict is LAWS["chinchilla"].predict for one in of.values())
    proportional = not any(callable(cost_of_arm(flops_per_token, name)) for name in arms)
    if path is None and not (five and proportional):
        return curves(draws, arms=arms, measured=measured, reach=reach, flops_per_token=flops_per_token, paired=paired,
                      points=points)  # fmt: skip
    for one in of.values():
        if not one.fit.converged:
            raise Refusal(f"{one.law.name} was not fitted ({one.fit.status}), so its draws locate no crossing")
    if isinstance(draws, Mapping) and not paired:
        of = apart(of)
    C = np.geomspace(measured[0] / BELOW, measured[1] * reach, points)
    loss = {}
    for name, one in of.items():
        if path is not None:
            names = {"arm": np.full(C.shape, name)} if one.law.by_arm else {}
            loss[name] = one.predict(**path(C), **names)
        else:
            cost = float(cost_of_arm(flops_per_token, name))  # pyright: ignore[reportArgumentType]
            loss[name] = one.values(lambda p, one=one, name=name, cost=cost: _closed_form(one, p, name, C / cost))
    return Curves(C=C, loss=loss, measured=(float(measured[0]), float(measured[1])))


def _closed_form(draws: Draws, params: Mapping[str, Any], arm: str, ND: np.ndarray) -> np.ndarray:
    """L* of the five-parameter law where N D is given (Hoffmann et al. 2022, equation 4): (b, C)."""
    p = {}
    for parameter in draws.law.parameters:
        value = np.asarray(params[parameter.name], float)
        p[parameter.name] = (value[..., draws.fit.arms.index(arm)] if parameter.per_arm else value)[..., None]
    E, A, B, alpha, beta = (p[name] for name in ("E", "A", "B", "alpha", "beta"))
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * ND ** (beta / (alpha + beta))
    return E + A * N**-alpha + B * (ND / N) ** -beta


def crossing_of(given: Curves, *, arm: str, baseline: str, budgets: Sequence[float] = ()) -> Crossing:
    """Where the curves of two arms cross, with P(arm better) at `budgets` beside the ends of the measured range."""
    low, high = given.measured
    inside = [float(C) for C in budgets if low * (1 + _SAME) < C < high / (1 + _SAME)]
    at = np.unique([low, high, *inside])
    C = np.unique(np.concatenate([given.C, at]))
    difference = np.concatenate([given.difference(baseline, arm), given.at(at, arm) - given.at(at, baseline)], axis=1)
    _, order = np.unique(np.concatenate([given.C, at]), return_index=True)
    return crossing(C, difference[:, order], arm=arm, baseline=baseline, budgets=at.tolist())
