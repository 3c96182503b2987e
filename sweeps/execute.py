"""Plan -> records: trains every run of a plan on the machine at hand, and goes on where it was stopped."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from lab.data import load
from sweeps.changes import changes
from sweeps.launch import local, ray_pool, slurm
from sweeps.launch.ray_node import Cluster
from sweeps.launch.settings import Settings, check_workers
from sweeps.launch.slurm import Job
from sweeps.plan import Plan
from sweeps.store import Store

log = logging.getLogger(__name__)


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    on: Cluster | Job | None = None,
    settings: Settings | None = None,
    replace_plan: bool = False,
    on_poll: Callable[[Store], None] | None = None,
    on_change: Callable[[list[str]], None] | None = None,
) -> Path:
    """Trains what is left of the plan under `out` (default runs/<study>) and returns that directory; where `out` is in an
    object store, such as gs://bucket/study, one of this machine with the same records.

    on: a Ray cluster, or jobs of a Slurm cluster, which are submitted and not waited for (default: this machine). workers:
    processes that share the cores (default one a core) or the GPUs (default one a GPU); on Ray, workers over the whole cluster
    (default as many as fit); on Slurm, jobs (default one). Runs that raised are recorded as failed and do not stop the
    others; `Store.retry` lets them be tried again. on_change: told, a line at a time, what the plan changes in one that is
    there (default: a warning).
    """
    check_workers(workers)
    mesh, hosts = (settings.mesh, settings.hosts) if settings is not None else (None, None)
    if isinstance(on, Cluster):
        on.check(mesh=mesh, hosts=hosts)
    elif isinstance(on, Job):
        on.check(out or "", hosts=hosts)
    store = prepared(plan, out, replace_plan=replace_plan, on_change=on_change)
    if not store.left():
        return store.records()
    if isinstance(on, Job):
        slurm.submit(store.root, workers or 1, job=on, settings=settings)
        return store.records()
    if settings is not None and not within(store, settings):
        return store.records()
    if on is not None:
        ray_pool.start(store.root, on, workers=workers, settings=settings, on_poll=on_poll)
    else:
        _, places = local.slots(workers, mesh=mesh, hosts=hosts, needs=plan.needs)
        local.start(store.root, places[: len(plan.unique)], settings=settings, on_poll=on_poll)
    return store.records()


def within(store: Store, settings: Settings) -> bool:
    """Whether anything may be begun: neither FLOPs nor time are over. Of several hosts all have to start: their first decides."""
    if settings.hosts:
        return True
    if settings.until is not None and time.time() >= settings.until:
        log.warning("the study's time is over: nothing more is begun")
        return False
    if settings.most_flops is not None and (spent := store.spent()) >= settings.most_flops:
        log.warning("the study has spent %.3g of %.3g FLOPs: nothing more is begun", spent, settings.most_flops)
        return False
    return True


def prepared(
    plan: Plan,
    out: str | Path | None = None,
    *,
    replace_plan: bool = False,
    on_change: Callable[[list[str]], None] | None = None,
) -> Store:
    """The study's directory with the plan in it; raises ValueError where the plan's text is not here as planned. on_change: as
    in `run`."""
    store = Store(out if out is not None else Path("runs") / plan.study.name)
    if changed := changes(store, plan):
        (on_change or _warn)(changed)
    store.write_plan(plan.to_json(), replace=replace_plan)
    if store.mirror:
        store.mirror.tidy()
    if store.left():
        for data in {row.run.data for row in plan.runs}:
            load(data)  # refused here, once, rather than by every worker
    return store


def _warn(lines: list[str]) -> None:
    for line in lines:
        log.warning("%s", line)
