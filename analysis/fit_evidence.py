"""What a fit's page shows beside the answer: profiles, what other choices would have given, other laws, each run's pull."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis import fit as fits
from analysis.diagnose import Influence, influence
from analysis.fit import LEAST_SQUARES, Fit, fit_law
from analysis.fit_answer import LARGE, FitAnswer, Progress, judged, label
from analysis.fit_derived import centre
from analysis.frame import compact
from analysis.laws import LAWS
from analysis.optimum import Optimum, parametric
from analysis.refusal import Refusal, Refused, attempt
from analysis.robust import OUTLIER_RULES
from analysis.score import Candidate, Score, scores
from analysis.selection import Selection, select
from analysis.uncertainty import Profile, profile

DELTAS = (1e-5, 1e-4, 1e-3, 1e-2, LEAST_SQUARES)
# Other counts of the same thing, under the names that tables give them.
COUNTS = {
    "N": ("parameters_total", "parameters_body", "N_total", "N_noemb", "N_nonemb", "non_embedding_parameters"),
    "C": ("flops_exact", "flops_dense", "flops_6nd", "flops_textbook"),
}
_PROFILES = 9
_POINTS = 21
_STARTS, _CUT_STARTS = 32, 8  # of other laws, on all runs and at each cut
_GROUPS = 2000  # fits that leave one run out each


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the fit says under another choice; `values` are the headline quantities, `moves` whether one of them leaves its
    95% interval."""

    kind: str
    name: str
    values: Mapping[str, float]
    status: str
    chosen: bool
    moves: bool


@dataclass(frozen=True, kw_only=True)
class LawRow:
    """Errors are root mean squares of the log loss, in sample and beyond the cuts."""

    law: str
    parameters: int
    rms: float
    status: str
    score: Score | None
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    profiles: Mapping[str, Profile | Refused] = field(repr=False)
    choices: tuple[Choice, ...]
    laws: tuple[LawRow, ...] | Refused
    selection: Selection | Refused
    influence: Influence | Refused
    pulled: str  # the quantity that influence is told of
    caveats: tuple[str, ...]


def gather(
    found: FitAnswer, *, laws: Sequence[str] | None = None, progress: Progress | None = None
) -> tuple[FitAnswer, Evidence]:
    """The evidence, and the answer with what it adds to the reasons for care. `laws` are those to compare with, by default
    all that read the same columns; one that can not be fitted to this table says why in its row."""
    tell = progress or (lambda what, done, of: None)
    fit = found.fit
    names = fit.free[:_PROFILES]
    profiles: dict[str, Profile | Refused] = {}
    for done, name in enumerate(names):
        tell("profiles", done, len(names))
        profiles[name] = attempt(lambda n=name: profile(_few(fit), n, clusters=found.labels, points=_POINTS))
    tell("sensitivity", 0, 1)
    choices = tuple(_choices(found))
    tell("sensitivity", 1, 1)
    compared = attempt(lambda: _laws(found, laws, tell))
    selection = Refused(reason="no hold-out scores") if isinstance(compared, Refused) else _selection(compared)
    pulled, quantities = _pull(fit)
    tell("influence of each run", 0, 1)
    groups = found.labels if found.labels is not None else found.table.index
    moved = attempt(lambda: influence(_grouped(fit, groups), groups, quantities=quantities))
    tell("influence of each run", 1, 1)
    caveats = _caveats(found, profiles, choices, compared, selection)
    evidence = Evidence(
        profiles=profiles,
        choices=choices,
        laws=compared,
        selection=selection,
        influence=moved,
        pulled=pulled,
        caveats=tuple(caveats),
    )
    return judged(found, caveats), evidence


def _few(fit: Fit) -> Fit:
    if len(fit.data.log_loss_n) > LARGE:
        raise Refusal(f"not worked out with {len(fit.data.log_loss_n):,} rows; choose up to {LARGE:,} with where")
    return fit


