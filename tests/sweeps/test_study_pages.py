"""What studies write beside their reports: the cost of conversations, and the differences of all shares of targets."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import sweeps
from analysis.report import VERDICT
from lab import cost, records, serving_cost
from sweeps.store import Store
from sweeps.studies import multi_turn, target_share


def planned(tmp_path, study, found):
    directory = tmp_path / study.name
    Store(directory).write_plan(sweeps.plan(study).to_json())
    records.write_json(directory / VERDICT, found)
    return directory


def body(run):
    return cost.parameters(run.structure, run.shape, run.options, run.objective, run.V).body


def test_conversations_are_priced_at_each_arms_best_size(tmp_path):
    study = sweeps.load("multi_turn")
    runs = {(row.arm, row.budget, row.rung): row.run for row in sweeps.plan(study).runs}
    budget = study.budgets[0]
    on, below, above = (
        runs[arm, budget, rung] for arm, rung in (("decoder_only", 1), ("prefix_lm", 1), ("prefix_lm", 2))
    )
    between = float(np.sqrt(body(below) * body(above)))
    minima = [
        {"arm": "decoder_only", "budget": budget, "loss": 2.0, "N": float(body(on))},
        {"arm": "prefix_lm", "budget": budget, "loss": 2.1, "N": between},
        {"arm": "encoder_decoder", "budget": budget, "reason": "at the edge"},
    ]
    out = tmp_path / "out"
    multi_turn.main(planned(tmp_path, study, {"minima": minima}), out)
    with (out / "multi_turn-serving.csv").open() as file:
        rows = {(row["arm"], int(row["turns"])): row for row in csv.DictReader(file)}

    def flops(run, turns):
        parts = (run.structure, run.shape, run.options, run.V)
        spent = serving_cost.conversation(*parts, turns=turns, user=32, reply=16, convention="exact")
        return sum(turn.prefill + turn.decode for turn in spent), spent[-1].cache_bytes

    for turns in (1, 5, 8):
        spent, cached = flops(on, turns)
        assert float(rows["decoder_only", turns]["flops"]) == pytest.approx(spent)
        assert float(rows["decoder_only", turns]["cache_bytes"]) == pytest.approx(cached)
        both = flops(below, turns)[0] * flops(above, turns)[0]
        assert float(rows["prefix_lm", turns]["flops"]) == pytest.approx(both**0.5)
    assert {arm for arm, _ in rows} == {"decoder_only", "prefix_lm"}
    page = (out / "multi_turn-serving.md").read_text()
    assert f"| decoder_only | 3e+10 | {body(on):,} | 2.0000 |" in page and (out / "multi_turn-serving.png").exists()
    refused = planned(tmp_path / "refused", study, {"minima": minima[2:]})
    with pytest.raises(ValueError, match="no arm has an iso-FLOP minimum"):
        multi_turn.main(refused, out)


def test_shares_of_targets_stand_in_one_table(tmp_path, capsys):
    known = {"value": 0.02, "low": 0.01, "high": 0.03, "p_holm": 0.004, "detectable": 0.02}
    directories = []
    half = sweeps.load("target_share", "small-1-2")  # whose text every test has; the table goes by names
    for what, found in (("3-4", known), ("1-16", {}), ("docstring", known)):
        study = replace(half, name=f"target_share-{what}")
        differences = [
            {"arm": arm, "budget": b, **found} for arm in ("prefix_lm", "encoder_decoder") for b in (3e10, 1.2e11)
        ]
        directories.append(planned(tmp_path, study, {"differences": differences}))
    target_share.main(directories, tmp_path)
    assert "no difference could be made in 1-16" in capsys.readouterr().out
    lines = [line for line in (tmp_path / "target_share.md").read_text().splitlines() if line.startswith("| [")]
    assert [line.split("]")[0][3:] for line in lines] == ["1-16", "1-16", "3-4", "3-4", "docstring", "docstring"]
    assert "+0.020 (+0.010 to +0.030), p 0.004" in lines[2] and "not known" in lines[0]
    with (tmp_path / "target_share.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    assert json.loads((directories[0] / VERDICT).read_text())["differences"][0]["value"] == 0.02


def test_shares_that_were_run_earlier_stay_in_the_table(tmp_path):
    def found(value):
        known = {"low": value - 0.01, "high": value + 0.01, "p_holm": 0.5, "detectable": 0.02}
        return {"differences": [{"arm": "prefix_lm", "budget": 3e10, "value": value, **known}]}

    half, most = (sweeps.load("target_share", f"small-{what}") for what in ("1-2", "15-16"))
    target_share.main([planned(tmp_path / "first", half, found(0.01)), planned(tmp_path, most, found(0.02))], tmp_path)
    before = (tmp_path / "target_share.md").read_text()
    target_share.main([planned(tmp_path / "again", half, found(0.03))], tmp_path)
    after = (tmp_path / "target_share.md").read_text()
    assert after == before.replace("+0.010 (+0.000 to +0.020)", "+0.030 (+0.020 to +0.040)") != before
    with (tmp_path / "target_share.csv").open() as file:
        assert [(row["panel"], row["value"]) for row in csv.DictReader(file)] == [("1-2", "0.03"), ("15-16", "0.02")]
