"""The whole way from a study's directory to a page, also where runs are missing or nothing can be said."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

import analysis
import synthetic
from analysis import plots
from analysis.answer import analyse
from analysis.compare import Difference
from analysis.fit import Fit
from analysis.refusal import Refused
from analysis.report import render, text, verdict_json

TWO = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}


def self_contained(page: str) -> bool:
    loads = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"'\s)>]*)""", page)
    return not [link for link in loads if re.match(r"(https?:)?//|[a-z]+\.(js|css)", link)] and "<script" not in page


def test_report_of_a_whole_study(tmp_path):
    path = tmp_path / "study"
    arms = {"decoder_only": TWO["decoder_only"], "prefix_lm": TWO["prefix_lm"], "twin": TWO["decoder_only"]}
    synthetic.write(
        path,
        synthetic.Study(
            arms=arms,
            baseline="decoder_only",
            same_runs=("twin",),
            question="Is <b>x</b> & y better?",
            notes=("a <note>",),
        ),
    )
    page = analysis.report(path, out=tmp_path / "out")
    html = page.read_text()
    assert page == tmp_path / "out" / "report.html" and html.count("<svg") == 6
    assert self_contained(html)
    assert "Is &lt;b&gt;x&lt;/b&gt; &amp; y better?" in html and "a &lt;note&gt;" in html
    verdict = json.loads((page.parent / "verdict.json").read_text())
    by_arm = {v["arm"]: v for v in verdict["verdicts"]}
    assert by_arm["prefix_lm"]["kind"] == "A better" and by_arm["prefix_lm"]["sentence"] in html
    assert by_arm["twin"]["kind"] == "not resolved" and "same runs" in by_arm["twin"]["sentence"]
    assert verdict["law"]["status"] == "converged"
    pairs = {(pair["arm"], pair["baseline"]): pair for pair in verdict["pairs"]}
    assert len(pairs) == 3 and pairs["decoder_only", "twin"]["same_runs"]
    assert pairs["decoder_only", "prefix_lm"]["value"] == pytest.approx(
        -[d["value"] for d in verdict["differences"] if d["arm"] == "prefix_lm"][-1]
    )
    # Arms that are the same runs are one curve, so that one pair is left to look ahead at.
    assert [(f["more"], f["less"]) for f in verdict["outlook"]["forecasts"]] == [("decoder_only", "prefix_lm")]
    truth = synthetic.true_best(TWO["prefix_lm"], 6.4e11) - synthetic.true_best(TWO["decoder_only"], 6.4e11)
    last = [d for d in verdict["differences"] if d["arm"] == "prefix_lm"][-1]
    assert last["low"] < truth < last["high"]
    assert (
        "decoder_only 1e+10 FLOP/s; prefix_lm 9.52e+09 FLOP/s, 1.05 times decoder_only&#39;s time for equal FLOPs"
        in html
    )
    assert "step 80%, compile 10%, data 5%, evaluate 2%, checkpoint 2%" in html
    table = pd.read_csv(page.parent / "runs.csv")
    assert len(table) == 3 * 14 and table["run_id"].nunique() == 2 * 14


def test_missing_failed_and_diverged_runs_are_named(tmp_path):
    study = synthetic.Study(arms=TWO, baseline="decoder_only", missing=(0, 1), failed=(5,), diverged=(16,))
    synthetic.write(tmp_path, study)
    answer = analyse(tmp_path)
    said = " ".join(answer.caveats)
    for phrase in ("2 of 28 runs have not ended", "1 of 28 runs failed", "1 of 28 runs diverged"):
        assert phrase in said
    refused = answer.minima["prefix_lm", synthetic.BUDGETS[0]]
    assert isinstance(refused, Refused) and "2 sizes finished" in refused.reason
    html = render(answer)
    assert "diverged at step 7" in html and "same rung" in html and self_contained(html)
    assert isinstance(answer.law, Fit) and isinstance(answer.curves["prefix_lm"], Refused)


