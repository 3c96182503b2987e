"""The best learning rate of one cell: the vertex of a parabola in log rate, with its interval.

Letters: n rates of a grid, r replicates (seeds), 3 the rates that the parabola goes through.

A trial that diverged has a loss of +inf and is never left out: were it missing, the best rate would seem to lie at the edge
of the grid, or an arm that diverges would seem as good as its lucky seeds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class TrialNoise:
    """sd (nats) of one trial's loss about what its rate and its seed add up to: what moves the best rate of a cell, whose
    rates share their seeds. dof: degrees of freedom; inf where the sd was declared."""

    sd: float
    dof: float
    source: Literal["seeds", "declared"]

    def __str__(self) -> str:
        about = f"between rates of one seed, {self.dof:g} degrees of freedom" if self.source == "seeds" else "declared"
        return f"{self.sd:.2g} nats ({about})"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The lowest loss of a grid is at its first or last rate, so that the best may lie beyond: refused as an optimum."""

    side: Literal["lower", "upper"]
    rate: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """`low` and `high` bound the best rate at 95%; None where the noise leaves that side open. `curvature`: loss is
    curvature * (log rate - log best)^2 above its least, between the neighbours of the grid's best rate.

    cliff: the next higher rate diverged, so that no parabola goes through it: the grid's best rate stands, known to within
    its neighbours. Where the next lower one did, it stands too, and that side is open.
    """

    rate: float
    loss: float
    low: float | None
    high: float | None
    curvature: float | None
    cliff: bool
    rate_n: np.ndarray = field(repr=False)
    loss_n: np.ndarray = field(repr=False)  # mean over seeds; inf where one diverged

    def excess(self, rate: float) -> float:
        """Loss at another rate less the least (nats): on the parabola between the best rate's neighbours, between measured
        means beyond them. inf on the way to a rate that diverged and above it; NaN outside of the rates that were tried."""
        x, x_n = math.log(rate), np.log(self.rate_n)
        if x > x_n[-1] + 1e-9 and math.isinf(self.loss_n[-1]):
            return math.inf
        if not x_n[0] - 1e-9 <= x <= x_n[-1] + 1e-9:
            return math.nan
        best = int(self.loss_n.argmin())
        if self.curvature is not None and x_n[best - 1] <= x <= x_n[best + 1]:
            return self.curvature * (x - math.log(self.rate)) ** 2
        right = min(max(int(np.searchsorted(x_n, x)), 1), len(x_n) - 1)
        share = (x - x_n[right - 1]) / (x_n[right] - x_n[right - 1])
        ends = [(1 - share, self.loss_n[right - 1]), (share, self.loss_n[right])]
        return float(sum(weight * loss for weight, loss in ends if weight > 0)) - self.loss


