"""A probabilistic context-free grammar whose sentences can all be enumerated.

A node of one token shows a terminal; a node of more splits into two: the place is uniform, the pair of kinds is drawn by
the node's kind. So each kind and length has a distribution over ALL strings of that length, and one sum over splits and
pairs gives it from shorter ones: the inside algorithm (Lari and Young 1990) for every string at once. Marginals of
prefixes then are sums of neighbouring entries, and the next token's distribution is a ratio of two of them, exactly.
In the manner of Allen-Zhu and Li 2023 (arXiv:2305.13673, where the optimum is by the same dynamic program), and small.

Letters: a, b, c kinds of nodes, x terminals, l tokens of a node, w strings of a length in the order of their digits.
"""

import functools

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import DOCUMENTS, FIRST, Task, check_documents, check_number, examples

KINDS = 5
STRINGS = 2**18


def grammar(*, terminals: int = 4, length: int = 8, documents: int = DOCUMENTS) -> Task:
    """Sentences of exactly `length` tokens. Optimum: exact for every sentence and every split in S and T."""
    check_number("grammar", "terminals", terminals, 2, 16)
    check_number("grammar", "length", length, 2, 18)
    check_documents("grammar", documents)
    if terminals**length > STRINGS:
        raise ValueError(
            f"corpus 'grammar': terminals = {terminals} and length = {length} make {terminals**length:,} sentences, and all "
            f"of them are enumerated: use settings with at most {STRINGS:,}, such as terminals=4,length=9"
        )
    pairs_cumulative = np.cumsum(draws.skewed(21, KINDS, KINDS**2), axis=1)
    shows_cumulative = np.cumsum(draws.skewed(22, KINDS, terminals), axis=1)

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        tokens = np.empty((rows, length), np.int64)
        # Nodes of all sentences that are still to be split: sentence, first place, tokens, kind.
        nodes = np.stack([np.arange(rows), np.zeros(rows), np.full(rows, length), np.zeros(rows)]).astype(np.int64)
        while nodes.size:
            row, first, _, kind = nodes[:, nodes[2] == 1]
            tokens[row, first] = draws.choose_in_rows(rng, shows_cumulative, kind)
            row, first, size, kind = nodes[:, nodes[2] > 1]
            left = 1 + draws.below(rng, size - 1, len(size))
            b, c = np.divmod(draws.choose_in_rows(rng, pairs_cumulative, kind), KINDS)
            nodes = np.concatenate([[row, first, left, b], [row, first + left, size - left, c]], axis=1)
        return FIRST + tokens

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        x_Bn = np.asarray(tokens_Bn, np.int64) - FIRST
        inside_Bn = np.logical_and.accumulate((x_Bn >= 0) & (x_Bn < terminals), axis=1)
        string_B, before_B, nats_Bn = np.zeros(len(x_Bn), np.int64), np.ones(len(x_Bn)), np.empty(x_Bn.shape)
        for place, prefixes_w in enumerate(_prefixes(terminals, length)):
            string_B = string_B * terminals + np.where(inside_Bn[:, place], x_Bn[:, place], 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                nats_Bn[:, place] = np.log(before_B) - np.log(prefixes_w[string_B])
            before_B = prefixes_w[string_B]
        return np.where(inside_Bn, nats_Bn, np.inf)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.diff([0.0] + [draws.entropy(prefixes_w) for prefixes_w in _prefixes(terminals, length)])

    S = length // 2
    read = examples(draw, n=length, seed=23, documents=documents)
    return Task(name="grammar", S=S, T=length - S, read=read, optimum=optimum, entropies=entropies)


@functools.lru_cache(maxsize=8)
def sentences(terminals: int, length: int) -> Float[np.ndarray, "a w"]:
    """Probability of every string of `length` terminals under each kind of node."""
    if length == 1:
        return draws.shares(draws.skewed(22, KINDS, terminals))
    pairs_abc = draws.shares(draws.skewed(21, KINDS, KINDS**2)).reshape(KINDS, KINDS, KINDS)
    total_aw = np.zeros((KINDS, terminals**length))
    for left in range(1, length):
        right_abw = np.einsum("abc,cw->abw", pairs_abc, sentences(terminals, length - left))
        both = np.einsum("bv,abw->avw", sentences(terminals, left), right_abw, optimize=True)
        total_aw += both.reshape(KINDS, -1) / (length - 1)
    return total_aw


@functools.lru_cache(maxsize=8)
def _prefixes(terminals: int, length: int) -> list[Float[np.ndarray, "w"]]:
    """Probability that a sentence (its root is kind 0) begins so, for prefixes of 1 .. length tokens."""
    whole_w = sentences(terminals, length)[0]
    return [whole_w.reshape(terminals**place, -1).sum(axis=1) for place in range(1, length + 1)]
