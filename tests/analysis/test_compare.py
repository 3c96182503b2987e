"""Minima, noise, differences, verdicts and crossings on data whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import compare, noise
from analysis.compare import Difference
from analysis.crossing import COLUMNS, crossing, frontier, measured_draws
from analysis.fit import fit_law
from analysis.isoflop import Minimum, minima
from analysis.noise import Noise
from analysis.refusal import Refused
from analysis.resample import parametric_bootstrap
from synthetic import ALPHA, BETA, Arm, E, true_best, true_loss

BUDGETS = (4e10, 1.6e11, 6.4e11)


def table(arms, *, sd=0.003, seed=0, budgets=BUDGETS, factors=(0.3, 0.7, 1.5, 3.5), seeds=3, exact=None):
    """A frame as `load` makes it, with the columns that comparisons read."""
    rng, rows = np.random.default_rng(seed), []
    for name, arm in arms.items():
        for b, C in enumerate(budgets):
            N_all = np.geomspace(1e2, 1e9, 4001)
            centre = N_all[true_loss(arm, N_all, C).argmin()]
            for rung, factor in enumerate(factors):
                for replicate in range(seeds if (b, rung) == (len(budgets) // 2, 1) else 1):
                    N, noise_ = centre * factor, sd * rng.standard_normal()
                    rows.append(
                        {
                            "run_id": f"{name}-{b}-{rung}-{replicate}",
                            "arm": name,
                            "budget": C,
                            "rung": rung,
                            "replicate": replicate,
                            "status": "done",
                            "loss": true_loss(arm, N, C) + noise_,
                            "parameters_body": N,
                            "tokens_seen": C / (6 * N * arm.cost),
                            "flops_exact": C,
                            "flops_dense": 1.1 * C,
                            "flops_6nd": C / arm.cost,
                            "flops_textbook": C * arm.textbook,
                        }
                    )
    frame = pd.DataFrame(rows)
    frame.attrs["study"] = {"baseline": next(iter(arms)), "arms": dict.fromkeys(arms, "")}
    return frame


def answer(frame):
    found, seeds = minima(frame), noise.seed_noise(frame)
    return found, seeds, compare.differences(frame, found, seeds)


def test_minimum_of_an_exact_parabola():
    frame = table({"a": Arm()}, budgets=(1e11,), seeds=1)
    u = np.log(frame["parameters_body"] / 3e4)
    m = minima(frame.assign(loss=2.5 + 0.1 * (u - 0.3) ** 2))["a", 1e11]
    assert isinstance(m, Minimum)
    assert m.loss == pytest.approx(2.5) and pytest.approx(3e4 * np.exp(0.3)) == m.N
    assert m.residual_sum == pytest.approx(0, abs=1e-20) and m.residual_dof == 1
    assert sum(m.weights.values()) == pytest.approx(1.0)  # a shift of all losses shifts the minimum
    np.testing.assert_allclose(m.curve(np.array([m.N])), [m.loss])


def test_standard_error_of_a_minimum_is_that_of_simulation():
    clean = table({"a": Arm()}, budgets=(1e11,), sd=0.0)
    m, sd, rng = minima(clean)["a", 1e11], 0.002, np.random.default_rng(0)
    assert isinstance(m, Minimum)
    drawn = [
        minima(clean.assign(loss=clean["loss"] + sd * rng.standard_normal(len(clean))))["a", 1e11] for _ in range(400)
    ]
    assert np.std([d.loss for d in drawn]) == pytest.approx(sd * m.per_noise, rel=0.12)
    assert np.std([np.log(d.N) for d in drawn]) == pytest.approx(sd * m.log_N_per_noise, rel=0.12)


@pytest.mark.parametrize(
    ("loss", "sizes", "reason"),
    [
        (lambda u: 2.5 + 0.1 * (u - 9) ** 2, 4, "beyond the sizes that were run; add larger sizes"),
        (lambda u: 2.5 + 0.1 * (u + 9) ** 2, 4, "beyond the sizes that were run; add smaller sizes"),
        (lambda u: 2.5 - 0.1 * u**2, 4, "not convex"),
        (lambda u: 2.5 + 0.1 * u**2, 2, "2 sizes finished and a parabola needs 3"),
    ],
)
def test_minima_that_are_refused(loss, sizes, reason):
    frame = table({"a": Arm()}, budgets=(1e11,), seeds=1).head(sizes)
    u = np.log(frame["parameters_body"] / frame["parameters_body"].mean())
    refused = minima(frame.assign(loss=loss(u)))["a", 1e11]
    assert isinstance(refused, Refused) and reason in refused.reason


def test_noise_is_pooled_and_paired():
    frame = table({"base": Arm(), "arm": Arm()}, sd=0.0)
    cell = (frame["budget"] == BUDGETS[1]) & (frame["rung"] == 1)
    shift = np.where(cell, frame["replicate"] * 0.01, 0.0)  # shared by the arms: sd 0.01 each, 0 paired
    shared = frame.assign(loss=frame["loss"] + shift)
    found = noise.seed_noise(shared)
    assert isinstance(found, Noise)
    assert found.sd == pytest.approx(0.01) and found.dof == 4
    assert found.by_arm["arm"].sd == pytest.approx(0.01) and found.by_arm["arm"].dof == 2
    assert found.paired["arm"].sd == pytest.approx(0.0, abs=1e-12) and found.paired["arm"].dof == 2
    none = noise.seed_noise(frame[frame["replicate"] == 0])
    assert isinstance(none, Refused) and "add replicates" in none.reason
    still = noise.seed_noise(frame)
    assert isinstance(still, Refused) and "identical losses" in still.reason


def test_a_planted_difference_is_found_with_its_size():
    arms = {"base": Arm(), "better": Arm(A=23.0, B=38.0)}
    _, _, compared = answer(table(arms))
    for C in BUDGETS:
        d, truth = compared["better", C], true_best(arms["better"], C) - true_best(arms["base"], C)
        assert isinstance(d, Difference) and d.resolved and d.low < truth < d.high
    verdict = compare.verdict("better", "base", compared)
    assert verdict.kind == "A better" and verdict.sentence.startswith("better is better than base by 0.")
    assert "6.4e11 FLOPs" in verdict.sentence
    reverse = answer(table({"better": arms["better"], "base": arms["base"]}))[2]
    assert compare.verdict("base", "better", reverse).kind == "B better"


def test_arms_that_are_the_same_are_rarely_called_different():
    called, outside, repeats = 0, 0, 100
    arms = {"base": Arm(), "one": Arm(), "two": Arm()}
    clean = table(arms, sd=0.0)
    rng = np.random.default_rng(5)
    for _ in range(repeats):
        _, _, compared = answer(clean.assign(loss=clean["loss"] + 0.003 * rng.standard_normal(len(clean))))
        called += any(d.resolved for d in compared.values())
        outside += sum(not d.low <= 0 <= d.high for d in compared.values())
    # At most what a binomial of the nominal rate exceeds once in a thousand times.
    assert called <= stats.binom.ppf(0.999, repeats, 0.05)
    assert 0.02 * 6 * repeats <= outside <= 0.085 * 6 * repeats


def test_not_resolved_says_what_would_have_been():
    _, seeds, compared = answer(table({"base": Arm(), "arm": Arm(A=24.98)}, seed=3))
    verdict, d = compare.verdict("arm", "base", compared), compared["arm", BUDGETS[-1]]
    assert verdict.kind == "not resolved" and "80% power" in verdict.detail and "seeds" in verdict.detail
    assert isinstance(d, Difference) and isinstance(seeds, Noise)
    # The stated difference is found about that often: power from the noncentral t at Holm's first level.
    power = stats.nct.sf(stats.t.ppf(1 - 0.025 / 3, d.dof), d.dof, d.detectable / d.standard_error)
    assert power == pytest.approx(0.8, abs=0.06)


def test_the_same_runs_are_no_finding():
    frame = table({"base": Arm()})
    twin = pd.concat([frame, frame.assign(arm="twin")], ignore_index=True)
    twin.attrs["study"] = {"baseline": "base", "arms": {"base": "", "twin": ""}}
    _, seeds, compared = answer(twin)
    assert isinstance(seeds, Noise) and seeds.dof == 2  # not counted twice
    assert all(d.same_runs and d.value == 0 and not d.resolved for d in compared.values())
    assert "same runs" in compare.verdict("twin", "base", compared).sentence


def test_without_a_minimum_rungs_are_compared_and_named():
    arms = {"base": Arm(), "arm": Arm(A=23.0)}
    _, _, compared = answer(table(arms, factors=(3.0, 5.0, 8.0)))
    d = compared["arm", BUDGETS[-1]]
    assert isinstance(d, Difference) and d.basis.startswith("same rung (0)") and d.value < 0
    assert "at the same rung" in compare.verdict("arm", "base", compared).sentence
    frame = table(arms)
    frame.loc[frame["arm"] == "arm", ["status", "loss"]] = ["missing", np.nan]
    verdict = compare.verdict("arm", "base", answer(frame)[2])
    assert verdict.kind == "refused" and "0 sizes finished" in verdict.sentence


def crossing_arms(C_star):
    """`arm` has the steeper exponent, and an A at which the best losses are equal at C_star."""
    base, low, high = Arm(), 10.0, 100.0
    for _ in range(60):
        A = (low + high) / 2
        low, high = (A, high) if true_best(Arm(A=A, alpha=0.40), C_star) < true_best(base, C_star) else (low, A)
    return {"base": base, "arm": Arm(A=low, alpha=0.40)}


def test_a_planted_crossing_is_found_in_range():
    budgets = (1e9, 1e10, 1e11, 1e12)
    _, _, compared = answer(table(crossing_arms(3e10), budgets=budgets))
    verdict = compare.verdict("arm", "base", compared)
    assert verdict.kind == "crosses at" and "base is better than arm" in verdict.sentence
    assert verdict.at == pytest.approx(3e10, rel=0.35)
    C, gap = measured_draws(list(compared.values()))
    found = crossing(C, gap, arm="arm", baseline="base", budgets=budgets)
    assert found.low is not None and found.high is not None and found.median is not None
    # The interval is of noise; the budgets' spacing adds what interpolation misses.
    assert 1e10 < found.low < found.high < 1e11 and found.median == pytest.approx(3e10, rel=0.25)
    assert not found.extrapolated and found.none_in_range == 0.0
    assert found.better[1e9] == 0.0 and found.better[1e12] == 1.0


def around(budgets):
    """Every budget, and compute from a tenth of the least to ten times the largest."""
    return np.unique(np.concatenate([np.geomspace(min(budgets) / 10, max(budgets) * 10, 161), budgets]))


def test_a_planted_crossing_is_found_from_fits():
    budgets = tuple(np.geomspace(1e8, 1e14, 5))
    frame = table(crossing_arms(1e11), budgets=budgets, sd=0.002)
    C, curves = around(budgets), {}
    for seed, (arm, rows) in enumerate(frame.groupby("arm")):
        fit = fit_law("chinchilla", rows, columns=COLUMNS)
        draws = parametric_bootstrap(fit, sd=0.002, clusters=rows["run_id"], draws=100, seed=seed)
        assert fit.converged
        curves[arm] = frontier(draws, frame, arm, C)
    found = crossing(C, curves["arm"] - curves["base"], arm="arm", baseline="base", budgets=budgets)
    assert found.low is not None and found.high is not None and found.low < 1e11 < found.high
    assert found.high < 1.5 * found.low
    assert not found.extrapolated and "extrapolation" not in str(found)
    assert found.better[budgets[0]] == 0.0 and found.better[budgets[-1]] == 1.0


def test_frontier_is_the_least_loss():
    arms = {"base": Arm(), "arm": Arm(A=28.0, cost=0.9)}
    frame = table(arms, sd=0.0)
    fit = fit_law("chinchilla_by_arm", frame, columns=COLUMNS)
    assert fit.params["alpha"] == pytest.approx(ALPHA, rel=1e-5) and fit.params["beta"] == pytest.approx(BETA, rel=1e-5)
    assert fit.params["E"] == pytest.approx(E, rel=1e-5)
    for name, arm in arms.items():
        best = frontier(fit, frame, name, BUDGETS)
        np.testing.assert_allclose(best, [true_best(arm, C) for C in BUDGETS], atol=3e-4)


def test_crossings_that_are_open_or_beyond_say_so():
    C = around([1e10, 1e12])
    x = np.log(C / 1e12)[None, :]
    beyond = crossing(
        C, x - np.log(3) + np.linspace(-0.1, 0.1, 50)[:, None], arm="a", baseline="b", budgets=[1e10, 1e12]
    )
    assert beyond.extrapolated and beyond.median == pytest.approx(3e12, rel=0.05) and beyond.none_in_range == 1.0
    assert "extrapolation" in str(beyond)
    half = crossing(C, x + np.linspace(-3, 3, 50)[:, None], arm="a", baseline="b", budgets=[1e10, 1e12])
    assert half.high is None and half.low is not None and "above the searched range" in str(half)
    never = crossing(C, x * 0 - 1 - np.linspace(0, 1, 20)[:, None], arm="a", baseline="b", budgets=[1e10, 1e12])
    assert never.median is None and never.better == {1e10: 1.0, 1e12: 1.0}


def test_another_count_of_flops_can_turn_the_answer():
    # The arm is 0.02 nats better at equal exact FLOPs and spends 1.6 times the textbook's.
    arms = {"base": Arm(), "arm": Arm(A=24.3, B=39.5, textbook=1.6)}
    frame = table(arms, sd=0.001)
    found, _, compared = answer(frame)
    read = {r.convention: r for r in compare.readings(frame, found, compared)}
    assert read["exact"].reads == "A better" and not read["exact"].flips and read["exact"].beyond == pytest.approx(1)
    assert not read["dense"].flips and read["dense"].value == pytest.approx(read["exact"].value, abs=1e-9)
    assert read["textbook"].reads == "B better" and read["textbook"].flips
    assert read["textbook"].beyond == pytest.approx(1.6, rel=1e-6)
