from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lab import generations
from lab.checks import require
from lab.method import Inside, Method, Operation, Tools
from lab.spec import Run


class Stacking(Method):
    """Gong et al. 2019 ("Efficient training of BERT by progressively stacking"), as No Train No Gain uses it: a model of a
    part of the depth is trained, and at given shares of the budget (`first`, `second`, `third`) a copy of all its layers is
    put on top, `doublings` times. Token tables, heads and norms beside the layers go on; the learning rate does too.

    The first layers start as the whole model's do. What joins has an optimizer's state of its own, so that its first update is a
    first update; the copies of No Train No Gain start so too (its `reset_optim` is read by nothing, and torch's Adam counts by
    parameter), while optax's Adam would count them with the others. A boundary lies before the first step that begins at or after
    it.
    """

    packs = False

    def __init__(self, run: Run, plain_steps: float):
        super().__init__(run, plain_steps)
        assert run.technique is not None
        self.boundaries = run.technique.boundaries
        parts = 2 ** len(self.boundaries)
        for name in ("L", "L_input"):
            depth = getattr(run.shape, name)
            require(depth % parts == 0, f"shape.{name}", depth,
                    f"stacking begins with 1/{parts} of the depth and doubles it: use a multiple of {parts}, or other "
                    "technique.settings.doublings")  # fmt: skip

    @property
    def stages(self) -> tuple[Run, ...]:
        shape, last = self.run.shape, len(self.boundaries)
        depths = [2 ** (last - stage) for stage in range(last + 1)]
        return tuple(
            replace(self.run, shape=replace(shape, L=shape.L // part, L_input=shape.L_input // part)) for part in depths
        )

    def stage(self, step: int, share: float) -> int:
        return sum(share >= boundary for boundary in self.boundaries)

    def every(self) -> Iterator[tuple[int, Operation]]:
        for stage in range(len(self.boundaries) + 1):
            for _, operation in super().every():
                yield stage, operation

    def doublings(self, stage: int) -> int:
        return stage

    def inside(self, stage: int) -> Inside:
        return Doubled(examples=self.run.batch) if self.boundaries else super().inside(stage)


@dataclass(frozen=True)
class Doubled(Inside):
    def enter(self, tools: Tools, before: dict[str, Any], fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        params = generations.twice(before["params"])
        older = before.get("grown", ())
        newest = generations.split(params, len(older) + 1)[-1]
        return {"params": params, "optimizer": before["optimizer"], "grown": (*older, tools.start(newest))}
