"""Yardsticks on published data: what others printed, and what their objective's true optimum is.

Skipped where ../shared/data is absent. Each data set's README there says where it comes from. docs/laws.md has the figures
side by side.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis.diagnose import lack_of_fit
from analysis.fit import LEAST_SQUARES, Fit, fit_law, predict, refit
from analysis.laws import LAWS
from analysis.uncertainty import profile

# pandas' own annotations lose the type of a column; its errors are not this file's.
# pyright: reportGeneralTypeIssues=false

STARTS = 16
DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.published


def read(name: str) -> pd.DataFrame:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs published data at {path}")
    return pd.read_csv(path)


def percent(log_errors: np.ndarray) -> float:
    """Root mean square of log-errors, in per cent."""
    return 100 * float(np.sqrt(np.mean(log_errors**2)))


def huber(log_errors: np.ndarray, delta: float = 1e-3) -> float:
    size = np.abs(log_errors)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


# --- Chinchilla: the points that Besiroglu et al. 2024 (arXiv:2404.10102) took from a figure of Hoffmann et al. 2022 ----


@cache
def chinchilla_points() -> tuple[pd.DataFrame, np.ndarray]:
    """All 245 points, and which 240 are kept: one number of rows, so one compilation serves every fit."""
    table = read("epoch_chinchilla/chinchilla_points.csv")
    return table, table["kept"].to_numpy(bool)


@cache
def chinchilla_fit() -> Fit:
    table, kept = chinchilla_points()
    return fit_law("chinchilla", table, weights=kept.astype(float))


def exponent_of_N(params: Any) -> Any:
    """a of N*(C) ~ C^a."""
    return params["beta"] / (params["alpha"] + params["beta"])


def test_exact_optimum():
    table, kept = chinchilla_points()
    fit = chinchilla_fit()
    known = {"E": 1.8172181, "A": 477.82587, "B": 2143.41734, "alpha": 0.34731050, "beta": 0.36717243}
    assert fit.flat == pytest.approx(known, rel=1e-6)
    assert fit.objective == pytest.approx(1.0182740178e-3, rel=1e-8)
    # 8.4% of the paper's 4500 starts come within 0.1% of it.
    assert fit.converged and fit.agree > 0.95 and fit.gradient_norm < 1e-9
    # The published point ends within 1% (A) and 3% (B) of this one: its optimiser reported success=False.
    published = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    x = {name: table[name].to_numpy()[kept] for name in ("N", "D")}
    theirs = huber(np.log(predict(LAWS["chinchilla"], published, (), x) / table["loss"].to_numpy()[kept]))
    assert theirs > fit.objective * (1 + 1e-4)
    assert fit.params["A"] == pytest.approx(482.01, rel=0.01) and fit.params["B"] == pytest.approx(2085.43, rel=0.03)


def test_five_outliers_decide_the_exponent():
    table, kept = chinchilla_points()
    assert exponent_of_N(chinchilla_fit().params) == pytest.approx(0.5139, abs=5e-5)
    assert exponent_of_N(fit_law("chinchilla", table).params) == pytest.approx(0.565, abs=5e-4)
    by_rule = fit_law("chinchilla", table, outliers="five_highest_losses")
    assert (~by_rule.dropped_n == kept).all()
    assert by_rule.flat == pytest.approx(chinchilla_fit().flat, rel=1e-6)


@pytest.mark.parametrize(("delta", "a"), [(1e-5, 0.5126), (1e-3, 0.5139), (1e-2, 0.5184), (LEAST_SQUARES, 0.5298)])
def test_sweep_of_delta(delta, a):
    table, kept = chinchilla_points()
    fit = fit_law("chinchilla", table, weights=kept.astype(float), delta=delta)
    assert fit.converged, fit.status
    assert exponent_of_N(fit.params) == pytest.approx(a, abs=5e-5)


# Where SciPy's BFGS, from the paper's starting point, stops more than 5e-5 above the optimum of a resample: it was run once
# on all 4000. The published standard errors contain these.
STOPPED_SHORT = (
    93, 160, 447, 461, 499, 576, 891, 952, 1260, 1327, 1404, 1559, 1624, 1854, 2034, 2118, 2168, 2198,
    2218, 2260, 2275, 2317, 2436, 2520, 2586, 2838, 2859, 2905, 3038, 3068, 3237, 3357, 3687, 3691, 3952, 3959,
)  # fmt: skip


def bfgs(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """The paper's own procedure on resampled rows: BFGS from Hoffmann's unrounded parameters."""
    table, _ = chinchilla_points()
    n, d, loss = (np.log(table[name].to_numpy()[rows]) for name in ("N", "D", "loss"))

    def objective(theta):
        terms = np.exp([theta[0] - theta[3] * n, theta[1] - theta[4] * d, np.full_like(n, theta[2])])
        r = np.log(terms.sum(axis=0)) - loss
        size = np.abs(r)
        value = np.where(size <= 1e-3, r**2 / 2, 1e-3 * (size - 5e-4)).sum()
        share = np.clip(r, -1e-3, 1e-3) * terms / terms.sum(axis=0)
        return value, np.array([*share.sum(axis=1), -(share[0] * n).sum(), -(share[1] * d).sum()])

    start = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
    found = optimize.minimize(objective, start, jac=True, method="BFGS")
    return found.x, found.fun


def test_standard_errors_of_seed_42():
    """4000 resamples of pairs in the paper's order: sample standard deviations of parameters, population one of a.

    At the exact optimum of every resample they differ from the published ones by up to 3e-4, since BFGS's default tolerance
    stopped short on some; with what BFGS gives there they are the published ones.
    """
    table, kept = chinchilla_points()
    rows = np.flatnonzero(kept)
    rng = np.random.RandomState(42)
    drawn = [rng.choice(rows, size=len(rows), replace=True) for _ in range(4000)]
    weights_mn = np.stack([np.bincount(one, minlength=len(table)) for one in drawn]).astype(float)
    solved, params = refit(chinchilla_fit(), weights_mn)
    params = {name: value.copy() for name, value in params.items()}
    assert solved.converged_m.all()
    published = {"A": 124.52232, "B": 1293.28410, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    for name, error in published.items():
        assert params[name].std(ddof=1) == pytest.approx(error, rel=3e-4), name
    assert exponent_of_N(params).std() == pytest.approx(0.01998, rel=5e-4)
    for m in STOPPED_SHORT:
        theta, objective = bfgs(drawn[m])
        assert objective > solved.objective_m[m] * (1 + 5e-5)
        params["A"][m], params["B"][m], params["E"][m] = np.exp(theta[:3])
        params["alpha"][m], params["beta"][m] = theta[3:]
    for m in range(10):
        assert bfgs(drawn[m])[1] == pytest.approx(solved.objective_m[m], rel=5e-5)
    for name, error in published.items():
        # The smaller ones are printed to four digits.
        assert params[name].std(ddof=1) == pytest.approx(error, rel=1e-4, abs=5e-6), name
    assert exponent_of_N(params).std() == pytest.approx(0.01998, abs=5e-6)


@pytest.mark.parametrize(
    ("law", "train", "held_out"), [("chinchilla", 0.60, 1.25), ("chinchilla_tied", 0.73, 1.03), ("kaplan", 1.45, 2.63)]
)
def test_chinchilla_hold_out(law, train, held_out):
    table, kept = chinchilla_points()
    small = kept & (table["C"] <= 3e20).to_numpy()
    fit = fit_law(law, table, weights=small.astype(float), starts=STARTS)
    assert fit.converged, fit.status
    assert percent(fit.residuals()[small]) == pytest.approx(train, abs=5e-3)
    assert percent(fit.residuals()[kept & ~small]) == pytest.approx(held_out, abs=5e-3)


# --- repeated data: Muennighoff et al. 2023 (arXiv:2305.16264) -------------------------------------------------------


def test_repetitions_have_no_upper_bound():
    table = read("datablations/runs_paper_outliers_removed.csv")
    shared = {"A": np.exp(6.255414), "B": np.exp(7.3049974), "E": np.exp(0.6254804)}
    shared |= {"alpha": 0.3526596, "beta": 0.3526596}
    fit = fit_law("data_constrained", table, fixed=shared)
    assert fit.converged, fit.status
    assert fit.objective <= 0.015805
    # The published (15.39, 5.31) is a local minimum of the same objective.
    x = {name: table[name].to_numpy() for name in ("N", "D", "U")}
    log_loss = np.log(table["loss"].to_numpy())
    for R_D, R_N, objective in ((15.387756, 5.309743, 0.0158259), (47.0, 2.33, 0.0158074), (100.0, 1.68, 0.015805)):
        p = {**shared, "R_D": R_D, "R_N": R_N}
        assert huber(np.log(predict(LAWS["data_constrained"], p, (), x)) - log_loss) == pytest.approx(
            objective, abs=5e-7
        )
    shape = profile(fit, "R_D", span=(3.0, 1e5), points=81)
    assert shape.better is None and shape.high is None and "open above" in str(shape)
    # The set that the README names: twice the rise of a Laplace likelihood, n log(objective), below 3.84.
    rise = 2 * len(table) * np.log(shape.objective_m / fit.objective)
    left = shape.value_m < 15
    lowest = np.exp(np.interp(3.84, rise[left][::-1], np.log(shape.value_m[left])[::-1]))
    assert lowest == pytest.approx(7.6, abs=0.1)
    assert (rise[~left] < 3.84).all()
    # Flat: from 8 repetitions on no value is more than 1.1% worse.
    assert (shape.objective_m[shape.value_m > 8] < 1.011 * fit.objective).all()


# --- OLMo's ladder ----------------------------------------------------------------------------------------------------


def test_olmo_targets_and_lack_of_fit():
    table = read("olmo_ladder/final_c4.csv")
    target = {"N": np.array([6887575552.0, 13202396160.0]), "D": np.array([3.945e12, 5.0e12])}
    observed = np.array([2.5158, 2.4376])
    same = table.groupby(["N", "D"])["loss"]
    pairs = same.std()[same.size() == 2]
    assert len(pairs) == 5 and np.sqrt((pairs**2).mean()) == pytest.approx(0.00054, abs=5e-6)
    known = {
        ("chinchilla", 1e-3): (0.0054, [-1.3, -0.4]),
        ("chinchilla_gamma", LEAST_SQUARES): (0.0015, [-1.0, -0.9]),
    }
    fit = None
    for (law, delta), (rms, errors) in known.items():
        fit = fit_law(law, table, delta=delta, starts=STARTS)
        assert fit.converged, fit.status
        assert fit.rms == pytest.approx(rms, abs=1e-4)
        np.testing.assert_allclose(100 * (fit.predict(**target) / observed - 1), errors, atol=0.06)
        # About 30 and 8 times what replicates scatter.
        assert fit.rms * table["loss"].mean() > 7 * 0.00054
    assert fit is not None
    lack = lack_of_fit(fit)  # of the law that misses least
    assert lack.flagged and lack.misfit_sd > 10 * lack.replicate_sd
    assert lack.replicate_sd * table["loss"].mean() == pytest.approx(0.00054, rel=0.1)


# --- over-training: Gadre et al. 2024 (arXiv:2403.08540) --------------------------------------------------------------


def gadre(train_set: str) -> pd.DataFrame:
    table = read("gadre_overtraining/models_losses.csv")
    table = table[table["val"].str.contains("c4_val") & (table["train_set"] == train_set)]
    # As whole numbers 6 N D overflows 64 bits from 9.2e18 on.
    table = table.astype({"N": float, "D": float})
    return table.assign(C=6 * table["N"] * table["D"], M=(table["D"] / table["N"]).round())


@pytest.mark.parametrize(
    ("law", "held_out"), [("chinchilla_tied", 2.0), ("chinchilla", 2.3), ("chinchilla_gamma", 6.8)]
)
def test_gadre_hold_out(law, held_out):
    table = gadre("c4_original")
    small = (table["C"] <= 2e19).to_numpy()
    assert small.sum() == 22 and (~small).sum() == 12 and table["C"].max() == pytest.approx(5.7e21, rel=0.01)
    fit = fit_law(law, table, weights=small.astype(float), starts=STARTS)
    assert percent(fit.residuals()[~small]) == pytest.approx(held_out, abs=0.05)
    if law == "chinchilla_gamma":
        # It fits best in sample, by giving up the asymptote, and says so.
        assert "E on a bound" in fit.status
    else:
        assert fit.converged, fit.status


def test_gadre_extrapolations():
    """From their five runs of up to 5e18 FLOPs to 8e21: least squares of the loss itself, so weighted by its square."""
    table = gadre("rpj")
    small = (table["M"] == 20) & (table["N"] < 1e9) | table["name"].str.contains("d=96_l=8_h=4-16.0")
    weights = np.where(small, table["loss"] ** 2, 0.0)
    fit = fit_law("chinchilla_tied", table, weights=weights, delta=LEAST_SQUARES)
    assert fit.converged and fit.rows == 5
    for name, error in (("rpj-open_lm_1b-32.0", 0.71), ("rpj-open_lm_7b-1.0", 0.73)):
        row = table[table["name"] == name].iloc[0]
        assert 100 * abs(fit.predict(N=row["N"], D=row["D"]) / row["loss"] - 1) == pytest.approx(error, abs=5e-3)


# --- routed models: Clark et al. 2022 (arXiv:2202.01169) --------------------------------------------------------------


def test_routed_models():
    table = read("dm_routing/final_step.csv").rename(
        columns={"dense_parameter_count": "N", "num_experts": "experts", "loss_validation": "loss"}
    )
    options: dict[str, Any] = {"delta": LEAST_SQUARES, "starts": STARTS}
    whole = fit_law("routed", table, **options)
    assert len(table) == whole.rows == 223 and whole.converged
    # One law for three routers at all frequencies and k: 2%. One for each router where they are comparable: under 1%.
    assert percent(whole.residuals()) == pytest.approx(1.95, abs=0.01)
    comparable = (table["routing_frequency"] == 0.5) & (table["k"] == 1) & (table["seed"] == 42)
    fits = {}
    for router in ("S-Base", "RL-R", "Hash"):
        rows = comparable & table["router_type"].isin(["Dense", router])
        fits[router] = fit_law("routed", table, weights=rows.astype(float), **options)
        assert fits[router].converged and fits[router].rms < 0.0075
    # The README's S-Base coefficients are from memory. a, c and d come out; b trades against E_start and E_max, which it
    # does not name: with its four held the points are missed by .78% where free ones miss .74%.
    base = fits["S-Base"]
    known = {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104}
    for name, within in (("a", 0.0015), ("b", 0.0105), ("c", 0.0015), ("d", 0.01)):
        assert base.params[name] == pytest.approx(known[name], abs=within), name
    rows = comparable & table["router_type"].isin(["Dense", "S-Base"])
    held = fit_law("routed", table, weights=rows.astype(float), fixed=known, **options)
    assert base.rms < held.rms < 1.06 * base.rms
