"""A study's directory under several processes, killed ones among them, and under plans that change."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from lab import records
from lab.preemption import Preempted, stop_flag
from lab.spec import from_text, to_json
from runs import make_run
from sweeps import claim as claim_module
from sweeps.claim import HEARTBEAT, Claim
from sweeps.history import Owner, process_of
from sweeps.launch.worker import MachineTrouble, work
from sweeps.store import FAILED, MAX_DEATHS, Store

SPAWN = multiprocessing.get_context("spawn")


def rows(count: int, name: str = "s", batches: tuple[int, ...] = (4,)) -> dict:
    """A plan of `count` small runs that differ in their seed, and in turn in their batch, and so their program."""
    run = make_run()
    runs = [replace(run, seed=replace(run.seed, init=i), batch=batches[i % len(batches)]) for i in range(count)]
    return {"schema": 1, "study": {"name": name},
            "runs": [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in runs]}  # fmt: skip


def result_of(run) -> dict:
    return {"schema": 1, "run_id": run.run_id, "status": "done",
            "outcome": {"steps": 8, "loss": 1.5, "spent": {"exact": 100}}}  # fmt: skip


def finish(runs, claims, superseded, seconds: float = 0.0) -> None:
    """A trainer that takes its time and notes each start."""
    for run, claim in zip(runs, claims, strict=True):
        with (claim.run_dir.parent.parent / "starts").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        records.write_json(claim.run_dir / records.RESULT, result_of(run))


def work_slowly(root: str, seconds: float) -> None:
    work(Store(Path(root)), partial(finish, seconds=seconds), lambda run: "one", poll_seconds=0.05)


def publish(store: Store, claim: Claim) -> bool:
    """What a worker does once its trainer has returned."""
    records.write_json(claim.run_dir / records.RESULT, result_of(store.begin(claim)))
    return store.publish(claim)


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


def _event(kind: str, **content) -> str:
    return json.dumps({"schema": 1, "kind": kind, **content})


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


@pytest.mark.parametrize(
    "where", [elsewhere, Owner.here], ids=["another machine's", "this machine's, as one that is stopped"]
)
def test_silence_is_measured_on_ones_own_clock(store, where):
    run_id = next(iter(store.runs))
    theirs = store.claim(run_id, where())
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
    assert ours is not None and ours.attempt == 2 and ours.run_dir != theirs.run_dir
    assert not theirs.renew() and theirs.lost.is_set()


@pytest.mark.parametrize(("theirs", "ours"), [(600, 60), (60, 600)])
def test_the_longer_lease_counts(store, theirs, ours):
    """Who watches with another --lease takes nothing from who beats seldom."""
    run_id, now = next(iter(store.runs)), [0.0]
    assert Store(store.root, lease=theirs).claim(run_id, elsewhere()).renew()
    observer = Store(store.root, lease=ours, clock=lambda: now[0])
    for now[0] in (0.0, 61.0, 599.0):
        assert observer.status()[0].state == "running" and observer.claim(run_id) is None
    now[0] = 600.0
    assert observer.status()[0].state == "waiting" and observer.claim(run_id).attempt == 2


@pytest.mark.parametrize("noticed", [True, False], ids=["after its heartbeat said so", "before it noticed"])
def test_a_superseded_attempt_can_not_publish(store, noticed):
    """Nor fail, nor release, the run that another has."""
    run_id = next(iter(store.runs))
    theirs = store.claim(run_id, gone())
    ours = store.claim(run_id)
    assert ours.attempt == 2
    if noticed:
        assert not theirs.renew()
    assert not publish(store, theirs)
    store.fail(theirs, "late")
    theirs.release()
    assert store.failure(run_id) is None and store.status()[0].state == "running"
    assert records.read_result(store.directory(run_id)) is None
    assert publish(store, ours)
    assert store.status()[0].state == "done" and store.claim(run_id) is None
    assert (store.directory(run_id) / records.RESULT).read_bytes() == (ours.run_dir / records.RESULT).read_bytes()


def test_what_is_published_can_not_be_taken_over(store):
    """An observer that saw the attempt stale just before it ended."""
    run_id = next(iter(store.runs))
    theirs = store.claim(run_id, gone())
    seen = store.history(run_id).last()
    assert publish(store, theirs)
    assert store.history(run_id).attempt(seen, Owner.here()) is None


def test_a_publisher_that_dies_midway_has_published(store):
    """Its event is there, the copy is not: who looks next completes it."""
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    records.write_json(claim.run_dir / records.RESULT, result_of(store.begin(claim)))
    digest = hashlib.sha256((claim.run_dir / records.RESULT).read_bytes()).hexdigest()
    assert claim.follow("ended", attempt=claim.event.directory, status="done", sha256=digest)
    assert records.read_result(store.directory(run_id)) is None
    assert Store(store.root).status()[0].state == "done"
    assert records.read_result(store.directory(run_id))["outcome"]["loss"] == 1.5


def test_a_result_that_is_not_what_was_published_is_refused(store):
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    records.write_json(claim.run_dir / records.RESULT, result_of(store.begin(claim)))
    assert claim.follow("ended", attempt=claim.event.directory, status="done", sha256="0" * 64)
    (status, *_) = store.status()
    assert status.state == "damaged" and "result.json: not what was published" in status.reason


def test_a_run_that_kills_its_workers_fails(store):
    """Unless they got further each time."""
    run_id, other, *_ = store.runs
    dead = gone()
    for number in range(MAX_DEATHS):
        assert store.claim(run_id, dead).attempt == number + 1
        claim = store.claim(other, dead)
        records.write_json(claim.run_dir / "checksums" / f"{number + 1}.json", {"schema": 1})
    assert store.claim(run_id, dead) is None
    assert store.failure(run_id)["reason"] == "crash" and f"{MAX_DEATHS} workers died" in store.failure(run_id)["error"]
    assert store.claim(other, dead).attempt == MAX_DEATHS + 1
    assert store.retry() == 1 and store.claim(run_id).attempt == MAX_DEATHS + 3


def test_a_run_that_hangs_fails_and_its_worker_is_ended(tmp_path):
    root = tmp_path / "study"
    Store(root).write_plan(rows(2))
    process = SPAWN.Process(target=hang_on_the_first, args=(str(root),))
    process.start()
    process.join(60)
    assert process.exitcode == 75
    first, second = Store(root).status()
    assert (first.state, first.reason, second.state) == ("failed", "hang", "waiting")


def hang_on_the_first(root: str) -> None:
    def train(runs, claims, superseded):
        time.sleep(3600)

    work(Store(Path(root), lease=0.3, hang_seconds=0.5), train, lambda run: "one")


def test_of_runs_that_hang_together_only_the_one_at_fault_fails(tmp_path):
    """Nobody can tell which it is while they train side by side: then each is tried by itself."""
    root, codes = tmp_path / "study", []
    Store(root).write_plan(rows(4))
    while Store(root).left():
        process = SPAWN.Process(target=hang_where_the_third_is, args=(str(root),))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        assert len(codes) < 4
        if len(codes) == 1:
            assert [s.state for s in Store(root).status()] == ["waiting"] * 4
    assert codes[:2] == [75, 75]  # all of them, then the third alone
    states = [(s.state, s.reason) for s in Store(root).status()]
    assert states == [("done", "")] * 2 + [("failed", "hang"), ("done", "")]


def hang_where_the_third_is(root: str) -> None:
    store = Store(Path(root), lease=0.3, hang_seconds=0.5)
    third = list(store.runs)[2]

    def train(runs, claims, superseded):
        if third in [run.run_id for run in runs]:
            time.sleep(3600)
        finish(runs, claims, superseded)

    work(store, train, lambda run: "one", pack_size=lambda run: 4)


def test_what_waits_or_compiles_does_not_hang(tmp_path):
    """Of runs that are tried one by one the others wait for their turn; the first compilation has a limit of its own."""
    root = tmp_path / "study"
    Store(root).write_plan(rows(3))
    process = SPAWN.Process(target=take_time, args=(str(root),))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and [s.state for s in Store(root).status()] == ["done"] * 3


def take_time(root: str) -> None:
    def train(runs, claims, superseded):
        if len(runs) > 1:
            raise RuntimeError("not together")
        with claims[0].compiling():
            time.sleep(1.0)
        for _ in range(10):
            time.sleep(0.1)
            claims[0].progress()
        finish(runs, claims, superseded)

    work(Store(Path(root), lease=0.3, hang_seconds=0.6), train, lambda run: "one", pack_size=lambda run: 3)


def test_a_worker_that_is_stopped_for_a_while_has_not_hung(tmp_path):
    root = tmp_path / "study"
    Store(root).write_plan(rows(1))
    process = SPAWN.Process(target=take_time, args=(str(root),))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 60
    while not any(root.glob("runs/*/attempts/*/heartbeat.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0 and [s.state for s in Store(root).status()] == ["done"]


def test_a_hang_is_seen_where_files_hang_too(tmp_path):
    """Neither the heartbeat nor what is to record the hang ever comes back."""
    root = tmp_path / "study"
    Store(root).write_plan(rows(1))
    process = SPAWN.Process(target=hang_with_the_files, args=(str(root),))
    process.start()
    process.join(60)
    assert process.exitcode == 75 and [s.state for s in Store(root).status()] == ["waiting"]


def hang_with_the_files(root: str) -> None:
    claim_module.LAST_SECONDS = 0.3
    store = Store(Path(root), lease=0.3, hang_seconds=1.0)

    def train(runs, claims, superseded):
        for name in ("exists", "read", "write", "create"):
            setattr(store.files, name, lambda *_: time.sleep(3600))
        time.sleep(3600)

    work(store, train, lambda run: "one")


class Unavailable(Exception):
    """What a store raises is not always an OSError."""


def test_a_heartbeat_outlives_a_store_that_is_away(store, monkeypatch, caplog):
    """For a while; after a lease the run may be another's."""
    quick, run_id, fails = Store(store.root, lease=0.6), next(iter(store.runs)), [3]
    real = quick.files.exists

    def exists(name):
        fails[0] -= 1
        if fails[0] >= 0:
            raise Unavailable("503")
        return real(name)

    monkeypatch.setattr(quick.files, "exists", exists)
    claim = quick.claim(run_id)
    with claim:
        deadline = time.monotonic() + 20
        while not (claim.run_dir / HEARTBEAT).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (claim.run_dir / HEARTBEAT).exists() and not claim.lost.is_set()
        assert caplog.text.count("503") == 1
        fails[0] = 10**9
        assert claim.lost.wait(20)
    assert caplog.text.count("503") == 2 and "others may have it" in caplog.text
    assert not publish(store, claim)


