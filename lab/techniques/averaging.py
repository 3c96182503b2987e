from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.method import Inside, Method, Moment, Operation, Tools
from lab.objectives import Batch
from lab.spec import Run


class Averaging(Method):
    """What is evaluated, hashed and handed on is an average of the parameters on the way, while training goes on from the
    last."""

    def operations(self, at: Moment) -> tuple[Operation, ...]:
        return (*self.plain(at), Operation("average", 0))

    def every(self) -> Iterator[tuple[int, Operation]]:
        yield from super().every()
        yield 0, Operation("average", 0)


class Ema(Averaging):
    """The exponential moving average with this `decay` (Polyak and Juditsky 1992; Tarvainen and Valpola 2017), after n steps
    with the smaller of it and (1 + n) / (10 + n), so that a short run is not held to its start (TensorFlow's `num_updates`)."""

    copies = 1

    def inside(self, stage: int) -> Inside:
        return MovingAverage(examples=self.run.batch, decay=self.settings["decay"])


@dataclass(frozen=True)
class MovingAverage(Inside):
    decay: float = 0.0

    def start(self, params: Any, batch: Batch) -> dict[str, Any]:
        return {"average": jax.tree.map(jnp.array, params), "averaged": jnp.zeros((), jnp.int32)}

    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        after, loss, norm = tools.plain(state, batch)
        n = state["averaged"].astype(jnp.float32)
        decay = jnp.minimum(self.decay, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["average"], after["params"])
        return {**after, "average": average, "averaged": state["averaged"] + 1}, loss, norm

    def average(self, state: dict[str, Any]) -> Any:
        return state["average"]


class Lawa(Averaging):
    """Kaddour 2022 (arXiv 2209.14981): the mean of the last `window` checkpoints. One is taken each time that another `every` of
    the budget is spent (there: after each epoch), and at the end."""

    foresees = True

    def __init__(self, run: Run, plain_steps: float):
        super().__init__(run, plain_steps)
        self.copies = int(self.settings["window"])

    def feed(self, at: Moment) -> dict[str, np.ndarray]:
        every = self.settings["every"]
        return {"taken": np.asarray(at.last or at.share_after // every > at.share // every, np.float32)}

    def inside(self, stage: int) -> Inside:
        return Window(examples=self.run.batch, fed=(("taken", ()),), window=int(self.settings["window"]))


@dataclass(frozen=True)
class Window(Inside):
    """The state's `taken` parameters have the window before their own axes; `averaged` counts all that were taken."""

    window: int = 1

    def start(self, params: Any, batch: Batch) -> dict[str, Any]:
        repeated = jax.tree.map(lambda p: jnp.broadcast_to(p, (self.window, *p.shape)).copy(), params)
        return {"taken": repeated, "averaged": jnp.zeros((), jnp.int32)}

    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        after, loss, norm = tools.plain(state, batch)
        count, take = state["averaged"], fed["taken"] > 0
        place = count % self.window

        def put(kept: jax.Array, p: jax.Array) -> jax.Array:
            return kept.at[place].set(jnp.where(take, p, kept[place]))

        kept = jax.tree.map(put, state["taken"], after["params"])
        return {**after, "taken": kept, "averaged": count + take}, loss, norm

    def average(self, state: dict[str, Any]) -> Any:
        number = jnp.clip(state["averaged"], 1, self.window)
        there = jnp.arange(self.window) < number

        def mean(kept: jax.Array, now: jax.Array) -> jax.Array:
            shown = there.reshape(-1, *[1] * (kept.ndim - 1))
            of_many = jnp.where(number == 1, kept[0], jnp.sum(jnp.where(shown, kept, 0.0), axis=0) / number)
            return jnp.where(state["averaged"] > 0, of_many, now)

        return jax.tree.map(mean, state["taken"], state["params"])
