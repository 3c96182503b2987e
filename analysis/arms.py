"""Two or more arms on any table of runs: what was measured, what laws add, and one typed verdict for each arm.

    compare_arms(table, "chinchilla", baseline="dense", columns={"N": "params", "D": "tokens"}, margin=0.01)

The verdict rests on differences at equal compute inside what was run, where the table has any (in_range.py); else on the
law with the fewest parameters by arm that is not rejected (nested.py), inside the compute that both arms were run at. The
crossing, the gain in compute and what lies beyond the data come from that law, and say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from analysis import compare
from analysis.compare import Compared, Difference, Verdict
from analysis.crossing import Crossing, crossing, crossing_of, law_curves, measured_draws
from analysis.curves import Curves, measured_cost
from analysis.fit import named
from analysis.frame import compact, not_comparable
from analysis.gain import Gain, compute_equivalent_gain, pinned_speedup
from analysis.in_range import InRange, in_range
from analysis.isoflop import TOLERANCE, positive
from analysis.laws import Law
from analysis.multiplicity import RankAgreement, benjamini_hochberg, holm
from analysis.nested import NULL_DRAWS, Nested, nested
from analysis.optimum import SIX_N, Cost, cost_of_token
from analysis.problem import nearest
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import Draws, interval, refuse_repeated
from analysis.uncertainty import draw_parameters

T = TypeVar("T")

CROSSING_LEVELS = ("shared E", "separate")
_CLOSE = 1e-3  # C against flops_per_token(N) D: rounding of a table


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An arm against the baseline. `measured` are differences (nats) by budget inside what was run, `by_law` those of the
    fitted curves at the ends and the middle of `range`, the compute that both were run at; `nested` says which law that is.
    `p` is that of the nested laws for any difference at all, `p_holm` and `p_bh` are adjusted for the number of arms."""

    arm: str
    baseline: str
    verdict: Verdict
    measured: Mapping[float, Difference | Refused]
    nested: Nested | Refused
    by_law: Mapping[float, Difference] | Refused
    range: tuple[float, float] | Refused
    crossing: Crossing | Refused
    gain: Gain | Refused
    pinned: Gain | Refused
    p: float = 1.0
    p_holm: float = 1.0
    p_bh: float = 1.0
    curves: Curves | Refused = field(repr=False)
    draws: Draws | Refused = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    baseline: str
    pairs: Mapping[str, Pair]
    in_range: InRange | Refused
    ranks: RankAgreement | Refused
    margin: float | None
    alpha: float

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(pair.verdict for pair in self.pairs.values())

    def __str__(self) -> str:
        lines = []
        for name, pair in self.pairs.items():
            lines.append(f"[{pair.verdict.kind}] {pair.verdict.sentence}")
            lines += [f"    {pair.verdict.detail}"] if pair.verdict.detail else []
            tested = f" (over arms: Holm {pair.p_holm:.3g}, Benjamini-Hochberg {pair.p_bh:.3g})" if pair.p < 1 else ""
            for what, value in (
                ("nested laws", pair.nested), ("crossing", pair.crossing), ("gain", pair.gain), ("pinned", pair.pinned)
            ):  # fmt: skip
                said = f"refused: {value.reason}" if isinstance(value, Refused) else str(value)
                lines.append(f"    {what}: {said}{tested if what == 'nested laws' else ''}")
            if isinstance(pair.nested, Nested):
                scored = [level for level in pair.nested.levels if np.isfinite(level.hold_out)]
                lines += [f"    hold-out rms of {name}: " + ", ".join(f"{s.name} {s.hold_out:.3%}" for s in scored)] * (
                    len(scored) > 0
                )
        if isinstance(self.in_range, InRange):
            lines.append(f"noise: {self.in_range.noise_source}")
        if isinstance(self.ranks, RankAgreement):
            lines.append(f"ranks: {self.ranks}")
        return "\n".join(lines)


