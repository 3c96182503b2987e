"""What is trained: the shape, the tokens, the initial parameters. Free of any framework."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lab.spec import Budget, Data, Objective, Optimizer, Run, Shape
from lab.structure import STRUCTURES
from sweeps.ladder import shape

V, ROPE_BASE, NORM_EPS = 260, 10_000.0, 1e-6
RATE, BETA1, BETA2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
BATCHES = 8  # distinct ones, taken in turn


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder-only transformer with loss on all tokens over S + T positions (S first, then T targets)."""

    D: int
    N: int  # heads
    L: int
    S: int
    T: int
    B: int
    precision: str = "f32"
    structure: str = "decoder_only"
    loss: str = "all"

    @property
    def shape(self) -> Shape:
        return replace(shape(self.D, self.L), N=self.N, K=self.N, H=self.D // self.N)

    @cached_property
    def run(self) -> Run:
        return Run(
            structure=STRUCTURES[self.structure],
            shape=self.shape,
            objective=Objective(S=self.S, T=self.T, loss=self.loss),
            data=Data(corpus="markov", manifest="0" * 64, train_tokens=10**9),
            optimizer=Optimizer(learning_rate=RATE),
            budget=Budget(unit="steps", amount=1000),
            batch=self.B,
            precision=self.precision,
        )

    @property
    def length(self) -> int:
        return self.S + self.T

    @cached_property
    def tokens(self) -> np.ndarray:
        """(BATCHES, B, S+T) bytes: noise with a learnable repetition."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 250, (BATCHES, self.B, self.length))
        tokens[..., 1::2] = (tokens[..., 0::2] + 1) % 250
        return tokens.astype(np.int32)

    @cached_property
    def sequences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and weights of one causal sequence of S+T positions: [x_1 .. x_S, SEP, y_1 .. y_{T-1}]."""
        from lab.data.tokenizers import TOKENIZERS

        x, y = self.tokens[..., : self.S], self.tokens[..., self.S :]
        separator = np.full((*x.shape[:2], 1), TOKENIZERS["bytes"].sep, np.int32)
        inputs = np.concatenate([x, separator, y[..., :-1]], axis=2)
        labels = np.concatenate([x[..., 1:], separator, y], axis=2)
        weights = np.ones(labels.shape, np.float32)
        weights[..., self.S - 1] = 0  # the place that would predict SEP
        return inputs, labels, weights

    @cached_property
    def parameters(self) -> dict:
        from lab.transformer import Transformer

        run = self.run
        return Transformer(structure=run.structure, shape=run.shape, options=run.options, V=V, sep=256, pad=258).init(0)
