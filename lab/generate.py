"""Text from a trained model, by cached decoding (lab.serving).

A model that was trained on S inputs and T targets is asked here what it was trained for: the last S tokens of the text are
its inputs, T targets follow at most, and then the inputs are taken anew. Only text is ever chosen, and SEP where it may end
a reply; MASK, PAD and ids that fill the vocabulary up are not.

Letters: B batch, S input length, T target length, V vocabulary, k the likeliest tokens that are drawn from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from lab.checks import require
from lab.data.tokenizers import Tokenizer
from lab.forms import UL2_MODES, Objective
from lab.serving import Cache, bucket, decode, prefill
from lab.spec import Run
from lab.transformer import Params, Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy. What is drawn depends on the seed, the row of the batch and the place in its text alone."""

    temperature: float = 0.0
    top_k: int | None = None  # of the likeliest tokens; None: of all
    seed: int = 0

    def __post_init__(self):
        ok = isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf
        require(ok, "temperature", self.temperature, "use 0 for the likeliest token, or a number above it, such as 0.8")
        ok = self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1)
        require(ok, "top_k", self.top_k, "use a whole number of at least 1, or leave it out to draw from all tokens")
        ok = isinstance(self.seed, int) and 0 <= self.seed < 2**31
        require(ok, "seed", self.seed, "use a whole number from 0 to 2^31 - 1")


GREEDY = Sampling()


@partial(jax.jit, static_argnames=("model", "choices", "k"), donate_argnames="cache")
def _next(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens_B: Int[Array, "B"],
    seed: Array,
    place: Array,
    temperature: Array,
    *,
    choices: int,
    k: int,
) -> tuple[Int[Array, "B"], Cache]:
    logits_B1V, cache = decode(model, params, cache, tokens_B[:, None])
    return choose(logits_B1V[:, 0, :choices], seed, place, temperature, k=k), cache


def choose(logits_BV: Float[Array, "B V"], seed: Array, place: Array, temperature: Array, *, k: int) -> Int[Array, "B"]:
    """Of each row's k largest logits one, with the probabilities of their softmax at the temperature."""
    best_Bk, ids_Bk = jax.lax.top_k(logits_BV, k)
    if k == 1:
        return ids_Bk[:, 0]
    of_place = jax.random.fold_in(jax.random.key(seed), place)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(of_place, jnp.arange(len(logits_BV)))
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, best_Bk / temperature)
    return jnp.take_along_axis(ids_Bk, chosen_B[:, None], axis=1)[:, 0]


def next_tokens(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens_B: Int[Array, "B"] | Int[np.ndarray, "B"],
    *,
    choices: int,
    sampling: Sampling = GREEDY,
    place: int = 0,
) -> tuple[Int[Array, "B"], Cache]:
    """Feeds each row's newest target (SEP at the start) and chooses what follows, of the ids below `choices`.

    place: how many tokens were chosen before. The given cache is used up: go on from the one that comes back.
    """
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or choices, choices)
    temperature = np.float32(sampling.temperature or 1.0)
    seed, at = np.uint32(sampling.seed), np.uint32(place)
    return _next(model, params, cache, tokens_B, seed, at, temperature, choices=choices, k=k)


def filled(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "B C"], Int[np.ndarray, "B"]]:
    """Rows filled up from the right to one width, and how long each is."""
    tokens_BC = np.zeros((len(rows), width), np.int32)
    for row, tokens in enumerate(rows):
        tokens_BC[row, : len(tokens)] = tokens
    return tokens_BC, np.array([len(tokens) for tokens in rows], np.int32)


def opened(
    objective: Objective, tokenizer: Tokenizer, text: Sequence[int], most: int | None = None
) -> tuple[list[int], int]:
    """What a model of this objective reads before it goes on with a text, of whose last `most` tokens: its inputs, and the
    first token that enters the target stream. UL2 is asked in its sequential mode; a model of packed documents, which
    knows no inputs, has SEP before the text and none behind it."""
    if objective.name == "causal_lm":
        whole = [tokenizer.sep, *text]
        whole = whole if most is None else whole[-most - 1 :]
        return whole[:-1], whole[-1]
    inputs = list(text if most is None else text[-most:])
    if objective.name == "ul2":
        inputs.insert(0, tokenizer.special(objective.ul2_spans + UL2_MODES.index("S")))
    return inputs, tokenizer.sep


def go_on(
    run: Run,
    model: Transformer,
    params: Params,
    prompts: Sequence[str],
    *,
    tokens: int,
    tokenizer: Tokenizer,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """`tokens` tokens of text after each prompt; raises ValueError for an empty prompt and for encoder-only."""
    if run.structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream to sample from")
    texts = [[int(token) for token in tokenizer.encode(prompt)] for prompt in prompts]
    if not all(texts):
        raise ValueError("prompt = '': give at least one character; the model continues its inputs")
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: use at least 1")
    o = run.objective
    S, T = (o.S, o.T) if o.S else (o.T - o.T // 2, max(o.T // 2, 1))
    T = min(T, tokens)
    width = min(S, bucket(max(map(len, texts)) + tokens - 1)) + (o.name == "ul2")
    produced: list[list[int]] = [[] for _ in prompts]
    while (done := len(produced[0])) < tokens:
        begun = [opened(o, tokenizer, text + new, S) for text, new in zip(texts, produced, strict=True)]
        inputs_BS, lengths_B = filled([inputs for inputs, _ in begun], width)
        cache = prefill(model, params, inputs_BS, lengths_B, room=T)
        newest_B, columns = np.array([first for _, first in begun], np.int32), []
        for place in range(done, min(done + T, tokens)):
            newest_B, cache = next_tokens(
                model, params, cache, newest_B, choices=tokenizer.text, sampling=sampling, place=place
            )
            columns.append(newest_B)
        for new, row in zip(produced, np.stack(columns, axis=1).tolist(), strict=True):
            new.extend(row)
    return [tokenizer.decode(new) for new in produced]
