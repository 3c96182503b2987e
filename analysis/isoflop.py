"""The best loss of an arm at one budget: the minimum of a parabola in log(size) (Hoffmann et al. 2022, approach 2).

Only the minimum's loss is used for comparing arms. Its location is reported, and biased where the sizes are wide or off
centre (Open-Athena, "Approach 2"), so that no law is fitted to it here.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.frame import compact, finished
from analysis.refusal import Refused

SIZE = "parameters_body"


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