def test_cancelled_runs_are_not_trained(store):
    waiting, running, done, _ = store.runs
    assert publish(store, store.claim(done))
    claim = store.claim(running)
    assert store.cancel([waiting, running, done]) == 2
    assert not claim.renew() and claim.lost.is_set() and not publish(store, claim)
    assert [s.state for s in store.status()] == ["cancelled", "cancelled", "done", "waiting"]
    assert [s.state for s in Store(store.root).status()] == ["cancelled", "cancelled", "done", "waiting"]
    work(store, finish, lambda run: "one")
    assert [s.state for s in store.status()] == ["cancelled", "cancelled", "done", "done"]
    assert store.retry() == 0 and store.retry([waiting]) == 1
    assert [s.state for s in Store(store.root).status()] == ["waiting", "cancelled", "done", "done"]
    with pytest.raises(ValueError, match="not in the plan"):
        store.cancel(["a"])


def test_a_directory_that_is_deleted_is_trained_again(store):
    """While it is held, and after it ended; whoever held it writes nothing that counts."""
    run_id, second, *_ = store.runs
    claim, begun_anew = store.claim(run_id), store.claim(second)
    for one in (claim, begun_anew):
        shutil.rmtree(store.directory(one.run_id))
    other = store.claim(second)
    assert other.attempt == begun_anew.attempt and other.run_dir != begun_anew.run_dir
    for one in (claim, begun_anew):
        assert not one.renew() and one.lost.is_set() and not publish(store, one)
    assert other.renew()
    other.release()
    for _ in range(2):
        assert run_id in store.left() and run_id in Store(store.root).left()
        work(Store(store.root), finish, lambda run: "one")
        assert [s.state for s in Store(store.root).status()] == ["done"] * 4
        shutil.rmtree(store.directory(run_id))
        assert [s.state for s in Store(store.root).status()] == ["waiting"] + ["done"] * 3


