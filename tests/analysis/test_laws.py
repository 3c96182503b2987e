"""The contract of every law, on losses from formulas written here apart from the package, at realistic parameters."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import laws
from analysis.fit import Fit, fit_law
from analysis.laws import LAWS, Parameter

geo = np.geomspace
N_AND_D = {"N": geo(2e7, 1e10, 6), "D": geo(3e8, 3e11, 6)}
COMPUTE = {"C": geo(1e15, 1e23, 40)}
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
ARMS = ("base", "other")


@dataclass(frozen=True, kw_only=True)
class Case:
    """`loss` is the published formula, with its own parameters written in; `truth` is what the law calls them."""

    axes: dict[str, np.ndarray]
    truth: dict[str, Any]
    loss: Callable[..., np.ndarray]
    fixed: dict[str, float] = field(default_factory=dict)
    starts: int = 16
    # What a column is multiplied by in the test of units; each column by another factor where a law can take that.
    units: dict[str, float] | None = None

    def columns(self) -> dict[str, np.ndarray]:
        grids = np.meshgrid(*self.axes.values(), indexing="ij")
        return {name: grid.ravel() for name, grid in zip(self.axes, grids, strict=True)}

    def table(self, scale: dict[str, float] | None = None) -> dict[str, Any]:
        x = self.columns()
        arms = any(np.ndim(value) for value in self.truth.values())
        if arms:
            x = {name: np.tile(value, 2) for name, value in x.items()}
            arm = np.repeat([0, 1], len(x["N"]) // 2)
            return {**_scaled(x, scale), "arm": np.asarray(ARMS)[arm], "loss": self.loss(**x, arm=arm)}
        return {**_scaled(x, scale), "loss": self.loss(**x)}

    def fit(self, name: str, scale: dict[str, float] | None = None) -> Fit:
        return fit_law(LAWS[name], self.table(scale), fixed=self.fixed, starts=self.starts)


def _scaled(x: dict[str, np.ndarray], scale: dict[str, float] | None) -> dict[str, np.ndarray]:
    return {name: value * (scale or {}).get(name, 1.0) for name, value in x.items()}


def bnsl(x, a, b, c0, *breaks):
    y = b * x**-c0
    for c, d, f in breaks:
        y = y * (1 + (x / d) ** (1 / f)) ** (-c * f)
    return a + y


def muennighoff(N, D, U, A=521.0, B=1488.0, E=1.87, alpha=0.353, beta=0.36, RD=15.4, RN=5.3):
    """As their notebook does: the optimal N of the compute for which U tokens are optimal."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    U_D = np.minimum(U, D)
    compute = 6 * (G * U_D) ** ((alpha + beta) / alpha)
    U_N = np.minimum(N, G * (compute / 6) ** (beta / (alpha + beta)))
    size = U_N + U_N * RN * (1 - np.exp(-(N / U_N - 1) / RN))
    data = U_D + U_D * RD * (1 - np.exp(-(D / U_D - 1) / RD))
    return E + A / size**alpha + B / data**beta


def clark(N, experts, a=-0.082, b=-0.108, c=0.009, d=1.104, start=1.847, most=314.478):
    saturating = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    n, e = np.log10(N), np.log10(saturating)
    return 10 ** (a * n + b * e + c * n * e + d)


FARSEER = {"a1": -0.03, "alpha": 0.123, "b1": -0.7, "a2": 70.0, "beta": -0.1, "b2": -2.6, "a3": -0.021, "gamma": 0.169}


def farseer(N, D, a1, alpha, b1, a2, beta, b2, a3, gamma, b3=1.2):
    return np.exp(a3 * N**gamma + b3) + np.exp(a2 * N**beta + b2) * D ** -np.exp(a1 * N**alpha + b1)


def farseer_truth(a1, alpha, b1, a2, beta, b2, a3, gamma, b3=1.2):
    """The value and the slope by log N of a N^power + b at N = 1e9."""
    out = {"alpha": alpha, "beta": beta, "gamma": gamma}
    for i, a, power, b in ((1, a1, alpha, b1), (2, a2, beta, b2), (3, a3, gamma, b3)):
        out |= {f"a{i}": a * power * 1e9**power, f"b{i}": a * 1e9**power + b}
    return out


