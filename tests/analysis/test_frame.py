"""Records are read once and checked: what was spent is what was planned."""

import hashlib
import json

import numpy as np
import pytest

import synthetic
from analysis.compare import differences
from analysis.frame import load, not_comparable
from analysis.isoflop import minima
from analysis.noise import seed_noise
from lab import records

ARMS = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}


def study(**changes):
    return synthetic.Study(arms=ARMS, baseline="decoder_only", budgets=synthetic.BUDGETS[:2], **changes)


def test_one_row_for_each_planned_run(tmp_path):
    synthetic.write(tmp_path, study(missing=(0,), failed=(1,), diverged=(2,)))
    frame = load(tmp_path)
    assert len(frame) == 2 * (2 * 4 + 2)
    assert frame["status"].tolist()[:4] == ["missing", "failed", "diverged", "done"]
    assert frame["loss"].isna().tolist()[:4] == [True, True, True, False]
    assert frame.attrs["study"]["baseline"] == "decoder_only"
    done = frame[frame["status"] == "done"]
    np.testing.assert_allclose(done["flops_exact"], done["planned_exact"])
    assert np.allclose(done["flops_exact"], done["budget"], rtol=0.01)
    assert set(done["D"]) <= set(range(2, 400)) and (done["T"] == synthetic.T).all()
    assert (done["seed_init"] == done["replicate"]).all()
    assert frame.loc[2, "diverged_at"] == 7 and frame.loc[2, "flops_exact"] == frame.loc[2, "planned_exact"] / 2


def test_a_study_whose_arms_are_scored_on_different_things_gives_no_difference(tmp_path):
    synthetic.write(tmp_path, study())
    frame = load(tmp_path)
    assert frame["measure"].nunique() == 1 and not_comparable(frame, "prefix_lm", "decoder_only") is None
    frame.loc[frame["arm"] == "prefix_lm", "measure"] = "another"
    found = minima(frame)
    compared = differences(frame, found, seed_noise(frame))
    assert all("different things" in value.reason for value in compared.values())
    frame.loc[:, "measure"] = "one"
    frame.loc[frame["arm"] == "prefix_lm", "corpus"] = "another"
    assert "texts are different" in not_comparable(frame, "prefix_lm", "decoder_only")


def test_arms_that_share_a_run_share_its_row(tmp_path):
    arms = {"decoder_only": ARMS["decoder_only"], "again": ARMS["decoder_only"]}
    synthetic.write(tmp_path, synthetic.Study(arms=arms, baseline="decoder_only", same_runs=("again",)))
    frame = load(tmp_path)
    assert frame["run_id"].nunique() * 2 == len(frame)
    assert frame.groupby("run_id")["loss"].nunique().eq(1).all()


@pytest.mark.parametrize("convention", ["exact", "dense", "6nd", "textbook", "tokens", "steps"])
def test_a_run_that_spent_otherwise_is_named(tmp_path, convention):
    def change(result):
        result["outcome"]["spent"] = {**result["outcome"]["spent"], convention: 1}

    synthetic.write(tmp_path, study(change=change))
    with pytest.raises(ValueError, match=rf"plan.json: run prefix_lm-d\S+ spent 1 {convention}, plan.json planned"):
        load(tmp_path)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"no plan.json here; give the directory"):
        load(tmp_path)
    synthetic.write(tmp_path, study())
    plan = json.loads((tmp_path / "plan.json").read_text())
    victim = records.run_directory(tmp_path, plan["runs"][4]["run_id"]) / "result.json"
    whole = victim.read_text()
    victim.write_text(whole[:100])
    with pytest.raises(ValueError, match=rf"{plan['runs'][4]['run_id']}/result.json: not a whole JSON"):
        load(tmp_path)
    victim.write_text(whole.replace('"status": "done"', '"status": "lost"'))
    with pytest.raises(ValueError, match="status = 'lost'"):
        load(tmp_path)
    victim.write_text(whole)
    for key, value, match in (("baseline", "nobody", "study.baseline = 'nobody'"), ("arms", {}, "study.baseline")):
        broken = {**plan, "study": {**plan["study"], key: value}}
        records.write_json(tmp_path / "plan.json", broken)
        with pytest.raises(ValueError, match=match):
            load(tmp_path)
    records.write_json(tmp_path / "plan.json", {**plan, "runs": []})
    with pytest.raises(ValueError, match="has no runs"):
        load(tmp_path)
    rows = [{**plan["runs"][0], "arm": "other"}]
    records.write_json(tmp_path / "plan.json", {**plan, "runs": rows})
    with pytest.raises(ValueError, match="arm = 'other'"):
        load(tmp_path)