def _grouped(fit: Fit, groups: Any) -> Fit:
    many = len({str(group) for group in groups})
    if many > _GROUPS:
        raise Refusal(f"not worked out for {many:,} runs; choose up to {_GROUPS:,} with where, or name clusters")
    return fit


# --- other choices ---------------------------------------------------------------------------------------------------


def headline(found: FitAnswer, fit: Fit) -> dict[str, float]:
    """The few numbers that a choice could change, NaN where the fit does not have them."""
    top = float(found.table["C"].max()) if "C" in found.table else np.nan
    where = compact(10 * top)
    if set(fit.law.columns) == {"N", "D"}:
        arm = fit.arms[0] if fit.law.by_arm else None
        # A refit is asked for its optimum whatever its status, which stands beside the number.
        law = replace(fit, status="converged")
        optimum = attempt(lambda: parametric(law, arm=arm, flops_per_token=found.cost))
        values = {"a": np.nan, f"L*({where})": np.nan}
        if isinstance(optimum, Optimum):
            values = {"a": optimum.a, f"L*({where})": float(optimum.loss_at(10 * top).value[0])}
    elif fit.law.columns == ("C",) and not fit.law.by_arm:
        values = {name: fit.flat[name] for name in ("gamma", "c0") if name in fit.flat}
        values |= {f"L({where})": float(fit.predict(C=10 * top))}
    else:
        exponents = [p.name for p in fit.law.parameters if p.unit == "1" and not p.per_arm][:3]
        values = {name: fit.flat[name] for name in exponents}
    if not fit.law.by_arm:
        values["L(centre)"] = (
            float(fit.predict(**centre(found.fit))) if fit.law.columns == found.fit.law.columns else np.nan
        )
    return values


def _choices(found: FitAnswer) -> list[Choice]:
    fit = found.fit
    intervals = {e.name: e.interval for e in (*found.parameters, *found.derived)}
    own = headline(found, fit)

    def choice(kind: str, name: str, other: Fit, chosen: bool = False) -> Choice:
        values = headline(found, other)
        moves = any(
            (ends := intervals.get(key)) is not None and not ends[0] <= value <= ends[1]
            for key, value in values.items()
            if np.isfinite(value) and np.isfinite(own.get(key, np.nan))
        )
        return Choice(kind=kind, name=name, values=values, status=other.status, chosen=chosen, moves=moves)

    rows = [choice("Huber delta", _delta(fit), fit, chosen=True)]
    deltas = np.array([delta for delta in DELTAS if not np.isclose(delta, fit.delta)])
    plain = replace(fit, scatter=False, outliers=None) if fit.outliers is None else fit
    if fit.outliers is None:
        solved, params = fits.refit(plain, fit.data.weights_n[None], delta=deltas)
        others = [_member(fit, params, m, bool(solved.converged_m[m])) for m in range(len(deltas))]
    else:
        others = [_estimated(replace(fit, scatter=False, delta=float(delta))) for delta in deltas]
    rows += [choice("Huber delta", _named(delta), other) for delta, other in zip(deltas, others, strict=True)]
    if not fit.scatter:
        rows.append(choice("Huber delta", "from the scatter", _estimated(replace(fit, scatter=True))))
    for name in (None, *OUTLIER_RULES):
        chosen = name == fit.outliers
        other = fit if chosen else _estimated(replace(fit, outliers=name))
        rows.append(choice("outliers", "every row kept" if name is None else name.replace("_", " "), other, chosen))
    rows += [choice(kind, name, other) for kind, name, other in _counted(found)]
    return rows


def _delta(fit: Fit) -> str:
    return f"{_named(fit.delta)}{' (from the scatter)' if fit.scatter else ''}"


def _named(delta: float) -> str:
    return "least squares" if delta >= LEAST_SQUARES else f"{delta:.3g}"


