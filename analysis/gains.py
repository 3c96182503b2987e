"""Does it train faster? Every arm against its baseline at the end of each budget, and a verdict that says how sure.

A comparison is of one arm at one budget: the differences of losses between runs that share their seeds, in nats, negative
where the arm is better. Its variance is moderated by those of all comparisons with the same baseline (moderate.py); its degrees
of freedom are no more than those with which the baseline's half of it is known, since all arms share that. Its p is
Holm-corrected over all comparisons of the study. A gain is how much more of its budget the baseline needs for the same
loss, less 1 (budget_curve.py).
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis.budget_curve import REACH, BudgetCurve, Losses
from analysis.compare import ALPHA, POWER
from analysis.frame import compact, load
from analysis.gain import Gain
from analysis.guards import Case, Finding, baseline_of, find
from analysis.moderate import moderate
from analysis.multiplicity import holm
from analysis.refusal import Refused

MARGIN = 0.1  # the least gain that matters where a study says none

Kind = Literal["gain", "no gain", "worse", "underpowered", "diverged", "refused"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An arm against its baseline at one budget. `difference`, `standard_error` and `detectable` are in nats, `low` and `high`
    the difference's 95% interval. `gain` is in budgets (1.1: the baseline needs a tenth more); `detectable_gain` is the share
    of the budget that this design finds with 80% power after correction (None: more than was searched), `seeds_needed` the
    seeds at which it would find the study's margin. `diverged` counts the arm's runs of `seeds`."""

    arm: str
    baseline: str
    budget: float
    kind: Kind
    sentence: str
    seeds: int
    diverged: int = 0
    same_runs: bool = False
    difference: float | None = None
    standard_error: float | None = None
    dof: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    gain: Gain | Refused | None = None
    detectable: float | None = None
    detectable_gain: float | None = None
    seeds_needed: int | None = None

    @property
    def value(self) -> float | None:
        """The gain as a share of the budget: 0 where arm and baseline are the same runs."""
        if self.same_runs:
            return 0.0
        return self.gain.value - 1 if isinstance(self.gain, Gain) and self.gain.value is not None else None


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How log(1 + gain) changes when the budget is doubled, with its 95% interval, over so many `budgets`."""

    arm: str
    per_doubling: float
    low: float
    high: float
    budgets: int

    def __str__(self) -> str:
        word = "falls" if self.high < 0 else "rises" if self.low > 0 else "has no resolved trend"
        return (
            f"the gain {word} with the budget: {100 * math.expm1(self.per_doubling):+.1f}% for each doubling "
            f"(95% interval {100 * math.expm1(self.low):+.1f}% to {100 * math.expm1(self.high):+.1f}%, of this trend alone; "
            f"{self.budgets} budgets)"
        )


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Of a step of the arm to one of its baseline, less 1, at one budget: what is charged in the budget's unit, and what was
    measured (seconds for a step; None where there are none). `steps` is the ratio of the steps that the budget bought."""

    arm: str
    budget: float
    charged: float
    seconds: float | None
    steps: float


@dataclass(frozen=True, kw_only=True)
class Gains:
    """`claims` by (arm, budget); the headline of an arm is its claim at the largest budget."""

    study: Mapping[str, Any]
    frame: pd.DataFrame = field(repr=False)
    claims: Mapping[tuple[str, float], Claim]
    trends: Mapping[str, Trend | Refused]
    overheads: Mapping[tuple[str, float], Overhead]
    findings: tuple[Finding, ...]
    margin: float

    @property
    def arms(self) -> tuple[str, ...]:
        """Those that are compared with a baseline."""
        return tuple(dict.fromkeys(arm for arm, _ in self.claims))

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(claim.baseline for claim in self.claims.values()))

    @property
    def controls(self) -> Mapping[str, float]:
        return (self.study.get("gains") or {}).get("controls", {})

    @property
    def free(self) -> tuple[str, ...]:
        return tuple((self.study.get("gains") or {}).get("free", ()))

    def of(self, arm: str) -> list[Claim]:
        """By budget, the largest last."""
        return [claim for (name, _), claim in sorted(self.claims.items(), key=lambda i: i[0][1]) if name == arm]

    def headline(self, arm: str) -> Claim:
        return self.of(arm)[-1]