def optimum(
    rates: Sequence[float], losses: Sequence[float], *, noise: TrialNoise | None = None, replicates: int = 1
) -> Optimum | Edge:
    """The vertex of the parabola in log rate through the best rate and its two neighbours; losses are means over `replicates`.

    Its interval is Fieller's: the rates at which the slope of the parabola, which is linear in the three losses, differs from
    0 by no more than its noise allows (Student's t). It is exact for that parabola and normal noise, and open where the noise
    does not even resolve that the parabola is convex. That the true curve is no parabola is not in it, but in the scatter of
    the optima about their rule. Raises ValueError for losses that are not numbers.
    """
    order = np.argsort(np.asarray(rates, float))
    x_n, loss_n = np.log(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    if np.isnan(loss_n).any() or len(x_n) < 3:
        raise ValueError(f"losses = {list(losses)}: use at least 3 numbers; a trial that diverged is inf, not missing")
    best = int(loss_n.argmin())
    if best in (0, len(loss_n) - 1) or math.isinf(loss_n[best]):
        return Edge(side="upper" if best else "lower", rate=math.exp(x_n[best]), loss=float(loss_n[best]))
    around = slice(best - 1, best + 2)
    if not np.isfinite(loss_n[around]).all():
        low, at, high = (math.exp(x) for x in x_n[around])
        # A lower rate that diverged, which is a seed's bad luck, bounds nothing.
        return Optimum(rate=at, loss=float(loss_n[best]), low=low if math.isfinite(loss_n[best - 1]) else None, high=high,
                       curvature=None, cliff=math.isinf(loss_n[best + 1]), rate_n=np.exp(x_n), loss_n=loss_n)  # fmt: skip
    centre = x_n[best]
    slope_3, bend_3 = _slope(x_n[around] - centre)
    slope, bend = float(slope_3 @ loss_n[around]), float(bend_3 @ loss_n[around])
    at = -slope / bend
    low = high = None
    if noise is not None:
        low, high = _fieller(slope_3, bend_3, slope, bend, noise, replicates)
    loss = float(loss_n[best]) + slope * at + bend * at**2 / 2
    return Optimum(
        rate=math.exp(centre + at),
        loss=loss,
        low=None if low is None else math.exp(centre + low),
        high=None if high is None else math.exp(centre + high),
        curvature=bend / 2,
        cliff=False,
        rate_n=np.exp(x_n),
        loss_n=loss_n,
    )


def trial_noise(losses: Iterable[np.ndarray]) -> TrialNoise | None:
    """Pooled over cells, each (n, r): rates in r seeds that they share. The interaction of rate and seed: what a seed adds to
    all rates does not move the best. None where nothing is left to estimate it from."""
    squares, dof = 0.0, 0
    for loss_nr in losses:
        rest = loss_nr - loss_nr.mean(0) - loss_nr.mean(1, keepdims=True) + loss_nr.mean()
        squares += float((rest**2).sum())
        dof += (loss_nr.shape[0] - 1) * (loss_nr.shape[1] - 1)
    return TrialNoise(sd=math.sqrt(squares / dof), dof=dof, source="seeds") if dof and squares > 0 else None


def around_best(loss_nr: np.ndarray) -> np.ndarray | None:
    """The rows of the best mean loss and its neighbours in which no seed diverged; None at an edge, and of fewer than two."""
    best = int(loss_nr.mean(1).argmin())
    rows = loss_nr[best - 1 : best + 2] if 0 < best < len(loss_nr) - 1 else loss_nr[:0]
    rows = rows[np.isfinite(rows).all(1)]
    return rows if len(rows) > 1 else None


def _slope(x_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of three losses in the slope of their parabola at x = 0, and in its change with x (Lagrange)."""
    others = [(x_3[1], x_3[2]), (x_3[0], x_3[2]), (x_3[0], x_3[1])]
    scale_3 = np.array([1 / ((x - a) * (x - b)) for x, (a, b) in zip(x_3, others, strict=True)])
    return np.array([-(a + b) for a, b in others]) * scale_3, 2 * scale_3


def _fieller(
    slope_3: np.ndarray, bend_3: np.ndarray, slope: float, bend: float, noise: TrialNoise, replicates: int
) -> tuple[float | None, float | None]:
    """Ends of {x: (slope + bend x)^2 <= t^2 var(slope + bend x)} (Fieller 1954); open where it is no interval."""
    from scipy import stats

    t = stats.t.ppf((1 + LEVEL) / 2, noise.dof) if math.isfinite(noise.dof) else stats.norm.ppf((1 + LEVEL) / 2)
    spread = float(t) ** 2 * noise.sd**2 / replicates
    a = bend**2 - spread * float(bend_3 @ bend_3)
    b = slope * bend - spread * float(slope_3 @ bend_3)
    c = slope**2 - spread * float(slope_3 @ slope_3)
    if a <= 0:
        return None, None
    root = math.sqrt(max(b * b - a * c, 0.0))
    return (-b - root) / a, (-b + root) / a
