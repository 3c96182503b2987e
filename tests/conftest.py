import gc
import os
import zlib
from collections import defaultdict
from pathlib import Path

# Each test process stays on a core of its own: XLA makes as many threads as it sees cores, and they would get in each
# other's way. Before jax is imported.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# Most tests compile for seconds what then runs for milliseconds: machine code is not optimized for them, here and in the
# processes that they start; programs are the same.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test's cases one in N, the same ones each time"
    )


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    """A sample of a suite whose tests have hundreds of cases: at least one of each test's, in an order that has nothing to do
    with that of its parameters."""
    every, cases = config.getoption("--every"), defaultdict(list)
    if every < 1:
        raise pytest.UsageError(f"--every = {every}: give 1 or more")
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        item
        for of_one in cases.values()
        for item in sorted(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))[: -(-len(of_one) // every)]
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


MAPS, MOST_MAPS = Path("/proc/self/maps"), 15_000


@pytest.fixture(autouse=True, scope="session")
def strict_jax(tmp_path_factory):
    """No silent broadcasting between ranks anywhere in the lab; what one test process has compiled serves the others."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Caches of tests are their own, shared by one session so that a corpus is built once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BITTERLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """Once they are many: a process that runs a thousand tests would keep every program that it compiled, and the kernel ends
    it with a segmentation fault where it has too many memory maps (65,530 by default)."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        from lab.compiled import compiled

        compiled.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def compiled_as_users_have_it(request, monkeypatch):
    """Slow tests, and those of fits, which run for longer than they compile."""
    if request.path.parent.name == "analysis" or request.node.get_closest_marker("slow"):
        jax.config.update("jax_disable_most_optimizations", False)
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    else:
        jax.config.update("jax_disable_most_optimizations", True)
