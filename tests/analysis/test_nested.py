"""Nested laws: the levels, their tests, how often they are wrong, and why separate fits mislead."""

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis.fit import LEAST_SQUARES, fit_law
from analysis.laws import LAWS, by_arm
from analysis.nested import levels_of, nested
from analysis.refusal import Refusal
from analysis.uncertainty import draw_parameters
from simulated_arms import DESIGNS, grid, nested_rates, noise, steeper
from simulated_coverage import TRUTH, optimum

BUDGETS, SIZES, _ = DESIGNS["clustered"]  # one number of rows, so that programs are compiled once


def two_arms(second, *, seed=0, sd=0.003):
    table = grid({"base": TRUTH, "arm": second}, budgets=BUDGETS, sizes=SIZES)
    losses = np.exp(table["clean"] + noise(table, 1, np.random.default_rng(seed), 1, sd)[0])
    return {**table, "loss": losses}


def straight(gap, *, seed=3):
    """Two arms on one power law but for a factor exp(gap): C, arm, log loss of 30 runs."""
    rng = np.random.default_rng(seed)
    C, arm = np.tile(np.geomspace(1e18, 1e21, 15), 2), np.repeat(["a", "b"], 15)
    return C, arm, np.log(30.0) - 0.05 * np.log(C) + np.where(arm == "b", gap, 0.0) + 0.006 * rng.standard_normal(30)


def test_levels_are_what_arms_may_have_of_their_own():
    assert levels_of(LAWS["chinchilla"]) == {
        "identical": (),
        "shared exponents": ("A", "B"),
        "shared E": ("A", "B", "alpha", "beta"),
        "separate": ("E", "A", "B", "alpha", "beta"),
    }
    assert levels_of(LAWS["power_law"]) == {"identical": (), "shared exponents": ("A",), "separate": ("A", "gamma")}
    assert list(levels_of(LAWS["kaplan"])) == ["identical", "shared exponents", "separate"]
    assert list(levels_of(LAWS["farseer"])) == ["identical", "separate"]  # no amplitude to tell from exponents
    with pytest.raises(ValueError, match="already"):
        levels_of(by_arm(LAWS["chinchilla"], "A"))


def test_the_smallest_level_that_is_true_is_selected():
    exponents = nested("chinchilla", two_arms(steeper()), draws=99, starts=16)
    assert exponents.selected == "shared E"
    better = nested(
        "chinchilla", two_arms({**TRUTH, "A": 0.9 * TRUTH["A"], "B": 0.93 * TRUTH["B"]}), draws=99, starts=16
    )
    assert better.selected == "shared exponents" and better.p < 0.05
    fit = better.level("shared exponents").fit
    ratio = fit.flat["A[arm]"] / fit.flat["A[base]"]
    assert ratio == pytest.approx(0.9, abs=0.04)
    same = nested("chinchilla", two_arms(TRUTH), draws=99, starts=16)
    assert same.selected == "identical" and same.p > 0.05
    # A fuller law never fits worse.
    for answer in (exponents, better, same):
        objectives = [level.fit.objective for level in answer.levels]
        assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(objectives))


def test_the_statistic_is_F_and_p_is_that_of_F_where_noise_is_normal():
    """On a law that is linear in its logarithm with squared errors the exact F test is there to be compared with."""
    C, arm, y = straight(0.004)
    # Rows without weight change nothing; here they make one compiled program serve two tests.
    weights = np.repeat([1.0, 0.0], 30)
    twice = {"C": np.tile(C, 2), "arm": np.tile(arm, 2), "loss": np.exp(np.tile(y, 2))}
    answer = nested("power_law", twice, weights=weights, delta=LEAST_SQUARES, draws=799, starts=8)
    X = np.stack([np.ones(30), np.log(C) - np.log(C).mean()], axis=1)
    full = np.concatenate([X * (arm == "a")[:, None], X * (arm == "b")[:, None]], axis=1)

    def squares(design):
        return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())

    F = (squares(X) - squares(full)) / 2 / (squares(full) / 26)
    step = next(s for s in answer.steps if (s.restricted, s.fuller) == ("identical", "separate"))
    assert step.statistic == pytest.approx(F, rel=1e-5) and step.restrictions == 2
    assert step.p == pytest.approx(stats.f.sf(F, 2, 26), abs=0.045)


