"""A fit as one HTML page, as JSON, as a table and as plain text. What is said is decided in fit_answer.py and
fit_evidence.py; this writes it."""

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.report import plain
from lab import records

if TYPE_CHECKING:  # imported where they are used, so that `import analysis` loads neither jax nor matplotlib
    import pandas as pd

    from analysis.fit_answer import Estimate, FitAnswer, Progress
    from analysis.fit_evidence import Evidence

PAGE, NUMBERS, TABLE = "fit.html", "fit.json", "runs.csv"
_SHOWN = 600  # rows on the page; runs.csv has all
_MOST = 6


def fit_report(
    found: FitAnswer,
    out: str | Path,
    *,
    evidence: Evidence | None = None,
    laws: Sequence[str] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Path:
    """Writes fit.html, and fit.json and runs.csv beside it, into the directory `out`; returns the page's path.

    `evidence` is gathered where it is not given, with the laws named by `laws` beside this one (default: all that read the
    same columns, most of the minute or two that it takes); the answer on the page then has the reservations that it adds.
    """
    from analysis.fit_evidence import gather

    if evidence is None:
        found, evidence = gather(found, laws=laws, progress=progress)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    runs = run_table(found, evidence)
    runs.to_csv(directory / TABLE, index_label="row")
    records.write_json(directory / NUMBERS, fit_json(found, evidence))
    page = directory / PAGE
    page.write_text(render(found, evidence, runs=runs, command=command), encoding="utf-8")
    return page


def run_table(found: FitAnswer, evidence: Evidence) -> pd.DataFrame:
    """The fitted rows with `fitted`, `residual` (log observed - log fitted), `left_out`, and `pull`: how far leaving the
    row's run out moves the quantity that `evidence.pulled` names."""
    import numpy as np

    from analysis.diagnose import Influence

    fit = found.fit
    residual_n = fit.residuals()
    runs = found.table.assign(fitted=np.exp(fit.data.log_loss_n - residual_n), residual=residual_n)
    if fit.dropped_n.any():
        runs = runs.assign(left_out=fit.dropped_n)
    if isinstance(evidence.influence, Influence):
        moves = dict(zip(evidence.influence.names, evidence.influence.moves[evidence.pulled], strict=True))
        labels = found.labels if found.labels is not None else found.table.index
        runs = runs.assign(pull=[moves[str(label)] for label in labels])
    return runs


def text(found: FitAnswer) -> str:
    """The answer as plain text: parameters to seven digits, what follows from them, and whether to trust them."""
    from analysis.diagnose import LackOfFit
    from analysis.score import Score

    fit = found.fit
    lines = [f"{fit.law.name}: {fit.law.formula}", f"    {fit.law.source}", ""]
    lines.append(f"[{found.trust.kind}] {found.trust.sentence}")
    lines += [f"    - {reason}" for reason in found.trust.reasons]
    for title, rows in (("parameter", found.parameters), ("follows", found.derived)):
        lines += ["", f"{title:>22}  {'value':>14}  {'95% interval':>28}"]
        lines += [f"{e.name:>22}  {_digits(e.value):>14}  {between(e):>28}  {_meaning(e)}".rstrip() for e in rows]
    lines += ["", f"intervals: {found.method}" + (f", clustered by {found.clusters}" if found.clusters else "")]
    lines.append(f"fit: {_how(found)}")
    lines.append(
        f"solver: {fit.status}; objective {fit.objective:.10g}, gradient norm {fit.gradient_norm:.1e}, {fit.agree:.0%} of the "
        f"starts agree, condition number {fit.condition:.2e}"
        + (f", flat directions: {'; '.join(fit.flat_directions)}" if fit.flat_directions else "")
    )
    lack = found.lack_of_fit
    lines.append(f"lack of fit: {lack if isinstance(lack, LackOfFit) else 'not tested: ' + lack.reason}")
    held = found.holdout
    lines.append(f"hold-out: {score_words(held) if isinstance(held, Score) else held.reason}")
    if isinstance(held, Score):
        lines += [f"    {cut}" for cut in _cuts(held)]
    return "\n".join([*lines, *(f"note: {note}" for note in found.caveats)])


def _meaning(e: Estimate) -> str:
    return e.meaning or (e.unit if e.unit != "1" else "")


def _how(found: FitAnswer) -> str:
    fit = found.fit
    if fit.delta >= 1e3:
        how = "least squares of log residuals"
    else:
        how = f"Huber loss of log residuals, delta {fit.delta:.4g}{' from the scatter' if fit.scatter else ''}"
    if fit.quantile != 0.5:
        how += f", quantile {fit.quantile:g}"
    rule = f", outliers: {fit.outliers}" if fit.outliers else ""
    return f"{fit.rows:,} rows of {found.source}; {how}{rule}; residuals {100 * fit.rms:.3g}% rms"


def score_words(held: Any) -> str:
    """A rolling score in a sentence."""
    cuts = f"{len(held.cuts)} cut{'s' if len(held.cuts) > 1 else ''}"
    said = f"{100 * held.error:.3g}% rms error of the loss beyond the fitted compute ({cuts}), bias {100 * held.bias:+.2g}%"
    if math.isfinite(held.coverage):
        said += f", {held.coverage:.0%} of the runs inside their 95% intervals"
    return said


def _cuts(held: Any) -> list[str]:
    from analysis.frame import compact

    return [
        f"C <= {compact(cut.C)}: {cut.trained} runs fitted, {cut.held_out} up to "
        f"{compact(cut.until) if cut.until < 1e100 else 'the largest'} predicted to {100 * cut.error:.3g}%"
        + (f" ({cut.failed})" if cut.failed else "")
        for cut in held.cuts
    ]


def between(e: Estimate) -> str:
    """An interval in words; an end that nothing bounds is open."""
    if e.interval is None:
        return "" if e.meaning != "fixed" else "fixed"
    low, high = e.interval
    bounded = (math.isfinite(low) and not (low == 0.0 and e.unit in ("N", "D")), math.isfinite(high))
    if bounded == (True, True):
        return f"{low:.5g} to {high:.5g}"
    return f"above {low:.5g} (open)" if bounded[0] else f"below {high:.5g} (open)" if bounded[1] else "open"


def _digits(value: float) -> str:
    return f"{value:.7g}"


def fit_json(found: FitAnswer, evidence: Evidence) -> dict[str, Any]:
    """Every number at full precision; those that do not exist are null."""
    fit = found.fit
    laws = evidence.laws
    return {
        "schema": records.SCHEMA,
        "source": found.source,
        "law": {"name": fit.law.name, "formula": fit.law.formula, "source": fit.law.source},
        "trust": plain(found.trust),
        "parameters": [plain(e) for e in found.parameters],
        "derived": [plain(e) for e in found.derived],
        "intervals": {"method": found.method, "clusters": found.clusters, "refused": getattr(found.draws, "reason", None)},
        "fit": {
            "status": fit.status,
            "rows": fit.rows,
            "objective": fit.objective,
            "gradient_norm": fit.gradient_norm,
            "starts_that_agree": fit.agree,
            "condition": plain(fit.condition),
            "flat_directions": list(fit.flat_directions),
            "rms": fit.rms,
            "delta": fit.delta,
            "delta_from_scatter": fit.scatter,
            "quantile": fit.quantile,
            "outliers": fit.outliers,
            "left_out": int(fit.dropped_n.sum()),
            "fixed": dict(fit.fixed),
            "tied": dict(fit.tied),
            "arms": list(fit.arms),
            "flops_per_token_and_parameter": found.cost,
        },
        "lack_of_fit": plain(found.lack_of_fit),
        "holdout": _score_json(found.holdout),
        "profiles": {name: plain(one) for name, one in evidence.profiles.items()},
        "sensitivity": [plain(one) for one in evidence.choices],
        "laws": plain(laws)
        if not isinstance(laws, tuple)
        else [
            {"law": row.law, "parameters": row.parameters, "rms": plain(row.rms), "status": row.status,
             "values": plain(row.values), "holdout": _score_json(row.score)}
            for row in laws
        ],
        "selection": plain(evidence.selection),
        "influence": {"quantity": evidence.pulled, **plain(evidence.influence)},
        "notes": list(found.caveats),
    }  # fmt: skip


def _score_json(held: Any) -> Any:
    from analysis.score import Score

    if not isinstance(held, Score):
        return plain(held)
    figures = ("error", "bias", "coverage", "width", "regret", "rank_agreement")
    cuts = [{k: v for k, v in plain(cut).items() if not k.endswith("_h")} for cut in held.cuts]
    return {**{name: plain(getattr(held, name)) for name in figures}, "interval": held.interval, "cuts": cuts}


# --- the page --------------------------------------------------------------------------------------------------------


def render(found: FitAnswer, evidence: Evidence, *, runs: pd.DataFrame | None = None, command: str = "") -> str:
    """The page: one file without references to anything outside of it."""
    from analysis import fit_plots, page
    from analysis.diagnose import LackOfFit
    from analysis.refusal import Refused
    from analysis.resample import Draws
    from analysis.score import Score

    runs = run_table(found, evidence) if runs is None else runs
    held = found.holdout
    figures = {
        "headline": fit_plots.headline(found),
        "isoflops": fit_plots.isoflops(found),
        "residuals": fit_plots.residuals(found),
        "profiles": fit_plots.profiles(evidence),
    }
    name = Path(found.source).name
    return page.render(
        "fit.html",
        figures,
        {"between": between, "digits": _digits},
        title=f"{found.fit.law.name} fitted to {name}",
        found=found,
        fit=found.fit,
        name=name,
        evidence=evidence,
        how=_how(found),
        draws=found.draws if isinstance(found.draws, Draws) else None,
        lack=found.lack_of_fit if isinstance(found.lack_of_fit, LackOfFit) else None,
        held=held if isinstance(held, Score) else None,
        held_words=score_words(held) if isinstance(held, Score) else "",
        cuts=_cuts(held) if isinstance(held, Score) else [],
        unprofiled={name: one.reason for name, one in evidence.profiles.items() if isinstance(one, Refused)},
        laws=evidence.laws if isinstance(evidence.laws, tuple) else None,
        keys=list(evidence.choices[0].values) if evidence.choices else [],
        most=_most(found, evidence, runs),
        runs=_run_rows(runs.head(_SHOWN)),
        columns=_columns(runs),
        total=len(runs),
        command=command,
    )


def _most(found: FitAnswer, evidence: Evidence, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs that move the answer most, with what it would be without them."""
    import numpy as np

    from analysis.diagnose import Influence

    if not isinstance(evidence.influence, Influence) or "pull" not in runs:
        return []
    labels = found.labels if found.labels is not None else runs.index
    whole = evidence.influence.whole[evidence.pulled]
    rows = []
    ordered = runs.assign(label=[str(label) for label in labels]).drop_duplicates("label")
    largest = np.argsort(-np.abs(ordered["pull"].to_numpy()), kind="stable")[:_MOST]
    for row in ordered.iloc[largest].to_dict("records"):
        said = ", ".join(f"{name} = {row[name]:.4g}" for name in found.fit.law.columns)
        rows.append(
            {
                "name": row["label"],
                "where": said,
                "loss": f"{row['loss']:.5g}",
                "residual": f"{100 * row['residual']:+.2f}%",
                "without": f"{whole + row['pull']:.6g}",
                "pull": f"{row['pull']:+.2g}",
            }
        )
    return rows


def _columns(runs: pd.DataFrame) -> list[str]:
    """Those shown: names first, then numbers; constant ones and long texts stay in runs.csv."""
    numbers = [
        name for name in ("N", "D", "C", "U", "width", "depth", "loss", "fitted", "residual", "pull") if name in runs
    ]
    names = [
        str(name)
        for name in runs.columns
        if name not in numbers and runs[name].dtype == object and runs[name].astype(str).nunique() > 1
        and runs[name].astype(str).str.len().max() <= 40
    ][:3]  # fmt: skip
    return [*names, *numbers, *(["left_out"] if "left_out" in runs else [])]


def _run_rows(runs: pd.DataFrame) -> list[dict[str, str]]:
    def cell(name: str, value: Any) -> str:
        if name in ("residual", "pull"):
            return f"{100 * value:+.2f}%" if name == "residual" else f"{value:+.2g}"
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    columns = _columns(runs)
    return [
        {"row": str(index), **{name: cell(name, row[name]) for name in columns}}
        for index, row in zip(runs.index, runs[columns].to_dict("records"), strict=True)
    ]
