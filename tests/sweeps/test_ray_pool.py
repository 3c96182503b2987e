"""Sweeps on a Ray cluster of two nodes on this machine: a worker is killed, a node goes, another comes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kills
import sweeps
from lab.preemption import SIGNALS, Preempted
from small_studies import rows, workers_die_of
from sweeps.cli.main import main
from sweeps.launch import local, ray_pool
from sweeps.launch.ray_node import Cluster
from sweeps.store import Store

STEPS = 6000
# Ray starts its processes by os.fork, which JAX warns of where it runs already.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    return Study(name="stopped", question="?", baseline="a", budgets=(4e10,), batch=4, window=1, learning_rate=0.01,
                 arms={"a": arm("decoder_only", corpus("markov"), S=8, T=8)}, seeds=2, sizes=ladder(8, depth=1, head_width=8))
"""


def test_room_and_environment(monkeypatch):
    node = {"CPU": 8.0, "GPU": 2.0, "disk": 0.3, "memory": 1e9}
    assert Cluster().room(node) == 8 and Cluster(cpus=3).room(node) == 2 and Cluster(cpus=9).room(node) == 0
    assert Cluster(gpus=1).room(node) == 2 and Cluster(gpus=1).room({"CPU": 8.0}) == 0
    assert Cluster(custom={"disk": 0.1}).room(node) == 3
    for bad in ({"cpus": 0}, {"gpus": -1}, {"custom": {"disk": 0.0}}):
        with pytest.raises(ValueError, match="at least one CPU"):
            Cluster(**bad)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", "/here")
    assert Cluster(cpus=2).environment()["NPROC"] == "2"
    assert Cluster().environment()["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in Cluster(gpus=1).environment()
    assert Cluster().environment(Path("/code"))["PYTHONPATH"] == f"/code{os.pathsep}/here"


@pytest.mark.parametrize(
    ("cluster", "asked", "said"),
    [
        (Cluster(gpus=2), dict(hosts="10.0.0.1:9876,2,0"), r"hosts = '10\.0\.0\.1:9876,2,0': on Ray each worker"),
        (
            Cluster(gpus=2),
            dict(mesh="data=2,fsdp=4"),
            r"mesh = 'data=2,fsdp=4': it has 8 devices.* with 2 \(--ray\.gpus\)",
        ),
        (Cluster(custom={"TPU": 4.0}), dict(mesh="fsdp=8"), r"it has 8 devices.* with 4 \(--ray\.custom TPU\)"),
        (Cluster(), dict(mesh="fsdp=2"), r"it has 2 devices.* with 1 \(the processor"),
    ],
)
def test_runs_that_no_worker_could_hold_are_refused(cluster, asked, said, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(ValueError, match=said):
        cluster.check(**asked)
    plan = sweeps.plan(sweeps.load("quickstart", "smoke"))
    with pytest.raises(ValueError, match=said):
        sweeps.run(plan, tmp_path / "out", on=cluster, settings=sweeps.Settings(**asked))
    assert not (tmp_path / "out").exists()


def test_runs_that_a_worker_can_hold(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for fine in (dict(), dict(mesh="data=1"), dict(mesh="data=2,fsdp=2")):
        Cluster(gpus=4).check(**fine)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    Cluster().check(mesh="fsdp=2")


def test_the_command_refuses_it_before_it_plans(capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "quickstart", "--on", "ray", "--hosts", "10.0.0.1:9876,2,0"])
    said = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and "leave --hosts out" in said and "planning" not in said


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    store = Store(tmp_path / "study")
    store.write_plan(kills.plan(10))
    with pytest.raises(ValueError, match=r"pip install 'bitterlab\[ray\]'"):
        ray_pool.start(store.root, Cluster())


class FakeRay:
    """A cluster of one node, on which a worker never ends."""

    def __init__(self):
        self.cancelled = []
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
        self.util = SimpleNamespace(scheduling_strategies=strategy)

    def nodes(self):
        return [{"Alive": True, "NodeID": "0123456789", "Resources": {"CPU": 1.0}}]

    def remote(self, begin):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: "worker"))

    def wait(self, workers, **_):
        return [], workers

    def cancel(self, worker):
        self.cancelled.append(worker)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), *((number, Preempted) for number in SIGNALS if number != signal.SIGINT)],
)
def test_signals_end_it_as_on_one_machine(tmp_path, monkeypatch, number, raised):
    """So that a supervisor which starts it again on status 75 does."""
    store, ray, before = Store(tmp_path / "study"), FakeRay(), signal.getsignal(number)
    store.write_plan(rows(2))
    monkeypatch.setattr(ray_pool, "_connected", lambda address: contextlib.nullcontext((ray, False)))
    with pytest.raises(raised):
        ray_pool.start(store.root, Cluster(), on_poll=lambda _: os.kill(os.getpid(), number), poll_seconds=0.01)
    assert ray.cancelled == ["worker"] and signal.getsignal(number) == before


