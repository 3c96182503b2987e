"""How a run is executed: settings that change how fast it trains and what memory it takes, and its numbers to rounding."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Stored with a run's first checkpoint and used again when it resumes.

    steps_per_dispatch: at most so many steps are taken in one call. scan: one compiled body for all layers, `unroll` of
    them a turn. remat: a layer's inside is computed again in the backward pass instead of kept; saves memory where layers are
    scanned, since XLA on a processor undoes it otherwise. microbatches: the batch is cut in so many parts whose summed
    gradients are divided once. attention: a key of lab.attention.ATTENTION.
    """

    steps_per_dispatch: int
    scan: bool
    unroll: int = 1
    remat: bool = False
    microbatches: int = 1
    attention: str = "blocked"

    def __post_init__(self):
        for name in ("steps_per_dispatch", "unroll", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"execution.{name} = {getattr(self, name)}: use at least 1")
        if self.unroll > 1 and not self.scan:
            raise ValueError(f"execution.unroll = {self.unroll}: layers are unrolled already; use 1, or scan = True")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