def _member(fit: Fit, params: Mapping[str, np.ndarray], m: int, converged: bool) -> Fit:
    own = {name: value[m] if value.ndim > 1 else float(value[m]) for name, value in params.items()}
    return replace(fit, params=own, status="converged" if converged else "not converged")


def _estimated(fit: Fit) -> Fit:
    """The whole estimator again, with the rules that `fit` names."""
    solved, params = fits.estimate(fit, fit.data.weights_n[None])
    return _member(fit, params, 0, bool(solved.converged_m[0]))


def _counted(found: FitAnswer) -> list[tuple[str, str, Fit]]:
    rows = []
    for letter, names in COUNTS.items():
        if letter not in found.fit.law.columns:
            continue
        for name in names:
            if name not in found.table or np.allclose(found.table[name], found.table[letter], rtol=1e-6):
                continue
            other = attempt(lambda i=letter, n=name: _refitted(found, found.fit, {i: n}))
            if isinstance(other, Fit):
                rows.append((f"count of {letter}", name, other))
    if found.fit.law.columns == ("C",) and {"N", "D"} <= set(found.table):
        table = found.table.assign(C=6.0 * found.table["N"] * found.table["D"])
        if not np.allclose(table["C"], found.table["C"], rtol=1e-3):
            other = attempt(lambda: _refitted(replace(found, table=table), found.fit, {}))
            rows += [("count of C", "6 N D", other)] if isinstance(other, Fit) else []
    return rows


def _refitted(found: FitAnswer, fit: Fit, columns: Mapping[str, str]) -> Fit:
    options = {name: value for name, value in found.options.items() if name != "per_arm"}
    weights = fit.data.weights_n
    return fit_law(fit.law, found.table, arm=found.arm, columns=columns, weights=weights, starts=16, **options)


# --- other laws ------------------------------------------------------------------------------------------------------


def _laws(found: FitAnswer, asked: Sequence[str] | None, tell: Progress) -> tuple[LawRow, ...]:
    """Laws of the same columns, by arm where the fitted one is, or those that are `asked` for; all with the fitted one's
    delta and outlier rule."""
    fit, table = found.fit, found.table
    _few(fit)
    kept = {name: value for name, value in found.options.items() if name in ("delta", "outliers", "quantile")}
    if asked is None:
        chosen = [
            name
            for name, law in LAWS.items()
            if law.columns == fit.law.columns
            and law.by_arm == fit.law.by_arm
            and name != "chinchilla_multipliers"
            and not name.startswith(("learning_rate", "batch_size"))
        ]
    else:
        chosen = list(dict.fromkeys(asked))
    others = [Candidate(law=fits.named(name), name=name, options=kept) for name in chosen if name != label(fit)]
    pooled = LAWS.get(fit.law.name)
    if asked is None and fit.law.by_arm and pooled is not None and not pooled.by_arm:
        others.append(Candidate(law=pooled, name=f"{pooled.name}, one for all arms", options=kept))
    cuts = [cut.C for cut in found.holdout.cuts] if isinstance(found.holdout, Score) else None
    rows = [LawRow(law=label(fit), parameters=fit.problem.k, rms=fit.rms, status=fit.status,
                   score=found.holdout if isinstance(found.holdout, Score) else None, values=headline(found, fit))]  # fmt: skip
    horizon = found.holdout.cuts[0].until / found.holdout.cuts[0].C if isinstance(found.holdout, Score) else 10.0
    for done, one in enumerate(others):
        tell(f"other laws: {one.label}", done, len(others))
        other = _beside(found, one)
        if isinstance(other, Refused):
            rows.append(LawRow(law=one.label, parameters=0, rms=np.nan, status=other.reason, score=None, values={}))
            continue
        scored = None
        if cuts:
            quick = replace(one, options={**one.options, "starts": _CUT_STARTS})
            tried = attempt(
                lambda c=quick: scores(
                    [c], table, arm=found.arm, weights=fit.data.weights_n, cuts=cuts, horizon=horizon, draws=0
                )
            )
            scored = tried[0] if not isinstance(tried, Refused) else None
        rows.append(
            LawRow(law=one.label, parameters=other.problem.k, rms=other.rms, status=other.status, score=scored,
                   values=headline(found, other))
        )  # fmt: skip
    return tuple(rows)


