import os

# Each test process stays on a core of its own: XLA makes as many threads as it sees cores, and they would get in each
# other's way. Before jax is imported.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
    """No silent broadcasting between ranks anywhere in the lab."""
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Caches of tests are their own, shared by one session so that a corpus is built once."""
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
