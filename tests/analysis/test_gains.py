"""Verdicts on what trains faster: their error rates in simulated studies, what is planted is found, and the page."""

import csv
import json
import math
import re

import numpy as np
import pytest
from scipy import integrate, special, stats

import analysis
import gains_study
from analysis.gains import analyse, judge, trend
from analysis.guards import GUARDS
from analysis.markdown import publish
from analysis.moderate import moderate
from analysis.refusal import Refused
from gains_study import BASE, BUDGETS, SLOPE, loss_of, simulate, write
from sweeps.study import Gains
from test_report import self_contained

NOTHING = (0.0, 0.0, 0.0)


def judged(losses, **settings):
    arms = {arm for arm, _ in losses}
    return judge(losses, dict.fromkeys(arms, BASE), **settings)


# --- moderated variances ---------------------------------------------------------------------------------------------


def test_the_prior_of_variances_is_recovered():
    rng = np.random.default_rng(0)
    d0, s0, d = 8.0, 0.02, 3
    true = s0**2 * d0 / rng.chisquare(d0, 20_000)
    found = moderate(true * rng.chisquare(d, 20_000) / d, [d] * 20_000)
    assert found.prior_dof == pytest.approx(d0, rel=0.1) and found.prior_sd == pytest.approx(s0, rel=0.02)
    assert found.dof_c == pytest.approx(np.full(20_000, found.prior_dof + d))
    # The posterior mean of 1/variance is 1 over the moderated one: by quadrature of prior times likelihood.
    s2 = 0.001
    density = lambda v: stats.invgamma.pdf(v, d0 / 2, scale=d0 * s0**2 / 2) * stats.chi2.pdf(d * s2 / v, d) / v  # noqa: E731
    grid = (1e-7, 1.0)
    mean = integrate.quad(lambda x: density(math.exp(x)), *np.log(grid))[0]
    whole = integrate.quad(lambda x: density(math.exp(x)) * math.exp(x), *np.log(grid))[0]
    assert whole / mean == pytest.approx((d0 * s0**2 + d * s2) / (d0 + d), rel=1e-5)


def test_variances_that_scatter_no_more_than_chi_squared_are_pooled():
    s2 = np.array([1.0, 1.2, 0.9, 1.1])
    found = moderate(s2, [2, 2, 2, 4])
    assert found.prior_dof == math.inf and set(found.dof_c) == {10}
    assert found.variance_c == pytest.approx(np.full(4, (2 * (1.0 + 1.2 + 0.9) + 4 * 1.1) / 10))
    assert moderate([0.3, 9.0], [2, 2]).variance_c.tolist() == [0.3, 9.0]
    wild = moderate([1e-6, 1.0, 1e6], [2, 2, 2])
    assert (np.diff(wild.variance_c) > 0).all() and (wild.dof_c <= 6).all()
    with pytest.raises(ValueError, match="positive"):
        moderate([0.0, 1.0, 1.0], [2, 2, 2])
    assert float(special.polygamma(1, wild.prior_dof / 2)) > 1


# --- error rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "seeds"), [(0.0, 3), (0.5, 3), (0.0, 5)], ids=["alike", "arms differ", "five seeds"]
)
def test_false_gains_stay_below_five_per_cent_of_studies(spread, seeds):
    """Any false gain among 18 comparisons of a study. 300 studies: a rate of 5% shows 26 or more in 1 of 200."""
    rng = np.random.default_rng([7, seeds, int(10 * spread)])
    arms = {f"arm{i}": NOTHING for i in range(6)}
    wrong = gains = 0
    for _ in range(300):
        kinds = [c.kind for c in judged(simulate(arms, seeds=seeds, rng=rng, spread=spread)).values()]
        gains += "gain" in kinds
        wrong += "gain" in kinds or "worse" in kinds
    assert gains <= 25 and wrong <= 25


def test_what_a_design_is_said_to_detect_it_detects():
    """A gain as large as `detectable` is found in about 80% of the studies: more by what Holm gives beyond Bonferroni."""
    rng = np.random.default_rng(3)
    sd, seeds, arms = 0.01, 4, 5
    m, dof = 3 * arms, 3 * arms * (seeds - 1)
    level, dof = 0.05 / m, min(dof, 4 * (seeds - 1))
    nats = (stats.t.ppf(1 - level / 2, dof) + stats.t.ppf(0.8, dof)) * sd * math.sqrt(2 / seeds)
    planted = math.expm1(nats / SLOPE)
    zoo = {"arm": (planted,) * 3} | {f"none{i}": NOTHING for i in range(arms - 1)}
    found, said = [], []
    for _ in range(150):
        claims = judged(simulate(zoo, seeds=seeds, rng=rng, sd=sd))
        found += [claims["arm", budget].kind == "gain" for budget in BUDGETS]
        said += [claims["arm", BUDGETS[1]].detectable]
    assert 0.74 <= np.mean(found) <= 0.93
    assert np.mean(said) == pytest.approx(nats, rel=0.1)


