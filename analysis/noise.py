"""How far the losses of two trainings differ when only their seeds do, and when only their sizes do.

sd is in nats, dof are the degrees of freedom it was estimated with.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis.frame import finished
from analysis.isoflop import Minima, Minimum
from analysis.refusal import Refused


@dataclass(frozen=True, kw_only=True)
class Spread:
    sd: float
    dof: int


@dataclass(frozen=True, kw_only=True)
class Noise:
    """sd of one run's loss about its cell (an arm, budget and rung) over seeds, pooled over arms; or, where `source` is
    'scatter', about the parabolas, which contains seeds and what a parabola misses."""

    sd: float
    dof: int
    source: Literal["seeds", "scatter"]
    by_arm: dict[str, Spread] = field(default_factory=dict)
    # Of the difference arm - baseline between runs that share their seeds; absent where no replicates pair up.
    paired: dict[str, Spread] = field(default_factory=dict)

    def __str__(self) -> str:
        about = "over seeds" if self.source == "seeds" else "about the iso-FLOP parabolas"
        return f"{self.sd:.2g} nats {about} ({self.dof} degrees of freedom)"


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """Whether parabolas miss the losses by more than seeds explain: an F test of their residual against pure error."""

    sd: float  # of what the parabolas leave, without the pure error
    dof: int
    F: float
    p: float


CELL = ["arm", "budget", "rung"]


def seed_noise(frame: pd.DataFrame) -> Noise | Refused:
    """Pooled over every cell with two or more finished runs. A run that two arms share counts once."""
    done = finished(frame)
    pooled = _within(done.drop_duplicates("run_id"))
    if pooled is None:
        return Refused(
            reason="no arm, budget and rung has two finished seeds, so the noise of a run is unknown; add replicates"
        )
    if pooled.sd == 0.0:
        return Refused(reason="replicates have identical losses: their seeds changed nothing; give them other seeds")
    by_arm = {str(arm): spread for arm, rows in done.groupby("arm", sort=False) if (spread := _within(rows))}
    baseline = frame.attrs["study"]["baseline"]
    paired = {}
    for arm in dict.fromkeys(done["arm"]):
        if arm != baseline and (spread := _paired(done, str(arm), baseline)):
            paired[str(arm)] = spread
    return Noise(sd=pooled.sd, dof=pooled.dof, source="seeds", by_arm=by_arm, paired=paired)


def scatter(found: Minima) -> Noise | Refused:
    """Pooled residual of the parabolas; arms that share all their runs count once."""
    fits = {tuple(sorted(m.weights)): m for m in found.values() if isinstance(m, Minimum)}
    squares, dof = sum(m.residual_sum for m in fits.values()), sum(m.residual_dof for m in fits.values())
    if dof < 3 or squares <= 0:
        return Refused(reason=f"{dof} degrees of freedom are left by the parabolas and 3 are needed; run more sizes")
    return Noise(sd=float(np.sqrt(squares / dof)), dof=int(dof), source="scatter")


def lack_of_fit(frame: pd.DataFrame, found: Minima) -> LackOfFit | Refused:
    done = finished(frame)
    fits = {tuple(sorted(m.weights)): m for m in found.values() if isinstance(m, Minimum)}
    used = done[done["run_id"].isin([run_id for m in fits.values() for run_id in m.weights])].drop_duplicates("run_id")
    noise = seed_noise(frame)
    if isinstance(noise, Refused):
        return noise
    pure = _within(used)
    pure_squares, pure_dof = (pure.sd**2 * pure.dof, pure.dof) if pure else (0.0, 0)
    dof = sum(m.residual_dof for m in fits.values()) - pure_dof
    if dof < 1:
        return Refused(reason="the parabolas go through as many sizes as they have coefficients; run more sizes")
    squares = max(0.0, sum(m.residual_sum for m in fits.values()) - pure_squares)
    F = squares / dof / noise.sd**2
    return LackOfFit(sd=float(np.sqrt(squares / dof)), dof=dof, F=float(F), p=float(stats.f.sf(F, dof, noise.dof)))


def _within(rows: pd.DataFrame) -> Spread | None:
    groups = [group["loss"].to_numpy(float) for _, group in rows.groupby(CELL) if len(group) > 1]
    dof = sum(len(group) - 1 for group in groups)
    if not dof:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return Spread(sd=float(np.sqrt(squares / dof)), dof=dof)


def _paired(done: pd.DataFrame, arm: str, baseline: str) -> Spread | None:
    """Within a budget, the replicated rungs of the two arms are paired in their order: the sizes need not be equal,
    since only the spread of the difference is used, not its mean."""
    squares, dof = 0.0, 0
    for _, rows in done.groupby("budget"):
        replicated = []
        for name in (arm, baseline):
            cells = [cell.set_index("replicate")["loss"] for _, cell in rows[rows["arm"] == name].groupby("rung")]
            replicated.append([cell for cell in cells if len(cell) > 1])
        for a, b in zip(*replicated, strict=False):
            difference = (a - b).dropna().to_numpy(float)
            if len(difference) > 1:
                squares += float(((difference - difference.mean()) ** 2).sum())
                dof += len(difference) - 1
    return Spread(sd=float(np.sqrt(squares / dof)), dof=dof) if dof else None
