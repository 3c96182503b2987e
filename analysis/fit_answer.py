"""One law fitted to one table, and what may be said of it: the estimates, how sure they are, and whether to trust them.

    found = analyse_fit(read_table("runs.csv"), "chinchilla")
    found.trust, found.parameters, found.derived, found.caveats

fit_evidence.py adds what a page shows beside it (profiles, sensitivity, other laws, influence); fit_report.py writes both.
"""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis import fit as fits
from analysis.diagnose import LackOfFit, lack_of_fit
from analysis.fit import Fit, fit_law
from analysis.fit_derived import Estimate, compute_optima, derived, flops_per_token
from analysis.laws import Law
from analysis.optimum import Optimum
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import Draws
from analysis.score import Candidate, Score, scores
from analysis.table import clusters_of
from analysis.uncertainty import METHODS, coverage_note, default_method, draw_parameters

DRAWS = 1000
LARGE = 20_000  # rows above which what costs a fit for each row, or for each design, is not done
_REFITS = 2e7  # rows times refits that take about a minute; above, intervals come from the covariance
_ENTRIES = 2e8  # rows times refits that fit into memory
_START_ROWS = 4e6  # rows times starts
_SAID_RMS = 3.0  # times the error in sample, above which a hold-out error says that the law does not extrapolate
_EXPLAINED = 0.25  # of the residuals' variance, by a quadratic: above, the law lacks something

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, kw_only=True)
class Trust:
    """`reasons` say why not, most serious first."""

    kind: Literal["usable", "with care", "do not use"]
    sentence: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FitAnswer:
    """A fit of `table`, whose rows are those of the fit. `method` says what intervals are of; `cost` is FLOPs per token and
    parameter, and `said_cost` says so; `options` are what the law was fitted with."""

    table: pd.DataFrame = field(repr=False)
    fit: Fit
    options: Mapping[str, Any]
    arm: str
    clusters: str | None
    draws: Draws | Refused
    method: str
    parameters: tuple[Estimate, ...]
    derived: tuple[Estimate, ...]
    optima: Mapping[str, Optimum | Refused] = field(repr=False)
    cost: float
    lack_of_fit: LackOfFit | Refused
    holdout: Score | Refused
    trust: Trust
    caveats: tuple[str, ...]

    @property
    def source(self) -> str:
        return self.table.attrs.get("source", "table")

    @property
    def labels(self) -> pd.Series | None:
        return None if self.clusters is None else self.table[self.clusters]