def test_no_gain_is_said_only_where_a_gain_that_matters_is_ruled_out():
    """Of arms whose gain is the margin itself, at most 5% are called `no gain`; of arms without one, nearly all are."""
    rng = np.random.default_rng(4)
    kinds = {"margin": [], "none": []}
    for _ in range(100):
        zoo = {"margin": (0.1,) * 3, "none": NOTHING, "other": NOTHING}
        claims = judged(simulate(zoo, seeds=5, rng=rng, sd=0.004, shared=0.002), margin=0.1)
        for arm in kinds:
            kinds[arm].append(claims[arm, BUDGETS[1]].kind)
    assert kinds["margin"].count("no gain") <= 5
    assert kinds["none"].count("no gain") >= 85


# --- what is planted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.001, 0.05])
def test_a_tenth_more_budget_is_a_gain_if_and_only_if_it_exceeds_what_is_detectable(sd):
    rng = np.random.default_rng(1)
    for claim in judged(simulate({"plus": (0.1,) * 3}, seeds=5, rng=rng, sd=sd, shared=0.0)).values():
        assert (claim.kind == "gain") == (claim.detectable_gain < 0.1)
        assert claim.kind == ("gain" if sd == 0.001 else "underpowered")
        assert (claim.seeds_needed > 5) == (sd == 0.05)
        if sd == 0.001:
            assert claim.detectable_gain < 0.1
            assert claim.value == pytest.approx(0.1, abs=0.03) and claim.gain.low < 1.1 < claim.gain.high
            assert claim.gain.extrapolated == (claim.budget == BUDGETS[-1])


def test_no_gain_is_not_said_by_a_design_that_would_have_missed_one():
    """Noise of which one draw happens to look worse than the baseline: its interval rules the margin out, its power does not."""
    rng = np.random.default_rng(8)
    claims = [c for _ in range(60) for c in judged(simulate({"a": NOTHING}, seeds=3, rng=rng, sd=0.012)).values()]
    lucky = [c for c in claims if c.p_holm > 0.05 and c.gain.high is not None and c.gain.high < 1.1]
    assert lucky and {c.kind for c in lucky if c.detectable_gain > 0.1} == {"underpowered"}


def test_gains_without_noise_are_those_of_the_curve():
    losses = {(BASE, b): {s: loss_of(b) + 0.01 * s for s in range(3)} for b in BUDGETS}
    for budget, gain in zip(BUDGETS, (0.5, -0.2, 0.1), strict=True):
        losses["arm", budget] = {s: loss_of(budget, gain) + 0.01 * s for s in range(3)}
    claims = judged(losses)
    for budget, gain in zip(BUDGETS, (0.5, -0.2, 0.1), strict=True):
        claim = claims["arm", budget]
        assert claim.kind == ("gain" if gain > 0 else "worse")
        assert claim.value == pytest.approx(gain, abs=2e-3)  # the median of draws of the baseline's own noise


def test_an_arm_that_does_nothing_gains_nothing():
    losses = simulate({"twin": NOTHING}, seeds=3, rng=np.random.default_rng(0))
    for budget in BUDGETS:
        losses["twin", budget] = dict(losses[BASE, budget])
    for same in (frozenset(), frozenset(("twin", budget) for budget in BUDGETS)):
        for claim in judged(losses, same=same).values():
            assert (claim.kind, claim.value, claim.difference) == ("no gain", 0.0, 0.0)


def test_what_diverged_is_reported_and_what_is_missing_refused():
    losses = simulate({"a": NOTHING, "b": NOTHING}, seeds=3, rng=np.random.default_rng(0))
    losses["a", BUDGETS[0]][1] = None
    losses[BASE, BUDGETS[1]][0] = None
    claims = judged(losses, unfinished={("b", BUDGETS[2]): "runs of b are failed"})
    assert claims["a", BUDGETS[0]].kind == "diverged" and "1 of 3 seeds diverged" in claims["a", BUDGETS[0]].sentence
    assert claims["b", BUDGETS[0]].kind not in ("diverged", "refused")
    assert {claims[arm, BUDGETS[1]].kind for arm in "ab"} == {"refused"}
    assert claims["b", BUDGETS[2]].kind == "refused" and "failed" in claims["b", BUDGETS[2]].sentence
    one = judged({key: {0: of[0]} for key, of in losses.items()})
    assert "two are needed" in one["b", BUDGETS[0]].sentence


