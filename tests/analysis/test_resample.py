"""Bootstraps: do intervals cover, and do rows that are not independent widen them."""

import numpy as np
import pytest

from analysis.fit import LEAST_SQUARES, fit_law
from analysis.refusal import Refusal
from analysis.resample import cluster_bootstrap, pairs_bootstrap, parametric_bootstrap

CLUSTERS, ROWS = 20, 5
GAMMA = 0.12


def simulate(rng, *, between: float, within: float):
    cluster = np.arange(CLUSTERS).repeat(ROWS)
    C = np.geomspace(1e15, 1e21, CLUSTERS)[cluster]
    noise = between * rng.standard_normal(CLUSTERS)[cluster] + within * rng.standard_normal(cluster.size)
    return cluster, {"C": C, "loss": 90 * C**-GAMMA * np.exp(noise)}


def test_cluster_intervals_cover_and_row_intervals_do_not():
    rng, covered = np.random.default_rng(0), {"clusters": 0, "rows": 0}
    repeats = 30
    for _ in range(repeats):
        cluster, table = simulate(rng, between=0.02, within=0.002)
        fit = fit_law("power_law", table, delta=LEAST_SQUARES, starts=4)
        for kind, labels in (("clusters", cluster), ("rows", np.arange(cluster.size))):
            low, high = cluster_bootstrap(fit, labels, draws=80, seed=1).intervals()["gamma"]
            covered[kind] += low <= GAMMA <= high
    # 95% nominal; a percentile bootstrap of 20 clusters is a little below.
    assert covered["clusters"] >= 0.85 * repeats
    assert covered["rows"] <= 0.75 * repeats


def test_noise_bootstrap_agrees_with_the_formula():
    rng = np.random.default_rng(2)
    C = np.geomspace(1e15, 1e21, 40)
    loss = 2 - 0.05 * np.log(C / 1e18) + 0.004 * rng.standard_normal(40)
    fit = fit_law("power_law", {"C": C, "loss": loss}, delta=LEAST_SQUARES)
    draws = parametric_bootstrap(fit, sd=0.004, clusters=range(40), draws=400)
    x = np.log(C) - np.log(C).mean()
    sd_of_log = 0.004 / fit.predict(C=C)
    expected = np.sqrt((x**2 * sd_of_log**2).sum()) / (x**2).sum()
    assert draws.standard_errors()["gamma"] == pytest.approx(expected, rel=0.15)
    assert draws.converged == 1.0 and len(draws) == 400
    assert draws.predict(C=C[:3]).shape == (400, 3)


def test_strata_keep_every_arm():
    table = {
        "arm": ["a"] * 12 + ["b"] * 12,
        "N": np.tile(np.geomspace(1e6, 1e8, 12), 2),
        "D": np.tile(np.geomspace(1e8, 1e9, 4), 6),
    }
    rng = np.random.default_rng(0)
    table["loss"] = 1.5 + 200 * table["N"] ** -0.3 + 300 * table["D"] ** -0.3 + 0.01 * rng.standard_normal(24)
    fit = fit_law("chinchilla_by_arm", table)
    draws = cluster_bootstrap(fit, range(24), strata=table["arm"], draws=50)
    assert draws.params["A"].shape == (50, 2) and np.isfinite(draws.params["A"]).all()
    again = cluster_bootstrap(fit, range(24), strata=table["arm"], draws=50)
    np.testing.assert_array_equal(draws.params["A"], again.params["A"])
    assert set(draws.flat) == {"A[a]", "A[b]", "B[a]", "B[b]", "E", "alpha", "beta"}


def test_repeated_runs_are_refused_by_name():
    cluster, table = simulate(np.random.default_rng(0), between=0.01, within=0.01)
    fit = fit_law("power_law", table)
    with pytest.raises(Refusal, match=r"run_id '0' has 5 rows.*cluster_bootstrap"):
        pairs_bootstrap(fit, cluster)
    assert len(pairs_bootstrap(fit, range(cluster.size), draws=20)) == 20
    with pytest.raises(Refusal, match="2 clusters in a stratum"):
        cluster_bootstrap(fit, cluster % 2)
    with pytest.raises(ValueError, match="one for each of the 100 fitted rows"):
        cluster_bootstrap(fit, range(3))
    with pytest.raises(ValueError, match="sd = 0"):
        parametric_bootstrap(fit, sd=0, clusters=range(100))