def _beside(found: FitAnswer, one: Candidate) -> Fit | Refused:
    """Another law on the same rows; a law that a person asked for may need columns that the table lacks."""
    weights = found.fit.data.weights_n
    try:
        return fit_law(one.law, found.table, arm=found.arm, weights=weights, starts=_STARTS, **one.options)
    except ValueError as error:
        return Refused(reason=str(error))


def _selection(laws: tuple[LawRow, ...]) -> Selection | Refused:
    scored = [row.score for row in laws if row.score is not None]
    if len(scored) < 2:
        return Refused(reason="fewer than two laws have hold-out scores")
    return select(scored)


def _pull(fit: Fit) -> tuple[str, dict[str, Callable[[Mapping[str, Any]], Any]]]:
    """The quantity whose movement tells of a run's influence: a, or the first exponent, or the first parameter."""
    shared = {p.name for p in fit.law.parameters if not p.per_arm}
    if {"alpha", "beta"} <= shared and fit.law.columns == ("N", "D") and not fit.tied:
        return "a", {"a": lambda p: p["beta"] / (p["alpha"] + p["beta"])}
    units = {p.name: p.unit for p in fit.law.parameters}
    first = next((name for name in fit.free if units[name.split("[")[0]] == "1"), fit.free[0])
    return first, {first: lambda p: p[first]} if first in shared else {}


def _caveats(
    found: FitAnswer,
    profiles: Mapping[str, Profile | Refused],
    choices: tuple[Choice, ...],
    laws: tuple[LawRow, ...] | Refused,
    selection: Selection | Refused,
) -> list[str]:
    said = []
    lower = [one for one in profiles.values() if isinstance(one, Profile) and one.better is not None]
    if lower:
        said.append(
            f"With {lower[0].name} held at {lower[0].better:.4g} the objective is lower than the fit's: it is a local "
            "optimum; fit again with more starts."
        )
    opened = [
        one.name for one in profiles.values() if isinstance(one, Profile) and (one.low is None or one.high is None)
    ]
    if opened:
        said.append(f"The data do not bound {', '.join(opened)} on one side: read the profile, not the number.")
    moving = [f"{one.kind} {one.name}" for one in choices if one.moves and not one.chosen and one.status == "converged"]
    if moving:
        said.append(f"The answer leaves its interval under another choice: {', '.join(moving)}.")
    if isinstance(selection, Selection) and selection.law != label(found.fit):
        own = next((one for one in selection.runner_ups if one.law == label(found.fit)), None)
        said.append(
            f"{selection.law} predicts larger runs better: {selection.error:.2%} held out"
            + (f" against {own.error:.2%} (difference {own.low:.2%} to {own.high:.2%})." if own else ".")
        )
    if not isinstance(laws, Refused):
        said += _disagreement(laws)
    return said


def _disagreement(laws: tuple[LawRow, ...]) -> list[str]:
    """Where laws that fit about as well say different things beyond the data."""
    own = laws[0]
    key = next((key for key in own.values if key.startswith(("L*(", "L("))), None)
    if key is None:
        return []
    like = [
        row
        for row in laws
        if row.status == "converged" and row.rms < 1.5 * own.rms and np.isfinite(row.values.get(key, np.nan))
    ]
    if len(like) < 2:
        return []
    low, high = (pick(like, key=lambda row: row.values[key]) for pick in (min, max))
    apart = high.values[key] / low.values[key] - 1
    if apart < 3 * own.rms:
        return []
    return [
        f"Laws that fit about as well differ in {key} by {apart:.1%}: from {low.values[key]:.4g} ({low.law}) to "
        f"{high.values[key]:.4g} ({high.law})."
    ]
