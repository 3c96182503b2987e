"""A study's directory under several processes, killed ones among them, and under plans that change."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lab import records
from lab.preemption import Preempted
from lab.spec import to_json
from runs import make_run
from sweeps.launch.worker import work
from sweeps.store import FAILED, Owner, Store, _process

SPAWN = multiprocessing.get_context("spawn")


def rows(count: int, name: str = "s") -> dict:
    """A plan of `count` small runs that differ in their seed."""
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
        claim = store.claim(run_id)
        wins.put((run_id, claim.attempt if claim else None))
        barrier.wait()


def elsewhere(owner: Owner | None = None) -> Owner:
    return replace(owner or Owner.here(), machine="another boot pid:[1]", host="elsewhere")


def gone() -> Owner:
    """A process of this machine that has ended."""
    process = SPAWN.Process(target=time.sleep, args=(0,))
    process.start()
    assert process.pid is not None
    process.join()
    return replace(Owner.here(), pid=process.pid, started=1)


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "study")
    made.write_plan(rows(4))
    return made


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_three_racing_processes_gets_each_claim(tmp_path, stale):
    store = Store(tmp_path / "study")
    store.write_plan(rows(200))
    if stale:
        dead = gone()
        assert all(store.claim(run_id, dead) for run_id in store.runs)
    barrier, wins = SPAWN.Barrier(3), SPAWN.Queue()
    racers = [SPAWN.Process(target=claim_all, args=(str(store.root), barrier, wins)) for _ in range(3)]
    for racer in racers:
        racer.start()
    got = [wins.get(timeout=60) for _ in range(600)]
    for racer in racers:
        racer.join()
    won = [(run_id, attempt) for run_id, attempt in got if attempt is not None]
    assert sorted(won) == sorted((run_id, 2 if stale else 1) for run_id in store.runs)


def test_another_machines_silence_is_measured_on_ones_own_clock(store):
    run_id = next(iter(store.runs))
    theirs = store.claim(run_id, elsewhere())
    now = [0.0]
    observer = Store(store.root, lease=60, clock=lambda: now[0])
    for now[0] in (0.0, 59.0):
        assert observer.claim(run_id) is None
    assert theirs.renew()
    for now[0] in (61.0, 120.0):  # the beat was seen to change at 61
        assert observer.claim(run_id) is None
        assert observer.status()[0].state == "running"
    now[0] = 121.0
    assert observer.status()[0].state == "waiting"
    late = Store(store.root, lease=60, clock=lambda: now[0])
    assert late.claim(run_id) is None  # who has not watched for a lease does not know
    ours = observer.claim(run_id)
    assert ours is not None and ours.attempt == 2
    assert not theirs.renew() and theirs.lost.is_set()
    store.fail(theirs, "late")
    theirs.release()
    assert store.failure(run_id) is None and observer.claim(run_id) is None


def test_a_living_process_keeps_its_run_however_slow(store):
    run_id = next(iter(store.runs))
    now = [0.0]
    observer = Store(store.root, clock=lambda: now[0])
    assert store.claim(run_id) is not None and observer.claim(run_id) is None
    now[0] = 1e6
    assert observer.claim(run_id) is None


def test_a_process_id_that_is_anothers_by_now_is_a_dead_owner(store):
    me = Owner.here()
    if me.started is None:
        pytest.skip("this kernel shows no start times")
    run_id = next(iter(store.runs))
    assert store.claim(run_id, replace(me, started=me.started - 1)) is not None
    assert store.status()[0].state == "waiting"
    assert store.claim(run_id).attempt == 2


def test_a_killed_process_that_nobody_waited_for_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _, started = _process(process.pid) or ("", None)
    owner = replace(Owner.here(), pid=process.pid, started=started)
    assert owner.alive()
    process.kill()
    deadline = time.monotonic() + 20
    while owner.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not owner.alive()
    process.communicate()


def test_a_held_claim_beats_and_is_released_once(store):
    quick, run_id = Store(store.root, lease=0.06), next(iter(store.runs))
    claim = quick.claim(run_id)
    (path,) = store.directory(run_id).glob("claim-*.json")
    with claim:
        deadline = time.monotonic() + 20
        while records.read_json(path)["beat"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert records.read_json(path)["beat"] >= 3 and store.claim(run_id) is None
    claim.release()
    assert records.read_json(path)["released"] and store.claim(run_id).attempt == 2
    assert not [p for p in store.directory(run_id).iterdir() if p.name.startswith(".")]


def test_what_was_claimed_is_described_in_its_directory(store):
    first, second, *_ = store.runs
    claim = store.claim(first)
    assert to_json(store.begin(claim)) == records.read_json(claim.directory / records.RUN)
    assert store.begin(claim).run_id == first
    other = store.claim(second)
    records.write_json(other.directory / records.RUN, store.runs[first]["run"])
    with pytest.raises(ValueError, match=f"describes {first}, not {second}"):
        store.begin(other)


def test_a_killed_workers_run_is_finished_by_another(store):
    first = SPAWN.Process(target=work_slowly, args=(str(store.root), 60))
    first.start()
    deadline = time.monotonic() + 60
    # Not only claimed, but begun: a worker killed in between has no start to count.
    while not any(p.read_text() for p in store.root.glob("runs/*/starts")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (held,) = [s for s in store.status() if s.state == "running"]
    assert str(first.pid) in held.held_by
    assert store.claim(held.run_id) is None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    work_slowly(str(store.root), 0)
    assert [s.state for s in store.status()] == ["done"] * 4
    starts = {i: len((store.directory(i) / "starts").read_text().split()) for i in store.runs}
    assert starts == {i: 2 if i == held.run_id else 1 for i in store.runs}
    assert {s.run_id: s.attempts for s in store.status()} == starts


def test_a_run_that_raises_is_recorded_and_the_others_go_on(store):
    bad = list(store.runs)[1]

    def train(run, directory):
        if run.run_id == bad:
            raise RuntimeError("out of luck")
        finish(run, directory)

    work(store, train, lambda run: "one")
    assert [s.state for s in store.status()] == ["done", "failed", "done", "done"]
    assert "RuntimeError: out of luck" in store.failure(bad)["error"]
    assert store.failure(bad)["attempts"] == 1
    assert store.retry([next(iter(store.runs))]) == 0
    with pytest.raises(ValueError, match="not in the plan"):
        store.retry(["a"])
    assert store.retry([bad]) == 1
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


def test_a_torn_claim_is_named(store):
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    (path,) = claim.directory.glob("claim-*.json")
    for torn, said in (('{"schema": 1, "own', "not a whole JSON file"), ('{"schema": 1}', "not a claim")):
        path.write_text(torn)
        for look in (store.status, lambda: store.claim(run_id)):
            with pytest.raises(ValueError, match=rf"claim-0001\.json: {said}"):
                look()


@pytest.mark.parametrize("run_id", ["../../etc", "a/b", ".hidden", ""])
def test_ids_can_not_leave_the_directory(tmp_path, run_id):
    plan = rows(1)
    plan["runs"][0]["run_id"] = run_id
    (tmp_path / records.PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="run_id"):
        _ = Store(tmp_path).runs
    with pytest.raises(ValueError, match="run_id"):
        Store(tmp_path / "new").write_plan(plan)
    with pytest.raises(ValueError, match="key"), Store(tmp_path).compile_lock(run_id):
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


def test_runs_of_one_program_train_side_by_side(store):
    """Up to the pack's size and this worker's share; what has ended is left out."""
    keys = dict(zip(store.runs, "abab", strict=True))
    packs, alone = [], []

    def together(runs, directories):
        packs.append([run.run_id for run in runs])
        assert all(store.claim(run.run_id) is None for run in runs)  # all of them are held
        for run, directory in zip(runs, directories, strict=True):
            finish(run, directory)

    def one(run, directory):
        alone.append(run.run_id)
        finish(run, directory)

    first, second, third, fourth = store.runs
    options = dict(train_together=together, program_key=lambda run: keys[run.run_id])
    work(store, one, pack_size=lambda run: 8, **options)
    assert packs == [[first, third], [second, fourth]] and not alone
    for run_id in store.runs:
        (store.directory(run_id) / records.RESULT).unlink()
    packs.clear()
    work(store, one, pack_size=lambda run: 8, workers=2, **options)
    assert not packs and sorted(alone) == sorted(store.runs)


def test_a_pack_that_raises_is_tried_one_by_one(store):
    """So that only the run that is at fault fails."""
    bad = list(store.runs)[2]

    def together(runs, directories):
        raise RuntimeError("one of them")

    def one(run, directory):
        if run.run_id == bad:
            raise RuntimeError("this one")
        finish(run, directory)

    work(store, one, lambda run: "one", train_together=together, pack_size=lambda run: 4)
    assert [s.state for s in store.status()] == ["done", "done", "failed", "done"]
    assert "this one" in store.failure(bad)["error"]
