"""Gains in compute, crossings of curves, adjusted p-values and agreement of ranks, against formulas and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis.crossing import crossing_of, law_curves
from analysis.curves import Curves
from analysis.fit import fit_law
from analysis.gain import compute_equivalent_gain, pinned_speedup
from analysis.multiplicity import benjamini_hochberg, holm, rank_agreement
from analysis.refusal import Refusal
from analysis.uncertainty import sandwich
from simulated_arms import C_RANGE, CROSSES, grid, steeper
from simulated_coverage import TRUTH, optimum

C = np.geomspace(1e17, 1e24, 281)
MEASURED = (1e18, 1e21)


def power(A, *, E=1.7, exponent=0.15):
    """E + A C^-exponent of every draw, (b, C)."""
    A, E = np.atleast_1d(np.asarray(A, float))[:, None], np.atleast_1d(np.asarray(E, float))[:, None]
    return E + A * C**-exponent


def curves(**loss):
    return Curves(C=C, loss=loss, measured=MEASURED)


def test_gain_of_curves_that_differ_in_A_alone_is_the_ratio_of_A():
    A = 1000 * np.exp(0.01 * np.random.default_rng(0).standard_normal(500))
    given = curves(arm=power(np.full(500, 900.0)), base=power(A))
    truth = (A / 900.0) ** (1 / 0.15)
    for at in (1e18, 1e20):
        found = compute_equivalent_gain(given, arm="arm", baseline="base", C=at)
        assert found.value == pytest.approx(np.median(truth), rel=2e-3)
        low, high = np.quantile(truth, [0.025, 0.975])
        assert found.low == pytest.approx(low, rel=5e-3) and found.high == pytest.approx(high, rel=5e-3)
        assert found.better == 1.0 and not found.extrapolated and not found.widest
    last = compute_equivalent_gain(given, arm="arm", baseline="base", C=1e21)
    assert last.extrapolated and "extrapolation" in str(last)  # the baseline would need twice the largest budget
    back = compute_equivalent_gain(given, arm="base", baseline="arm", C=1e20)
    assert back.value == pytest.approx(1 / np.median(truth), rel=2e-3) and back.better == 0.0


def test_a_gain_that_no_compute_reaches_is_open():
    given = curves(arm=power(900.0 * np.ones(100)), base=power(1000.0, E=np.linspace(1.7, 3.0, 100)))
    found = compute_equivalent_gain(given, arm="arm", baseline="base", C=1e20)
    assert found.low is not None and found.high is None and "open" in str(found)
    nowhere = compute_equivalent_gain(
        curves(arm=power(900.0), base=power(1000.0, E=3.0)), arm="arm", baseline="base", C=1e20
    )
    assert nowhere.value is None and nowhere.extrapolated
    with pytest.raises(ValueError, match="beyond the curves"):
        compute_equivalent_gain(given, arm="arm", baseline="base", C=1e25)
    with pytest.raises(ValueError, match="other"):
        compute_equivalent_gain(given, arm="other", baseline="base", C=1e20)


def test_pinned_speedup_is_the_gain_on_the_pinned_curve():
    """Marin's budget-invariance: with one asymptote and exponent the speed-up is the ratio of A to the 1/alpha."""
    pinned = {"asymptote": 1.6, "exponent": 0.0924, "measured": (1e17, 1e23)}
    curve = lambda A, at: 1.6 + A * at**-0.0924  # noqa: E731
    found = [pinned_speedup(curve(87.7, at), curve(95.18, at), C=at, **pinned).value for at in (1e18, 1e20, 1e22)]
    assert found == pytest.approx([(95.18 / 87.7) ** (1 / 0.0924)] * 3, rel=1e-9)
    drawn = np.random.default_rng(1).normal(0.0924, 0.004, 4000)
    wide = pinned_speedup(2.8, 2.85, C=1e20, **{**pinned, "exponent": drawn})
    ends = (1.25 / 1.2) ** (1 / np.quantile(drawn, [0.975, 0.5, 0.025]))
    assert [wide.low, wide.value, wide.high] == pytest.approx(ends, rel=2e-3)
    assert pinned_speedup(2.8, 2.85, C=9e22, **pinned).extrapolated
    given = curves(arm=power(900.0 * np.ones(9)), base=power(1000.0 * np.ones(9)))
    equal = pinned_speedup(
        given.at(1e20, "arm"), given.at(1e20, "base"), asymptote=1.7, exponent=0.15, C=1e20, measured=MEASURED
    )
    assert equal.value == pytest.approx(
        compute_equivalent_gain(given, arm="arm", baseline="base", C=1e20).value, rel=2e-3
    )


def test_a_loss_below_the_asymptote_is_refused():
    with pytest.raises(Refusal, match="not above the asymptote"):
        pinned_speedup(1.55, 1.7, asymptote=1.6, exponent=0.1, C=1e20, measured=MEASURED)
    some = pinned_speedup(1.65, 1.7, asymptote=np.linspace(1.5, 1.68, 100), exponent=0.1, C=1e20, measured=MEASURED)
    assert some.high is None and some.low is not None  # 17 of 100 draws have no compute that reaches it
    with pytest.raises(ValueError, match="exponents above 0"):
        pinned_speedup(1.65, 1.7, asymptote=1.5, exponent=-0.1, C=1e20, measured=MEASURED)


