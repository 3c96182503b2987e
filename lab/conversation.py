"""A conversation with one model, turn by turn: what is read again, what is kept, and how long it takes.

Inputs that see ahead are read anew at each turn, all of them; those that see ahead within turns of the model's own
(options.turn) from the first of these on that was not full. Causal inputs are only extended: by what the user wrote, and
before it by the reply of the turn before, except where replies have the same keys and values as inputs and stay
(structure.keeps_replies). serving_cost.conversation counts the same.

What a structure has seen of a reply of t tokens is what its target stream was fed with: SEP and the first t-1. The last
token ends the reply and is read by nothing. So the text of a conversation is u1 SEP r1 u2 SEP r2 .. in every structure.

Letters: B batch, n inputs so far, U new ones from the user, T tokens of a reply, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from lab import serving_cost
from lab.generate import GREEDY, Sampling, next_tokens
from lab.seen import among_inputs
from lab.serving import Cache, extend, forget, prefill
from lab.spec import Options, Shape
from lab.structure import Structure
from lab.transformer import DTYPES, Params, Transformer


@dataclass(frozen=True, kw_only=True)
class Said:
    """One turn. Seconds are of this device, and begin when the user's tokens are there."""

    reply_BT: np.ndarray
    read: int  # inputs that were encoded in this turn, in each row
    cache_bytes: int  # of keys and values, as the arrays have them
    first_token_seconds: float
    token_seconds: float | None  # of each token after the first; None where the reply has but one


class Conversation:
    """B conversations side by side, all with turns of the same lengths; arrays have the very lengths of the turn."""

    def __init__(self, model: Transformer, params: Params, *, sep: int, choices: int, sampling: Sampling = GREEDY):
        self.model, self.params, self.sep, self.choices, self.sampling = model, params, sep, choices, sampling
        self.text_Bn: np.ndarray | None = None  # all that was said, as inputs
        self.cache: Cache | None = None
        self.unread = 0  # of the text's end: a reply that the cache does not hold as inputs
        self.place = 0

    def turn(self, user_BU: Int[np.ndarray, "B U"], reply: int) -> Said:
        """The user's tokens, and `reply` tokens in answer."""
        began = time.perf_counter()
        before = user_BU[:, :0] if self.text_Bn is None else self.text_Bn
        self.text_Bn = np.concatenate([before, user_BU], axis=1).astype(np.int32)
        rule, held = among_inputs(self.model.structure, self.model.options), before.shape[1] - self.unread
        kept = held // rule.turn * rule.turn if rule.causal else 0
        new_BU = self.text_Bn[:, kept:]
        counts_B = np.full(len(new_BU), new_BU.shape[1], np.int32)
        if kept == 0:
            self.cache = None  # given back before the new one is made
            cache = prefill(self.model, self.params, new_BU, counts_B, room=reply)
        else:
            assert self.cache is not None
            held_cache = self.cache if kept == held else forget(self.cache, kept)
            cache = extend(self.model, self.params, held_cache, new_BU, counts_B, room=reply)
        size, seconds = cache.nbytes, []
        columns = [np.full(len(new_BU), self.sep, np.int32)]
        for _ in range(reply):  # each token goes to the host, as it would to the user
            token_B, cache = next_tokens(
                self.model, self.params, cache, columns[-1],
                choices=self.choices, sampling=self.sampling, place=self.place,
            )  # fmt: skip
            columns.append(np.asarray(token_B))
            seconds.append(time.perf_counter())
            self.place += 1
        reply_BT = np.stack(columns, axis=1)
        self.cache = cache
        self.text_Bn = np.concatenate([self.text_Bn, reply_BT[:, :-1]], axis=1)
        self.unread = 0 if self.model.structure.keeps_replies(self.model.options.positions) else reply
        later = (seconds[-1] - seconds[0]) / (reply - 1) if reply > 1 else None
        return Said(
            reply_BT=reply_BT[:, 1:],
            read=new_BU.shape[1],
            cache_bytes=size,
            first_token_seconds=seconds[0] - began,
            token_seconds=later,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One turn of one structure, for B conversations side by side; FLOPs are those of one of them, and counted."""

    structure: str
    turn: int
    inputs: int
    read: int
    prefill_flops: int
    decode_flops: int
    cache_bytes: int
    first_token_seconds: float  # medians of all repeats
    token_seconds: float | None
    fastest_first_token_seconds: float  # of all repeats, for machines that others use too
    fastest_token_seconds: float | None


def measure(
    structures: Sequence[Structure],
    shape: Shape,
    options: Options,
    V: int,
    *,
    turns: int,
    user: int,
    reply: int,
    batch: int = 1,
    precision: str = "f32",
    repeats: int = 3,
    on_round: Callable[[int], None] = lambda done: None,
) -> list[Measured]:
    """Conversations of random tokens with models that are not trained: time does not depend on what is said.

    Each structure has its conversation once so that everything is compiled, and then all take turns for `repeats` rounds,
    so that what else the machine does falls on all alike. FLOPs are `exact`. on_round(done) is called after each round.
    """
    if min(turns, user, reply, batch, repeats) < 1:
        raise ValueError(f"{turns=}, {user=}, {reply=}, {batch=}, {repeats=}: use at least 1 of each")
    text = V - 4  # ids below the specials
    user_RBU = np.random.default_rng(0).integers(0, text, (turns, batch, user)).astype(np.int32)
    models = [
        Transformer(
            structure=structure,
            shape=shape,
            options=options,
            V=V,
            sep=text,
            pad=text + 2,
            precision=precision,
            places=turns * (user + reply),
        )
        for structure in structures
    ]
    params = [jax.device_put(model.init(0)) for model in models]
    rounds: list[list[list[Said]]] = []  # by round, structure and turn
    for done in range(1 + repeats):
        talks = [Conversation(m, p, sep=text, choices=text) for m, p in zip(models, params, strict=True)]
        rounds.append([[talk.turn(user_BU, reply) for user_BU in user_RBU] for talk in talks])
        on_round(done)
    measured = []
    for index, structure in enumerate(structures):
        counted = serving_cost.conversation(
            structure, shape, options, V, turns=turns, user=user, reply=reply, convention="exact",
            bytes_per_element=np.dtype(DTYPES[precision]).itemsize,
        )  # fmt: skip
        for turn, expected in enumerate(counted):
            said = [of_structure[index][turn] for of_structure in rounds[1:]]
            assert said[0].cache_bytes == batch * expected.cache_bytes, (
                "the arrays are what serving_cost.conversation counts"
            )
            first = [one.first_token_seconds for one in said]
            later = [one.token_seconds for one in said if one.token_seconds is not None]
            measured.append(
                Measured(
                    structure=structure.name,
                    turn=turn + 1,
                    inputs=turn * (user + reply) + user,
                    read=said[0].read,
                    prefill_flops=expected.prefill,
                    decode_flops=expected.decode,
                    cache_bytes=said[0].cache_bytes,
                    first_token_seconds=statistics.median(first),
                    token_seconds=statistics.median(later) if later else None,
                    fastest_first_token_seconds=min(first),
                    fastest_token_seconds=min(later, default=None),
                )
            )
    return measured
