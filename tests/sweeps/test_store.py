"""A study's directory under several processes, killed ones among them, and under plans that change."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lab import records
from lab.preemption import Preempted
from lab.spec import to_json
from sweeps.launch.worker import work
from sweeps.store import FAILED, Store

SPAWN = multiprocessing.get_context("spawn")


def rows(count: int, name: str = "s") -> dict:
    """A plan of `count` small runs that differ in their seed."""
    from dataclasses import replace

    from runs import make_run

    run = make_run()
    runs = [replace(run, seed=replace(run.seed, init=i)) for i in range(count)]
    return {"schema": 1, "study": {"name": name},
            "runs": [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in runs]}  # fmt: skip


def finish(run, directory: Path, seconds: float = 0.0) -> None:
    """A trainer that takes its time and notes each start."""
    with (directory / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    records.write_json(directory / records.RESULT, {"schema": 1, "run_id": run.run_id, "status": "done",
                                                    "outcome": {"steps": 8, "loss": 1.5}})  # fmt: skip


def work_slowly(root: str, seconds: float) -> None:
    work(Store(Path(root)), lambda run, d: finish(run, d, seconds), lambda run: "one", poll_seconds=0.05)


def claim_all(root: str, barrier, wins) -> None:
    store = Store(Path(root))
    for run_id in store.runs:
        barrier.wait()
        with store.claim(run_id) as mine:
            wins.put((run_id, mine))
            barrier.wait()


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "study")
    made.write_plan(rows(4))
    return made


def test_one_of_two_racing_processes_gets_each_claim(tmp_path):
    store = Store(tmp_path / "study")
    store.write_plan(rows(100))
    barrier, wins = SPAWN.Barrier(2), SPAWN.Queue()
    racers = [SPAWN.Process(target=claim_all, args=(str(store.root), barrier, wins)) for _ in range(2)]
    for racer in racers:
        racer.start()
    got = [wins.get(timeout=60) for _ in range(200)]
    for racer in racers:
        racer.join()
    assert all(sorted(mine for r, mine in got if r == run_id) == [False, True] for run_id in store.runs)


def test_a_killed_workers_run_is_finished_by_another(store):
    first = SPAWN.Process(target=work_slowly, args=(str(store.root), 60))
    first.start()
    deadline = time.monotonic() + 60
    while not any(s.state == "running" for s in store.status()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (held,) = [s for s in store.status() if s.state == "running"]
    assert str(first.pid) in held.held_by
    with store.claim(held.run_id) as mine:
        assert not mine
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    work_slowly(str(store.root), 0)
    assert [s.state for s in store.status()] == ["done"] * 4
    starts = {i: len((store.directory(i) / "starts").read_text().split()) for i in store.runs}
    assert starts == {i: 2 if i == held.run_id else 1 for i in store.runs}


def test_a_run_that_raises_is_recorded_and_the_others_go_on(store):
    bad = list(store.runs)[1]

    def train(run, directory):
        if run.run_id == bad:
            raise RuntimeError("out of luck")
        finish(run, directory)

    work(store, train, lambda run: "one")
    assert [s.state for s in store.status()] == ["done", "failed", "done", "done"]
    assert "RuntimeError: out of luck" in store.failure(bad)["error"]
    assert store.retry() == 1
    work(store, finish, lambda run: "one")
    assert [s.state for s in store.status()] == ["done"] * 4


def test_a_preempted_worker_leaves_its_run_waiting(store):
    def train(run, directory):
        raise Preempted

    with pytest.raises(SystemExit) as left:
        work(store, train, lambda run: "one")
    assert left.value.code == 75
    assert [s.state for s in store.status()] == ["waiting"] * 4


def test_workers_prefer_their_own_programs_and_avoid_those_being_compiled(store):
    keys = dict(zip(store.runs, ("a", "b", "a", "b"), strict=True))
    order = []

    def train(run, directory):
        order.append(keys[run.run_id])
        finish(run, directory)

    with store.compile_lock("a"):
        assert store.is_compiling("a") and not store.is_compiling("b")
        work_until_two = [0]

        def two_then_stop(run, directory):
            train(run, directory)
            work_until_two[0] += 1
            if work_until_two[0] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work(store, two_then_stop, lambda run: keys[run.run_id])
    assert order == ["b", "b"]
    work(store, train, lambda run: keys[run.run_id])
    assert order == ["b", "b", "a", "a"]


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


def test_a_directory_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        Store(tmp_path).write_plan(rows(1))


@pytest.mark.parametrize("run_id", ["../../etc", "a/b", ".hidden", ""])
def test_ids_can_not_leave_the_directory(tmp_path, run_id):
    plan = rows(1)
    plan["runs"][0]["run_id"] = run_id
    (tmp_path / records.PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="run_id"):
        _ = Store(tmp_path).runs


def test_an_edited_plan_is_not_trained(store):
    plan = json.loads((store.root / records.PLAN).read_text())
    plan["runs"][0]["run"]["batch"] = 999
    (store.root / records.PLAN).write_text(json.dumps(plan))
    edited = Store(store.root)
    work(edited, finish, lambda run: "one")
    first = plan["runs"][0]["run_id"]
    assert "plan.json was edited" in edited.failure(first)["error"]
    assert [s.state for s in edited.status()] == ["failed", "done", "done", "done"]


@pytest.mark.parametrize("name", [records.PLAN, FAILED, records.RESULT])
def test_a_torn_file_is_named(store, name):
    run_id = next(iter(store.runs))
    path = store.root / name if name == records.PLAN else store.directory(run_id) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"schema": 1, "sta')
    with pytest.raises(ValueError, match=f"{name}: not a whole JSON file"):
        records.read_json(path)


def test_status_shows_the_last_logged_step(store):
    run_id = next(iter(store.runs))
    writer = records.MetricsWriter(store.directory(run_id), resume_step=0)
    writer.write(step=4, share=0.5, loss=2.25)
    writer.write(step=4, share=0.5, held_out_loss=3.0)
    writer.file.write('{"step": 6, "sha')
    writer.close()
    status = store.status()[0]
    assert (status.state, status.step, status.loss, status.share) == ("waiting", 4, 2.25, 0.5)