def test_a_study_stops_at_its_budget(store):
    work(store, finish, lambda run: "one", most_flops=200)
    assert [s.state for s in store.status()] == ["done", "done", "waiting", "waiting"] and store.spent() == 200
    work(store, finish, lambda run: "one", until=time.time() - 1)
    assert store.spent() == 200


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
    _, started = process_of(process.pid) or ("", None)
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
    path = claim.run_dir / HEARTBEAT

    def beat() -> int:
        return records.read_json(path)["beat"] if path.exists() else 0

    with claim:
        deadline = time.monotonic() + 20
        while beat() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beat() >= 3 and store.claim(run_id) is None
    claim.release()
    assert store.history(run_id).last().kind == "released" and store.claim(run_id).attempt == 3
    assert not [p for p in store.directory(run_id).rglob("*") if p.name.startswith(".")]


def test_what_was_claimed_is_described_in_its_directory(store):
    first, second, *_ = store.runs
    claim = store.claim(first)
    begun = store.begin(claim)
    assert begun == from_text((store.directory(first) / records.RUN).read_bytes(), "") and begun.run_id == first
    other = store.claim(second)
    records.write_json(store.directory(second) / records.RUN, store.runs[first]["run"])
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

    def train(runs, claims, superseded):
        if runs[0].run_id == bad:
            raise RuntimeError("out of luck")
        finish(runs, claims, superseded)

    work(store, train, lambda run: "one")
    assert [s.state for s in store.status()] == ["done", "failed", "done", "done"]
    assert "RuntimeError: out of luck" in store.failure(bad)["error"]
    assert (store.failure(bad)["attempts"], store.failure(bad)["reason"]) == (1, "error")
    assert records.read_json(store.directory(bad) / FAILED)["error"] == store.failure(bad)["error"]
    assert "out of luck" in (records.attempts(store.directory(bad))[0] / "log.txt").read_text()
    assert store.retry([next(iter(store.runs))]) == 0
    with pytest.raises(ValueError, match="not in the plan"):
        store.retry(["a"])
    assert store.retry([bad]) == 1
    work(store, finish, lambda run: "one")
    assert [s.state for s in store.status()] == ["done"] * 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ESTALE])
