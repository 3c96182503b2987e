from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from lab.method import Inside, Method, Moment, Operation, Tools
from lab.objectives import Batch
from lab.spec import Run


class RhoLoss(Method):
    """Mindermann et al. 2022 (arXiv 2206.07137): of `mega_batch` times as many examples as are trained on, the ones with the most
    reducible loss: the model's loss of an example less that of a holdout model, both a mean over its scored tokens. A hard
    choice of the most, as in the paper; their order stays the stream's.

    The holdout model is the run's own, trained first, for as many plain updates as `holdout_share` of the budget pays for, on
    examples of the same stream that lie behind all that will be chosen from (which an epoch has to hold); its rate goes through a
    schedule of its own, and the model's through the rest of the budget. holdout_charged 1: its training and its forward passes
    are charged. At 0 they are free: No Train No Gain charges neither, and scores with losses that were stored by an example's
    position, of other masks than the training's. Here both models see one and the same example.
    """

    packs = False
    selects = True
    one_epoch = True  # what the holdout model has learned from is not chosen from
    copies = 1

    def __init__(self, run: Run, plain_steps: float):
        super().__init__(run, plain_steps)
        self.times = int(self.settings["mega_batch"])
        share = self.settings["holdout_share"]
        self.before = max(1, round(share * plain_steps)) if share > 0 else 0  # updates of the holdout model
        self.pays = bool(self.settings["holdout_charged"]) and self.charged
        self.first_step = self.before

    @property
    def stages(self) -> tuple[Run, ...]:
        return (self.run, self.run) if self.before else (self.run,)

    def stage(self, step: int, share: float) -> int:
        return int(step >= self.before) if self.before else 0

    def schedule(self, step: int, share: float) -> float:
        if step < self.before:
            return (step + 0.5) / self.before
        paid = self.before / self.plain_steps if self.pays else 0.0
        return (share - paid) / (1 - paid)

    def operations(self, at: Moment) -> tuple[Operation, ...]:
        if at.step < self.before:
            return self.plain(at) if self.pays else ()
        if self.times == 1:
            return self.plain(at)
        scored = self.times * (2 if self.pays else 1)
        return (*(Operation("forward", self.run.batch),) * scored, *self.plain(at))

    def charges(self, at: Moment) -> tuple[Operation, ...]:
        if not self.charged and at.step < self.before:
            return ()
        return super().charges(at)

    def every(self) -> Iterator[tuple[int, Operation]]:
        yield from super().every()
        yield 0, Operation("forward", self.run.batch)

    @cached_property
    def _candidates(self) -> int:
        """All examples that will be chosen from."""
        from lab.ledger import simulated

        return (simulated(self.run, self.run.V).steps - self.before) * self.times * self.run.batch

    def examples(self, step: int) -> tuple[int, int]:
        if step < self.before:
            return self._candidates + step * self.run.batch, self.run.batch
        many = self.times * self.run.batch
        return (step - self.before) * many, many

    def read(self, steps: int) -> int:
        return min(steps, self.before) * self.run.batch + max(steps - self.before, 0) * self.times * self.run.batch

    def inside(self, stage: int) -> Inside:
        if self.times == 1 or stage < len(self.stages) - 1:
            return Inside(examples=self.run.batch) if self.times == 1 and not self.before else Holdout(self.run.batch)
        return Chosen(examples=self.times * self.run.batch, batch=self.run.batch)


@dataclass(frozen=True)
class Holdout(Inside):
    """A plain step, of the holdout model or after it."""

    def enter(self, tools: Tools, before: dict[str, Any], fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return fresh()


@dataclass(frozen=True)
class Chosen(Inside):
    batch: int = 0

    def start(self, params: Any, batch: Batch) -> dict[str, Any]:
        return {"holdout": jax.tree.map(jnp.array, params)}

    def enter(self, tools: Tools, before: dict[str, Any], fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return {**fresh(), "holdout": before["params"]}

    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        def reducible(part: Batch) -> jax.Array:
            return tools.losses(state["params"], part) - tools.losses(state["holdout"], part)

        parts = jax.tree.map(lambda a: a.reshape(self.examples // self.batch, self.batch, *a.shape[1:]), batch)
        rows = most(jax.lax.map(reducible, parts).reshape(-1), self.batch)
        after, loss, norm = tools.plain(state, Batch(*(array[rows] for array in batch)))
        return {**after, "holdout": state["holdout"]}, loss, norm


def most(scores: jax.Array, count: int) -> jax.Array:
    """Places of the `count` highest, in rising order."""
    return jnp.sort(jax.lax.top_k(scores, count)[1])
