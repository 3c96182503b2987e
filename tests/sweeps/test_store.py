"""A study's directory under several processes, killed ones among them, and with damaged files."""

import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lab import records
from lab.spec import from_text
from small_studies import SPAWN, elsewhere, finish, gone, publish, result_of, rows
from sweeps.claim import HEARTBEAT
from sweeps.history import Owner, process_of
from sweeps.launch.worker import work
from sweeps.store import MAX_DEATHS, Store


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "study")
    made.write_plan(rows(4))
    return made


def claim_all(root: str, barrier, wins) -> None:
    store = Store(Path(root))
    for run_id in store.runs:
        barrier.wait()
        claim = store.claim(run_id)
        wins.put((run_id, claim.attempt if claim else None))
        barrier.wait()


def _event(kind: str, **content) -> str:
    return json.dumps({"schema": 1, "kind": kind, **content})


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
        while "others may have it" not in caplog.text and time.monotonic() < deadline + 20:  # a thread says it
            time.sleep(0.01)
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


def test_what_was_tried_again_meanwhile_is_not_retried(store, monkeypatch):
    """By who looked before: an attempt that another began since goes on."""
    failed, *_ = store.runs
    store.fail(store.claim(failed), "no luck")
    late = Store(store.root)
    seen = late.status()
    assert store.retry() == 1
    monkeypatch.setattr(late, "status", lambda: seen)
    assert late.retry() == late.retry([failed]) == 0
    claim = store.claim(failed)
    assert late.retry() == late.retry([failed]) == 0 and claim.renew() and publish(store, claim)
    assert late.retry([failed]) == 0 and Store(store.root).status()[0].state == "done"


def test_attempts_of_a_cancelled_run_are_counted_by_the_index_too(store):
    run_id = next(iter(store.runs))
    for _ in range(3):
        store.claim(run_id).release()
    store.cancel([run_id])
    assert store.status()[0].attempts == Store(store.root).status()[0].attempts == 3
    shutil.rmtree(store.root / "ended")
    assert Store(store.root).status()[0].attempts == 3


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
