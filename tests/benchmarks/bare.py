"""A run's compiled steps without a loop around them, for benchmarks that time programs against one another."""

import statistics
import time

import jax
import numpy as np

from lab.compiled import compiled
from lab.execution import Execution
from lab.optimizers import hyperparameters
from lab.program import Program, program, shapes
from lab.spec import Run


class Bare:
    """`steps` training steps a call on one batch of random tokens; `seconds()` is of one call, a step. With `pack` runs side by
    side a step is one of each of them."""

    def __init__(self, run: Run, execution: Execution, *, pack: int = 1, start: bool = True):
        self.program: Program = program(run, execution, pack=pack)
        self.built = compiled(self.program)
        self.k = execution.steps_per_dispatch
        rng = np.random.default_rng(0)
        many = (pack,) if pack > 1 else ()
        made = shapes(self.program.forms, (self.k, *many, run.batch))
        tokens = {"inputs": 250, "targets": 250, "labels": 250}
        if run.objective.name == "masked_lm":
            tokens["targets"] = run.objective.S  # positions
        self.batch = type(made)(
            *(rng.integers(0, tokens[n], s.shape).astype(np.int32) for n, s in zip(made._fields, made, strict=True))
        )
        hyper = hyperparameters(run.optimizer, steps=self.k, seed=0)
        self.hyper = {name: np.full(many, value, np.float32) for name, value in hyper.items()}
        self.rates = np.full((self.k, *many), 1e-3, np.float32)
        if start:
            self.start()

    def start(self) -> None:
        states = [self.built.init(seed) for seed in range(self.program.pack)]
        self.state = self.built.join(states) if len(states) > 1 else states[0]
        self.seconds()  # the first touch of its memory

    def seconds(self) -> float:
        start = time.perf_counter()
        self.state, losses, _ = self.built.advance(
            self.state, self.batch, self.hyper, self.rates, np.int32(self.k), None
        )
        jax.block_until_ready(losses)
        return (time.perf_counter() - start) / self.k


def side_by_side(programs: dict[str, Bare], rounds: int, *, base: str) -> dict[str, tuple[float, float]]:
    """(median seconds a step, median over rounds of the ratio to `base`) of each; rounds go through all in turn."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    order = list(programs)
    for index in range(rounds):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            taken[name].append(programs[name].seconds())
    return {
        name: (statistics.median(seconds), statistics.median(a / b for a, b in zip(seconds, taken[base], strict=True)))
        for name, seconds in taken.items()
    }