def analyse(path: str | Path) -> Gains:
    """The answer of the study in directory `path`. Raises ValueError where a guard refuses it (analysis.guards)."""
    frame = load(path)
    study = frame.attrs["study"]
    findings = find(Case(study=study, rows=frame.to_dict("records")))
    if refused := [finding for finding in findings if finding.severity == "refuse"]:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(f"{path}: refused by the guard {refused[0].guard}: {refused[0].reason}{more}")
    margin = float((study.get("gains") or {}).get("margin", MARGIN))
    losses, ended = _losses(frame)
    against = {arm: baseline_of(study, arm) for arm in study["arms"]}
    claims = judge(losses, against, margin=margin, unfinished=ended, same=_same(frame, against))
    return Gains(
        study=study,
        frame=frame,
        claims=claims,
        trends={arm: trend(claims, arm) for arm in dict.fromkeys(arm for arm, _ in claims)},
        overheads=_overheads(frame, against),
        findings=(*findings, *_underpowered(claims, margin)),
        margin=margin,
    )


def judge(
    losses: Mapping[tuple[str, float], Losses],
    against: Mapping[str, str],
    *,
    margin: float = MARGIN,
    unfinished: Mapping[tuple[str, float], str] | None = None,
    same: frozenset[tuple[str, float]] = frozenset(),
) -> dict[tuple[str, float], Claim]:
    """Claims of every arm at every budget, from losses by (arm, budget) and replicate. against: the baseline of each arm (its
    own of a baseline). unfinished: why nothing is said of an arm at a budget. same: where an arm has its baseline's very
    runs."""
    claims = compare(losses, against, unfinished=unfinished or {}, same=same)
    tested = {key: claim for key, claim in claims.items() if claim.p is not None}
    level = ALPHA / max(1, len(tested))
    curves = {baseline: BudgetCurve.of(losses, baseline) for baseline in dict.fromkeys(against.values())}
    for key, claim in tested.items():
        claims[key] = _judged(claim, curves[claim.baseline], level, margin)
    return claims


def compare(
    losses: Mapping[tuple[str, float], Losses], against: Mapping[str, str], *, unfinished: Mapping[tuple[str, float], str],
    same: frozenset[tuple[str, float]],
) -> dict[tuple[str, float], Claim]:  # fmt: skip
    """The differences with their p; what nothing is said of has none. Verdicts and gains are left to `judge`."""
    claims: dict[tuple[str, float], Claim] = {}
    for key in losses:
        arm, baseline = key[0], against[key[0]]
        if arm != baseline:
            claims[key] = _measured(key, baseline, losses, unfinished, key in same)
    open_ = {key: claim for key, claim in claims.items() if claim.p is not None}
    found = _moderated(open_)
    for (key, claim), p_holm in zip(found.items(), holm([claim.p or 0.0 for claim in found.values()]), strict=True):
        claims[key] = replace(claim, p_holm=p_holm, kind=_kind(claim.difference or 0.0, p_holm))
    return claims


def _kind(difference: float, p_holm: float) -> Kind:
    if p_holm >= ALPHA:
        return "underpowered"
    return "gain" if difference < 0 else "worse"


def _measured(
    key: tuple[str, float], baseline: str, losses: Mapping[tuple[str, float], Losses],
    unfinished: Mapping[tuple[str, float], str], same: bool,
) -> Claim:  # fmt: skip
    """The difference with its own variance, where there is one."""
    (arm, budget), ours, theirs = key, losses[key], losses.get((baseline, key[1]), {})
    claim = Claim(arm=arm, baseline=baseline, budget=budget, kind="refused", sentence="", seeds=len(ours))
    at = f"at {compact(budget)}"
    for name in (arm, baseline):
        if why := unfinished.get((name, budget)):
            return replace(claim, sentence=f"{arm} {at}: refused: {why}.")
    if same:
        return replace(
            claim, kind="no gain", same_runs=True, difference=0.0, standard_error=0.0, low=0.0, high=0.0,
            sentence=f"{arm} {at}: the very runs of {baseline}: the gain is 0.",
        )  # fmt: skip
    if lost := sum(loss is None for loss in ours.values()):
        return replace(
            claim, kind="diverged", diverged=lost,
            sentence=f"{arm} {at}: {lost} of {len(ours)} seeds diverged; the others are not compared without them.",
        )  # fmt: skip
    if any(loss is None for loss in theirs.values()):
        return replace(claim, sentence=f"{arm} {at}: refused: seeds of {baseline} diverged.")
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        return replace(
            claim,
            sentence=f"{arm} {at}: refused: {len(shared)} seeds in common with {baseline}, and two are needed.",
        )
    gaps = np.array([(ours[r] or 0.0) - (theirs[r] or 0.0) for r in shared])
    return replace(
        claim, seeds=len(shared), difference=float(gaps.mean()), standard_error=float(gaps.std(ddof=1)) / math.sqrt(len(gaps)),
        dof=len(gaps) - 1, p=1.0,
    )  # fmt: skip


