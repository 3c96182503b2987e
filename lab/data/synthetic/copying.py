"""Targets that repeat, reverse or sort their inputs: independent uniform letters, then as many targets.

All but the noisy copy are determined by their inputs: the optimum is 0 on targets. A string of this length can be copied
by a transformer of two layers (Jelassi et al. 2024, arXiv:2402.01032), reversed and sorted likewise (RASP; Weiss et al.
2021, arXiv:2106.06981).

Letters: B examples, S inputs and as many targets.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import (
    DOCUMENTS,
    LETTERS,
    MOST_LETTERS,
    Task,
    check_documents,
    check_number,
    examples,
    known,
)


def copy(*, symbols: int = 26, length: int = 16, documents: int = DOCUMENTS) -> Task:
    """The inputs again."""
    return _task("copy", lambda inputs_BS: inputs_BS, symbols, length, documents, seed=51)


def reverse(*, symbols: int = 26, length: int = 16, documents: int = DOCUMENTS) -> Task:
    """The inputs from the last to the first: with causal inputs nearly every target's letter is far away in time."""
    return _task("reverse", lambda inputs_BS: inputs_BS[:, ::-1], symbols, length, documents, seed=52)


def sort(*, symbols: int = 26, length: int = 16, documents: int = DOCUMENTS) -> Task:
    """The inputs in alphabetical order, repeated ones repeated."""
    return _task("sort", lambda inputs_BS: np.sort(inputs_BS, axis=1), symbols, length, documents, seed=53)


def noisy_copy(*, symbols: int = 26, length: int = 16, rate: float = 0.1, documents: int = DOCUMENTS) -> Task:
    """The inputs again, each replaced with probability `rate` by a uniform letter (perhaps the same). Optimum on a target:
    H(e) = -(p ln p + (V - 1) q ln q) for e = rate, q = e / V, p = 1 - e + q."""
    check_number("noisy_copy", "rate", rate, 0.0, 1.0)
    return _task("noisy_copy", lambda inputs_BS: inputs_BS, symbols, length, documents, seed=54, rate=rate)


def _task(
    name: str,
    answer: Callable[[Int[np.ndarray, "B S"]], Int[np.ndarray, "B S"]],
    symbols: int,
    length: int,
    documents: int,
    *,
    seed: int,
    rate: float = 0.0,
) -> Task:
    check_number(name, "symbols", symbols, 2, MOST_LETTERS)
    check_number(name, "length", length, 1, 1024)
    check_documents(name, documents)
    # Of a letter that is wrong, and of the right one; the rate as whole millionths, as it is drawn.
    replaced = round(rate * 1e6) / 1e6
    wrong = replaced / symbols
    right = 1 - replaced + wrong

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        inputs_BS = draws.below(rng, symbols, (rows, length))
        targets_BS = answer(inputs_BS)
        if replaced:
            hit_BS = draws.below(rng, 1_000_000, inputs_BS.shape) < round(rate * 1e6)
            targets_BS = np.where(hit_BS, draws.below(rng, symbols, inputs_BS.shape), targets_BS)
        return LETTERS + np.concatenate([inputs_BS, targets_BS], axis=1)

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        letters_Bn = np.asarray(tokens_Bn, np.int64) - LETTERS
        inputs_BS, targets_BS = letters_Bn[:, :length], letters_Bn[:, length:]
        correct_BS, inside_Bn = targets_BS == answer(inputs_BS), (letters_Bn >= 0) & (letters_Bn < symbols)
        nats_BS = np.where(correct_BS, -np.log(right), -np.log(wrong)) if replaced else known(correct_BS)
        nats_Bn = np.concatenate([np.full(inputs_BS.shape, np.log(symbols)), nats_BS], axis=1)
        return np.where(inside_Bn, nats_Bn, np.inf)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        noise = draws.entropy(np.array([right] + [wrong] * (symbols - 1)))
        return np.concatenate([np.full(length, np.log(symbols)), np.full(length, noise)])

    read = examples(draw, n=2 * length, seed=seed, documents=documents)
    return Task(name=name, S=length, T=length, read=read, optimum=optimum, entropies=entropies)
