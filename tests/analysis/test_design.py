"""Design against formulas of linear regression, exact Bayesian updates, and what added observations really do."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import Law, Parameter, Refusal, fit_law, parametric_bootstrap
from analysis.curves import curves, frontier
from analysis.design import isoflop_grid, power, recovery
from analysis.fit import LEAST_SQUARES, refit
from analysis.forecast import last_overtaking
from analysis.proposal import (
    Target,
    candidate_runs,
    crossing_target,
    difference_target,
    loss_target,
    propose,
)
from analysis.resample import Draws

TRUTH = {"E": 1.82, "A": 478.0, "B": 2143.0, "alpha": 0.347, "beta": 0.367}
C_GRID = pd.DataFrame({"C": np.repeat(np.geomspace(1e17, 1e21, 9), 2)})
POWER_LAW = {"A": 30.0, "gamma": 0.06}


# --- before ----------------------------------------------------------------------------------------------------------


def test_recovered_errors_are_those_of_linear_regression():
    """log L = log A - gamma log C with noise in log loss: the textbook standard errors."""
    sd, x = 0.004, np.log(C_GRID["C"].to_numpy())
    found = recovery("power_law", POWER_LAW, C_GRID, sd, unit="log", draws=1000, delta=LEAST_SQUARES)
    squares = ((x - x.mean()) ** 2).sum()
    assert found.converged == 1.0
    assert found["gamma"].standard_error == pytest.approx(sd / math.sqrt(squares), rel=0.09)
    assert abs(found["gamma"].bias) < 4 * found["gamma"].standard_error / math.sqrt(1000)
    centre = found["loss at the centre"]
    assert centre.standard_error / centre.truth == pytest.approx(sd / math.sqrt(len(x)), rel=0.09)
    top = found["L*(1e+21)"]
    leverage = 1 / len(x) + (x.max() - x.mean()) ** 2 / squares
    assert top.standard_error / top.truth == pytest.approx(sd * math.sqrt(leverage), rel=0.09)
    assert top.truth == pytest.approx(30.0 * 1e21**-0.06) and top.low < top.truth < top.high
    # Noise in nats, given as a function of the loss, is the same to first order.
    nats = recovery("power_law", POWER_LAW, C_GRID, lambda loss: sd * loss, draws=1000, seed=1, delta=LEAST_SQUARES)
    assert nats["gamma"].standard_error == pytest.approx(found["gamma"].standard_error, rel=0.12)
    assert "± " in str(found) and set(found.table["quantity"]) >= {"A", "gamma", "loss at the centre"}


def test_recovered_errors_of_the_five_parameter_law_are_those_of_its_jacobian():
    grid, sd = isoflop_grid("chinchilla", TRUTH, np.geomspace(1e18, 1e21, 6)), 2e-4
    found = recovery("chinchilla", TRUTH, grid, sd, unit="log", draws=400, delta=LEAST_SQUARES)
    names = list(TRUTH)
    N, D = grid["N"].to_numpy(), grid["D"].to_numpy()

    def log_loss(values):
        E, A, B, alpha, beta = values
        return np.log(E + A * N**-alpha + B * D**-beta)

    at = np.array(list(TRUTH.values()))
    J = np.stack([(log_loss(at + h) - log_loss(at - h)) / (2 * h.max()) for h in np.diag(1e-5 * at)], axis=1)
    V = sd**2 * np.linalg.inv(J.T @ J)
    for index, name in enumerate(names):
        assert found[name].standard_error == pytest.approx(math.sqrt(V[index, index]), rel=0.15)
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    slope = np.array([0, 0, 0, -beta, alpha]) / (alpha + beta) ** 2
    assert found["a"].standard_error == pytest.approx(math.sqrt(slope @ V @ slope), rel=0.12)
    assert found["a"].truth == pytest.approx(beta / (alpha + beta))
    product = recovery(
        "chinchilla", TRUTH, grid, sd, unit="log", draws=50, quantities={"EA": lambda p: p["E"] * p["A"]}
    )
    assert product["EA"].truth == pytest.approx(1.82 * 478)


def test_an_iso_flop_grid_is_centred_on_the_optimum():
    grid = isoflop_grid("chinchilla", TRUTH, [1e19, 1e20], sizes=3, within=4.0, replicates=2, arms=("a", "b"))
    assert len(grid) == 2 * 3 * 2 * 2 and (6 * grid["N"] * grid["D"]).to_numpy() == pytest.approx(grid["C"].to_numpy())
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    best = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta)) * (1e19 / 6) ** (beta / (alpha + beta))
    sizes = np.unique(grid.loc[(grid["C"] == 1e19) & (grid["arm"] == "a"), "N"])
    assert sizes == pytest.approx([best / 4, best, best * 4], rel=1e-6)


def test_a_grid_that_does_not_determine_the_law_is_refused():
    ray = pd.DataFrame({"N": np.geomspace(1e7, 1e9, 12)})
    ray["D"] = 20 * ray["N"]  # one ratio of tokens to parameters
    with pytest.raises(Refusal, match="does not determine chinchilla"):
        recovery("chinchilla", TRUTH, ray, 0.002, draws=10)
    with pytest.raises(Refusal, match="distinct values of N"):
        recovery("chinchilla", TRUTH, ray.assign(N=1e8), 0.002, draws=10)
    with pytest.raises(ValueError, match="truth has no 'beta'"):
        recovery("chinchilla", {k: v for k, v in TRUTH.items() if k != "beta"}, ray, 0.002)
    with pytest.raises(ValueError, match="noise = -1"):
        recovery("power_law", POWER_LAW, C_GRID, -1.0, draws=10)


def test_power_and_the_detectable_difference_are_those_of_two_means():
    """With one exponent for both arms, on the same C, the difference is that of two means of n log losses."""
    sd, n = 0.01, len(C_GRID)
    found = power("power_law", POWER_LAW, C_GRID, sd, gap=0.01, unit="log", draws=2000, delta=LEAST_SQUARES)
    error = sd * math.sqrt(2 / n)
    assert found.rows == 2 * n and found.standard_error == pytest.approx(error, rel=0.05)
    z = stats.norm.isf(0.025)
    exact = stats.norm.sf(z - math.log(1.01) / error) + stats.norm.cdf(-z - math.log(1.01) / error)
    assert found.power == pytest.approx(exact, abs=0.04)
    assert found.detectable == pytest.approx(math.expm1((z + stats.norm.ppf(0.8)) * error), rel=0.05)
    # Where it is not enough, as many copies as are said do find it.
    noisy = power("power_law", POWER_LAW, C_GRID, 0.015, gap=0.01, unit="log", draws=1000, delta=LEAST_SQUARES)
    assert noisy.power < 0.7 and noisy.copies == 2
    more = pd.concat([C_GRID] * noisy.copies, ignore_index=True)
    again = power("power_law", POWER_LAW, more, 0.015, gap=0.01, unit="log", draws=1000, delta=LEAST_SQUARES)
    assert again.power > 0.77 and again.copies == 1


def test_no_gap_is_found_at_the_level():
    found = power("power_law", POWER_LAW, C_GRID, 0.01, gap=1e-9, unit="log", draws=2000, delta=LEAST_SQUARES)
    assert found.power == pytest.approx(0.05, abs=0.02)


# --- after -----------------------------------------------------------------------------------------------------------


def _line(p, x):
    return jnp.exp(p["w0"] + p["w1"] * x["u"] + p["w2"] * x["v"])


LINE = Law(
    name="line",
    formula="exp(w0 + w1 u + w2 v)",
    source="a toy",
    predict=_line,
    columns=("u", "v"),
    parameters=tuple(
        Parameter(name=n, start=(-1.0, 1.0), bounds=(-9.0, 9.0), positive=False) for n in ("w0", "w1", "w2")
    ),
)


def linear_draws(draws=4000, seed=0):
    """Normal draws of a law whose log loss is linear, with their own covariance as the prior."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(0.1, 2, 12), rng.uniform(0.1, 2, 12)
    rows = {"u": u, "v": v, "loss": np.exp(0.5 + 0.1 * u - 0.2 * v + 0.01 * rng.standard_normal(12))}
    fit = fit_law(LINE, rows, delta=LEAST_SQUARES, starts=8)
    root = np.array([[0.5, 0, 0], [-0.3, 0.4, 0], [0.1, 0.2, 0.3]])
    w = rng.standard_normal((draws, 3)) @ root.T
    return Draws(fit=fit, kind="toy", params={f"w{i}": w[:, i] for i in range(3)}, converged=1.0), np.cov(w.T)


