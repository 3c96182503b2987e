"""Minima over sizes at equal compute, against formulas and planted curves."""

import numpy as np
import pandas as pd
import pytest

from analysis.isoflop import IsoFlop, Minimum, budgets, isoflop_minima, minimum
from analysis.refusal import Refused

METHODS = ("akima", "parabola")
BEST, LEAST, BEND = 3e8, 2.5, 0.02


def bowl(N, best=BEST, least=LEAST):
    """A loss that is exactly quadratic in log N."""
    return least + BEND * np.log(np.asarray(N, float) / best) ** 2


def table(C=1e19, low=0.125, high=8.0, sizes=7, noise=0.0, seed=0, **columns):
    N = BEST * np.geomspace(low, high, sizes)
    loss = bowl(N) + noise * np.random.default_rng(seed).standard_normal(sizes)
    return pd.DataFrame({"N": N, "C": C, "loss": loss, **columns})


def only(found):
    (one,) = found.values()
    return one


def test_finds_the_minimum_of_a_bowl():
    parabola = only(isoflop_minima(table(low=0.2), method="parabola", noise=0.001))
    assert np.isclose(parabola.N, BEST, rtol=1e-9) and parabola.loss == pytest.approx(LEAST, rel=1e-9)
    akima = only(isoflop_minima(table(low=0.2), method="akima", noise=0.001))
    # The sizes are a factor of 1.85 apart; in between the interpolation is of third order.
    assert np.isclose(akima.N, BEST, rtol=0.03) and akima.loss == pytest.approx(LEAST, abs=2e-4)


def test_curves_go_through_the_minimum_and_stay_inside_the_sizes():
    for method in METHODS:
        found = only(isoflop_minima(table(), method=method, noise=0.001))
        assert float(found.curve(found.N)) == pytest.approx(found.loss, rel=1e-6)
        inside = found.curve(np.geomspace(*found.N_range, 50)[1:-1])
        assert inside.min() >= found.loss * (1 - 1e-6)
        assert np.isnan(found.curve(found.N_range[1] * 1.01))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("low", "high", "side"), [(1.2, 16.0, "smaller"), (0.05, 0.8, "larger")])
def test_a_minimum_at_the_edge_is_refused(method, low, high, side):
    found = only(isoflop_minima(table(low=low, high=high), method=method, noise=0.001))
    assert isinstance(found, Refused) and "edge" in found.reason and f"add {side} sizes" in found.reason


@pytest.mark.parametrize("method", METHODS)
def test_too_few_sizes_and_hills_are_refused(method):
    assert "needs 3 and there are 1" in only(isoflop_minima(table(sizes=1, low=1), method=method)).reason
    # The same size twice, but for rounding.
    twice = pd.concat([table(sizes=2), table(sizes=2).assign(N=lambda t: t["N"] * (1 + 1e-12))])
    assert "there are 2" in only(isoflop_minima(twice, method=method)).reason
    hill = table().assign(loss=lambda t: 5 - t["loss"])
    assert isinstance(only(isoflop_minima(hill, method=method)), Refused)


def test_a_minimum_that_noise_moves_to_the_edge_is_refused():
    # Under noise alone the lowest of three losses is at an edge two times in three.
    flat = table(sizes=3).assign(loss=lambda t: LEAST + 1e-5 * (t["loss"] - LEAST))
    found = only(isoflop_minima(flat, noise=0.05))
    assert isinstance(found, Refused) and "under a run's noise" in found.reason


def test_draws_spread_as_the_delta_method_says():
    """For a parabola and small noise, standard deviations have a closed form, which `minimum` works out."""
    rows = table(low=0.2, run_id=[f"run{i}" for i in range(7)])
    exact = minimum(rows, arm="", budget=1e19, size="N")
    found = only(isoflop_minima(rows, method="parabola", noise=2e-4, draws=4000))
    assert found.log_N_b.std() == pytest.approx(2e-4 * exact.log_N_per_noise, rel=0.05)
    assert np.exp(found.log_loss_b).std() == pytest.approx(2e-4 * exact.per_noise, rel=0.05)
    # Two runs of every size halve the variance.
    halved = only(isoflop_minima(pd.concat([rows, rows]), method="parabola", noise=2e-4, draws=4000))
    assert halved.log_N_b.std() == pytest.approx(found.log_N_b.std() / np.sqrt(2), rel=0.05)


