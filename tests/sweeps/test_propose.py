"""Proposed runs as runs of their study: nearest shapes, exact cost, seeds of their own, and a plan that still runs."""

import json
import shlex
from dataclasses import replace

import pandas as pd
import pytest

import sweeps
from lab import cost, plan_file, records
from lab.spec import from_json
from sweeps import ladder, propose
from sweeps.store import Store

V = 260
MINE = """
from sweeps import Match, Study, arm, corpus
from sweeps.ladder import ladder
from lab.spec import Evaluation

def study(preset="small"):
    data = corpus("markov")
    return Study(
        name="mine", question="?", baseline="decoder_only", budgets={budgets}, batch=4, window=2, learning_rate=0.01,
        arms={{name: arm(name, data, S=8, T=8, evaluation=Evaluation(examples=16))
              for name in ("{other}", "decoder_only")}},
        sizes=ladder(8, 16, 24, depth=1, head_width=8), {more}
    )
"""


def made(tmp_path, **changes):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(**{"more": "", "other": "encoder_decoder", "budgets": "(1e8, 2e8)"} | changes))
    study = sweeps.load(str(path))
    directory = tmp_path / "runs"
    Store(directory).write_plan(sweeps.plan(study).to_json())
    return study, directory


@pytest.fixture
def mine(tmp_path):
    return made(tmp_path)


def body(run):
    return cost.parameters(run.structure, run.shape, run.options, run.objective, V).body


def test_a_written_plan_is_read_back_whole(mine):
    study, directory = mine
    again = propose.read(directory)
    assert again.to_json() == plan_file.read(directory)
    assert again.runs == sweeps.plan(study).runs
    assert again.study.budgets == study.budgets and again.study.name == "mine"
    assert propose.study_of(directory) == study


def test_cells_are_every_arm_size_and_budget_at_its_exact_cost(mine):
    study, _ = mine
    table, left_out = propose.cells(study, beyond=1)
    # Three sizes and one beyond, two budgets and one beyond, two arms.
    assert len(table) + len(left_out) == 2 * 4 * 3
    assert set(table["budget"]) == {1e8, 2e8, 4e8}
    for row in propose.runs(study, table):
        planned = cost.planned(row.row.run, V)
        assert row.off_N == 0 and dict(row.row.planned) == planned
        assert abs(planned["exact"] / row.row.budget - 1) <= 0.01
    assert (table["flops"] - table["budget"] * (1 + table["residual"])).abs().max() <= 1
    assert all("can not be matched" in reason for reason in left_out)
    sizes = sorted(table.loc[table["arm"] == "decoder_only", "N"].unique())
    assert sizes[:3] == [body(replace(study.arms["decoder_only"], shape=s)) for s in study.sizes]
    # Wider by 24 / 16: 40 is the width nearest to 36 that heads of about 8 divide evenly.
    assert sizes[3:] == [body(replace(study.arms["decoder_only"], shape=ladder.shape(40, 1, head_width=8)))]


def test_repeated_cells_become_replicates_with_seeds_of_their_own(mine):
    study, directory = mine
    written = propose.read(directory)
    first = next(row for row in written.runs if row.arm == "decoder_only")
    table = pd.DataFrame(
        {"arm": "decoder_only", "N": float(body(first.run)), "flops": [first.budget, first.budget * 1.001]}
    )
    asked = propose.runs(study, table, written.runs)
    assert [one.row.replicate for one in asked] == [1, 2]
    assert [one.row.run.seed.init for one in asked] == [1, 2] == [one.row.run.seed.data for one in asked]
    assert {(one.row.budget, one.row.rung) for one in asked} == {(first.budget, first.rung)}
    # Nothing but the seed is new.
    assert replace(asked[0].row.run, seed=first.run.seed) == first.run
    assert len({one.row.run_id for one in asked} | {row.run_id for row in written.runs}) == 2 + len(written.unique)


def test_sizes_between_the_rungs_get_the_nearest_legal_shape(mine):
    study, directory = mine
    sizes = [body(replace(study.arms["encoder_decoder"], shape=shape)) for shape in study.sizes]
    between = (sizes[1] * sizes[2]) ** 0.5
    table = pd.DataFrame(
        {"arm": "encoder_decoder", "N": [between, between, sizes[1] * 1.02], "budget": [4e8, 2e8, 2e8]}
    )
    one, other, rung = propose.runs(study, table, propose.read(directory).runs)
    assert one.row.run.shape.D == 20 and one.row.run.shape not in study.sizes
    assert abs(one.off_N) < 0.15 and one.row.rung == other.row.rung >= 3  # a rung is one shape
    assert rung.row.run.shape == study.sizes[1] and rung.off_N == pytest.approx(1 / 1.02 - 1)
    assert one.row.budget == 4e8 and one.row.run.optimizer.learning_rate == 0.01


