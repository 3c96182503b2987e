"""Greedy text from a trained model: the plain forward pass, once for each token.

A model that was trained on S inputs and T targets is asked the same question here: the last S tokens are its inputs, and
after T new tokens they are taken anew.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lab.data import tokenizer_of
from lab.spec import Run
from lab.transformer import Params, Transformer


def greedy(run: Run, model: Transformer, params: Params, prompt: str, *, tokens: int) -> str:
    """The `tokens` most likely tokens after `prompt`, one at a time; raises ValueError for an empty prompt."""
    if run.structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream to sample from")
    tokenizer = tokenizer_of(run.data)
    text = [int(token) for token in tokenizer.encode(prompt)]
    if not text:
        raise ValueError("prompt = '': give at least one character; the model continues its inputs")
    T = run.objective.T

    @jax.jit
    def next_token(inputs_1S, targets_1T, place):
        logits_1PV = model(params, run.objective, inputs_1S, targets_1T)
        return jnp.argmax(logits_1PV[0, logits_1PV.shape[1] - T + place, : tokenizer.sep])  # text, not specials

    produced: list[int] = []
    while len(produced) < tokens:
        inputs = np.array([(text + produced)[-run.objective.S :]], np.int32)
        targets = np.full((1, T), tokenizer.sep, np.int32)  # later places are not seen by earlier ones
        for place in range(min(T, tokens - len(produced))):
            token = int(next_token(inputs, targets, place))
            produced.append(token)
            if place + 1 < T:
                targets[0, place + 1] = token
    return tokenizer.decode(produced)
