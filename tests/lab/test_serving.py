"""Cached decoding against the forward pass that computes everything anew."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_models as reference
from lab.execution import Execution
from lab.positions import rotate
from lab.program import program
from lab.serving import bucket, decode, extend, logits, prefill
from lab.spec import Objective, Options, Shape
from lab.structure import ALL_TWO_STREAM, STRUCTURES
from runs import TINY, make_run, name_of, named_first
from test_transformer import perturbed

SEP = 256
GROUPED = Shape(D=12, F=20, N=4, K=2, H=6, L=3, L_input=3)
OTHER = Options(tied_embeddings=False, mlp="gelu", qk_norm=False, positions="restart")


def model_of(structure, shape=TINY, options=None, scan=False):
    run = make_run(structure, shape=shape, options=options or Options())
    model = program(run, Execution(steps_per_dispatch=1, scan=scan)).model
    return model, perturbed(model.init(0))


def defined(model, params, inputs, targets):
    """Logits after each target of one row, from the definition of the structure in float64."""
    depths = model.shape.L_input, model.shape.L
    return reference.two_streams(model.structure, params, inputs, targets, options=model.options, depths=depths)[1]


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


CASES = [
    pytest.param(structure, *case, marks=() if structure in always else pytest.mark.slow, id=f"{structure.name}-{name}")
    for name, case, always in (
        ("grouped", (Options(), GROUPED, True), STRUCTURES.values()),
        ("other options", (OTHER, TINY, False), (STRUCTURES["encoder_decoder"], STRUCTURES["decoder_only"])),
    )
    for structure in ALL_TWO_STREAM
]


@pytest.mark.parametrize(("structure", "options", "shape", "scan"), CASES)
def test_every_structure_decodes_what_its_forward_pass_computes(structure, options, shape, scan):
    """Rows of unequal length in one batch, each shorter than the slots that it has; target by target and several at once."""
    model, params = model_of(structure, shape, options, scan)
    lengths, T = np.array([3, 7, 1], np.int32), 5
    inputs = tokens_of(3, 8)
    targets = np.concatenate([np.full((3, 1), SEP, np.int32), tokens_of(3, T - 1, seed=1)], axis=1)
    cache = prefill(model, params, inputs, lengths, room=T + 2)
    at_once = np.asarray(logits(model, params, cache, targets))
    one_by_one = []
    for place in range(T):
        found, cache = decode(model, params, cache, targets[:, place : place + 1])
        one_by_one.append(np.asarray(found)[:, 0])
    for row, length in enumerate(lengths):
        expected = defined(model, params, inputs[row, :length], targets[row])
        near(at_once[row], expected)
        near(np.stack(one_by_one, axis=1)[row], expected)


@pytest.mark.parametrize("structure", named_first(ALL_TWO_STREAM), ids=name_of)
def test_decoding_is_the_uncached_forward_pass(structure):
    """The very function that is trained, of the same parameters, over more inputs than it is trained with."""
    model, params = model_of(structure, scan=False)
    S, T = 9, 4
    targets = np.array([[SEP, 4, 9, 11]], np.int32)
    forward = jax.jit(lambda params, inputs: model(params, Objective(S=6, T=T), inputs, targets))
    inputs = tokens_of(1, S)
    cache = prefill(model, params, inputs, np.array([S], np.int32), room=T)
    near(logits(model, params, cache, targets), forward(params, inputs))


@pytest.mark.parametrize("structure", named_first(s for s in ALL_TWO_STREAM if s.stacks == "separate" and s.memory == "final"),
                         ids=name_of)  # fmt: skip
def test_unequal_depths(structure):
    model, params = model_of(structure, replace(TINY, L=1, L_input=3), scan=True)
    inputs, targets = tokens_of(1, 6), np.array([[SEP, 4, 9]], np.int32)
    cache = prefill(model, params, inputs, np.array([6], np.int32), room=3)
    near(np.asarray(logits(model, params, cache, targets))[0], defined(model, params, inputs[0], targets[0]))


# One for each way in which the inputs' keys and values are kept, the others in the slow suite.
KEPT = ("decoder_only", "tied-shared-same-causal", "separate-shared-same-causal", "separate-separate-final-causal")
CAUSAL = [
    pytest.param(s, options, marks=() if s.name in KEPT[: None if options == Options() else 1] else pytest.mark.slow)
    for s in ALL_TWO_STREAM
    for options in (Options(), OTHER)
    if s.inputs == "causal"
]


@pytest.mark.parametrize(
    ("structure", "options"), CAUSAL, ids=lambda v: v.positions if isinstance(v, Options) else name_of(v)
)
def test_causal_inputs_go_on_as_if_they_were_read_anew(structure, options):
    """Turns over rows of unequal length, the replies being inputs of the next turn."""
    model, params = model_of(structure, GROUPED if options == OTHER else TINY, options, scan=options == OTHER)
    keeps = structure.keeps_replies(options.positions)
    assert keeps == (structure.name == "decoder_only" and options == Options())
    text: list[list[int]] = [[], []]
    cache, reply = None, np.zeros((2, 0), np.int32)
    for turn, T in enumerate((2, 3)):
        counts = np.array([2 + turn, 4], np.int32)
        user = tokens_of(2, 4, seed=turn)
        for row in range(2):
            text[row] += [*reply[row], *user[row, : counts[row]]]
        if cache is None:
            cache = prefill(model, params, user, counts, room=T)
        elif keeps:
            cache = extend(model, params, cache, user, counts, room=T)
        else:
            cache = extend(model, params, cache, np.concatenate([reply, user], axis=1), counts + reply.shape[1], room=T)
        reply = np.concatenate([np.full((2, 1), SEP, np.int32), tokens_of(2, T - 1, seed=9 + turn)], axis=1)
        found, cache = decode(model, params, cache, reply)
        for row in range(2):
            near(np.asarray(found)[row], defined(model, params, text[row], reply[row]))


def test_bidirectional_inputs_are_not_extended():
    model, params = model_of("prefix_lm")
    cache = prefill(model, params, tokens_of(1, 4), np.array([4], np.int32), room=2)
    with pytest.raises(ValueError, match="use prefill on all of them"):
        extend(model, params, cache, tokens_of(1, 2), np.array([2], np.int32), room=2)


def test_encoder_only_has_nothing_to_decode():
    model, params = model_of("encoder_only")
    with pytest.raises(ValueError, match="no target stream"):
        prefill(model, params, tokens_of(1, 4), np.array([4], np.int32), room=2)


@pytest.mark.parametrize("name", ["decoder_only", "prefix_lm", "separate-separate-same-causal"])
def test_one_layer(name):
    structure = next(s for s in ALL_TWO_STREAM if s.name == name)
    model, params = model_of(structure, replace(TINY, L=1, L_input=1), scan=False)
    inputs, targets = tokens_of(1, 6), np.array([[SEP, 4, 9]], np.int32)
    cache = prefill(model, params, inputs, np.array([6], np.int32), room=3)
    near(np.asarray(logits(model, params, cache, targets))[0], defined(model, params, inputs[0], targets[0]))


def test_positions_of_a_program_are_those_of_the_host():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.float32)
    for positions in ([0, 1, 511], [512, 513, 4095], [100_000, 200_001, 262_143]):
        host = np.array(positions)
        here = jax.jit(rotate)(x, jnp.asarray(host))
        rows = jax.jit(rotate)(x, jnp.asarray(np.stack([host, host])))
        np.testing.assert_allclose(here, rotate(x, host), rtol=0, atol=2e-6)
        np.testing.assert_array_equal(rows, here)


def test_buckets_are_few_and_waste_little():
    shapes = [bucket(n) for n in range(1, 5000)]
    assert all(n <= shape <= max(16, 1.25 * n) for n, shape in enumerate(shapes, start=1))
    assert len(set(shapes)) <= 4 * 9
