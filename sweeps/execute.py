"""Plan -> records: trains every run of a plan on the machine at hand, and goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path

from lab.data import load
from sweeps.launch import local, ray_pool
from sweeps.launch.ray_node import Cluster
from sweeps.launch.settings import Settings
from sweeps.plan import Plan
from sweeps.store import Store


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    on: Cluster | None = None,
    settings: Settings | None = None,
    replace_plan: bool = False,
    on_poll: Callable[[Store], None] | None = None,
) -> Path:
    """Trains what is left of the plan under `out` (default runs/<study>) and returns that directory; where `out` is in an
    object store, such as gs://bucket/study, one of this machine with the same records.

    on: a Ray cluster (default: this machine). workers: processes that share the cores (default one a core), or GPUs to use
    (default all); on Ray, workers over the whole cluster (default as many as fit). Runs that raised are recorded as failed
    and do not stop the others; `Store.retry` lets them be tried again.
    """
    store = Store(out if out is not None else Path("runs") / plan.study.name)
    store.write_plan(plan.to_json(), replace=replace_plan)
    if not store.left():
        return store.records()
    for data in {row.run.data for row in plan.runs}:
        load(data)  # refused here, once, rather than by every worker
    if on is not None:
        ray_pool.start(store.root, on, workers=workers, settings=settings, on_poll=on_poll)
        return store.records()
    whole = settings and (settings.mesh or settings.hosts)
    _, places = local.slots(workers, whole=bool(whole), needs=plan.needs)
    local.start(store.root, places[: len(plan.unique)], settings=settings, on_poll=on_poll)
    return store.records()
