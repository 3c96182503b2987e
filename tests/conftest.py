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


def by_test(items):
    """The cases of each test, in an order that has nothing to do with that of its parameters."""
    cases = defaultdict(list)
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        cases[item.nodeid.partition("[")[0]].append(item)
    return cases.values()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Before -m and -k choose: of a test that is marked `first(n)`, the other cases are slow. After: a sample of each test's
    cases, at least one."""
    for cases in by_test(item for item in items if not item.get_closest_marker("slow")):
        if first := cases[0].get_closest_marker("first"):
            for item in cases[first.args[0] :]:
                item.add_marker(pytest.mark.slow)
    result = yield
    if (every := config.getoption("--every")) < 1:
        raise pytest.UsageError(f"--every = {every}: give 1 or more")
    kept = {item for cases in by_test(items) for item in cases[: -(-len(cases) // every)]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    # Slow tests of one case are whole studies: begun first, so that the other workers have something to do beside the last.
    items[:] = sorted(
        (item for item in items if item in kept),
        key=lambda item: "[" in item.nodeid or item.get_closest_marker("slow") is None,
    )
    return result


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


# Of tests that train for longer than they compile.
LONG = ("slow", "faults", "ray", "slurm")


@pytest.fixture(autouse=True, scope="module")
def compiled_as_users_have_it(request):
    """Before any other fixture of a module with long tests, or of fits."""
    here = [item for item in request.session.items if item.path == request.path]
    long = request.path.parent.name == "analysis" or any(
        item.get_closest_marker(mark) for item in here for mark in LONG
    )
    jax.config.update("jax_disable_most_optimizations", not long)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if long else "1")
        yield