def _moderated(claims: Mapping[tuple[str, float], Claim]) -> dict[tuple[str, float], Claim]:
    """Those with the same baseline lend each other their variances. Differences that do not vary at all have no p."""
    found: dict[tuple[str, float], Claim] = {}
    for baseline in dict.fromkeys(claim.baseline for claim in claims.values()):
        mine = {key: c for key, c in claims.items() if c.baseline == baseline and c.standard_error}
        own = [(c.standard_error or 0.0) ** 2 * c.seeds for c in mine.values()]
        moderated = moderate(own, [c.seeds - 1 for c in mine.values()])
        seeds_c = np.array([c.seeds for c in mine.values()], float)
        value_c = np.array([c.difference for c in mine.values()], float)
        # Welch and Satterthwaite's: half of a variance, known with seeds - 1 degrees, all else known exactly.
        dof_c = np.minimum(moderated.dof_c, 4 * (seeds_c - 1))
        error_c = np.sqrt(moderated.variance_c / seeds_c)
        half_c = stats.t.ppf(1 - ALPHA / 2, dof_c) * error_c
        p_c = 2 * stats.t.sf(np.abs(value_c) / error_c, dof_c)
        for (key, claim), *numbers in zip(mine.items(), error_c, dof_c, p_c, half_c, strict=True):
            error, dof, p, half = map(float, numbers)
            value = claim.difference or 0.0
            found[key] = replace(claim, standard_error=error, dof=dof, p=p, low=value - half, high=value + half)
    for key, claim in claims.items():
        if key not in found:  # all seeds differ by the same: as sure as can be
            value = claim.difference or 0.0
            found[key] = replace(
                claim, standard_error=0.0, p=0.0 if value else 1.0, low=value, high=value, dof=math.inf
            )
    return found


def _judged(claim: Claim, curve: BudgetCurve, level: float, margin: float) -> Claim:
    error, dof = claim.standard_error or 0.0, claim.dof or math.inf
    detectable = float(stats.t.ppf(1 - level / 2, dof) + stats.t.ppf(POWER, dof)) * error
    gain = curve.gain(claim.arm, claim.budget, claim.difference or 0.0, standard_error=error, dof=dof)
    claim = replace(claim, gain=gain, detectable=detectable)
    if isinstance(gain, Gain):
        at = float(curve.loss_g[np.flatnonzero(curve.budget_g == claim.budget)[0]])
        matters = at - curve.loss(claim.budget * (1 + margin))
        claim = replace(
            claim,
            detectable_gain=needed - 1 if (needed := curve.budget(at - detectable) / claim.budget) <= REACH else None,
            seeds_needed=math.ceil(claim.seeds * (detectable / matters) ** 2) if matters > 0 else None,
        )
    kind = claim.kind
    could = claim.detectable_gain is not None and claim.detectable_gain <= margin
    if kind == "underpowered" and could and isinstance(gain, Gain) and gain.high is not None and gain.high - 1 < margin:
        kind = "no gain"
    return replace(claim, kind=kind, sentence=_sentence(claim, kind, margin))


def _sentence(claim: Claim, kind: Kind, margin: float) -> str:
    at = f"{claim.arm} at {compact(claim.budget)}"
    nats = f"{claim.difference:+.2g} nats (95% interval {claim.low:+.2g} to {claim.high:+.2g}, "
    nats += f"Holm-corrected p = {claim.p_holm:.2g})"
    if not isinstance(claim.gain, Gain) or claim.value is None:
        why = claim.gain.reason if isinstance(claim.gain, Refused) else "beyond what was measured"
        worth = f"its worth in budget is not known: {why}"
    else:
        low, high = ("open" if end is None else f"{100 * (end - 1):+.0f}%" for end in (claim.gain.low, claim.gain.high))
        worth = f"{claim.baseline} needs {100 * claim.value:+.0f}% of its budget for the same loss (95% interval {low} to {high})"
        if claim.gain.extrapolated:
            worth += ", an extrapolation beyond its budgets"
        elif claim.gain.widest:
            worth += ", which reaches beyond its budgets"
    if claim.detectable_gain is None:
        least = f"this design finds {claim.detectable:.2g} nats"
    else:
        least = f"this design finds gains of {100 * claim.detectable_gain:.0f}% ({claim.detectable:.2g} nats)"
    least += f" with {POWER:.0%} power after correction"
    needed = ""
    if kind == "underpowered" and claim.seeds_needed is not None:
        needed = f"; a gain of {margin:.0%} needs about {max(claim.seeds_needed, claim.seeds + 1)} seeds"
    lead = {
        "gain": "gain",
        "worse": "worse",
        "no gain": f"no gain of {margin:.0%} or more",
        "underpowered": f"underpowered: neither a gain nor that there is none of {margin:.0%} can be said",
    }
    return f"{at}: {lead.get(kind, kind)}: {nats}; {worth}; {least}{needed}."