def analyse_fit(
    table: pd.DataFrame,
    law: Law | str = "chinchilla",
    *,
    arm: str = "arm",
    clusters: str | None = None,
    weights: str | None = None,
    draws: int = DRAWS,
    method: str | None = None,
    holdout: Sequence[float] | None = (),
    starts: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> FitAnswer:
    """Fits and judges. `table` is that of `read_table`; `clusters` and `weights` name columns; `holdout` are the FLOPs up to
    which the law is fitted and beyond which it is scored, () for rolling cuts, None for no score; `options` are fit_law's.
    Rows that share a run and no `clusters`: intervals are refused, the rest stands.
    """
    tell = progress or (lambda what, done, of: None)
    if method is not None and method not in METHODS:
        raise ValueError(f"method = {method!r}: use one of {', '.join(METHODS)}")
    for role, column in (("clusters", clusters), ("weights", weights)):
        if column is not None and column not in table:
            raise ValueError(f"{role} = {column!r} is not a column of the table; it has {', '.join(map(str, table))}")
    n = len(table)
    used = int(min(fits.STARTS, max(4, _START_ROWS // n))) if starts is None else starts
    row_weights = None if weights is None else table[weights].to_numpy(float)
    options = {name: value for name, value in options.items() if value not in (None, {}, ())}
    fit = fit_law(
        law, table, arm=arm, weights=row_weights, starts=used, seed=seed,
        progress=lambda done, of: tell("fitting from many starts", done, of), **options,
    )  # fmt: skip
    tell("intervals", 0, 1)
    drawn, said = attempt_draws(fit, table, clusters, draws, method, seed)
    tell("intervals", 1, 1)
    cost = flops_per_token(table)
    optima = compute_optima(fit, drawn, cost)
    lack = attempt(lambda: lack_of_fit(_small(fit, n, "lack of fit")))
    scored = _scored(fit, table, arm, clusters, row_weights, holdout, {**options, "starts": used}, seed, tell)
    notes = [*table.attrs.get("notes", ()), *said]
    if isinstance(drawn, Draws) and (missed := coverage_note(drawn)):
        notes.append(missed)
    if used < fits.STARTS and starts is None:
        notes.append(f"{used} starts instead of {fits.STARTS}, because of {n:,} rows.")
    reasons = _reasons(fit, table, drawn, lack, scored)
    found = FitAnswer(
        table=table,
        fit=fit,
        options=options,
        arm=arm,
        clusters=clusters,
        draws=drawn,
        method=_kind(drawn, clusters),
        parameters=_parameters(fit, drawn),
        derived=derived(fit, drawn, table, optima),
        optima=optima,
        cost=cost,
        lack_of_fit=lack,
        holdout=scored,
        trust=Trust(kind="usable", sentence="", reasons=()),
        caveats=tuple(notes),
    )
    return judged(found, reasons)


# --- intervals -------------------------------------------------------------------------------------------------------


def attempt_draws(
    fit: Fit, table: pd.DataFrame, clusters: str | None, draws: int, method: str | None, seed: int
) -> tuple[Draws | Refused, list[str]]:
    """Draws, or why there are none, and what a reader must know of them."""
    if draws < 1:
        return Refused(reason="no draws were asked for"), []
    if not fit.converged:
        return Refused(reason=f"the fit is not to be trusted ({fit.status}), so that it is not resampled"), []
    found = clusters_of(table) if clusters is None else None
    if found is not None:
        counts = table[found].value_counts()
        return Refused(
            reason=f"{found} {str(counts.index[0])!r} has {counts.iloc[0]} rows, which are not independent: an interval that "
            f"resamples rows would be several times too sure; resample whole runs with --clusters {found}"
        ), []
    labels = None if clusters is None else table[clusters].astype(str).tolist()
    units = len(table) if labels is None else len(set(labels))
    chosen, notes = method or default_method(fit), []
    refits = {"jackknife": units, "sandwich": 0}.get(chosen, draws)
    if method is None and refits * len(table) > _REFITS:
        chosen = "sandwich"
        notes.append(f"Intervals are of the covariance and not of refits, because of {len(table):,} rows.")
    elif refits * len(table) > _ENTRIES:
        raise ValueError(
            f"method = {chosen!r}: {refits:,} refits of {len(table):,} rows do not fit into memory; use --method sandwich"
        )
    if labels is not None and units < 12 and chosen == "bootstrap":
        notes.append(f"{units} clusters are few for a bootstrap of clusters; compare --method wild and jackknife.")
    return attempt(lambda: draw_parameters(fit, clusters=labels, method=chosen, draws=draws, seed=seed)), notes


def _kind(draws: Draws | Refused, clusters: str | None) -> str:
    if isinstance(draws, Refused):
        return "none"
    return draws.kind if clusters else draws.kind.replace(" clusters resampled", " rows resampled (pairs bootstrap)")


def _parameters(fit: Fit, draws: Draws | Refused) -> tuple[Estimate, ...]:
    bounds = draws.intervals() if isinstance(draws, Draws) else {}
    units = {p.name: p.unit for p in fit.law.parameters}
    held = {**{name: "fixed" for name in fit.fixed}, **{name: f"tied to {other}" for name, other in fit.tied.items()}}
    rows = []
    for name, value in fit.flat.items():
        base = name.split("[")[0]
        said = held.get(name) or held.get(base, "")
        rows.append(
            Estimate(
                name=name,
                value=value,
                interval=None if said == "fixed" else bounds.get(name),
                unit=units[base],
                meaning=said,
            )
        )
    return tuple(rows)


# --- checks ----------------------------------------------------------------------------------------------------------


def _small(fit: Fit, rows: int, what: str) -> Fit:
    if rows > LARGE:
        raise Refusal(f"{what} is not looked at with {rows:,} rows; choose up to {LARGE:,} with where")
    return fit


def candidate(fit: Fit, options: Mapping[str, Any]) -> Candidate:
    """The law as it was fitted."""
    return Candidate(law=fit.law, name=label(fit), options={k: v for k, v in options.items() if k != "per_arm"})


def label(fit: Fit) -> str:
    parts = [f"{name} = {value:g}" for name, value in fit.fixed.items()]
    parts += [f"{name} = {other}" for name, other in fit.tied.items()]
    return ", ".join((fit.law.name, *parts))


def _scored(
    fit: Fit,
    table: pd.DataFrame,
    arm: str,
    clusters: str | None,
    weights: np.ndarray | None,
    holdout: Sequence[float] | None,
    options: Mapping[str, Any],
    seed: int,
    tell: Progress,
) -> Score | Refused:
    if holdout is None:
        return Refused(reason="no hold-out was asked for")
    if "C" not in table:
        return Refused(reason="the table has no compute to hold out by; name it with --columns C=COLUMN")
    if len(table) > LARGE and not len(holdout):
        return Refused(reason=f"{len(table):,} rows are not held out unasked; say where to cut with --holdout FLOPS")
    tell("hold-out", 0, 1)
    found = attempt(
        lambda: scores(
            [candidate(fit, options)],
            table,
            arm=arm,
            weights=weights,
            clusters=None if clusters is None else table[clusters],
            cuts=list(holdout) or None,
            horizon=1e300 if len(holdout) else 10.0,
            draws=200 if len(table) <= LARGE else 0,
            seed=seed,
        )[0]
    )
    tell("hold-out", 1, 1)
    return found


def _reasons(
    fit: Fit, table: pd.DataFrame, draws: Draws | Refused, lack: LackOfFit | Refused, scored: Score | Refused
) -> list[str]:
    """Why not to trust the fit."""
    said = []
    if not fit.converged:
        said.append(f"The fit is not an optimum to be used: {fit.status}.")
    if fit.flat_directions:
        said.append(f"The data do not determine {'; '.join(fit.flat_directions)}: they move together at no cost.")
    if isinstance(lack, LackOfFit) and lack.flagged:
        said.append(
            f"Lack of fit: {lack}. Intervals suppose that the law is true, and are too narrow for what it misses."
        )
    said += _structure(fit)
    if isinstance(scored, Score):
        if scored.failures:
            said.append(f"Held out, the law could not be fitted everywhere: {'; '.join(scored.failures[:3])}.")
        if scored.error > _SAID_RMS * fit.rms:
            said.append(
                f"Beyond the data it was fitted to, the law errs by {100 * scored.error:.2g}% of the loss, in it by "
                f"{100 * fit.rms:.2g}%: it fits better than it extrapolates."
            )
        if scored.coverage < 0.8:
            said.append(
                f"Held-out runs fall inside their 95% intervals {scored.coverage:.0%} of the time: extrapolated intervals "
                "are too narrow."
            )
    if isinstance(draws, Refused) and fit.converged:
        said.append(f"There are no intervals: {draws.reason}.")
    if isinstance(draws, Draws) and draws.converged < 0.95:
        said.append(f"{1 - draws.converged:.0%} of the refits did not converge; they are in the intervals.")
    if fit.converged and fit.agree < 0.5:
        said.append(f"Only {fit.agree:.0%} of the starts end at this optimum: others are near.")
    if fit.rows < 3 * fit.problem.k:
        said.append(f"{fit.rows} runs for {fit.problem.k} parameters are few: one run may decide; see its influence.")
    dropped = int(fit.dropped_n.sum())
    if dropped:
        rows = ", ".join(str(row) for row in table.index[fit.dropped_n][:8])
        said.append(f"The rule {fit.outliers} left out {dropped} rows ({rows}{', ...' if dropped > 8 else ''}).")
    if "epochs" in table and "U" not in fit.law.columns and float(np.nanmax(table["epochs"].to_numpy(float))) > 4:
        said.append("Some runs see their data more than 4 times, for which the law has no term; see data_constrained.")
    return said


def _structure(fit: Fit) -> list[str]:
    """What a quadratic in the logarithms of the columns explains of the residuals: noise leaves it next to nothing."""
    kept = (fit.data.weights_n > 0) & ~fit.dropped_n
    u = [np.log(value[kept]) - np.log(value[kept]).mean() for value in fit.data.raw.values()]
    residual = fit.residuals()[kept]
    terms = [np.ones_like(residual), *u, *(a * b for a, b in itertools.combinations_with_replacement(u, 2))]
    X = np.stack(terms, axis=1)
    rank, n = int(np.linalg.matrix_rank(X)), len(residual)
    whole = float(((residual - residual.mean()) ** 2).sum())
    if n < 2 * rank or whole == 0.0:
        return []
    left = float(((residual - X @ np.linalg.lstsq(X, residual, rcond=None)[0]) ** 2).sum())
    share = 1 - left / whole
    p = float(stats.f.sf((whole - left) / (rank - 1) / (left / (n - rank)), rank - 1, n - rank))
    if share < _EXPLAINED or p > 1e-3:
        return []
    return [
        f"The residuals are not noise: a curve in {' and '.join(f'log {name}' for name in fit.data.raw)} explains {share:.0%} of "
        "their variance, so that the law lacks something; see the panels of residuals."
    ]


def judged(found: FitAnswer, reasons: Sequence[str]) -> FitAnswer:
    """The answer with more reasons for care."""
    fit, every = found.fit, (*found.trust.reasons, *reasons)
    if not fit.converged:
        trust = Trust(kind="do not use", sentence=f"Do not use these numbers: {fit.status}.", reasons=every)
        return replace(found, trust=trust)
    tested = "it was not tested on runs beyond those it was fitted to"
    if isinstance(found.holdout, Score):
        cuts = len(found.holdout.cuts)
        tested = (
            f"held out, it predicts larger runs to {100 * found.holdout.error:.3g}% of the loss "
            f"({cuts} cut{'s' if cuts > 1 else ''})"
        )
    said = f"The optimum is clear ({fit.agree:.0%} of the starts agree), the law fits to {100 * fit.rms:.3g}%, and {tested}."
    if every:
        said += " There is one reservation." if len(every) == 1 else f" There are {len(every)} reservations."
    return replace(found, trust=Trust(kind="with care" if every else "usable", sentence=said, reasons=every))
