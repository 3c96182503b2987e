"""Looking up what the context says: once (associative recall), and by a chain of lookups (k-hop induction).

Letters: B examples, S inputs, T targets, P pairs.
"""

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import (
    DOCUMENTS,
    FIRST,
    LETTERS,
    MOST_LETTERS,
    Task,
    check_documents,
    check_number,
    examples,
    known,
)

NOTHING = 32  # the answer where a chain of lookups ends early


def associative_recall(*, pairs: int = 8, keys: int = 32, values: int = 32, documents: int = DOCUMENTS) -> Task:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927). Inputs: P pairs of different keys and their
    values; targets: each key once more, in a random order, and after it its value. Optimum: 0 on values, and on queries
    the ln of how many keys are left, in all ln(P!) / 2P per target."""
    check_number("associative_recall", "keys", keys, 2, 64)
    check_number("associative_recall", "pairs", pairs, 1, keys)
    check_number("associative_recall", "values", values, 2, MOST_LETTERS)
    check_documents("associative_recall", documents)

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        keys_BP, values_BP = draws.orders(rng, rows, keys)[:, :pairs], draws.below(rng, values, (rows, pairs))
        said_BP2 = np.stack([FIRST + keys_BP, LETTERS + values_BP], axis=2)
        asked_BP = draws.orders(rng, rows, pairs)
        asked_BP2 = np.take_along_axis(said_BP2, asked_BP[:, :, None], axis=1)
        return np.concatenate([said_BP2, asked_BP2], axis=1).reshape(rows, -1)

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        spoken_Bm2 = np.asarray(tokens_Bn, np.int64).reshape(len(tokens_Bn), 2 * pairs, 2)
        keys_Bm, values_Bm = spoken_Bm2[:, :, 0] - FIRST, spoken_Bm2[:, :, 1] - LETTERS
        nats_Bm2 = np.full(spoken_Bm2.shape, np.inf)
        for place in range(2 * pairs):
            key_B1, value_B = keys_Bm[:, place, None], values_Bm[:, place]
            first = 0 if place < pairs else pairs
            new_B = ~(keys_Bm[:, first:place] == key_B1).any(axis=1)
            if place < pairs:
                can_B = new_B & (key_B1[:, 0] >= 0) & (key_B1[:, 0] < keys)
                nats_Bm2[:, place, 0] = np.where(can_B, np.log(keys - place), np.inf)
                nats_Bm2[:, place, 1] = np.where((value_B >= 0) & (value_B < values), np.log(values), np.inf)
            else:
                same_BP = keys_Bm[:, :pairs] == key_B1
                nats_Bm2[:, place, 0] = np.where(new_B & same_BP.any(axis=1), np.log(2 * pairs - place), np.inf)
                nats_Bm2[:, place, 1] = known((same_BP & (values_Bm[:, :pairs] == value_B[:, None])).any(axis=1))
        return nats_Bm2.reshape(len(tokens_Bn), -1)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        said = [[np.log(keys - place), np.log(values)] for place in range(pairs)]
        asked = [[np.log(left), 0.0] for left in range(pairs, 0, -1)]
        return np.array([*said, *asked]).reshape(-1)

    read = examples(draw, n=4 * pairs, seed=61, documents=documents)
    S = 2 * pairs
    return Task(name="associative_recall", S=S, T=S, read=read, optimum=optimum, entropies=entropies)


def k_hop(*, hops: int = 2, symbols: int = 4, length: int = 32, answers: int = 16, documents: int = DOCUMENTS) -> Task:
    """k-hop induction (Sanford et al. 2024, arXiv:2402.09268). Inputs: uniform letters X; targets: hop_k at the
    last `answers` places. One hop from place i leads to the place just after the latest earlier X_i; hop_k is the letter
    there after k of them, or NOTHING. A causal transformer needs about log2 k layers. Optimum: 0."""
    check_number("k_hop", "hops", hops, 1, 64)
    check_number("k_hop", "symbols", symbols, 2, MOST_LETTERS)
    check_number("k_hop", "length", length, 2, 1024)
    check_number("k_hop", "answers", answers, 1, length)
    check_documents("k_hop", documents)

    def answer(letters_BS: Int[np.ndarray, "B S"]) -> Int[np.ndarray, "B T"]:
        """Tokens."""
        rows = np.arange(len(letters_BS))
        after = np.full((len(letters_BS), symbols), -1)  # the place just after each letter's latest
        hop_BS = np.empty_like(letters_BS)
        for place in range(length):
            hop_BS[:, place] = after[rows, letters_BS[:, place]]
            after[rows, letters_BS[:, place]] = place + 1
        at_BT = np.broadcast_to(np.arange(length - answers, length), (len(letters_BS), answers))
        for _ in range(hops):
            at_BT = np.where(at_BT < 0, -1, np.take_along_axis(hop_BS, np.maximum(at_BT, 0), axis=1))
        found_BT = np.take_along_axis(letters_BS, np.maximum(at_BT, 0), axis=1)
        return np.where(at_BT < 0, NOTHING, LETTERS + found_BT)

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        letters_BS = draws.below(rng, symbols, (rows, length))
        return np.concatenate([LETTERS + letters_BS, answer(letters_BS)], axis=1)

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        letters_BS = np.asarray(tokens_Bn[:, :length], np.int64) - LETTERS
        inside_BS = (letters_BS >= 0) & (letters_BS < symbols)
        right_BT = tokens_Bn[:, length:] == answer(np.where(inside_BS, letters_BS, 0))
        return np.concatenate([np.where(inside_BS, np.log(symbols), np.inf), known(right_BT)], axis=1)

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        return np.concatenate([np.full(length, np.log(symbols)), np.zeros(answers)])

    read = examples(draw, n=length + answers, seed=62, documents=documents)
    return Task(name="k_hop", S=length, T=answers, read=read, optimum=optimum, entropies=entropies)
