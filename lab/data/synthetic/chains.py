"""Sources without and with one token of memory. Their bytes are the same for ever."""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8

from lab.data.synthetic import draws
from lab.data.synthetic.task import Task

DOCUMENT = 16_384  # tokens; examples are not longer
STATES = 64
FIRST = 32  # the chain's states are the printable bytes 32 .. 95


def uniform() -> Task:
    """8 MB of independent uniform bytes. Optimum: ln 256 = 5.545; a loss below it on fresh ones shows a leak."""
    return Task(
        name="uniform",
        S=64,
        T=64,
        stream=True,
        read=lambda: iter(uniform_documents()),
        optimum=lambda tokens_Bn: np.full(np.shape(tokens_Bn), np.log(256)),
        entropies=lambda n: np.full(n, np.log(256)),
    )


def markov() -> Task:
    """4 MB of one order-1 Markov chain over 64 bytes. Optimum: its entropy rate, 2.3241 nats (Cover and Thomas, Elements of
    Information Theory, theorem 4.2.4).

    Bidirectional inputs can not help on it, at any depth and in any structure. Given x_S, a target depends on no other
    input (the Markov property), and given y_{t-1} on no input at all; a causal stream sees x_S at its own place, so that
    the optimum is reached with causal inputs, and nothing is below the optimum.
    """

    def read() -> Iterator[np.ndarray]:
        return iter(markov_documents())

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        # A window's first token has the stationary distribution. (A document's first one is uniform: one in 16,384.)
        states_Bn = np.asarray(tokens_Bn, np.int64) - FIRST
        inside_Bn = (states_Bn >= 0) & (states_Bn < STATES)
        states_Bn = np.where(inside_Bn, states_Bn, 0)
        first_B1 = -np.log(stationary())[states_Bn[:, :1]]
        rest_Bm = -np.log(markov_transitions())[states_Bn[:, :-1], states_Bn[:, 1:]]
        return np.where(inside_Bn, np.concatenate([first_B1, rest_Bm], axis=1), np.inf)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.array([draws.entropy(stationary())] + [entropy_rate()] * (n - 1))

    return Task(name="markov", S=64, T=64, stream=True, read=read, optimum=optimum, entropies=entropies)


def uniform_documents(documents: int = 512) -> UInt8[np.ndarray, "documents tokens"]:
    """Independent uniform bytes: no model that sees no target predicts them below ln 256 = 5.545 nats."""
    rng = np.random.Generator(np.random.PCG64(1))
    return (rng.random((documents, DOCUMENT)) * 256).astype(np.uint8)


def markov_documents(documents: int = 256) -> UInt8[np.ndarray, "documents tokens"]:
    """Documents of one order-1 Markov chain (`_weights`), each from a uniform first state. Optimum: `entropy_rate`."""
    rng = np.random.Generator(np.random.PCG64(3))
    cumulative = np.cumsum(_weights(), axis=1)
    totals = cumulative[:, -1]
    state = (rng.random(documents) * STATES).astype(np.int64)
    chain = np.empty((DOCUMENT, documents), np.uint8)
    for place in range(DOCUMENT):
        chain[place] = FIRST + state
        drawn = (rng.random(documents) * totals[state]).astype(np.int64)
        state = (cumulative[state] <= drawn[:, None]).sum(axis=1)
    return np.ascontiguousarray(chain.T)


def markov_transitions() -> Float[np.ndarray, "states states"]:
    """Probability of the next state (column) given the state (row)."""
    return draws.shares(_weights())


@functools.cache
def stationary() -> Float[np.ndarray, "states"]:
    """How often the chain is in each state in the long run."""
    return np.linalg.matrix_power(markov_transitions(), 1024)[0]


@functools.cache
def entropy_rate() -> float:
    """Nats a token of `markov_documents`, in the chain's stationary distribution: no model's loss is below it."""
    transitions = markov_transitions()
    return float(-(stationary() @ (transitions * np.log(transitions)).sum(axis=1)))


def _weights() -> Int[np.ndarray, "states states"]:
    """Whole numbers, so that their sums are exact; the 16th power makes a few next states likely in every row."""
    return draws.skewed(2, STATES, STATES)
