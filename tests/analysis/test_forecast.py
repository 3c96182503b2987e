"""Forecasts against crossings worked out by root finding, planted truths, and arms that do not differ."""

import math

import numpy as np
import pytest
from scipy import optimize

from analysis import cluster_bootstrap, fit_law
from analysis.curves import Curves, apart, curves, frontier, measured_cost
from analysis.forecast import Forecast, Price, forecast, forecasts
from analysis.refusal import Refused
from analysis.uncertainty import covariance, sandwich

PRICE = Price(dollars_per_flop=1e-18, year=2025.0, source="test")
MORE, LESS = (1.9, 60.0, 0.085), (1.7, 110.0, 0.095)  # E, A, gamma


def loss(arm, C):
    E, A, gamma = arm
    return E + A * np.asarray(C, float) ** -gamma


def crossing(a, b, low=1e15, high=1e30):
    return float(optimize.brentq(lambda x: loss(a, math.exp(x)) - loss(b, math.exp(x)), math.log(low), math.log(high)))


def exact(*arms, measured=(1e18, 1e22), draws=1):
    C = np.geomspace(measured[0] / 10, measured[1] * 1e4, 401)
    return Curves(C=C, loss={n: np.tile(loss(arm, C), (draws, 1)) for n, arm in arms}, measured=measured)


def simulated(arms, *, noise, seed, budgets=24, draws=200):
    rng = np.random.default_rng(seed)
    C = np.geomspace(1e18, 1e22, budgets)
    rows = {"C": np.tile(C, len(arms)), "arm": np.repeat([name for name, _ in arms], budgets)}
    rows["loss"] = np.concatenate([loss(arm, C) for _, arm in arms]) * np.exp(
        noise * rng.standard_normal(budgets * len(arms))
    )
    fit = fit_law("power_law_with_asymptote", rows, per_arm=("E", "A", "gamma"), delta="scatter", starts=16, seed=seed)
    return cluster_bootstrap(fit, range(len(rows["C"])), strata=rows["arm"], draws=draws, seed=seed)


def test_prices_fall_tenfold_in_five_years_and_come_from_the_three_numbers():
    price = Price.of_accelerator(dollars_per_hour=2.0, peak_flops=1e15, utilisation=0.5, year=2026.0)
    assert price.dollars_per_flop == pytest.approx(2.0 / 1.8e18)
    assert price.flops(100.0, 2026.0) == pytest.approx(9e19)
    assert price.flops(100.0, [2031.0, 2021.0]) == pytest.approx([9e20, 9e18])
    assert price.year_of(price.flops(5.0, 2033.3), 5.0) == pytest.approx(2033.3)
    slow = Price.of_accelerator(tenfold_years=10.0)
    assert slow.flops(1.0, slow.year + 10) == pytest.approx(10 * slow.flops(1.0, slow.year))
    with pytest.raises(ValueError, match="utilisation = 40"):
        Price.of_accelerator(utilisation=40)


def test_the_year_is_that_of_the_root():
    root = crossing(MORE, LESS)
    year = forecast(exact(("more", MORE), ("less", LESS)), more="more", less="less", dollars=1e4, price=PRICE)
    assert isinstance(year, Forecast) and math.log(year.C) == pytest.approx(root, abs=1e-4)
    # 1e4 dollars buy 1e22 FLOPs in 2025.
    assert year.year == pytest.approx(2025 + 5 * (root / math.log(10) - 22), abs=1e-3)
    assert year.extrapolated == (math.exp(root) > 1e22)
    # A hundred times the money is ten years earlier.
    rich = forecast(exact(("more", MORE), ("less", LESS)), more="more", less="less", dollars=1e6, price=PRICE)
    assert rich.year == pytest.approx(year.year - 10, abs=1e-6)


def test_beyond_the_data_it_says_so_with_the_factor():
    measured = (1e14, 1e16)
    far = forecast(exact(("m", MORE), ("l", LESS), measured=measured), more="m", less="l", dollars=1.0, price=PRICE)
    assert isinstance(far, Forecast)
    assert far.extrapolation == pytest.approx(math.exp(crossing(MORE, LESS)) / 1e16, rel=1e-3)
    assert f"extrapolation by a factor {far.extrapolation:.2g}" in str(far)