def test_trouble_with_files_is_no_fault_of_a_run(store, number):
    """A full disk, a server that is away: the worker leaves, what it held waits."""

    def train(runs, claims, superseded):
        raise ValueError("can not be read") from OSError(number, os.strerror(number), "a file")

    with pytest.raises(MachineTrouble, match=rf"{os.strerror(number)} \(a file\).*lab run"):
        work(store, train, lambda run: "one")
    assert [s.state for s in store.status()] == ["waiting"] * 4


def test_a_preempted_worker_leaves_its_run_waiting(store):
    def train(runs, claims, superseded):
        raise Preempted

    with pytest.raises(SystemExit) as left:
        work(store, train, lambda run: "one")
    assert left.value.code == 75
    assert [s.state for s in store.status()] == ["waiting"] * 4


def test_workers_prefer_their_own_programs_and_avoid_those_being_compiled(tmp_path):
    store = Store(tmp_path / "study")
    store.write_plan(rows(4, batches=(4, 2)))
    keys = dict(zip(store.runs, ("a", "b", "a", "b"), strict=True))
    order = []

    def train(runs, claims, superseded):
        order.append(keys[runs[0].run_id])
        finish(runs, claims, superseded)

    with store.compiling.hold("a"):
        assert store.compiling.held("a") and not store.compiling.held("b")
        work_until_two = [0]

        def two_then_stop(runs, claims, superseded):
            if work_until_two[0] == 2:
                raise KeyboardInterrupt
            train(runs, claims, superseded)
            work_until_two[0] += 1

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


