"""Real worker processes on a real study, one of them killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

import sweeps
from lab import records
from small_studies import rows, workers_die_of
from sweeps.launch import local
from sweeps.launch.ray_node import Cluster
from sweeps.launch.slurm import Job
from sweeps.store import Store

STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov")
    return Study(name="killed", question="?", baseline="decoder_only", budgets=(4e9,), batch=4, window=2, learning_rate=0.01,
                 arms={"decoder_only": arm("decoder_only", data, S=8, T=8)}, seeds=3, sizes=ladder(8, 16, depth=2, head_width=8))
"""


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """Here workers train for longer than they compile, which one does for all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "study.py"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def plan(study):
    return sweeps.plan(sweeps.load(str(study)))


@pytest.fixture(scope="module")
def whole(plan, study):
    """The study, trained by two workers that nobody disturbs."""
    return sweeps.run(plan, study.parent / "whole", workers=2)


def test_a_sweep_whose_worker_is_killed_ends_as_if_it_was_not(plan, whole, tmp_path):
    killed = []

    def kill_once(store):
        for status in store.status():
            if not killed and status.held_by and (status.step or 0) > 0:
                killed.append(int(status.held_by.split()[-1]))
                os.kill(killed[0], signal.SIGKILL)

    directory = sweeps.run(plan, tmp_path / "killed", workers=2, on_poll=kill_once)
    for run_id in plan.unique:
        a, b = (records.read_result(records.run_directory(d, run_id)) for d in (whole, directory))
        assert a["outcome"] == b["outcome"]
        assert a["outcome"]["spent"] == dict(plan.unique[run_id].planned)
    assert killed, "no run was ever seen in progress: the study is too short for this test"
    again = time.monotonic()
    assert sweeps.run(plan, directory) == directory  # nothing is left: no worker is started
    assert time.monotonic() - again < 5


def test_an_interrupted_sweep_saves_and_goes_on(plan, study, tmp_path):
    script = f"import sweeps, sys; sweeps.run(sweeps.plan(sweeps.load({str(study)!r})), sys.argv[1], workers=1)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    store = Store(tmp_path / "out")
    while time.monotonic() < deadline:
        if (tmp_path / "out" / records.PLAN).exists() and any(s.state == "running" for s in store.status()):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not any(s.state in ("running", "failed") for s in store.status())
    sweeps.run(plan, tmp_path / "out")
    assert all(s.state == "done" for s in store.status())


def test_workers_that_always_die_are_given_up(plan, tmp_path, monkeypatch):
    store = Store(tmp_path / "out")
    store.write_plan(plan.to_json())
    monkeypatch.setattr(local.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"every worker died 4 times and 6 runs are left.*logs/worker"):
        local.start(store.root, [local.Slot()], poll_seconds=0.01, backoff_seconds=0.01)


@pytest.mark.parametrize(
    ("places", "pack"),
    [(1, 1), (2, 3), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow)],
)
def test_a_run_that_kills_its_worker_fails_and_stops_no_other(plan, tmp_path, monkeypatch, places, pack):
    store = Store(tmp_path / "out")
    store.write_plan(plan.to_json())
    killers = list(store.runs)[1:3]
    workers_die_of(monkeypatch, tmp_path, ",".join(killers), pack)
    local.start(store.root, [local.Slot()] * places, poll_seconds=0.02, backoff_seconds=0.01)
    states = {s.run_id: (s.state, s.reason) for s in store.status()}
    assert states == {i: ("failed", "crash") if i in killers else ("done", "") for i in store.runs}


def test_a_machine_that_kills_everything_is_not_fought(plan, tmp_path, monkeypatch):
    """It is given up before a run is blamed."""
    store = Store(tmp_path / "out")
    store.write_plan(plan.to_json())
    workers_die_of(monkeypatch, tmp_path, "all", 1)
    with pytest.raises(ValueError, match=r"6 runs are left"):
        local.start(store.root, [local.Slot()], poll_seconds=0.02, backoff_seconds=0.01)
    assert {s.state for s in store.status()} == {"waiting"}


def test_a_study_that_can_not_be_read_for_a_while_stops_no_worker(plan, tmp_path, monkeypatch, caplog):
    """Neither what is shown meanwhile nor the look after a worker's end ends the launcher; it is said once."""
    store = Store(tmp_path / "out")
    store.write_plan(plan.to_json())
    killer = next(iter(store.runs))
    workers_die_of(monkeypatch, tmp_path, killer, 1)
    real, looks = Store.left, []

    def left(self):
        looks.append(1)
        if 1 < len(looks) < 4:
            raise OSError(116, "Stale file handle")
        return real(self)

    def show(store):
        raise ValueError("status failed") if len(looks) < 3 else OSError(5, "Input/output error")

    monkeypatch.setattr(Store, "left", left)
    local.start(store.root, [local.Slot()], on_poll=show, poll_seconds=0.02, backoff_seconds=0.01)
    monkeypatch.undo()
    assert [s.state for s in store.status()] == ["failed"] + ["done"] * 5
    for said in ("Stale file handle", "status failed", "Input/output error"):
        assert caplog.text.count(said) == 1


def test_each_restart_waits_longer(plan, tmp_path, monkeypatch):
    store = Store(tmp_path / "out")
    store.write_plan(plan.to_json())
    monkeypatch.setattr(local.sys, "executable", "/bin/false")
    now, spawned = [0.0], []

    class Worker(subprocess.Popen):
        def __init__(self, *arguments, **options):
            spawned.append(now[0])
            super().__init__(*arguments, **options)
            self.wait()

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(local.subprocess, "Popen", Worker)
    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    with pytest.raises(ValueError, match="every worker died 4 times"):
        local.start(store.root, [local.Slot()], poll_seconds=0.5, backoff_seconds=1.0)
    gaps = [later - earlier for earlier, later in pairwise(spawned)]
    assert gaps == [1.5, 2.5, 4.5]  # each with the half second until the death was seen


