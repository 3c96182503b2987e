"""Is an arm better than the baseline at equal FLOPs, by how much, and how sure is that.

What is compared is each arm's best loss at each budget, inside what was run; no fitted law is needed. A difference is
arm minus baseline in nats per target token: negative means that the arm is better.

Its standard error treats the runs' noise as independent. Arms of a replicate share their seeds, which can only make the
noise of a difference smaller, so that intervals are not too narrow on that account; `Noise.paired` says how much
smaller.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis.frame import CONVENTIONS, compact, finished, not_comparable
from analysis.isoflop import SIZE, Minima, Minimum
from analysis.multiplicity import holm
from analysis.noise import Noise
from analysis.refusal import Refused

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Arm minus baseline at one budget, nats. `low`, `high` are its own 95% interval; `p_holm` is corrected for all the
    comparisons of the study. `detectable` is the true difference that this design finds with 80% power at the smallest
    level that Holm's procedure may ask for; `seeds_needed` the seeds per run at which the observed difference would
    be."""

    arm: str
    baseline: str
    budget: float
    value: float
    standard_error: float
    dof: int
    low: float
    high: float
    p: float
    p_holm: float = 1.0
    detectable: float = math.nan
    seeds_needed: int | None = None
    basis: str
    same_runs: bool = False

    @property
    def resolved(self) -> bool:
        return self.p_holm < ALPHA


