"""Every structure against independent models, for what it may see, and for what it can learn."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_models as reference
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms
from lab.objectives import Batch, build, pairs
from lab.program import loss_and_gradient, program, token_losses
from lab.spec import Objective, Options, Shape
from lab.structure import ALL_TWO_STREAM, LADDER, STRUCTURES
from runs import TINY, make_run, name_of, named_first

BYTES = TOKENIZERS["bytes"]
GROUPED = Shape(D=12, F=20, N=4, K=2, H=6, L=3, L_input=3)
UNROLLED = Execution(steps_per_dispatch=1, scan=False)


def perturbed(params, seed=3):
    """Norm scales start at one; move every parameter so that none of them can be mixed up unseen."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: np.float32(p + rng.normal(size=p.shape) * (0.2 * p.std() if p.std() > 0 else 0.1)), params
    )


def logits(run, params, batch, execution=UNROLLED):
    model = program(run, execution).model

    @jax.jit
    def forward(params, inputs, targets):
        return model(params, forms(run.objective)[0], inputs, targets)

    return np.asarray(forward(params, batch.inputs, batch.targets))


def some_batch(run, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (run.batch, run.objective.length)).astype(np.int32)
    return tokens, build(forms(run.objective)[0], tokens, BYTES, seed=seed, first=0)


@pytest.mark.parametrize("loss", ["targets", "all"])
@pytest.mark.parametrize("name", ["prefix_lm", "decoder_only"])
def test_steps_3_and_4_are_the_ordinary_models(name, loss):
    if name == "prefix_lm" and loss == "all":
        pytest.skip("a bidirectional input can not be scored")
    run = make_run(name, shape=GROUPED, objective=Objective(S=6, T=5, loss=loss))
    params = perturbed(program(run, UNROLLED).model.init(0))
    tokens, batch = some_batch(run)
    ours = logits(run, params, batch)
    for row in range(run.batch):
        sequence = np.concatenate([tokens[row, :6], [BYTES.sep], tokens[row, 6:-1]])
        theirs = reference.concatenated(params, sequence, 6, bidirectional_inputs=name == "prefix_lm")
        scored = theirs[6:] if loss == "targets" else np.concatenate([theirs[:5], theirs[6:]])
        np.testing.assert_allclose(ours[row], scored, rtol=0, atol=3e-5)


@pytest.mark.first(16)
@pytest.mark.parametrize("options", [Options(), Options(tied_embeddings=False, mlp="gelu", qk_norm=False, positions="restart")],
                         ids=["default", "other options"])  # fmt: skip
@pytest.mark.parametrize("structure", ALL_TWO_STREAM, ids=name_of)
def test_every_structure_is_its_definition(structure, options):
    run = make_run(structure, shape=GROUPED, options=options)
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    ours = logits(run, params, batch, Execution(steps_per_dispatch=1, scan=options == Options()))
    for row in range(run.batch):
        _, theirs = reference.two_streams(structure, params, batch.inputs[row], batch.targets[row], options=options)
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("structure", [s for s in ALL_TWO_STREAM if s.inputs == "causal"], ids=name_of)
def test_loss_on_all_scores_the_input_streams_own_top(structure):
    run = make_run(structure, shape=GROUPED, objective=Objective(S=6, T=5, loss="all"))
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    ours = logits(run, params, batch)
    for row in range(run.batch):
        inputs, targets = reference.two_streams(structure, params, batch.inputs[row], batch.targets[row])
        np.testing.assert_allclose(ours[row], np.concatenate([inputs[:-1], targets]), rtol=0, atol=3e-5)


@pytest.mark.parametrize("structure", [s for s in ALL_TWO_STREAM if s.stacks == "separate" and s.memory == "final"],
                         ids=name_of)  # fmt: skip
def test_unequal_depths(structure):
    run = make_run(structure, shape=replace(GROUPED, L=1, L_input=3))
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    _, theirs = reference.two_streams(structure, params, batch.inputs[0], batch.targets[0])
    np.testing.assert_allclose(logits(run, params, batch)[0], theirs, rtol=0, atol=3e-5)


