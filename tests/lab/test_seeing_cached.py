"""Cached decoding and conversations under every option of what is seen, against the definition and the programs."""

import numpy as np
import pytest

import lab.conversation
from lab import cost, serving_cost
from lab.conversation import Conversation
from lab.program import program
from lab.serving import decode, extend, forget, logits, prefill
from lab.spec import Objective, Options
from lab.structure import ALL_TWO_STREAM, STRUCTURES
from lab.transformer import Transformer
from test_conversation import counted_programs
from test_seeing import MIXED, OPTIONS, SHAPE, cases, definition, made
from test_serving import near, tokens_of
from test_transformer import UNROLLED, perturbed

SEP = 256
LONG = Objective(S=12, T=8)
DECODED = {
    "learned": ("tied_cross",), "sinusoidal, restart": ("prefix_lm",), "alibi": ("encoder_decoder",), "t5": ("shared_stacks",),
    "none": (), "window": ("decoder_only",), "turn": (), "all at once": ("prefix_lm",), "mixing": (),
    "mixing, learned, window, turn": ("prefix_lm",),
}  # fmt: skip


def model_of(run):
    model = program(run, UNROLLED).model
    return model, perturbed(model.init(0))


def with_sep(tokens_BT):
    return np.concatenate([np.full((len(tokens_BT), 1), SEP, np.int32), tokens_BT], axis=1)


@pytest.mark.parametrize("run", [case for case in cases(DECODED) if not case.values[0].structure.encoder_only])
def test_every_option_decodes_what_it_is_defined_as(run):
    """Rows of unequal length, several targets at once and then one more."""
    run = made(run.structure, run.options, objective=LONG)
    model, params = model_of(run)
    inputs, lengths, targets = tokens_of(2, 8), np.array([3, 7], np.int32), with_sep(tokens_of(2, 4, seed=1))
    cache = prefill(model, params, inputs, lengths, room=6)
    several, cache = decode(model, params, cache, targets[:, :4])
    one, _ = decode(model, params, cache, targets[:, 4:])
    for row, length in enumerate(lengths):
        expected = definition(run, params, inputs[row, :length], targets[row])[1]
        near(np.concatenate([several[row], one[row]]), expected)


# One for each way in which the inputs' keys and values are kept: in the memory, beside it, under a window, as values alone.
EXTENDED = [("prefix_lm", "turn"), ("encoder_decoder", "all at once"), ("decoder_only", "mixing"),
            ("decoder_only", "window"), ("separate-separate-same-causal", "alibi")]  # fmt: skip
SLOW = [
    pytest.param(s.name, name, marks=pytest.mark.slow)
    for s in ALL_TWO_STREAM
    for name in ("turn", "all at once", "alibi", "window")
    if (OPTIONS[name].turn is None) == (s.inputs == "causal") and (s.name, name) not in EXTENDED
]


@pytest.mark.parametrize(("name", "option"), [*EXTENDED, *SLOW])
def test_inputs_go_on_as_if_they_were_read_anew(name, option):
    """Whole turns of unequal number, then new inputs that fill no turn, then targets."""
    structure = next(s for s in ALL_TWO_STREAM if s.name == name)
    run = made(structure, OPTIONS[option], objective=LONG)
    model, params = model_of(run)
    before, new, counts, targets = tokens_of(2, 8), tokens_of(2, 3, seed=1), np.array([2, 3]), with_sep(tokens_of(2, 2))
    lengths = np.array([4, 8], np.int32)
    cache = prefill(model, params, before, lengths, room=1)
    cache = extend(model, params, cache, new, counts.astype(np.int32), room=3)
    found = logits(model, params, cache, targets)
    for row in range(2):
        text = np.concatenate([before[row, : lengths[row]], new[row, : counts[row]]])
        near(found[row], definition(run, params, text, targets[row])[1])


def test_turns_that_are_not_full_are_refused_and_forgotten():
    run = made("shared_stacks", OPTIONS["turn"], objective=LONG)
    model, params = model_of(run)
    text, targets = tokens_of(2, 9), with_sep(tokens_of(2, 2))
    cache = prefill(model, params, text[:, :6], np.array([6, 6], np.int32), room=2)
    counts = np.array([5, 5], np.int32)
    with pytest.raises(
        ValueError, match=r"options\.turn = 4: rows have \[6, 6\] inputs, and the last of a turn that is not full"
    ):
        extend(model, params, cache, text[:, 6:], counts - 2, room=3)
    cache = extend(model, params, forget(cache, 4), text[:, 4:], counts, room=3)
    found = logits(model, params, cache, targets)
    for row in range(2):
        near(found[row], definition(run, params, text[row], targets[row])[1])