def posterior(prior, X, noise):
    return np.linalg.inv(np.linalg.inv(prior) + X.T @ X / noise**2)


def test_it_is_exact_bayesian_regression_where_the_law_is_linear():
    draws, prior = linear_draws()
    rng = np.random.default_rng(1)
    candidates = pd.DataFrame({"u": rng.uniform(0.1, 3, 30), "v": rng.uniform(0.1, 3, 30), "flops": 1.0})
    c, noise = np.array([1.0, 2.0, -1.0]), 0.2
    found = propose(
        draws, candidates, target=lambda p: p["w0"] + 2 * p["w1"] - p["w2"], budget_flops=4, noise=noise, repeats=2
    )
    assert len(found.table) == 4 and found.moved == 0.0
    X = np.stack([np.ones(4), found.table["u"], found.table["v"]], axis=1)
    before = c @ prior @ c
    expected = [1 - c @ posterior(prior, X[: i + 1], noise) @ c / before for i in range(4)]
    assert found.table["cumulative"].to_numpy() == pytest.approx(expected, rel=1e-8)
    assert found.sd_after == pytest.approx(math.sqrt(c @ posterior(prior, X, noise) @ c), rel=1e-8)
    # The first is the best of all candidates, by the exact posterior of each.
    every = np.stack([np.ones(30), candidates["u"], candidates["v"]], axis=1)
    best = min(range(30), key=lambda i: c @ posterior(prior, every[i : i + 1], noise) @ c)
    assert found.table.loc[0, "u"] == candidates.loc[best, "u"]


