"""What a difference in loss is worth in budget: a baseline's losses at the ends of its own runs, linear in log budget between
them, and its first and last segments continued.

Letters: b draws, g budgets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from analysis.curves import Curves
from analysis.gain import Gain, compute_equivalent_gain
from analysis.refusal import Refused

DRAWS = 1000
MOST = 700.0  # of a logarithm whose exponential is still a number
REACH = 64.0  # beyond the baseline's budgets, as a factor, that its curve is drawn
Losses = Mapping[int, float | None]  # by replicate, nats; None where the run diverged


@dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """The baseline's mean loss at its budgets, and the standard errors of those means."""

    baseline: str
    budget_g: np.ndarray
    loss_g: np.ndarray
    error_g: np.ndarray

    @classmethod
    def of(cls, losses: Mapping[tuple[str, float], Losses], baseline: str) -> "BudgetCurve":
        """Of the budgets at which none of its runs diverged; their noise is pooled."""
        whole = {
            budget: [loss for loss in of.values() if loss is not None]
            for (arm, budget), of in sorted(losses.items(), key=lambda item: item[0][1])
            if arm == baseline and len(of) and None not in of.values()
        }
        dof = sum(len(values) - 1 for values in whole.values())
        squares = sum(float(np.var(values) * len(values)) for values in whole.values())
        sd = math.sqrt(squares / dof) if dof else 0.0
        return cls(
            baseline=baseline,
            budget_g=np.array(list(whole)),
            loss_g=np.array([np.mean(values) for values in whole.values()]),
            error_g=np.array([sd / math.sqrt(len(values)) for values in whole.values()]),
        )

    @property
    def refusal(self) -> str | None:
        if len(self.budget_g) < 2:
            return "the baseline has one budget: how its loss falls with budget is unknown, and two show it"
        if (np.diff(self.loss_g) >= 0).any():
            return "the baseline's loss does not fall with every larger budget, so that a gain in budget has no meaning"
        return None

    def budget(self, loss: float) -> float:
        """At which it has this loss, linear in log budget, the end segments continued."""
        x, y = np.log(self.budget_g), self.loss_g
        i = int(np.clip(np.searchsorted(-y, -loss) - 1, 0, len(y) - 2))
        return math.exp(min(x[i] + (loss - y[i]) * (x[i + 1] - x[i]) / (y[i + 1] - y[i]), MOST))

    def loss(self, budget: float) -> float:
        """There, in the same way."""
        x, y = np.log(self.budget_g), self.loss_g
        i = int(np.clip(np.searchsorted(x, math.log(budget)) - 1, 0, len(x) - 2))
        return float(y[i] + (math.log(budget) - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))

    def gain(
        self, arm: str, budget: float, difference: float, *, standard_error: float, dof: float, level: float = 0.95
    ) -> Gain | Refused:
        """Of an arm with this difference to the baseline (nats), over draws of the baseline's means and of the difference."""
        if self.refusal or budget not in self.budget_g:
            return Refused(reason=self.refusal or "runs of the baseline diverged at this budget")
        normal_bg, t_b = _drawn(len(self.loss_g), dof)
        loss_bg = self.loss_g + self.error_g * normal_bg
        at = int(np.flatnonzero(self.budget_g == budget)[0])
        arm_b = loss_bg[:, at] + difference + standard_error * t_b
        ends = np.array([self.budget_g[0] / REACH, self.budget_g[-1] * REACH])
        log_g = np.log(self.budget_g)
        slope_b = [(loss_bg[:, j] - loss_bg[:, i]) / (log_g[j] - log_g[i]) for i, j in ((0, 1), (-2, -1))]
        below = loss_bg[:, 0] - np.minimum(slope_b[0], 0.0) * math.log(REACH)
        above = loss_bg[:, -1] + np.minimum(slope_b[1], 0.0) * math.log(REACH)
        grid = np.array([ends[0], *self.budget_g, ends[1]])
        base = np.column_stack([below, loss_bg, above])
        curves = Curves(
            C=grid,
            loss={self.baseline: base, arm: np.repeat(arm_b[:, None], len(grid), axis=1)},
            measured=(float(self.budget_g[0]), float(self.budget_g[-1])),
        )
        return compute_equivalent_gain(curves, arm=arm, baseline=self.baseline, C=budget, level=level)


@lru_cache(maxsize=256)
def _drawn(budgets: int, dof: float) -> tuple[np.ndarray, np.ndarray]:
    """Standard normals (b, g) and Student's t (b,), the same whenever asked, so that a claim does not depend on the others."""
    rng = np.random.default_rng(0)
    normal_bg, normal_b = rng.standard_normal((DRAWS, budgets)), rng.standard_normal(DRAWS)
    return normal_bg, normal_b / (np.sqrt(rng.chisquare(dof, DRAWS) / dof) if math.isfinite(dof) else 1.0)
