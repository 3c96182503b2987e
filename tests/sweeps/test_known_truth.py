"""Fits against truth that is known before anything is trained: E and exponents of sources in lab.data.synthetic."""

import itertools

import numpy as np
import pytest

import sweeps
from analysis import draw_parameters, fit_law
from lab.data.synthetic import task
from lab.data.synthetic.facts import Facts
from sweeps.studies import known_truth

pytestmark = pytest.mark.slow

KEYS, REPLICATES = 16_384, 16


def table_learners(exponent: float) -> tuple[Facts, dict[str, dict[str, np.ndarray]]]:
    """Losses of learners that are tables, on the very documents of `zipf_facts`: "n" stores the n commonest keys' values and
    is scored on examples (less the optimum on them), "D" stores what D facts showed. Every learner has facts of its own."""
    facts = Facts(exponent=exponent, keys=KEYS, values=16)
    found = task(f"zipf_facts:exponent={exponent},keys={KEYS},documents=1000000")
    stream = (document.reshape(-1, found.n) for document in found.read())

    def keys(count: int) -> np.ndarray:
        rows = np.concatenate(list(itertools.islice(stream, -(-count // (4096 // found.n)))))
        return facts.zipf.read(rows[:count, 1:-1])

    guess = np.log(facts.values) / found.T
    stored = [
        (n + 0.5, facts.E() + guess * np.mean(keys(10_000) >= n))
        for n in np.unique(np.geomspace(8, 1024, 8).round().astype(int)).repeat(REPLICATES)
    ]
    seen = [
        (D, facts.E() + guess * (1 - facts.zipf.p[np.unique(keys(D))].sum()))
        for D in np.geomspace(256, 32_768, 8).round().astype(int).repeat(REPLICATES)
    ]
    return facts, {
        name: dict(zip(("C", "loss"), np.array(rows).T, strict=True)) for name, rows in (("n", stored), ("D", seen))
    }


@pytest.mark.parametrize("exponent", [1.0, 1.4])
def test_learners_that_are_tables_are_fitted_to_their_truth(exponent):
    """E = H(key) / T, and the exponents a in what is stored and a / (1 + a) in what was seen: each in its 95% interval, and
    each other's exponent outside of it."""
    facts, tables = table_learners(exponent)
    truth = {"n": exponent, "D": exponent / (1 + exponent)}
    for name, other in (("n", "D"), ("D", "n")):
        fit = fit_law("power_law_with_asymptote", tables[name], delta="scatter")
        assert fit.converged, fit.status
        intervals = draw_parameters(fit).intervals()
        low, high = intervals["E"]
        assert low < facts.E() < high and high - low < 0.01 * facts.E()
        low, high = intervals["gamma"]
        assert low < truth[name] < high and not low < truth[other] < high and high - low < 0.3 * truth[name]


@pytest.mark.parametrize("preset", known_truth.PRESETS)
def test_trained_models_are_fitted_to_their_truth(preset, tmp_path):
    """The shipped study, trained: E of the Markov chain to 1%, and of the facts the exponent, in their 95% intervals. An
    interval that says nothing would not do."""
    plan = sweeps.plan(sweeps.load("known_truth", preset))
    found = {r.name: r for r in known_truth.recovered(sweeps.run(plan, tmp_path, workers=1), known_truth.GAMMA[preset])}
    if preset == "small":
        assert found["E"].found and found["E"].high - found["E"].low < 0.015 * found["E"].truth
        assert 0.8 < found["gamma"].estimate < 1.1
    else:
        assert found["gamma"].found and found["gamma"].high - found["gamma"].low < 0.25