@pytest.mark.parametrize("options", [OPTIONS["learned"], MIXED], ids=["learned", "mixing"])
def test_more_positions_than_there_are_rows_for_are_refused(options):
    model, params = model_of(made("decoder_only", options))  # 6 inputs and 5 targets
    lengths = np.array([6, 2], np.int32)
    with pytest.raises(ValueError, match="the model has 11 positions, and 6 inputs with 6 targets need 12"):
        prefill(model, params, tokens_of(2, 8), lengths, room=6)
    cache = prefill(model, params, tokens_of(2, 8), lengths, room=2)
    with pytest.raises(ValueError, match="the model has 11 positions, and 9 inputs with 3 targets need 12"):
        extend(model, params, cache, tokens_of(2, 3), np.array([3, 3], np.int32), room=3)


TALKS = [("prefix_lm", "turn", 4, 4), ("encoder_decoder", "all at once", 4, 8), ("tied_cross", "turn", 3, 2),
         ("decoder_only", "mixing", 4, 3), ("merged_cross", "window", 4, 3), ("decoder_only", "window", 4, 3)]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "user", "reply"), TALKS)
def test_conversations_cost_what_their_programs_do(name, option, user, reply, monkeypatch):
    """Turns that the users' lengths fill and turns that they do not."""
    structure, options = STRUCTURES[name], OPTIONS[option]
    model = Transformer(structure=structure, shape=SHAPE, options=options, V=24, sep=20, pad=22, places=64)
    walked = counted_programs(monkeypatch)
    talk = Conversation(model, model.abstract(), sep=20, choices=20)
    expected = serving_cost.conversation(structure, SHAPE, options, 24, turns=3, user=user, reply=reply, bytes_per_element=4,
                                 convention="dense")  # fmt: skip
    exact = serving_cost.conversation(
        structure, SHAPE, options, 24, turns=3, user=user, reply=reply, convention="exact"
    )
    for turn, less in zip(expected, exact, strict=True):
        walked.clear()
        said = talk.turn(np.zeros((2, user), np.int32), reply)
        assert walked[0][1] == 2 * turn.prefill and sum(flops for _, flops in walked[1:]) == 2 * turn.decode
        assert said.cache_bytes == 2 * turn.cache_bytes
        assert less.prefill <= turn.prefill and less.decode < turn.decode


@pytest.mark.parametrize(("name", "option"), [("prefix_lm", "turn"), ("shared_stacks", "all at once"), ("prefix_lm", "window"),
                                              ("decoder_only", "mixing")])  # fmt: skip
def test_the_first_turn_costs_the_forward_pass(name, option):
    structure, options = STRUCTURES[name], OPTIONS[option]
    for convention in ("exact", "dense", "textbook"):
        (turn,) = serving_cost.conversation(
            structure, SHAPE, options, 24, turns=1, user=7, reply=5, convention=convention
        )
        forward = cost.forward(structure, SHAPE, options, Objective(S=7, T=5), 24)
        assert turn.prefill + turn.decode == forward[convention]


def test_turns_of_a_conversation_are_kept():
    """Each turn's exact prefill is what its new inputs add to those that are kept: sums telescope to one pass over all."""
    structure, options = STRUCTURES["prefix_lm"], OPTIONS["turn"]
    turns = serving_cost.conversation(structure, SHAPE, options, 24, turns=4, user=4, reply=4, convention="exact")
    whole = serving_cost.conversation(structure, SHAPE, options, 24, turns=1, user=28, reply=4, convention="exact")
    assert sum(turn.prefill for turn in turns) == whole[0].prefill
    anew = serving_cost.conversation(structure, SHAPE, Options(), 24, turns=4, user=4, reply=4, convention="exact")
    assert turns[-1].prefill < anew[-1].prefill / 2


def test_each_reply_is_the_likeliest_after_all_that_was_said():
    """Turns of 4 that users of 3 and replies of 2 do not fill: what is forgotten is read again."""
    structure = STRUCTURES["prefix_lm"]
    run = made(structure, OPTIONS["turn"], objective=LONG)
    model, params = model_of(run)
    talk, text = Conversation(model, params, sep=SEP, choices=200), np.zeros((2, 0), np.int32)
    real, extended = lab.conversation.extend, []
    try:
        lab.conversation.extend = lambda *given, **rest: extended.append(given[3].shape[1]) or real(*given, **rest)
        for turn in range(2):
            user = tokens_of(2, 5, seed=turn)
            found = talk.turn(user, 2).reply_BT
            text = np.concatenate([text, user], axis=1)
            for row in range(2):
                fed = [SEP]
                for place in range(2):
                    after = definition(run, params, text[row], np.array(fed))[1][-1, :200]
                    assert found[row, place] == np.argmax(after)
                    fed.append(int(np.argmax(after)))
            text = np.concatenate([text, with_sep(found[:, :-1])], axis=1)
    finally:
        lab.conversation.extend = real
    assert extended == [5 + 2 + 5 - 4]  # the first turn of 4 stays
