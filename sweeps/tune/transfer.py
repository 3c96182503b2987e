"""Through the best rates of an arm's cells: rate = c * size^a * tokens^b, by least squares in logarithms.

Size is body forward FLOPs per token of text, tokens are those of the whole run (sweeps.ladder.Size). Porian et al. 2024
(arXiv:2406.19146) have b = 0, Step Law (Li et al. 2025, arXiv:2503.04715) both; here the cells decide.

Letters: i cells, k coefficients (the log rate at the centre of the cells, then an exponent for each column).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy import stats

from sweeps.ladder import Size
from sweeps.tune.optima import LEVEL

Column = Literal["size", "tokens"]
Columns = tuple[Column, ...]
# Most wanted first: the first that the cells determine is fitted.
FORMS: tuple[Columns, ...] = (("size", "tokens"), ("size",), ("tokens",), ())
MOST_INFLATION = (
    10.0  # of the variance of one exponent by the other: above that they can not be told apart (a usual limit)
)


@dataclass(frozen=True, kw_only=True)
class Point:
    size: Size
    rate: float


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """`exponents` has one for each column; `log_rate` is at the geometric centre of the cells. `unscaled_kk` times the
    squared scatter is the covariance of (log_rate, exponents). rss: squared residuals in log rate, over `dof`."""

    columns: Columns
    log_rate: float
    exponents: tuple[float, ...]
    centre: Mapping[Column, float]
    unscaled_kk: np.ndarray = field(repr=False)
    rss: float
    dof: int
    fitted: Mapping[Column, tuple[float, float]]  # range of the cells, of both columns whatever the form

    def rate(self, size: Size) -> float:
        return math.exp(self.log_rate + float(np.dot(self.exponents, self._away(size))))

    def log_sd(self, size: Size, scatter: float, *, new: bool = False) -> float:
        """Standard error of the rule's log rate at a size; with new, of an optimum that is measured there."""
        x_k = np.array([1.0, *self._away(size)])
        return scatter * math.sqrt(float(x_k @ self.unscaled_kk @ x_k) + (1.0 if new else 0.0))

    def exponent(self, column: Column) -> float:
        return dict(zip(self.columns, self.exponents, strict=True)).get(column, 0.0)

    @property
    def c(self) -> float:
        """The rate at size 1 and 1 token: a way to write the rule, far from anything that was measured."""
        return math.exp(self.log_rate - sum(e * math.log(self.centre[n]) for n, e in zip(self.columns, self.exponents,
                                                                                        strict=True)))  # fmt: skip

    def _away(self, size: Size) -> list[float]:
        return [math.log(measure(size, name) / self.centre[name]) for name in self.columns]


def measure(size: Size, column: Column) -> float:
    return size.body_flops if column == "size" else size.tokens


def determined(arms: Sequence[Sequence[Point]]) -> Columns:
    """The first form that the cells of every arm determine: more cells than coefficients, every column varies, and neither
    exponent's variance is inflated more than tenfold by the other. One form for all arms: they are tuned alike."""
    return next(columns for columns in FORMS if all(_determines(points, columns) for points in arms))


def _determines(points: Sequence[Point], columns: Columns) -> bool:
    if not columns:
        return True
    x_ik = np.log([[measure(point.size, name) for name in columns] for point in points])
    x_ik -= x_ik.mean(0)
    if len(points) <= len(columns) + 1 or (x_ik.std(0) < 0.05).any():
        return False
    return len(columns) < 2 or 1 / max(1 - np.corrcoef(x_ik.T)[0, 1] ** 2, 1e-12) <= MOST_INFLATION


def fit(points: Sequence[Point], columns: Columns) -> PowerLaw:
    """Every cell counts alike: an optimum lies within half a grid step of its best rate, however flat its parabola. Raises
    ValueError without any cell."""
    if not points:
        raise ValueError("points = []: a rule needs at least one cell with an optimum")
    every: tuple[Column, ...] = ("size", "tokens")
    values: dict[Column, np.ndarray] = {
        name: np.array([measure(point.size, name) for point in points], float) for name in every
    }
    centre: dict[Column, float] = {name: float(np.exp(np.log(value).mean())) for name, value in values.items()}
    X_ik = np.stack([np.ones(len(points)), *(np.log(values[name] / centre[name]) for name in columns)], axis=1)
    y_i = np.log([point.rate for point in points])
    unscaled_kk = np.linalg.pinv(X_ik.T @ X_ik)
    beta_k = unscaled_kk @ X_ik.T @ y_i
    return PowerLaw(
        columns=columns,
        log_rate=float(beta_k[0]),
        exponents=tuple(float(value) for value in beta_k[1:]),
        centre=centre,
        unscaled_kk=unscaled_kk,
        rss=float(((y_i - X_ik @ beta_k) ** 2).sum()),
        dof=len(points) - X_ik.shape[1],
        fitted={name: (float(value.min()), float(value.max())) for name, value in values.items()},
    )


def fit_together(arms: Mapping[str, Sequence[Point]], columns: Columns) -> dict[str, PowerLaw]:
    """A constant for each arm and the same exponents for all, by least squares. Their covariance is `_with_cells`'s."""
    own = {arm: fit(points, ()) for arm, points in arms.items()}
    x_ik = np.concatenate([_away(points, own[arm], columns) for arm, points in arms.items()])
    y_i = np.concatenate([np.log([point.rate for point in points]) - own[arm].log_rate for arm, points in arms.items()])
    exponents = np.linalg.pinv(x_ik.T @ x_ik) @ x_ik.T @ y_i
    return {arm: replace(law, columns=columns, exponents=tuple(map(float, exponents))) for arm, law in own.items()}


