"""Hold-out scores, the choice of a law by them, and averages, against hand-made hold-outs and the published data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit import fit_law
from analysis.laws import Law, Parameter
from analysis.refusal import Refusal, Refused
from analysis.resample import Draws, cluster_bootstrap
from analysis.score import Candidate, Cut, Score, scores
from analysis.selection import LawAverage, Selection, law_average, select

DATA = Path(__file__).parents[3] / "shared" / "data"
NOISE = 0.004
CUTS = (4e18, 3e19)
WRONG = Candidate(law="chinchilla", name="wrong", options={"fixed": {"alpha": 0.34, "beta": 0.15}})
FIXED = Candidate(law="chinchilla", name="right", options={"fixed": {"alpha": 0.34, "beta": 0.28}})


def loss(N, D, E=1.69, A=406.4):
    return E + A * N**-0.34 + 410.7 * D**-0.28


def isoflops(noise=NOISE, seed=0, A=406.4):
    """Seven budgets 3.2 times apart, six sizes each."""
    rng, rows = np.random.default_rng(seed), []
    for C in np.geomspace(1e18, 1e21, 7):
        best = 1.345 * (C / 6) ** 0.4516  # of the planted law: (alpha A / (beta B))^(1 / (alpha + beta)) (C / 6)^a
        for N in best * np.geomspace(0.2, 5, 6):
            rows.append(
                {"N": N, "D": C / 6 / N, "C": C, "loss": loss(N, C / 6 / N, A=A) * np.exp(noise * rng.normal())}
            )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found():
    return scores([FIXED, WRONG], isoflops(), cuts=CUTS, horizon=100.0, draws=200)


def by_hand(table, cut, until, **options):
    """The table is cut, the law fitted to what is left, and its errors taken: no weights."""
    fit = fit_law("chinchilla", table[table["C"] <= cut], **options)
    held = table[(table["C"] > cut) & (table["C"] <= until)]
    return np.log(fit.predict(N=held["N"], D=held["D"])) - np.log(held["loss"].to_numpy()), fit


def test_a_cut_is_the_hold_out_that_one_does_by_hand(found):
    for score, candidate in zip(found, (FIXED, WRONG), strict=True):
        for cut in score.cuts:
            error, fit = by_hand(isoflops(), cut.C, cut.until, **candidate.options)
            assert cut.trained == fit.rows and cut.held_out == len(error)
            np.testing.assert_allclose(cut.log_error_h, error, atol=1e-7)
            assert cut.error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
            assert cut.bias == pytest.approx(error.mean(), abs=1e-7)
            assert cut.train_error == pytest.approx(fit.rms, rel=1e-4)
        assert score.error == pytest.approx(np.sqrt(np.mean([cut.error**2 for cut in score.cuts])))


def test_only_the_next_decade_is_scored_and_compute_may_be_left_out():
    table = isoflops()
    (one,) = scores([FIXED], table.drop(columns="C"), cuts=[4e18], draws=0)
    assert one.cuts[0].held_out == 2 * 6  # 1e19 and 3.2e19 of the budgets 3.2 times apart
    assert one.cuts[0].until == 4e19 and np.isnan(one.coverage)
    same = scores([FIXED], table.rename(columns={"N": "n", "D": "d", "C": "c"}), cuts=[4e18], draws=0,
                  columns={"N": "n", "D": "d", "C": "c"})[0]  # fmt: skip
    assert same.error == pytest.approx(one.error, rel=1e-6)


def test_default_cuts_lie_at_budgets_and_leave_enough_on_both_sides():
    table = isoflops()
    (one,) = scores([FIXED], table, draws=0)
    C = np.unique(table["C"])
    assert 2 <= len(one.cuts) <= 5
    assert all(np.isclose(cut.C, C).any() and cut.held_out >= 6 and cut.trained >= 12 for cut in one.cuts)


def test_new_run_intervals_cover_new_runs_and_mean_curves_do_not():
    coverage = {"new run": [], "mean curve": []}
    for seed in range(8):
        for kind, values in coverage.items():
            (one,) = scores([FIXED], isoflops(seed=seed), cuts=[1e20], horizon=20.0, draws=200, interval=kind)
            assert one.interval.startswith(kind)
            values.append(one.coverage)
            if kind == "new run":
                # Four standard deviations of the noise, and the curve's own.
                assert 3 * NOISE < one.width < 8 * NOISE
    # 144 held-out runs; those of one data set share the error of its curve.
    assert np.mean(coverage["new run"]) > 0.87 and np.mean(coverage["mean curve"]) < 0.75


def test_regret_is_the_compute_that_a_wrong_optimum_wastes():
    """alpha = .1, beta = .5 make N* grow almost as C, not as C^.45: what that costs follows from the planted law."""
    lured = Candidate(law="chinchilla", name="lured", options={"fixed": {"alpha": 0.1, "beta": 0.5}})
    right, wrong = scores([FIXED, lured], isoflops(noise=0.0), cuts=[3e19], horizon=100.0, draws=0)
    _, fit = by_hand(isoflops(noise=0.0), 3e19, 3e21, **lured.options)
    table, wasted, grid = isoflops(noise=0.0), [], np.geomspace(1e6, 1e12, 60001)
    for C, rows in table[table["C"] > 3e19].groupby("C"):
        N_hat = grid[fit.predict(N=grid, D=C / 6 / grid).argmin()]
        N_hat = np.clip(N_hat, rows["N"].min(), rows["N"].max())
        cheaper = np.geomspace(C / 30, C, 300)
        least = np.array([loss(grid[::60], c / 6 / grid[::60]).min() for c in cheaper])
        wasted.append(C / np.interp(-loss(N_hat, C / 6 / N_hat), -least, cheaper) - 1)
    assert np.mean(wasted) > 0.05
    assert wrong.regret == pytest.approx(np.mean(wasted), rel=0.1)
    assert right.regret == pytest.approx(0, abs=0.005)


def test_arms_are_ranked():
    arms = {"a": 406.4, "b": 450.0, "c": 500.0}
    table = pd.concat([isoflops(seed=i, A=A).assign(arm=name) for i, (name, A) in enumerate(arms.items())])
    separate = Candidate(
        law="chinchilla", name="separate", options={"fixed": FIXED.options["fixed"], "per_arm": ("A",)}
    )
    apart, pooled = scores([separate, FIXED], table, cuts=[3e19], horizon=100.0, draws=0)
    assert apart.rank_agreement == 1.0
    assert pooled.rank_agreement == 0.5  # it knows no arms, and their sizes are the same: all ties
    assert np.isnan(scores([FIXED], isoflops(), cuts=[3e19], draws=0)[0].rank_agreement)


def test_a_law_that_fails_is_kept_with_its_reason(found):
    # At the first cut its column has two values.
    needs_three = Law(
        name="in_C", formula="A C^-g", source="", columns=("C",), distinct=(("C", 3),),
        predict=lambda p, x: p["A"] * x["C"] ** -p["g"],
        parameters=(Parameter(name="A", start=(1, 100)), Parameter(name="g", start=(0.01, 0.2))),
    )  # fmt: skip
    (late,) = scores([needs_three], isoflops(), cuts=CUTS, horizon=100.0, draws=0)
    assert len(late.cuts) == 2 and "needs 3 distinct values of C and has 2" in late.failures[0]
    assert np.isnan(late.cuts[0].error) and np.isfinite(late.cuts[1].error)
    # An exponent that the data push to its bound still predicts, and is reported.
    bound = Candidate(law=replace(needs_three, name="bound", distinct=(), parameters=(
        Parameter(name="A", start=(1, 100)), Parameter(name="g", start=(0.2, 0.3), bounds=(0.2, 0.3)))))  # fmt: skip
    (held,) = scores([bound], isoflops(), cuts=CUTS, horizon=100.0, draws=0)
    assert len(held.failures) == 2 and "on a bound" in held.failures[0] and np.isfinite(held.error)
    chosen = select([*made(right=0.01, wrong=0.03), *map(like, (late, held))])
    assert isinstance(chosen, Selection) and set(chosen.failed) == {"in_C", "bound"}
    assert "no law was fitted at every cut" in select([late]).reason
    with pytest.raises(Refusal, match="no law was fitted"):
        law_average([late], {})


def like(score):
    """A score beside those of `made`: only its failures are read."""
    return replace(score, block_n=np.arange(48) // 6)


def made(seed=0, cuts=2, blocks=8, **errors):
    """Scores with held-out errors drawn for each law: six rows in each block, all held out at every cut."""
    rng, rows, out = np.random.default_rng(seed), np.arange(6 * blocks), []
    for name, sd in errors.items():
        done = []
        for c in range(cuts):
            error = sd * rng.standard_normal(len(rows))
            done.append(
                Cut(C=10.0**c, until=1e3, trained=9, held_out=len(rows), error=float(np.sqrt(np.mean(error**2))),
                    rows_h=rows, log_error_h=error)
            )  # fmt: skip
        out.append(Score(law=name, cuts=tuple(done), interval="", level=0.95, block_n=rows // 6))
    return out


def test_select_takes_the_better_law(found):
    table = isoflops()
    rolled = scores([WRONG, FIXED], table, draws=0)
    chosen = select(rolled)
    assert isinstance(chosen, Selection) and chosen.law == "right"
    (second,) = chosen.runner_ups
    assert second.law == "wrong" and 0 < second.low < second.excess < second.high
    assert second.excess == pytest.approx(rolled[0].error - rolled[1].error)


def test_select_refuses_ties_and_single_cuts():
    tie = select(made(one=0.02, two=0.0202, far=0.08))
    assert isinstance(tie, Refused) and "no more than its noise" in tie.reason and "far" not in tie.reason
    assert "one cut" in select(made(cuts=1, one=0.01, two=0.03)).reason
    assert "within 2 doublings" in select(made(blocks=2, one=0.01, two=0.03)).reason
    # Of laws that are equally good, one is called better at most about as often as the level allows.
    called = sum(isinstance(select(made(seed=seed, blocks=20, one=0.02, two=0.02)), Selection) for seed in range(100))
    assert called <= 14  # 99% binomial band of a nominal 5%, and a little for the bootstrap of 20 blocks


def test_law_average_is_the_mixture():
    rng = np.random.default_rng(0)
    table = isoflops()
    fit = fit_law("chinchilla", table, fixed=FIXED.options["fixed"])
    real = cluster_bootstrap(fit, clusters=range(len(table)), draws=300)
    other = replace(real, params={**real.params, "E": real.params["E"] + 0.3})
    found = made(one=0.02, two=0.024)
    average = law_average(found, {"one": real, "two": other})
    # error^-blocks, by hand
    expected = np.array([found[0].error, found[1].error]) ** -8.0
    np.testing.assert_allclose(list(average.weights.values()), expected / expected.sum())
    # The mixture by sampling from it.
    N, D = np.array([1e9, 1e10]), np.array([2e10, 2e11])
    values = [one.predict(N=N, D=D) for one in (real, other)]
    picks = rng.choice(2, p=list(average.weights.values()), size=200_000)
    sampled = np.stack(values)[picks, rng.integers(300, size=len(picks))]
    median, low, high = average.predict(N=N, D=D, level=0.9)
    np.testing.assert_allclose(low, np.quantile(sampled, 0.05, axis=0), atol=1e-3)
    np.testing.assert_allclose(high, np.quantile(sampled, 0.95, axis=0), atol=1e-3)
    np.testing.assert_allclose(median, np.quantile(sampled, 0.5, axis=0), atol=1e-3)
    # Laws that disagree make the interval wider than either's own; one that is far worse has no say.
    assert ((high - low) > 2 * (np.quantile(values[0], 0.95, axis=0) - np.quantile(values[0], 0.05, axis=0))).all()
    alone = law_average(made(one=0.01, two=0.2), {"one": real, "two": other})
    assert alone.weights["one"] > 1 - 1e-6
    E = alone.of(lambda draws: draws.params["E"], level=0.9)
    np.testing.assert_allclose(E[1:], real.intervals(0.9)["E"], atol=2e-3)
    wider = alone.predict(N=N, D=D, new_run=True)
    assert ((wider[2] - wider[1]) > (alone.predict(N=N, D=D)[2] - alone.predict(N=N, D=D)[1])).all()
    with pytest.raises(ValueError, match="'two' is missing"):
        law_average(found, {"one": real})
    assert isinstance(average, LawAverage) and isinstance(average.draws["one"], Draws)


def test_bad_input_says_what_to_do():
    table = isoflops()
    with pytest.raises(ValueError, match="one label each"):
        scores(["chinchilla", "chinchilla"], table)
    with pytest.raises(ValueError, match="horizon = 1"):
        scores(["chinchilla"], table, horizon=1.0)
    with pytest.raises(ValueError, match="did you mean"):
        scores(["chinchila"], table)
    with pytest.raises(ValueError, match="clusters has 3"):
        scores(["chinchilla"], table, clusters=[1, 2, 3])
    with pytest.raises(Refusal, match="no cut has runs on both sides"):
        scores(["chinchilla"], table, cuts=[1e25])
    with pytest.raises(Refusal, match="no cut has runs on both sides"):
        scores(["chinchilla"], table[table["C"] < 2e18])


# --- published -------------------------------------------------------------------------------------------------------

BOTH = ("chinchilla", Candidate(law="chinchilla", name="tied", options={"tied": {"beta": "alpha"}}))


@pytest.mark.published
@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_gadre_hold_out():
    table = pd.read_csv(DATA / "gadre_overtraining" / "models_losses.csv")
    table = table[(table["train_set"] == "c4_original") & table["val"].str.contains("c4_val")]
    five, tied = scores(BOTH, table, cuts=[2e19], horizon=np.inf, draws=0)
    assert (five.cuts[0].trained, five.cuts[0].held_out) == (22, 12)
    assert tied.error == pytest.approx(0.020, abs=0.001) and five.error == pytest.approx(0.023, abs=0.0006)
    assert isinstance(select([five, tied]), Refused)  # one cut


@pytest.mark.published
@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_chinchilla_hold_out():
    table = pd.read_csv(DATA / "epoch_chinchilla" / "chinchilla_points.csv").query("kept")
    five, tied = scores(BOTH, table, cuts=[3e20], horizon=np.inf, tolerance=0.05, draws=0)
    for score, train, held_out in ((five, 0.0060, 0.0125), (tied, 0.0073, 0.0103)):
        assert score.cuts[0].train_error == pytest.approx(train, abs=5e-5)
        assert score.error == pytest.approx(held_out, abs=5e-5)