def test_several_hosts_may_write_the_same_plan_at_once(tmp_path):
    (tmp_path / ".plan.json.1f0c").write_text("another host is at it")
    assert "new plan" in Store(tmp_path).write_plan(rows(1)) and "1 kept" in Store(tmp_path).write_plan(rows(1))


def test_a_directory_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        Store(tmp_path).write_plan(rows(1))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ('{"schema": 1, "own', "not a whole JSON file"),
        ('{"schema": 1}', "not an event"),
        ('{"schema": 1, "kind": "attempt", "owner": {"pid": 1}}', "not an event"),
        ('{"schema": 1, "kind": "dance"}', "not this version's"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "kind": ["attempt"]}', r"not an event \(kind\)"),
        ("[" * 200_000, "not a whole JSON file"),
        (_event("attempt", owner={**asdict(Owner.here()), "pid": "x"}), r"not an event \(owner\.pid\)"),
        (_event("attempt", owner={**asdict(Owner.here()), "pid": -1}), r"not an event \(owner\.pid\)"),
        (_event("attempt", owner={**asdict(Owner.here()), "token": 7}), r"not an event \(owner\.token\)"),
        (_event("attempt", owner={**asdict(Owner.here()), "token": "../../.."}), "not an event"),
        (_event("attempt", owner=asdict(Owner.here()), lease="long"), r"not an event \(lease\)"),
        (_event("ended", attempt="attempts/0001-aaaaaaaa"), r"not an event \(status\)"),
        (_event("ended", attempt="attempts/0001-aaaaaaaa", status="done"), r"not an event \(sha256\)"),
        (_event("ended", attempt="attempts/0001-aaaaaaaa", status="failed"), r"not an event \(reason\)"),
        (_event("ended", attempt="attempts/0001-aaaaaaaa", status="done", sha256="0"), "not what was published"),
    ],
)
def test_a_damaged_history_is_named_and_holds_up_nothing_else(store, harm, said, caplog):
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    (store.root / store.history(run_id).name(1)).write_text(harm)
    published = "published" not in said  # else the event is whole, and what it refers to is not
    if published:
        with pytest.raises(ValueError, match=rf"history/0001\.json: .*{said}"):
            store.claim(run_id)
    work(store, finish, lambda run: "one")
    assert (f"{run_id} is left out" in caplog.text) == published
    damaged, *others = Store(store.root).status()
    assert damaged.state == "damaged" and re.search(said, damaged.reason)
    assert not published or "history/0001.json" in damaged.reason
    assert [s.state for s in others] == ["done"] * 3 and not store.left()
    assert claim.row["run_id"] == run_id
    if "version" not in damaged.reason:  # what is said to do about it helps
        assert f"delete {store.directory(run_id)}" in damaged.reason
        shutil.rmtree(store.directory(run_id))
        work(Store(store.root), finish, lambda run: "one")
        assert [s.state for s in Store(store.root).status()] == ["done"] * 4


def test_a_history_with_a_gap_is_damaged(store):
    run_id = next(iter(store.runs))
    assert publish(store, store.claim(run_id))
    shutil.rmtree(store.root / "ended")
    (store.root / store.history(run_id).name(1)).unlink()
    with pytest.raises(ValueError, match=r"history/0001\.json: is missing.*delete"):
        Store(store.root).claim(run_id)
    assert [s.state for s in Store(store.root).status()] == ["damaged"] + ["waiting"] * 3


def test_a_result_that_is_gone_is_damage_of_that_run_only(store):
    run_id = next(iter(store.runs))
    assert publish(store, store.claim(run_id))
    shutil.rmtree(store.root / "ended")
    shutil.rmtree(store.directory(run_id) / "attempts")
    damaged, *others = Store(store.root).status()
    assert damaged.state == "damaged" and "result.json: not what was published" in damaged.reason
    assert {s.state for s in others} == {"waiting"}


