"""What breaks while a sweep runs: processes, disks, files, directories. Each test harms real workers or real files."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import kills
from lab import records
from lab.data import describe
from lab.spec import Budget, Optimizer, Shape, to_json
from runs import make_run
from sweeps.cli.main import main as lab
from sweeps.launch import local
from sweeps.launch.settings import Settings
from sweeps.store import Store

pytestmark = pytest.mark.faults
SPAWN = multiprocessing.get_context("spawn")
STEPS = 6000


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTERLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return kills.undisturbed(STEPS, tmp_path_factory.mktemp("undisturbed") / "study")


def test_thirty_kills_lose_nothing(undisturbed, tmp_path):
    counted = kills.main(30, seed=1, steps=STEPS, directory=tmp_path, reference=undisturbed)
    assert counted["killed"] + counted["stopped past the lease"] >= 30
    assert counted["killed"] and counted["stopped past the lease"]
    assert counted["attempt"] > counted["runs"] == counted["ended"]


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> a file system of its own; remount(options)."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, text=True)

    if mount("size=1m").returncode != 0:
        pytest.skip("no right to mount a file system here")
    try:
        yield disk, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("harm", "mend", "said"),
    [("size=1m", "size=64m", "No space left on device"), ("size=64m,ro", "size=64m,rw", "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_disk_that_can_not_be_written(small_disk, undisturbed, harm, mend, said):
    """The workers say what and where, nothing is lost, and `lab run` goes on once it is mended."""
    disk, remount = small_disk
    remount("size=64m,rw")
    store = Store(disk / "study")
    store.write_plan(kills.plan(STEPS))
    (store.root / "logs").mkdir()
    local.log_of(store.root / "logs", 0).write_bytes(b"")  # so that it can be said where even that is not written
    if "ro" not in harm:
        fill = disk / "fill"
        fill.write_bytes(b"0" * 2**20 * 63)
    assert remount(harm if "ro" in harm else "size=64m").returncode == 0
    place = local.cpu_slots(2)[0]
    command = kills.SETTINGS.command(store.root, workers=1, cores=place.cores)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120,
                           env={**os.environ, **place.environment})  # fmt: skip
    assert ended.returncode == os.EX_IOERR, ended.stderr[-2000:]
    assert said in ended.stderr and str(disk) in ended.stderr and "lab run" in ended.stderr
    remount(mend)
    (disk / "fill").unlink(missing_ok=True)
    assert not [s for s in store.status() if s.state in ("failed", "damaged")]
    local.start(store.root, local.cpu_slots(2), settings=kills.SETTINGS)
    kills.check(store, kills.outcomes(undisturbed))


def test_a_disk_that_fills_during_a_checkpoint(small_disk):
    """What says so then is no OSError but a message of tensorstore's: it is this disk's fault all the same, not the run's."""
    disk, remount = small_disk
    remount("size=16m")
    run = make_run(data=describe("markov").data, shape=Shape(D=256, F=1024, N=4, K=4, H=64, L=4, L_input=4))
    store = Store(disk / "study")
    store.write_plan({"schema": records.SCHEMA, "study": {"name": "large"},
                      "runs": [{"run_id": run.run_id, "arm": "a", "run": to_json(run)}]})  # fmt: skip
    place = local.cpu_slots(2)[0]
    command = kills.SETTINGS.command(store.root, workers=1, cores=place.cores)
    environment = {**os.environ, **place.environment}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == os.EX_IOERR, ended.stderr[-2000:]
    assert "No space left on device" in ended.stderr and "lab run" in ended.stderr
    assert [s.state for s in store.status()] == ["waiting"]
    remount("size=256m")
    assert subprocess.run(command, timeout=120, env=environment).returncode == 0
    assert [s.state for s in store.status()] == ["done"]


# ---- files ----------------------------------------------------------------------------------------------------------


def _states(store: Store) -> dict[str, tuple]:
    return {s.run_id: (s.state, s.step, s.loss) for s in store.status()}


