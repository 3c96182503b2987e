"""Arms of any table against a baseline at equal compute, inside what was run: no fitted law is needed.

At every budget that both arms have, the least losses over sizes are compared (iso-FLOP minima); where an arm has none
there, the losses at one size that both have (matched cells). compare.py makes the differences, as for a study.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis import compare, noise
from analysis.compare import Compared, Difference
from analysis.isoflop import SIZE, TOLERANCE, Minima, Minimum, budgets, minima
from analysis.multiplicity import RankAgreement, rank_agreement
from analysis.noise import Noise
from analysis.refusal import Refusal, Refused

_MINIMUM_DOF = 2


@dataclass(frozen=True, kw_only=True)
class InRange:
    """Differences of every other arm to the baseline, Holm-corrected together, and the noise that they were judged by."""

    arms: tuple[str, ...]
    baseline: str
    found: Minima
    compared: Compared
    noise: Noise | Refused
    noise_source: str

    def of(self, arm: str) -> dict[float, Difference | Refused]:
        return {budget: value for (name, budget), value in sorted(self.compared.items()) if name == arm}

    def ranks(self, *, seed: int = 0) -> RankAgreement:
        """Of the iso-FLOP minima at the smallest and the largest budget that every arm has one at."""
        losses: dict[float, dict[str, Minimum]] = {}
        for (arm, budget), m in self.found.items():
            if isinstance(m, Minimum):
                losses.setdefault(budget, {})[arm] = m
        whole = [budget for budget, of in sorted(losses.items()) if set(of) == set(self.arms)]
        if len(whole) < 2:
            raise Refusal(
                f"{len(whole)} budgets have an iso-FLOP minimum of every arm, and agreement of ranks needs two"
            )
        sd = self.noise.sd if isinstance(self.noise, Noise) else 0.0
        small, large = ({arm: m.loss for arm, m in losses[budget].items()} for budget in (whole[0], whole[-1]))
        errors = [{arm: sd * m.per_noise for arm, m in losses[budget].items()} for budget in (whole[0], whole[-1])]
        return rank_agreement(small, large, small_error=errors[0], large_error=errors[1], seed=seed)


def in_range(
    columns: Mapping[str, np.ndarray], *, arms: Sequence[str], baseline: str, tolerance: float = TOLERANCE
) -> InRange:
    """`columns` are C (FLOPs), loss (nats), arm, and N where sizes vary; rows are different runs. Rows whose C differ by
    less than `tolerance` form one budget.

    The noise of a run is that of replicates (rows of one arm, budget and size), else the scatter about the parabolas, else
    that of matched differences about a straight line in log C, which contains what such a line misses.
    """
    frame = _frame(columns, arms, baseline, tolerance)
    found = minima(frame)
    shared = {budget for budget in frame["budget"] if {*frame.loc[frame["budget"] == budget, "arm"]} >= {baseline}}
    both = {(arm, budget) for arm, budget in zip(frame["arm"], frame["budget"], strict=True) if budget in shared}
    found = {key: value for key, value in found.items() if key in both}
    if not any(arm != baseline for arm, _ in found):
        raise Refusal(f"no arm has a run at the compute of one of {baseline}'s, within {tolerance:.1%}")
    judged_by, source = _noise(frame, found)
    compared = compare.differences(frame, found, judged_by)
    sizes = frame.groupby("budget")["rung"].nunique()
    for key, value in compared.items():
        if isinstance(value, Difference) and value.basis.startswith("same rung"):
            # That one size has no minimum over sizes needs no explanation.
            why = value.basis.partition(", since ")[2] if sizes[value.budget] > 1 else ""
            compared[key] = replace(value, basis=f"matched cell{f', since {why}' if why else ''}")
    return InRange(
        arms=tuple(arms), baseline=baseline, found=found, compared=compared, noise=judged_by, noise_source=source
    )


def _frame(columns: Mapping[str, np.ndarray], arms: Sequence[str], baseline: str, tolerance: float) -> pd.DataFrame:
    C_n, arm_n = np.asarray(columns["C"], float), np.asarray(columns["arm"]).astype(str)
    N_n = np.asarray(columns.get("N", C_n), float)
    group_n = budgets(C_n, tolerance)
    middle = {g: float(np.exp(np.log(C_n[group_n == g]).mean())) for g in np.unique(group_n)}
    frame = pd.DataFrame(
        {
            "run_id": [f"row {n}" for n in range(len(C_n))],
            "arm": arm_n,
            "budget": [middle[g] for g in group_n],
            "status": "done",
            "loss": np.asarray(columns["loss"], float),
            SIZE: N_n,
        }
    )
    # Sizes that differ by rounding are one rung, of all arms alike: what is matched is the size.
    rounded = pd.Series(np.round(np.log(N_n), 4))
    frame["rung"] = rounded.groupby(frame["budget"]).rank(method="dense").astype(int) - 1
    frame["replicate"] = frame.groupby(["arm", "budget", "rung"]).cumcount()
    frame.attrs["study"] = {"baseline": baseline, "arms": list(arms)}
    return frame


def _noise(frame: pd.DataFrame, found: Minima) -> tuple[Noise | Refused, str]:
    seeds = noise.seed_noise(frame)
    if isinstance(seeds, Noise) and seeds.dof >= _MINIMUM_DOF:
        return seeds, f"replicates ({seeds.dof} degrees of freedom)"
    scatter = noise.scatter(found)
    if isinstance(scatter, Noise):
        return scatter, f"scatter about the iso-FLOP parabolas ({scatter.dof} degrees of freedom)"
    line = _about_a_line(compare.differences(frame, found, Noise(sd=1.0, dof=1, source="scatter")))
    if line is None:
        return _unknown(seeds, scatter), "unknown"
    return line, f"scatter of the differences about a line in log C ({line.dof} degrees of freedom)"


def _unknown(seeds: Noise | Refused, scatter: Refused) -> Refused:
    why = seeds.reason if isinstance(seeds, Refused) else f"replicates leave {seeds.dof} degrees of freedom"
    return replace(scatter, reason=f"the noise of a run is unknown: {why}; {scatter.reason}")


def _about_a_line(compared: Compared) -> Noise | None:
    """`compared` are judged by a noise of 1 nat, so that standard errors are what noise is multiplied by."""
    squares, dof = 0.0, 0
    for arm in dict.fromkeys(name for name, _ in compared):
        mine = [v for (name, _), v in compared.items() if name == arm and isinstance(v, Difference) and not v.same_runs]
        if len(mine) < 3:
            continue
        scale = np.array([1 / v.standard_error for v in mine])
        x = np.log([v.budget for v in mine])
        X = np.stack([np.ones_like(x), x - x.mean()], axis=1) * scale[:, None]
        y = np.array([v.value for v in mine]) * scale
        residual = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        squares, dof = squares + float(residual @ residual), dof + len(mine) - 2
    # Arms share the baseline's noise, so that their residuals are not independent: the freedom of one arm is claimed.
    arms = max(1, len({name for name, _ in compared}))
    if dof // arms < _MINIMUM_DOF or squares <= 0:
        return None
    return Noise(sd=float(np.sqrt(squares / dof)), dof=dof // arms, source="scatter")
