"""This lab's trainer: the compiled program that `lab train` runs."""

import jax
import numpy as np

from lab import hardware
from lab.compiled import compiled
from lab.data.tokenizers import TOKENIZERS
from lab.forms import forms
from lab.objectives import build
from lab.optimizers import hyperparameters
from lab.program import program
from peers.case import RATE, Case, V


class Trainer:
    def __init__(self, case: Case):
        run = case.run
        self.execution = hardware.choose(run, V, jax.default_backend())
        self.built = compiled(program(run, self.execution))
        self.k = self.execution.steps_per_dispatch
        self.state = self.built.init(0)
        tokenizer = TOKENIZERS["bytes"]
        made = [build(forms(run.objective)[0], tokens, tokenizer, seed=0, first=0) for tokens in case.tokens]
        count = len(made)
        self.batches = [
            jax.tree.map(lambda *arrays: np.stack(arrays), *(made[(first + i) % count] for i in range(self.k)))
            for first in range(count)
        ]
        self.rates = np.full(self.k, RATE, np.float32)
        self.hyper = hyperparameters(run.optimizer, steps=self.k, seed=0)
        self.taken = 0

    def steps(self, count: int):
        """Takes `count` steps and returns the last losses."""
        losses = None
        while count > 0:
            now = min(count, self.k)
            batch = self.batches[self.taken % len(self.batches)]
            self.state, losses, _ = self.built.advance(self.state, batch, self.hyper, self.rates, np.int32(now))
            self.taken, count = self.taken + now, count - now
            last = now
        return np.asarray(losses)[last - 1]
