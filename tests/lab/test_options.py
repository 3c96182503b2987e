"""What every option of the model promises, in every structure: counted cost, the definition, cached decoding, one JSON."""

import functools
import json
import math
import typing
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flop_counter
import reference_models as reference
from lab import cost
from lab.execution import Execution
from lab.forms import forms
from lab.layers import NORMS
from lab.objectives import pairs
from lab.program import loss_and_gradient, program, shapes, token_losses
from lab.serving import logits as cached_logits
from lab.serving import prefill
from lab.spec import Objective, Options, Shape, from_json, to_json
from lab.structure import ALL_TWO_STREAM, STRUCTURES, Structure
from runs import EVERY_STRUCTURE, make_run
from sweeps.plan import describe_arm
from test_seeing import OPTIONS as SEEING
from test_transformer import BYTES, perturbed, some_batch

GROUPED = Shape(D=12, F=20, N=4, K=2, H=6, L=2, L_input=2)
ONE_LAYER = replace(GROUPED, L=1, L_input=1)
PLAIN = Execution(steps_per_dispatch=1, scan=False, attention="reference")

# One for each value of each option, and mixtures in which each meets others.
ENTRIES: dict[str, Options] = {
    "geglu": Options(mlp="geglu"),
    "gelu": Options(mlp="gelu"),
    "relu": Options(mlp="relu"),
    "relu2": Options(mlp="relu2"),
    "layer norm": Options(norm="layer"),
    "scale alone": Options(norm="scale"),
    "post": Options(norm_place="post"),
    "sandwich": Options(norm_place="sandwich"),
    "parallel": Options(block="parallel"),
    "shared layers": Options(share_layers=True),
    "no QK-norm": Options(qk_norm=False),
    "untied": Options(tied_embeddings=False),
    "factors": Options(embedding_width=5),
    "cap": Options(logit_softcap=1.5),
    "z-loss": Options(z_loss=0.1),
    "restart": Options(positions="restart"),
}
MIXED: dict[str, Options] = {
    "post, parallel": Options(norm="layer", norm_place="post", block="parallel", mlp="relu", embedding_width=5),
    "sandwich, scale": Options(norm="scale", norm_place="sandwich", mlp="geglu", tied_embeddings=False, logit_softcap=2.0,
                               positions="restart"),
    "sandwich, parallel, shared": Options(norm_place="sandwich", block="parallel", share_layers=True, mlp="relu2",
                                          tied_embeddings=False, embedding_width=4),
    "post, shared": Options(norm="layer", norm_place="post", share_layers=True, qk_norm=False, mlp="gelu", z_loss=0.1),
}  # fmt: skip
ALL = ENTRIES | MIXED


