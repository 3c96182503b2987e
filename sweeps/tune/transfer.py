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
    """A constant for each arm and the same exponents for all. About each arm's own centre the two are independent, so that
    an arm's covariance is that of its mean beside that of the exponents, which all arms' cells determine."""
    own = {arm: fit(points, ()) for arm, points in arms.items()}
    x_ik = np.concatenate([
        np.log([[measure(point.size, name) / own[arm].centre[name] for name in columns] for point in points])
        for arm, points in arms.items()
    ]).reshape(-1, len(columns))  # fmt: skip
    y_i = np.concatenate(
        [[math.log(point.rate) - own[arm].log_rate for point in points] for arm, points in arms.items()]
    )
    inverse_kk = np.linalg.pinv(x_ik.T @ x_ik)
    exponents = inverse_kk @ x_ik.T @ y_i
    residual_i, laws, first = y_i - x_ik @ exponents, {}, 0
    for arm, points in arms.items():
        unscaled_kk = np.zeros((1 + len(columns),) * 2)
        unscaled_kk[0, 0], unscaled_kk[1:, 1:] = 1 / len(points), inverse_kk
        rss = float((residual_i[first : first + len(points)] ** 2).sum())
        first += len(points)
        laws[arm] = replace(
            own[arm], columns=columns, exponents=tuple(map(float, exponents)), unscaled_kk=unscaled_kk, rss=rss
        )
    return laws


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Standard deviation of the optima about their rules, in log rate, pooled over arms: of few cells an arm, each arm's own
    is hardly known. sd is NaN where no degree of freedom is left."""

    sd: float
    dof: int

    @property
    def t(self) -> float:
        return float(stats.t.ppf((1 + LEVEL) / 2, self.dof)) if self.dof else math.nan


def pooled_scatter(laws: Sequence[PowerLaw], shared: int = 0) -> Scatter:
    """shared: coefficients that all of them have in common, which their own degrees of freedom do not count."""
    dof = sum(law.dof for law in laws) - shared
    return Scatter(sd=math.sqrt(sum(law.rss for law in laws) / dof) if dof else math.nan, dof=dof)


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
    an arm are worth little at other sizes. one: a single rule for all arms, and the test of it against these."""

    of: Mapping[str, PowerLaw]
    scatter: Scatter
    shared: bool
    exponents_differ: Nested
    one: PowerLaw
    rules_differ: Nested


def laws_of(arms: Mapping[str, Sequence[Point]], columns: Columns) -> Laws:
    own = {arm: fit(points, columns) for arm, points in arms.items()}
    together = fit_together(arms, columns)
    one = fit([point for points in arms.values() for point in points], columns)

    def left(laws: Mapping[str, PowerLaw], shared: int = 0) -> tuple[float, int]:
        return sum(law.rss for law in laws.values()), sum(law.dof for law in laws.values()) - shared

    differ = Nested.of(left(together, len(columns)), left(own))
    shared = not differ.p < 1 - LEVEL
    chosen, count = (together, len(columns)) if shared else (own, 0)
    return Laws(
        of=chosen,
        scatter=pooled_scatter(list(chosen.values()), count),
        shared=shared,
        exponents_differ=differ,
        one=one,
        rules_differ=Nested.of((one.rss, one.dof), left(chosen, count)),
    )