def test_clusters_that_repeat_are_refused_and_few_get_six_points():
    table = two_arms(TRUTH)
    ids = [f"run {n // 2}" for n in range(len(table["N"]))]
    with pytest.raises(Refusal, match="clusters"):
        nested("chinchilla", table, run_ids=ids, draws=9, starts=4)
    few = nested("chinchilla", table, clusters=table["cluster"].astype("U6"), draws=9, starts=8)
    assert "Webb's six points on 10 clusters" in few.null
    with pytest.raises(Refusal, match="3 clusters"):
        nested("chinchilla", table, clusters=np.arange(len(ids)) % 3, draws=9, starts=4)
    with pytest.raises(Refusal, match="1 arm"):
        nested("chinchilla", {**table, "arm": ["a"] * len(ids)}, draws=9, starts=4)


def test_signs_of_clusters_and_not_of_rows_decide():
    """Every row twice: taken as independent rows the copies pass for evidence; as clusters they change nothing."""
    C, arm, y = straight(0.0025)
    twice = {"C": np.tile(C, 2), "arm": np.tile(arm, 2), "loss": np.exp(np.tile(y, 2))}
    p = {}
    for name, weights, labels in (
        ("once", np.repeat([1.0, 0.0], 30), np.arange(60)),
        ("as rows", np.ones(60), np.arange(60)),
        ("as clusters", np.ones(60), np.arange(60) % 30),
    ):
        answer = nested("power_law", twice, weights=weights, clusters=labels, delta=LEAST_SQUARES, draws=399, starts=8)
        p[name] = next(s for s in answer.steps if (s.restricted, s.fuller) == ("identical", "shared exponents")).p
    assert 0.02 < p["once"] < 0.5
    assert p["as clusters"] == pytest.approx(p["once"], abs=0.06)
    assert p["as rows"] < 0.6 * p["once"]


def test_arms_that_are_alike_are_rejected_at_the_nominal_rate():
    simulations = 100  # rows of a cluster share half of their variance
    low, high = stats.binom.ppf([0.005, 0.995], simulations, 0.05)
    rates = nested_rates("clustered", simulations, null_draws=99, against=("shared exponents",))
    for rate in rates.values():
        assert low <= rate * simulations <= high


def test_separate_fits_mislead_where_shared_exponents_do_not():
    """Two arms of one law, at a corner beyond the data where the true gap is 0 (reference: fitting.md, fact 10)."""
    N, D = optimum(TRUTH, 1e21)[0] * 4, optimum(TRUTH, 1e21)[0] * 80
    own = levels_of(LAWS["chinchilla"])
    gaps, widths = {}, {}
    for seed in range(8):
        table = two_arms(TRUTH, seed=20 + seed, sd=0.01)
        for level in ("shared exponents", "separate"):
            fit = fit_law("chinchilla", table, per_arm=own[level], delta="scatter", starts=8)
            drawn = draw_parameters(fit, draws=400, seed=seed)
            gap = drawn.predict(N=N, D=D, arm="arm") - drawn.predict(N=N, D=D, arm="base")
            low, high = np.quantile(gap, [0.025, 0.975])
            gaps.setdefault(level, []).append(float(np.median(gap)))
            widths.setdefault(level, []).append(float(high - low))
    assert np.median(widths["separate"]) > 2 * np.median(widths["shared exponents"])
    assert np.sqrt(np.mean(np.square(gaps["separate"]))) > 1.5 * np.sqrt(np.mean(np.square(gaps["shared exponents"])))
