"""Covariances, leave-one-out and profiles against linear regression, whose answers are known in closed form."""

import numpy as np
import pytest
from scipy import stats

from analysis.fit import LEAST_SQUARES, fit_law
from analysis.refusal import Refusal
from analysis.resample import cluster_bootstrap, wild_cluster_bootstrap
from analysis.uncertainty import (
    METHODS,
    covariance,
    coverage_note,
    draw_parameters,
    jackknife,
    leverage,
    profile,
    sandwich,
)


def line(n=40, noise=0.01, seed=0, clusters=None, between=0.0):
    """log loss is a line in log C, so that least squares on it is ordinary linear regression."""
    rng = np.random.default_rng(seed)
    C = np.geomspace(1e15, 1e21, n)
    log_loss = 3 - 0.05 * np.log(C) + noise * rng.standard_normal(n)
    if clusters is not None:
        log_loss = log_loss + between * rng.standard_normal(max(clusters) + 1)[clusters]
    table = {"C": C, "loss": np.exp(log_loss)}
    X = np.stack([np.ones(n), -(np.log(C) - np.log(C).mean())], axis=1)  # by (log A centred, gamma)
    return table, X, np.log(table["loss"])


def by_hand(X, y):
    inverse = np.linalg.inv(X.T @ X)
    coefficients = inverse @ X.T @ y
    residual = y - X @ coefficients
    return inverse, coefficients, residual, np.einsum("ij,jk,ik->i", X, inverse, X)


def fitted(table, **kwargs):
    return fit_law("power_law", table, delta=LEAST_SQUARES, **kwargs)


def gamma_variance(V, fit):
    """gamma is fitted as its logarithm."""
    return V[1, 1] * fit.params["gamma"] ** 2


def test_covariances_are_those_of_linear_regression():
    table, X, y = line()
    fit = fitted(table)
    inverse, coefficients, residual, h = by_hand(X, y)
    assert fit.params["gamma"] == pytest.approx(coefficients[1], rel=1e-9)
    np.testing.assert_allclose(leverage(fit), h, rtol=1e-6)
    alike, dof = covariance(fit, homoskedastic=True)
    assert dof == 38
    assert gamma_variance(alike, fit) == pytest.approx(residual @ residual / 38 * inverse[1, 1], rel=1e-6)
    hc3, _ = covariance(fit)
    middle = (X * (residual / (1 - h))[:, None] ** 2).T @ X
    assert gamma_variance(hc3, fit) == pytest.approx((inverse @ middle @ inverse)[1, 1], rel=1e-6)


def test_clustered_covariance_and_jackknife_by_hand():
    labels = np.arange(40) // 5
    table, X, y = line(clusters=labels, between=0.03)
    fit = fitted(table)
    inverse, coefficients, residual, _ = by_hand(X, y)
    scores = np.stack([(X * residual[:, None])[labels == g].sum(axis=0) for g in range(8)])
    expected = 8 / 7 * 39 / 38 * (inverse @ scores.T @ scores @ inverse)[1, 1]
    clustered, dof = covariance(fit, labels)
    assert dof == 7 and gamma_variance(clustered, fit) == pytest.approx(expected, rel=1e-6)
    left = [np.linalg.lstsq(X[labels != g], y[labels != g], rcond=None)[0][1] for g in range(8)]
    standard_error = np.sqrt(7 / 8 * ((np.array(left) - coefficients[1]) ** 2).sum())
    low, high = jackknife(fit, labels, draws=20000).intervals()["gamma"]
    # In logarithms of gamma, hence not quite symmetric.
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 7) * standard_error, rel=0.05)
    assert covariance(fit, homoskedastic=True)[0][1, 1] < clustered[1, 1] / 2


def test_profile_of_a_line_is_its_t_interval():
    table, X, y = line()
    fit = fitted(table)
    inverse, coefficients, residual, _ = by_hand(X, y)
    half = stats.t.ppf(0.975, 38) * np.sqrt(residual @ residual / 38 * inverse[1, 1])
    found = profile(fit, "gamma", points=201)
    # The scale of the residuals is the robust one here; 10% is its own scatter.
    assert found.estimate == pytest.approx(coefficients[1], rel=1e-9) and found.better is None
    assert found.low == pytest.approx(coefficients[1] - half, abs=0.1 * half)
    assert found.high == pytest.approx(coefficients[1] + half, abs=0.1 * half)
    amplitude = profile(fit, "A")
    assert amplitude.low is not None and amplitude.low < fit.params["A"] < amplitude.high
    # The natural amplitude lies far from the data: it moves with the exponent over the distance to C = 1.
    assert np.log(amplitude.high / amplitude.low) == pytest.approx(2 * half * np.log(table["C"]).mean(), rel=0.2)


