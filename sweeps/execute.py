"""Plan -> records: trains every run of a plan on the machine at hand, and goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path

from lab.data import load
from sweeps.launch import local
from sweeps.plan import Plan
from sweeps.store import Store


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    pack: int | None = None,
    mesh: str | None = None,
    replace_plan: bool = False,
    on_poll: Callable[[Store], None] | None = None,
) -> Path:
    """Trains what is left of the plan under `out` (default runs/<study>) and returns that directory.

    workers: processes that share the cores (default one a core), or GPUs to use (default all). pack: runs of one program
    that train side by side in a worker (default: what the device has memory for, and one on a processor). mesh: devices
    along data, fsdp and tensor that each run is cut over, such as 'data=4,fsdp=2' (default: one device a run, and all of them
    for runs that one can not hold). Runs that raised are
    recorded as failed and do not stop the others; `Store.retry` lets them be tried again.
    """
    directory = Path(out) if out is not None else Path("runs") / plan.study.name
    store = Store(directory)
    store.write_plan(plan.to_json(), replace=replace_plan)
    if all(store.ended(run_id) for run_id in store.runs):
        return directory
    for data in {row.run.data for row in plan.runs}:
        load(data)  # refused here, once, rather than by every worker
    _, places = local.slots(workers, mesh=mesh, needs=plan.needs)
    local.start(directory, places[: len(plan.unique)], pack=pack, mesh=mesh, on_poll=on_poll)
    return directory
