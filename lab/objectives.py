"""Which tokens go in and which are predicted. An objective on text is one function and one line in `OBJECTIVES`.

An example's tokens are a function of (seed, place in the stream): nothing is drawn from a state.

Letters: B batch, n tokens of text in an example, S input length, T target length, P predicted positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

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
    inputs, chosen = tokens_Bn.copy(), np.empty((len(tokens_Bn), form.T), np.int32)
    for row in range(len(tokens_Bn)):
        rng = np.random.Generator(np.random.PCG64([seed, first + row]))
        chosen[row] = np.sort(rng.permutation(form.S)[: form.T])
        fate = rng.random(form.T)
        other = rng.integers(0, tokenizer.sep, form.T)  # text tokens are the ids below SEP
        kept = tokens_Bn[row, chosen[row]]
        inputs[row, chosen[row]] = np.where(
            fate < MASKED, tokenizer.mask, np.where(fate < MASKED + RANDOM, other, kept)
        )
    return Batch(inputs, chosen, np.take_along_axis(tokens_Bn, chosen, axis=1))


def span_corruption(form: Form, tokens_Bn: np.ndarray, tokenizer: Tokenizer, *, seed: int, first: int) -> Batch:
    """T5 (Raffel et al. 2020, random_spans_noise_mask): text and noise alternate in `spans` parts each, whose lengths are a
    uniform draw among all that are positive. Each noise span is one sentinel among the inputs; the targets are every
    sentinel and its span, then SEP as the end."""
    n, k = tokens_Bn.shape[1], form.spans
    noise = form.T - k - 1
    inputs = np.empty((len(tokens_Bn), n - noise + k), np.int32)
    labels = np.empty((len(tokens_Bn), form.T), np.int32)
    sentinels = np.array([tokenizer.special(i) for i in range(k)], np.int32)
    for row, tokens in enumerate(tokens_Bn):
        rng = np.random.Generator(np.random.PCG64([seed, first + row]))
        lengths = np.stack([_parts(rng, n - noise, k), _parts(rng, noise, k)], axis=1).reshape(-1)
        ends = np.cumsum(lengths)
        is_noise = np.repeat(np.arange(2 * k) % 2 == 1, lengths)
        # A sentinel goes in where a noise span begins: behind so many kept tokens, and before so many noisy ones.
        begins = ends[0::2]
        inputs[row] = np.insert(tokens[~is_noise], np.cumsum(lengths[0::2]), sentinels)
        labels[row, :-1] = np.insert(tokens[is_noise], begins - np.cumsum(lengths[0::2]), sentinels)
        labels[row, -1] = tokenizer.sep
    return Batch(inputs, after_sep(labels, tokenizer), labels)


def _parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """`count` positive whole numbers that add up to `total`, each such row as likely as the others."""
    cuts = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


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