def test_a_baseline_that_does_not_improve_has_no_gain_in_budget():
    losses = simulate({"a": (0.5,) * 3}, seeds=3, rng=np.random.default_rng(0), sd=1e-4, shared=0.0)
    losses[BASE, BUDGETS[2]] = {s: loss + 1.0 for s, loss in losses[BASE, BUDGETS[2]].items()}
    claim = judged(losses)["a", BUDGETS[0]]
    assert claim.kind == "gain" and isinstance(claim.gain, Refused) and claim.value is None
    alone = {key: of for key, of in losses.items() if key[1] == BUDGETS[0]}
    assert "one budget" in judged(alone)["a", BUDGETS[0]].sentence


@pytest.mark.parametrize(("planted", "word"), [((0.6, 0.05, 0.3), "falls"), ((0.05, 0.6, 0.3), "rises")])
def test_the_trend_of_a_gain_with_budget(planted, word):
    claims = judged(simulate({"a": planted}, seeds=5, rng=np.random.default_rng(2), sd=0.002, shared=0.0))
    found = trend(claims, "a")  # the gain at the largest budget is beyond what the baseline has shown
    by_hand = np.polyfit(np.log2(BUDGETS[:2]), np.log1p(planted[:2]), 1)[0]
    assert found.low < by_hand < found.high and word in str(found) and found.budgets == 2
    flat = trend(judged(simulate({"a": (0.2,) * 3}, seeds=5, rng=np.random.default_rng(5), sd=0.01)), "a")
    assert "no resolved trend" in str(flat)
    assert isinstance(trend({}, "a"), Refused)


@pytest.mark.parametrize("planted", [-0.6, -0.4, 0.2])
def test_a_constant_gain_has_no_trend_where_losses_flatten(planted, monkeypatch):
    """The baseline's loss is a power law, of which straight lines between its budgets know nothing."""
    monkeypatch.setattr(gains_study, "loss_of", lambda budget, gain=0.0: 2 + ((1 + gain) * budget / BUDGETS[0]) ** -0.3)
    rng, called, counted = np.random.default_rng(0), 0, 0
    for _ in range(60):
        found = trend(judged(simulate({"a": (planted,) * 3}, seeds=5, rng=rng, sd=0.02, shared=0.0)), "a")
        if not isinstance(found, Refused):
            counted, called = counted + 1, called + (found.low > 0 or found.high < 0)
    assert counted > 40 and called <= 0.1 * counted


def test_a_baseline_that_hardly_improves_needs_any_budget():
    """So much that it is no number any more."""
    noise = np.random.default_rng(0).normal(0, 0.02, 5)
    losses = {
        (arm, b): {s: 3.0 - 2e-5 * i + (noise[s] if arm == "a" else 0.0) for s in range(5)}
        for i, b in enumerate(BUDGETS)
        for arm in (BASE, "a")
    }
    claim = judged(losses)["a", BUDGETS[2]]
    assert claim.kind == "underpowered" and claim.detectable_gain is None and claim.seeds_needed > 10**4


def test_families_lend_each_other_nothing_but_the_number_of_tests():
    """Two baselines: the second family's noise is its own, its p is corrected for both."""
    rng = np.random.default_rng(0)
    first = simulate({"a": (0.5,) * 3}, seeds=4, rng=rng, sd=0.001)
    second = {(f"x{arm}", b): of for (arm, b), of in simulate({"a": (0.5,) * 3}, seeds=4, rng=rng, sd=0.1).items()}
    against = {BASE: BASE, "a": BASE, f"x{BASE}": f"x{BASE}", "xa": f"x{BASE}"}
    both, alone = judge({**first, **second}, against), judge(first, against)
    for budget in BUDGETS:
        assert both["a", budget].standard_error == alone["a", budget].standard_error
        assert both["xa", budget].standard_error > 10 * both["a", budget].standard_error
        assert both["a", budget].p_holm >= alone["a", budget].p_holm


# --- from records to a page ------------------------------------------------------------------------------------------

FACTORS = {"plus": 1.1}