def test_the_more_structured_arm_is_not_forecast_to_win():
    swapped = forecast(exact(("more", MORE), ("less", LESS)), more="less", less="more", dollars=1e4, price=PRICE)
    assert isinstance(swapped, Refused) and "in 0% of the draws" in swapped.reason


def test_the_same_curve_twice_is_refused():
    same = forecast(exact(("a", MORE), ("b", MORE)), more="a", less="b", dollars=1e4, price=PRICE)
    assert isinstance(same, Refused) and "same curves" in same.reason


def test_ends_beyond_reach_are_open_and_shares_count_draws():
    given = exact(("more", MORE), ("less", LESS), draws=100)
    ahead = given.loss["less"].copy()
    ahead[:3] += 1.0  # three draws in which less structure never wins
    ahead[3:20] -= 1.0  # and 17 in which it always does
    given = Curves(C=given.C, loss={"more": given.loss["more"], "less": ahead}, measured=given.measured)
    found = forecast(given, more="more", less="less", dollars=1e4, price=PRICE)
    assert isinstance(found, Forecast) and (found.wins, found.already) == (0.97, 0.17)
    assert found.low is None and found.high is None and "interval open to open" in str(found)
    assert found.won_by(found.year - 0.1) == 0.17 and found.won_by(found.year + 0.1) == 0.97
    assert list(found.probability.values()) == sorted(found.probability.values())
    assert isinstance(forecast(given, more="more", less="less", dollars=1e4, price=PRICE, resolved=0.98), Refused)


def test_an_arm_that_is_always_better_has_won_already():
    always = forecast(exact(("more", MORE), ("less", (1.5, 60.0, 0.085))), more="more", less="less", dollars=1e4)
    assert isinstance(always, Forecast) and always.year is None and always.already == 1.0 and "already" in str(always)


def test_a_planted_crossing_is_found_and_covered():
    root = crossing(MORE, LESS)
    covered = []
    for seed in range(6):
        draws = simulated((("more", MORE), ("less", LESS)), noise=5e-4, seed=seed)
        found = forecast(curves(draws), more="more", less="less", dollars=1e4, price=PRICE)
        assert isinstance(found, Forecast), found
        assert math.log(found.C) == pytest.approx(root, abs=1.0)
        covered.append((found.C_low or 0.0) <= math.exp(root) <= (found.C_high or np.inf))
    assert sum(covered) >= 4  # of 6 at 95%: fewer has probability 0.002


def test_an_arm_against_itself_is_refused():
    refused = []
    for seed in range(8):
        draws = simulated((("more", MORE), ("less", MORE)), noise=2e-3, seed=100 + seed)
        found = forecast(curves(draws), more="more", less="less", dollars=1e4, price=PRICE)
        refused.append(isinstance(found, Refused))
    assert sum(refused) >= 6


def chinchilla(scale, *, seed=0, E=1.7, alpha=0.34):
    rng = np.random.default_rng(seed)
    N, D = (side.ravel() for side in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 5)))
    value = E + scale * (400 * N**-alpha + 1500 * D**-0.33)
    rows = {"N": N, "D": D, "loss": value * np.exp(1e-3 * rng.standard_normal(len(N)))}
    return cluster_bootstrap(
        fit_law("chinchilla", rows, delta="scatter", starts=16), range(len(N)), draws=60, seed=seed
    )


def test_the_frontier_of_a_law_of_size_and_data_is_its_closed_form():
    draws = chinchilla(1.0)
    C = np.geomspace(1e17, 1e27, 7)
    E, A, B, alpha, beta = (draws.params[name][:, None] for name in ("E", "A", "B", "alpha", "beta"))
    # Hoffmann et al. 2022, equation 4.
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
    closed = E + A * N**-alpha + B * (C / 6 / N) ** -beta
    assert frontier(draws, C) == pytest.approx(closed, rel=1e-12)
    # Twice the cost of a token is half the compute.
    doubled = frontier(draws, 2 * C, flops_per_token=12.0)
    assert doubled == pytest.approx(closed, rel=1e-12)