# ---- on a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """One CPU on each of two nodes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitterlab[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def store(tmp_path):
    """Of a study that six runs are left of; afterwards no process is at it any more."""
    store = Store(tmp_path / "study")
    store.write_plan(kills.plan(STEPS))
    yield store
    assert not processes_of(store.root)


def processes_of(study: Path) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(study).encode() in command and b"sweeps.launch.worker" in command:
            found.append(int(place.name))
    return found


@pytest.mark.ray
def test_a_cluster_that_changes_under_a_sweep(cluster, store, tmp_path):
    """It ends as on a machine that nothing happens to."""
    wanted = Store(tmp_path / "undisturbed")
    wanted.write_plan(kills.plan(STEPS))
    local.start(wanted.root, local.cpu_slots(2), settings=kills.SETTINGS)
    first = next(iter(cluster.worker_nodes))
    killed, removed, added = [], [], []

    def log_of(node):
        return store.root / "logs" / f"worker-{node.node_id[:8]}-0.log"

    def disturb(store: Store) -> None:
        training = [s for s in store.status() if s.state == "running" and (s.step or 0) > 0]
        if not killed and training:
            killed.append(int(training[0].held_by.split()[-1]))
            os.kill(killed[0], signal.SIGKILL)
        elif killed and not removed and len(training) == 2 and killed[0] not in processes_of(store.root):
            removed.append(first)
            cluster.remove_node(first, allow_graceful=False)
        elif removed and not added:
            added.append(cluster.add_node(num_cpus=1))

    ray_pool.start(store.root, Cluster(address=cluster.address), settings=kills.SETTINGS, on_poll=disturb)
    assert killed and removed and log_of(first).exists() and log_of(added[0]).exists()
    counted = kills.check(store, kills.outcomes(wanted))
    assert counted["ended"] == kills.RUNS and counted["attempt"] >= kills.RUNS + 2


@pytest.mark.ray
def test_a_study_that_is_stopped_and_goes_on(cluster, tmp_path):
    """By the command: Ctrl-C lets the workers save."""
    (tmp_path / "study.py").write_text(STUDY)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sweeps.cli.main", "run", str(tmp_path / "study.py"), "--out", str(out),
               "--on", "ray", "--ray.address", cluster.address]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    store, deadline = Store(out), time.monotonic() + 60
    while not ((out / "plan.json").exists() and any((s.step or 0) > 0 for s in store.status())):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.2)
    assert processes_of(out)
    training = [s.run_id for s in store.status() if s.step]
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode != 0 and not processes_of(out)
    assert training and {store.history(run_id).last().kind for run_id in training} == {"released"}
    command += ["--flops", "6e10"]  # what was spent before the stop counts; with one run done, another may begin
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "2 done" in ended.stderr, ended.stderr
    assert not processes_of(out)


@pytest.mark.ray
def test_what_never_fits(cluster, store):
    with pytest.raises(ValueError, match=r"no node .* has CPU 64 and GPU 1, which.* there is CPU 1; CPU 1\. Give"):
        ray_pool.start(store.root, Cluster(address=cluster.address, cpus=64, gpus=1, wait=1))


@pytest.mark.ray
def test_workers_that_always_die_are_given_up(cluster, store, tmp_path):
    (tmp_path / "code" / "sweeps").mkdir(parents=True)
    (tmp_path / "code" / "sweeps" / "__init__.py").write_text("raise RuntimeError('another code')")
    with pytest.raises(ValueError, match=r"every worker died 4 times and 6 runs are left.*RuntimeError: another code"):
        ray_pool.start(
            store.root, Cluster(address=cluster.address), code=tmp_path / "code", poll_seconds=0.1, backoff_seconds=0.1
        )


@pytest.mark.ray
def test_a_run_that_kills_its_worker_fails_and_stops_no_other(cluster, store, tmp_path, monkeypatch):
    killers, shown = list(store.runs)[1:3], []

    def show(store):
        shown.append(1)
        raise OSError(116, "Stale file handle")  # which stops nothing

    workers_die_of(monkeypatch, tmp_path, ",".join(killers), 1)
    ray_pool.start(store.root, Cluster(address=cluster.address), on_poll=show, poll_seconds=0.1, backoff_seconds=0.1)
    assert shown and {s.run_id: (s.state, s.reason) for s in store.status()} == {
        i: ("failed", "crash") if i in killers else ("done", "") for i in store.runs
    }


@pytest.mark.ray
def test_no_cluster_there(store):
    with pytest.raises(ValueError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        ray_pool.start(store.root, Cluster(address="127.0.0.1:1"))