def spread(structures: tuple[Structure, ...], few: int, mixed: int) -> list[typing.Any]:
    """Options and structures: of each option some structures, other ones for each; the rest in the slow suite."""
    found = []
    for place, (name, options) in enumerate(ALL.items()):
        count = mixed if name in MIXED else few
        chosen = {(place + i * len(structures) // count) % len(structures) for i in range(count)}
        for index, structure in enumerate(structures):
            marks = () if index in chosen else pytest.mark.slow
            found.append(pytest.param(options, structure, marks=marks, id=f"{name}-{structure.name}"))
    return found


def run_of(structure, options, *, shape=GROUPED, loss=None):
    """Inputs are scored too where they can be."""
    run = make_run(structure, shape=shape, options=options, batch=2)
    loss = loss or ("all" if structure.inputs == "causal" else "targets")
    return replace(run, objective=replace(run.objective, loss=loss))


def test_every_value_of_every_option_is_an_entry():
    """Here, or of what is seen. Parametrizations are test_parametrization's."""
    hints = typing.get_type_hints(Options)
    for field in fields(Options):
        if field.name == "parametrization":
            continue
        values = {getattr(options, field.name) for options in [*ENTRIES.values(), *SEEING.values()]}
        if typing.get_origin(hints[field.name]) is typing.Literal:
            assert values == set(typing.get_args(hints[field.name]))
        assert len(values) > 1, field.name
    assert len({describe_arm(make_run(options=options)) for options in [Options(), *ALL.values()]}) == len(ALL) + 1
    assert set(cost.MLP_MATRICES) == set(typing.get_args(hints["mlp"])) and set(NORMS) == set(
        typing.get_args(hints["norm"])
    )


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_options_are_content_of_a_run(options):
    run = make_run(options=options)
    again = from_json(json.loads(json.dumps(to_json(run))))
    assert again == run and again.run_id == run.run_id != make_run().run_id


@pytest.mark.parametrize(("options", "structure"), spread(EVERY_STRUCTURE, 1, 4))
def test_counts_equal_the_program(options, structure):
    """Parameters, and FLOPs by a walk; scanned where depths share their weights or loss is on targets."""
    scan = options.share_layers or structure.inputs != "causal"
    run = run_of(structure, options)
    p, parts = program(run, replace(PLAIN, scan=scan)), (structure, GROUPED, options, run.objective, run.V)
    params, batch = p.model.abstract(), shapes(p.forms, (run.batch,))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == cost.parameters(*parts).total
    assert jax.tree.map(lambda leaf: leaf.shape, p.model.init(0)) == jax.tree.map(lambda leaf: leaf.shape, params)
    walked = flop_counter.count(lambda params, b: token_losses(p.model, p.forms[0], params, b), params, batch)
    assert walked == cost.forward(*parts)["dense"] * run.batch
    assert (
        flop_counter.count(functools.partial(loss_and_gradient, p), params, batch)
        == cost.train_step(run, run.V)["dense"]
    )


@pytest.mark.parametrize(("options", "structure"), spread(EVERY_STRUCTURE, 2, 8))
def test_every_option_is_its_definition(options, structure):
    """Op by op, without a compiled program, against float64 numpy."""
    run = run_of(structure, options)
    model = program(run, PLAIN).model
    params = perturbed(model.init(0))
    _, batch = some_batch(run)
    ours = np.asarray(model(params, forms(run.objective)[0], batch.inputs, batch.targets))
    defined = functools.partial(reference.two_streams, options=options, depths=(GROUPED.L_input, GROUPED.L))
    for row in range(run.batch):
        if structure.encoder_only:
            alone = {**params, "shared": params["input"]}
            theirs = defined(STRUCTURES["prefix_lm"], alone, batch.inputs[row], np.zeros(1, int))[0][batch.targets[row]]
        else:
            x, y = defined(structure, params, batch.inputs[row], batch.targets[row])
            theirs = np.concatenate([x[:-1], y]) if run.objective.loss == "all" else y
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(("options", "structure"), spread(ALL_TWO_STREAM, 1, 4))
def test_cached_decoding_is_the_definition(options, structure):
    """Rows of unequal length; op by op."""
    model = program(run_of(structure, options), PLAIN).model
    params = perturbed(model.init(0))
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(0, 256, shape).astype(np.int32) for shape in ((2, 5), (2, 3)))
    lengths = np.array([2, 5], np.int32)
    with jax.disable_jit():
        cache = prefill(model, params, inputs, lengths, room=4)
        ours = np.asarray(cached_logits(model, params, cache, targets))
    for row, length in enumerate(lengths):
        depths = GROUPED.L_input, GROUPED.L
        _, theirs = reference.two_streams(
            structure, params, inputs[row, :length], targets[row], options=options, depths=depths
        )
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-5, atol=5e-5)