def test_separate_fits_are_put_out_of_step_unless_paired():
    more, less = chinchilla(0.9, E=1.75), chinchilla(1.0)
    apart = curves({"more": more, "less": less})
    paired = curves({"more": more, "less": less}, paired=True)
    assert apart.loss["less"] != pytest.approx(paired.loss["less"])
    assert np.sort(apart.loss["less"][:, 200]) == pytest.approx(np.sort(paired.loss["less"][:, 200]))
    # One seed gave both fits the same draws and noise: in step, their difference looks far too sure.
    middle = slice(150, 250)
    spread = [given.difference("more", "less")[:, middle].std(axis=0).mean() for given in (apart, paired)]
    assert spread[0] > 3 * spread[1]
    found = forecast(apart, more="more", less="less", dollars=1e4, price=PRICE)
    assert isinstance(found, Forecast)


def test_draws_of_a_covariance_are_read_as_linear_about_the_fit():
    """Such draws carry no parameters of refits: their curves are the fit's and the sandwich's standard error."""
    fit = chinchilla(1.0).fit
    draws = sandwich(fit, draws=4000)
    C = np.array([1e18, 1e22])
    names, point = list(fit.params), np.array(list(fit.params.values()))

    def best(values):
        E, A, B, alpha, beta = values
        N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
        return E + A * N**-alpha + B * (C / 6 / N) ** -beta

    # The free parameters are logarithms of centred ones: A of N over its geometric mean, and so on.
    centre = {name: math.log(value) for name, value in fit.data.centre.items()}

    def natural(theta):
        E, A, B, alpha, beta = np.exp(theta)
        return best([E, A * math.exp(alpha * centre["N"]), B * math.exp(beta * centre["D"]), alpha, beta])

    assert names == list(fit.free) == ["E", "A", "B", "alpha", "beta"]
    J = np.stack([(natural(fit.theta_k + h) - natural(fit.theta_k - h)) / 2e-5 for h in 1e-5 * np.eye(5)], axis=1)
    V, dof = covariance(fit)
    curve = frontier(draws, C)
    assert np.median(curve, axis=0) == pytest.approx(best(point), rel=1e-3)
    assert curve.std(axis=0) == pytest.approx(np.sqrt(np.diag(J @ V @ J.T) * dof / (dof - 2)), rel=0.05)
    moved = apart({"a": draws, "b": sandwich(fit, draws=4000)})["b"]
    assert frontier(moved, C) != pytest.approx(curve)
    assert np.sort(frontier(moved, C), axis=0) == pytest.approx(np.sort(curve, axis=0))


def test_cost_of_a_token_is_read_off_the_runs():
    N = np.array([1e6, 1e7, 1e8])
    cost = measured_cost(N, 20 * N, 6 * N * 20 * N * np.array([2.0, 1.5, 1.0]))
    assert cost(np.array([1e5, 1e6, 10**6.5, 1e9])) == pytest.approx([1.2e6, 1.2e7, 6 * 10**6.5 * 3**0.5, 6e9])


def test_three_arms_make_three_pairs():
    least = (1.6, 400.0, 0.118)
    given = exact(("encoder_decoder", MORE), ("prefix", LESS), ("decoder", least), draws=4)
    pairs = forecasts(given, dollars=1e4, price=PRICE)
    assert list(pairs) == [("encoder_decoder", "prefix"), ("encoder_decoder", "decoder"), ("prefix", "decoder")]


def test_mistakes_say_the_way_out():
    given = exact(("more", MORE), ("less", LESS))
    with pytest.raises(ValueError, match="arm = 'fewer'"):
        forecast(given, more="more", less="fewer", dollars=1e4)
    with pytest.raises(ValueError, match="dollars = -1"):
        forecast(given, more="more", less="less", dollars=-1)
    with pytest.raises(ValueError, match="beyond the curves"):
        given.at(1e40, "more")
