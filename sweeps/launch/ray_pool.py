"""Workers on a Ray cluster: as many as its nodes have room for, also on nodes that come later, fewer when nodes go.

Ray only starts them and says which nodes there are. Who trains what is in the study's directory, which every node has to see;
a run that a lost node held is free again after a lease.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sweeps.files import is_remote
from sweeps.launch.local import heeded, last_words
from sweeps.launch.ray_node import LEAVE_SECONDS, Cluster, task
from sweeps.launch.restarts import BACKOFF_SECONDS, RESTARTS, Restarts
from sweeps.launch.settings import Settings, check_workers
from sweeps.store import Store

Place = tuple[str, int]  # a node's id, and which of the workers there


def start(
    study: Path | str,
    cluster: Cluster,
    *,
    workers: int | None = None,
    settings: Settings | None = None,
    code: Path | None = None,
    on_poll: Callable[[Store], None] | None = None,
    poll_seconds: float = 0.5,
    backoff_seconds: float = BACKOFF_SECONDS,
) -> None:
    """Works on the study until every run has ended, or its budget has; raises ValueError if workers keep dying.

    workers: how many at most (default: as many as fit); an autoscaler is asked for nodes for so many. code: a directory that
    goes first on the workers' PYTHONPATH. Restarts and signals are as in launch.local; a place is given up for itself.
    """
    check_workers(workers)
    store, settings = Store(study if is_remote(study) else Path(study).resolve()), settings or Settings()
    store.check_shared()
    logs = store.local / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment, restarts = cluster.environment(code), Restarts(store, backoff_seconds=backoff_seconds)
    running: dict[Place, Any] = {}  # the task of each worker
    due, given_up = dict[Place, float](), set[Place]()
    finished, error = not restarts.left, ""  # finished: a worker found nothing more to begin
    with _connected(cluster.address) as (ray, here), heeded() as stopping:
        seen = time.monotonic()
        if workers:
            ray.autoscaler.sdk.request_resources(bundles=[cluster.needs] * min(workers, restarts.left))
        try:
            while not stopping:
                places = _places(ray, cluster)
                if places or running:
                    seen = time.monotonic()
                elif time.monotonic() - seen >= (0 if here else cluster.wait):
                    raise ValueError(
                        f"no node of the Ray cluster has {_amounts(cluster.needs)}, which one worker takes; there is "
                        f"{'; '.join(_amounts(node['Resources']) for node in ray.nodes() if node['Alive']) or 'none'}. "
                        f"Give workers less, or wait longer for nodes that are still to come; {restarts.left} runs are left"
                    )
                most = min(workers or len(places), restarts.left)
                waiting = [p for p in places if p not in running and p not in given_up]
                if not running and (finished or (places and not waiting)):
                    break
                for place in [p for p in waiting if due.get(p, 0) <= time.monotonic() and not finished]:
                    if len(running) < most:
                        log = logs / f"worker-{place[0][:8]}-{place[1]}.log"
                        begin = task(store.root, settings.command(store.root, workers=most), log, environment)
                        running[place] = _on_node(ray, begin, place, cluster)
                time.sleep(poll_seconds)
                ended = set(ray.wait(list(running.values()), num_returns=len(running), timeout=0)[0]) if running else ()
                for place in [p for p, worker in running.items() if worker in ended]:
                    try:
                        status = ray.get(running.pop(place))
                    except ray.exceptions.RayError as failure:
                        status, error = None, str(failure).strip().splitlines()[-1]
                    restarts.look()
                    finished |= status == 0 or not restarts.left
                    if place in _places(ray, cluster):  # else its node went, and it with it
                        if (wait := restarts.after(place)) is None:
                            given_up.add(place)
                        else:
                            due[place] = time.monotonic() + wait
                if on_poll:
                    restarts.attempt(lambda: on_poll(store))
                if settings.until and time.time() > settings.until:
                    finished = True
                    break  # the workers save
        finally:
            for worker in running.values():
                ray.cancel(worker)
            if running:
                ray.wait(list(running.values()), num_returns=len(running), timeout=LEAVE_SECONDS + 10)
            if workers:
                ray.autoscaler.sdk.request_resources(bundles=[])
    if not finished:
        raise ValueError(
            f"{study}: every worker died {RESTARTS + 1} times and {restarts.left} runs are left. The last words of one: "
            f"{error or last_words(logs)}; all of them in {logs}/worker-*.log. The same command goes on"
        )


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """The module ray, connected, and whether its cluster was started here. A connection that is there is used, and kept."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.autoscaler.sdk  # pyright: ignore[reportMissingImports]
        import ray.util.scheduling_strategies  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'bitterlab[ray]'") from None
    if ray.is_initialized():
        yield ray, False
        return
    quiet, here = {"log_to_driver": False, "logging_level": "ERROR"}, False
    host, _, port = (address or os.environ.get("RAY_ADDRESS", "")).rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(
                f"no Ray cluster at {host}:{port}: {error}; without an address, one is started here"
            ) from None
    try:
        ray.init(address or "auto", **quiet)
    except ConnectionError as error:
        if address or os.environ.get("RAY_ADDRESS"):
            raise ValueError(f"no Ray cluster: {error}; without an address, one is started here") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, **quiet)
        here = True
    try:
        yield ray, here
    finally:
        ray.shutdown()


def _places(ray: Any, cluster: Cluster) -> list[Place]:
    """On the nodes that are there now."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [(node["NodeID"], i) for node in nodes for i in range(cluster.room(node["Resources"]))]


def _on_node(ray: Any, begin: Callable[[], int], place: Place, cluster: Cluster) -> Any:
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place[0], soft=False)
    needs = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "resources": cluster.custom}
    return ray.remote(begin).options(**needs, max_retries=0, scheduling_strategy=there).remote()


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {n: amount for n, amount in resources.items() if not n.startswith(("node:", "object_store", "memory"))}
    return " and ".join(f"{name} {amount:g}" for name, amount in shown.items())
