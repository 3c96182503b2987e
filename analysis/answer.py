"""Everything that a report says about a study, computed once: from records to verdicts. It draws and prints nothing."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import compare, noise
from analysis.compare import Compared, Difference, Reading, Verdict
from analysis.crossing import COLUMNS, Crossing, crossing, frontier, measured_draws
from analysis.fit import DELTA, LEAST_SQUARES, Fit, fit_law
from analysis.frame import compact, finished, for_laws, load
from analysis.guards import Case, find
from analysis.isoflop import Minima, Minimum, minima
from analysis.noise import LackOfFit, Noise
from analysis.outlook import Outlook, outlook
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import Draws, cluster_bootstrap, interval
from analysis.steps import Step, steps

LAW = "chinchilla_by_arm"
DELTAS = (1e-4, DELTA, 1e-2, LEAST_SQUARES)
MAX_EPOCHS, MAX_EPOCH_RATIO = 4.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The arm's difference to the baseline at the largest budget (nats) when one choice of the analysis is another."""

    choice: str
    arm: str
    value: float
    reads: str
    changes: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`differences` and `crossings` are in range and need no law; `law`, `draws` and `gaps` are of the shared L(N, D).

    `gaps` holds, for each arm, the difference of the fitted best losses on `compute` with its 95% band: shape (3, C),
    low, median, high. `pairs` compare every two arms at the largest budget, `steps` at every budget those that are alike but
    for one thing; `outlook` goes beyond. `curves` are fits of L(C) through each arm's minima.
    """

    study: dict[str, Any]
    frame: pd.DataFrame
    noise: Noise | Refused
    lack_of_fit: LackOfFit | Refused
    minima: Minima
    differences: Compared
    verdicts: tuple[Verdict, ...]
    law: Fit | Refused
    draws: Draws | Refused
    compute: np.ndarray
    gaps: dict[str, np.ndarray]
    crossings: dict[str, Crossing | Refused]
    pairs: dict[tuple[str, str], Difference | Refused]
    steps: tuple[Step, ...]
    outlook: Outlook | Refused
    curves: dict[str, Fit | Refused]
    readings: tuple[Reading, ...]
    sensitivity: tuple[Sensitivity, ...]
    caveats: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.study["arms"])

    @property
    def baseline(self) -> str:
        return self.study["baseline"]

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm != self.baseline)

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(sorted(float(budget) for budget in self.frame["budget"].unique()))


def analyse(path: str | Path) -> Answer:
    """The answer for the study in directory `path`; what can not be said is a Refused with its reason."""
    frame = load(path)
    study = frame.attrs["study"]
    arms, baseline = list(study["arms"]), study["baseline"]
    _one_run_of_a_seed(frame)
    found = minima(frame)
    seeds = noise.seed_noise(frame)
    # Without replicates the parabolas' residuals are the only measure of noise that is left.
    judged_by = seeds if isinstance(seeds, Noise) else noise.scatter(found)
    compared = compare.differences(frame, found, judged_by if isinstance(judged_by, Noise) else seeds)
    verdicts = tuple(compare.verdict(arm, baseline, compared) for arm in arms if arm != baseline)
    law = attempt(lambda: _shared_law(frame, delta=_huber_delta(frame)))
    draws = attempt(lambda: _draws(law, frame))
    budgets = sorted(frame["budget"].unique())
    compute = np.unique(np.concatenate([np.geomspace(budgets[0], budgets[-1], 41), budgets]))
    gaps = _gaps(frame, draws, compared, compute)
    crossings = {arm: attempt(lambda arm=arm: _crossing(compared, arm, baseline)) for arm in arms if arm != baseline}
    curves = {arm: attempt(lambda arm=arm: _curve(found, arm)) for arm in arms}
    readings = tuple(compare.readings(frame, found, compared))
    each = steps(frame, found, judged_by)
    lack = noise.lack_of_fit(frame, found)
    return Answer(
        study=study,
        frame=frame,
        noise=judged_by,
        lack_of_fit=lack,
        minima=found,
        differences=compared,
        verdicts=verdicts,
        law=law,
        draws=draws,
        compute=compute,
        gaps=gaps,
        crossings=crossings,
        pairs=compare.pairwise(frame, found, judged_by),
        steps=each,
        outlook=attempt(lambda: outlook(frame)),
        curves=curves,
        readings=readings,
        sensitivity=tuple(_sensitivity(frame, found, compared, judged_by, law, readings, each)),
        caveats=(
            *_law_against_measured(compared, gaps, compute),
            *_caveats(frame, found, judged_by, lack, law, draws),
        ),
    )


def _one_run_of_a_seed(frame: pd.DataFrame) -> None:
    twice = frame[frame.duplicated(["arm", "budget", "rung", "replicate"])]
    for row in twice.to_dict("records")[:1]:
        raise ValueError(
            f"{row['arm']} has several runs of seed {row['replicate']} at {row['budget']:.3g} and D = {row['D']}, of several "
            "learning rates: their spread is no noise; `lab tune` finds each arm's rate, with seeds of its own, and a study "
            "takes it (learning_rate='tuned:NAME')"
        )


def _huber_delta(frame: pd.DataFrame) -> float:
    """Huber's constant, 1.345 standard deviations of the least-squares residuals; the literature's 1e-3 if larger.

    Far below the scatter a Huber loss is least absolute deviations: it passes through as many points as it has
    parameters, and a few tens of runs that scatter by a per cent or two do not determine it.
    """
    return max(DELTA, float(f"{1.345 * _shared_law(frame, delta=LEAST_SQUARES).rms:.2g}"))


def _shared_law(frame: pd.DataFrame, *, delta: float, weights: Any = None) -> Fit:
    return fit_law(LAW, for_laws(frame), columns=COLUMNS, delta=delta, weights=weights)


def _draws(law: Fit | Refused, frame: pd.DataFrame) -> Draws:
    """Configurations are resampled within each arm: the seeds of one configuration share all that the law may miss."""
    if isinstance(law, Refused):
        raise Refusal(law.reason)
    if not law.converged:
        raise Refusal(f"the shared law is not to be trusted ({law.status}), so it is not resampled")
    rows = finished(frame)
    # Arms that share a run share its configuration only within themselves; both then move independently, which widens.
    cells = rows["arm"] + "|" + rows["budget"].astype(str) + "|" + rows["rung"].astype(str)
    return cluster_bootstrap(law, cells, strata=rows["arm"])


def _gaps(
    frame: pd.DataFrame, draws: Draws | Refused, compared: Compared, compute: np.ndarray
) -> dict[str, np.ndarray]:
    baseline = frame.attrs["study"]["baseline"]
    if isinstance(draws, Refused) or baseline not in draws.fit.arms:
        return {}
    base = frontier(draws, frame, baseline, compute)
    same = {arm for (arm, _), value in compared.items() if isinstance(value, Difference) and value.same_runs}
    others = [arm for arm in draws.fit.arms if arm != baseline and arm not in same]
    return {
        arm: np.quantile(frontier(draws, frame, arm, compute) - base, [0.025, 0.5, 0.975], axis=0) for arm in others
    }


def _crossing(compared: Compared, arm: str, baseline: str) -> Crossing:
    measured = [value for (name, _), value in compared.items() if name == arm and isinstance(value, Difference)]
    if any(value.same_runs for value in measured):
        raise Refusal(f"{arm} and {baseline} are the same runs")
    if len(measured) < 2:
        raise Refusal(f"compared at {len(measured)} budgets, and a crossing needs two")
    C, gap = measured_draws(measured)
    return crossing(C, gap, arm=arm, baseline=baseline, budgets=[value.budget for value in measured])


def _curve(found: Minima, arm: str) -> Fit:
    points = [m for (name, _), m in found.items() if name == arm and isinstance(m, Minimum)]
    if not points:
        raise Refusal(f"{arm} has no iso-FLOP minimum at any budget")
    if any(m.loss <= 0 for m in points):
        raise Refusal(f"{arm}'s minimum is at a loss of 0, and laws are fitted to logarithms of losses")
    return fit_law("power_law_with_asymptote", {"C": [m.budget for m in points], "loss": [m.loss for m in points]})


# --- what else could have been chosen
# ------------------------------------------------------------------------------------


def _sensitivity(
    frame: pd.DataFrame,
    found: Minima,
    compared: Compared,
    judged_by: Noise | Refused,
    law: Fit | Refused,
    readings: tuple[Reading, ...],
    each: tuple[Step, ...],
) -> list[Sensitivity]:
    baseline = frame.attrs["study"]["baseline"]
    same = {arm for (arm, _), value in compared.items() if isinstance(value, Difference) and value.same_runs}
    others = [arm for arm in frame.attrs["study"]["arms"] if arm != baseline and arm not in same]
    rows = []
    matched_on = frame.attrs["study"]["match"]["convention"]
    counted = [(baseline, reading.arm, reading) for reading in readings]
    counted += [
        (s.before, f"{s.before} -> {s.arm}", r) for s in each if baseline not in (s.before, s.arm) for r in s.readings
    ]
    for before, name, reading in counted:
        if reading.convention == matched_on:
            continue
        beyond = f", extrapolation by a factor {reading.beyond:.2f}" if reading.beyond > 1.005 else ""
        rows.append(
            Sensitivity(
                choice=f"FLOPs counted as {reading.convention}{beyond}",
                arm=name,
                value=reading.value,
                reads=_in_words(reading.reads, reading.arm, before),
                changes=reading.flips,
            )
        )
    wider = noise.scatter(found)
    if isinstance(wider, Noise) and isinstance(judged_by, Noise) and judged_by.source == "seeds":
        again = compare.differences(frame, found, wider)
        for arm in others:
            before, after = (compare.verdict(arm, baseline, of) for of in (compared, again))
            values = [v for (name, _), v in again.items() if name == arm and isinstance(v, Difference)]
            if values:
                rows.append(
                    Sensitivity(
                        choice=f"noise taken from the parabolas' residuals ({wider.sd:.2g} nats)",
                        arm=arm,
                        value=values[-1].value,
                        reads=_in_words(after.kind, arm, baseline),
                        changes=before.kind != after.kind,
                    )
                )
    if isinstance(law, Fit):
        rows += _law_sensitivity(frame, law, others, baseline)
    return rows


def _law_sensitivity(frame: pd.DataFrame, law: Fit, others: list[str], baseline: str) -> list[Sensitivity]:
    """Differences of the fitted best losses at the largest budget, by sign: these have no interval."""
    done = finished(frame)
    largest = float(frame["budget"].max())
    smaller = (done["budget"] < largest).to_numpy(float)
    variants: dict[str, Fit | Refused] = {f"shared law, Huber delta {law.delta:g} (as reported)": law}
    for delta in DELTAS:
        if delta != law.delta:
            label = "least squares of log loss" if delta == LEAST_SQUARES else f"Huber delta {delta:g}"
            variants[f"shared law, {label}"] = attempt(lambda delta=delta: _shared_law(frame, delta=delta))
    variants["shared law without the largest budget, extrapolation"] = attempt(
        lambda: _shared_law(frame, delta=law.delta, weights=smaller)
    )
    rows, reported = [], {}
    for choice, fitted in variants.items():
        if isinstance(fitted, Refused):
            continue
        note = "" if fitted.converged else f" [{fitted.status}]"
        if baseline not in fitted.arms:
            continue
        base = frontier(fitted, frame, baseline, [largest])[0]
        for arm in (arm for arm in others if arm in fitted.arms):
            value = float(frontier(fitted, frame, arm, [largest])[0] - base)
            reported.setdefault(arm, value)
            rows.append(
                Sensitivity(
                    choice=choice + note,
                    arm=arm,
                    value=value,
                    reads=f"{arm if value < 0 else baseline} lower, without interval",
                    changes=value * reported[arm] < 0,
                )
            )
    return rows


def _in_words(kind: str, arm: str, baseline: str) -> str:
    return {"A better": f"{arm} better", "B better": f"{baseline} better"}.get(kind, kind)


# --- what a reader must know -----------------------------------------------------------------------------------------


def _caveats(
    frame: pd.DataFrame,
    found: Minima,
    judged_by: Noise | Refused,
    lack: LackOfFit | Refused,
    law: Fit | Refused,
    draws: Draws | Refused,
) -> list[str]:
    study = frame.attrs["study"]
    runs = frame.drop_duplicates("run_id")
    said = []
    for status, means in (
        ("missing", "have not ended; run the study again to finish them"),
        ("failed", "failed; failed.json in their directories says why"),
        ("cancelled", "were cancelled, and are in no fit; `lab retry STUDY RUN` takes one back"),
        ("diverged", "diverged and are in no fit: an arm that diverges looks better here than it is"),
    ):
        ids = runs.loc[runs["status"] == status, "run_id"].tolist()
        if ids:
            shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
            said.append(f"{len(ids)} of {len(runs)} runs {means}: {shown}.")
    if isinstance(judged_by, Noise) and judged_by.source == "scatter":
        said.append("No cell has two seeds: intervals use the scatter about the parabolas instead of seed noise.")
    elif isinstance(judged_by, Noise):
        cells = runs[runs["status"] == "done"].groupby(noise.CELL).size()
        said.append(
            f"Seed noise is pooled over {int((cells > 1).sum())} replicated cells and is taken to be the same at every "
            "size and budget. Intervals contain this noise only: not the choice of learning rates, nor of the corpus."
        )
    if isinstance(lack, LackOfFit) and lack.p < compare.ALPHA:
        said.append(
            f"Parabolas miss the losses by {lack.sd:.2g} nats more than seeds explain (F = {lack.F:.1f}, p = {lack.p:.2g}): "
            "the intervals are too narrow if arms are missed differently; see the sensitivity table."
        )
    edge = [f"{m.arm} at {compact(m.budget)}" for m in found.values() if isinstance(m, Minimum) and not m.bracketed]
    if edge:
        said.append(
            f"The best size that was run is the smallest or the largest for {', '.join(edge)} FLOPs; the parabola's minimum "
            "lies inside, but more sizes would secure it."
        )
    if isinstance(law, Fit) and not law.converged:
        said.append(f"The shared law L(N, D): {law.status}.")
    if isinstance(draws, Draws) and draws.converged < 0.95:
        said.append(f"{1 - draws.converged:.0%} of the resampled fits did not converge; they are in the intervals.")
    most = runs.loc[runs["epochs"].idxmax()]
    if most["epochs"] > MAX_EPOCHS:
        said.append(
            f"{most['run_id']} sees its data {most['epochs']:.1f} times; beyond {MAX_EPOCHS:g} the law changes."
        )
    per_arm = runs.groupby(["budget", "arm"])["epochs"].mean().unstack()
    ratio = float((per_arm.max(axis=1) / per_arm.min(axis=1)).max())
    if ratio > MAX_EPOCH_RATIO:
        said.append(f"Arms repeat the corpus unequally, by up to a factor {ratio:.1f} at one budget.")
    tolerance = study["match"]["tolerance"]
    worst = runs.loc[runs["residual"].abs().idxmax()]
    if abs(worst["residual"]) > tolerance:
        said.append(f"{worst['run_id']} misses its budget by {worst['residual']:+.1%}, more than {tolerance:.1%}.")
    for column, what in (
        ("objective", "objective"),
        ("loss_on", "which tokens carry loss"),
        ("S", "input length"),
        ("T", "target length"),
    ):
        if frame[column].nunique() > 1:
            said.append(f"Arms differ in {what}: the comparison is of that as well as of structure.")
    if runs["device"].nunique() > 1:
        said.append(
            f"Runs were made on different devices ({', '.join(sorted(map(str, runs['device'].dropna().unique())))})."
        )
    return [*said, *flagged(frame)]


def flagged(frame: pd.DataFrame) -> list[str]:
    """The plan's notes, and before them what guards flag that is not among them. What guards refuse is refused as the verdict
    of its arm, or was by the plan."""
    study = frame.attrs["study"]
    notes = [str(note) for note in study.get("notes", [])]
    found = find(Case(study=study, rows=frame.to_dict("records")))
    return [*(one.reason for one in found if one.severity == "flag" and one.reason not in notes), *notes]


def _law_against_measured(compared: Compared, gaps: dict[str, np.ndarray], compute: np.ndarray) -> list[str]:
    """Where the shared law's band and a measured interval do not meet: the law is then wrong about that arm."""
    missed = []
    for (arm, budget), value in compared.items():
        if arm in gaps and isinstance(value, Difference):
            low, _, high = gaps[arm][:, int(np.argmin(np.abs(np.log(compute / budget))))]
            if value.low > high or value.high < low:
                missed.append(f"{arm} at {compact(budget)}")
    if not missed:
        return []
    return [
        f"The shared law contradicts the measured difference of {', '.join(missed)} FLOPs: exponents may differ by arm, and "
        "what the law says about them is not to be used."
    ]


def parameter_intervals(answer: Answer) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Each parameter of the shared law with its percentile interval; an arm's A and B also as multipliers of the
    baseline's."""
    if isinstance(answer.law, Refused):
        return []
    flat = answer.law.flat
    draws = answer.draws.flat if isinstance(answer.draws, Draws) else None
    rows = [(name, value, interval(draws[name]) if draws else None) for name, value in flat.items()]
    for arm in answer.others:
        for name in ("A", "B"):
            mine, base = f"{name}[{arm}]", f"{name}[{answer.baseline}]"
            if mine in flat and base in flat:
                ratio = interval(draws[mine] / draws[base]) if draws else None
                rows.append((f"{mine} / {base}", flat[mine] / flat[base], ratio))
    return rows