EXECUTED = [
    ("sandwich, parallel, shared", "encoder_decoder"),
    ("post, parallel", "merged-separate-same-causal"),
    pytest.param("post, shared", "separate-separate-same-bidirectional", marks=pytest.mark.slow),
    pytest.param("sandwich, parallel, shared", "tied-shared-same-causal", marks=pytest.mark.slow),
    pytest.param("post, parallel", "tied_cross", marks=pytest.mark.slow),
    pytest.param("sandwich, scale", "separate-shared-same-causal", marks=pytest.mark.slow),
    pytest.param("sandwich, scale", "tied-separate-same-bidirectional", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "name"), EXECUTED)
def test_the_execution_changes_no_number(options, name):
    """Scanned, with remat and in microbatches; and parameters that are counted as unused, and no others, have no gradient."""
    structure = next(s for s in ALL_TWO_STREAM if s.name == name)
    run = run_of(structure, MIXED[options], loss="targets")
    p = program(run, PLAIN)
    params = perturbed(p.model.init(0))
    _, batch = some_batch(run)
    settings = dict(scan=True, remat=True, microbatches=2, attention="blocked")
    plain, other = (
        jax.jit(functools.partial(loss_and_gradient, program(run, execution)))(params, batch)
        for execution in (PLAIN, replace(PLAIN, **settings))
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-6)
    idle = 0
    for leaf in map(np.asarray, jax.tree.leaves({name: plain[1][name] for name in p.model.stacks})):
        layers = leaf.reshape(len(leaf), -1) if leaf.ndim > 1 else leaf[None]
        idle += sum(layer.size for layer in layers if not layer.any())
    assert idle == cost.parameters(structure, GROUPED, run.options, run.objective, run.V).unused


@pytest.mark.parametrize("name", ["encoder_decoder", pytest.param("tied-shared-same-causal", marks=pytest.mark.slow)])
def test_the_gradient_of_shared_layers_is_the_sum_over_depths(name):
    """Of as many layers with weights of their own, all alike."""
    structure = next(s for s in EVERY_STRUCTURE if s.name == name)
    one, many = (run_of(structure, Options(share_layers=share), loss="targets") for share in (True, False))
    params = perturbed(program(one, PLAIN).model.init(0))

    def with_layers(tree, change):
        return {
            k: {**v, "layers": jax.tree.map(change, v["layers"])} if isinstance(v, dict) else v for k, v in tree.items()
        }

    _, batch = some_batch(one)
    loss, ours = jax.jit(functools.partial(loss_and_gradient, program(one, PLAIN)))(params, batch)
    copied = with_layers(params, lambda leaf: np.repeat(leaf, GROUPED.L, axis=0))
    same, apart = jax.jit(functools.partial(loss_and_gradient, program(many, PLAIN)))(copied, batch)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    summed = with_layers(apart, lambda leaf: np.sum(leaf, axis=0, keepdims=True))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_z_loss_is_in_the_gradient_alone():
    """Written out from the logits; parts of the head and microbatches add up."""
    weight, structure = 0.3, STRUCTURES["prefix_lm"]
    run = run_of(structure, Options(z_loss=weight, logit_softcap=4.0), shape=ONE_LAYER)
    p, without = (program(replace(run, options=options), PLAIN)
                  for options in (run.options, replace(run.options, z_loss=0.0)))  # fmt: skip
    params = perturbed(p.model.init(0))
    _, batch = some_batch(run)

    def written_out(params):
        logits = p.model(params, p.forms[0], batch.inputs, batch.targets)
        Z = jnp.sum(jnp.exp(logits), axis=-1)
        likelihood = jnp.take_along_axis(logits, batch.labels[..., None], axis=-1)[..., 0] - jnp.log(Z)
        return jnp.mean(-likelihood + weight * jnp.log(Z) ** 2)

    def in_parts(params):
        return jnp.mean(token_losses(p.model, p.forms[0], params, batch, at_once=600))

    likelihood, other = jax.jit(functools.partial(loss_and_gradient, without))(params, batch)
    expected = jax.jit(jax.grad(written_out))(params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (other, expected)), strict=True)) > 1e-3
    cut = functools.partial(loss_and_gradient, program(run, replace(PLAIN, microbatches=2)))
    for value, gradient in (jax.jit(jax.value_and_grad(in_parts))(params), jax.jit(cut)(params, batch)):
        np.testing.assert_allclose(value, likelihood, rtol=1e-6)
        for a, b in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_z_loss_does_not_reach_padding():
    objective = Objective(name="pairs", S=3, T=3, buckets=((3, 3, 1),))
    run = make_run("prefix_lm", shape=ONE_LAYER, options=Options(z_loss=0.5), objective=objective, batch=2)
    p = program(run, PLAIN)
    params = perturbed(p.model.init(0))
    batch = pairs(p.forms[0], [np.array([1, 2, 3]), np.array([4])], [np.array([5, 6]), np.array([], int)], BYTES)

    @jax.jit
    def gradient(chosen):
        return jax.grad(lambda params: jnp.sum(chosen * token_losses(p.model, p.forms[0], params, batch)))(params)

    scored = batch.labels != p.model.pad
    assert 0 < scored.sum() < scored.size
    padding, text = (jax.tree.leaves(gradient(chosen.astype(np.float32))) for chosen in (~scored, scored))
    assert not any(np.any(leaf) for leaf in padding) and all(np.any(leaf) for leaf in text)


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_their_gradients_are_their_formulas(name):
    """With JAX's derivative of the formula, in float32 and bfloat16."""

    def formula(x, scale):
        x32 = x.astype(jnp.float32)
        if name == "layer":
            x32 = (x32 - jnp.mean(x32, -1, keepdims=True)) / jnp.sqrt(jnp.var(x32, -1, keepdims=True) + 1e-6)
        if name == "rms":
            x32 = x32 / jnp.sqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)
        return (x32 * scale[None, None]).astype(x.dtype)

    rng = np.random.default_rng(0)
    for dtype, off in ((jnp.float32, 2e-5), (jnp.bfloat16, 0.05)):
        x, d_out = (jnp.asarray(rng.normal(1.0, 2.0, (2, 3, 48)), dtype) for _ in range(2))
        scale = jnp.asarray(rng.normal(1.0, 0.2, 48), jnp.float32)
        (ours, back), (theirs, expected) = (jax.vjp(function, x, scale) for function in (NORMS[name], formula))
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=off, rtol=off)
        for a, b in zip(back(d_out), expected(d_out), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.float32(a), np.float32(b), atol=off, rtol=off)


