"""Best loss of an arm as a function of compute, read off L(N, D), and where the curves of two arms cross.

An arm's cost of a token as a function of its size is not assumed to be 6 N: log(FLOPs per token) is interpolated in
log N over the arm's own runs. Sizes are searched inside those that the arm has run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fit import Fit
from analysis.frame import compact, finished
from analysis.isoflop import SIZE
from analysis.resample import Draws

COLUMNS = {"N": SIZE, "D": "tokens_seen"}  # what the law's letters are in a frame
_SIZES = 48
_REACH = 10.0  # how far beyond the measured budgets a crossing is looked for, as a factor
_GRID = 41


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where arm and baseline are equally good, FLOPs, over draws of the fitted law.

    `low`, `high` bound 95% of the draws; None where that end lies beyond the searched range, ten times outside of the
    measured budgets. `median` is None where half of the draws cross nowhere in it. `none_in_range` is the share of
    draws without a crossing between the smallest and the largest budget, `better` the share in which the arm is
    better at each budget. `extrapolated` says that the median lies outside of the measured budgets.
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
        text = f"Share of draws of the shared law in which {self.arm} is better: {shares} FLOPs. "
        inside = f"{self.none_in_range:.0%} of the draws do not cross between {first} and {last} FLOPs"
        if self.median is None:
            return f"{text}{inside}; most cross nowhere within a factor {_REACH:g} of that range either, which is extrapolation."
        low = "below the searched range" if self.low is None else compact(self.low)
        high = "above the searched range" if self.high is None else compact(self.high)
        where = " (an extrapolation beyond the measured range)" if self.extrapolated else ""
        return f"{text}The median crossing is at {compact(self.median)} FLOPs{where}, 95% interval {low} to {high}; {inside}."


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
    return loss.reshape(*loss.shape[:-1], *D.shape).min(axis=-1)


def search_grid(budgets: Sequence[float]) -> np.ndarray:
    """Compute at which curves are compared: every budget, and ten times beyond either end."""
    around = np.geomspace(min(budgets) / _REACH, max(budgets) * _REACH, _GRID)
    return np.unique(np.concatenate([around, np.asarray(budgets, float)]))


def crossing(
    C: np.ndarray, difference_bC: np.ndarray, *, arm: str, baseline: str, budgets: Sequence[float]
) -> Crossing:
    """From differences arm minus baseline of every draw on the grid C, which contains the budgets."""
    budgets = sorted(float(budget) for budget in budgets)
    sign = np.sign(difference_bC)
    located = np.array([_first_crossing(C, row) for row in difference_bC])
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


def _first_crossing(C: np.ndarray, difference: np.ndarray) -> float:
    change = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    if not change.size:
        return math.nan
    i = change[0]
    share = difference[i] / (difference[i] - difference[i + 1])
    return float(math.exp(math.log(C[i]) + share * (math.log(C[i + 1]) - math.log(C[i]))))
