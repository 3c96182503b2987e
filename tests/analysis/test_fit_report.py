"""From a table to a page: what is estimated of a planted law, what is refused, and that page, JSON and text agree."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit_answer import analyse_fit
from analysis.fit_evidence import gather
from analysis.fit_report import fit_json, fit_report, render, text
from analysis.refusal import Refused
from analysis.resample import Draws
from analysis.table import read_table
from test_report import self_contained

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
A_TRUE = 0.37 / 0.72


def planted(noise=0.004, budgets=(1e18, 4e18, 1.6e19, 6.4e19, 2.6e20, 1e21), sizes=8, seed=1):
    rng = np.random.default_rng(seed)
    C = np.repeat(budgets, sizes)
    best = np.sqrt(C / 120)
    N = best * np.tile(np.geomspace(0.25, 4, sizes), len(budgets))
    D = C / (6 * N)
    loss = TRUTH["E"] + TRUTH["A"] * N ** -TRUTH["alpha"] + TRUTH["B"] * D ** -TRUTH["beta"]
    return pd.DataFrame({"N": N, "D": D, "C": C, "loss": loss * np.exp(noise * rng.standard_normal(len(N)))})


@pytest.fixture(scope="module")
def answer():
    table = planted()
    table.attrs = {"source": "runs.csv", "notes": ("A note & more.",)}
    return analyse_fit(table, "chinchilla", draws=300, delta="scatter", holdout=(6.4e19,))


@pytest.fixture(scope="module")
def gathered(answer):
    return gather(answer, laws=("chinchilla_tied", "width_depth", "chinchilla"))


def test_the_planted_law_is_found_with_its_intervals(answer):
    for estimate in answer.parameters:
        assert estimate.interval[0] < TRUTH[estimate.name] < estimate.interval[1]
    derived = {e.name: e for e in answer.derived}
    assert derived["a"].interval[0] < A_TRUE < derived["a"].interval[1]
    G = (0.35 * 480 / (0.37 * 2100)) ** (1 / 0.72)
    best = G * (1e21 / 6) ** A_TRUE
    low, high = derived["N*(C = 1e21)"].interval
    assert low < best < high
    loss = 1.8 + 480 * best**-0.35 + 2100 * (1e21 / 6 / best) ** -0.37
    low, high = derived["L*(C = 1e21)"].interval
    assert low < loss < high and high - low < 0.05
    centre = np.exp(np.log(planted()[["N", "D"]]).mean())
    at_centre = 1.8 + 480 * centre["N"] ** -0.35 + 2100 * centre["D"] ** -0.37
    assert derived["L(centre)"].value == pytest.approx(at_centre, rel=3e-3)
    assert answer.holdout.error == pytest.approx(0.004, rel=0.5)  # the noise of a run: the law is true
    assert answer.fit.converged and answer.trust.kind in ("usable", "with care")
    assert not any("not noise" in reason for reason in answer.trust.reasons)


def test_text_has_digits_status_and_hold_out(answer):
    said = text(answer)
    value = next(e.value for e in answer.parameters if e.name == "alpha")
    assert f"{value:.7g}" in said and "converged" in said and "95% interval" in said
    assert "C <= 6.4e19: 32 runs fitted, 16 up to the largest predicted to" in said
    assert "note: A note & more." in said and "leave-one-out of 48 clusters" in said


def test_page_json_and_table_agree(tmp_path, answer, gathered):
    found, evidence = gathered
    page = fit_report(found, tmp_path / "out", evidence=evidence, command="lab fit <runs>.csv")
    html = page.read_text()
    assert self_contained(html) and html.count("<svg") == 4  # L(C) and contours, iso-FLOPs, residuals, profiles
    assert "lab fit &lt;runs&gt;.csv" in html and "A note &amp; more." in html
    numbers = json.loads((page.parent / "fit.json").read_text())
    by_name = {e["name"]: e for e in numbers["parameters"]}
    assert by_name["beta"]["value"] == answer.fit.flat["beta"] and f"{answer.fit.flat['beta']:.7g}" in html
    assert numbers["fit"]["status"] == "converged" and numbers["holdout"]["cuts"][0]["held_out"] == 16
    runs = pd.read_csv(page.parent / "runs.csv", index_col="row")
    np.testing.assert_allclose(np.log(runs["loss"] / runs["fitted"]), runs["residual"], atol=1e-12)
    assert runs["residual"].std() == pytest.approx(0.004, rel=0.3)
    # Every reservation is said on the page, and the kind of every band.
    for reason in found.trust.reasons:
        assert reason.split(":")[0] in html.replace("&#39;", "'").replace("&lt;", "<")
    assert "mean curve" in html and "new runs" in html


def test_sensitivity_laws_profiles_and_influence(answer, gathered):
    _, evidence = gathered
    deltas = {c.name: c for c in evidence.choices if c.kind == "Huber delta"}
    assert {"1e-05", "0.001", "least squares"} <= set(deltas)
    # Noise is normal and the law true: no choice matters, and least squares is the fit that delta from the scatter is near.
    assert not deltas["least squares"].moves
    chosen = next(c for c in evidence.choices if c.chosen)
    assert abs(deltas["least squares"].values["a"] - chosen.values["a"]) < 0.02
    assert {c.name for c in evidence.choices if c.kind == "outliers"} >= {"every row kept", "beyond 4 sd"}
    own, tied, lacking = evidence.laws
    assert (
        lacking.law == "width_depth" and "column 'width'" in lacking.status and lacking.score is None
    )  # no such column
    assert own.law == "chinchilla" and tied.law == "chinchilla_tied" and tied.parameters == own.parameters - 1
    assert tied.rms >= own.rms * 0.99 and tied.values["a"] == pytest.approx(0.5, abs=1e-6)
    for name, profile in evidence.profiles.items():
        assert not isinstance(profile, Refused)
        assert profile.low is None or profile.low < TRUTH[name]
        assert profile.high is None or TRUTH[name] < profile.high
    # Leaving the most influential run out really moves a by what the table says.
    name = evidence.influence.names[0]
    left = planted().drop(index=int(name))
    again = analyse_fit(left, "chinchilla", draws=0, holdout=None, delta="scatter").fit.flat
    moved = again["beta"] / (again["alpha"] + again["beta"]) - evidence.influence.whole["a"]
    assert moved == pytest.approx(evidence.influence.moves["a"][0], rel=1e-3)


def test_rows_of_one_run_are_refused_an_interval_and_told_the_way_out():
    table = planted().assign(run=[f"r{i % 24}" for i in range(48)])
    table["N"] = np.tile(table["N"].to_numpy()[:24], 2)
    found = analyse_fit(table, "chinchilla", draws=50, holdout=None)
    assert isinstance(found.draws, Refused)
    assert re.search("run 'r.*' has 2 rows.*--clusters run", found.draws.reason)
    assert all(e.interval is None for e in found.parameters)
    assert "There are no intervals" in text(found)
    clustered = analyse_fit(table, "chinchilla", draws=50, holdout=None, clusters="run")
    assert isinstance(clustered.draws, Draws) and "24 clusters" in clustered.method
    with pytest.raises(ValueError, match=r"clusters = 'rum' is not a column"):
        analyse_fit(table, "chinchilla", clusters="rum")


def test_a_law_that_misses_is_said_to_miss():
    table = planted(noise=1e-4)
    table["loss"] *= 1 + 0.02 * np.log(table["N"] / 1e9) ** 2
    twice = pd.concat([table, table.assign(loss=table["loss"] * 1.0002)], ignore_index=True)
    found = analyse_fit(twice, "chinchilla", draws=0, holdout=None)
    said = " ".join(found.trust.reasons)
    assert found.trust.kind == "with care" and "Lack of fit" in said and "not noise" in said


def test_a_fit_that_is_no_optimum_is_not_to_be_used():
    # Losses that fall faster than to any asymptote: E goes to its bound.
    N = np.geomspace(1e7, 1e10, 14)
    table = pd.DataFrame({"N": N, "D": 20 * N, "C": 120 * N**2, "loss": 400 * N**-0.34 - 0.1})
    found = analyse_fit(table, "chinchilla_tied", draws=20, holdout=None)
    assert found.trust.kind == "do not use" and isinstance(found.draws, Refused)
    assert found.trust.reasons[0].startswith("The fit is not an optimum")


def test_a_law_of_compute_and_by_arm_makes_a_page():
    C = np.geomspace(1e18, 1e22, 9)
    curve = pd.DataFrame({"C": C, "loss": 1.7 + 2.0 * (C / 1e18) ** -0.15})
    curve["loss"] *= np.exp(0.002 * np.random.default_rng(0).standard_normal(9))
    both = pd.concat(
        [curve.assign(arm="base"), curve.assign(arm="<b>new</b>", loss=curve["loss"] * 0.98)], ignore_index=True
    )
    found = analyse_fit(both, "power_law_with_asymptote", per_arm=("A",), draws=60, holdout=None, method="sandwich")
    assert {"E", "A[base]", "gamma"} <= {e.name for e in found.parameters}
    found, evidence = gather(found, laws=())
    html = render(found, evidence)
    assert self_contained(html) and "<b>new</b>" not in html and "L(10 C max)[base]" in html
    assert json.dumps(fit_json(found, evidence), allow_nan=False)


@pytest.mark.published
def test_olmo_ladder_is_flagged_by_its_replicates():
    path = Path(__file__).parents[3] / "shared" / "data" / "olmo_ladder" / "final_c4.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = analyse_fit(read_table(path, needs=("N", "D", "loss")), "chinchilla", draws=0, holdout=None)
    assert found.lack_of_fit.flagged and found.lack_of_fit.replicate_sd * 3.2 == pytest.approx(5.4e-4, rel=0.3)
    assert found.trust.kind == "with care" and found.fit.rms == pytest.approx(0.0053, abs=2e-4)