def test_every_file_that_is_torn(undisturbed, tmp_path):
    """Each file of a study that ended, cut at places that a seed chooses: the other runs are what they were; of this one either
    nothing is lost, or it is said which file is damaged and what to do. No other number is ever read."""
    chance, wanted = random.Random(0), _states(undisturbed)
    results = {i: records.read_result(undisturbed.directory(i)) for i in undisturbed.runs}
    victim = next(iter(undisturbed.runs))
    begun = [undisturbed.root / records.PLAN, *sorted((undisturbed.root / "ended").iterdir())]
    begun += sorted(p for p in undisturbed.directory(victim).rglob("*") if p.is_file() and "checkpoints" not in p.parts)
    seen = set()
    for number, path in enumerate(begun):
        content = path.read_bytes()
        for cut in sorted(
            {0, len(content) - 2, *(chance.randrange(len(content)) for _ in range(3))} if content else {0}
        ):
            root = tmp_path / f"{number}-{cut}"
            shutil.copytree(undisturbed.root, root, ignore=shutil.ignore_patterns("checkpoints"))
            harmed = root / path.relative_to(undisturbed.root)
            harmed.write_bytes(content[:cut])
            for index in (True, False):  # then from the histories alone
                if not index:
                    shutil.rmtree(root / "ended")
                store = Store(root)
                try:
                    now = _states(store)
                except ValueError as error:
                    assert path.name == records.PLAN and str(harmed) in str(error), (path, error)
                    seen.add("refused")
                    continue
                assert {i: s for i, s in now.items() if i != victim} == {i: s for i, s in wanted.items() if i != victim}
                if now[victim] != wanted[victim]:
                    (status,) = [s for s in store.status() if s.run_id == victim]
                    assert status.state == "damaged" and str(harmed) in status.reason, (path, cut, status)
                    seen.add("damaged")
                try:
                    read = records.read_result(store.directory(victim))
                    assert read == results[victim], (path, cut)
                except ValueError as error:
                    assert str(harmed) in str(error)
                    seen.add("named")
            shutil.rmtree(root)
    assert seen == {"refused", "damaged", "named"}


def test_what_is_deleted_is_trained_again_to_the_same_end(undisturbed, tmp_path):
    """A run's directory, under the worker that trains it."""
    store = Store(tmp_path / "study")
    store.write_plan(kills.plan(STEPS))
    deleted = []

    def delete_once(store: Store) -> None:
        running = [s for s in store.status() if s.state == "running" and s.step]
        if running and not deleted:
            shutil.rmtree(store.directory(running[0].run_id))
            deleted.append(running[0].run_id)

    local.start(store.root, local.cpu_slots(2), settings=kills.SETTINGS, on_poll=delete_once, poll_seconds=0.1)
    assert deleted and kills.outcomes(store) == kills.outcomes(undisturbed)


# ---- claims ---------------------------------------------------------------------------------------------------------


def race(root: str, barrier, wins) -> None:
    store = Store(Path(root))
    for run_id in store.runs:
        barrier.wait()
        claim = store.claim(run_id)
        wins.put((run_id, claim is not None))


def test_a_thousand_races_have_one_winner_each(tmp_path):
    store, run = Store(tmp_path / "study"), make_run()
    runs = [replace(run, seed=replace(run.seed, init=i)) for i in range(1000)]
    rows = [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in runs]
    store.write_plan({"schema": records.SCHEMA, "study": {"name": "race"}, "runs": rows})
    barrier, wins = SPAWN.Barrier(2), SPAWN.Queue()
    racers = [SPAWN.Process(target=race, args=(str(store.root), barrier, wins)) for _ in range(2)]
    for racer in racers:
        racer.start()
    won = [run_id for run_id, mine in (wins.get(timeout=120) for _ in range(2000)) if mine]
    for racer in racers:
        racer.join()
    assert sorted(won) == sorted(store.runs)


@pytest.mark.parametrize("jump", [-1e9, 1e9], ids=["back", "ahead"])
def test_a_clock_that_jumps_takes_no_run_away(tmp_path, monkeypatch, jump):
    """Files' times and the wall clock decide nothing: only the observer's monotonic clock does."""
    store = Store(tmp_path / "study", lease=60)
    store.write_plan(kills.plan(10))
    run_id = next(iter(store.runs))
    claim = store.claim(run_id)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    for path in store.directory(run_id).rglob("*"):
        os.utime(path, (real() + jump, real() + jump))
    other = Store(store.root, lease=60)
    assert other.claim(run_id) is None and other.claim(run_id) is None
    assert claim.renew() and store.status()[0].state == "running"