def trend(claims: Mapping[tuple[str, float], Claim], arm: str) -> Trend | Refused:
    """Weighted least squares of log(1 + gain) in log2 budget; the spread of each is that of its interval. Of gains that are read
    off within the baseline's budgets: where a curve that flattens is continued by a straight line, any gain has a trend."""
    points = []
    for (name, budget), claim in sorted(claims.items(), key=lambda item: item[0][1]):
        gain = claim.gain
        if name == arm and isinstance(gain, Gain) and not gain.extrapolated and gain.value and gain.low and gain.high:
            spread = math.log(gain.high / gain.low) / (2 * stats.t.ppf(1 - ALPHA / 2, claim.dof or math.inf))
            points.append((math.log2(budget), math.log(gain.value), max(float(spread), 1e-9), claim.dof or math.inf))
    if len(points) < 2:
        return Refused(reason=f"{len(points)} budgets with a gain within the baseline's, and a trend needs two")
    x, y, sd, dof = (np.array(column) for column in zip(*points, strict=True))
    weight = 1 / sd**2
    centred = x - (weight * x).sum() / weight.sum()
    slope = float((weight * centred * y).sum() / (weight * centred**2).sum())
    half = float(stats.t.ppf(1 - ALPHA / 2, dof.min())) / math.sqrt(float((weight * centred**2).sum()))
    return Trend(arm=arm, per_doubling=slope, low=slope - half, high=slope + half, budgets=len(points))


# --- from records ---------------------------------------------------------------------------------------------------


def _losses(frame: pd.DataFrame) -> tuple[Mapping[tuple[str, float], Losses], dict[tuple[str, float], str]]:
    """Losses by (arm, budget) and replicate, and why there are none where runs have not ended."""
    losses: dict[tuple[str, float], dict[int, float | None]] = {}
    ended: dict[tuple[str, float], str] = {}
    for row in frame.to_dict("records"):
        key, replicate = (str(row["arm"]), float(row["budget"])), int(row["replicate"])
        if replicate in losses.setdefault(key, {}):
            raise ValueError(
                f"{row['arm']} has several runs of seed {replicate} at {row['budget']:.3g}, of several sizes or rates: gains are "
                "claims about one; make each an arm, or a study"
            )
        losses[key][replicate] = float(row["loss"]) if row["status"] == "done" else None
        if row["status"] not in ("done", "diverged"):
            ended[key] = f"runs of {row['arm']} are {row['status']}; `lab run` trains what is left"
    return losses, ended


def _same(frame: pd.DataFrame, against: Mapping[str, str]) -> frozenset[tuple[str, float]]:
    ids = {key: set(rows) for key, rows in frame.groupby(["arm", "budget"])["run_id"]}
    return frozenset(
        (str(arm), float(budget)) for (arm, budget), own in ids.items() if own == ids.get((against[arm], budget))
        and arm != against[arm]
    )  # fmt: skip


def _overheads(frame: pd.DataFrame, against: Mapping[str, str]) -> dict[tuple[str, float], Overhead]:
    found = {}
    cells = {key: rows for key, rows in frame.groupby(["arm", "budget"])}
    for (arm, budget), rows in cells.items():
        base = cells.get((against[str(arm)], budget))
        if base is None or arm == against[str(arm)]:
            continue
        step, theirs = (
            float((side["amount"] * (1 + side["residual"]) / side["planned_steps"]).mean()) for side in (rows, base)
        )
        seconds = [float((side["seconds"] / side["steps"]).median()) for side in (rows, base)]
        known = all(math.isfinite(value) and value > 0 for value in seconds)
        found[str(arm), float(budget)] = Overhead(
            arm=str(arm),
            budget=float(budget),
            charged=step / theirs - 1,
            seconds=seconds[0] / seconds[1] - 1 if known else None,
            steps=float(rows["planned_steps"].mean() / base["planned_steps"].mean()),
        )
    return found


def _underpowered(claims: Mapping[tuple[str, float], Claim], margin: float) -> Sequence[Finding]:
    """The guard that needs the noise: fewer seeds than the least gain that matters asks for. Of each arm where it needs most."""
    worst: dict[str, Claim] = {}
    for claim in claims.values():
        if (claim.seeds_needed or 0) > max(
            claim.seeds, worst[claim.arm].seeds_needed or 0 if claim.arm in worst else 0
        ):
            worst[claim.arm] = claim
    return [
        Finding(
            guard="seeds",
            arm=arm,
            reason=f"{arm} at {compact(claim.budget)}: {claim.seeds} seeds can not be expected to find a gain of "
            f"{margin:.0%}; it needs about {claim.seeds_needed}",
            severity="flag",
        )
        for arm, claim in worst.items()
    ]
