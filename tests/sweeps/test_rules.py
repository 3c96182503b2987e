"""A file of rules, and a study that takes it."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sweeps
from lab import plan_file
from lab.spec import Optimizer, Options
from simulated_tuning import LAWS
from sweeps.ladder import Size, ladder
from sweeps.study import TUNING_SEEDS, Gains
from sweeps.tune import rules
from sweeps.tune.conclude import ALL, DEFAULT


def test_rules_are_read_as_they_were_written(written):
    path = Path("runs/tune-mine/rules.json")
    assert rules.read(path) == written
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["source"]["command"].startswith("lab tune ")
    assert content["rules"]["prefix_lm"]["cells"][-1]["held_out"] is True
    assert len(plan_file.read(path.parent)["runs"]) == 2 * content["rules"]["prefix_lm"]["trials"]
    page = (path.parent / "tuning.md").read_text()
    assert (
        "| decoder_only |" in page
        and "Regret of sharing" in page
        and "Held out" in page
        and "hours of training" in page
    )
    with (path.parent / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * written.rules["prefix_lm"].trials and {row["status"] for row in rows} == {"done"}
    with (path.parent / "regret.csv").open() as file:
        assert {row["rule"] for row in csv.DictReader(file)} == {*LAWS, ALL, DEFAULT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema = 2: this version reads 1"),
        (lambda c: c.update(ruls={}), r"unknown key ruls: did you mean 'rules'"),
        (lambda c: c["source"].pop("plan_sha256"), r"missing key source\.plan_sha256: a file of rules is complete"),
        (lambda c: c["rules"]["prefix_lm"].update(trials="70"), r"rules\.prefix_lm\.trials = '70': use int"),
        (lambda c: c["rules"]["prefix_lm"].update(trials=True), r"rules\.prefix_lm\.trials = True: use int"),
        (lambda c: c["rules"]["prefix_lm"].update(form="c size"), "use one of"),
        (lambda c: c["rules"]["prefix_lm"].update(c=c["rules"]["prefix_lm"]["c"] * 2), "c, a and b give"),
        (lambda c: c["rules"]["prefix_lm"].update(form="c size^a"), "the form 'c size.a' has none"),
        (lambda c: c["rules"]["prefix_lm"].update(a_interval=[1.0]), "use a list of 2"),
        (lambda c: c["rules"]["prefix_lm"]["cells"][2].update(rate=None), r"cells\[2\]\.rate = None: use float"),
        (lambda c: c["regret"].pop("prefix_lm"), r"regret\.prefix_lm"),
        (lambda c: c["rules"]["prefix_lm"].update(flops=math.nan), "NaN is no JSON number"),
    ],
)
def test_a_file_of_rules_that_is_wrong_says_where(written, change, message):
    path = Path("runs/tune-mine/rules.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        rules.read(path)
    assert str(path) in str(raised.value)


def test_each_arm_of_a_study_has_the_rate_of_its_own_rule(mine, written):
    plan = sweeps.plan(sweeps.load(str(mine)))
    for row in plan.runs:
        rule, size = written.rules[row.arm], Size.of(row.run, row.run.V)
        expected = rule.c * size.body_flops**rule.a * size.tokens**rule.b
        assert row.run.optimizer.learning_rate == pytest.approx(expected, rel=1e-5)
        assert max(row.run.seed.init, row.run.seed.data) < TUNING_SEEDS
    assert not any("extrapolates" in said for said in plan.warnings), plan.warnings
    about = plan.to_json()["study"]
    assert about["learning_rates"]["arms"]["prefix_lm"]["trials"] == written.rules["prefix_lm"].trials
    assert about["learning_rates"]["source"]["plan_sha256"] == written.source.plan_sha256
    notes = "\n".join(about["notes"])
    for said in ("learning rates by the arms' own rules (tuned:runs/tune-mine/", "tuned alike, by 7", "no run of a study",
                 "decoder_only's rule for all arms would cost", "known within a factor of 1"):  # fmt: skip
        assert said in notes, notes


def test_beyond_the_tuned_cells_a_rule_warns_and_says_how_little_it_knows(mine, written):
    study = sweeps.load(str(mine))
    near, far = (sweeps.plan(replace(study, budgets=b)).warnings for b in ((1e8, 4e8), (1e9, 6.4e9)))
    assert any("extrapolates in tokens and is asked at" in said for said in far) and not any(
        "extrap" in s for s in near
    )
    rule, size = written.rules["prefix_lm"], Size(body_flops=1e6, body_parameters=1, tokens=1e9)
    X = np.array([[1, math.log(c.size), math.log(c.tokens)] for c in rule.cells if not c.held_out])
    x = np.array([1, math.log(1e6), math.log(1e9)])
    assert rule.scatter is not None and rule.dof == 3
    sd = rule.scatter * math.sqrt(x @ np.linalg.inv(X.T @ X) @ x)
    assert rule.within(size) == pytest.approx(math.exp(3.182446 * sd), rel=1e-4)  # t of 3 degrees of freedom at 97.5%


def test_an_arm_without_a_rule_is_an_error_with_a_way_out(mine, written):
    study = sweeps.load(str(mine))
    more = replace(study, arms={**study.arms, "again": study.arms["prefix_lm"]})
    with pytest.raises(ValueError, match=r"arm 'again' has no rule .*rules=\{'again': 'prefix_lm'\}"):
        sweeps.plan(more)
    plan = sweeps.plan(replace(more, rules={"again": "prefix_lm"}))
    rates = {arm: [r.run.optimizer.learning_rate for r in plan.runs if r.arm == arm] for arm in more.arms}
    assert rates["again"] == rates["prefix_lm"] != rates["decoder_only"]
    assert any("again" in said and "(the rule of prefix_lm)" in said for said in plan.warnings)
    swapped = replace(study, arms={**study.arms, "prefix_lm": study.arms["decoder_only"]})
    with pytest.raises(ValueError, match=r"structure of arm 'prefix_lm' is 'decoder_only', .* of 'prefix_lm'; say so"):
        sweeps.plan(swapped)
    assert sweeps.plan(replace(swapped, rules={"prefix_lm": "prefix_lm"})).runs
    with pytest.raises(ValueError, match=r"study\.rules = 'prefix': did you mean 'prefix_lm'"):
        replace(study, rules={"prefix": "prefix_lm"})
    with pytest.raises(ValueError, match="only learning_rate = 'tuned:NAME'"):
        replace(study, learning_rate="lab", rules={"prefix_lm": "decoder_only"})
    with pytest.raises(ValueError, match=r"no file nowhere\.json in sweeps/rules"):
        sweeps.plan(replace(study, learning_rate="tuned:nowhere"))
    with pytest.raises(ValueError, match=r"nowhere\.json: not a readable JSON file"):
        sweeps.plan(replace(study, learning_rate="tuned:nowhere.json"))


def test_arms_that_were_tuned_by_unequal_numbers_of_trials_are_refused(mine, written):
    study, path = sweeps.load(str(mine)), Path("runs/tune-mine/unequal.json")
    fewer = replace(written.rules["prefix_lm"], trials=10)
    rules.write(path, replace(written, rules={**written.rules, "prefix_lm": fewer}))
    unequal = replace(study, learning_rate=f"tuned:{path}")
    with pytest.raises(ValueError, match=r"prefix_lm was tuned by 10 trials and its baseline decoder_only by 7"):
        sweeps.plan(unequal)
    assert sweeps.plan(replace(unequal, rules={"prefix_lm": "decoder_only"})).runs


def test_other_settings_than_the_tuned_ones_are_said(mine, written):
    study = sweeps.load(str(mine))
    said = "\n".join(sweeps.plan(replace(study, batch=1)).warnings)
    assert "tuned with other settings than this study's: batch 2 there, 1 here" in said
    assert "arms were tuned alike" in said and "was not tuned itself" not in said


def test_an_arm_that_takes_anothers_rule_is_not_called_tuned(mine, written):
    study = sweeps.load(str(mine))
    other = replace(study.arms["prefix_lm"], options=Options(mlp="gelu"))
    more = replace(study, arms={**study.arms, "gelu": other}, rules={"gelu": "prefix_lm"})
    plan = sweeps.plan(more)
    said = "\n".join(plan.warnings)
    assert "gelu takes the rule of prefix_lm and was not tuned itself (options.mlp 'swiglu' there, 'gelu' here)" in said
    assert "prefix_lm, decoder_only were tuned alike" in said and "each tuned arm's own rule costs" in said
    about = plan.to_json()["study"]["learning_rates"]["arms"]
    assert about["gelu"]["borrowed"] and about["gelu"]["regret"] is None
    assert not about["prefix_lm"]["borrowed"] and about["prefix_lm"]["regret"]["cells"] > 0


def test_a_depth_that_was_not_tuned_is_said(mine, written):
    study = sweeps.load(str(mine))
    deeper = replace(study, sizes=ladder(8, 16, 24, depth=2, head_width=8))
    found = [said for said in sweeps.plan(deeper).warnings if "extrapolates in depth" in said]
    assert len(found) == 1 and "is asked at L = 2 for" in found[0] and "whose cells have 1" in found[0]


def test_a_control_has_its_baselines_rule(mine, written):
    study = sweeps.load(str(mine))
    arms = {name: study.arms["prefix_lm"] for name in ("base", "again")}
    controlled = replace(study, arms=arms, baseline="base", window=1, seeds=2, rules={"base": "prefix_lm"},
                         gains=Gains(controls={"again": 1.0}))  # fmt: skip
    rates = {row.arm: row.run.optimizer.learning_rate for row in sweeps.plan(controlled).runs}
    assert rates["again"] == rates["base"]
    for change in ({"rules": {"base": "prefix_lm", "again": "decoder_only"}}, {"batch": {"base": 2, "again": 1}},
                   {"sizes": {"base": study.sizes, "again": study.sizes[1:]}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"gains\.controls = 'again': .* same template, sizes, batch and rule"):
            replace(controlled, **change)


def test_settings_that_a_tuning_adopted_reach_into_an_optimizers_own(mine, written):
    path = Path("runs/tune-mine/nadamw.json")
    template = replace(sweeps.load(str(mine)).arms["prefix_lm"], optimizer=Optimizer(name="muon", learning_rate=0.01))
    name = next(iter(template.optimizer.extra))
    rule = replace(written.rules["prefix_lm"], setup=rules.setup(template), optimizer={f"extra.{name}": 0.7})
    rules.write(path, replace(written, rules={"prefix_lm": rule}, regret={"prefix_lm": written.regret["prefix_lm"]}))
    study = replace(
        sweeps.load(str(mine)), arms={"prefix_lm": template}, baseline="prefix_lm", learning_rate=f"tuned:{path}"
    )
    assert {row.run.optimizer.extra[name] for row in sweeps.plan(study).runs} == {0.7}
