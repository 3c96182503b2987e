"""Where caches lie: prepared corpora and compiled programs. Deleting the directory costs time, never a result."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$BITTERLAB_CACHE, else $XDG_CACHE_HOME/bitterlab, else ~/.cache/bitterlab: absolute, and not made here."""
    if chosen := os.environ.get("BITTERLAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "bitterlab"
