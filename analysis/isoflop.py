"""The best loss at one budget, and the size that has it: the minimum over sizes at equal compute.

`minima` and `minimum` serve a study's records: a parabola in log(size) (Hoffmann et al. 2022, approach 2) for each arm
and budget. Only the minimum's loss is used for comparing arms. Its location is reported, and biased where the sizes are
wide or off centre (Open-Athena, "Approach 2"), so that no law is fitted to it here.

`isoflop_minima` serves any table with columns N, C and loss, by the same parabola or by Akima interpolation (Porian et
al. 2024, arXiv:2406.19146), with intervals of N* and L* under the noise of a run. optimum.py regresses N* on C.

Letters: n sizes, b draws of the noise.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import interpolate

from analysis.frame import compact, finished
from analysis.problem import nearest
from analysis.refusal import Refused

SIZE = "parameters_body"
GAP = 0.5  # of the spread of losses over sizes, that a minimum may lie below the nearest size


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Least loss (nats) of a parabola through an arm's runs at one budget, inside the sizes that were run.

    `weights` holds one number for each run: the minimum is linear in the losses to first order, with these
    coefficients, so that its standard error is the noise of one run times their Euclidean norm (`per_noise`).
    `log_N_per_noise` is the same for log N. `bracketed` says whether a size between the smallest and the largest has
    the lowest loss.
    """

    arm: str
    budget: float
    loss: float
    N: float
    weights: dict[str, float] = field(repr=False)
    log_N_per_noise: float
    coefficients: tuple[float, float, float]  # loss = c0 + c1 u + c2 u^2 with u = log(N / N_centre)
    N_centre: float
    N_range: tuple[float, float]
    bracketed: bool
    residual_sum: float  # of squares, nats^2
    residual_dof: int

    @property
    def per_noise(self) -> float:
        return float(np.sqrt(sum(weight**2 for weight in self.weights.values())))

    def curve(self, N: np.ndarray) -> np.ndarray:
        u = np.log(N / self.N_centre)
        c0, c1, c2 = self.coefficients
        return c0 + c1 * u + c2 * u**2


Minima = dict[tuple[str, float], Minimum | Refused]


def minima(frame: pd.DataFrame, *, size: str = SIZE) -> Minima:
    """The minimum, or the reason why there is none, for each arm and budget of the plan."""
    done = finished(frame)
    found: Minima = {}
    for arm in dict.fromkeys(frame["arm"]):
        for budget in sorted(frame["budget"].unique()):
            rows = done[(done["arm"] == arm) & (done["budget"] == budget)]
            found[arm, float(budget)] = minimum(rows, arm=str(arm), budget=float(budget), size=size)
    return found


def minimum(rows: pd.DataFrame, *, arm: str, budget: float, size: str = SIZE) -> Minimum | Refused:
    """The parabola's minimum for the finished runs of one arm at one budget."""
    N, loss = rows[size].to_numpy(float), rows["loss"].to_numpy(float)
    here = f"{arm} at {compact(budget)} FLOPs"
    sizes = np.unique(N)
    if len(sizes) < 3:
        return Refused(reason=f"{here}: {len(sizes)} sizes finished and a parabola needs 3; run more rungs")
    N_centre = float(np.exp(np.log(sizes).mean()))
    u = np.log(N / N_centre)
    X = np.stack([np.ones_like(u), u, u**2], axis=1)
    inverse = np.linalg.pinv(X)
    c0, c1, c2 = (float(value) for value in inverse @ loss)
    mean_loss = np.array([loss[size_ == N].mean() for size_ in sizes])
    best = int(mean_loss.argmin())
    side = "smaller" if best == 0 else "larger"
    if c2 <= 0:
        return Refused(
            reason=f"{here}: loss is not convex in log size, so it has no minimum; add {side} sizes or more seeds"
        )
    u_min = -c1 / (2 * c2)
    if not u.min() < u_min < u.max():
        side = "smaller" if u_min <= u.min() else "larger"
        return Refused(reason=f"{here}: the minimum lies beyond the sizes that were run; add {side} sizes")
    # A parabola that falls on into a gap between sizes would beat all that was run. Of evenly spread sizes it is an eighth.
    below = c2 * float(np.min((np.log(sizes / N_centre) - u_min) ** 2))
    if below > GAP * (mean_loss.max() - mean_loss.min()):
        low, high = (compact(float(N_centre * np.exp(edge))) for edge in _around(np.log(sizes / N_centre), u_min))
        return Refused(
            reason=f"{here}: the minimum lies in a gap between sizes, {below:.2g} nats below the nearest of them; add sizes "
            f"between {low} and {high}"
        )
    at_minimum = np.array([1.0, u_min, u_min**2]) @ inverse  # the slope is zero there, so moving u_min adds nothing
    log_N_slope = (-inverse[1] + c1 / c2 * inverse[2]) / (2 * c2)
    residual = loss - X @ (c0, c1, c2)
    return Minimum(
        arm=arm,
        budget=budget,
        loss=c0 + c1 * u_min + c2 * u_min**2,
        N=N_centre * float(np.exp(u_min)),
        weights=dict(zip(rows["run_id"], (float(weight) for weight in at_minimum), strict=True)),
        log_N_per_noise=float(np.linalg.norm(log_N_slope)),
        coefficients=(c0, c1, c2),
        N_centre=N_centre,
        N_range=(float(sizes[0]), float(sizes[-1])),
        bracketed=0 < best < len(sizes) - 1,
        residual_sum=float(residual @ residual),
        residual_dof=len(loss) - 3,
    )


