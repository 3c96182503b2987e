"""Fits against planted parameters and an independent optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis.fit import LEAST_SQUARES, fit_law
from analysis.laws import Law, Parameter, flops_6nd
from analysis.refusal import Refusal

PLANTED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def grid(noise: float = 0.0, seed: int = 0, arms: dict[str, tuple[float, float]] | None = None) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for arm, (a, b) in (arms or {"one": (1.0, 1.0)}).items():
        for N in np.geomspace(1e7, 1e10, 6):
            for D in np.geomspace(3e8, 3e11, 6):
                loss = 1.69 + a * 406.4 * N**-0.34 + b * 410.7 * D**-0.28
                rows.append({"arm": arm, "N": N, "D": D, "C": 6 * N * D, "loss": loss * np.exp(noise * rng.normal())})
    return pd.DataFrame(rows)


def objective(params, table, delta):
    """Written apart from the package, from Besiroglu et al.'s description."""
    E, A, B, alpha, beta = params
    N, D, loss = (np.asarray(table[name]) for name in ("N", "D", "loss"))
    r = np.log(E + A / N**alpha + B / D**beta) - np.log(loss)
    return np.where(np.abs(r) <= delta, r**2 / 2, delta * (np.abs(r) - delta / 2)).sum()


def test_recovers_planted_parameters():
    fit = fit_law("chinchilla", grid())
    assert fit.converged and fit.agree > 0.5
    for name, value in PLANTED.items():
        assert fit.flat[name] == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(fit.predict(N=[1e11], D=[1e12]), 1.69 + 406.4 * 1e11**-0.34 + 410.7 * 1e12**-0.28)
    assert np.abs(fit.residuals()).max() < 1e-9


def test_recovers_planted_multipliers_of_arms():
    fit = fit_law("chinchilla_by_arm", grid(arms={"a": (1.0, 1.0), "b": (1.2, 0.9)}))
    assert fit.converged and fit.arms == ("a", "b")
    assert fit.flat["A[b]"] / fit.flat["A[a]"] == pytest.approx(1.2, rel=1e-6)
    assert fit.flat["B[b]"] / fit.flat["B[a]"] == pytest.approx(0.9, rel=1e-6)
    assert fit.predict(N=1e9, D=1e10, arm="b") > 0