Kind = Literal["A better", "B better", "crosses at", "no difference larger than", "not resolved", "refused"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A is the arm and B the baseline. `sentence` is for people; `detail` says what it rests on. `at` is the compute of
    'crosses at' (FLOPs), `bound` the difference (nats) that 'no difference larger than' speaks of."""

    arm: str
    baseline: str
    kind: Kind
    sentence: str
    detail: str = ""
    at: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The comparison at `budget` read as if runs were matched on another count of FLOPs: the baseline's best loss is
    interpolated to the FLOPs that the arm's best run spent under `convention`. `beyond` is how far outside of the
    baseline's own range that is, as a factor; above 1 the reading is an extrapolation."""

    arm: str
    convention: str
    budget: float
    value: float
    reads: Literal["A better", "B better", "not resolved"]
    flips: bool
    beyond: float


Compared = dict[tuple[str, float], Difference | Refused]


def differences(frame: pd.DataFrame, found: Minima, noise: Noise | Refused) -> Compared:
    """Every arm against the baseline at every budget, Holm-corrected together."""
    baseline = frame.attrs["study"]["baseline"]
    if isinstance(noise, Refused):
        return {key: noise for key in found if key[0] != baseline}
    compared: Compared = {
        (arm, budget): difference(frame, found, noise, arm, baseline, budget)
        for arm, budget in found
        if arm != baseline
    }
    # Arms that are the same runs are not compared, so that they do not count as comparisons either.
    judged = {key: v for key, v in compared.items() if isinstance(v, Difference) and not v.same_runs}
    corrected = holm([value.p for value in judged.values()])
    level = ALPHA / max(1, len(judged))
    for (key, value), p_holm in zip(judged.items(), corrected, strict=True):
        compared[key] = with_power(replace(value, p_holm=p_holm), level)
    return compared


def pairwise(frame: pd.DataFrame, found: Minima, noise: Noise | Refused) -> dict[tuple[str, str], Difference | Refused]:
    """Every pair of arms (row, column) at the largest budget where they can be compared, row minus column, Holm-corrected
    over the pairs. Each pair is there once, in the order of the study."""
    arms = list(frame.attrs["study"]["arms"])
    budgets = sorted({budget for _, budget in found}, reverse=True)
    pairs: dict[tuple[str, str], Difference | Refused] = {}
    for index, row in enumerate(arms):
        for column in arms[index + 1 :]:
            answers = [
                noise if isinstance(noise, Refused) else difference(frame, found, noise, row, column, budget)
                for budget in budgets
            ]
            pairs[row, column] = next((a for a in answers if isinstance(a, Difference)), answers[0])
    judged = {key: v for key, v in pairs.items() if isinstance(v, Difference) and not v.same_runs}
    for (key, value), p_holm in zip(judged.items(), holm([v.p for v in judged.values()]), strict=True):
        pairs[key] = replace(value, p_holm=p_holm)
    return pairs


def difference(
    frame: pd.DataFrame, found: Minima, noise: Noise, arm: str, baseline: str, budget: float
) -> Difference | Refused:
    if why := not_comparable(frame, arm, baseline):
        return Refused(reason=why)
    a, b = found[arm, budget], found[baseline, budget]
    if isinstance(a, Minimum) and isinstance(b, Minimum):
        value, basis = a.loss - b.loss, "iso-FLOP minimum"
        contrast = _contrast(a.weights, b.weights)
    else:
        why = "; ".join(m.reason for m in (a, b) if isinstance(m, Refused))
        at_rung = _same_rung(finished(frame), arm, baseline, budget)
        if at_rung is None:
            return Refused(reason=f"{why}; and no rung has finished runs of both arms")
        rung, value, contrast = at_rung
        basis = f"same rung ({rung}), since {why}"
    error = noise.sd * math.sqrt(sum(weight**2 for weight in contrast.values()))
    t = float(stats.t.ppf(1 - ALPHA / 2, noise.dof))
    return Difference(
        arm=arm,
        baseline=baseline,
        budget=budget,
        value=value,
        standard_error=error,
        dof=noise.dof,
        low=value - t * error,
        high=value + t * error,
        p=float(2 * stats.t.sf(abs(value) / error, noise.dof)) if error > 0 else 1.0,
        basis=basis,
        same_runs=error == 0,
    )


def _contrast(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Coefficients of a difference in the runs' losses; a run that both sides share cancels."""
    contrast = {run_id: a.get(run_id, 0.0) - b.get(run_id, 0.0) for run_id in {**a, **b}}
    return {run_id: weight for run_id, weight in contrast.items() if abs(weight) > 1e-12}


def _same_rung(
    done: pd.DataFrame, arm: str, baseline: str, budget: float
) -> tuple[int, float, dict[str, float]] | None:
    """At the rung, of those that both arms finished, where the mean of their losses is least: a choice that favours
    neither."""
    rows = done[done["budget"] == budget]
    cells = {
        name: {int(str(rung)): cell for rung, cell in rows[rows["arm"] == name].groupby("rung")}
        for name in (arm, baseline)
    }
    shared = sorted(set(cells[arm]) & set(cells[baseline]))
    if not shared:
        return None
    rung = min(shared, key=lambda r: cells[arm][r]["loss"].mean() + cells[baseline][r]["loss"].mean())
    a, b = cells[arm][rung], cells[baseline][rung]
    contrast = _contrast({i: 1 / len(a) for i in a["run_id"]}, {i: 1 / len(b) for i in b["run_id"]})
    return rung, float(a["loss"].mean() - b["loss"].mean()), contrast


def with_power(found: Difference, level: float) -> Difference:
    quantiles = stats.t.ppf([1 - level / 2, POWER], found.dof)
    detectable = float(quantiles.sum()) * found.standard_error
    seeds = math.ceil((detectable / abs(found.value)) ** 2) if found.value else None
    return replace(found, detectable=detectable, seeds_needed=seeds)


# --- in words
# ----------------------------------------------------------------------------------------------------------


def verdict(
    arm: str, baseline: str, compared: Compared, *, margin: float | None = None, at: float | None = None
) -> Verdict:
    """One word for the arm against the baseline. It speaks of the largest budget where they could be compared; arms
    that are resolved with opposite signs at two budgets cross. With a `margin` (nats), arms whose intervals lie within
    +-margin at every budget are equivalent, whatever the sign of their difference. `at` is where a crossing is, if that is
    known better than from the differences themselves."""
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin = {margin!r}: use the largest difference in nats that does not matter, such as 0.01")
    mine = {budget: value for (name, budget), value in sorted(compared.items()) if name == arm}
    judged = [value for value in mine.values() if isinstance(value, Difference)]
    if not judged:
        reasons = dict.fromkeys(value.reason for value in mine.values() if isinstance(value, Refused))
        reason = "; ".join(reasons) or "the plan has no budget for it"
        return Verdict(
            arm=arm, baseline=baseline, kind="refused", sentence=f"{arm} against {baseline}: refused: {reason}."
        )
    last = judged[-1]
    missing = [budget for budget in mine if budget > last.budget]
    beyond = f" Nothing can be said at {', '.join(map(compact, missing))} FLOPs." if missing else ""
    if last.same_runs:
        sentence = f"{arm} and {baseline} are the same runs: their difference is 0 by construction, not a finding."
        return Verdict(arm=arm, baseline=baseline, kind="not resolved", sentence=sentence)
    resolved = [value for value in judged if value.resolved]
    better = [value for value in resolved if value.value < 0]
    worse = [value for value in resolved if value.value > 0]
    detail = f"Compared at: {last.basis}.{beyond}"
    bound = max(max(abs(value.low), abs(value.high)) for value in judged)
    if margin is not None and bound <= margin:
        signed = f" {_by(last)}." if last.resolved else ""
        sentence = (
            f"{arm} and {baseline} differ by no more than {bound:.2g} nats between {compact(judged[0].budget)} and "
            f"{compact(last.budget)} FLOPs, which is within the margin of {margin:g}."
        )
        return Verdict(
            arm=arm,
            baseline=baseline,
            kind="no difference larger than",
            sentence=sentence,
            detail=f"The 95% intervals lie within the margin at every budget.{signed} {detail}",
            bound=bound,
        )
    if better and worse:
        first, second = sorted((better[-1], worse[-1]), key=lambda value: value.budget)
        between = [value for value in judged if first.budget <= value.budget <= second.budget]
        at = at if at is not None and first.budget <= at <= second.budget else _zero(between)
        sentence = f"{arm} and {baseline} cross at about {compact(at)} FLOPs: {_by(first)}, and {_by(second)}."
        return Verdict(arm=arm, baseline=baseline, kind="crosses at", sentence=sentence, detail=detail, at=at)
    if last.resolved:
        kind = "A better" if last.value < 0 else "B better"
        return Verdict(arm=arm, baseline=baseline, kind=kind, sentence=f"{_by(last)}.", detail=detail)
    sentence = (
        f"{arm} against {baseline} is not resolved at {compact(last.budget)} FLOPs: the difference is {last.value:+.2g} nats "
        f"(95% interval {last.low:+.2g} to {last.high:+.2g})."
    )
    return Verdict(
        arm=arm,
        baseline=baseline,
        kind="not resolved",
        sentence=sentence,
        detail=" ".join(part for part in (_unresolved(last), _elsewhere(resolved), detail) if part),
    )


def _zero(between: list[Difference]) -> float:
    """Where the differences change sign for the last time, linear in log C; the first and the last have opposite
    signs."""
    before, after = [pair for pair in itertools.pairwise(between) if pair[0].value * pair[1].value <= 0][-1]
    share = before.value / (before.value - after.value) if before.value != after.value else 0.5
    return float(before.budget * (after.budget / before.budget) ** share)


_WHERE = {"same": ", at the same rung", "matched": ", at the same size", "law": ", by the fitted law"}


def _by(difference: Difference) -> str:
    names = (difference.arm, difference.baseline)
    better, worse = names if difference.value < 0 else names[::-1]
    low, high = sorted((abs(difference.low), abs(difference.high)))
    at = _WHERE.get(difference.basis.split()[0].rstrip(","), "")
    return (
        f"{better} is better than {worse} by {abs(difference.value):.2g} nats (95% interval {low:.2g} to {high:.2g}, "
        f"Holm-corrected p = {difference.p_holm:.2g}) at {compact(difference.budget)} FLOPs{at}"
    )


def _unresolved(difference: Difference) -> str:
    text = (
        ""
        if math.isnan(difference.detectable)
        else (
            f"This design finds a true difference of {difference.detectable:.2g} nats with {POWER:.0%} power after correction "
            "for the number of comparisons; a smaller one it may miss."
        )
    )
    if difference.low > 0 or difference.high < 0:
        text += f" The interval excludes 0, but p = {difference.p_holm:.2g} after correction does not reach {ALPHA}."
    if difference.seeds_needed is not None and difference.seeds_needed <= 1000:
        text += (
            f" A difference as large as the one observed would need about {difference.seeds_needed} times the seeds."
        )
    elif difference.seeds_needed is not None:
        text += " A difference as small as the one observed is out of reach of any number of seeds one would run."
    return text


def _elsewhere(resolved: list[Difference]) -> str:
    return f"At a smaller budget: {'; '.join(_by(value) for value in resolved)}." if resolved else ""


# --- another count of FLOPs
# --------------------------------------------------------------------------------------------


def readings(
    frame: pd.DataFrame,
    found: Minima,
    compared: Compared,
    *,
    baseline: str | None = None,
    among: Sequence[Difference] | None = None,
) -> list[Reading]:
    """Whether the answer at each arm's largest compared budget changes with how FLOPs are counted. baseline: what `compared` is
    against, where it is not the study's. among: the differences that its p is corrected for, where those are more."""
    done, baseline = finished(frame), baseline or frame.attrs["study"]["baseline"]
    if among is None:
        among = [d for d in compared.values() if isinstance(d, Difference)]
    read = []
    for convention in CONVENTIONS:
        curve = [
            (_flops_at(done, m, convention), m.loss)
            for (arm, _), m in sorted(found.items(), key=lambda item: item[0][1])
            if arm == baseline and isinstance(m, Minimum)
        ]
        if len(curve) < 2:
            continue  # one point has no slope along which to move
        log_C, loss = np.log([c for c, _ in curve]), np.array([value for _, value in curve])
        for arm in dict.fromkeys(name for name, _ in compared):
            usable = [
                (value, m)
                for (name, budget), value in sorted(compared.items(), key=lambda item: item[0][1])
                if name == arm and isinstance(value, Difference) and isinstance(m := found[arm, budget], Minimum)
            ]
            usable = [(value, m) for value, m in usable if value.basis.startswith("iso") and not value.same_runs]
            if not usable:
                continue
            difference, m = usable[-1]
            at = math.log(_flops_at(done, m, convention))
            value = m.loss - _piecewise(at, log_C, loss)
            reads = _reads(value, difference, among)
            outside = max(log_C.min() - at, at - log_C.max(), 0.0)
            read.append(
                Reading(
                    arm=arm,
                    convention=convention,
                    budget=difference.budget,
                    value=value,
                    reads=reads,
                    flips=reads != _reads(difference.value, difference, among),
                    beyond=math.exp(outside),
                )
            )
    return read


def _reads(
    value: float, difference: Difference, among: Sequence[Difference]
) -> Literal["A better", "B better", "not resolved"]:
    """As the difference itself would read if it were `value`, all others being what they are."""
    p = float(2 * stats.t.sf(abs(value) / difference.standard_error, difference.dof))
    others = [d.p for d in among if not d.same_runs and d is not difference]
    if not holm([p, *others])[0] < ALPHA:
        return "not resolved"
    return "A better" if value < 0 else "B better"


def _flops_at(done: pd.DataFrame, m: Minimum, convention: str) -> float:
    """FLOPs of the minimum under `convention`, log-log between the arm's own runs at that budget."""
    rows = done[(done["arm"] == m.arm) & (done["budget"] == m.budget)].sort_values(SIZE)
    log_flops = np.log(rows[f"flops_{convention}"].to_numpy(float))
    return math.exp(float(np.interp(math.log(m.N), np.log(rows[SIZE].to_numpy(float)), log_flops)))


def _piecewise(x: float, x_n: np.ndarray, y_n: np.ndarray) -> float:
    """Linear between the points and along the end segments outside of them."""
    i = int(np.clip(np.searchsorted(x_n, x) - 1, 0, len(x_n) - 2))
    return float(y_n[i] + (x - x_n[i]) * (y_n[i + 1] - y_n[i]) / (x_n[i + 1] - x_n[i]))
