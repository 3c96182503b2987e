"""muP and CompleteP: their tables, and coordinate checks that their steps keep their size where the standard one's do not."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms
from lab.objectives import build
from lab.optimizers import OPTIMIZERS, hyperparameters, scales
from lab.parametrization import Parametrization
from lab.program import initial_optimizer, program, train_step
from lab.spec import Optimizer, Options, Shape, from_json, to_json
from runs import make_run

STEPS, RATE = 4, 3e-3
BASE = dict(base_D=16, base_H=8)
DEEP = Parametrization(name="completep", **BASE, base_L=2)


PLAIN = Options(qk_norm=False)
MIXED = Options(mixing="dense", encoding="learned", qk_norm=False)
FACTORS = Options(
    embedding_width=8, encoding="t5", norm_place="sandwich", norm="layer", block="parallel", qk_norm=False
)


def run_of(structure, how, D=16, L=1, optimizer="adamw", options=PLAIN, N=2):
    """Heads grow in width, too: N = 2 throughout."""
    return make_run(
        structure,
        shape=Shape(D=D, F=2 * D, N=N, K=N, H=D // N, L=L, L_input=L),
        options=replace(options, parametrization=how),
        batch=16,
        optimizer=Optimizer(name=optimizer, learning_rate=RATE, weight_decay=0.0, clip=1e9),
    )


@functools.cache
def moved(structure, how, **size) -> np.ndarray:
    """How far what the head reads, and its logits, have moved after a few steps: root mean squares, means over two seeds."""
    run = run_of(structure, how, **size)
    p = program(run, Execution(steps_per_dispatch=1, scan=run.shape.L > 1, attention="reference"))
    text = np.random.default_rng(0).integers(97, 113, (run.batch, run.objective.length)).astype(np.int32)
    batch = build(forms(run.objective)[0], text, TOKENIZERS["bytes"], seed=0, first=0)
    hyper = hyperparameters(run.optimizer, steps=STEPS, seed=0)

    @jax.jit
    def distances(params):
        start = {"params": params, "optimizer": initial_optimizer(p, params)}
        end = jax.lax.fori_loop(0, STEPS, lambda _, s: train_step(p, s, batch, hyper, jnp.float32(RATE))[0], start)

        def read(params):
            hidden = p.model.hidden(params, p.forms[0], jnp.asarray(batch.inputs), jnp.asarray(batch.targets))
            return hidden, p.model.head(params, hidden)

        before, after = read(params), read(end["params"])
        return jnp.stack([jnp.sqrt(jnp.mean(jnp.square(b - a))) for a, b in zip(before, after, strict=True)])

    return np.mean([distances(jax.tree.map(jnp.asarray, p.model.init(seed))) for seed in range(2)], axis=0)


@pytest.mark.parametrize("structure", ["decoder_only", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_with_mup_steps_are_as_large_at_any_width(structure):
    """Tensor Programs V, figure 5: from width 16 to 128 the standard parametrization's steps grow; muP's do not. Of the logits'
    movement that part falls, as the root of the width, which comes through initial rows of the head."""
    mup, standard = Parametrization(name="mup", **BASE), Parametrization()
    small = moved(structure, standard)
    grown, scaled = moved(structure, standard, D=128) / small, moved(structure, mup, D=128) / small
    assert np.all(grown > 2.5) and 0.7 < scaled[0] < 1.3 and 0.35 < scaled[1] < 1.3, (grown, scaled)


@pytest.mark.slow
@pytest.mark.parametrize("options", [MIXED, FACTORS], ids=["mixing", "factors"])
def test_with_mup_every_option_moves_as_far_at_any_width(options):
    mup = Parametrization(name="mup", **BASE)
    scaled = moved("decoder_only", mup, D=128, options=options) / moved("decoder_only", mup, options=options)
    assert 0.6 < scaled[0] < 1.5 and 0.3 < scaled[1] < 1.5, scaled


@pytest.mark.parametrize("structure", ["prefix_lm", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_with_completep_steps_are_as_large_at_any_depth(structure):
    """From 2 layers to 16 steps of the standard parametrization move the output further; CompleteP's as far as at 2."""
    completep, standard = Parametrization(name="completep", **BASE, base_L=2), Parametrization()
    small = moved(structure, standard, L=2)
    grown, scaled = moved(structure, standard, L=16) / small, moved(structure, completep, L=16) / small
    assert np.all(grown > 1.7) and np.all(np.abs(np.log(scaled)) < 0.3), (grown, scaled)


