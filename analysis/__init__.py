"""From a table of runs to a verdict.

    analysis.fit_law("chinchilla", table)   a scaling law fitted to any table with columns N, D, loss
    analysis.draw_parameters(fit)           how sure it is, by the method that covers best
    analysis.report(path)                   one HTML page, verdict.json and runs.csv beside the records of a study
    analysis.summary(path)                  the same answer as plain text

The rooms, in the order in which an answer is made:

    frame, table        runs as rows: of our own studies, of any file
    laws, formulas      what is fitted; newton, problem, fit: how; robust: what is done about points far off
    resample, uncertainty, diagnose, noise   how sure it is, and what it rests on
    isoflop, optimum, approaches, score, selection   the compute optimum, and which law to believe
    compare, in_range, nested, crossing, curves, gain, multiplicity, arms   two or more arms
    forecast, design, proposal   when less structure wins, and which runs would tell
    answer, report, plots   a study's page
    fit_answer, fit_derived, fit_evidence, fit_report, fit_plots   a fit's page

Importing this package loads neither jax, pandas nor matplotlib: a name is imported when it is first used. Nothing here
changes jax's configuration; fits compute in float64 in a scope of their own, on the CPU.

"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# `report` is the name of a module and of its function. Importing the function here, for good, makes `analysis.report`
# the function whatever is imported later.
from analysis.report import report, summary

if TYPE_CHECKING:
    from analysis.answer import Answer, analyse
    from analysis.approaches import envelope, isoflop_optimum, optima
    from analysis.arms import Comparison, Pair, compare_arms
    from analysis.compare import Difference, Verdict
    from analysis.crossing import Crossing, crossing_of, frontier, law_curves
    from analysis.curves import Curves
    from analysis.design import Power, Recovery, isoflop_grid, power, recovery
    from analysis.diagnose import Influence, LackOfFit, influence, lack_of_fit
    from analysis.fit import DELTA, LEAST_SQUARES, Fit, fit_law
    from analysis.fit_answer import FitAnswer, analyse_fit
    from analysis.forecast import Forecast, Price, forecasts
    from analysis.frame import load
    from analysis.gain import Gain, compute_equivalent_gain, pinned_speedup
    from analysis.isoflop import IsoFlop, Minimum, isoflop_minima, minima
    from analysis.laws import LAWS, Law, Parameter, by_arm
    from analysis.multiplicity import RankAgreement, benjamini_hochberg, holm, rank_agreement
    from analysis.nested import Level, Nested, Step, levels_of
    from analysis.noise import Noise, seed_noise
    from analysis.optimum import Band, Optimum, parametric
    from analysis.proposal import (
        Proposal,
        Target,
        candidate_runs,
        crossing_target,
        difference_target,
        loss_target,
        propose,
    )
    from analysis.refusal import Refusal, Refused
    from analysis.resample import (
        Draws,
        cluster_bootstrap,
        pairs_bootstrap,
        parametric_bootstrap,
        wild_cluster_bootstrap,
    )
    from analysis.robust import OUTLIER_RULES
    from analysis.score import Candidate, Score, scores
    from analysis.selection import LawAverage, Selection, law_average, select
    from analysis.table import read_table
    from analysis.uncertainty import Profile, coverage_note, draw_parameters, jackknife, profile, sandwich

_HOME = {
    "Answer": "answer",
    "Band": "optimum",
    "Candidate": "score",
    "Comparison": "arms",
    "Crossing": "crossing",
    "Curves": "curves",
    "DELTA": "fit",
    "Difference": "compare",
    "Draws": "resample",
    "Fit": "fit",
    "FitAnswer": "fit_answer",
    "Forecast": "forecast",
    "Gain": "gain",
    "Influence": "diagnose",
    "IsoFlop": "isoflop",
    "LAWS": "laws",
    "LEAST_SQUARES": "fit",
    "LackOfFit": "diagnose",
    "Law": "laws",
    "LawAverage": "selection",
    "Level": "nested",
    "Minimum": "isoflop",
    "Nested": "nested",
    "Noise": "noise",
    "OUTLIER_RULES": "robust",
    "Optimum": "optimum",
    "Pair": "arms",
    "Parameter": "laws",
    "Power": "design",
    "Price": "forecast",
    "Profile": "uncertainty",
    "Proposal": "proposal",
    "RankAgreement": "multiplicity",
    "Recovery": "design",
    "Refusal": "refusal",
    "Refused": "refusal",
    "Score": "score",
    "Selection": "selection",
    "Step": "nested",
    "Target": "proposal",
    "Verdict": "compare",
    "analyse": "answer",
    "analyse_fit": "fit_answer",
    "benjamini_hochberg": "multiplicity",
    "by_arm": "laws",
    "candidate_runs": "proposal",
    "cluster_bootstrap": "resample",
    "compare_arms": "arms",
    "compute_equivalent_gain": "gain",
    "coverage_note": "uncertainty",
    "crossing_of": "crossing",
    "crossing_target": "proposal",
    "difference_target": "proposal",
    "draw_parameters": "uncertainty",
    "envelope": "approaches",
    "fit_law": "fit",
    "forecasts": "forecast",
    "frontier": "crossing",
    "holm": "multiplicity",
    "influence": "diagnose",
    "isoflop_grid": "design",
    "isoflop_minima": "isoflop",
    "isoflop_optimum": "approaches",
    "jackknife": "uncertainty",
    "lack_of_fit": "diagnose",
    "law_average": "selection",
    "law_curves": "crossing",
    "levels_of": "nested",
    "load": "frame",
    "loss_target": "proposal",
    "minima": "isoflop",
    "optima": "approaches",
    "pairs_bootstrap": "resample",
    "parametric": "optimum",
    "parametric_bootstrap": "resample",
    "pinned_speedup": "gain",
    "power": "design",
    "profile": "uncertainty",
    "propose": "proposal",
    "rank_agreement": "multiplicity",
    "read_table": "table",
    "recovery": "design",
    "sandwich": "uncertainty",
    "scores": "score",
    "seed_noise": "noise",
    "select": "selection",
    "wild_cluster_bootstrap": "resample",
}

__all__ = [
    "DELTA",
    "LAWS",
    "LEAST_SQUARES",
    "OUTLIER_RULES",
    "Answer",
    "Band",
    "Candidate",
    "Comparison",
    "Crossing",
    "Curves",
    "Difference",
    "Draws",
    "Fit",
    "FitAnswer",
    "Forecast",
    "Gain",
    "Influence",
    "IsoFlop",
    "LackOfFit",
    "Law",
    "LawAverage",
    "Level",
    "Minimum",
    "Nested",
    "Noise",
    "Optimum",
    "Pair",
    "Parameter",
    "Power",
    "Price",
    "Profile",
    "Proposal",
    "RankAgreement",
    "Recovery",
    "Refusal",
    "Refused",
    "Score",
    "Selection",
    "Step",
    "Target",
    "Verdict",
    "analyse",
    "analyse_fit",
    "benjamini_hochberg",
    "by_arm",
    "candidate_runs",
    "cluster_bootstrap",
    "compare_arms",
    "compute_equivalent_gain",
    "coverage_note",
    "crossing_of",
    "crossing_target",
    "difference_target",
    "draw_parameters",
    "envelope",
    "fit_law",
    "forecasts",
    "frontier",
    "holm",
    "influence",
    "isoflop_grid",
    "isoflop_minima",
    "isoflop_optimum",
    "jackknife",
    "lack_of_fit",
    "law_average",
    "law_curves",
    "levels_of",
    "load",
    "loss_target",
    "minima",
    "optima",
    "pairs_bootstrap",
    "parametric",
    "parametric_bootstrap",
    "pinned_speedup",
    "power",
    "profile",
    "propose",
    "rank_agreement",
    "read_table",
    "recovery",
    "report",
    "sandwich",
    "scores",
    "seed_noise",
    "select",
    "summary",
    "wild_cluster_bootstrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(f"analysis.{_HOME[name]}"), name)