def _away(points: Sequence[Point], law: PowerLaw, columns: Columns) -> np.ndarray:
    """[cells, columns]: logarithms, from the law's centre."""
    logs = [[math.log(measure(point.size, name) / law.centre[name]) for name in columns] for point in points]
    return np.array(logs).reshape(len(points), len(columns))


def _with_cells(
    arms: Mapping[str, Sequence[Point]], laws: Mapping[str, PowerLaw]
) -> tuple[dict[str, PowerLaw], "Scatter"]:
    """What is known of laws with the same exponents, of arms that have the same cells in the same order.

    Where a power law does not fit a cell, it does not fit it for any arm: arms are no replicates of that. So residuals are
    taken apart, into their mean in each cell and what is left beside it. Exponents, and what all constants have in common, are
    known as well as the cells' means say, which are as few as the cells; an arm's own constant besides as what is left says.
    """
    (first, *_), A = laws.values(), len(laws)
    residual_ac = np.array([[math.log(point.rate / laws[arm].rate(point.size)) for point in arms[arm]] for arm in laws])
    C, coefficients = residual_ac.shape[1], 1 + len(first.columns)
    mean_c, dof = residual_ac.mean(0), residual_ac.shape[1] - coefficients
    left = float(((residual_ac - mean_c) ** 2).sum()) / max((A - 1) * (C - 1), 1)
    between = float((mean_c**2).sum()) / dof if dof > 0 else math.nan
    X_ck = np.concatenate(
        [np.ones((C, 1)), np.mean([_away(arms[arm], laws[arm], first.columns) for arm in laws], 0)], 1
    )
    scatter = Scatter(sd=math.sqrt(between + left), dof=max(dof, 0))
    covariance = between * np.linalg.pinv(X_ck.T @ X_ck)
    covariance[0, 0] += left / C
    unscaled_kk = covariance / scatter.sd**2 if scatter.sd > 0 else np.linalg.pinv(X_ck.T @ X_ck)
    return {arm: replace(law, unscaled_kk=unscaled_kk) for arm, law in laws.items()}, scatter


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Standard deviation of the optima about their rules, in log rate, pooled over arms: of few cells an arm, each arm's own
    is hardly known. sd is NaN where no degree of freedom is left."""

    sd: float
    dof: int

    @property
    def t(self) -> float:
        return float(stats.t.ppf((1 + LEVEL) / 2, self.dof)) if self.dof else math.nan


def pooled_scatter(laws: Sequence[PowerLaw]) -> Scatter:
    """Of as many degrees of freedom as one arm has: where cells fit no power law they fit none of any arm, and arms are no
    replicates of that."""
    dof = sum(law.dof for law in laws)
    sd = math.sqrt(sum(law.rss for law in laws) / dof) if dof else math.nan
    return Scatter(sd=sd, dof=min((law.dof for law in laws), default=0))


@dataclass(frozen=True, kw_only=True)
class Nested:
    """An F test of fewer coefficients against more. p is NaN where there is nothing to tell, or no degree of freedom."""

    F: float
    p: float

    @classmethod
    def of(cls, few: tuple[float, int], many: tuple[float, int]) -> "Nested":
        """From (squared residuals, degrees of freedom) of each."""
        (rss_few, dof_few), (rss, dof) = few, many
        more = dof_few - dof
        if not (more and dof and rss > 0):
            return cls(F=math.nan, p=math.nan)
        F = max(rss_few - rss, 0.0) / more / (rss / dof)
        return cls(F=F, p=float(stats.f.sf(F, more, dof)))


@dataclass(frozen=True, kw_only=True)
class Laws:
    """A rule for each arm. Their exponents are the same unless an F test at 5% says that they differ: exponents of few cells
    an arm are worth little at other sizes. one: a single rule for all arms, and the test of whether constants differ from it."""

    of: Mapping[str, PowerLaw]
    scatter: Scatter
    shared: bool
    exponents_differ: Nested
    one: PowerLaw
    rules_differ: Nested


def laws_of(arms: Mapping[str, Sequence[Point]], columns: Columns) -> Laws:
    """arms: their points, of the same cells in the same order. Both tests are within cells: what a cell does to all arms alike
    is no evidence about any of them."""
    own = {arm: fit(points, columns) for arm, points in arms.items()}
    together = fit_together(arms, columns)
    one = fit([point for points in arms.values() for point in points], columns)
    names, C, k = list(arms), len(next(iter(arms.values()))), len(columns)
    y_i = np.log([point.rate for points in arms.values() for point in points])
    x_ik = np.concatenate([_away(points, one, columns) for points in arms.values()])
    of_cell, of_arm = np.tile(np.eye(C), (len(names), 1)), np.repeat(np.eye(len(names)), C, axis=0)
    slopes = (of_arm[:, :, None] * x_ik[:, None, :]).reshape(len(y_i), len(names) * k)

    def left(*blocks: np.ndarray) -> tuple[float, int]:
        """Squared residuals, and their degrees of freedom."""
        X = np.concatenate(blocks, axis=1)
        beta, _, rank, _ = np.linalg.lstsq(X, y_i, rcond=1e-10)
        return float(((y_i - X @ beta) ** 2).sum()), len(y_i) - int(rank)

    constants = left(of_cell, of_arm, x_ik)
    differ = Nested.of(constants, left(of_cell, of_arm, slopes))
    shared = len(names) > 1 and not differ.p < 1 - LEVEL
    chosen, scatter = _with_cells(arms, together) if shared else (own, pooled_scatter(list(own.values())))
    return Laws(
        of=chosen,
        scatter=scatter,
        shared=shared,
        exponents_differ=differ,
        one=one,
        rules_differ=Nested.of(left(of_cell, x_ik), constants),
    )