def compare_arms(
    table: Any,
    law: Law | str | None = "chinchilla",
    *,
    baseline: str,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    arm: str = "arm",
    compute: str = "C",
    run_id: str = "run_id",
    clusters: Any = None,
    margin: float | None = None,
    alpha: float = compare.ALPHA,
    flops_per_token: Cost = SIX_N,
    tolerance: float = TOLERANCE,
    delta: float | str = "scatter",
    method: str | None = None,
    draws: int = 1000,
    null_draws: int = NULL_DRAWS,
    hold_out: bool = True,
    seed: int = 0,
) -> Comparison:
    """Every arm in the column `arm` against `baseline`.

    `columns` maps the law's letters and C to the table's names; compute is the column `compute`, or flops_per_token(N) D.
    `law` None compares what was measured only. Rows that share a value of the column `run_id` are not independent and are
    refused (Refusal) unless `clusters` names a column, or holds a label for each row; a label that two arms share says
    that those runs are paired. `margin` (nats) is the largest difference that does not matter. `delta`, `method` and
    `draws` are of the fits and their draws.
    """
    model = named(law) if law is not None else None
    data = _columns(table, model, columns or {}, loss, arm, compute, flops_per_token)
    arms = [name for name in dict.fromkeys(data["arm"].tolist()) if name != baseline]
    if baseline not in data["arm"] or not arms:
        known = list(dict.fromkeys(data["arm"].tolist()))
        raise ValueError(
            f"baseline = {baseline!r}: {nearest(baseline, known)}column {arm!r} has {', '.join(known)}; a comparison needs "
            "the baseline and another"
        )
    for name in arms:
        if why := not_comparable(table, name, baseline, arm):
            raise ValueError(why)
    if clusters is None:
        if run_id in table:
            refuse_repeated([str(name) for name in table[run_id]])
        labels = np.arange(len(data["loss"])).astype(str)
    else:
        labels = np.asarray([str(name) for name in (table[clusters] if isinstance(clusters, str) else clusters)])
        if len(labels) != len(data["loss"]):
            raise ValueError(f"clusters has {len(labels)} labels: give one for each of the {len(data['loss'])} rows")
    data["cluster"] = labels
    measured = attempt(lambda: in_range(data, arms=[baseline, *arms], baseline=baseline, tolerance=tolerance))
    most = max(int(np.isin(data["arm"], [baseline, name]).sum()) for name in arms)
    settings = {"delta": delta, "method": method, "draws": draws, "null_draws": null_draws, "hold_out": hold_out,
                "seed": seed, "alpha": alpha}  # fmt: skip
    pairs = {
        name: _pair(model, _rows_of(data, name, baseline, most), name, baseline, measured, flops_per_token, settings)
        for name in arms
    }
    p = {name: pair.nested.p for name, pair in pairs.items() if isinstance(pair.nested, Nested)}
    for name, by_holm, by_bh in zip(p, holm(list(p.values())), benjamini_hochberg(list(p.values())), strict=True):
        pairs[name] = replace(pairs[name], p=p[name], p_holm=by_holm, p_bh=by_bh)
    pairs = _judged(pairs, margin)
    return Comparison(
        baseline=baseline,
        pairs=pairs,
        in_range=measured,
        ranks=attempt(lambda: _ranks(measured, seed)),
        margin=margin,
        alpha=alpha,
    )


def _ranks(measured: InRange | Refused, seed: int) -> RankAgreement:
    if isinstance(measured, Refused):
        raise Refusal(measured.reason)
    return measured.ranks(seed=seed)


def _columns(
    table: Any, law: Law | None, names: Mapping[str, str], loss: str, arm: str, compute: str, cost: Cost
) -> dict[str, np.ndarray]:
    """loss, arm and C, and whatever the law and the cost of a token read, by their letters."""
    if arm not in table:
        known = [str(column) for column in table]
        raise ValueError(
            f"column {arm!r} is not in the table: {nearest(arm, known)}it has {', '.join(known)}; see arm="
        )
    data = {"loss": positive(table, loss), "arm": np.asarray([str(name) for name in table[arm]])}
    needed = [] if law is None else [name for name in law.columns if name != "C"]
    for name in dict.fromkeys([*needed, *(name for name in ("N", "D") if names.get(name, name) in table)]):
        data[name] = positive(table, names.get(name, name))
    at = names.get("C", compute)
    if at not in table and {"N", "D"} <= set(data):
        data["C"] = cost_of_token(cost, data["N"]) * data["D"]
    else:
        data["C"] = positive(table, at)
    return data


def _rows_of(data: Mapping[str, np.ndarray], arm: str, baseline: str, most: int) -> dict[str, np.ndarray]:
    """The rows of two arms, the baseline's first, filled up to `most` by rows without weight: pairs of arms with unequal
    numbers of runs are then fitted by one compiled program."""
    rows = np.concatenate([np.flatnonzero(data["arm"] == name) for name in (baseline, arm)])
    filled = np.concatenate([rows, np.full(most - len(rows), rows[0])])
    of_pair = {name: values[filled] for name, values in data.items()}
    return {**of_pair, "weight": (np.arange(most) < len(rows)).astype(float)}


