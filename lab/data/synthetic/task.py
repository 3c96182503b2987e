"""What a task is: tokens, and the truth about them.

Letters: B examples, n tokens of an example, S of them inputs, T targets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from lab.data.synthetic import draws

DOCUMENT = 4096  # tokens: as many whole examples as fit, and at least one
DOCUMENTS = 1024
# Ids: numbers and keys from FIRST on, letters and values from LETTERS on. All are below 256, so that bytes serve.
FIRST, LETTERS, MOST_LETTERS = 32, 97, 128

Optimum = Callable[[Int[np.ndarray, "B n"]], Float[np.ndarray, "B n"]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of tokens whose truth is known.

    A document holds whole examples of n = S + T tokens, one after the other, and nothing else: the windows that training
    and evaluation cut are the examples. (Were each a document, equal ones would be dropped as duplicates, and with them
    the frequencies of facts.) The objective `lm` with these S and T reads S inputs and scores T targets;
    any other split of the same n is an honest objective too, and `loss` knows its optimum. Where `stream` is true a
    document is one long text, every n is an example's length, and S and T are only a proposal.

    read: the documents, always the same ones, made as they are asked for.
    optimum: negative log-probability (nats) of each token given those before it in its example, under the true source;
        infinite for a token that can not be. Its mean over the targets of the very evaluation examples is what the
        source itself would lose on them: subtract it from a model's loss, and the examples' own luck is gone.
    entropies: n -> expectation of `optimum` at each of the n places. They are exact, or too high by at most `error`.
    """

    name: str
    S: int
    T: int
    stream: bool = False
    read: Callable[[], Iterator[UInt8[np.ndarray, "tokens"]]]
    optimum: Optimum
    entropies: Callable[[int], Float[np.ndarray, "n"]]
    error: float = 0.0

    @property
    def n(self) -> int:
        return self.S + self.T

    def loss(self, S: int | None = None, T: int | None = None) -> float:
        """Nats per target that no model goes below in expectation; S and T default to the task's own.

        Raises ValueError where S + T is not the length of an example.
        """
        S = self.S if S is None else S
        T = self.n - S if T is None else T
        if S < 0 or T < 1 or (self.n != S + T and not self.stream):
            raise ValueError(f"S = {S}, T = {T}: an example of {self.name} has {self.n} tokens: use S + T = {self.n}")
        return float(self.entropies(S + T)[S:].mean())


def examples(
    draw: Callable[[np.random.Generator, int], UInt8[np.ndarray, "rows n"]], *, n: int, seed: int, documents: int
) -> Callable[[], Iterator[UInt8[np.ndarray, "tokens"]]]:
    """`Task.read` of a task whose examples are independent: draw(rng, rows) gives that many. Document d has random numbers
    of its own, so that more documents are the same ones and further ones."""

    def read() -> Iterator[np.ndarray]:
        for number in range(documents):
            yield draw(draws.generator(seed, number), max(1, DOCUMENT // n)).astype(np.uint8).reshape(-1)

    return read


def known(correct: np.ndarray) -> np.ndarray:
    """Nats of tokens that are determined: 0 where they are right, infinite where not."""
    return np.where(correct, 0.0, np.inf)


def check_number(task: str, setting: str, value: float, low: float, high: float) -> None:
    """Raises ValueError where a setting of a task does not lie in [low, high]."""
    if not low <= value <= high:
        kind = "whole number" if isinstance(low, int) else "number"
        raise ValueError(f"corpus {task!r}: {setting} = {value!r}: use a {kind} in [{low:g}, {high:g}]")


def check_documents(task: str, documents: int) -> None:
    check_number(task, "documents", documents, 2, 1_000_000)