def test_several_targets_share_the_budget_and_the_cost_decides():
    draws, prior = linear_draws()
    candidates = pd.DataFrame({"u": [1.0, 3.0, 0.2], "v": [0.2, 0.3, 3.0], "flops": [1.0, 5.0, 50.0]})
    both = Target(name="slopes", values=np.stack([draws.params["w1"], draws.params["w2"]], axis=1))
    found = propose(draws, candidates, target=both, budget_flops=60, noise=0.1)
    X = np.stack([np.ones(3), found.table["u"], found.table["v"]], axis=1)
    after, before = np.diag(posterior(prior, X, 0.1))[1:].sum(), np.diag(prior)[1:].sum()
    assert found.table["cumulative"].iloc[-1] == pytest.approx(1 - after / before, rel=1e-8)
    assert found.flops <= 60
    cheap = propose(draws, candidates, target=both, budget_flops=10, noise=0.1)
    assert cheap.flops <= 10 and set(cheap.table["flops"]) == {1.0, 5.0}
    with pytest.raises(Refusal, match="the cheapest candidate costs 1"):
        propose(draws, candidates, target=both, budget_flops=0.5, noise=0.1)


def test_what_can_not_be_learnt_is_refused():
    draws, _ = linear_draws(200)
    candidates = pd.DataFrame({"u": [1.0], "v": [1.0], "flops": [1.0]})
    with pytest.raises(Refusal, match="the same in every draw"):
        propose(draws, candidates, target=Target(name="x", values=np.ones(200)), budget_flops=1)
    with pytest.raises(Refusal, match="infinite in some draws"):
        propose(draws, candidates, target=Target(name="x", values=np.full(200, np.inf)), budget_flops=1)
    with pytest.raises(ValueError, match="no column 'v'"):
        propose(draws, candidates.drop(columns="v"), target=lambda p: p["w1"], budget_flops=1)


def study(seed=0, noise=1e-3, extra=None):
    """A small iso-FLOP study of one arm, with rows of `extra` that weigh nothing yet."""
    grid = isoflop_grid("chinchilla", TRUTH, np.geomspace(1e18, 3e19, 4), sizes=4)
    grid["loss"] = 1.82 + 478 * grid["N"] ** -0.347 + 2143 * grid["D"] ** -0.367
    grid["loss"] *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(grid)))
    weights = np.ones(len(grid) + (0 if extra is None else len(extra)))
    if extra is not None:
        weights[len(grid) :] = 0
        grid = pd.concat([grid, extra.assign(loss=2.5)], ignore_index=True)
    return fit_law("chinchilla", grid, weights=weights, delta=LEAST_SQUARES, starts=16)


def simulated_draws(fit, noise, draws=1000):
    """Studies whose log losses are the fitted ones and normal noise, each refitted."""
    fitted_n = fit.data.log_loss_n - fit.residuals()
    losses = fitted_n + noise * np.random.default_rng(3).standard_normal((draws, len(fitted_n)))
    solved, params = refit(fit, fit.data.weights_n[None], losses)
    return Draws(fit=fit, kind="simulated", params=params, converged=float(solved.converged_m.mean()))


