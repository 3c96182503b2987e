"""Which tokens go in and which are predicted. An objective on text is one function and one line in `OBJECTIVES`.

An example's tokens are a function of (seed, place in the stream): nothing is drawn from a state.

Letters: B batch, n tokens of text in an example, S input length, T target length, P predicted positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lab.data.tokenizers import Tokenizer
from lab.forms import Form, Objective, noised

# BERT (Devlin et al. 2019): of the chosen tokens, 80% become MASK, 10% a random byte, 10% stay.
MASKED, RANDOM = 0.8, 0.1


class Batch(NamedTuple):
    """int32 arrays, numpy on the host and JAX in a program: what enters the input stream, what enters the target stream
    (masked_lm: the masked positions), and the labels of the P scored positions in the order of their prediction.

    A label of PAD is not scored. Inputs of PAD, which lie left of the others, are seen by no other token; in causal_lm
    each SEP among the targets begins a document, and no document sees another.
    """

    inputs: Any  # B S
    targets: Any  # B T
    labels: Any  # B P


def after_sep(labels_BT: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """What a target stream is fed: [SEP, y_1 .. y_{T-1}]."""
    separator = np.full((len(labels_BT), 1), tokenizer.sep, np.int32)
    return np.concatenate([separator, labels_BT[:, :-1]], axis=1)


def lm(form: Form, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """Text split in S inputs, after the mode token if there is one, and T targets: T scored positions."""
    inputs, labels = tokens_Bn[:, : -form.T], tokens_Bn[:, -form.T :]
    targets = after_sep(labels, tokenizer)
    if form.loss == "all":
        labels = tokens_Bn[:, 1:]  # x_2 .. x_S, then y_1 .. y_T
    return Batch(inputs, targets, labels)


def masked_lm(form: Form, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """T of the S tokens are chosen anew for each example of the stream, a function of (seed, place in the stream)."""
    B, S, T = len(tokens_Bn), form.S, form.T
    drawn = draws(seed, first, B, S + 2 * T)
    chosen_BT = np.sort(np.argsort(drawn[:, :S], axis=1)[:, :T], axis=1).astype(np.int32)
    fate_BT, other_BT = (
        drawn[:, S : S + T],
        (drawn[:, S + T :] * tokenizer.sep).astype(np.int32),
    )  # ids of text, below SEP
    kept_BT = np.take_along_axis(tokens_Bn, chosen_BT, axis=1)
    inputs_BS = tokens_Bn.copy()
    entering_BT = np.where(fate_BT < MASKED, tokenizer.mask, np.where(fate_BT < MASKED + RANDOM, other_BT, kept_BT))
    np.put_along_axis(inputs_BS, chosen_BT, entering_BT, axis=1)
    return Batch(inputs_BS, chosen_BT, kept_BT)


def span_corruption(form: Form, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """T5 (Raffel et al. 2020, random_spans_noise_mask): text and noise alternate in `spans` parts each, whose lengths are a
    uniform draw among all that are positive. Each noise span is one sentinel among the inputs; the targets are every
    sentinel and its span, then SEP as the end."""
    (B, n), k = tokens_Bn.shape, form.spans
    noise = form.T - k - 1
    S = n - noise + k
    drawn = draws(seed, first, B, n - 2)
    kept_Bk, noisy_Bk = (
        np.cumsum(_parts(numbers, k), axis=1) for numbers in (drawn[:, : n - noise - 1], drawn[:, n - noise - 1 :])
    )
    begins_Bk, ends_Bk = kept_Bk + noisy_Bk - np.diff(noisy_Bk, axis=1, prepend=0), kept_Bk + noisy_Bk
    # Where each token goes in a row of [inputs ; labels]: behind the kept or the noisy ones and the sentinels before it.
    steps = np.zeros((2, B, n + 1), np.int32)
    np.put_along_axis(steps[0], begins_Bk, 1, axis=1)
    np.put_along_axis(steps[1], ends_Bk, 1, axis=1)
    begun_Bn, ended_Bn = np.cumsum(steps[:, :, :n], axis=2, dtype=np.int32)
    is_noise_Bn = begun_Bn > ended_Bn
    noisy_Bn = np.cumsum(is_noise_Bn, axis=1, dtype=np.int32)
    place_Bn = np.where(is_noise_Bn, S + noisy_Bn - 1, np.arange(n, dtype=np.int32) - noisy_Bn) + begun_Bn
    both = np.full((B, S + form.T), tokenizer.sep, np.int32)
    np.put_along_axis(both, place_Bn, tokens_Bn, axis=1)
    of_span = np.arange(k)
    sentinels_k = tokenizer.special(0) + of_span
    np.put_along_axis(both, kept_Bk + of_span, np.broadcast_to(sentinels_k, (B, k)), axis=1)
    before_Bk = noisy_Bk - np.diff(noisy_Bk, axis=1, prepend=0)
    np.put_along_axis(both, S + before_Bk + of_span, np.broadcast_to(sentinels_k, (B, k)), axis=1)
    inputs, labels = both[:, :S], both[:, S:]
    return Batch(inputs, after_sep(labels, tokenizer), labels)


def _parts(drawn_Bm: np.ndarray, count: int) -> np.ndarray:
    """[B, count] positive whole numbers that add up to m + 1, each such row as likely as the others."""
    B, places = drawn_Bm.shape
    cuts = np.sort(np.argsort(drawn_Bm, axis=1)[:, : count - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=np.zeros((B, 1), int), append=np.full((B, 1), places + 1))


def draws(seed: int, first: int, examples: int, numbers: int) -> Float[np.ndarray, "examples numbers"]:
    """Uniform numbers in [0, 1), each a function of the seed, its example's place in the stream and its own place: SplitMix64
    (Steele, Lea and Flood 2014) of a counter, for all of a batch at once. Of an example the first numbers stay what
    they are, however many are asked for."""
    place = np.arange(first, first + examples, dtype=np.uint64)[:, None]
    own = np.arange(numbers, dtype=np.uint64)[None, :]
    begun = _mixed(_mixed(np.full((1, 1), seed, np.uint64) + _GOLDEN) + place * _GOLDEN)
    return (_mixed(begun + (own + np.uint64(1)) * _GOLDEN) >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


OBJECTIVES: dict[str, Callable[..., Batch]] = {"lm": lm, "masked_lm": masked_lm, "span_corruption": span_corruption}


def build(
    form: Form, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int, sentinels: int = 0
) -> Batch:
    """The batch of examples `first`, `first + 1`, ... of the stream that `seed` orders. sentinels: how many the objective's
    ids begin with; the mode tokens follow them."""
    batch = OBJECTIVES[form.name](form, tokens_Bn, tokenizer, seed=seed, first=first)
    if form.mode is None:
        return batch
    mode = np.full((len(tokens_Bn), 1), tokenizer.special(sentinels + form.mode), np.int32)
    return batch._replace(inputs=np.concatenate([mode, batch.inputs], axis=1))


def pairs(form: Form, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], tokenizer: Tokenizer) -> Batch:
    """Sources filled up with PAD from the left, so that their last token stands before the first target as it would alone;
    targets end in SEP and are filled up from the right. Raises ValueError for a pair that the form is too short for."""
    B = len(sources)
    inputs = np.full((B, form.S), tokenizer.pad, np.int32)
    labels = np.full((B, form.T), tokenizer.pad, np.int32)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if not 1 <= len(source) <= form.S or len(target) + 1 > form.T:
            raise ValueError(
                f"a pair of {len(source)} and {len(target)} tokens does not fit {form.S} inputs and {form.T} targets, the end "
                "among them"
            )
        inputs[row, form.S - len(source) :] = source
        labels[row, : len(target)] = target
        labels[row, len(target)] = tokenizer.sep
    entering = after_sep(labels, tokenizer)
    if form.loss == "all":
        following = np.where(inputs[:, :-1] == tokenizer.pad, tokenizer.pad, inputs[:, 1:])
        labels = np.concatenate([following, labels], axis=1)
    return Batch(inputs, entering, labels)


def corrupted(text: int, *, mean_span: float = 3.0, density: float = 0.15) -> Objective:
    """Span corruption of `text` tokens, T5's by default: lengths and spans that fit."""
    noise, spans = noised(text, mean_span, density)
    return Objective(name="span_corruption", S=text - noise + spans, T=noise + spans + 1, spans=spans)
