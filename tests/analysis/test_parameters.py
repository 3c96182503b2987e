"""Fixed, tied, shared and per-arm parameters, quantiles, weights and units, against planted truths and other fits."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import newton
from analysis.fit import LEAST_SQUARES, fit_law, refit
from analysis.laws import LAWS, by_arm
from analysis.refusal import Refusal

TRUTH = {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.34, "beta": 0.30}


def table(noise=0.0, seed=0, arms=("one",), **changes):
    rng = np.random.default_rng(seed)
    rows = []
    for arm in arms:
        p = TRUTH | changes.get(arm, {})
        for N in np.geomspace(1e7, 1e10, 6):
            for D in np.geomspace(3e8, 3e11, 6):
                loss = p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]
                rows.append({"arm": arm, "N": N, "D": D, "loss": loss * np.exp(noise * rng.normal())})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", TRUTH)
def test_a_parameter_fixed_at_its_truth_leaves_the_others_at_theirs(name):
    fit = fit_law("chinchilla", table(), fixed={name: TRUTH[name]})
    assert fit.params[name] == pytest.approx(TRUTH[name], rel=1e-12) and name not in fit.free and len(fit.free) == 4
    for other, value in TRUTH.items():
        assert fit.params[other] == pytest.approx(value, rel=1e-5)


def test_fixed_elsewhere_costs_something():
    data = table(noise=0.01, seed=1)
    free = fit_law("chinchilla", data)
    held = fit_law("chinchilla", data, fixed={"alpha": 0.5, "A": 3000.0})
    assert held.objective > free.objective and held.converged
    profile_point, params = refit(free, np.ones((1, len(data))), theta0_mk=free.theta_k[None])
    assert profile_point.objective_m[0] == pytest.approx(free.objective, rel=1e-12)
    assert params["alpha"][0] == pytest.approx(free.params["alpha"], rel=1e-9)


def test_tied_exponents_are_a_law_of_four_parameters():
    data = table(noise=0.01, seed=2)
    tied = fit_law("chinchilla", data, tied={"beta": "alpha"})
    written = fit_law("chinchilla_tied", data)
    assert tied.params["alpha"] == tied.params["beta"] and tied.free == ("E", "A", "B", "alpha")
    assert tied.objective == pytest.approx(written.objective, rel=1e-9)
    # Amplitudes in natural units, which centring would change differently.
    same = fit_law("chinchilla", data, tied={"B": "A"})
    assert same.params["A"] == pytest.approx(same.params["B"], rel=1e-9) and same.objective > tied.objective * 0.5


def test_parameters_per_arm_are_separate_fits():
    data = table(noise=0.01, seed=3, arms=("a", "b"), b={"A": 600.0, "alpha": 0.30})
    both = fit_law("chinchilla", data, per_arm=tuple(TRUTH), delta=LEAST_SQUARES)
    for arm in ("a", "b"):
        alone = fit_law("chinchilla", data[data.arm == arm], delta=LEAST_SQUARES)
        for name in TRUTH:
            assert both.flat[f"{name}[{arm}]"] == pytest.approx(alone.flat[name], rel=1e-5)
    assert by_arm(LAWS["chinchilla"], "A", "B").parameters == LAWS["chinchilla_by_arm"].parameters


def test_an_amplitude_shared_by_arms_of_other_exponents_is_shared_in_natural_units():
    data = table(arms=("a", "b"), b={"alpha": 0.30})
    fit = fit_law("chinchilla", data, per_arm=("alpha",))
    assert fit.converged
    assert fit.flat["alpha[b]"] == pytest.approx(0.30, rel=1e-6) and fit.flat["A"] == pytest.approx(400, rel=1e-4)


def test_one_arm_may_be_fixed():
    data = table(arms=("a", "b"), b={"A": 600.0})
    fit = fit_law("chinchilla", data, per_arm=("A",), fixed={"A[a]": 400.0})
    assert fit.flat["A[a]"] == pytest.approx(400) and fit.flat["A[b]"] == pytest.approx(600, rel=1e-6)
    assert "A[a]" not in fit.free and "A[b]" in fit.free


@given(scale=st.floats(-9, 9), weight=st.floats(-6, 6))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_units_and_weights_do_not_matter(scale, weight):
    data = table(noise=0.01, seed=4)
    plain = fit_law("chinchilla", data, starts=8)
    other = fit_law("chinchilla", data.assign(D=data.D * 10**scale), weights=np.full(len(data), 10**weight), starts=8)
    assert other.status == plain.status
    assert other.objective == pytest.approx(plain.objective * 10**weight, rel=1e-8)
    assert other.params["beta"] == pytest.approx(plain.params["beta"], rel=1e-6)
    assert other.params["B"] == pytest.approx(plain.params["B"] * 10 ** (scale * plain.params["beta"]), rel=1e-4)


def test_quantiles_leave_their_share_below():
    rng = np.random.default_rng(5)
    C = np.geomspace(1e15, 1e21, 400)
    data = {"C": C, "loss": 40 * C**-0.05 * np.exp(0.05 * rng.standard_normal(400))}
    for quantile in (0.1, 0.5, 0.9):
        fit = fit_law("power_law", data, quantile=quantile)
        assert np.mean(fit.residuals() < 0) == pytest.approx(quantile, abs=0.02)


def test_flat_directions_are_named():
    N = np.geomspace(1e7, 1e9, 12)
    fit = fit_law("chinchilla", {"N": N, "D": 20 * N, "loss": 1.7 + 300 * N**-0.3}, delta=LEAST_SQUARES)
    assert not fit.converged and any("A" in d or "B" in d for d in fit.flat_directions)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"fixed": {"gama": 1.0}}, "'gama' is not a parameter"),
        ({"fixed": {"alpha": -1.0}}, "alpha = -1.0: use a positive"),
        ({"tied": {"beta": "gamma"}}, "'gamma' is not one of"),
        ({"tied": {"beta": "beta"}}, "itself free"),
        ({"fixed": TRUTH}, "every parameter is fixed"),
        ({"per_arm": ("C",)}, "parameter 'C' is not one of chinchilla"),
        ({"delta": 0}, "delta = 0"),
        ({"delta": "huber"}, "delta = 'huber'"),
        ({"quantile": 1.0}, "quantile = 1.0"),
        ({"starts": 1}, "starts = 1"),
        ({"columns": {"N": "n"}}, "column 'n' is not in the table"),
        ({"weights": np.ones(3)}, "weights of shape"),
        ({"arm": "branch", "per_arm": ("A",)}, "column 'branch' is not in the table"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        fit_law("chinchilla", table(), **arguments)


def test_rows_without_weight_are_refused():
    with pytest.raises(Refusal, match="no row has a weight"):
        fit_law("chinchilla", table(), weights=np.zeros(36))


def test_any_number_of_members_ends_alike():
    """Lanes are refilled as members finish: where a member runs must not matter."""
    data = table(noise=0.01, seed=6)
    fit = fit_law("chinchilla", data)
    weights = np.random.default_rng(0).multinomial(36, np.full(36, 1 / 36), size=150).astype(float)
    together, _ = refit(fit, weights)
    seen = []
    few = newton.solve(
        fit.problem,
        np.broadcast_to(fit.theta_k, (5, 5)),
        weights[-5:],
        fit.data.log_loss_n[None],
        deltas_sm=newton.deltas_down_to(fit.delta),
        progress=lambda done, members: seen.append((done, members)),
    )
    np.testing.assert_allclose(together.objective_m[-5:], few.objective_m, rtol=1e-12)
    assert seen[-1] == (5, 5)