@pytest.mark.parametrize("heartbeat", ['{"schema": 1}', '{"sch', ""])
def test_a_heartbeat_is_only_looked_at_for_whether_it_changes(store, heartbeat):
    claim = store.claim(next(iter(store.runs)), elsewhere())
    claim.renew()
    (claim.run_dir / HEARTBEAT).write_text(heartbeat)
    assert [s.state for s in Store(store.root).status()] == ["running"] + ["waiting"] * 3


def test_what_ended_is_seen_where_nothing_can_be_written(store, monkeypatch):
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    records.write_json(claim.run_dir / records.RESULT, result_of(store.begin(claim)))
    digest = hashlib.sha256((claim.run_dir / records.RESULT).read_bytes()).hexdigest()
    assert claim.follow("ended", attempt=claim.event.directory, status="done", sha256=digest)
    reader = Store(store.root)

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("write", "remove", "append"):
        monkeypatch.setattr(reader.files, name, refused)
    assert [s.state for s in reader.status()] == ["done"] + ["waiting"] * 3 and len(reader.left()) == 3


@pytest.mark.parametrize(
    "harm",
    [{"state": "dance"}, {"state": ["done"]}, {"exact": "much"}, {"loss": "low"}, {"run_id": 7}, {"event": None}, None],
    ids=str,
)
def test_an_index_line_that_is_not_one_is_passed_over(store, harm):
    run_id = next(iter(store.runs))
    (store.root / "ended").mkdir()
    line = {"run_id": run_id, "began": "x", "event": 9, "state": "done", **(harm or {})}
    (store.root / "ended" / "x.jsonl").write_text((json.dumps(line) if harm else "[" * 200_000) + "\n")
    assert publish(store, store.claim(run_id))
    again = Store(store.root)
    assert [s.state for s in again.status()] == ["done"] + ["waiting"] * 3 and again.spent() == 100


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
    claim = store.claim(run_id)
    writer = records.MetricsWriter(claim.run_dir)
    writer.write(step=4, share=0.5, loss=2.25)
    writer.write(step=4, share=0.5, held_out_loss=3.0)
    writer.file.write('{"step": 6, "sha')
    writer.close()
    claim.release()
    status = store.status()[0]
    assert (status.state, status.step, status.loss, status.share) == ("waiting", 4, 2.25, 0.5)


def test_runs_of_one_program_train_side_by_side(tmp_path):
    """Up to the pack's size and this worker's share; what has ended is left out."""
    for workers, packed in ((1, [[0, 2], [1, 3]]), (2, [[0], [2], [1], [3]])):
        store = Store(tmp_path / str(workers))
        store.write_plan(rows(4, batches=(4, 2)))
        ids, packs = list(store.runs), []

        def train(runs, claims, superseded, store=store, ids=ids, packs=packs):
            packs.append([ids.index(run.run_id) for run in runs])
            assert all(store.claim(run.run_id) is None for run in runs)  # all of them are held
            finish(runs, claims, superseded)

        work(store, train, lambda run: str(run.batch), pack_size=lambda run: 8, workers=workers)
        assert packs == packed
        assert [s.state for s in store.status()] == ["done"] * 4


def test_a_pack_that_raises_is_tried_one_by_one(store):
    """So that only the run that is at fault fails."""
    bad = list(store.runs)[2]

    def train(runs, claims, superseded):
        if len(runs) > 1:
            raise RuntimeError("one of them")
        if runs[0].run_id == bad:
            raise RuntimeError("this one")
        finish(runs, claims, superseded)

    work(store, train, lambda run: "one", pack_size=lambda run: 4)
    assert [s.state for s in store.status()] == ["done", "done", "failed", "done"]
    assert "this one" in store.failure(bad)["error"]


def test_a_signal_between_runs_is_not_lost(store):
    """It sets a flag; raising an exception where it finds the program would be swallowed by some callbacks."""
    with stop_flag() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with stop_flag() as inner:  # a run that begins after it came
            assert inner.is_set()
        with pytest.raises(Preempted):
            work(store, finish, lambda run: "one", stopping=outer.is_set)
    assert [s.state for s in store.status()] == ["waiting"] * 4
    with stop_flag() as later:
        assert not later.is_set()
