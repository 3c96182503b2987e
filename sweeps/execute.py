"""Plan -> records: trains every run of a plan on the machine at hand, and goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

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
    on: Literal["local", "ray"] = "local",
    ray: Cluster | None = None,
    settings: Settings | None = None,
    replace_plan: bool = False,
    on_poll: Callable[[Store], None] | None = None,
) -> Path:
    """Trains what is left of the plan under `out` (default runs/<study>) and returns that directory.

    workers: processes that share the cores (default one a core), or GPUs to use (default all);
    on Ray, workers over the whole cluster (default as many as fit). Runs that raised are
    recorded as failed and do not stop the others; `Store.retry` lets them be tried again.
    """
    directory = Path(out) if out is not None else Path("runs") / plan.study.name
    store = Store(directory)
    store.write_plan(plan.to_json(), replace=replace_plan)
    if not store.left():
        return directory
    for data in {row.run.data for row in plan.runs}:
        load(data)  # refused here, once, rather than by every worker
    if on == "ray":
        ray_pool.start(directory, ray or Cluster(), workers=workers, settings=settings, on_poll=on_poll)
        return directory
    _, places = local.slots(workers, mesh=settings.mesh if settings else None, needs=plan.needs)
    local.start(directory, places[: len(plan.unique)], settings=settings, on_poll=on_poll)
    return directory
