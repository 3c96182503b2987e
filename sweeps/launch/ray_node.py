"""What a worker takes of a Ray cluster's node, and what Ray runs there."""

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab import records
from lab.secrets import is_secret
from sweeps.files import is_remote
from sweeps.launch.local import CPU_ENVIRONMENT, processor_is_several

# Variables of this process that workers on other nodes get too: those that begin so, and these; no keys, which each node has
# for itself, since Ray writes a task's environment down.
PASSED = ("BITTERLAB_", "JAX_", "XLA_")
TRACKED = ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR")
LEAVE_SECONDS = 60.0  # that a worker has to save
# Becomes the worker, to which the kernel sends SIGTERM (it saves) when the process that Ray gave the task to dies.
TIED = """
import ctypes, os, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
prctl and prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM: Linux only
os.getppid() == int(sys.argv[1]) or sys.exit(75)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster, and what each worker takes of it."""

    # Its head's; default: RAY_ADDRESS, or this machine's cluster, or one that is started here.
    address: str | None = None
    cpus: int = 1
    gpus: int = 0
    custom: dict[str, float] = field(default_factory=dict)  # other resources, as the nodes name them
    wait: float = 60.0  # seconds in which no node has room for a worker, after which the command stops

    def __post_init__(self):
        if self.cpus < 1 or self.gpus < 0 or any(not amount > 0 for amount in self.custom.values()):
            raise ValueError(f"{self}: a worker takes at least one CPU, and of other resources an amount above 0")

    @property
    def needs(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.custom}

    @property
    def kind(self) -> str:
        return "gpu" if self.gpus else "tpu" if "TPU" in self.custom else "cpu"

    def room(self, resources: Mapping[str, float]) -> int:
        """Workers that fit on a node with so much of everything."""
        return min(math.floor(resources.get(name, 0) / amount + 1e-6) for name, amount in self.needs.items())

    def check(self, *, mesh: str | None = None, hosts: str | None = None) -> None:
        """Raises ValueError where `lab run` is asked for more than one process a run, or for devices that no worker has: a
        worker is one process on one node, and they are not made one worker."""
        from lab.mesh import Mesh

        if hosts is not None:
            raise ValueError(
                f"hosts = {hosts!r}: on Ray each worker is a process for itself, and none is told which host it would be; leave "
                "--hosts out, or use --on slurm --slurm.nodes, or the same command on each host without --on ray"
            )
        wanted = 1 if mesh is None else Mesh.read(mesh).devices
        if wanted == 1 or (self.kind == "cpu" and processor_is_several()):
            return
        has = self.gpus if self.kind == "gpu" else int(self.custom.get("TPU", 0)) if self.kind == "tpu" else 1
        if wanted != has:
            raise ValueError(
                f"mesh = {mesh!r}: it has {wanted} devices, and a worker on Ray is a process of one node with {has} "
                f"({_resource(self.kind)}); ask for as many, or use --on slurm --slurm.nodes for runs that are larger than a node"
            )

    def environment(self, code: Path | None = None) -> dict[str, str]:
        """Of a worker, on top of its node's. NPROC: XLA makes as many threads as it says, instead of one for each core."""
        passed = {
            name: value
            for name, value in os.environ.items()
            if (name.startswith(PASSED) or name in TRACKED) and not is_secret(name)
        }
        if self.kind == "cpu":
            passed |= CPU_ENVIRONMENT
        else:
            passed.pop("JAX_PLATFORMS", None)  # this machine may have no accelerator
        if paths := [path for path in (str(code or ""), os.environ.get("PYTHONPATH", "")) if path]:
            passed["PYTHONPATH"] = os.pathsep.join(paths)
        if code is not None:
            passed["PYTHONSAFEPATH"] = "1"  # else the directory that Ray was started in comes first
        return passed | {"OMP_NUM_THREADS": str(self.cpus), "NPROC": str(self.cpus)}


def _resource(kind: str) -> str:
    return {"gpu": "--ray.gpus", "tpu": "--ray.custom TPU"}.get(kind, "the processor; --ray.gpus gives it GPUs")


def task(study: Path | str, command: list[str], log: Path, environment: dict[str, str]) -> Callable[[], int]:
    """A worker, from beginning to end; its exit status. A closure, so that the process Ray runs it in need not have the lab."""
    plan, tied, leave = None if is_remote(study) else Path(study) / records.PLAN, TIED, LEAVE_SECONDS

    def work() -> int:
        if plan and not plan.exists():
            raise FileNotFoundError(f"{socket.gethostname()} has no {plan}; a study must lie where every node sees it")
        begin = [sys.executable, "-c", tied, str(os.getpid()), sys.executable, *command[1:]]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            # A session of its own: Ray kills the process group of one that dies, and the worker is to save.
            worker = subprocess.Popen(
                begin, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
            )
        try:
            while worker.poll() is None:
                time.sleep(0.2)  # a task that is cancelled gets KeyboardInterrupt, but no call is cut short for it
        finally:
            worker.terminate()
            try:
                worker.wait(timeout=leave)
            except subprocess.TimeoutExpired:
                worker.kill()
        return worker.wait()

    return work
