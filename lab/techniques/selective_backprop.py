from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.method import NO_UPDATE, Inside, Method, Moment, Operation, Tools
from lab.objectives import Batch, draws
from lab.spec import Run

PLACE = 2**41  # of the seed's examples: those of lab.objectives are below


class SelectiveBackprop(Method):
    """Jiang et al. 2019 (arXiv 1910.00762): each example's loss is looked up among the last `history` losses, and the example
    is kept with the probability (share of them that are no higher)^beta. What is kept waits until there is a batch of it.

    A step scores as many examples as a batch has, and makes an update where a batch is waiting; so what it spends depends on what
    it finds, and is charged when it is known: one forward pass, and an update's operations with each update. A plan states
    what is expected: one example in beta + 1 is kept. As in No Train No Gain's code the history has the examples' own losses
    in it, and kept examples beyond a batch wait for the next; the chance is drawn from (seed, step).
    """

    packs = False
    selects = True
    dependent = True

    def __init__(self, run: Run, plain_steps: float):
        super().__init__(run, plain_steps)
        self.beta = self.settings["beta"]

    def operations(self, at: Moment) -> tuple[Operation, ...]:
        return (Operation("forward", self.run.batch),)

    def charges(self, at: Moment) -> tuple[Operation, ...]:
        return self.operations(at) if self.charged else ()

    def settled(self, at: Moment) -> tuple[Operation, ...]:
        return self.plain(at)

    def expected(self, step: int) -> bool:
        return int((step + 1) / (self.beta + 1)) > int(step / (self.beta + 1))

    def every(self) -> Iterator[tuple[int, Operation]]:
        yield from super().every()
        yield 0, Operation("forward", self.run.batch)

    def feed(self, at: Moment) -> dict[str, np.ndarray]:
        batch, seed = self.run.batch, self.run.seed.data
        return {"drawn": draws(seed, PLACE + at.step * batch, batch, 1)[:, 0].astype(np.float32)}

    def inside(self, stage: int) -> Inside:
        fed = (("drawn", (self.run.batch,)),)
        return Kept(examples=self.run.batch, fed=fed, beta=self.beta, history=int(self.settings["history"]))


@dataclass(frozen=True)
class Kept(Inside):
    """losses: of the last `history` examples, in a ring; scored: of how many in all. waiting: examples that are kept, in
    arrays for two batches (an objective without inputs has none of these); `waits` of them are there."""

    beta: float = 1.0
    history: int = 1

    def start(self, params: Any, batch: Batch) -> dict[str, Any]:
        widths = {
            name: array.shape[-1] for name, array in batch._asdict().items() if array.shape[-1]
        }  # none is of size 0
        zero = jnp.zeros((), jnp.int32)
        return {
            "losses": jnp.zeros(self.history, jnp.float32),
            "scored": zero,
            "waiting": {name: jnp.zeros((2 * self.examples, width), jnp.int32) for name, width in widths.items()},
            "waits": zero,
        }

    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        B, own = self.examples, {name: state[name] for name in ("params", "optimizer")}
        losses_B = tools.losses(own["params"], batch)
        history, scored = remembered(state["losses"], state["scored"], losses_B)
        keep_B = fed["drawn"] < probability(history, scored, losses_B, self.beta)
        place_B = jnp.where(keep_B, state["waits"] + jnp.cumsum(keep_B) - 1, 2 * B)  # beyond the end: nowhere
        waiting = {
            name: old.at[place_B].set(getattr(batch, name), mode="drop") for name, old in state["waiting"].items()
        }
        waits = state["waits"] + jnp.sum(keep_B)
        enough = waits >= B

        def update() -> Any:
            return tools.plain(own, batch._replace(**{name: array[:B] for name, array in waiting.items()}))

        def none() -> Any:
            return own, jnp.mean(losses_B), jnp.float32(NO_UPDATE)

        own, loss, norm = jax.lax.cond(enough, update, none)
        left = {name: jnp.where(enough, jnp.roll(array, -B, axis=0), array) for name, array in waiting.items()}
        waits = jnp.where(enough, waits - B, waits)
        return {**own, "losses": history, "scored": scored, "waiting": left, "waits": waits}, loss, norm


def remembered(history: jax.Array, scored: jax.Array, losses_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ring with these losses in it, and how many were ever put there."""
    H, B = len(history), len(losses_B)
    newest = losses_B[-H:]
    places = (scored + jnp.arange(B)[-H:]) % H
    return history.at[places].set(newest), scored + B


def probability(history: jax.Array, scored: jax.Array, losses_B: jax.Array, beta: float) -> jax.Array:
    """[B], of keeping an example: the share of the history that is no higher, to the power of beta."""
    there = jnp.arange(len(history)) < scored
    lower_B = jnp.sum((history[None, :] <= losses_B[:, None]) & there[None, :], axis=1)
    return (lower_B / jnp.minimum(scored, len(history))) ** beta
