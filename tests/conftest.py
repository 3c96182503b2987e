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
