"""Worker processes on this machine: one for each core on CPU, one for each accelerator, or one for all of them where a run
needs them together; one that dies is replaced."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.preemption import SIGNALS, Preempted
from sweeps.launch.restarts import BACKOFF_SECONDS, GROUP_RESTARTS, RESTARTS, Restarts
from sweeps.launch.settings import Settings, check_workers
from sweeps.store import Store

# glibc (2.35 and newer; others ignore it) asks for 2 MB pages: XLA takes and gives back its temporary memory with each
# call, and the first touch of 4 kB pages was measured to be up to a fifth of a step.
CPU_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

SHARED_MEMORY = 0.9  # of a GPU, for all workers on it; each process takes some besides what JAX counts


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one worker runs: the cores it is pinned to and its environment."""

    cores: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def cpu_slots(workers: int | None = None) -> list[Slot]:
    """Slots that share this process's cores evenly; by default one for each core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    given = int(os.environ.get("SLURM_CPUS_PER_TASK", len(cores)))
    if given < len(cores):  # which of the cores it sees are its job's, Slurm does not say without task/affinity
        count = workers or given
        threads = str(max(1, given // count))  # XLA makes as many as NPROC says
        return [Slot(environment={**CPU_ENVIRONMENT, "NPROC": threads, "OMP_NUM_THREADS": threads})] * count
    count = workers or len(cores)
    shares = [tuple(cores[i::count]) or (cores[i % len(cores)],) for i in range(count)]
    return [Slot(cores=share, environment=CPU_ENVIRONMENT) for share in shares]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """kind: 'gpu', 'tpu', or 'cpu' with a count of 0. memory: bytes of one, where it tells."""

    kind: str
    count: int = 0
    memory: int | None = None


def accelerators() -> Devices:
    """Another process asks JAX, so that this one holds no device."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return Devices(kind="cpu")
    hints = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    if not hints and not os.environ.get("JAX_PLATFORMS"):
        return Devices(kind="cpu")
    question = (
        "import jax; from lab.hardware import memory_limit; "
        "print(jax.default_backend(), jax.local_device_count(), memory_limit())"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if answer.returncode != 0:
        raise ValueError(
            f"JAX can not start on this machine's devices: {answer.stderr.strip().splitlines()[-1:]}; "
            "set JAX_PLATFORMS=cpu to train on the processor"
        )
    platform, count, memory = answer.stdout.split()[-3:]
    if platform == "cpu":
        return Devices(kind="cpu")
    return Devices(kind=platform, count=int(count), memory=int(memory) if memory.isdigit() else None)


def processor_is_several() -> bool:
    """Whether JAX is told to take this machine's processor for several devices."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or (
        "JAX_NUM_CPU_DEVICES" in os.environ
    )


def one_has_all(workers: int | None, *, mesh: str | None, hosts: str | None) -> bool:
    """Whether one worker has all of this machine's devices; raises ValueError where several are asked for all the same."""
    check_workers(workers)
    if mesh is None and hosts is None:
        return False
    if workers not in (None, 1):
        given = f"--mesh {mesh}" if mesh is not None else f"--hosts {hosts}"
        raise ValueError(
            f"workers = {workers}: with {given} one worker has all devices of this machine; leave one of them out"
        )
    return True


def _check_mesh(mesh: str, found: Devices) -> None:
    from lab.mesh import Mesh

    wanted, has = Mesh.read(mesh).devices, found.count or 1
    if wanted not in (1, has) and not (found.kind == "cpu" and processor_is_several()):
        raise ValueError(
            f"mesh = {mesh!r}: it has {wanted} devices, and this machine {has} ({found.kind}); use all of them, or one"
        )


def slots(
    workers: int | None = None,
    *,
    mesh: str | None = None,
    hosts: str | None = None,
    needs: Callable[[str, int], int] | None = None,
) -> tuple[str, list[Slot]]:
    """The kind of device and the workers' places on it: a core each, a GPU each, a TPU host. One worker has all devices
    where there is a mesh or several hosts, or where a run needs(kind, bytes of one GPU) more bytes than one GPU has.
    More workers than GPUs share them, each with its part of the memory: small runs compile and train at the same time.
    Raises ValueError for a mesh of other devices than this machine has; those of several hosts are counted by the workers."""
    whole, found = one_has_all(workers, mesh=mesh, hosts=hosts), accelerators()
    if mesh is not None and hosts is None:
        _check_mesh(mesh, found)
    if found.kind == "cpu":
        return "cpu", cpu_slots(1 if whole else workers)
    if found.kind != "gpu" or whole or (needs and found.memory and needs("gpu", found.memory) > found.memory):
        return found.kind, [Slot()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(found.count)))).split(",")
    count, shared = workers or found.count, {}
    if (share := -(-count // found.count)) > 1:
        part = int((found.memory or 0) * SHARED_MEMORY / share)
        if part and needs and (most := needs("gpu", part)) > part:
            raise ValueError(
                f"workers = {workers}: {share} on one GPU have {part / 2**20:,.0f} MiB each, and the largest run needs "
                f"{most / 2**20:,.0f}; use fewer workers"
            )
        shared = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{SHARED_MEMORY / share:.3f}"}
    return "gpu", [Slot(environment={"CUDA_VISIBLE_DEVICES": visible[i % found.count], **shared}) for i in range(count)]


def start(
    study: Path | str,
    places: list[Slot],
    *,
    settings: Settings | None = None,
    on_poll: Callable[[Store], None] | None = None,
    poll_seconds: float = 0.5,
    backoff_seconds: float = BACKOFF_SECONDS,
) -> None:
    """Works on the study until every run has ended, or its budget has; raises ValueError if workers keep dying.

    A worker that is killed is started again in its place, later each time until the study goes on. Signals (where this is the
    main thread, which alone may handle them) are passed on and the workers save; then they are raised (`heeded`).
    """
    store = Store(study)
    if len(places) > 1:
        store.check_shared()
    logs = store.local / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    most = RESTARTS if settings is None or settings.hosts is None else GROUP_RESTARTS

    def spawn(index: int) -> subprocess.Popen[bytes]:
        place = places[index]
        command = (settings or Settings()).command(store.root, workers=len(places), cores=place.cores)
        threads = str(max(1, len(place.cores)))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, **place.environment}
        with log_of(logs, index, settings).open("ab") as log:
            # A session of its own: a Ctrl-C at the terminal reaches the workers once, through this process.
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    workers: dict[int, subprocess.Popen[bytes]] = {}
    finished, due = False, dict.fromkeys(range(len(places)), 0.0)  # finished: a worker found nothing more to begin
    restarts = Restarts(store, most=most, backoff_seconds=backoff_seconds)
    with heeded() as stopping:
        try:
            while (workers or due) and not stopping:
                for index in [i for i, when in due.items() if when <= time.monotonic()]:
                    del due[index]
                    workers[index] = spawn(index)
                time.sleep(poll_seconds)
                for index, worker in list(workers.items()):
                    if worker.poll() is None:
                        continue
                    del workers[index]
                    finished |= worker.returncode == 0
                    restarts.look()
                    if worker.returncode != 0 and (wait := restarts.after(index)) is not None:
                        due[index] = time.monotonic() + wait
                if on_poll:
                    restarts.attempt(lambda: on_poll(store))
                if settings and settings.until and time.time() > settings.until:
                    finished = True
                    break  # the workers save
        finally:
            for worker in workers.values():
                worker.terminate()
            for worker in workers.values():
                try:
                    worker.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    worker.kill()
                    worker.wait()
    if not finished and (left := len(store.left())):
        raise ValueError(
            f"{study}: every worker died {most + 1} times and {left} runs are left. The last words of one: "
            f"{last_words(logs)}; all of them in {logs}/worker-*.log. The same command goes on"
        )


@contextlib.contextmanager
def heeded() -> Iterator[list[int]]:
    """The signals that came, where this is the main thread, which alone may handle them. Afterwards SIGINT raises
    KeyboardInterrupt, the others lab.preemption.Preempted."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS if main}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt if signal.SIGINT in came else Preempted()


def log_of(logs: Path, index: int, settings: Settings | None = None) -> Path:
    """Where a worker of this machine logs; other machines may be at the same study."""
    number = "" if settings is None or settings.hosts is None else f"-{settings.hosts.rpartition(',')[2]}"
    return logs / f"worker-{socket.gethostname()}-{index}{number}.log"


def last_words(logs: Path) -> str:
    newest = max(logs.glob("worker-*.log"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return "none on this machine; they lie on those that the workers ran on"
    lines = newest.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "none")
