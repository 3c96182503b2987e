"""Hidden Markov sources: what is seen says only in part which state the source is in, so that all of the past counts.

The optimum for a window is that of a finite context: the forward algorithm (Rabiner 1989, section III.A) from the
stationary distribution of states. The entropy h_i of a token given the i before it falls to the entropy rate, and
H(x_i | x_<i, first state) rises to it (Cover and Thomas, theorem 4.5.1): between the two it lies.

Letters: s and r states, x symbols, B examples, n tokens.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import DOCUMENT, DOCUMENTS, FIRST, Task, check_documents, check_number

CONTEXTS = 2**18  # contexts that are enumerated for the entropies
BLOCK = 256  # documents that are drawn side by side
BURN_IN = 256  # tokens before a document, by which its first state is stationary


def mess3(*, x: float = 0.05, a: float = 0.85, documents: int = DOCUMENTS) -> Task:
    """Three states in a ring, three symbols: a state shows its own symbol with probability `a` (else each other one alike)
    and is left with probability 2x (Marzen and Crutchfield 2017, arXiv:1702.08565; x and a of Shai et al. 2024,
    arXiv:2405.15943). The optimal beliefs are a fractal; no finite number of them is enough.
    """
    check_number("mess3", "x", x, 1e-4, 0.5)
    check_number("mess3", "a", a, 1e-4, 1.0)
    stay, b = 1 - 2 * x, (1 - a) / 2
    shows = [[a if symbol == state else b for symbol in range(3)] for state in range(3)]
    moves = [[stay if state == to else x for to in range(3)] for state in range(3)]
    # Token and next state together; the token is that of the state which is moved to.
    joint = np.array([[[moves[s][r] * shows[r][x_] for r in range(3)] for x_ in range(3)] for s in range(3)])
    return _source("mess3", (joint * draws.SCALE).astype(np.int64), 11, documents)


def hidden_markov(*, states: int = 4, symbols: int = 4, documents: int = DOCUMENTS) -> Task:
    """Random transitions between `states`, and random symbols that each shows before it is left."""
    check_number("hidden_markov", "states", states, 2, 16)
    check_number("hidden_markov", "symbols", symbols, 2, 16)
    moves_sr = draws.skewed(12, states, states, squarings=2)
    shows_sx = draws.skewed(13, states, symbols, squarings=3)
    return _source("hidden_markov", shows_sx[:, :, None] * moves_sr[:, None, :], 14, documents)


def _source(name: str, weights_sxr: Int[np.ndarray, "s x r"], seed: int, documents: int) -> Task:
    """From whole weights of (token x, next state r) in each state s."""
    check_documents(name, documents)
    states, symbols, _ = weights_sxr.shape
    joint_sxr = draws.shares(weights_sxr.reshape(states, -1)).reshape(weights_sxr.shape)
    stationary_s = np.linalg.matrix_power(joint_sxr.sum(axis=1), 2**16)[0]

    def read() -> Iterator[np.ndarray]:
        cumulative = np.cumsum(weights_sxr.reshape(states, -1), axis=1)
        for block in range(-(-documents // BLOCK)):
            rng = draws.generator(seed, block)
            state = draws.below(rng, states, BLOCK)
            tokens = np.empty((BURN_IN + DOCUMENT, BLOCK), np.uint8)
            for place in range(len(tokens)):
                symbol, state = np.divmod(draws.choose_in_rows(rng, cumulative, state), states)
                tokens[place] = FIRST + symbol
            yield from np.ascontiguousarray(tokens[BURN_IN:].T)[: documents - block * BLOCK]

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        x_Bn = np.asarray(tokens_Bn, np.int64) - FIRST
        inside_Bn = (x_Bn >= 0) & (x_Bn < symbols)
        nats_Bn = np.empty(x_Bn.shape)
        belief_Bs = np.broadcast_to(stationary_s, (len(x_Bn), states))
        for place in range(x_Bn.shape[1]):
            moved_Bsr = joint_sxr[:, np.where(inside_Bn[:, place], x_Bn[:, place], 0)].transpose(1, 0, 2)
            belief_Bs = np.einsum("bs,bsr->br", belief_Bs, moved_Bsr)
            likelihood_B = belief_Bs.sum(axis=1)
            with np.errstate(divide="ignore"):
                nats_Bn[:, place] = np.where(inside_Bn[:, place], -np.log(likelihood_B), np.inf)
            belief_Bs = belief_Bs / np.maximum(likelihood_B, 1e-300)[:, None]
        return nats_Bn

    deepest = max(2, int(np.log(CONTEXTS) / np.log(symbols)))

    @functools.cache
    def bounds() -> tuple[Float[np.ndarray, "deepest"], float]:
        """h_0 .. h_(deepest-1), and a lower bound of all that follow."""
        above = _entropies(joint_sxr, stationary_s[None], deepest)
        return above, float(_entropies(joint_sxr, np.diag(stationary_s), deepest)[-1])

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.concatenate([bounds()[0][:n], np.full(max(0, n - deepest), bounds()[0][-1])])

    error = float(bounds()[0][-1] - bounds()[1])
    return Task(name=name, S=32, T=32, stream=True, read=read, optimum=optimum, entropies=entropies, error=error)


def _entropies(joint_sxr: np.ndarray, starts_ks: Float[np.ndarray, "k s"], depth: int) -> Float[np.ndarray, "depth"]:
    """H(x_i | x_<i, k), i < depth, by enumeration of all contexts: each row k of `starts_ks` is p(k, first state)."""
    forward_kcs = starts_ks[:, None]  # p(k, context c, state s)
    entropies, before = [], draws.entropy(forward_kcs.sum(axis=2))
    for _ in range(depth):
        forward_kcs = np.einsum("kcs,sxr->kcxr", forward_kcs, joint_sxr)
        forward_kcs = forward_kcs.reshape(len(starts_ks), -1, joint_sxr.shape[2])
        after = draws.entropy(forward_kcs.sum(axis=2))
        entropies.append(after - before)
        before = after
    return np.array(entropies)