def crossing_draws(sd=1e-4):
    table = grid({"base": TRUTH, "arm": steeper()}, budgets=4, sizes=5)
    noise = sd * np.random.default_rng(0).standard_normal(40)
    fit = fit_law("chinchilla", {**table, "loss": np.exp(table["clean"] + noise)}, per_arm=("A", "B", "alpha", "beta"), starts=8,
                  delta="scatter")  # fmt: skip
    return sandwich(fit, draws=300)


def test_crossing_of_fitted_laws():
    drawn = crossing_draws()
    given = law_curves(drawn, arms=("base", "arm"), measured=C_RANGE)
    np.testing.assert_allclose(np.median(given.at(1e20, "base")), optimum(TRUTH, 1e20)[1], rtol=2e-4)
    found = crossing_of(given, arm="arm", baseline="base", budgets=[1e19, 1e20])
    assert found.low is not None and found.high is not None and found.low < CROSSES < found.high < 1.5 * found.low
    assert found.better[1e19] == 0.0 and found.better[1e20] == 1.0 and not found.extrapolated
    # By search over sizes as by the closed form, where the cost of a token is a function that is 6 N.
    searched = law_curves(drawn, arms=("base", "arm"), measured=C_RANGE, flops_per_token=lambda N: 6 * N)
    assert crossing_of(searched, arm="arm", baseline="base").median == pytest.approx(found.median, rel=5e-3)
    # Data that end below it: the same draws, and the crossing is an extrapolation.
    beyond = crossing_of(law_curves(drawn, arms=("base", "arm"), measured=(1e18, 1e19)), arm="arm", baseline="base")
    assert beyond.extrapolated and beyond.none_in_range > 0.99 and "extrapolation" in str(beyond)
    # At 20 tokens a parameter the arms cross elsewhere: where their losses on that line are equal.
    path = law_curves(drawn, arms=("base", "arm"), measured=C_RANGE,
                      path=lambda C: {"N": np.sqrt(C / 120), "D": 20 * np.sqrt(C / 120)})  # fmt: skip
    on_path = crossing_of(path, arm="arm", baseline="base").median
    N = np.sqrt(np.array([on_path]) / 120)
    loss = [p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * (20 * N) ** -p["beta"] for p in (TRUTH, steeper())]
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-4)
    with pytest.raises(ValueError, match="other"):
        law_curves(drawn, arms=("base", "other"), measured=C_RANGE)


def test_draws_of_independent_runs_are_not_paired():
    table = grid({"base": TRUTH}, budgets=4, sizes=10)
    losses = np.exp(table["clean"] + 3e-3 * np.random.default_rng(1).standard_normal(40))
    one = sandwich(fit_law("chinchilla", {**table, "loss": losses}, starts=8, delta="scatter"), draws=300)
    two = {"base": one, "arm": sandwich(one.fit, draws=300)}  # one seed gave both the same draws
    apart = law_curves(two, arms=("base", "arm"), measured=C_RANGE, points=21)
    alike = law_curves(two, arms=("base", "arm"), measured=C_RANGE, points=21, paired=True)
    spread = apart.difference("base", "arm").std(axis=0)
    assert np.abs(alike.difference("base", "arm")).max() < 1e-12
    np.testing.assert_allclose(spread, np.sqrt(2) * apart.loss["base"].std(axis=0), rtol=0.25)


# --- many comparisons ------------------------------------------------------------------------------------------------


def test_adjusted_p_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == [] == benjamini_hochberg([])
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        p = np.round(rng.uniform(0, 0.2, n), 2)  # with ties
        assert benjamini_hochberg(p.tolist()) == pytest.approx(stats.false_discovery_control(p).tolist())
        # Holm is the closure of Bonferroni: the worst Bonferroni p of any subset that a hypothesis is in.
        brute = [
            max(
                min(1.0, len(subset) * min(p[list(subset)]))
                for size in range(1, n + 1)
                for subset in itertools.combinations(range(n), size)
                if i in subset
            )
            for i in range(n)
        ]
        assert holm(p.tolist()) == pytest.approx(brute)


def test_rank_agreement():
    rng = np.random.default_rng(2)
    names = [f"recipe {i}" for i in range(12)]
    quality = rng.standard_normal(12)
    small = dict(zip(names, quality + 0.4 * rng.standard_normal(12), strict=True))
    large = dict(zip(names, quality, strict=True))
    found = rank_agreement(small, large)
    tau = stats.kendalltau([small[n] for n in names], [large[n] for n in names]).statistic
    assert found.tau == pytest.approx(tau) and found.accuracy == pytest.approx((1 + tau) / 2)
    low, high = found.accuracy_interval
    assert low < found.accuracy < high <= 1.0
    exact = rank_agreement(large, large)
    assert exact.accuracy == 1.0 and exact.accuracy_interval == (1.0, 1.0)
    noisy = rank_agreement(large, large, small_error=dict.fromkeys(names, 1.0))
    assert noisy.accuracy == 1.0 and noisy.accuracy_interval[0] < 0.8
    with pytest.raises(Refusal, match="2 arms"):
        rank_agreement({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
