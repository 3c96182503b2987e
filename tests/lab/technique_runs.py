"""Small runs of techniques."""

from dataclasses import replace

import numpy as np

from lab.data import describe
from lab.execution import Execution
from lab.forms import forms
from lab.objectives import Batch
from lab.spec import Run
from lab.technique import Technique
from runs import TINY, make_run

DEEP = replace(TINY, L=4, L_input=4)
ONE = Execution(steps_per_dispatch=1, scan=False, attention="reference")
TWO = Execution(steps_per_dispatch=2, scan=False)


def technique(name: str, charged: bool = True, **given: float) -> Technique:
    return Technique(name=name, charged=charged, settings=given)  # pyright: ignore[reportArgumentType]


def deep_run(structure="decoder_only", **parts) -> Run:
    return make_run(structure, **{"shape": DEEP, "data": describe("markov").data, **parts})


def some_batch(run: Run, rows: int, seed: int = 0) -> Batch:
    rng, form = np.random.default_rng(seed), forms(run.objective)[0]
    return Batch(*(rng.integers(0, 200, (rows, n)).astype(np.int32) for n in (form.S, form.T, form.scored)))
