"""Which software a run was made with: recorded with every result, part of no run's identity."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path


@functools.cache
def versions() -> dict[str, str]:
    """Library versions, Python's, and the git revision of the lab where it runs from a clone."""
    found = {"python": platform.python_version()}
    for name in ("bitterlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"git": git_revision()}


def git_revision() -> str:
    """The commit of the clone that this file lies in, with '-dirty' for local changes; 'none' outside a clone."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        inside = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=here, capture_output=True, timeout=5
        )
        if inside.returncode != 0:
            return "none"
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5).stdout.strip() or "none"
    except (OSError, subprocess.TimeoutExpired):
        return "none"