@pytest.fixture(scope="module")
def losses():
    return simulate({"good": (0.5,) * 3, "bad": (-0.3,) * 3, "wild": NOTHING, "plus": (0.1,) * 3, "no_op": NOTHING}, seeds=3,
                    rng=np.random.default_rng(0), sd=0.001, shared=0.0)  # fmt: skip


def test_report_of_a_study_of_gains(tmp_path, losses):
    losses = {**losses, ("wild", BUDGETS[2]): {**losses["wild", BUDGETS[2]], 1: None}}
    gains = Gains(controls={"plus": 1.1, "no_op": 1.0}, free=("bad",))
    write(tmp_path, losses, gains=gains, factors=FACTORS, same=("no_op",))
    html = analysis.report(tmp_path).read_text()
    assert self_contained(html) and "Does &lt;it&gt; train faster?" in html and html.count("<svg") == 1
    found = json.loads((tmp_path / "verdict.json").read_text())
    largest = {c["arm"]: c for c in found["claims"] if c["budget"] == BUDGETS[2]}
    kinds = {arm: claim["kind"] for arm, claim in largest.items()}
    assert kinds == {"good": "gain", "bad": "worse", "wild": "diverged", "plus": "gain", "no_op": "no gain"}
    assert largest["no_op"]["value"] == 0 and largest["no_op"]["same_runs"]
    assert [f["guard"] for f in found["findings"]] == ["dropped_seeds"]
    overhead = next(o for o in found["overheads"] if o["arm"] == "good")
    assert overhead["charged"] == 0 and overhead["seconds"] == pytest.approx(0.2) and overhead["steps"] == 1
    text = analysis.summary(tmp_path)
    for said in (
        "[gain] good",
        "[diverged] wild",
        "control: the baseline at 1.1 times",
        "ablation: not all of its cost",
    ):
        assert said in text
    for arm in kinds:
        assert largest[arm]["sentence"].split(":")[0] in html
    assert len((tmp_path / "claims.csv").read_text().splitlines()) == 1 + len(found["claims"])


def test_a_published_study_of_gains_is_its_answer(tmp_path, losses):
    losses = {**losses, ("wild", BUDGETS[2]): {**losses["wild", BUDGETS[2]], 1: None}}
    gains = Gains(controls={"plus": 1.1, "no_op": 1.0}, free=("bad",))
    write(tmp_path / "study", losses, gains=gains, factors=FACTORS, same=("no_op",))
    page, answer = publish(tmp_path / "study", tmp_path / "out"), analyse(tmp_path / "study")
    written = page.read_text()
    for kept in re.findall(r"\]\(([^)]*)\)", written):
        assert (tmp_path / "out" / kept).stat().st_size > 100, kept
    for arm in answer.arms:
        claim = answer.headline(arm)
        assert f"- **{claim.kind}**: " in written and claim.sentence in written
    assert "ablation: not all of its cost" in written and "- dropped_seeds: " in written
    assert re.search(r"^- plus, planted \+10\.0%: gain", written, flags=re.M)
    table = [line for line in written.splitlines() if line.startswith("| good |") and "simulated" not in line]
    assert len(table) == len(BUDGETS) and all(line.count("|") == 14 for line in table)
    with (tmp_path / "out" / "simulated-claims.csv").open() as file:
        claims = {(row["arm"], float(row["budget"])): row for row in csv.DictReader(file)}
    assert claims.keys() == answer.claims.keys()
    assert all(claims[key]["kind"] == claim.kind for key, claim in answer.claims.items())


def test_a_refusing_guard_stops_the_report_unless_it_is_allowed(tmp_path, losses):
    from dataclasses import replace

    def other(run):
        return replace(run, precision="bf16")

    write(tmp_path, losses, gains=Gains(), factors=FACTORS | {"plus": 1.0}, change=other)
    with pytest.raises(ValueError, match="refused by the guard precision: precision of arm good is 'bf16'"):
        analysis.report(tmp_path)
    write(tmp_path, losses, gains=Gains(allow=("precision",)), factors={"plus": 1.0}, change=other)
    assert {f.guard for f in analyse(tmp_path).findings} == {"precision"} and "precision" in GUARDS


def test_runs_that_are_not_there_are_refused_by_name(tmp_path, losses):
    write(tmp_path, losses, gains=Gains(controls={"plus": 1.1}), factors=FACTORS, missing=(("good", BUDGETS[0], 1),))
    answer = analyse(tmp_path)
    assert (
        answer.claims["good", BUDGETS[0]].kind == "refused" and "missing" in answer.claims["good", BUDGETS[0]].sentence
    )
    assert answer.claims["good", BUDGETS[1]].kind == "gain"