def _around(u_n: np.ndarray, u: float) -> tuple[float, float]:
    """The neighbours of u among the sorted u_n."""
    place = int(np.searchsorted(u_n, u))
    return float(u_n[place - 1]), float(u_n[place])


# --- any table -------------------------------------------------------------------------------------------------------

Method = Literal["akima", "parabola"]
Noise = float | Callable[[np.ndarray], Any]  # sd of one run's loss in nats, or a function of the loss

TOLERANCE = 0.02
_PER_GAP = 25  # points of the search grid between neighbouring sizes
_RESOLVED = 1 / 3  # of the distance of neighbouring sizes: no interpolation locates a minimum better (Porian et al.)


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """The minimum over sizes at compute `C`, the geometric mean of the runs' own, which differ by the share `spread`.

    `N` and `loss` (nats) are the interpolated curve's own minimum. `log_N_b`, `log_loss_b` are those of curves to whose
    runs noise of standard deviation `noise` (the mean over runs, nats; `noise_source` says from where) was added;
    log_N_b is -inf or inf where a draw's lowest loss is at the smallest or largest size. `inside` is the share of draws
    that are not. Without a known noise they are empty. Noise is added to losses that have noise, and a minimum is taken
    over it: the draws of the loss are lower than the truth by about as much as one noise lowers a minimum.
    """

    arm: str
    C: float
    spread: float
    method: Method
    N: float
    loss: float
    N_n: np.ndarray = field(repr=False)  # sizes, and the mean loss of each
    loss_n: np.ndarray = field(repr=False)
    noise: float
    noise_source: str
    log_N_b: np.ndarray = field(repr=False)
    log_loss_b: np.ndarray = field(repr=False)

    @property
    def sizes(self) -> int:
        return len(self.N_n)

    @property
    def N_range(self) -> tuple[float, float]:
        return float(self.N_n[0]), float(self.N_n[-1])

    def curve(self, N: Any) -> np.ndarray:
        """The interpolated loss at N, nats; NaN outside of the sizes that were run."""
        N = np.asarray(N, float)
        if self.method == "akima":
            return np.exp(_akima_curve(self.N_n, self.loss_n)(np.log(N)))
        u = np.log(N) - np.log(self.N_n).mean()
        return np.where(
            np.clip(N, *self.N_range) == N, np.polyval(np.polyfit(_centred(self.N_n), self.loss_n, 2), u), np.nan
        )

    @property
    def inside(self) -> float:
        return float(np.isfinite(self.log_N_b).mean()) if self.log_N_b.size else 1.0

    @property
    def log_N_sd(self) -> float:
        """Of log N* over draws with a minimum inside, over their share, at least a third of the mean distance of
        neighbouring sizes: the weights of Porian et al."""
        gap = np.log(self.N_range[1] / self.N_range[0]) / (self.sizes - 1)
        found = self.log_N_b[np.isfinite(self.log_N_b)]
        return float(max(found.std() if found.size else 0.0, gap * _RESOLVED) / self.inside)

    @property
    def N_median(self) -> float:
        """Over all draws: less moved by one run's noise than `N`."""
        if not self.log_N_b.size:
            return self.N
        return float(np.exp(np.quantile(self.log_N_b, 0.5, method="inverted_cdf")))

    def N_interval(self, level: float = 0.95) -> tuple[float | None, float | None] | None:
        """An end is None where draws say no more than beyond the sizes that were run; None where noise is unknown."""
        if not self.log_N_b.size:
            return None
        # An order statistic, since interpolation between infinities is not a number.
        ends = np.quantile(self.log_N_b, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        low, high = (float(np.exp(end)) if np.isfinite(end) else None for end in ends)
        return low, high

    def loss_interval(self, level: float = 0.95) -> tuple[float, float] | None:
        if not self.log_loss_b.size:
            return None
        low, high = np.exp(np.quantile(self.log_loss_b, [(1 - level) / 2, (1 + level) / 2]))
        return float(low), float(high)


def isoflop_minima(
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    arm: str | None = None,
    method: Method = "akima",
    noise: Noise | None = None,
    tolerance: float = TOLERANCE,
    draws: int = 1000,
    seed: int = 0,
) -> dict[tuple[str, float], IsoFlop | Refused]:
    """The minimum over N, or the reason why there is none, of each arm ("" without a column `arm`) at each compute.

    `columns` maps N and C to the table's names. Rows whose C differ by less than `tolerance` form one budget; runs of
    equal size in it are averaged. Without `noise` it is estimated from those, or else from the scatter about parabolas,
    which contains what a parabola misses; where neither can be, minima have no intervals. Raises ValueError for columns
    that are not there, or values that are not positive and finite.
    """
    if method not in ("akima", "parabola"):
        raise ValueError(f"method = {method!r}: use 'akima' or 'parabola'")
    N_n, C_n = (positive(table, (columns or {}).get(name, name)) for name in ("N", "C"))
    loss_n = positive(table, loss)
    if arm is not None and arm not in table:
        raise ValueError(f"arm = {arm!r} is not a column of the table; it has {', '.join(map(str, table))}")
    arm_n = np.full(len(loss_n), "") if arm is None else np.asarray([str(name) for name in table[arm]])
    budget_n = budgets(C_n, tolerance)
    cells = {}
    for name in dict.fromkeys(arm_n):
        for budget in np.unique(budget_n):
            rows = (arm_n == name) & (budget_n == budget)
            if rows.any():
                cells[name, budget] = _Cell.of(N_n[rows], C_n[rows], loss_n[rows])
    sd, source = _estimated(list(cells.values())) if noise is None else (noise, "given")
    if not callable(sd) and sd is not None and not (np.isfinite(sd) and sd >= 0):
        raise ValueError(f"noise = {sd!r}: use the standard deviation of one run's loss in nats, or a function of it")
    rng = np.random.default_rng(seed)
    return {
        (str(name), cell.C): _isoflop(str(name), cell, method, sd, source, draws, rng)
        for (name, _), cell in cells.items()
    }


def budgets(C_n: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """The index of each row's budget: rising in C, none wider than a factor of 1 + tolerance."""
    labels, label, first = np.zeros(len(C_n), int), -1, 0.0
    for i in np.argsort(C_n, kind="stable"):
        if C_n[i] > first * (1 + tolerance) or label < 0:
            label, first = label + 1, C_n[i]
        labels[i] = label
    return labels


def positive(table: Any, name: str) -> np.ndarray:
    """A column as floats; an integer one of 6 N D does not overflow later."""
    if name not in table:
        known = [str(column) for column in table]
        raise ValueError(f"column {name!r} is not in the table: {nearest(name, known)}it has {', '.join(known)}")
    values = np.asarray(table[name], float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] = {values[bad[0]]}: use positive finite numbers; drop {bad.size} such rows")
    return values


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Runs at one compute: sizes ascending, the mean loss and number of runs of each, squares about the means."""

    C: float
    spread: float
    N_n: np.ndarray
    loss_n: np.ndarray
    runs_n: np.ndarray
    squares: float

    @classmethod
    def of(cls, N: np.ndarray, C: np.ndarray, loss: np.ndarray) -> "_Cell":
        # Sizes that differ by rounding are one size.
        _, first, which, runs = np.unique(
            np.round(np.log(N), 6), return_index=True, return_inverse=True, return_counts=True
        )
        mean = np.bincount(which, weights=loss) / runs
        squares, spread = float(((loss - mean[which]) ** 2).sum()), float(C.max() / C.min() - 1)
        C_mean = float(np.exp(np.log(C).mean()))
        return cls(C=C_mean, spread=spread, N_n=N[first], loss_n=mean, runs_n=runs, squares=squares)


def _estimated(cells: list[_Cell]) -> tuple[float | None, str]:
    dof = sum(int((cell.runs_n - 1).sum()) for cell in cells)
    if dof:
        return float(
            np.sqrt(sum(cell.squares for cell in cells) / dof)
        ), f"runs of equal size ({dof} degrees of freedom)"
    squares = 0.0
    for cell in cells:
        if len(cell.N_n) > 3:
            X = np.vander(_centred(cell.N_n), 3)
            squares += float(((cell.loss_n - X @ np.linalg.lstsq(X, cell.loss_n, rcond=None)[0]) ** 2).sum())
            dof += len(cell.N_n) - 3
    if dof < 3:
        return None, "unknown: no size has two runs and parabolas leave too few degrees of freedom"
    return float(np.sqrt(squares / dof)), f"scatter about parabolas ({dof} degrees of freedom)"


def _isoflop(
    arm: str, cell: _Cell, method: Method, noise: Noise | None, source: str, draws: int, rng: np.random.Generator
) -> IsoFlop | Refused:
    here = f"{arm} at {compact(cell.C)} FLOPs" if arm else f"at {compact(cell.C)} FLOPs"
    if len(cell.N_n) < 3:
        return Refused(reason=f"{here}: a minimum over sizes needs 3 and there are {len(cell.N_n)}; run more sizes")
    sd_n, losses_bn = np.zeros(len(cell.N_n)), cell.loss_n[None]
    if noise is not None:
        sd_n = np.broadcast_to(np.asarray(noise(cell.loss_n) if callable(noise) else noise, float), cell.N_n.shape)
        noisy_bn = cell.loss_n + rng.standard_normal((draws, len(sd_n))) * sd_n / np.sqrt(cell.runs_n)
        losses_bn = np.concatenate([losses_bn, np.maximum(noisy_bn, 1e-6 * cell.loss_n)])
    find = _parabola if method == "parabola" else _akima
    log_N_b, log_loss_b = find(cell.N_n, losses_bn)
    if not np.isfinite(log_N_b[0]):
        if np.isnan(log_N_b[0]):
            return Refused(reason=f"{here}: loss is not convex in log size, so it has no minimum; add sizes")
        side = "smaller" if log_N_b[0] < 0 else "larger"
        return Refused(reason=f"{here}: the lowest loss is at the edge of the sizes that were run; add {side} sizes")
    inside = np.isfinite(log_N_b[1:]).mean() if draws and noise is not None else 1.0
    if inside <= 0.5:
        return Refused(
            reason=f"{here}: under a run's noise {1 - inside:.0%} of the minima are at the edge of the sizes; add sizes"
        )
    # A draw that is not convex has no side: it counts to the nearer edge of the point's minimum.
    nearer = np.copysign(np.inf, log_N_b[0] - np.log(cell.N_n[[0, -1]]).mean())
    return IsoFlop(
        arm=arm,
        C=cell.C,
        spread=cell.spread,
        method=method,
        N=float(np.exp(log_N_b[0])),
        loss=float(np.exp(log_loss_b[0])),
        N_n=cell.N_n,
        loss_n=cell.loss_n,
        noise=float(sd_n.mean()),
        noise_source=source,
        log_N_b=np.where(np.isnan(log_N_b[1:]), nearer, log_N_b[1:]),
        log_loss_b=log_loss_b[1:],
    )


def _centred(N_n: np.ndarray) -> np.ndarray:
    return np.log(N_n) - np.log(N_n).mean()


def _parabola(N_n: np.ndarray, losses_bn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log N* and log L*: beyond the sizes log N* is infinite and L* is the edge's; NaN where the curve is not
    convex."""
    u_n = _centred(N_n)
    c2, c1, c0 = np.linalg.pinv(np.vander(u_n, 3)) @ losses_bn.T
    convex = c2 > 0
    u = np.where(convex, -c1 / (2 * np.where(convex, c2, 1.0)), 0.0)
    at = np.clip(u, u_n[0], u_n[-1])
    least = np.where(convex, c0 + c1 * at + c2 * at**2, losses_bn.min(axis=1))
    log_N = np.log(N_n).mean() + u
    log_N = np.where(u <= u_n[0], -np.inf, np.where(u >= u_n[-1], np.inf, log_N))
    return np.where(convex, log_N, np.nan), np.log(np.maximum(least, 1e-12))


def _akima_curve(N_n: np.ndarray, losses_nb: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return interpolate.Akima1DInterpolator(np.log(N_n), np.log(losses_nb))


def _akima(N_n: np.ndarray, losses_bn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_parabola`, by Akima interpolation of log loss in log N on a grid; a parabola through the grid's least value
    and its neighbours takes away the grid."""
    x_n = np.log(N_n)
    grid = np.linspace(x_n[0], x_n[-1], (len(x_n) - 1) * _PER_GAP + 1)
    values_gb = _akima_curve(N_n, losses_bn.T)(grid)
    least = values_gb.argmin(axis=0)
    at = np.clip(least, 1, len(grid) - 2)
    left, middle, right = (np.take_along_axis(values_gb, (at + k)[None], axis=0)[0] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    curved = bend > 0
    shift = np.where(curved, (left - right) / (2 * np.where(curved, bend, 1.0)), 0.0)
    log_N = grid[at] + np.clip(shift, -1, 1) * (grid[1] - grid[0])
    value = np.where(curved, middle - (left - right) ** 2 / (8 * np.where(curved, bend, 1.0)), middle)
    log_N = np.where(least == 0, -np.inf, np.where(least == len(grid) - 1, np.inf, log_N))
    return log_N, np.where(np.isfinite(log_N), value, values_gb.min(axis=0))