def published(run_dir, **changes):
    """As if an attempt had published the run's result: its history says which bytes count."""
    text = (run_dir / "result.json").read_bytes()
    attempt = "attempts/0001-0123abcd"
    (run_dir / attempt).mkdir(parents=True)
    (run_dir / attempt / "result.json").write_bytes(text)
    event = {
        "schema": 1,
        "kind": "ended",
        "attempt": attempt,
        "status": "done",
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    records.write_json(run_dir / "history" / "0001.json", {"schema": 1, "kind": "attempt"})
    records.write_json(run_dir / "history" / "0002.json", {**event, **changes})
    return run_dir / attempt / "result.json"


@pytest.fixture
def victim(tmp_path):
    synthetic.write(tmp_path, study())
    plan = json.loads((tmp_path / "plan.json").read_text())
    return records.run_directory(tmp_path, plan["runs"][4]["run_id"])


def test_a_result_counts_only_as_it_was_published(tmp_path, victim):
    own, path = published(victim), victim / "result.json"
    before = load(tmp_path)
    whole = path.read_text()
    loss = records.read_result(victim)["outcome"]["loss"]
    path.write_text(whole.replace(repr(loss), repr(loss - 1)))
    with pytest.raises(ValueError, match=rf"{path}: not what the run published.*copy {own} over it, which is whole"):
        load(tmp_path)
    kept = load(tmp_path, damaged="keep")
    assert kept["status"].tolist().count("damaged") == 1 and (kept["status"] == "done").sum() == len(kept) - 1
    assert str(path) in kept.loc[4, "reason"] and np.isnan(kept.loc[4, "loss"]) and kept.loc[4, "planned_exact"] > 0
    path.unlink()  # the copy was not made yet: the attempt's own is read
    assert load(tmp_path)["loss"].equals(before["loss"])
    own.write_text(whole[:50])
    with pytest.raises(ValueError, match=rf"{path}: gone, or .* delete {victim} to train the run again"):
        load(tmp_path)
    path.write_text(whole[:50])
    with pytest.raises(ValueError, match=rf"{path}: not what the run published.*restore it, or delete {victim}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attempt": "../../outside"}, "names no attempt"),
        ({"kind": "released"}, "of no attempt that it published this"),
        ({"status": "failed"}, "of no attempt that it published this"),
        ({"schema": 9}, "schema 9"),
    ],
    ids=str,
)
def test_a_result_that_no_history_published(tmp_path, victim, changes, said):
    published(victim, **changes)
    with pytest.raises(ValueError, match=said):
        load(tmp_path)
    assert load(tmp_path, damaged="keep").loc[4, "status"] == "damaged"


def test_a_history_with_a_gap_is_not_trusted(tmp_path, victim):
    published(victim)
    (victim / "history" / "0001.json").unlink()
    with pytest.raises(ValueError, match=rf"0001.json: is missing, while a later one is there; .* delete {victim}"):
        load(tmp_path)


def test_runs_that_were_cancelled_are_not_missing(tmp_path, victim):
    (victim / "result.json").unlink()
    records.write_json(victim / "history" / "0001.json", {"schema": 1, "kind": "cancelled"})
    assert load(tmp_path).loc[4, "status"] == "cancelled"


def test_a_result_that_spent_otherwise_is_kept_as_damaged(tmp_path):
    synthetic.write(tmp_path, study(change=lambda result: result["outcome"]["spent"].update(tokens=1)))
    frame = load(tmp_path, damaged="keep")
    assert set(frame["status"]) == {"damaged"} and "spent 1 tokens" in frame.loc[0, "reason"]
