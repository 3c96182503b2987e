"""Which tokens go in and which are predicted. An objective is one function and one line in `OBJECTIVES`.

Letters: B batch, n tokens of text in an example, S input length, T target length, P predicted positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lab.data.tokenizers import Tokenizer
from lab.spec import Objective

# BERT (Devlin et al. 2019): of the chosen tokens, 80% become MASK, 10% a random byte, 10% stay.
MASKED, RANDOM = 0.8, 0.1


class Batch(NamedTuple):
    """int32 arrays, numpy on the host and JAX in a program: what enters the input stream, what enters the target stream
    (masked_lm: the masked positions), and the labels of the P scored positions in the order of their prediction."""

    inputs: Any  # B S
    targets: Any  # B T
    labels: Any  # B P


def lm(objective: Objective, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """Text split in S inputs and T targets. The target stream enters as [SEP, y_1 .. y_{T-1}]: T scored positions."""
    S = objective.S
    inputs, labels = tokens_Bn[:, :S], tokens_Bn[:, S:]
    separator = np.full((len(tokens_Bn), 1), tokenizer.sep, np.int32)
    targets = np.concatenate([separator, labels[:, :-1]], axis=1)
    if objective.loss == "all":
        labels = tokens_Bn[:, 1:]  # x_2 .. x_S, then y_1 .. y_T
    return Batch(inputs, targets, labels)


def masked_lm(objective: Objective, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """T of the S tokens are chosen anew for each example of the stream, a function of (seed, place in the stream)."""
    inputs, chosen = tokens_Bn.copy(), np.empty((len(tokens_Bn), objective.T), np.int32)
    for row in range(len(tokens_Bn)):
        rng = np.random.Generator(np.random.PCG64([seed, first + row]))
        chosen[row] = np.sort(rng.permutation(objective.S)[: objective.T])
        fate = rng.random(objective.T)
        other = rng.integers(0, tokenizer.sep, objective.T)  # text tokens are the ids below SEP
        kept = tokens_Bn[row, chosen[row]]
        inputs[row, chosen[row]] = np.where(
            fate < MASKED, tokenizer.mask, np.where(fate < MASKED + RANDOM, other, kept)
        )
    return Batch(inputs, chosen, np.take_along_axis(tokens_Bn, chosen, axis=1))


OBJECTIVES: dict[str, Callable[..., Batch]] = {"lm": lm, "masked_lm": masked_lm}


def build(objective: Objective, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """The batch of examples `first`, `first + 1`, ... of the stream that `seed` orders."""
    return OBJECTIVES[objective.name](objective, tokens_Bn, tokenizer, seed=seed, first=first)


def predicted_positions(objective: Objective) -> int:
    """P: positions at which logits are computed."""
    return objective.T + (objective.S - 1 if objective.loss == "all" else 0)