@pytest.mark.parametrize("delta", [1e-3, LEAST_SQUARES])
def test_agrees_with_scipy(delta):
    table = grid(noise=0.004, seed=3)
    fit = fit_law("chinchilla", table, delta=delta)
    assert fit.converged and fit.gradient_norm < 1e-9
    ours = objective([fit.params[name] for name in PLANTED], table, delta)
    assert fit.objective == pytest.approx(ours, rel=1e-9)

    def in_logs(theta):
        E, A, B = np.exp(theta[:3])
        return objective((E, A, B, *theta[3:]), table, delta) / 1e-6  # scipy stops on the objective's absolute change

    start = [*np.log([1.5, 300, 500]), 0.33, 0.3]
    theirs = optimize.minimize(in_logs, start, method="L-BFGS-B", options={"ftol": 1e-15, "maxfun": 20000})
    polish = {"xatol": 1e-9, "fatol": 1e-10, "maxiter": 6000, "maxfev": 6000}
    theirs = optimize.minimize(in_logs, theirs.x, method="Nelder-Mead", options=polish)
    assert ours <= theirs.fun * 1e-6 * (1 + 1e-9)
    np.testing.assert_allclose([fit.params["alpha"], fit.params["beta"]], theirs.x[3:], rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_objective_scale_and_units_do_not_matter(scale):
    table = grid(noise=0.01, seed=1)
    plain = fit_law("chinchilla", table)
    weighted = fit_law("chinchilla", table, weights=np.full(len(table), scale))
    assert weighted.converged and weighted.objective == pytest.approx(scale * plain.objective, rel=1e-9)
    other_unit = fit_law("chinchilla", table.assign(N=table.N * scale))
    for name in PLANTED:
        assert weighted.flat[name] == pytest.approx(plain.flat[name], rel=1e-6)
        if name != "A":
            assert other_unit.flat[name] == pytest.approx(plain.flat[name], rel=1e-6)
    assert other_unit.flat["A"] == pytest.approx(plain.flat["A"] * scale ** plain.flat["alpha"], rel=1e-5)


def test_weights_of_zero_are_rows_left_out():
    table = grid(noise=0.01, seed=2)
    kept = table.D < 1e11
    weighted, cut = fit_law("chinchilla", table, weights=kept.astype(float)), fit_law("chinchilla", table[kept])
    assert weighted.rows == cut.rows == kept.sum()
    for name in PLANTED:
        assert weighted.flat[name] == pytest.approx(cut.flat[name], rel=1e-6)


def test_a_parameter_that_the_data_push_to_its_bound_is_named():
    C = np.geomspace(1e15, 1e21, 12)
    fit = fit_law("power_law_with_asymptote", {"C": C, "loss": 50 * C**-0.07 - 0.2})
    assert not fit.converged and fit.status.startswith("E on a bound")


def test_what_is_not_identified_is_not_converged():
    N = np.geomspace(1e7, 1e9, 12)
    fit = fit_law("chinchilla", {"N": N, "D": 20 * N, "loss": 1.7 + 300 * N**-0.3})
    assert not fit.converged


def test_a_fit_that_did_not_move_says_so():
    still = Law(
        name="still",
        formula="L = k",
        source="a law without its parameter",
        predict=lambda p, x: 2.0 * x["C"] + 0.0 * p["k"],
        columns=("C",),
        parameters=(Parameter(name="k", start=(1.0, 2.0)),),
    )
    C = np.linspace(1, 2, 5)
    assert "did not move" in fit_law(still, {"C": C, "loss": 3 * C}).status


def test_a_law_of_ones_own():
    def shifted(p, x):
        return p["floor"] + p["slope"] * jnp.log(x["C"])

    law = Law(
        name="shifted",
        formula="L = floor + slope log C",
        source="a test",
        predict=shifted,
        columns=("C",),
        parameters=(
            Parameter(name="floor", start=(1.0, 9.0)),
            Parameter(name="slope", start=(-1.0, 0.0), bounds=(-10.0, 10.0), positive=False),
        ),
    )
    C = np.geomspace(10, 1e4, 9)
    fit = fit_law(law, {"C": C, "loss": 8 - 0.5 * np.log(C)}, delta=LEAST_SQUARES)
    assert fit.converged
    assert fit.flat == pytest.approx({"floor": 8.0, "slope": -0.5}, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.assign(loss=t.loss.where(t.index != 3)), ValueError, r"loss\[3\] = nan"),
        (lambda t: t.assign(loss=t.loss.where(t.index != 3, np.inf)), ValueError, r"loss\[3\] = inf"),
        (lambda t: t.assign(N=t.N.where(t.index != 2, 0.0)), ValueError, r"N\[2\] = 0"),
        (lambda t: t.drop(columns="D"), ValueError, "column 'D' is not in the table"),
        (lambda t: t.iloc[::7].head(5), Refusal, "5 parameters and 5 runs"),
        (lambda t: t[t.N < 5e7], Refusal, "3 distinct values of N and has 2"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        fit_law("chinchilla", change(grid()))


def test_an_asymptote_needs_five_budgets():
    C = np.geomspace(1e15, 1e18, 4).repeat(3)
    with pytest.raises(Refusal, match="5 distinct values of C and has 4"):
        fit_law("power_law_with_asymptote", {"C": C, "loss": 1.5 + 50 * C**-0.1})
    with pytest.raises(ValueError, match="use one of power_law"):
        fit_law("chinchila", grid())


def test_flops_do_not_overflow():
    assert flops_6nd(np.int64(10**12), np.int64(10**14)) == 6e26


def test_float64_stays_inside():
    x = jnp.linspace(0.1, 3.0, 1001)
    step = jax.jit(lambda v: jnp.sin(v) @ jnp.cos(v))
    before = np.asarray(step(x)).tobytes(), np.asarray(jnp.cumsum(x)).tobytes()
    fit_law("power_law", {"C": np.geomspace(1, 100, 6), "loss": np.geomspace(1, 100, 6) ** -0.3})
    assert not jax.config.jax_enable_x64 and jax.config.jax_numpy_rank_promotion == "raise"
    assert jnp.ones(3).dtype == jnp.float32 and step(x).dtype == jnp.float32
    assert (np.asarray(step(x)).tobytes(), np.asarray(jnp.cumsum(x)).tobytes()) == before
    assert (np.asarray(jax.jit(lambda v: jnp.sin(v) @ jnp.cos(v))(x)).tobytes()) == before[0]
