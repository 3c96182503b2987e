"""Jobs of a Slurm cluster, through submitit: an array of nodes that each do what `lab run` does on a machine.

A job that is preempted or reaches its time limit is told ahead of it, saves, and is put into the queue again. Slurm itself puts
back those that it kills for preemption, but not one that then ends by itself in the time it is given: so each asks for it.
submitit keeps its files in `<study>/slurm`; its jobs' pickles there are read by those jobs alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.preemption import AGAIN
from sweeps.files import is_remote
from sweeps.launch.settings import Settings
from sweeps.launch.snapshot import snapshot
from sweeps.store import Store

DIRECTORY = "slurm"
TIMEOUTS = 1_000_000  # submitit counts them; the study's own budget is the limit
NAMES = {"most_flops": "flops"}  # what `lab run` calls one of the settings


@dataclass(frozen=True, kw_only=True)
class Job:
    """What each job asks Slurm for. minutes: its time limit, after which it is put into the queue again. notice: seconds that
    it is told ahead of that. nodes: more than one for runs larger than a node. more: any other options of sbatch, such as
    exclude=node7."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0  # of each node
    cpus: int = 1  # of each node
    memory: str | None = None  # of each node, such as 64GB
    nodes: int = 1
    minutes: int = 240
    notice: int = 120
    more: tuple[str, ...] = ()

    def __post_init__(self):
        for name, least in (("gpus", 0), ("cpus", 1), ("nodes", 1), ("minutes", 1), ("notice", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"slurm.{name} = {getattr(self, name)}: use a whole number of at least {least}")
        if self.notice >= 60 * self.minutes:
            raise ValueError(f"slurm.notice = {self.notice}: use fewer seconds than the limit, {self.minutes} minutes")
        for option in self.more:
            if not option.partition("=")[0].strip("-") or "=" not in option:
                raise ValueError(f"slurm.more = {option!r}: use NAME=VALUE, such as exclude=node7")

    def check(self, study: Path | str, *, hosts: str | None = None) -> None:
        """Raises ValueError for a study that jobs can not work on, and where they would all be told the same host's number."""
        if is_remote(study):
            raise ValueError(
                f"out = {str(study)!r}: jobs of Slurm need a directory that the compute nodes see, for the code and what they "
                "print too; give one (--out)"
            )
        if hosts is not None and not (hosts == "auto" and self.nodes > 1):
            raise ValueError(
                f"hosts = {hosts!r}: the nodes of a job find one another; leave --hosts out, and use --slurm.nodes for runs "
                "that are larger than a node"
            )

    def parameters(self, jobs: int) -> dict[str, Any]:
        """As submitit's SlurmExecutor takes them."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint,
                 "gpus_per_node": self.gpus or None, "mem": self.memory}  # fmt: skip
        more = dict(option.lstrip("-").split("=", 1) for option in self.more)
        return {
            **{name: value for name, value in named.items() if value is not None},
            "nodes": self.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "time": self.minutes,
            "signal_delay_s": self.notice,
            "array_parallelism": jobs,
            "stderr_to_stdout": True,
            # srun does not take it from the batch job (since Slurm 22.05).
            "srun_args": [f"--cpus-per-task={self.cpus}"],
            "additional_parameters": {"requeue": True, **more},
        }


class Node:
    """What a job runs: `lab run` on the study's directory, in a process of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.command, self.environment = command, environment
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        self.child = subprocess.Popen(self.command, env={**os.environ, **self.environment})
        status = self._ended(self.child)
        if status == AGAIN:  # preempted: Slurm has signalled all processes of the job
            if os.environ.get("SLURM_PROCID", "0") == "0":
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            time.sleep(120)  # until it is killed; a job that ends by itself would count as done
        elif status not in (0, 1):  # 1: some runs failed, which the study's directory says
            raise RuntimeError(f"lab run ended with status {status}; see this job's log")
        return status

    def checkpoint(self) -> Any:
        """submitit calls it ahead of the time limit, in the midst of __call__, and then puts the job into the queue again."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        if self.child is not None:
            self.child.send_signal(signal.SIGUSR2)
            self._ended(self.child)
        return DelayedSubmission(Node(self.command, self.environment))

    @staticmethod
    def _ended(child: subprocess.Popen[bytes]) -> int:
        while (status := child.poll()) is None:  # `wait` holds a lock that a signal handler can not take again
            time.sleep(0.2)
        return status


def submit(study: Path | str, jobs: int, *, job: Job | None = None, settings: Settings | None = None) -> list[str]:
    """Submits an array of so many jobs that work on the study, with the code as it is now; returns their ids."""
    job, settings = job or Job(), settings or Settings()
    job.check(study, hosts=settings.hosts)
    store = Store(Path(study).absolute())
    if jobs < 1:
        raise ValueError(f"workers = {jobs}: submit at least one job")
    try:
        import submitit  # pyright: ignore[reportMissingImports]
        from submitit.core.utils import FailedJobError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("submitit is not installed: pip install 'bitterlab[slurm]'") from None
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ValueError("no sbatch and srun here: run this on a login node of a Slurm cluster")
    store.check_shared()
    executor = submitit.SlurmExecutor(store.local / DIRECTORY, max_num_timeout=TIMEOUTS)
    executor.update_parameters(job_name=store.plan["study"]["name"], **job.parameters(jobs))
    environment = {"PYTHONPATH": str(snapshot(store.local)), "PYTHONSAFEPATH": "1"}
    node = Node([sys.executable, "-m", "sweeps.cli.main", "run", str(store.root), *flags(settings, job)], environment)
    try:
        with executor.batch():
            submitted = [executor.submit(node) for _ in range(jobs)]
        return [one.job_id for one in submitted]
    except FailedJobError as error:
        raise ValueError(f"Slurm does not take the job: {str(error).strip().splitlines()[-1]}") from error


def flags(settings: Settings, job: Job) -> list[str]:
    """The settings as `lab run` takes them; all hosts of a job of several nodes are one worker. `until` stays a moment, so that
    the time in the queue counts, and a job that is put back gets no new hours."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    if job.nodes > 1:
        given["hosts"] = "auto"
    return [word for name, value in given.items() for word in (f"--{NAMES.get(name, name)}", str(value))]
