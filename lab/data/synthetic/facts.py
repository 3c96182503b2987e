"""Independent facts whose frequencies are a power law: a loss whose asymptote AND exponents are known.

Michaud et al. 2023 (arXiv:2303.13506) suppose that a model learns such "quanta" one by one, the commonest first. Here a
quantum is the value of a key, key i having p_i ~ i^-(1 + a), and of a learner that does as they suppose all is known.
Let T tokens of a fact be scored, all of its key (1 .. d) and its value, one of V:

    E    = H(key) / T                             the key can not be foreseen, the value is determined by it
    L(n) = E + ln V / T * sum_{i > n} p_i         n commonest values stored:           ~ n^-a
    L(D) = E + ln V / T * sum_i p_i (1 - p_i)^D   all that D facts showed are stored:  ~ D^-(a / (1 + a))

A network need not learn so, and has the keys' own frequencies to learn besides; only E holds for every learner.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.ranks import Zipf, check_zipf
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

START = 10  # a line feed before each key, so that all of the key can be scored


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Which facts there are, and what a learner loses that knows some of them."""

    exponent: float = 0.5
    keys: int = 4096
    values: int = 16

    @functools.cached_property
    def zipf(self) -> Zipf:
        return Zipf(count=self.keys, exponent=self.exponent)

    @functools.cached_property
    def value_of(self) -> Int[np.ndarray, "keys"]:
        return draws.below(draws.generator(31), self.values, self.keys)

    @property
    def targets(self) -> int:
        """Tokens of a key and its value."""
        return self.zipf.digits + 1

    def E(self) -> float:
        return float(self.zipf.entropies().sum()) / self.targets

    def loss_with(self, stored: int | np.ndarray) -> Float[np.ndarray, "..."]:
        """Nats per target with the values of so many commonest keys stored, and the others' guessed."""
        return self.E() + np.log(self.values) / self.targets * self.zipf.tail(stored)

    def loss_after(self, seen: int | np.ndarray) -> Float[np.ndarray, "..."]:
        """Expected nats per target with the values of all keys stored that so many facts showed."""
        return self.E() + np.log(self.values) / self.targets * self.zipf.unseen(seen)


def zipf_facts(*, exponent: float = 0.5, keys: int = 4096, values: int = 16, documents: int = DOCUMENTS) -> Task:
    """One fact an example: START, the key's digits, its value. S = 1 scores key and value: E = H(key) / T; with all of
    the key as input (T = 1) the optimum is 0. One fact, so that no value can be copied from the context."""
    check_zipf("zipf_facts", "keys", keys, exponent)
    check_number("zipf_facts", "values", values, 2, MOST_LETTERS)
    check_documents("zipf_facts", documents)
    facts = Facts(exponent=exponent, keys=keys, values=values)
    zipf, value_of, n = facts.zipf, facts.value_of, 1 + facts.targets

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        keys_B = draws.choose(rng, zipf.weights, rows)
        start_B1, value_B1 = np.full((rows, 1), START), LETTERS + value_of[keys_B][:, None]
        return np.concatenate([start_B1, zipf.write(keys_B), value_B1], axis=1)

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        keys_B = zipf.read(tokens_Bn[:, 1:-1])
        right_B = (keys_B >= 0) & (tokens_Bn[:, -1] == LETTERS + value_of[keys_B])
        return np.concatenate(
            [known(tokens_Bn[:, :1] == START), zipf.nats(tokens_Bn[:, 1:-1]), known(right_B)[:, None]], axis=1
        )

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.concatenate([[0.0], zipf.entropies(), [0.0]])

    read = examples(draw, n=n, seed=32, documents=documents)
    return Task(name="zipf_facts", S=1, T=n - 1, read=read, optimum=optimum, entropies=entropies)
