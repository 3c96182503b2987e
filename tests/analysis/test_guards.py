"""Each guard against a study that is fair but for one thing: it says so, and without it nobody does."""

from dataclasses import replace

import pytest

import analysis.guards as guards
import synthetic
from analysis.answer import flagged
from analysis.frame import load
from analysis.guards import GUARDS, Case, find
from gains_study import BASE, BUDGETS, header, loss_of, rows
from lab import plan_file, records
from lab.spec import Data, Evaluation, Objective
from sweeps.study import Gains

LOSSES = {(arm, budget): dict.fromkeys(range(3), loss_of(budget)) for arm in (BASE, "arm") for budget in BUDGETS}


def of(arm, table):
    return [row for row in table if row["arm"] == arm]


def fair():
    return header(Gains(), [BASE, "arm"]), rows(LOSSES)


def changed(**parts):
    """Every run of the arm with these parts, and none of the baseline's."""
    return header(Gains(), [BASE, "arm"]), rows(LOSSES, lambda run: replace(run, **parts))


def stopped_early():
    """The arm's runs were meant for twice the budget at which they are read."""
    return header(Gains(), [BASE, "arm"]), rows(
        LOSSES, lambda run: replace(run, budget=replace(run.budget, amount=2 * run.budget.amount))
    )


def one_run_for_two_budgets():
    study, table = fair()
    for row, other in zip(of("arm", table)[3:], of("arm", table)[:3], strict=False):
        row["run_id"] = other["run_id"]
    return study, table


def unlike_seeds():
    study, table = fair()
    for row in of("arm", table):
        row["seed_data"] += 100
    return study, table


def other_text():
    return changed(data=Data(corpus="markov", manifest="1" * 64, train_tokens=10**6))


def without_decay(arm):
    study, table = fair()
    for row in of(arm, table):
        row |= {"final_rate": 0.1, "schedule": "cosine"}
    return study, table


def with_rows(change, arm="arm"):
    def make():
        study, table = fair()
        for row in of(arm, table):
            change(row)
        return study, table

    return make


def with_rules(change):
    def make():
        study, table = fair()
        change(study["learning_rates"]["arms"])
        return study, table

    return make


def rates_in_place():
    study, table = fair()
    for row in of("arm", table):
        row["learning_rate"] *= 1 + row["replicate"] % 2
    return study, table


def best_rate_at_the_end():
    study, table = fair()
    study = {**study, "gains": {**study["gains"], "allow": ["chosen_in_place"]}}
    for row in of("arm", table):
        row |= {"learning_rate": 0.01 * 2 ** row["replicate"], "loss": 5 - row["replicate"]}
    return study, table


UNFAIR = {
    "mid_schedule": [stopped_early, one_run_for_two_budgets],
    "units": [with_rows(lambda row: row.update(unit="steps")), with_rows(lambda row: row.update(unit="flops (6nd)"))],
    "precision": [lambda: changed(precision="bf16")],
    "data_order": [unlike_seeds, other_text],
    "validation": [
        lambda: changed(evaluation=Evaluation(examples=8)),
        with_rows(lambda row: row.update(held_out=0.2)),
        with_rows(lambda row: row.update(tokenizer="other")),
    ],
    "masks": [with_rows(lambda row: row.update(masks=str(Objective(S=3, T=3))))],
    "undecayed": [lambda: without_decay(BASE)],
    "unlike_decay": [lambda: without_decay("arm")],
    "model": [with_rows(lambda row: row.update(model="wider"))],
    "batch": [with_rows(lambda row: row.update(batch=64))],
    "repeated_text": [with_rows(lambda row: row.update(epochs=3.0))],
    "unequal_tuning": [
        with_rules(lambda arms: arms["arm"].update(trials=24)),
        with_rules(lambda arms: arms.pop("arm")),
    ],
    "borrowed_rule": [
        with_rules(lambda arms: arms["arm"].update(rule="other", borrowed=["options.mlp 'swiglu' there, 'gelu' here"]))
    ],
    "ablation": [with_rows(lambda row: row.update(charged=False))],
    "untuned": [with_rules(lambda arms: arms.clear())],
    "edge": [with_rules(lambda arms: arms["arm"]["regret"].update(beyond=2)), best_rate_at_the_end],
    "chosen_in_place": [rates_in_place],
    "few_seeds": [lambda: (fair()[0], [row for row in fair()[1] if row["replicate"] == 0])],
    "dropped_seeds": [
        with_rows(lambda row: row.update(status="diverged") if row["replicate"] == 1 else None),
        with_rows(lambda row: row.update(status="missing") if row["replicate"] == 1 else None),
    ],
    "overfit": [with_rows(lambda row: row.update(loss=5.0 + row["budget"] / 1e12), BASE)],
}
CASES = [(name, make) for name, makes in UNFAIR.items() for make in makes]


def test_every_guard_has_its_case_and_a_fair_study_none():
    assert UNFAIR.keys() == GUARDS.keys()
    study, table = fair()
    assert find(Case(study=study, rows=table)) == []


@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_what_is_unfair_is_said_by_its_guard_and_by_no_other(name, make, monkeypatch):
    study, table = make()
    also = {"undecayed": {"unlike_decay"}, "edge": {"chosen_in_place"}}.get(name, set())
    found = [f for f in find(Case(study=study, rows=table)) if f.guard not in also]
    assert {f.guard for f in found} == {name}
    assert all(f.severity == GUARDS[name].gains and len(f.reason) > 40 for f in found)
    allowed = {**study, "gains": {**study["gains"], "allow": [name, *study["gains"]["allow"]]}}
    assert all(f.severity == "flag" for f in find(Case(study=allowed, rows=table)))
    monkeypatch.setattr(guards, "GUARDS", {other: guard for other, guard in GUARDS.items() if other != name})
    assert [f for f in find(Case(study=study, rows=table)) if f.guard not in also] == []


def test_other_studies_are_flagged_where_it_makes_sense():
    """Without `gains` in the header: an undecayed baseline and unlike decay are flagged, other models are what is asked."""
    study, table = without_decay(BASE)
    plain = {name: value for name, value in study.items() if name != "gains"}
    assert {f.guard: f.severity for f in find(Case(study=plain, rows=table))} == {
        "undecayed": "flag",
        "unlike_decay": "flag",
    }
    study, table = with_rows(lambda row: row.update(model="wider", epochs=3.0))()
    assert find(Case(study={n: v for n, v in study.items() if n != "gains"}, rows=table)) == []


def test_a_control_may_have_another_budget_and_a_family_its_own_baseline():
    study, table = stopped_early()
    assert find(Case(study={**study, "gains": {**study["gains"], "controls": {"arm": 2.0}}}, rows=table)) == []
    study, table = changed(precision="bf16")
    other = {**study, "against": {"third": "arm"}}
    assert find(Case(study=other, rows=table)) == []


def test_a_report_of_structures_says_what_guards_flag(tmp_path):
    two = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}
    synthetic.write(tmp_path, synthetic.Study(arms=two, baseline="decoder_only"))
    plan = plan_file.read(tmp_path)
    changed_rows = [dict(row) for row in plan["runs"]]
    for row in changed_rows:
        if row["arm"] == "decoder_only":
            row["run"] = {**row["run"], "optimizer": {**row["run"]["optimizer"], "final": 0.5}}
    records.write_json(tmp_path / records.PLAN, {**plan, "runs": changed_rows})
    assert any("the baseline decoder_only is not decayed" in caveat for caveat in flagged(load(tmp_path)))