def test_at_the_base_all_are_the_standard_one():
    standard = moved("decoder_only", Parametrization())
    assert np.array_equal(moved("decoder_only", Parametrization(name="completep", **BASE, base_L=1)), standard)


@functools.cache
def model(how, D=64, L=6, structure="encoder_decoder"):
    return program(run_of(structure, how, D=D, L=L), Execution(steps_per_dispatch=1, scan=False)).model


def test_groups_have_the_published_multipliers():
    """CompleteP's table 1 at alpha = 1, with m = 4 and l = 3; muP's is that of width alone, and leaves decay and eps."""
    completep, mup = Parametrization(name="completep", **BASE, base_L=2), Parametrization(name="mup", **BASE)
    groups = {
        ("target", "layers", "attn", "q_DNH"): (1 / 4, 4, 1 / 12),
        ("target", "layers", "mlp", "down_FD"): (1 / 4, 4, 1 / 12),
        ("input", "layers", "attn_norm_D"): (1, 1, 1 / 12),
        ("target", "norm_D"): (1, 1, 1 / 4),
        ("embedding_VD",): (1, 1, 1 / 4),
    }
    for how, rest in ((completep, slice(0, 3)), (mup, slice(0, 1))):
        m = model(how)
        found = scales(m.options, m.shape, m.abstract())
        assert found is not None
        for path, expected in groups.items():
            leaves = []
            for tree in found:
                for name in path:
                    tree = tree[name]
                leaves.append(tree)
            assert leaves == pytest.approx([*expected[rest], *(1, 1, 1)[rest.stop :]])
    assert scales(Options(), m.shape, m.abstract()) is None


def test_parameters_of_options_have_theirs():
    """At m = 4, l = 3 and twice as many heads as the base: rate, decay, eps."""

    def of(options, name):
        run = run_of("decoder_only", DEEP, D=64, L=6, N=4, options=options)
        m = program(run, Execution(steps_per_dispatch=1, scan=False)).model
        found = scales(m.options, m.shape, m.abstract())
        each = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in found]
        (path,) = (path for path in each[0] if path[-1].key == name)
        return [float(tree[path]) for tree in each], m.init(0)

    expected = {
        (MIXED, "mix_NAA"): (1, 1, 1 / 6), (MIXED, "place_AD"): (1, 1, 1 / 4), (MIXED, "v_DKH"): (1 / 4, 4, 1 / 12),
        (FACTORS, "relative_NR"): (1, 1, 1 / 2), (FACTORS, "embedding_VE"): (1, 1, 1), (FACTORS, "embedding_ED"): (1, 1, 1 / 4),
        (FACTORS, "attn_out_norm_D"): (1, 1, 1 / 12),
    }  # fmt: skip
    for (options, name), theirs in expected.items():
        ours, params = of(options, name)
        assert ours == pytest.approx(theirs), name
        if name in ("place_AD", "embedding_ED"):
            assert params[name].std() == pytest.approx(16**-0.5, rel=0.1)


