"""Conversations: what they read, what they keep, and that both are what is counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flop_counter
import lab.conversation
import reference_models as reference
from lab import cost, serving_cost
from lab.conversation import Conversation, measure
from lab.spec import Objective, Options, Shape
from lab.structure import ALL_TWO_STREAM, STRUCTURES
from lab.transformer import Transformer
from runs import TINY, name_of
from test_transformer import perturbed

V, SEP = 24, 20
GROUPED = Shape(D=12, F=20, N=4, K=2, H=6, L=3, L_input=3)
RESTART = Options(positions="restart")
OTHERS = (
    Options(mlp="gelu", norm_place="post", block="parallel", embedding_width=5),
    Options(norm_place="sandwich", share_layers=True, tied_embeddings=False, embedding_width=4),
)


def model_of(structure, shape=TINY, options=None, **parts):
    return Transformer(
        structure=structure, shape=shape, options=options or Options(), V=V, sep=V - 4, pad=V - 2, **parts
    )


def zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def counted_programs(monkeypatch):
    """A list that the name and FLOPs of every program join that a conversation calls; none is compiled, all answer zeros."""
    walked: list[tuple[str, int]] = []

    def counted(name):
        real = getattr(lab.conversation, name)

        def call(model, params, *arrays, **static):
            def program(params, *arrays):
                return real(model, params, *arrays, **static)

            walked.append((name, flop_counter.count(program, params, *arrays)))
            return zeros(jax.eval_shape(program, params, *arrays))

        return call

    for name in ("prefill", "extend", "next_tokens"):
        monkeypatch.setattr(lab.conversation, name, counted(name))
    return walked


# Replies stay in decoder-only models alone, and not where positions restart.
TALKS = [
    *((structure, Options()) for structure in ALL_TWO_STREAM),
    (STRUCTURES["decoder_only"], RESTART),
    *((structure, options) for options in OTHERS for structure in ALL_TWO_STREAM),
]
TALKED = [
    pytest.param(structure, options, marks=pytest.mark.slow if options in OTHERS and index % 7 else ())
    for index, (structure, options) in enumerate(TALKS)
]


@pytest.mark.parametrize(("structure", "options"), TALKED, ids=lambda v: str(v) if isinstance(v, Options) else v.name)
def test_flops_and_bytes_of_a_conversation_are_those_of_its_programs(structure, options, monkeypatch):
    """Every program that a conversation calls is walked, and answers with zeros: none is compiled."""
    walked = counted_programs(monkeypatch)
    shape, turns, user, reply, batch = GROUPED, 3, 4, 3, 2
    model = model_of(structure, shape, options)
    talk = Conversation(model, model.abstract(), sep=SEP, choices=SEP)
    expected = serving_cost.conversation(
        structure, shape, options, V, turns=turns, user=user, reply=reply, bytes_per_element=4, convention="dense"
    )
    for index, turn in enumerate(expected):
        walked.clear()
        said = talk.turn(np.zeros((batch, user), np.int32), reply)
        causal = structure.inputs == "causal"
        assert [name for name, _ in walked] == ["extend" if causal and index else "prefill"] + ["next_tokens"] * reply
        assert walked[0][1] == batch * turn.prefill
        assert sum(flops for _, flops in walked[1:]) == batch * turn.decode
        leaves = jax.tree.leaves((talk.cache.memory, talk.cache.targets, talk.cache.own))
        assert said.cache_bytes == sum(4 * math.prod(leaf.shape) for leaf in leaves) == batch * turn.cache_bytes


@pytest.mark.parametrize("convention", ["exact", "dense", "textbook"])
@pytest.mark.parametrize("structure", ALL_TWO_STREAM, ids=name_of)
def test_one_turn_costs_the_forward_pass(structure, convention):
    (turn,) = serving_cost.conversation(
        structure, GROUPED, Options(), V, turns=1, user=7, reply=5, convention=convention
    )
    forward = cost.forward(structure, GROUPED, Options(), Objective(S=7, T=5), V)
    assert turn.prefill + turn.decode == forward[convention]


@pytest.mark.parametrize("name", ["encoder_decoder", "prefix_lm", "decoder_only", "separate-separate-final-causal"])
def test_each_reply_is_the_likeliest_after_all_that_was_said(name):
    """Token by token from the definition of the structure in float64."""
    structure = next(s for s in ALL_TWO_STREAM if s.name == name)
    model = model_of(structure)
    params = perturbed(model.init(0))
    talk = Conversation(model, params, sep=SEP, choices=SEP)
    text = np.zeros((2, 0), np.int32)
    for turn in range(2):
        user = np.random.default_rng(turn).integers(0, SEP, (2, 3)).astype(np.int32)
        found = talk.turn(user, 3).reply_BT
        text = np.concatenate([text, user], axis=1)
        fed = np.full((2, 1), SEP, np.int32)
        for place in range(3):
            after = [reference.two_streams(structure, params, text[row], fed[row])[1][-1, :SEP] for row in range(2)]
            likeliest = np.argmax(after, axis=1).astype(np.int32)
            np.testing.assert_array_equal(found[:, place], likeliest)
            fed = np.concatenate([fed, likeliest[:, None]], axis=1)
        text = np.concatenate([text, fed[:, :-1]], axis=1)


def test_measured_turns_have_times_and_the_formulas_numbers():
    structure = STRUCTURES["decoder_only"]
    rows = measure([structure], TINY, Options(), V, turns=2, user=3, reply=2, batch=2, precision="bf16", repeats=1)
    counted = serving_cost.conversation(structure, TINY, Options(), V, turns=2, user=3, reply=2, convention="exact")
    assert [(row.turn, row.inputs, row.read) for row in rows] == [(1, 3, 3), (2, 8, 3)]
    assert [row.prefill_flops for row in rows] == [turn.prefill for turn in counted]
    assert [row.cache_bytes for row in rows] == [2 * turn.cache_bytes for turn in counted]
    assert all(row.first_token_seconds > 0 and row.token_seconds > 0 for row in rows)
    with pytest.raises(ValueError, match="use at least 1 of each"):
        measure([structure], TINY, Options(), V, turns=0, user=3, reply=2)
