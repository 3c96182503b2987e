"""Token sources whose optimum is known. Fixed forever: only PCG64's uniform floats and exact arithmetic enter."""

import functools

import numpy as np
from jaxtyping import Float, Int, UInt8

DOCUMENT = 16_384  # tokens; examples are not longer
STATES = 64
FIRST = 32  # the chain's states are the printable bytes 32 .. 95


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
    weights = _weights()
    return weights / weights.sum(axis=1, keepdims=True)


@functools.cache
def entropy_rate() -> float:
    """Nats a token of `markov_documents`, in the chain's stationary distribution: no model's loss is below it."""
    transitions = markov_transitions()
    stationary = np.linalg.matrix_power(transitions, 1024)[0]
    return float(-(stationary @ (transitions * np.log(transitions)).sum(axis=1)))


def _weights() -> Int[np.ndarray, "states states"]:
    """Whole numbers, so that their sums are exact; the 16th power makes a few next states likely in every row."""
    weights = np.random.Generator(np.random.PCG64(2)).random((STATES, STATES))
    for _ in range(4):
        weights = weights * weights
    return (weights * 2**20).astype(np.int64) + 1