def test_a_branch_is_smaller_by_depth_after_a_sandwichs_second_norm():
    """Which would undo what is multiplied before it: with l = 4 each of 4 branches adds a quarter of a normalised vector."""
    sandwich = replace(FACTORS, embedding_width=None, encoding="none")
    completep = Parametrization(name="completep", **BASE, base_L=1)
    m = program(
        run_of("decoder_only", completep, L=4, options=sandwich), Execution(steps_per_dispatch=1, scan=False)
    ).model
    layer = m.layer({}, "shared", jax.tree.map(lambda p: jnp.asarray(p[0]), m.init(0)["shared"]["layers"]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    normed = layer.before_attention(x)
    added = layer.after_attention(x, normed, None, jnp.ones((2, 3, 2, 8))) - x
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(added), axis=-1)), 1 / 4, rtol=1e-3)


def test_initial_sizes_are_the_published_ones():
    """Tables' rows as the base's, matrices by fan-in, the last of a branch smaller by the base's number of branches."""
    params = model(Parametrization(name="completep", **BASE, base_L=2)).init(0)
    assert params["embedding_VD"].std() == pytest.approx(16**-0.5, rel=0.03)
    layers = params["input"]["layers"]
    assert layers["attn"]["q_DNH"].std() == pytest.approx(64**-0.5, rel=0.03)
    assert layers["attn"]["o_NHD"].std() == pytest.approx((64 * 2 * 2) ** -0.5, rel=0.03)
    standard = model(Parametrization()).init(0)["input"]["layers"]
    assert standard["attn"]["o_NHD"].std() == pytest.approx((64 * 2 * 6) ** -0.5, rel=0.03)


def test_eps_and_decay_reach_their_groups():
    """A step of one group is Adam's with its own rate, decay and eps, in float64."""
    run = run_of("decoder_only", Parametrization(name="completep", **BASE, base_L=1), D=32, L=2)
    p = program(run, Execution(steps_per_dispatch=1, scan=False))
    settings = Optimizer(learning_rate=0.1, eps=0.5, weight_decay=0.3, clip=1e9)
    hyper = hyperparameters(settings, steps=1, seed=0)
    params = p.model.init(0)
    gradient = jax.tree.map(lambda x: np.random.default_rng(1).normal(size=x.shape).astype(np.float32), params)
    optimizer = OPTIMIZERS["adamw"](hyper, 0.1, scales(p.model.options, p.model.shape, params))
    move, _ = optimizer.update(gradient, optimizer.init(params), params)
    path = lambda tree: tree["shared"]["layers"]["mlp"]["up_DF"]  # noqa: E731
    g, w = np.float64(path(gradient)), np.float64(path(params))
    # m = 2, l = 2; the first step of Adam is g / (|g| + eps).
    expected = -0.1 / 2 * (g / (np.abs(g) + 0.5 / 4) + 0.3 * 2 * w)
    np.testing.assert_allclose(path(move), expected, rtol=1e-5)
    g = np.float64(gradient["embedding_VD"])
    np.testing.assert_allclose(move["embedding_VD"], -0.1 * g / (np.abs(g) + 0.5 / 2), rtol=1e-5)


def test_runs_say_what_they_are_relative_to():
    run = run_of("decoder_only", Parametrization(name="mup", **BASE))
    assert from_json(to_json(run)) == run
    assert run.run_id != run_of("decoder_only", Parametrization()).run_id


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parametrization(name="muP"), r"parametrization\.name = 'muP': use one of standard, mup, completep"),
        (lambda: Parametrization(name="mup", base_D=8), r"base_H = None: mup is relative to a base model: give its H"),
        (lambda: Parametrization(name="mup", **BASE, base_L=2), r"base_L = 2: mup does not depend on it: use null"),
        (lambda: Parametrization(base_D=8), "standard does not depend on it"),
        (lambda: Parametrization(name="completep", base_D=0, base_H=8, base_L=1), "at least 1"),
        (lambda: run_of("decoder_only", Parametrization(name="mup", **BASE), optimizer="muon"), "should scale is not known"),
        (lambda: Options(norm_place="post", parametrization=DEEP), "norm_place='post' normalises every sum"),
        (lambda: Options(share_layers=True, parametrization=DEEP), "share_layers adds up their gradients"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
