"""From run records to a verdict.

    analysis.report(path)     one HTML page, verdict.json and runs.csv beside the records of a study
    analysis.summary(path)    the same answer as plain text
    analysis.load(path)       one row per planned run, as a pandas frame
    analysis.fit_law(...)     a scaling law fitted to any table

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
    from analysis.compare import Difference, Verdict
    from analysis.crossing import Crossing, frontier
    from analysis.fit import Fit, fit_law
    from analysis.frame import load
    from analysis.isoflop import Minimum, minima
    from analysis.laws import LAWS, Law, Parameter
    from analysis.noise import Noise, seed_noise
    from analysis.refusal import Refusal, Refused
    from analysis.resample import Draws, cluster_bootstrap, pairs_bootstrap, parametric_bootstrap

_HOME = {
    "LAWS": "laws",
    "Answer": "answer",
    "Crossing": "crossing",
    "Difference": "compare",
    "Draws": "resample",
    "Fit": "fit",
    "Law": "laws",
    "Minimum": "isoflop",
    "Noise": "noise",
    "Parameter": "laws",
    "Refusal": "refusal",
    "Refused": "refusal",
    "Verdict": "compare",
    "analyse": "answer",
    "cluster_bootstrap": "resample",
    "fit_law": "fit",
    "frontier": "crossing",
    "load": "frame",
    "minima": "isoflop",
    "pairs_bootstrap": "resample",
    "parametric_bootstrap": "resample",
    "seed_noise": "noise",
}

__all__ = [
    "LAWS",
    "Answer",
    "Crossing",
    "Difference",
    "Draws",
    "Fit",
    "Law",
    "Minimum",
    "Noise",
    "Parameter",
    "Refusal",
    "Refused",
    "Verdict",
    "analyse",
    "cluster_bootstrap",
    "fit_law",
    "frontier",
    "load",
    "minima",
    "pairs_bootstrap",
    "parametric_bootstrap",
    "report",
    "seed_noise",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(f"analysis.{_HOME[name]}"), name)
