"""Best rates, their intervals, and rules through them, against formulas and small fits made here."""

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sweeps.ladder import LAB_COEFFICIENT, LAB_EXPONENT, Size
from sweeps.tune import transfer
from sweeps.tune.optima import Edge, Optimum, TrialNoise, around_best, optimum, trial_noise
from sweeps.tune.transfer import Point

POINTS = Path(__file__).parents[2] / "docs" / "learning-rate.csv"
GRID = (0.005, 0.01, 0.02, 0.04, 0.08)
KNOWN = TrialNoise(sd=0.01, dof=math.inf, source="declared")


def best(rates, losses, **about) -> Optimum:
    found = optimum(rates, losses, **about)
    assert isinstance(found, Optimum)
    return found


# --- one cell -------------------------------------------------------------------------------------------------------


@given(st.floats(0.011, 0.039), st.floats(0.01, 10.0), st.floats(0.5, 5.0), st.permutations(range(5)))
def test_a_parabola_in_log_rate_is_found_exactly_in_any_order(rate, curvature, least, order):
    losses = [least + curvature * math.log(r / rate) ** 2 for r in GRID]
    found = best([GRID[i] for i in order], [losses[i] for i in order])
    assert found.rate == pytest.approx(rate, rel=1e-6) and found.loss == pytest.approx(least, abs=1e-8)
    assert found.curvature == pytest.approx(curvature, rel=1e-6) and not found.cliff
    assert found.excess(0.02) == pytest.approx(curvature * math.log(0.02 / rate) ** 2, abs=1e-8)


def test_a_best_rate_at_an_edge_is_no_optimum():
    for losses, side, rate in (([1.0, 2, 3, 4, 5], "lower", 0.005), ([5.0, 4, 3, 2, 1], "upper", 0.08),
                               ([1.0, 1, 1, 1, 1], "lower", 0.005)):  # fmt: skip
        found = optimum(GRID, losses)
        assert isinstance(found, Edge) and (found.side, found.rate) == (side, pytest.approx(rate))


def test_a_trial_that_diverged_is_infinitely_bad_and_not_missing():
    found = best(GRID, [3.0, 2.0, 1.0, math.inf, math.inf], noise=KNOWN)
    assert found.cliff and found.rate == pytest.approx(0.02) and found.curvature is None
    assert (found.low, found.high) == (pytest.approx(0.01), pytest.approx(0.04))
    assert isinstance(optimum(GRID[:3], [3.0, 2.0, 1.0]), Edge), "left out, the best would seem to lie at the edge"
    assert found.excess(0.01) == pytest.approx(1.0) and found.excess(0.02) == 0.0
    assert found.excess(0.03) == math.inf and found.excess(1.0) == math.inf and math.isnan(found.excess(0.001))
    unlucky = best(GRID, [math.inf, 1.0, 2.0, 3.0, 4.0])
    assert not unlucky.cliff and unlucky.rate == pytest.approx(0.01), "the rate below diverged: it bounds nothing"
    assert (unlucky.low, unlucky.high) == (None, pytest.approx(0.02))
    alone = optimum(GRID, [math.inf] * 5)
    assert isinstance(alone, Edge) and alone.side == "lower", "rates that all diverge are too high"
    with pytest.raises(ValueError, match="diverged is inf, not missing"):
        optimum(GRID, [3.0, 2.0, 1.0, math.nan, 2.0])


def test_beyond_the_best_rates_neighbours_the_loss_is_interpolated():
    found = best(GRID, [4.0, 1.2, 1.0, 1.2, 3.2])
    assert found.excess(math.sqrt(0.04 * 0.08)) == pytest.approx(2.2 - found.loss)
    assert found.excess(0.08) == pytest.approx(3.2 - found.loss) and math.isnan(found.excess(0.0801))