@pytest.mark.parametrize("finished", [0, 5, 14])
def test_an_unfinished_study_is_refused_not_crashed(tmp_path, finished):
    # Runs end in the order of the plan, so that the second arm has none.
    study = synthetic.Study(arms=TWO, baseline="decoder_only", missing=tuple(range(finished, 28)))
    synthetic.write(tmp_path, study)
    answer = analyse(tmp_path)
    assert [v.kind for v in answer.verdicts] == ["refused"]
    assert "refused" in render(answer) and "[refused]" in text(answer)
    assert finished > 5 or analysis.summary(tmp_path) == text(answer)
    assert json.dumps(verdict_json(answer), allow_nan=False)


def test_losses_of_zero_are_compared_and_no_law_is_fitted(tmp_path):
    def learned(result):
        result["outcome"]["loss"] = max(0.0, result["outcome"]["loss"] - 2.517)

    synthetic.write(tmp_path, synthetic.Study(arms=TWO, baseline="decoder_only", change=learned))
    answer = analyse(tmp_path)
    zeros = int((answer.frame["loss"] == 0).sum())
    assert 0 < zeros < len(answer.frame) and all(np.isfinite(answer.frame["loss"]))
    for refused in (answer.law, answer.outlook):
        assert isinstance(refused, Refused) and f"{zeros} of 28 runs reached a loss of 0" in refused.reason
    assert any(isinstance(found, Difference) for found in answer.differences.values())
    assert "reached a loss of 0" in render(answer) and "A better" in text(answer)
    assert json.dumps(verdict_json(answer), allow_nan=False)


def test_one_budget_without_replicates(tmp_path):
    study = synthetic.Study(arms=TWO, baseline="decoder_only", budgets=(1e11,), seeds=1, sizes=6, noise=0.002)
    synthetic.write(tmp_path, study)
    answer = analyse(tmp_path)
    assert any("No cell has two seeds" in caveat for caveat in answer.caveats)
    assert answer.verdicts[0].kind in ("A better", "not resolved")
    assert all(isinstance(value, Refused) for value in answer.crossings.values()) and "<svg" in render(answer)


def test_importing_is_light_and_the_function_stays_a_function():
    code = """
import sys, analysis
heavy = {'jax', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)
assert not heavy, heavy
import analysis.report, analysis.answer
assert all(getattr(analysis, name) for name in analysis.__all__)
assert callable(analysis.report) and callable(analysis.load)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = analysis.no_such_name


def test_a_law_that_contradicts_what_was_measured_is_flagged(tmp_path):
    arms = {"decoder_only": synthetic.Arm(), "prefix_lm": synthetic.Arm(A=45.0, alpha=0.40)}
    synthetic.write(tmp_path, synthetic.Study(arms=arms, baseline="decoder_only", noise=0.001))
    answer = analyse(tmp_path)
    assert any("The shared law contradicts the measured difference of prefix_lm" in c for c in answer.caveats)
    assert answer.verdicts[0].kind == "A better"


def test_differences_of_many_arms_are_drawn_beside_their_budgets(tmp_path):
    """None is cut off, none is nearer to another budget's."""
    many = {f"arm_{i}": replace(synthetic.FOUR_ARMS["prefix_lm"], A=25 + i) for i in range(12)}
    synthetic.write(tmp_path, synthetic.Study(arms=many, baseline="arm_0"))
    answer = analyse(tmp_path)
    right = plots.headline(answer).axes[1]
    low, high = right.get_xlim()
    drawn = np.array(
        [float(box.lines[0].get_xdata()[0]) for box in right.containers if isinstance(box, ErrorbarContainer)]
    )
    assert len(drawn) == 11 * len(answer.budgets) and low < drawn.min() and drawn.max() < high
    nearest = np.abs(np.log(drawn[:, None] / np.array(answer.budgets))).argmin(1)
    assert np.bincount(nearest).tolist() == [11] * len(answer.budgets)
