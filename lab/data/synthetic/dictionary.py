"""Words and a dictionary for them: a task on which bidirectional inputs pay, and its mirror image, on which they can not.

Inputs: T words a_1 .. a_T, each one of V keys, uniform; and a dictionary of V entries in a random order, each ONE token that
holds a key and its value, one of V' and uniform. Targets: y_t = value(a_t). `late_dictionary` has the words first,
`early_dictionary` the dictionary first. The optimum of both is 0 on targets. Which structures can reach it?

1. One input layer, bidirectional, and one target layer reach it in both tasks: each word looks its own entry up, and target
   t reads the memory of word t, which lies at a fixed distance. With `early_dictionary` causal inputs do the same, as a word
   sees the dictionary: there bidirectional inputs can not lower the optimum, in any structure and at any depth. (Where
   memory=same and there is one layer, the dial has no effect at all: lab.structure.)

2. In `late_dictionary` the memory of word t under causal inputs is a function of a_1 .. a_t. A model that predicts y_t from
   that memory and all earlier targets, however deep its input stack is, knows y_t where a_t came before, and else nothing:
   it loses `aligned_floor` = ln V' * mean over t of (1 - 1/V)^(t-1), exactly.

3. What else can ONE target layer read (memory=final, any kind of cross-attention and stacks)? Its query at target t is
   made of earlier targets and the place: it does not know a_t, and reads the dictionary blindly. If what it so reads is
   worth b bits and does not depend on a_t, then, values being independent, the bits are shared out over the V entries (of
   keys that no earlier word had), of which a_t is a random one: at least `blind_floor` = ln V' * (1 - b / (V log2 V')) is
   lost on such a word.

   The condition is a real one. With causal inputs entry j still sees all words and can note at WHICH PLACES its key is,
   so that target t finds it by its place. That takes T distinguishable places in every entry, where a bidirectional input
   stream takes one value in every word. So bidirectional inputs are needed where the width is too small for that; where
   it is not they help by what training makes of them, which is measured (sweeps/studies/dictionary.py: 0.000 nats with
   bidirectional inputs, 1.057 with causal ones, at a width of 32 and one layer) and no theorem.

4. Not so deeper: two target layers reach 0 with causal inputs too, the first reads word t, the second looks it up. That is
   every structure with memory=same from two layers on (decoder_only and prefix_lm have one optimum on both tasks), and
   memory=final from two target layers on.

The communication argument of 3 is that of Peng et al. 2024 (arXiv:2402.08164) for the composition of functions.

Letters: B examples, S inputs, T words and targets, V keys, V' values.
"""

import numpy as np
from jaxtyping import Float, Int

from lab.data.synthetic import draws
from lab.data.synthetic.task import DOCUMENTS, FIRST, Task, check_documents, check_number, examples, known

VALUES, ENTRIES = 64, 96  # the first ids of values and entries; words begin at FIRST
MOST_ENTRIES = 256 - ENTRIES


def late_dictionary(*, words: int = 16, keys: int = 16, values: int = 8, documents: int = DOCUMENTS) -> Task:
    """Words, then the dictionary: bidirectional inputs help where there is one target layer and memory=final."""
    return _task("late_dictionary", words, keys, values, documents, late=True)


def early_dictionary(*, words: int = 16, keys: int = 16, values: int = 8, documents: int = DOCUMENTS) -> Task:
    """The dictionary, then words: bidirectional inputs can not lower the optimum."""
    return _task("early_dictionary", words, keys, values, documents, late=False)


def aligned_floor(words: int, keys: int, values: int) -> float:
    """Nats per target of the best predictor of `late_dictionary` that sees, for target t, words 1 .. t and targets before
    t."""
    return float(np.log(values) * np.mean((1 - 1 / keys) ** np.arange(words)))


def blind_floor(keys: int, values: int, bits: float) -> float:
    """Nats that must be lost on a word's value, whatever `bits` bits were kept of the dictionary before it was known which
    word it is."""
    return float(np.log(values) * max(0.0, 1 - bits / (keys * np.log2(values))))


def _task(name: str, words: int, keys: int, values: int, documents: int, *, late: bool) -> Task:
    check_number(name, "words", words, 1, 1024)
    check_number(name, "keys", keys, 2, 32)
    check_number(name, "values", values, 2, 32)
    check_documents(name, documents)
    if keys * values > MOST_ENTRIES:
        raise ValueError(
            f"corpus {name!r}: keys = {keys} and values = {values} make {keys * values} entries, each an id of its own: use "
            f"settings with at most {MOST_ENTRIES}, such as keys=16,values=8"
        )
    S = words + keys
    said, listed = (slice(0, words), slice(words, S)) if late else (slice(keys, S), slice(0, keys))

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        words_BT, keys_BV = draws.below(rng, keys, (rows, words)), draws.orders(rng, rows, keys)
        value_BV = draws.below(rng, values, (rows, keys))  # of key 0, 1, ..
        tokens = np.empty((rows, S + words), np.int64)
        tokens[:, said] = FIRST + words_BT
        tokens[:, listed] = ENTRIES + keys_BV * values + np.take_along_axis(value_BV, keys_BV, axis=1)
        tokens[:, S:] = VALUES + np.take_along_axis(value_BV, words_BT, axis=1)
        return tokens

    def optimum(tokens_Bn: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        tokens_Bn = np.asarray(tokens_Bn, np.int64)
        words_BT, entries_BV = tokens_Bn[:, said] - FIRST, tokens_Bn[:, listed] - ENTRIES
        keys_BV = entries_BV // values
        nats_Bn = np.empty(tokens_Bn.shape)
        nats_Bn[:, said] = np.where((words_BT >= 0) & (words_BT < keys), np.log(keys), np.inf)
        for place in range(keys):
            key_B1 = keys_BV[:, place, None]
            new_B = ~(keys_BV[:, :place] == key_B1).any(axis=1) & (key_B1[:, 0] >= 0) & (key_B1[:, 0] < keys)
            nats_Bn[:, listed.start + place] = np.where(new_B, np.log(keys - place) + np.log(values), np.inf)
        entry_BT1 = (words_BT * values + tokens_Bn[:, S:] - VALUES)[:, :, None]
        value_BT = tokens_Bn[:, S:] - VALUES
        inside_BT = (value_BT >= 0) & (value_BT < values)
        nats_Bn[:, S:] = known(inside_BT & (entry_BT1 == entries_BV[:, None, :]).any(axis=2))
        return nats_Bn

    def entropies(n: int) -> Float[np.ndarray, "n"]:
        found = np.zeros(n)
        found[said] = np.log(keys)
        found[listed] = np.log(np.arange(keys, 0, -1)) + np.log(values)
        return found

    read = examples(draw, n=S + words, seed=71, documents=documents)
    return Task(name=name, S=S, T=words, read=read, optimum=optimum, entropies=entropies)