def simulated(count: int, noise: float, replicates: int, *, declared: bool):
    """Intervals of `count` cells with a known best rate; seeds shift whole cells, which moves no best rate."""
    rng = np.random.default_rng(7)
    truth = 0.02 * 2 ** rng.uniform(-0.5, 0.5, count)
    curves = 0.3 * np.log(np.array(GRID)[:, None] / truth) ** 2
    losses = curves[..., None] + noise * rng.standard_normal((len(GRID), count, replicates))
    losses = losses + 0.5 * rng.standard_normal((1, count, replicates))
    for cells in np.split(np.arange(count), count // 6):
        about = [losses[i - 1 : i + 2, c] for c in cells if 0 < (i := int(losses[:, c].mean(-1).argmin())) < 4]
        known = TrialNoise(sd=noise, dof=math.inf, source="declared") if declared else trial_noise(about)
        for c in cells:
            found = optimum(GRID, losses[:, c].mean(-1).tolist(), noise=known, replicates=replicates)
            if isinstance(found, Optimum):
                yield truth[c], found


@pytest.mark.parametrize(("declared", "replicates", "noise"), [(True, 1, 0.02), (False, 2, 0.02), (False, 3, 0.05)])
def test_intervals_of_best_rates_cover(declared, replicates, noise):
    """3,000 cells: 95% or a little more, with the noise known, or pooled over the seeds of six cells."""
    inside = [
        (found.low is None or found.low <= rate) and (found.high is None or rate <= found.high)
        for rate, found in simulated(3000, noise, replicates, declared=declared)
    ]
    assert len(inside) > 2900
    assert 0.935 < np.mean(inside) < 0.97, np.mean(inside)


def test_an_interval_is_open_where_the_noise_hides_the_parabola_and_narrows_with_seeds():
    losses = [1.3, 1.02, 1.0, 1.02, 1.4]
    hidden = TrialNoise(sd=0.1, dof=math.inf, source="declared")
    assert (best(GRID, losses, noise=hidden).low, best(GRID, losses, noise=hidden).high) == (None, None)
    one, four = (best(GRID, [1.3, 1.1, 1.0, 1.12, 1.4], noise=KNOWN, replicates=r) for r in (1, 4))
    widths = [math.log(found.high / found.low) for found in (one, four)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.05)


def test_noise_is_what_rate_and_seed_leave_over():
    """The residual of a two-way layout, here by least squares on indicators."""
    rng = np.random.default_rng(3)
    cells = [rng.normal(size=(3, 4)) + rng.normal(size=(1, 4)) for _ in range(5)]
    squares = 0.0
    for loss_3r in cells:
        X = np.array([np.r_[np.eye(3)[i], np.eye(4)[j]] for i, j in itertools.product(range(3), range(4))])
        rest = loss_3r.ravel() - X @ np.linalg.lstsq(X, loss_3r.ravel(), rcond=None)[0]
        squares += float(rest @ rest)
    found = trial_noise(cells)
    assert found is not None and found.dof == 5 * 2 * 3
    assert found.sd == pytest.approx(math.sqrt(squares / found.dof))
    assert trial_noise([np.ones((3, 1))]) is None, "one seed shows none"
    lost = np.array([[5.0, 6], [1, 2], [math.inf, 3], [9, 9]])
    assert around_best(lost) is not None and np.array_equal(around_best(lost), lost[:2]), (
        "a rate that diverged shows none"
    )
    assert around_best(lost[1:]) is None, "at an edge"


# --- rules ----------------------------------------------------------------------------------------------------------


def point(size: float, tokens: float, rate: float) -> Point:
    return Point(size=Size(body_flops=size, body_parameters=int(size), tokens=tokens), rate=rate)


def law_points(c: float, a: float, b: float, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Four sizes at two budgets, as a tuning has them."""
    rng = np.random.default_rng(seed)
    cells = [(size, C / size**0.8) for C in (1e9, 4e9) for size in (9e3, 2e4, 4e4, 8e4)]
    return [point(s, t, c * s**a * t**b * math.exp(noise * rng.normal())) for s, t in cells]


@given(st.floats(0.01, 1e3), st.floats(-1, 1), st.floats(-1, 1))
def test_a_power_law_of_size_and_tokens_is_found(c, a, b):
    points = law_points(c, a, b)
    columns = transfer.determined([points, points])
    law = transfer.fit(points, columns)
    assert columns == ("size", "tokens") and law.dof == 5 and law.rss < 1e-16
    assert (law.exponent("size"), law.exponent("tokens")) == (pytest.approx(a, abs=1e-8), pytest.approx(b, abs=1e-8))
    assert law.c == pytest.approx(c, rel=1e-6)
    assert law.rate(points[3].size) == pytest.approx(points[3].rate)


def test_what_cells_do_not_determine_is_not_fitted():
    at_one_budget = [point(s, 1e9 / s, 0.01) for s in (1e4, 2e4, 4e4, 8e4)]
    one_size = [point(1e4, t, 0.01) for t in (1e5, 2e5, 4e5)]
    assert transfer.determined([at_one_budget]) == ("size",)
    assert transfer.determined([one_size]) == ("tokens",)
    assert transfer.determined([law_points(1, 0, 0)[:3]]) == ("size",), "three cells for three coefficients"
    assert transfer.determined([law_points(1, 0, 0), at_one_budget]) == ("size",), "one form for all arms"
    assert transfer.determined([one_size[:1]]) == ()
    assert transfer.fit(one_size[:1], ()).rate(at_one_budget[2].size) == pytest.approx(0.01)


@pytest.mark.parametrize("misfit", [0.0, 0.3], ids=["none", "of cells"])
def test_intervals_of_own_rules_cover_and_pool_the_scatter_over_arms(misfit):
    inside, seen, rng = [], [], np.random.default_rng(11)
    for seed in range(600):
        off = np.exp(rng.normal(0, misfit, 8))  # of each cell, for all arms
        arms = [law_points(3.0, -0.4, 0.1, 0.2, 10 * seed + arm) for arm in range(4)]
        laws = [transfer.fit([replace(p, rate=p.rate * e) for p, e in zip(points, off, strict=True)], ("size", "tokens"))
                for points in arms]  # fmt: skip
        scatter = transfer.pooled_scatter(laws)
        assert scatter.dof == 5, "of one arm"
        far = Size(body_flops=2e5, body_parameters=1, tokens=1e7)
        for law in laws:
            away = math.log(law.rate(far) / (3.0 * 2e5**-0.4 * 1e7**0.1))
            inside.append(abs(away) <= scatter.t * law.log_sd(far, scatter.sd))
        seen.append(scatter.sd**2)
    assert 0.94 < np.mean(inside) < 0.99 and math.sqrt(np.mean(seen)) == pytest.approx(
        math.hypot(0.2, misfit), rel=0.04
    )


def test_arms_are_told_apart_within_cells():
    """Both F tests as made here, with an indicator for each arm and each cell."""
    arms = {
        name: law_points(c, -0.4, 0.1, 0.1, seed) for name, c, seed in (("a", 3.0, 1), ("b", 5.0, 2), ("c", 4.0, 3))
    }
    found = transfer.laws_of(arms, ("size", "tokens"))
    points = [p for of_arm in arms.values() for p in of_arm]
    y = np.log([p.rate for p in points])
    x = np.array([[math.log(p.size.body_flops), math.log(p.size.tokens)] for p in points])
    arm, cell = np.arange(24)[:, None] // 8 == np.arange(3), np.arange(24)[:, None] % 8 == np.arange(8)
    shared, own = np.hstack([arm, x]), np.hstack([arm[:, [i]] * x for i in range(3)])

    def left(*blocks):
        X = np.hstack(blocks).astype(float)
        return float(((y - X @ np.linalg.pinv(X) @ y) ** 2).sum()), 24 - np.linalg.matrix_rank(X)

    for nested, (few, dof_few), (many, dof) in (
        (found.exponents_differ, left(cell, arm, x), left(cell, arm, own)),
        (found.rules_differ, left(cell, x), left(cell, arm, x)),
    ):
        F = (few - many) / (dof_few - dof) / (many / dof)
        assert pytest.approx(F) == nested.F and nested.p == pytest.approx(stats.f.sf(F, dof_few - dof, dof))
    beta = np.linalg.lstsq(shared.astype(float), y, rcond=None)[0]
    assert found.shared and [found.of[name].c for name in arms] == pytest.approx(np.exp(beta[:3]))
    assert found.of["a"].exponents == found.of["c"].exponents == pytest.approx(beta[3:])
    alone = transfer.laws_of({"a": arms["a"]}, ("size", "tokens"))
    assert math.isnan(alone.exponents_differ.p) and math.isnan(alone.rules_differ.p) and not alone.shared


@pytest.mark.parametrize("misfit", [0.0, 0.3], ids=["none", "of cells"])
def test_what_a_cell_does_to_all_arms_is_no_evidence_about_any(misfit):
    """Ten arms of one law, in cells that lie off it for all of them: neither test is misled, and the intervals of the common rule
    cover the law at another size."""
    rng, inside, told = np.random.default_rng(5), 0, np.zeros(2)
    far, truth = Size(body_flops=2e5, body_parameters=1, tokens=1e7), math.log(3.0 * 2e5**-0.4 * 1e7**0.1)
    for _ in range(300):
        off = rng.normal(0, misfit, 8)
        arms = {
            str(arm): [replace(p, rate=p.rate * math.exp(e)) for p, e in zip(points, off, strict=True)]
            for arm in range(10)
            for points in [law_points(3.0, -0.4, 0.1, 0.1, int(rng.integers(2**31)))]
        }
        found = transfer.laws_of(arms, ("size", "tokens"))
        told += [found.exponents_differ.p < 0.05, found.rules_differ.p < 0.05]
        law, scatter = found.of["0"], found.scatter
        if found.shared:
            inside += abs(math.log(law.rate(far)) - truth) <= scatter.t * law.log_sd(far, scatter.sd)
    assert (told <= 26).all(), "a rate of 5% shows 27 or more of 300 in less than 1 of 250"
    assert inside >= 0.9 * (300 - told[0]), "95% shows fewer in less than 1 of 1,000"


def test_exponents_are_an_arms_own_where_they_differ():
    arms = {"a": law_points(3.0, -0.4, 0.1, 0.02, 1), "b": law_points(3.0, -0.1, 0.1, 0.02, 2)}
    found = transfer.laws_of(arms, ("size", "tokens"))
    assert not found.shared and found.of["b"].exponents == transfer.fit(arms["b"], ("size", "tokens")).exponents


def test_the_default_rule_is_that_of_the_committed_points():
    """docs/learning-rate.csv, refitted: 0.5301 x^-0.3314 over both arms, as docs/learning-rate.md has it for each."""
    cells: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with POINTS.open() as file:
        for row in csv.DictReader(file):
            key = (row["arm"], float(row["body_flops_per_token"]))
            cells.setdefault(key, []).append((float(row["learning_rate"]), float(row["loss"])))
    points: dict[str, list[Point]] = {}
    for (arm, size), measured in cells.items():
        points.setdefault(arm, []).append(point(size, 1e6, best(*zip(*measured, strict=True)).rate))
    assert transfer.determined(list(points.values())) == ("size",)
    law = transfer.fit([p for of_arm in points.values() for p in of_arm], ("size",))
    assert (law.c, law.exponents[0]) == (
        pytest.approx(LAB_COEFFICIENT, abs=5e-5),
        pytest.approx(LAB_EXPONENT, abs=5e-5),
    )
    own = {arm: transfer.fit(of_arm, ("size",)) for arm, of_arm in points.items()}
    assert (own["encoder_decoder"].c, own["encoder_decoder"].exponents[0]) == pytest.approx((0.805, -0.378), abs=5e-4)
    assert (own["decoder_only"].c, own["decoder_only"].exponents[0]) == pytest.approx((0.301, -0.269), abs=5e-4)