def test_encoder_only_is_a_bidirectional_stack():
    run = make_run("encoder_only", shape=GROUPED)
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    alone = {**params, "shared": params["input"]}
    theirs = reference.concatenated(alone, batch.inputs[0], 8, bidirectional_inputs=True)[batch.targets[0]]
    np.testing.assert_allclose(logits(run, params, batch)[0], theirs, rtol=0, atol=3e-5)


@pytest.mark.first(3)
@pytest.mark.parametrize("loss", ["targets", "all"])
@pytest.mark.parametrize("structure", named_first(ALL_TWO_STREAM), ids=name_of)
def test_no_prediction_sees_what_it_predicts_or_later(structure, loss):
    """All tokens differ and the head is untied, so a row of the gradient belongs to one position of the text."""
    if loss == "all" and structure.inputs != "causal":
        pytest.skip("a bidirectional input can not be scored")
    if loss == "all" and structure.cross == "tied":
        pytest.skip("scored inputs are the same whatever the targets' cross-attention")
    S, T = 6, 5
    run = make_run(structure, objective=Objective(S=S, T=T, loss=loss), options=Options(tied_embeddings=False), batch=1)
    p = program(run, UNROLLED)
    params = perturbed(p.model.init(0))
    tokens = np.arange(40, 40 + S + T, dtype=np.int32)[None]
    batch = build(forms(run.objective)[0], tokens, BYTES, seed=0, first=0)

    @jax.jit
    def gradient(params, chosen):
        """Of the loss at one position; which one is data, so that all positions share a program."""
        return jax.grad(lambda params: jnp.dot(chosen, token_losses(p.model, p.forms[0], params, batch)[0]))(params)

    first = 1 if loss == "all" else S
    for row, position in enumerate(range(first, S + T)):
        found = gradient(params, np.eye(S + T - first, dtype=np.float32)[row])
        reach = np.abs(found["embedding_VD"]).sum(-1) + np.abs(found.get("target_embedding_VD", np.zeros((1, 1)))).sum(
            -1
        )
        assert np.all(reach[40 + position : 40 + S + T] == 0.0), f"position {position} is leaked"
        assert np.all(reach[40 : 40 + min(S, position)] > 0.0), f"position {position} does not see its inputs"


@pytest.mark.parametrize("structure", ALL_TWO_STREAM, ids=name_of)
def test_causal_inputs_see_no_later_input(structure):
    """Through the memory: with one target, only the inputs' own attention decides which inputs shape a stream."""
    run = make_run(structure, objective=Objective(S=6, T=1), batch=1)
    p = program(run, replace(UNROLLED, attention="reference"))
    params = perturbed(p.model.init(0))
    reached = []
    import lab.layers as layers

    def watch(q, k, v, *, causal, **rest):
        if q.shape[1] == k.shape[1] == 6:
            reached.append(causal)
        return real(q, k, v, causal=causal, **rest)

    real, layers.attend = layers.attend, watch
    try:
        _, batch = some_batch(run)
        token_losses(p.model, p.forms[0], params, batch)
    finally:
        layers.attend = real
    layers = run.shape.L - (structure.memory == "same")
    assert reached == [structure.inputs == "causal"] * layers


@pytest.mark.parametrize("structure", [s for s in ALL_TWO_STREAM if s.memory == "same" and s.inputs == "bidirectional"],
                         ids=name_of)  # fmt: skip
def test_one_layer_of_same_memory_makes_the_inputs_dial_idle(structure):
    """What `structure.canonical` says: two structures, one function."""
    shape = replace(TINY, L=1, L_input=1)
    bi, causal = make_run(structure, shape=shape), make_run(replace(structure, inputs="causal"), shape=shape)
    params = perturbed(program(bi, UNROLLED).model.init(0))
    _, batch = some_batch(bi)
    np.testing.assert_array_equal(logits(bi, params, batch), logits(causal, params, batch))


