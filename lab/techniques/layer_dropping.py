import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lab.cost import Active
from lab.forms import forms
from lab.method import Inside, Method, Moment, Operation, Tools
from lab.objectives import Batch, draws
from lab.spec import Run

BLOCK = 256  # steps whose numbers are drawn together
PLACE = 2**40  # of the seed's examples: those of lab.objectives are below


class LayerDropping(Method):
    """Progressive layer dropping (Zhang and He 2020, arXiv 2010.13369), by the spent share of the budget as in No Train No Gain:
    layer i of L (from 1) is skipped with probability p_max i / L, where p_max = 1 - (theta + (1 - theta) exp(-gamma t)) rises
    from 0 to 1 - theta. A layer that is skipped is the identity, and is not executed; all layers are evaluated.

    Which are skipped is a function of (seed, step): one draw for a step, at equal depths the same of both streams, as its T5 code
    does (its BERT code draws for each micro-batch). As in its code, what stays is not divided by the probability to stay. The
    paper's schedule is of steps, not of what is spent.
    """

    packs = False

    def __init__(self, run: Run, plain_steps: float):
        super().__init__(run, plain_steps)
        self.theta, self.gamma = self.settings["theta"], self.settings["gamma"]
        s, only = run.shape, run.structure.encoder_only
        self.depths = {"targets": s.L} if only else {"inputs": s.L_input, "targets": s.L}

    def most(self, share: float) -> float:
        """p_max."""
        return 1 - (self.theta + (1 - self.theta) * math.exp(-self.gamma * share))

    def kept(self, at: Moment) -> dict[str, np.ndarray]:
        """[depth] of each stream, whether the layer runs."""
        drawn = _drawn(self.run.seed.data, at.step // BLOCK, max(self.depths.values()))[at.step % BLOCK]
        p = self.most(at.share)
        return {name: drawn[:depth] >= p * np.arange(1, depth + 1) / depth for name, depth in self.depths.items()}

    def active(self, at: Moment) -> Active:
        kept = self.kept(at)
        inputs = kept.get("inputs", kept["targets"])
        return Active(int(kept["targets"].sum()), int(inputs[:-1].sum()), bool(inputs[-1]))

    def operations(self, at: Moment) -> tuple[Operation, ...]:
        return self.plain(at, self.active(at)) if self.theta < 1 else self.plain(at)

    def every(self) -> Iterator[tuple[int, Operation]]:
        yield from super().every()
        depths = tuple(self.depths.values())
        alike = len(set(depths)) == 1  # then both streams skip the same layers
        pairs = itertools.product(range(depths[0] + 1), range(depths[-1] + 1))
        counts = [(inputs, targets) for inputs, targets in pairs if inputs == targets or not alike]
        for form, (inputs, targets) in itertools.product(range(len(forms(self.run.objective))), counts):
            if (inputs, targets) != (depths[0], depths[-1]):
                yield 0, Operation("train", self.run.batch, form, Active(targets, inputs, False))

    def feed(self, at: Moment) -> dict[str, np.ndarray]:
        return {name: kept.astype(np.float32) for name, kept in self.kept(at).items()} if self.theta < 1 else {}

    def inside(self, stage: int) -> Inside:
        if self.theta == 1:
            return super().inside(stage)
        return Dropped(examples=self.run.batch, fed=tuple((name, (depth,)) for name, depth in self.depths.items()))


@lru_cache(maxsize=8)
def _drawn(seed: int, block: int, numbers: int) -> np.ndarray:
    """[BLOCK, numbers], uniform in [0, 1)."""
    return draws(seed, PLACE + block * BLOCK, BLOCK, numbers)


@dataclass(frozen=True)
class Dropped(Inside):
    def step(self, tools: Tools, state: dict[str, Any], batch: Batch, fed: dict[str, Any]) -> Any:
        return tools.plain(state, batch, {name: kept > 0 for name, kept in fed.items()})
