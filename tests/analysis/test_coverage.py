"""Nominal 95% intervals cover as often as they say. tests/benchmarks/interval_coverage.py runs this at full size, and
docs/coverage.md has its table."""

import pytest
from scipy import stats

from simulated_coverage import coverage

SIMULATIONS = 300


@pytest.mark.parametrize(("kind", "n"), [("independent", 30), ("clustered", 30)])
def test_the_default_intervals_cover(kind, n):
    found = coverage(kind, n, SIMULATIONS, delta="scatter", draws=100, only=("jackknife, t",), seed=11)
    # 93% to 97% are allowed; outside of them only what chance explains.
    low, high = (stats.binom.ppf(q, SIMULATIONS, p) / SIMULATIONS for q, p in ((0.005, 0.93), (0.995, 0.97)))
    for quantity in ("a", "loss at the centre", "L*(1e22)"):
        covered, width, possible = found["jackknife, t", quantity]
        assert possible == SIMULATIONS and low <= covered <= high, (quantity, covered)
        assert 0 < width < 0.2
