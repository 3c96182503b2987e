"""Sophia's extra pass: what it estimates, what it executes, and that it is charged as it runs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.interpreters import partial_eval

import flop_counter
from lab import cost
from lab.attempt import parameter_hash
from lab.checkpoint import Checkpoints
from lab.curvature import ESTIMATES
from lab.data import describe
from lab.execution import Execution
from lab.forms import Objective
from lab.hyperparameters import Optimizer
from lab.ledger import Ledger
from lab.objectives import Batch
from lab.program import abstract_state, curvature, program, shapes, token_losses
from lab.spec import Budget, Options, Shape
from lab.train import restore_parameters, train
from runs import make_run

V = 260
REFERENCE = Execution(steps_per_dispatch=2, scan=False, attention="reference")
GROUPED = Shape(D=12, F=20, N=4, K=2, H=6, L=2, L_input=2)


def sophia(kind="sophia_g", **extra):
    return Optimizer(name=kind, learning_rate=1e-3, extra=extra)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("parts", [1, 2])
def test_estimates_are_the_diagonal_of_the_hessian_in_the_mean(kind, parts):
    """Of a linear softmax model the Gauss-Newton matrix is the Hessian: p (1 - p) x^2 on its diagonal, mean over examples."""
    rng = np.random.default_rng(0)
    x_BD, labels_B = jnp.float32(rng.normal(size=(6, 3))), jnp.int32(rng.integers(0, 4, 6))
    params = {"w_DV": jnp.float32(rng.normal(size=(3, 4)))}

    def total(params, batch, drawn):
        logits = batch.inputs @ params["w_DV"]
        labels = batch.labels if drawn is None else jax.random.categorical(drawn, logits)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    batch = Batch(x_BD, x_BD, labels_B)
    estimate = jax.jit(jax.vmap(lambda key: ESTIMATES[kind](total, params, batch, 6, key, parts)["w_DV"]))
    many = np.asarray(estimate(jax.random.split(jax.random.key(1), 20_000)))
    p_BV = np.asarray(jax.nn.softmax(x_BD @ params["w_DV"]))
    exact = np.einsum("BV,BD->DV", p_BV * (1 - p_BV), np.asarray(x_BD) ** 2) / 6
    error = many.std(axis=0) / np.sqrt(len(many))
    assert np.all(np.abs(many.mean(axis=0) - exact) < 4.5 * error) and np.all(error < 0.05 * exact)


def test_labels_are_drawn_from_what_the_model_predicts():
    """Their mean loss is the entropy; in parts, each with numbers of its own, too. Padding carries no loss."""
    run = make_run("prefix_lm")
    p = program(run, REFERENCE)
    params = jax.tree.map(lambda x: 3 * jnp.asarray(x), p.model.init(0))
    batch = Batch(*(np.random.default_rng(0).integers(0, 256, (4, n)).astype(np.int32) for n in (6, 5, 5)))
    logp = jax.nn.log_softmax(p.model(params, p.forms[0], batch.inputs, batch.targets))
    entropy_BP = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    for at_once in (2**25, 5 * V):

        @jax.jit
        @jax.vmap
        def losses(key, at_once=at_once):
            return token_losses(p.model, p.forms[0], params, batch, at_once=at_once, drawn=key)

        drawn = losses(jax.random.split(jax.random.key(0), 400))
        assert jnp.abs(drawn.mean(axis=0) - entropy_BP).max() < 6 * drawn.std() / 20
        assert len(np.unique(np.asarray(drawn[:, 0, 0]))) > 3


CASES = {
    "decoder": ("decoder_only", Options(), "targets"),
    "decoder, loss on all, own head": ("decoder_only", Options(tied_embeddings=False, qk_norm=False), "all"),
    "encoder-decoder": ("encoder_decoder", Options(mlp="gelu"), "targets"),
    "prefix": ("prefix_lm", Options(), "targets"),
    "prefix, mixing": (
        "prefix_lm",
        Options(mixing="dense", encoding="none", qk_norm=False, share_layers=True),
        "targets",
    ),
    "tied cross-attention, factors": (
        "tied_cross",
        Options(embedding_width=5, encoding="t5", block="parallel"),
        "targets",
    ),
}


@pytest.mark.parametrize("kind", ["sophia_g", "sophia_h"])
@pytest.mark.parametrize(("structure", "options", "loss"), CASES.values(), ids=CASES)
def test_the_extra_pass_is_charged_as_it_runs(kind, structure, options, loss):
    """A walk over the program, without what nothing reads, finds the counted products and no others."""
    objective = Objective(S=6, T=5, loss=loss)
    run = make_run(structure, shape=GROUPED, options=options, objective=objective, batch=5,
                   optimizer=sophia(kind, hessian_share=0.6))  # fmt: skip
    p = program(run, REFERENCE)
    assert p.hessian_examples == 3
    traced = jax.make_jaxpr(functools.partial(curvature, p))(
        p.model.abstract(), shapes(p.forms, (run.batch,)), jax.random.key(0)
    )
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    assert flop_counter._walk(needed) == cost.refresh(run, V)["dense"]


def test_it_is_charged_in_every_convention():
    """Gauss-Newton costs what training on so many examples does; a step of several takes none of its tokens again."""
    run = make_run("prefix_lm", optimizer=sophia(hessian_share=0.5))
    whole, extra = cost.prices(run, V)[0], cost.refresh(run, V)
    for convention in cost.CONVENTIONS:
        assert 2 * extra[convention] == whole[convention]
    assert extra["tokens"] == extra["steps"] == 0
    assert cost.train_step(run, V)["exact"] == pytest.approx(1.05 * whole["exact"])
    second = cost.refresh(replace(run, optimizer=sophia("sophia_h", hessian_share=0.5)), V)
    assert 8 / 3 < second["exact"] / extra["exact"] < 3
    assert cost.refresh(make_run(), V)["exact"] == 0 == cost.refreshes(make_run(), 10)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["exact", "dense", "6nd", "textbook", "tokens", "steps"]), st.integers(1, 12), st.floats(1.0, 60.0)
)
def test_planned_is_spent_to_the_last_digit(unit, interval, amount):
    flops = unit in cost.CONVENTIONS
    run = make_run(optimizer=sophia(interval=interval))
    price, extra = cost.prices(run, V)[0][unit], cost.refresh(run, V)[unit]
    budget = Budget(unit="flops" if flops else unit, amount=amount * (price + extra),
                    **({"convention": unit} if flops else {}))  # fmt: skip
    run = replace(run, budget=budget)
    ledger = Ledger(run, V)
    spent = 0
    while ledger.fits:
        spent += price + (extra if ledger.steps % interval == 0 else 0)
        ledger.charge()
        assert ledger.spent[unit] == spent
    assert ledger.spent == cost.planned(run, V) and ledger.steps == cost.steps(run, V)
    # The next step would end further from the budget than this does, and the last one was nearer than none.
    assert abs(spent - budget.amount) <= (price + extra) / 2 + 1e-6 * budget.amount


def test_what_it_can_not_do_is_refused():
    several = Objective(name="prefix_lm", S=6, T=5, splits=(3, 6))
    with pytest.raises(ValueError, match="estimate of the Hessian is of steps of one form"):
        make_run("prefix_lm", objective=several, optimizer=sophia())
    with pytest.raises(ValueError, match="pack = 2: of runs side by side sophia_g's extra pass"):
        program(make_run(optimizer=sophia()), REFERENCE, pack=2)


def trained(tmp_path, optimizer, **parts):
    run = make_run(data=describe("markov").data, optimizer=optimizer, **parts)
    return run, train(run, tmp_path, execution=replace(REFERENCE, microbatches=2))


def test_a_run_pays_for_its_extra_pass(tmp_path):
    price = cost.prices(make_run(), V)[0]["exact"]
    _, result = trained(tmp_path, sophia(interval=3), budget=Budget(amount=8.0 * price))
    outcome = result["outcome"]
    assert result["status"] == "done" and outcome["spent"] == result["planned"] and outcome["steps"] == 7
    assert outcome["spent"]["exact"] == 7 * price + 3 * price // 2


def test_schedule_free_is_evaluated_at_its_average(tmp_path):
    """The hash in the result, what is evaluated and what is handed on are x, and not y, which is trained."""
    optimizer = Optimizer(name="schedule_free_adamw", learning_rate=3e-2, schedule="constant")
    run, result = trained(tmp_path, optimizer)
    _, params = restore_parameters(run, tmp_path)
    assert parameter_hash(params) == result["outcome"]["parameter_hash"]
    checkpoints = Checkpoints(tmp_path, run_id=run.run_id)
    state = checkpoints.latest_state(abstract_state(program(run, REFERENCE)))
    checkpoints.close()
    for x, y, z in zip(*map(jax.tree.leaves, (params, state["params"], state["optimizer"][1].z)), strict=True):
        np.testing.assert_allclose(y, 0.9 * x + 0.1 * z, rtol=1e-4, atol=1e-6)
    assert parameter_hash(state["params"]) != result["outcome"]["parameter_hash"]