def test_the_extended_plan_runs_what_is_missing_and_keeps_the_rest(mine, monkeypatch):
    study, directory = mine
    before = plan_file.read(directory)
    table = pd.DataFrame({"arm": ["decoder_only"], "N": [1000.0], "budget": [1e8]})
    asked = propose.runs(study, table, propose.read(directory).runs)
    plan = propose.extended(directory, study, [one.row for one in asked], "1 run added")
    assert plan_file.read(directory) == before
    assert "1 runs added, 0 dropped" in propose.write(directory, plan)
    after = propose.read(directory)
    assert after.content["runs"][:-1] == before["runs"] and after.content["study"]["notes"][-1] == "1 run added"
    assert from_json(after.content["runs"][-1]["run"]) == asked[0].row.run
    # `lab run` executes it: everything that has ended stays as it is.
    store = Store(directory)
    for run_id in list(store.runs)[:-1]:
        claim = store.claim(run_id)
        store.fail(claim, "not in this test")
        claim.release()
    sweeps.run(after, directory, workers=1)
    assert [s.state for s in Store(directory).status()] == ["failed"] * len(before["runs"]) + ["done"]
    result = json.loads((records.run_directory(directory, asked[0].row.run_id) / records.RESULT).read_text())
    assert result["planned"]["exact"] == asked[0].row.planned["exact"]
    # The study's file still is the one that made it.
    assert propose.study_of(directory) == study


def test_a_changed_study_is_refused(mine, tmp_path):
    _, directory = mine
    path = tmp_path / "mine.py"
    path.write_text(path.read_text().replace("learning_rate=0.01", "learning_rate=0.02"))
    with pytest.raises(ValueError, match=r"now plans other runs than .* \(8 of 8 differ"):
        propose.study_of(directory)
    path.unlink()
    with pytest.raises(ValueError, match="no shipped study and no file"):
        propose.study_of(directory)


def test_arms_of_equal_parameters_keep_their_ladder(tmp_path):
    study, _ = made(tmp_path, more='match=Match(quantity="parameters"),', other="prefix_lm", budgets="(2e4, 4e4)")
    table, left_out = propose.cells(study, beyond=1)
    sizes = {arm: rows.groupby("budget")["N"].apply(list) for arm, rows in table.groupby("arm")}
    assert not left_out and list(sizes["prefix_lm"].index) == [2e4, 4e4, 8e4]
    for budget, ours in sizes["prefix_lm"].items():
        assert ours == pytest.approx(sizes["decoder_only"][budget], rel=0.01) and len(ours) == 3
    # Budgets are tokens there.
    (one,) = propose.runs(study, table.iloc[[4]].drop(columns="budget"))
    assert one.row.planned["tokens"] == pytest.approx(one.row.budget, rel=0.01)


def test_a_study_with_steps_on_other_text_and_of_another_preset_is_found_again(tmp_path):
    """Whose steps are between arms: a cell has one of them."""
    path, text = tmp_path / "my mine.py", tmp_path / "some text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"{number}: so much depends upon a red wheel barrow. " * 2000)
    mine = MINE.format(budgets="(1e8, 2e8) if preset == 'long' else (1e8,)", other="prefix_lm",
                       more='steps=(("prefix_lm", "decoder_only"),),')  # fmt: skip
    mine = mine.replace('preset="small"):\n    data = corpus("markov")', 'preset="small", data=None):')
    path.write_text(f"PRESETS = ('small', 'long')\n{mine}")
    directory, data = tmp_path / "runs", sweeps.corpus(text, held_out=0.4)
    study = sweeps.load(str(path), "long", data)
    Store(directory).write_plan(sweeps.plan(study).to_json())
    again = propose.study_of(directory)
    assert again == study and again.budgets == (1e8, 2e8) and again.name.endswith("-some_text")
    assert propose.study_of(directory, str(path)) == study
    named = sweeps.load(str(path), "long", data, tokenizer="my words.json")
    assert shlex.split(named.source)[-4:] == ["--data", str(text), "--tokenizer", "my words.json"]
    Store(directory).write_plan(sweeps.plan(named).to_json())
    assert propose.study_of(directory) == named
    table, left_out = propose.cells(study)
    assert all("can not be matched within" in reason for reason in left_out) and set(table["arm"]) == {
        "prefix_lm",
        "decoder_only",
    }


def test_mistakes_say_the_way_out(mine):
    study, _ = mine
    table = pd.DataFrame({"arm": ["decoder_onli"], "N": [1000.0], "budget": [1e8]})
    with pytest.raises(ValueError, match="did you mean 'decoder_only'"):
        propose.runs(study, table)
    with pytest.raises(ValueError, match="column 'flops' is not in the table"):
        propose.runs(study, table.drop(columns="budget"))
    with pytest.raises(ValueError, match=r"can not be matched within 1.0%"):
        propose.runs(study, table.assign(arm="decoder_only", budget=1.5e6))