CASES = {
    "power_law": Case(axes=COMPUTE, truth={"A": 30.0, "gamma": 0.05}, loss=lambda C: 30.0 / C**0.05),
    "power_law_with_asymptote": Case(
        axes=COMPUTE, truth={"E": 1.7, "A": 250.0, "gamma": 0.12}, loss=lambda C: 1.7 + 250.0 / C**0.12
    ),
    "kaplan": Case(
        axes=N_AND_D,
        truth={"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
        loss=lambda N, D: ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103,
    ),
    "chinchilla": Case(axes=N_AND_D, truth=CHINCHILLA, loss=lambda N, D: 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28),
    "chinchilla_tied": Case(
        axes=N_AND_D,
        truth={"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353},
        loss=lambda N, D: 1.87 + 521.0 / N**0.353 + 1488.0 / D**0.353,
    ),
    "chinchilla_gamma": Case(
        axes=N_AND_D,
        truth={"E": 1.69, "A": 4000.0, "B": 9000.0, "alpha": 0.45, "beta": 0.42, "gamma": 0.75},
        loss=lambda N, D: 1.69 + (4000.0 / N**0.45 + 9000.0 / D**0.42) ** 0.75,
    ),
    "chinchilla_by_arm": Case(
        axes=N_AND_D,
        truth={**CHINCHILLA, "A": [406.4, 450.0], "B": [410.7, 380.0]},
        loss=lambda N, D, arm: 1.69 + np.choose(arm, [406.4, 450.0]) / N**0.34 + np.choose(arm, [410.7, 380]) / D**0.28,
    ),
    "chinchilla_multipliers": Case(
        axes=N_AND_D,
        truth={**CHINCHILLA, "rho_N": [1.0, 1.4], "rho_D": [1.0, 0.8]},
        loss=lambda N, D, arm: (
            1.69 + 406.4 / (N * np.choose(arm, [1.0, 1.4])) ** 0.34 + 410.7 / (D * np.choose(arm, [1.0, 0.8])) ** 0.28
        ),
        fixed={"rho_N[base]": 1.0, "rho_D[base]": 1.0},
    ),
    "data_constrained": Case(
        axes={"N": geo(2e7, 1e10, 6), "D": geo(3e9, 3e11, 5), "U": geo(1e9, 1e11, 3)},
        truth={"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.36, "R_D": 15.4, "R_N": 5.3},
        loss=muennighoff,
        units={"N": 1e-6, "D": 1e-6, "U": 1e-6},
    ),
    "bnsl_1": Case(
        axes=COMPUTE,
        truth={"E": 0.6, "A": 40.0, "c0": 0.06, "c1": 0.12, "d1": 3e18, "f1": 0.3},
        loss=lambda C: bnsl(C, 0.6, 40.0, 0.06, (0.12, 3e18, 0.3)),
    ),
    "bnsl_2": Case(
        axes=COMPUTE,
        truth={"E": 0.6, "A": 40.0, "c0": 0.06}
        | {"c1": 0.12, "d1": 1e18, "f1": 0.3, "c2": -0.08, "d2": 3e20, "f2": 0.4},
        loss=lambda C: bnsl(C, 0.6, 40.0, 0.06, (0.12, 1e18, 0.3), (-0.08, 3e20, 0.4)),
        starts=48,
    ),
    "width_depth": Case(
        axes={"width": geo(256, 4096, 4), "depth": geo(4, 48, 4), "D": geo(1e9, 3e11, 4)},
        truth={"E": 1.7, "A": 60.0, "B": 0.9, "F": 900.0, "alpha": 0.7, "beta": 0.8, "gamma": 0.33},
        loss=lambda width, depth, D: 1.7 + 60 / width**0.7 + 0.9 / depth**0.8 + 900 / D**0.33,
    ),
    "encoder_decoder": Case(
        axes={"N_e": geo(2e7, 2e9, 6), "N_d": geo(2e7, 2e9, 6)},
        truth={"E": 1.2, "A": 2.2 * 1e8**0.11 * 2e8**0.19, "p_e": 0.11, "p_d": 0.19},
        loss=lambda N_e, N_d: 1.2 + 2.2 * (1e8 / N_e) ** 0.11 * (2e8 / N_d) ** 0.19,
    ),
    "routed": Case(
        axes={"N": geo(1.5e7, 1.3e9, 6), "experts": 2.0 ** np.arange(0, 10)},
        truth={"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104}
        | {"shift": 1 / (1 / 1.847 - 1 / 314.478) - 1, "E_max": 314.478},
        loss=clark,
    ),
    "farseer": Case(
        axes={"N": geo(2e8, 6e9, 9), "D": geo(2e9, 2e11, 8)},
        truth=farseer_truth(**FARSEER),
        loss=lambda N, D: farseer(N, D, **FARSEER),
        units={},
    ),
    "learning_rate_porian": Case(
        axes={"N": geo(1e7, 1e9, 6)}, truth={"c": 3.7, "p_N": -0.36}, loss=lambda N: 3.7 * N**-0.36
    ),
    "learning_rate_step": Case(
        axes=N_AND_D, truth={"c": 1.79, "p_N": -0.713, "p_D": 0.307}, loss=lambda N, D: 1.79 * N**-0.713 * D**0.307
    ),
    "learning_rate_deepseek": Case(axes=COMPUTE, truth={"c": 0.3118, "p_C": -0.125}, loss=lambda C: 0.3118 * C**-0.125),
    "batch_size_porian": Case(
        axes={"N": geo(1e7, 1e9, 6)}, truth={"c": 2e-4, "p_N": 0.7}, loss=lambda N: 2e-4 * N**0.7
    ),
    "batch_size_step": Case(
        axes={"D": geo(1e9, 1e11, 6)}, truth={"c": 0.58, "p_D": 0.571}, loss=lambda D: 0.58 * D**0.571
    ),
    "batch_size_deepseek": Case(axes=COMPUTE, truth={"c": 0.292, "p_C": 0.3271}, loss=lambda C: 0.292 * C**0.3271),
}


def in_order(params: Any) -> dict[str, np.ndarray]:
    """Breaks have no order of their own: sorted by where they lie."""
    out = {name: np.asarray(value) for name, value in params.items()}
    breaks = [name[1:] for name in out if name[0] == "d" and name[1:].isdigit()]
    order = sorted(breaks, key=lambda i: float(out[f"d{i}"]))
    moved = {f"{k}{i}": out[f"{k}{j}"] for i, j in zip(sorted(breaks), order, strict=True) for k in "cdf"}
    return {**out, **moved}


# Compiling a fit takes 1 to 6 seconds a law; those that take longest, and rules that are one formula, are left to the
# slow suite.
SLOW = ("farseer", "bnsl_1", "bnsl_2", "chinchilla_by_arm", "data_constrained", "routed", "width_depth")
SLOW += (
    "learning_rate_porian",
    "learning_rate_deepseek",
    "batch_size_porian",
    "batch_size_step",
    "batch_size_deepseek",
)


@pytest.mark.parametrize("name", LAWS)
def test_is_the_published_formula(name):
    law, case = LAWS[name], CASES[name]
    assert set(case.truth) == {parameter.name for parameter in law.parameters}
    table = case.table()
    p = {n: np.asarray(v)[(table["arm"] == "other").astype(int)] if np.ndim(v) else v for n, v in case.truth.items()}
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        loss = law.predict(p, {column: table[column] for column in law.columns})
    np.testing.assert_allclose(loss, table["loss"], rtol=1e-12)


@pytest.mark.first(3)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAWS])
def test_recovers_planted_parameters_in_any_unit(name):
    case = CASES[name]
    fit = case.fit(name)
    assert fit.converged, fit.status
    assert np.abs(fit.residuals()).max() < 1e-9
    found = in_order(fit.params)
    for parameter, value in case.truth.items():
        np.testing.assert_allclose(found[parameter], value, rtol=1e-6, err_msg=parameter)
    factors = dict(zip(LAWS[name].columns, (1e6, 1e-6, 1e3), strict=False)) if case.units is None else case.units
    other = case.fit(name, factors)
    assert other.converged, other.status
    assert np.abs(other.residuals()).max() < 1e-9
    # Beyond the data too: the law is the same, not only its values at the rows.
    far = {column: case.columns()[column] * 3 for column in case.axes}
    arm = {"arm": "other"} if fit.arms else {}
    np.testing.assert_allclose(fit.predict(**far, **arm), other.predict(**_scaled(far, factors), **arm), rtol=1e-6)


@pytest.mark.first(8)
@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_finite_differences(name):
    law, case = LAWS[name], CASES[name]
    rows = {column: values[:: max(1, len(values) // 7)] for column, values in case.columns().items()}
    names = [parameter.name for parameter in law.parameters]
    truth = np.array([np.ravel(case.truth[n])[-1] for n in names])
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        x = {column: jnp.asarray(values) for column, values in rows.items()}

        def predict(logs):  # of shape (k,): every parameter times exp(logs)
            return law.predict(dict(zip(names, truth * jnp.exp(logs), strict=True)), x)

        def derivatives(logs):
            return predict(logs), jax.jacfwd(predict)(logs), jax.jacfwd(jax.jacfwd(predict))(logs)

        k, h = len(names), 1e-5
        points = np.concatenate([np.zeros((1, k)), h * np.eye(k), -h * np.eye(k)])
        value, first, second = (np.asarray(a) for a in jax.jit(jax.vmap(derivatives))(points))
    by_step = np.moveaxis(value[1 : k + 1] - value[k + 1 :], 0, -1) / (2 * h)
    np.testing.assert_allclose(first[0], by_step, rtol=1e-5, atol=1e-7 * value.max())
    by_step = np.moveaxis(first[1 : k + 1] - first[k + 1 :], 0, -1) / (2 * h)
    np.testing.assert_allclose(second[0], by_step, rtol=1e-4, atol=1e-6 * np.abs(by_step).max())


@pytest.mark.parametrize("name", LAWS)
def test_says_what_it_is(name):
    law = LAWS[name]
    assert law.name == name and name in CASES
    assert "arXiv" in law.source or "et al." in law.source
    assert all(column in law.formula for column in law.columns)
    assert {column for column, _ in law.distinct} == set(law.columns)
    for p in law.parameters:
        assert p.unit, p.name
        assert p.bounds[0] <= p.start[0] < p.start[1] <= p.bounds[1], p.name
        assert p.bounds[0] > 0 or not p.positive, p.name


def test_a_broadcast_gives_the_grid():
    fit = CASES["chinchilla"].fit("chinchilla")
    N, D = N_AND_D["N"], N_AND_D["D"]
    np.testing.assert_allclose(
        fit.predict(N=N[:, None], D=D[None]), 1.69 + 406.4 / N[:, None] ** 0.34 + 410.7 / D**0.28
    )


def test_the_five_lines_of_the_docstring_are_a_law(tmp_path):
    assert laws.__doc__ is not None
    lines = [line[4:] for line in laws.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) <= 6
    script = tmp_path / "mine.py"
    head = ["import jax.numpy as jnp", "import numpy as np", "from analysis import Law, Parameter, fit_law"]
    data = ["C = np.geomspace(1e2, 1e8, 30)", "loss = 1.9 + 40.0 * (C + 500.0) ** -0.4"]
    script.write_text("\n".join([*head, *lines, *data, "fit = fit_law(law, {'C': C, 'loss': loss})"]))
    fit = runpy.run_path(str(script))["fit"]
    assert fit.converged, fit.status
    assert fit.flat == pytest.approx({"E": 1.9, "A": 40.0, "gamma": 0.4, "C0": 500.0}, rel=1e-6)


def test_ranges_are_checked_by_name():
    with pytest.raises(ValueError, match="parameter 'alpah' is not one of chinchilla"):
        laws.by_arm(LAWS["chinchilla"], "alpah")
    assert isinstance(LAWS["chinchilla"].parameters[0], Parameter)


def test_the_table_in_the_docs_is_the_catalogue():
    page = (Path(__file__).parents[2] / "docs" / "laws.md").read_text()
    for law in LAWS.values():
        assert f"| `{law.name}` | `{law.formula}` | {', '.join(law.columns)} | {law.source} |" in page, law.name
