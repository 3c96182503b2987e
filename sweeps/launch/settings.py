"""How workers of a study work; every launcher hands this on to those that it starts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lab import tracking
from sweeps.store import LEASE_SECONDS


def check_workers(workers: int | None) -> None:
    """Raises ValueError for fewer than one; None is the launcher's default."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers = {workers}: use a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """None of it changes what is trained.

    pack: runs of one program that train side by side (default: by device).
    mesh: devices along data, fsdp and tensor for each run.
    hosts: of a worker that is several processes, as lab.mesh.read_hosts reads it.
    lease: seconds of silence after which a worker is given up.
    hang: seconds without a step after which a run has failed; four times as long for its compilation.
    checkpoint: seconds between checkpoints.
    most_flops: no run is begun once the study has spent so many; until: nor after this time, in seconds since 1970.
    track: trackers that show the runs, such as "tensorboard,wandb".
    """

    pack: int | None = None
    mesh: str | None = None
    hosts: str | None = None
    lease: float = LEASE_SECONDS
    hang: float = 1800.0
    checkpoint: float = 60.0
    most_flops: float | None = None
    until: float | None = None
    track: str | None = None

    def __post_init__(self):
        for name in ("pack", "lease", "hang", "checkpoint", "most_flops", "until"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: use a number above 0")
        tracking.read(self.track)

    def command(self, study: Path | str, *, workers: int, cores: Sequence[int] = ()) -> list[str]:
        """What starts one of `workers` workers."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        pinned = [f"--cores={','.join(map(str, cores))}"] if cores else []
        return [sys.executable, "-m", "sweeps.launch.worker", str(study), f"--workers={workers}", *pinned, *options]