def _pair(
    law: Law | None, data: dict[str, np.ndarray], arm: str, baseline: str, measured: InRange | Refused, cost: Cost,
    settings: Mapping[str, Any],
) -> Pair:  # fmt: skip
    differences = {} if isinstance(measured, Refused) else measured.of(arm)
    tested = attempt(lambda: _nested(law, data, settings))
    span = attempt(lambda: _range(data, arm, baseline))
    drawn = attempt(lambda: _draws(tested, data, settings))
    given = attempt(lambda: _curves(drawn, span, data, arm, baseline, cost))
    budgets = [budget for budget, value in differences.items() if isinstance(value, Difference)]
    by_law = attempt(lambda: _by_law(given, tested, arm, baseline))
    return Pair(
        arm=arm,
        baseline=baseline,
        verdict=Verdict(arm=arm, baseline=baseline, kind="refused", sentence=""),
        measured=differences,
        nested=tested,
        by_law=by_law,
        range=span,
        crossing=attempt(lambda: _crossing(tested, given, differences, arm, baseline, budgets)),
        gain=attempt(
            lambda: compute_equivalent_gain(_there(given), arm=arm, baseline=baseline, C=_there(given).measured[1])
        ),
        pinned=attempt(lambda: _pinned(_there(given), drawn, arm, baseline)),
        curves=given,
        draws=drawn,
    )