def test_cores_are_shared_out():
    cores = sorted(os.sched_getaffinity(0))
    slots = local.cpu_slots()
    assert sorted(core for slot in slots for core in slot.cores) == cores and len(slots) == len(cores)
    assert len(local.cpu_slots(1)) == 1 and local.cpu_slots(1)[0].cores == tuple(cores)
    assert len(local.cpu_slots(5)) == 5 and all(slot.cores for slot in local.cpu_slots(5))


def test_workers_that_pack_end_as_workers_that_do_not(plan, whole, tmp_path):
    """Real workers; the same numbers to rounding, and the result says how many trained together."""
    packed = sweeps.run(plan, tmp_path / "packed", workers=1, settings=sweeps.Settings(pack=3))
    for run_id in plan.unique:
        a, b = (records.read_result(records.run_directory(d, run_id)) for d in (whole, packed))
        assert (a["measured"]["pack"], b["measured"]["pack"]) == (1, 3)
        assert a["outcome"]["spent"] == b["outcome"]["spent"]
        assert b["outcome"]["loss"] == pytest.approx(a["outcome"]["loss"], rel=1e-5)


def test_places_by_the_devices_that_are_found(monkeypatch):
    """A GPU each; all of them together for a mesh, or where a run needs more than one has. A TPU host is one place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = {"devices": local.Devices(kind="gpu", count=4, memory=1000)}
    monkeypatch.setattr(local, "accelerators", lambda: found["devices"])

    def visible(**options):
        return [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in local.slots(**options)[1]]

    assert visible() == ["0", "1", "2", "3"] and visible(workers=2) == ["0", "1"]
    assert visible(mesh="data=4") == visible(hosts="auto") == [None]
    assert visible(needs=lambda kind, limit: limit) == ["0", "1", "2", "3"]
    assert visible(needs=lambda kind, limit: limit + 1) == [None]
    assert visible(workers=6) == ["0", "1", "2", "3", "0", "1"]
    shared = local.slots(8, needs=lambda kind, limit: 450)[1]
    parts = [slot.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in shared]
    assert parts == ["0.450"] * 8
    with pytest.raises(ValueError, match="workers = 9: 3 on one GPU"):
        local.slots(9, needs=lambda kind, limit: 450)
    found["devices"] = local.Devices(kind="tpu", count=8)
    assert visible(workers=3) == [None]
    found["devices"] = local.Devices(kind="cpu")
    assert len(local.slots(2)[1]) == 2 and len(local.slots(hosts="auto")[1]) == 1


def test_a_mesh_of_other_devices_is_refused_before_a_run_fails_of_it(monkeypatch, tmp_path):
    """By who starts workers, and, where hosts are to count together, by the workers."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(local, "accelerators", lambda: local.Devices(kind="gpu", count=4, memory=1000))
    for mesh in ("data=8", "data=2"):
        with pytest.raises(ValueError, match=rf"mesh = '{mesh}': .* this machine 4 \(gpu\); use all of them, or one"):
            local.slots(mesh=mesh)
    assert local.slots(mesh="data=1") == local.slots(mesh="data=8", hosts="auto") == ("gpu", [local.Slot()])
    monkeypatch.setattr(local, "accelerators", lambda: local.Devices(kind="cpu"))
    with pytest.raises(ValueError, match=r"this machine 1 \(cpu\)"):
        local.slots(mesh="data=2")
    store = Store(tmp_path / "study")
    store.write_plan(rows(2))
    worker = subprocess.run([sys.executable, "-m", "sweeps.launch.worker", str(store.root), "--mesh=data=8"],
                            env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)  # fmt: skip
    assert worker.returncode and "mesh data=8: 8 devices, but JAX sees 1" in worker.stderr
    assert [s.state for s in store.status()] == ["waiting"] * 2


@pytest.mark.parametrize("asked", [dict(mesh="data=4"), dict(hosts="10.0.0.1:9876,2,0")])
def test_several_workers_do_not_get_all_devices_each(asked):
    with pytest.raises(ValueError, match=r"workers = 4: with --(mesh data=4|hosts 10.*) one worker has all devices"):
        local.slots(4, **asked)


@pytest.mark.parametrize("workers", [0, -1])
@pytest.mark.parametrize("on", [None, Cluster(), Job()], ids=["here", "ray", "slurm"])
def test_fewer_workers_than_one(plan, tmp_path, workers, on):
    with pytest.raises(ValueError, match=f"workers = {workers}: use a whole number of at least 1"):
        sweeps.run(plan, tmp_path / "out", workers=workers, on=on)
    assert not (tmp_path / "out").exists()


def test_last_words_of_workers_that_logged_elsewhere(tmp_path):
    assert "they lie on those that the workers ran on" in local.last_words(tmp_path)
    (tmp_path / "worker-here-0.log").write_text("one\ntwo\n\n")
    assert local.last_words(tmp_path) == "two"


def test_a_study_on_a_mesh(plan, tmp_path, monkeypatch):
    """A real worker on two devices that the processor is told to be."""
    plan = replace(plan, runs=plan.runs[:1])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    directory = sweeps.run(plan, tmp_path / "mesh", settings=sweeps.Settings(mesh="fsdp=2"))
    assert all(
        records.read_result(records.run_directory(directory, i))["measured"]["mesh"] == "fsdp=2" for i in plan.unique
    )