@pytest.mark.first(2)
@pytest.mark.parametrize("name", [*LADDER, "encoder_only"])
def test_microbatches_add_up(name):
    run = make_run(name, batch=8)
    params = perturbed(program(run, UNROLLED).model.init(0))
    _, batch = some_batch(run)
    whole, cut = (
        jax.jit(functools.partial(loss_and_gradient, program(run, replace(UNROLLED, microbatches=parts))))(
            params, batch
        )
        for parts in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.first(6)
@pytest.mark.parametrize("execution", [dict(scan=True), dict(scan=True, unroll=2), dict(remat=True), dict(scan=True, remat=True),
                                       dict(attention="reference"), dict(scan=True, unroll=3, remat=True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["encoder_decoder", "prefix_lm", "decoder_only"])
def test_the_execution_changes_no_number(name, execution):
    plain, other = gradient_of(name, UNROLLED), gradient_of(name, replace(UNROLLED, **execution))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@functools.cache
def gradient_of(name, execution):
    run = make_run(name, shape=GROUPED)
    params = perturbed(program(run, UNROLLED).model.init(0))
    return jax.jit(functools.partial(loss_and_gradient, program(run, execution)))(params, some_batch(run)[1])


@pytest.mark.parametrize("rows", [1, 4, 10, 3])
def test_a_head_in_parts_gives_the_same_losses_and_gradients(rows):
    run = make_run("decoder_only", objective=Objective(S=6, T=5, loss="all"))
    model = program(run, UNROLLED).model
    params = perturbed(model.init(0))
    _, batch = some_batch(run)
    weights = np.random.default_rng(0).normal(size=batch.labels.shape).astype(np.float32)

    def value_and_gradient(at_once):
        def total(params):
            losses = token_losses(model, forms(run.objective)[0], params, batch, at_once=at_once)
            return jnp.sum(losses * weights), losses

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    whole, cut = value_and_gradient(2**25), value_and_gradient(rows * model.V)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_head_in_parts_never_holds_all_logits():
    run = make_run("decoder_only", objective=Objective(S=6, T=5, loss="all"))
    model = program(run, UNROLLED).model
    _, batch = some_batch(run)

    def largest(at_once):
        traced = jax.make_jaxpr(
            jax.grad(lambda p: jnp.sum(token_losses(model, forms(run.objective)[0], p, batch, at_once=at_once)))
        )(model.init(0))
        return max(_sizes(traced.jaxpr))

    assert largest(2**25) == batch.labels.size * model.V
    assert largest(4 * model.V) < batch.labels.size * model.V / 2


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _sizes(inner)


def test_bf16_stays_near_f32_and_keeps_f32_parameters_and_loss():
    run = make_run("prefix_lm", shape=GROUPED)
    params = program(run, UNROLLED).model.init(0)
    _, batch = some_batch(run)
    half = replace(run, precision="bf16")
    low, high = logits(half, params, batch), logits(run, params, batch)
    assert low.dtype == np.float32 and all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert 0 < np.abs(low - high).max() < 0.1
    gradient = jax.jit(functools.partial(loss_and_gradient, program(half, UNROLLED)))(params, batch)[1]
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))


def test_arms_of_one_seed_start_alike_where_they_share_parts():
    decoder, encdec = (program(make_run(name), UNROLLED).model.init(5) for name in ("decoder_only", "encoder_decoder"))
    np.testing.assert_array_equal(decoder["embedding_VD"], encdec["embedding_VD"])
    np.testing.assert_array_equal(
        decoder["shared"]["layers"]["attn"]["q_DNH"], encdec["input"]["layers"]["attn"]["q_DNH"]
    )


def test_named_points_are_the_ladder():
    steps = itertools.pairwise(STRUCTURES[name] for name in LADDER)
    changed = [[dial for dial, value in vars(less).items() if value != vars(more)[dial]] for more, less in steps]
    assert changed == [["cross"], ["cross"], ["stacks"], ["memory"], ["inputs"]]


PADDED = Objective(name="pairs", S=7, T=6, buckets=((7, 6, 1),))


@pytest.mark.parametrize("attention", ["reference", "blocked"])
@pytest.mark.parametrize("structure", named_first(ALL_TWO_STREAM), ids=name_of)
def test_no_structure_sees_padding(structure, attention):
    """A padded pair predicts what the pair alone does, by definition."""
    loss = "all" if structure.inputs == "causal" and attention == "blocked" else "targets"
    run = make_run(structure, shape=GROUPED, objective=replace(PADDED, loss=loss))
    params = perturbed(program(run, UNROLLED).model.init(0))
    rng = np.random.default_rng(2)
    sources, targets = ([rng.integers(0, 256, n) for n in lengths] for lengths in ((7, 4, 1), (5, 2, 0)))
    batch = pairs(forms(run.objective)[0], sources, targets, BYTES)
    ours = logits(run, params, batch, replace(UNROLLED, attention=attention))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        from_inputs, theirs = reference.two_streams(structure, params, source, np.array([BYTES.sep, *target]))
        np.testing.assert_allclose(ours[row, -6:][: len(target) + 1], theirs, rtol=0, atol=3e-5)
        if loss == "all":
            np.testing.assert_allclose(ours[row, 7 - len(source) : 6], from_inputs[:-1], rtol=0, atol=3e-5)


def test_padding_has_no_gradient_and_no_weight():
    """Two pairs in one padded batch: the mean over their own tokens, and its gradient, are those of the pairs alone."""
    run = make_run("encoder_decoder", shape=GROUPED, objective=PADDED, batch=2)
    p = program(run, UNROLLED)
    params = perturbed(p.model.init(0))
    rng = np.random.default_rng(3)
    sources, targets = ([rng.integers(0, 256, n) for n in lengths] for lengths in ((5, 2), (4, 1)))
    loss, gradient = jax.jit(functools.partial(loss_and_gradient, p))(
        params, pairs(p.forms[0], sources, targets, BYTES)
    )
    sums = []
    for source, target in zip(sources, targets, strict=True):
        form = replace(p.forms[0], S=len(source), T=len(target) + 1)
        alone = pairs(form, [source], [target], BYTES)
        sums.append(jax.jit(jax.value_and_grad(
            lambda params, b=alone, f=form: jnp.sum(token_losses(p.model, f, params, b))
        ))(params))  # fmt: skip
    scored = sum(len(target) + 1 for target in targets)
    np.testing.assert_allclose(loss, sum(value for value, _ in sums) / scored, rtol=1e-5)
    expected = jax.tree.map(lambda *g: sum(g) / scored, *(g for _, g in sums))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    if run.options.tied_embeddings:
        assert p.model.pad < run.V


@pytest.mark.parametrize("attention", ["reference", "blocked"])
def test_packed_documents_do_not_see_each_other(attention):
    run = make_run("decoder_only", shape=GROUPED, objective=Objective(name="causal_lm", S=0, T=17, attended=40))
    params = perturbed(program(run, UNROLLED).model.init(0))
    texts = [np.arange(10, 10 + n) for n in (5, 1, 7)]
    entering = np.concatenate([[BYTES.sep, *text] for text in texts] + [[BYTES.sep]]).astype(np.int32)[None]
    ours = logits(
        run, params, Batch(np.zeros((1, 0), np.int32), entering, entering), replace(UNROLLED, attention=attention)
    )
    theirs = [
        reference.concatenated(params, np.array([BYTES.sep, *text]), 0, bidirectional_inputs=False)
        for text in [*texts, []]
    ]
    np.testing.assert_allclose(ours[0], np.concatenate(theirs), rtol=0, atol=3e-5)


def test_restarted_positions_and_padding_are_refused():
    with pytest.raises(ValueError, match=r"options\.positions = 'restart': pairs are padded"):
        make_run("encoder_decoder", objective=PADDED, options=Options(positions="restart"))
