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
    compare, nested, crossing, curves, gain, multiplicity, arms   two or more arms
    forecast, design, proposal   when less structure wins, and which runs would tell
    answer, report, plots, fit_report, fit_plots   a study's page and a fit's page

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
    from analysis.compare import Difference, Verdict
    from analysis.crossing import Crossing, frontier
    from analysis.curves import Curves
    from analysis.design import Power, Recovery, isoflop_grid, power, recovery
    from analysis.diagnose import Influence, LackOfFit, influence, lack_of_fit
    from analysis.fit import DELTA, LEAST_SQUARES, Fit, fit_law
    from analysis.forecast import Forecast, Price, forecasts
    from analysis.frame import load
    from analysis.isoflop import IsoFlop, Minimum, isoflop_minima, minima
    from analysis.laws import LAWS, Law, Parameter, by_arm
    from analysis.noise import Noise, seed_noise
    from analysis.optimum import Band, Optimum, parametric
    from analysis.proposal import Proposal, Target, candidate_runs, propose
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
    from analysis.uncertainty import Profile, draw_parameters, jackknife, profile, sandwich

_HOME = {
    "Answer": "answer",
    "Band": "optimum",
    "Candidate": "score",
    "Crossing": "crossing",
    "Curves": "curves",
    "DELTA": "fit",
    "Difference": "compare",
    "Draws": "resample",
    "Fit": "fit",
    "Forecast": "forecast",
    "Influence": "diagnose",
    "IsoFlop": "isoflop",
    "LAWS": "laws",
    "LEAST_SQUARES": "fit",
    "LackOfFit": "diagnose",
    "Law": "laws",
    "LawAverage": "selection",
    "Minimum": "isoflop",
    "Noise": "noise",
    "OUTLIER_RULES": "robust",
    "Optimum": "optimum",
    "Parameter": "laws",
    "Power": "design",
    "Price": "forecast",
    "Profile": "uncertainty",
    "Proposal": "proposal",
    "Recovery": "design",
    "Refusal": "refusal",
    "Refused": "refusal",
    "Score": "score",
    "Selection": "selection",
    "Target": "proposal",
    "Verdict": "compare",
    "analyse": "answer",
    "by_arm": "laws",
    "candidate_runs": "proposal",
    "cluster_bootstrap": "resample",
    "draw_parameters": "uncertainty",
    "envelope": "approaches",
    "fit_law": "fit",
    "forecasts": "forecast",
    "frontier": "crossing",
    "influence": "diagnose",
    "isoflop_grid": "design",
    "isoflop_minima": "isoflop",
    "isoflop_optimum": "approaches",
    "jackknife": "uncertainty",
    "lack_of_fit": "diagnose",
    "law_average": "selection",
    "load": "frame",
    "minima": "isoflop",
    "optima": "approaches",
    "pairs_bootstrap": "resample",
    "parametric": "optimum",
    "parametric_bootstrap": "resample",
    "power": "design",
    "profile": "uncertainty",
    "propose": "proposal",
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
    "Crossing",
    "Curves",
    "Difference",
    "Draws",
    "Fit",
    "Forecast",
    "Influence",
    "IsoFlop",
    "LackOfFit",
    "Law",
    "LawAverage",
    "Minimum",
    "Noise",
    "Optimum",
    "Parameter",
    "Power",
    "Price",
    "Profile",
    "Proposal",
    "Recovery",
    "Refusal",
    "Refused",
    "Score",
    "Selection",
    "Target",
    "Verdict",
    "analyse",
    "by_arm",
    "candidate_runs",
    "cluster_bootstrap",
    "draw_parameters",
    "envelope",
    "fit_law",
    "forecasts",
    "frontier",
    "influence",
    "isoflop_grid",
    "isoflop_minima",
    "isoflop_optimum",
    "jackknife",
    "lack_of_fit",
    "law_average",
    "load",
    "minima",
    "optima",
    "pairs_bootstrap",
    "parametric",
    "parametric_bootstrap",
    "power",
    "profile",
    "propose",
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
