"""Influence and lack of fit against deleting rows and an F test by hand."""

import numpy as np
import pytest
from scipy import stats

from analysis.diagnose import influence, lack_of_fit
from analysis.fit import LEAST_SQUARES, fit_law
from analysis.refusal import Refusal
from analysis.robust import OUTLIER_RULES, huber_delta, weighted_median


def replicated(bend=0.0, noise=0.004, seed=0):
    rng = np.random.default_rng(seed)
    C = np.geomspace(1e15, 1e21, 8).repeat(3)
    x = np.log(C / 1e18)
    return {"C": C, "loss": np.exp(1 - 0.05 * x + bend * x**2 + noise * rng.standard_normal(24))}


def test_influence_is_what_deleting_does():
    table = replicated()
    table["loss"][5] *= 1.08
    fit = fit_law("power_law", table, delta=LEAST_SQUARES)
    found = influence(fit, [f"run{i}" for i in range(24)], quantities={"double": lambda p: 2 * p["gamma"]})
    assert found.names[0] == "run5" and found.largest("gamma").startswith("without run5, gamma moves by ")
    without = {name: np.delete(value, 5) for name, value in table.items()}
    deleted = fit_law("power_law", without, delta=LEAST_SQUARES).params["gamma"]
    assert found.moves["gamma"][0] == pytest.approx(deleted - fit.params["gamma"], rel=1e-6)
    assert found.moves["double"][0] == pytest.approx(2 * found.moves["gamma"][0])
    with pytest.raises(Refusal, match="0 rows are left"):
        influence(fit, ["all"] * 24)


def test_lack_of_fit_is_the_textbook_test():
    table = replicated()
    found = lack_of_fit(fit_law("power_law", table, delta=LEAST_SQUARES))
    x, y = np.log(table["C"]), np.log(table["loss"])
    line = np.polyval(np.polyfit(x, y, 1), x)
    means = y.reshape(8, 3).mean(axis=1).repeat(3)
    F = (((means - line) ** 2).sum() / 6) / (((y - means) ** 2).sum() / 16)
    assert pytest.approx(F, rel=1e-6) == found.F and found.dof == (6, 16)
    assert found.p == pytest.approx(stats.f.sf(F, 6, 16)) and not found.flagged
    assert found.replicate_sd == pytest.approx(0.004, rel=0.4)
    bent = lack_of_fit(fit_law("power_law", replicated(bend=0.002)))
    assert bent.flagged and "misses by more" in str(bent) and bent.misfit_sd > 2 * bent.replicate_sd


def test_lack_of_fit_needs_replicates():
    C = np.geomspace(1e15, 1e21, 12)
    fit = fit_law("power_law", {"C": C, "loss": 9 * C**-0.03 + 0.01 * np.sin(C)})
    with pytest.raises(Refusal, match="no two rows are replicates"):
        lack_of_fit(fit)


def test_weighted_medians_and_delta():
    rng = np.random.default_rng(0)
    values, counts = rng.standard_normal((4, 31)), rng.integers(0, 4, (4, 31)).astype(float)
    for row, count, median in zip(values, counts, weighted_median(values, counts), strict=True):
        repeated = np.sort(np.repeat(row, count.astype(int)))
        assert median == repeated[(len(repeated) + 1) // 2 - 1]
    normal = 0.02 * rng.standard_normal((1, 4001))
    assert huber_delta(normal, np.ones_like(normal), 0, 1e-3)[0] == pytest.approx(1.345 * 0.02, rel=0.05)
    assert huber_delta(1e-9 * normal, np.ones_like(normal), 0, 1e-3)[0] == 1e-3


def test_outlier_rules():
    residual = np.r_[np.linspace(-1, 1, 99), 40.0][None]
    ones = np.ones_like(residual)
    for name in ("beyond_3_sd", "beyond_4_sd"):
        assert (~OUTLIER_RULES[name](residual, ones, residual)).nonzero()[1].tolist() == [99]
    highest = OUTLIER_RULES["five_highest_losses"]
    loss = np.arange(20.0)[None]
    assert (~highest(loss, np.ones_like(loss), loss)).nonzero()[1].tolist() == [15, 16, 17, 18, 19]
    twice = np.ones((1, 20))
    twice[0, 19] = 2  # drawn twice, it is two of the five
    assert (~highest(loss, twice, loss)).nonzero()[1].tolist() == [16, 17, 18, 19]
