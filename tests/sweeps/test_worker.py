"""What a worker does with the runs of a study, and with those that raise, hang or are taken from it."""

import errno
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from lab import records
from lab.preemption import Preempted, Superseded, stop_flag
from small_studies import SPAWN, finish, gone, publish, rows
from sweeps import claim as claim_module
from sweeps.launch.worker import MachineTrouble, compiling, work
from sweeps.queue import Queue
from sweeps.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "study")
    made.write_plan(rows(4))
    return made


def work_slowly(root: str, seconds: float) -> None:
    work(Store(Path(root)), partial(finish, seconds=seconds), lambda run: "one", poll_seconds=0.05)


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
    assert records.read_json(store.directory(bad) / records.FAILED)["error"] == store.failure(bad)["error"]
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


def test_errors_that_lead_to_each_other_in_a_circle_fail_their_run(store):
    """As a library that raises a kept exception once more makes them; the walk along such a chain ends."""

    def train(runs, claims, superseded):
        first, second = ValueError("of zero size"), RuntimeError("second")
        first.__context__, second.__context__ = second, first
        raise first

    work(store, train, lambda run: "one")
    assert [s.state for s in store.status()] == ["failed"] * 4
    assert all("of zero size" in store.failure(run_id)["error"] for run_id in store.runs)


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


def test_who_compiles_is_found_by_the_name_that_workers_ask_for(tmp_path):
    """Whatever the program's own key is; who has it already takes no lock."""
    store, compiled = Store(tmp_path / "study", hang_seconds=100.0), set()
    store.write_plan(rows(1))
    claim = store.claim(next(iter(store.runs)))
    for name, key, held in (
        ("a", "of-a-pack", True),
        ("a", "of-a-pack", False),
        ("a", "of-a-stage", True),
        (None, "k", False),
    ):
        with compiling(store, [claim], name, compiled, key):
            assert claim.patience == 400.0 and store.compiling.held("a") == held
        assert claim.patience is None and not store.compiling.held("a")


def test_runs_of_one_program_train_side_by_side(tmp_path):
    """Up to the pack's size and this worker's share; what has ended is left out."""
    for workers, packed in ((1, [[0, 2], [1, 3]]), (2, [[0, 2], [1], [3]]), (4, [[0], [2], [1], [3]])):
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


def test_a_worker_takes_a_whole_program_where_there_is_one_for_each(tmp_path):
    """Of 4 programs of 4 runs: alone, or with one or three others, all 4; of seven others some must get half."""
    store = Store(tmp_path / "study")
    store.write_plan(rows(16, batches=(4, 2, 6, 8)))
    for workers, taken in ((1, 4), (2, 4), (4, 4), (8, 2), (16, 1)):
        queue = Queue(store)
        claim = queue.next(lambda row: 0)
        assert claim is not None and queue.share(claim.row, workers) == taken
        claim.release()


def test_what_another_worker_died_of_meanwhile_is_taken_alone_and_last(store):
    """Also where it was in this worker's window before that."""
    _, killer, *_ = store.runs
    packs = []

    def train(runs, claims, superseded):
        if not packs:
            assert store.claim(killer, gone()) is not None
        packs.append([run.run_id for run in runs])
        finish(runs, claims, superseded)

    work(store, train, lambda run: "one", pack_size=lambda run: min(2, len(packs) + 1))
    first, second, third, fourth = store.runs
    assert packs == [[first], [third, fourth], [second]]
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


@pytest.mark.parametrize("how", ["cancelled", "deleted before it began"])
def test_a_pack_that_loses_one_run_goes_on_with_the_others(store, monkeypatch, how):
    """They wait again, and this very worker takes them once more."""
    lost, packs = list(store.runs)[2], []
    real, deleted = store.begin, []

    def begin(claim):
        if how != "cancelled" and claim.run_id == lost and not deleted:
            deleted.append(lost)
            shutil.rmtree(store.directory(lost))
            raise FileNotFoundError(lost)
        return real(claim)

    def train(runs, claims, superseded):
        packs.append(len(runs))
        if how == "cancelled" and len(runs) == 4:
            store.cancel([lost])
            claims[2].lost.wait(20)
            assert superseded()
            raise Superseded
        finish(runs, claims, superseded)

    monkeypatch.setattr(store, "begin", begin)
    store.lease = 0.6
    work(store, train, lambda run: "one", pack_size=lambda run: 4)
    states = [s.state for s in store.status()]
    assert states == (["done"] * 2 + ["cancelled"] + ["done"] if how == "cancelled" else ["done"] * 4)
    assert packs == [4, 1, 1, 1] if how == "cancelled" else [3, 1]


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