def test_a_minimum_in_a_gap_between_sizes_is_refused():
    """As measured: two small sizes, two large ones, and a parabola that falls 0.2 nats between them. Evenly spread sizes, whose
    minimum may lie in the middle between two of them, are none of that."""
    N = np.array([36e3, 38e3, 78e3, 87e3])
    rows = pd.DataFrame({"N": N, "loss": [2.274, 2.208, 2.170, 2.329], "run_id": list("abcd")})
    found = minimum(rows, arm="dense", budget=8e10, size="N")
    assert isinstance(found, Refused) and "in a gap between sizes, 0.2" in found.reason
    assert found.reason.endswith("add sizes between 3.8e04 and 7.8e04")
    for count in (3, 4, 5, 6):
        u = np.arange(count) - (count - 1) / 2
        for centre in (0.0, 0.5 * (count % 2 == 0) + 0.5):
            even = pd.DataFrame(
                {"N": np.exp(u), "loss": 2 + (u - centre) ** 2, "run_id": [str(i) for i in range(count)]}
            )
            least = minimum(even, arm="", budget=1.0, size="N")
            assert isinstance(least, Minimum) and least.loss == pytest.approx(2.0)


def test_intervals_cover_the_planted_minimum():
    inside_N = inside_loss = 0
    for seed in range(200):
        found = only(
            isoflop_minima(table(noise=0.003, seed=seed), method="parabola", noise=0.003, draws=400, seed=seed)
        )
        low, high = found.N_interval()
        inside_N += low < BEST < high
        low, high = found.loss_interval()
        inside_loss += low < LEAST < high
    # The 99.8% binomial band of 200 at 95%.
    assert 180 <= inside_N <= 199 and 180 <= inside_loss <= 199


def test_an_interval_is_open_where_draws_reach_the_edge():
    # The largest size is but half again as large as the best.
    found = only(isoflop_minima(table(low=0.1, high=1.5, sizes=6), noise=0.01, method="parabola"))
    low, high = found.N_interval()
    assert high is None and low is not None and low < BEST
    assert 0.5 < found.inside < 1 and np.isfinite(found.N_median)


def test_noise_is_estimated_from_runs_of_equal_size_then_from_scatter():
    rng = np.random.default_rng(3)
    twice = pd.concat([table(noise=0.01, seed=seed) for seed in range(2)])
    pairs = twice["loss"].to_numpy().reshape(2, 7)
    found = only(isoflop_minima(twice))
    assert found.noise == pytest.approx(np.sqrt((np.diff(pairs, axis=0) ** 2 / 2).mean()))
    assert "runs of equal size (7" in found.noise_source
    many = pd.concat([table(C=C, noise=0.004, seed=int(rng.integers(1e6))) for C in np.geomspace(1e18, 1e21, 12)])
    scatter = next(one for one in isoflop_minima(many).values() if isinstance(one, IsoFlop))
    assert "scatter" in scatter.noise_source and scatter.noise == pytest.approx(0.004, rel=0.3)  # 48 degrees of freedom
    unknown = only(isoflop_minima(table(sizes=5)))
    assert "unknown" in unknown.noise_source and unknown.N_interval() is None and unknown.loss_interval() is None
    assert np.isclose(unknown.N, BEST, rtol=0.05)


def test_noise_may_depend_on_the_loss():
    found = only(isoflop_minima(table(), noise=lambda loss: 0.0 * loss + 0.002))
    assert found.noise == pytest.approx(0.002) and found.noise_source == "given"


def test_budgets_are_grouped_within_a_tolerance_and_report_their_spread():
    C = np.array([1.0, 3.0, 1.015, 1.03, 3.0, 1.0201])
    assert list(budgets(C, 0.02)) == [0, 2, 0, 1, 2, 1]
    rows = table()
    rows["C"] = 1e19 * np.linspace(1.0, 1.015, 7)
    one = only(isoflop_minima(rows))
    assert one.spread == pytest.approx(0.015) and np.isclose(one.C, 1e19 * 1.0075, rtol=1e-4)
    assert len(isoflop_minima(rows, tolerance=0.004)) > 1


def test_arms_are_apart():
    rows = pd.concat([table(arm="a"), table(arm="b").assign(N=lambda t: 2 * t["N"])])
    found = isoflop_minima(rows, arm="arm", method="parabola", noise=1e-3)
    by_arm = {arm: one for (arm, _), one in found.items()}
    assert np.isclose(by_arm["b"].N, 2 * by_arm["a"].N)


def test_bad_columns_are_errors():
    with pytest.raises(ValueError, match="did you mean 'N'"):
        isoflop_minima(table().rename(columns={"N": "Ns"}).assign(N=1.0), columns={"N": "N_"})
    with pytest.raises(ValueError, match=r"loss\[2\] = nan"):
        isoflop_minima(table().assign(loss=[2.0, 2.0, np.nan, 2.0, 2.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="method = 'spline'"):
        isoflop_minima(table(), method="spline")
    with pytest.raises(ValueError, match="noise = -1"):
        isoflop_minima(table(), noise=-1.0)
    with pytest.raises(ValueError, match="not a column"):
        isoflop_minima(table(), arm="arm")