def test_shared_layers_have_fewer_parameters_and_the_same_flops():
    """But for one memory that all depths read: its keys and values are projected once."""
    for structure in ALL_TWO_STREAM:
        one, many = (
            cost.forward(structure, GROUPED, Options(share_layers=share), Objective(S=6, T=5), 260)
            for share in (True, False)
        )
        saved = 2 * 6 * 2 * 12 * 2 * 6 * (GROUPED.L - 1) if structure.memory == "final" else 0
        assert {k: many[k] - one[k] for k in many} == {"exact": saved, "dense": saved, "6nd": 0, "textbook": 0}


def test_published_parameters_of_albert():
    """albert-base-v2 (Lan et al. 2019): 11,683,584, of which it has by itself tables of 512 positions and 2 segments, a
    norm of the embedding, biases, and a pooler of D x D."""
    shape = Shape(D=768, F=3072, N=12, K=12, H=64, L=12, L_input=12)
    options = Options(
        mlp="gelu", norm="layer", norm_place="post", qk_norm=False, share_layers=True, embedding_width=128
    )
    objective = Objective(name="masked_lm", S=512, T=64)
    ours = cost.parameters(STRUCTURES["encoder_only"], shape, options, objective, 30_000).total
    positions, biases = 512 * 128 + 2 * 128, 768 + 4 * 768 + 3072 + 768 + 2 * 768
    assert ours + positions + 2 * 128 + biases + 768 * 769 == 11_683_584