def _nested(law: Law | None, data: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Nested:
    if law is None:
        raise Refusal("no law was asked for")
    return nested(
        law, data, weights=data["weight"], clusters=data["cluster"], delta=settings["delta"], alpha=settings["alpha"],
        draws=settings["null_draws"], hold_out=settings["hold_out"], seed=settings["seed"],
    )  # fmt: skip


def _range(data: Mapping[str, np.ndarray], arm: str, baseline: str) -> tuple[float, float]:
    used = data["weight"] > 0
    of = [data["C"][used & (data["arm"] == name)] for name in (arm, baseline)]
    low, high = max(float(C.min()) for C in of), min(float(C.max()) for C in of)
    if not low < high:
        raise Refusal(f"{arm} and {baseline} were not run at compute that overlaps; run both at the same budgets")
    return low, high


def _draws(tested: Nested | Refused, data: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Draws:
    """Of the smallest level that is not rejected, but at least one in which arms can differ: that no difference was found
    does not say that there is none."""
    tested = _there(tested)
    fit = tested.level(_used(tested)).fit
    if not fit.converged:
        raise Refusal(f"{tested.law.name} with {_used(tested)} was not fitted: {fit.status}")
    return draw_parameters(
        fit, clusters=data["cluster"], method=settings["method"], draws=settings["draws"], seed=settings["seed"]
    )


def _used(tested: Nested) -> str:
    names = [level.name for level in tested.levels]
    return names[max(1, names.index(tested.selected))]


def _curves(
    drawn: Draws | Refused, span: tuple[float, float] | Refused, data: Mapping[str, np.ndarray], arm: str, baseline: str,
    cost: Cost,
) -> Curves:  # fmt: skip
    drawn, span = _there(drawn), _there(span)
    of_arms: dict[str, Cost] = dict.fromkeys((baseline, arm), cost)
    if {"N", "D"} <= set(data) and not np.allclose(data["C"], cost_of_token(cost, data["N"]) * data["D"], rtol=_CLOSE):
        for name in of_arms:
            rows = (data["arm"] == name) & (data["weight"] > 0)
            of_arms[name] = measured_cost(*(data[letter][rows] for letter in ("N", "D", "C")))
    return law_curves(drawn, arms=(baseline, arm), measured=span, flops_per_token=of_arms)


def _by_law(given: Curves | Refused, tested: Nested | Refused, arm: str, baseline: str) -> dict[float, Difference]:
    """At the ends and the middle of the common range."""
    given, tested = _there(given), _there(tested)
    level = tested.level(_used(tested))
    dof = max(1, level.fit.rows - level.fit.problem.k)
    t = float(stats.t.ppf(0.975, dof))
    found = {}
    for C in np.geomspace(*given.measured, 3):
        apart = given.at(C, arm) - given.at(C, baseline)
        (low, high), value = interval(apart), float(np.median(apart))
        error = (high - low) / (2 * t)
        found[float(C)] = Difference(
            arm=arm,
            baseline=baseline,
            budget=float(C),
            value=value,
            standard_error=error,
            dof=dof,
            low=low,
            high=high,
            p=float(2 * stats.t.sf(abs(value) / error, dof)) if error > 0 else 1.0,
            basis=f"law, {level.name}: {tested.law.name}",
        )
    return found


def _crossing(
    tested: Nested | Refused, given: Curves | Refused, measured: Mapping[float, Difference | Refused], arm: str,
    baseline: str, budgets: Sequence[float],
) -> Crossing:  # fmt: skip
    """Of the law where its arms may cross; else of the measured differences, between their budgets."""
    if isinstance(tested, Nested) and _used(tested) in CROSSING_LEVELS and isinstance(given, Curves):
        return crossing_of(given, arm=arm, baseline=baseline, budgets=budgets)
    judged = [value for value in measured.values() if isinstance(value, Difference) and not value.same_runs]
    if len(judged) > 1 and any(value.resolved for value in judged):
        C, gap = measured_draws(judged)
        return crossing(C, gap, arm=arm, baseline=baseline, budgets=[value.budget for value in judged])
    if isinstance(tested, Refused) or isinstance(given, Refused):
        raise Refusal(next(v.reason for v in (tested, given) if isinstance(v, Refused)))
    raise Refusal(
        f"{tested.selected} is not rejected (p = {tested.p_of(tested.selected):.2g}): by it curves do not cross, and no "
        "measured difference is resolved"
    )


def _pinned(given: Curves, drawn: Draws | Refused, arm: str, baseline: str) -> Gain:
    """At the largest common compute, on the baseline's curve E + G C^-c; c is read off between the middle and the end of
    the range, and is constant for laws whose frontier is a power law."""
    drawn = _there(drawn)
    if "E" not in drawn.params:
        raise Refusal(f"{drawn.law.name} has no asymptote E")
    own = next(p for p in drawn.law.parameters if p.name == "E").per_arm
    E = drawn.values(lambda p: np.asarray(p["E"])[..., drawn.fit.arms.index(baseline)] if own else np.asarray(p["E"]))
    low, high = given.measured
    first, last = (given.at(C, baseline) - E for C in (np.sqrt(low * high), high))
    if np.mean((first > last) & (last > 0)) < 0.5:
        raise Refusal(f"{baseline}'s asymptote is not below its losses in half of the draws")
    usable = (first > last) & (last > 0)
    exponent = np.log(np.where(usable, first / np.where(usable, last, 1.0), np.e)) / np.log(high / np.sqrt(low * high))
    better, worse = (given.at(high, name) for name in (arm, baseline))
    # A draw without an asymptote below the losses is one in which no compute reaches the better one.
    return pinned_speedup(
        better, worse, asymptote=np.where(usable, E, np.maximum(better, worse) + 1), exponent=exponent, C=high,
        measured=given.measured, arm=arm, baseline=baseline,
    )  # fmt: skip


def _judged(pairs: dict[str, Pair], margin: float | None) -> dict[str, Pair]:
    """Verdicts from what was measured; from the law where nothing was at equal compute. There both must reject: the test
    of the nested laws for any difference at all, Holm-corrected over arms, and that of the difference at a compute,
    Holm-corrected over arms and compute."""
    every = [d for pair in pairs.values() if isinstance(pair.by_law, dict) for d in pair.by_law.values()]
    corrected = {
        (d.arm, d.budget): replace(d, p_holm=max(p, pairs[d.arm].p_holm))
        for d, p in zip(every, holm([d.p for d in every]), strict=True)
    }
    pairs = {
        name: replace(pair, by_law={C: corrected[name, C] for C in pair.by_law})
        if isinstance(pair.by_law, dict)
        else pair
        for name, pair in pairs.items()
    }
    without = {
        name: pair.by_law
        for name, pair in pairs.items()
        if not any(isinstance(value, Difference) for value in pair.measured.values()) and isinstance(pair.by_law, dict)
    }
    judged = {}
    for name, pair in pairs.items():
        if name in without:
            compared: Compared = {(name, C): value for C, value in without[name].items()}
        else:
            compared = {(name, budget): value for budget, value in pair.measured.items()}
        if not compared and isinstance(pair.by_law, Refused):
            why = f"no budget is common to both, and of the law: {pair.by_law.reason}"
            compared = {(name, 0.0): Refused(reason=why)}
        located = pair.crossing if isinstance(pair.crossing, Crossing) else None
        said = compare.verdict(name, pair.baseline, compared, margin=margin, at=located.median if located else None)
        notes = [said.detail] if said.detail else []
        if name not in without and isinstance(pair.by_law, dict):
            last = list(pair.by_law.values())[-1]
            notes.append(
                f"The fitted curves ({last.basis}) differ by {last.value:+.2g} nats ({last.low:+.2g} to {last.high:+.2g}) at "
                f"{compact(last.budget)} FLOPs."
            )
        if located and located.extrapolated and located.median:
            notes.append(
                f"By the law they cross at {compact(located.median)} FLOPs, beyond what was run: an extrapolation."
            )
        said = replace(said, detail=" ".join(notes))
        judged[name] = replace(pair, verdict=said)
    return judged


def _there(value: T | Refused) -> T:
    if isinstance(value, Refused):
        raise Refusal(value.reason)
    return value
