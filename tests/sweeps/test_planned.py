"""A study's plan: written anew, changed under its runs, edited, torn."""

import json

import pytest

from lab import records
from small_studies import finish, rows
from sweeps.launch.worker import work
from sweeps.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "study")
    made.write_plan(rows(4))
    return made


def test_the_same_plan_again_changes_nothing(store):
    before = (store.root / records.PLAN).stat().st_mtime_ns
    assert "0 runs added, 0 dropped, 4 kept" in store.write_plan(rows(4))
    assert (store.root / records.PLAN).stat().st_mtime_ns == before


def test_a_grown_plan_keeps_what_is_done(store):
    work(store, finish, lambda run: "one")
    assert "2 runs added, 0 dropped, 4 kept" in store.write_plan(rows(6))
    assert [s.state for s in store.status()] == ["done"] * 4 + ["waiting"] * 2


def test_a_plan_changed_under_its_runs_is_refused_and_loses_nothing(store):
    work(store, finish, lambda run: "one")
    before = (store.root / records.PLAN).read_text()
    with pytest.raises(ValueError, match=r"0 runs added, 2 dropped, 2 kept; 2 of the dropped ones were begun"):
        store.write_plan(rows(2))
    assert (store.root / records.PLAN).read_text() == before
    store.write_plan(rows(2), replace=True)
    assert len(list((store.root / "runs").iterdir())) == 4


def test_two_studies_can_not_share_a_directory(store):
    with pytest.raises(ValueError, match=r"holds study 's', not 'other'.*--out"):
        store.write_plan(rows(4, name="other"))


def test_several_hosts_may_write_the_same_plan_at_once(tmp_path):
    (tmp_path / ".plan.json.1f0c").write_text("another host is at it")
    assert "new plan" in Store(tmp_path).write_plan(rows(1)) and "1 kept" in Store(tmp_path).write_plan(rows(1))


def test_a_directory_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        Store(tmp_path).write_plan(rows(1))


def test_a_damaged_plan_is_written_again_beside_what_is_done(store):
    """By the way out that its error names, also where a report lies there."""
    work(store, finish, lambda run: "one")
    (store.root / "report.html").write_text("")
    whole = (store.root / records.PLAN).read_bytes()
    (store.root / records.PLAN).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"plan\.json: .*; restore it, or delete it and write the plan again"):
        Store(store.root).write_plan(rows(4))
    (store.root / records.PLAN).unlink()
    assert "new plan of 4 rows" in Store(store.root).write_plan(rows(4))
    assert (store.root / records.PLAN).read_bytes() == whole
    assert [s.state for s in Store(store.root).status()] == ["done"] * 4


@pytest.mark.parametrize("run_id", ["../../etc", "a/b", ".hidden", ""])
def test_ids_can_not_leave_the_directory(tmp_path, run_id):
    plan = rows(1)
    plan["runs"][0]["run_id"] = run_id
    (tmp_path / records.PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="run_id"):
        _ = Store(tmp_path).runs
    with pytest.raises(ValueError, match="run_id"):
        Store(tmp_path / "new").write_plan(plan)
    with pytest.raises(ValueError, match="key"), Store(tmp_path).compiling.hold(run_id):
        pass


def test_an_edited_plan_is_not_trained(store):
    plan = json.loads((store.root / records.PLAN).read_text())
    plan["runs"][0]["run"]["batch"] = 999
    (store.root / records.PLAN).write_text(json.dumps(plan))
    edited = Store(store.root)
    work(edited, finish, lambda run: "one")
    first = plan["runs"][0]["run_id"]
    assert "plan.json was edited" in edited.failure(first)["error"]
    assert [s.state for s in edited.status()] == ["failed", "done", "done", "done"]


@pytest.mark.parametrize("name", [records.PLAN, records.FAILED, records.RESULT])
def test_a_torn_file_is_named(store, name):
    run_id = next(iter(store.runs))
    path = store.root / name if name == records.PLAN else store.directory(run_id) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"schema": 1, "sta')
    with pytest.raises(ValueError, match=f"{name}: not a whole JSON file"):
        records.read_json(path)