def test_a_profile_may_be_open():
    rng = np.random.default_rng(1)
    C = np.geomspace(1e15, 1e18, 16)
    table = {"C": C, "loss": 30 * C**-0.05 * np.exp(0.01 * rng.standard_normal(16))}
    fit = fit_law("power_law_with_asymptote", table, delta=LEAST_SQUARES)
    found = profile(fit, "E", span=(1e-3, 6.0))
    assert found.low is None and "open below" in str(found)
    with pytest.raises(ValueError, match="one of the free parameters E, A, gamma"):
        profile(fit, "alpha")


def test_wild_and_pairs_bootstraps_agree_where_both_hold():
    table, _, _ = line(n=60, noise=0.02, seed=3)
    fit = fitted(table)
    pairs = cluster_bootstrap(fit, range(60), draws=800).standard_errors()["gamma"]
    wild = wild_cluster_bootstrap(fit, range(60), draws=800).standard_errors()["gamma"]
    alike = np.sqrt(gamma_variance(covariance(fit, homoskedastic=True)[0], fit))
    assert wild == pytest.approx(alike, rel=0.15) and pairs == pytest.approx(alike, rel=0.15)
    few = wild_cluster_bootstrap(fit, np.arange(60) // 15, draws=200)
    assert len(np.unique(np.round(few.params["gamma"], 12))) > 100  # Webb's six points, not two signs
    with pytest.raises(Refusal, match="3 clusters"):
        wild_cluster_bootstrap(fit, np.arange(60) // 20)


def test_new_runs_scatter_more_than_the_mean_curve():
    table, _, _ = line(n=60, noise=0.02, seed=3)
    draws = sandwich(fitted(table))
    mean, new = draws.predict(C=1e18), draws.predict_new_run(C=1e18)
    assert np.log(mean).std() == pytest.approx(0.02 / np.sqrt(60), rel=0.2)
    assert np.log(new).std() == pytest.approx(0.02, rel=0.2)


def test_the_estimator_is_resampled_whole():
    table, _, _ = line(n=60, noise=0.01, seed=5)
    table["loss"][7] *= 1.5
    plain, cut = fitted(table), fitted(table, outliers="beyond_4_sd")
    assert cut.dropped_n.tolist() == [i == 7 for i in range(60)] and cut.rows == 59
    draws = cluster_bootstrap(cut, range(60), draws=200)
    far = cluster_bootstrap(plain, range(60), draws=200)
    assert draws.standard_errors()["gamma"] < far.standard_errors()["gamma"] / 2
    scattered = fit_law("power_law", table, delta="scatter")
    assert 0.008 < scattered.delta < 0.025
    assert scattered.params["gamma"] == pytest.approx(cut.params["gamma"], rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_its_refusals(method):
    table, _, _ = line(n=40)
    fit = fitted(table)
    low, high = draw_parameters(fit, method=method, clusters=np.arange(40) // 4, draws=200).intervals()["gamma"]
    assert low < 0.05 < high and high - low < 0.01
    with pytest.raises(Refusal, match=r"run_id 'r0' has 4 rows.*clusters=run_ids"):
        draw_parameters(fit, method=method, run_ids=[f"r{i // 4}" for i in range(40)])


def test_defaults_and_wrong_names():
    table, _, _ = line(n=40)
    assert "leave-one-out" in draw_parameters(fitted(table)).kind
    assert "resampled" in draw_parameters(fit_law("power_law", table), draws=50).kind
    with pytest.raises(ValueError, match="method = 'jacknife': use one of jackknife"):
        draw_parameters(fitted(table), method="jacknife")
    with pytest.raises(ValueError, match="outliers = 'mad': use one of beyond_4_sd"):
        fitted(table, outliers="mad")


def test_known_misses_are_labelled():
    table, _, _ = line(n=30)
    squares, absolute = fitted(table), fit_law("power_law", table)
    assert coverage_note(jackknife(squares, range(30))) is None
    assert "97-98%" in str(coverage_note(jackknife(squares, np.arange(30) // 3)))
    assert "87-92%: too narrow" in str(coverage_note(jackknife(absolute, range(30))))
    assert "too narrow" in str(coverage_note(wild_cluster_bootstrap(squares, np.arange(30) // 3, draws=20)))
    assert "too wide" in str(coverage_note(cluster_bootstrap(absolute, range(30), draws=20)))
    assert coverage_note(cluster_bootstrap(squares, range(30), draws=20)) is None


def test_a_fit_on_its_bound_has_no_covariance():
    C = np.geomspace(1e15, 1e21, 12)
    fit = fit_law("power_law_with_asymptote", {"C": C, "loss": 50 * C**-0.07 - 0.2}, delta=LEAST_SQUARES)
    with pytest.raises(Refusal, match=r"E lies on its bound.*profile"):
        covariance(fit)