# ---- runs -----------------------------------------------------------------------------------------------------------

WORKER = """
import sys
import lab.train, lab.compiled
real = lab.compiled.compiled
def compiled(p):
    if p.batch == 3:
        raise RuntimeError("this run raises")
    if p.batch == 5:
        import jax
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
    if p.batch == 7:
        import time
        time.sleep(3600)
    return real(p)
lab.train.compiled = compiled
from sweeps.launch.worker import main
sys.argv = ["worker", *sys.argv[1:]]
main()
"""


def test_each_bad_end_is_a_state_of_its_own(tmp_path, capsys):
    """One that raises, one out of memory, one that hangs, one that diverges; the others end, and retry takes the right ones."""
    run = make_run(data=describe("markov").data)
    wild = Optimizer(learning_rate=10.0, clip=1e9, warmup=0.0, weight_decay=0.0)
    bad = {
        "raises": replace(run, batch=3),
        "no memory": replace(run, batch=5),
        "hangs": replace(run, batch=7),
        "diverges": replace(run, optimizer=wild, budget=Budget(unit="steps", amount=60)),
    }
    good = [replace(run, seed=replace(run.seed, init=i)) for i in range(2)]
    rows = [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in (*bad.values(), *good)]
    store = Store(tmp_path / "study")
    store.write_plan({"schema": records.SCHEMA, "study": {"name": "bad"}, "runs": rows})
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    place, codes = local.cpu_slots(2)[0], []
    while store.left():
        command = Settings(lease=3.0, hang=8.0).command(store.root, workers=1, cores=place.cores)
        command[1:3] = [str(script)]
        codes.append(subprocess.run(command, env={**os.environ, **place.environment}, timeout=200).returncode)
        assert len(codes) < 4
    assert codes == [75, 0]  # the one that hung took its worker with it
    states = {s.run_id: (s.state, s.reason) for s in store.status()}
    assert {what: states[r.run_id] for what, r in bad.items()} == {
        "raises": ("failed", "error"),
        "no memory": ("failed", "out_of_memory"),
        "hangs": ("failed", "hang"),
        "diverges": ("diverged", ""),
    }
    assert all(states[r.run_id] == ("done", "") for r in good)
    assert "this run raises" in store.failure(bad["raises"].run_id)["error"]
    lab(["logs", str(store.root), bad["raises"].run_id])
    assert "this run raises" in capsys.readouterr().out
    lab(["retry", str(store.root)])
    assert "3 runs wait again" in capsys.readouterr().out
    local.start(store.root, local.cpu_slots(1))
    assert {s.state for s in store.status()} == {"done", "diverged"}


def test_a_stop_asks_for_another_start(tmp_path):
    """SIGTERM and SIGUSR1, while it trains: saved, released, exit status 75."""
    store = Store(tmp_path / "study")
    store.write_plan(kills.plan(10**5))
    place = local.cpu_slots(2)[0]
    reached = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        worker = subprocess.Popen(
            Settings(checkpoint=3600).command(store.root, workers=1, cores=place.cores),
            env={**os.environ, **place.environment},
        )
        deadline = time.monotonic() + 60
        before = reached[-1] if reached else 0
        while not any(s.state == "running" and (s.step or 0) > before for s in store.status()):
            assert time.monotonic() < deadline and worker.poll() is None
            time.sleep(0.1)
        worker.send_signal(number)
        assert worker.wait(timeout=60) == 75
        (begun,) = [s for s in store.status() if s.step]
        assert begun.state == "waiting" and store.history(begun.run_id).last().kind == "released"
        sums = [p for place in records.attempts(store.directory(begun.run_id)) for p in place.glob("checksums/*.json")]
        reached.append(max(int(p.stem) for p in sums))
        assert json.loads((store.directory(begun.run_id) / "history" / "0001.json").read_text())["kind"] == "attempt"
    assert 0 < reached[0] < reached[1]