def test_added_observations_shrink_the_variance_as_predicted():
    """Against brute force: the rows are added to the study, and it is resampled and refitted."""
    noise, C = 3e-4, 1e21
    base = study(noise=noise)
    draws = simulated_draws(base, noise)
    target = loss_target(draws, C)
    options = candidate_runs(draws, budgets=[1e18, 1e19, 1e20], sizes=4)
    found = propose(draws, options, target=target, budget_flops=2.2e20, noise=noise, runs=4, repeats=2)
    extra = found.table[["N", "D"]]
    with_rows = study(noise=noise, extra=extra)
    weights, losses = with_rows.data.weights_n.copy(), with_rows.data.log_loss_n.copy()
    weights[-len(extra) :], losses[-len(extra) :] = 1.0, np.log(base.predict(N=extra["N"], D=extra["D"]))
    data = replace(with_rows.data, weights_n=weights, log_loss_n=losses)
    after = simulated_draws(replace(with_rows, data=data), noise)
    real = 1 - frontier(after, [C]).var() / frontier(draws, [C]).var()
    assert 0.3 < found.table["cumulative"].iloc[-1] < 0.99
    assert found.table["cumulative"].iloc[-1] == pytest.approx(real, abs=0.05)


def test_it_beats_choosing_at_random_per_flop():
    draws, prior = linear_draws()
    rng = np.random.default_rng(5)
    m = 60
    candidates = pd.DataFrame(
        {"u": rng.uniform(0.1, 3, m), "v": rng.uniform(0.1, 3, m), "flops": rng.uniform(1, 30, m)}
    )
    c, noise, budget = np.array([0.0, 1.0, 0.0]), 0.3, 40.0
    found = propose(draws, candidates, target=lambda p: p["w1"], budget_flops=budget, noise=noise)
    every = np.stack([np.ones(m), candidates["u"], candidates["v"]], axis=1)
    flops = candidates["flops"].to_numpy()
    randoms = []
    for _ in range(300):
        order = rng.permutation(m)
        chosen = order[np.cumsum(flops[order]) <= budget]
        randoms.append(1 - c @ posterior(prior, every[chosen], noise) @ c / (c @ prior @ c))
    mine = found.table["cumulative"].iloc[-1]
    assert mine > np.quantile(randoms, 0.99) and mine > np.mean(randoms) + 0.15


def two_arms(seed=0):
    rng = np.random.default_rng(seed)
    C = np.tile(np.geomspace(1e18, 1e21, 12), 2)
    arm = np.repeat(["more", "less"], 12)
    curve = np.where(arm == "more", 1.9 + 60 * C**-0.085, 1.7 + 110 * C**-0.095)
    rows = {"C": C, "arm": arm, "loss": curve * np.exp(1e-3 * rng.standard_normal(24))}
    fit = fit_law("power_law_with_asymptote", rows, per_arm=("E", "A", "gamma"), delta=LEAST_SQUARES, starts=16)
    return parametric_bootstrap(fit, sd=3e-3, clusters=range(24), draws=400)


def test_a_crossing_is_sharpened_by_runs_of_both_arms_where_they_tell():
    draws = two_arms()
    given = curves(draws)
    target = crossing_target(given, "more", "less")
    assert "crossing of more and less" in target.name
    options = candidate_runs(draws)
    assert set(options["arm"]) == {"more", "less"} and options["C"].max() > 1e21 * 1.5
    found = propose(draws, options, target=target, budget_flops=options["flops"].sum(), runs=8)
    assert set(found.table["arm"]) == {"more", "less"}
    assert (np.diff(found.table["cumulative"]) > 0).all() and found.sd_after < found.sd
    # The difference at the median crossing, over its slope, spreads as the crossing's own log C does.
    difference = given.difference("more", "less")
    C_b = last_overtaking(given.C, difference)
    middle = np.median(C_b)
    around = middle * np.array([0.8, 1.25])
    slope = np.diff(np.median(difference_target(given, "more", "less", around).values, axis=0)) / math.log(1.25 / 0.8)
    low, high = np.quantile(np.log(C_b), [0.16, 0.84])
    assert target.values.std() / abs(slope[0]) == pytest.approx((high - low) / 2, rel=0.25)
    with pytest.raises(ValueError, match="'other' has no draws"):
        propose({"more": draws}, options.assign(arm="other"), target=target, budget_flops=1e30)
