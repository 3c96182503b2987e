"""AdamW, schedules and the ledger against their formulas."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import cost
from lab.execution import Execution
from lab.ledger import Ledger
from lab.optimizers import OPTIMIZERS, decay_mask, hyperparameters, learning_rate
from lab.program import program
from lab.spec import Budget, Optimizer
from runs import make_run

V = 260


def test_adamw_is_its_published_update():
    """Loshchilov and Hutter 2019, algorithm 2, in float64, with clipping before it and decay on one leaf only."""
    settings = Optimizer(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, clip=0.5)
    rng = np.random.default_rng(0)
    p = {"target": {"layers": {"q_DNH": rng.normal(size=(3, 4))}}, "embedding_VD": rng.normal(size=(5,))}
    ours = jax.tree.map(jnp.float32, p)
    optimizer = OPTIMIZERS["adamw"](hyperparameters(settings, steps=5, seed=0), settings.learning_rate, None)
    state = optimizer.init(ours)
    leaves, tree = jax.tree.flatten(p)
    m, v = [np.zeros_like(x) for x in leaves], [np.zeros_like(x) for x in leaves]
    decayed = jax.tree.leaves(decay_mask(p))
    assert sorted(decayed) == [False, True]
    for t in range(1, 6):
        g = [rng.normal(size=x.shape) for x in leaves]
        update, state = optimizer.update(tree.unflatten([jnp.float32(x) for x in g]), state, ours)
        ours = optax.apply_updates(ours, update)
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, 0.5 / norm) for x in g]
        for i, x in enumerate(g):
            m[i] = 0.8 * m[i] + 0.2 * x
            v[i] = 0.9 * v[i] + 0.1 * x**2
            step = m[i] / (1 - 0.8**t) / (np.sqrt(v[i] / (1 - 0.9**t)) + 1e-6)
            leaves[i] = leaves[i] - 0.01 * (step + (0.3 * leaves[i] if decayed[i] else 0))
    for a, b in zip(jax.tree.leaves(ours), leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_decay_acts_on_matrices_of_layers_alone(name):
    params = program(make_run(name), Execution(steps_per_dispatch=1, scan=False)).model.abstract()
    decayed = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if leaf
    }
    assert decayed and all("_norm" not in path and "embedding" not in path for path in decayed)
    matrices = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim >= 3]
    assert len(decayed) == len(matrices)


def schedule(name, **parts):
    return Optimizer(learning_rate=2.0, schedule=name, warmup=0.1, **parts)


@given(st.floats(0, 1))
def test_schedules_are_their_formulas(share):
    warm = min(1.0, share / 0.1)
    progress = max(0.0, (share - 0.1) / 0.9)
    expected = {
        "cosine": 2 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * progress))),
        "linear": 2 * (0.25 + 0.75 * (1 - progress)),
        "wsd": 2 * (0.25 + 0.75 * min(1.0, (1 - share) / 0.4)),
    }
    for name, value in expected.items():
        optimizer = schedule(name, final=0.25, **({"decay": 0.4} if name == "wsd" else {}))
        assert learning_rate(optimizer, share) == pytest.approx(2 * warm if share < 0.1 else value)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_run_is_really_decayed(name):
    """At the middle of its last step the rate is within one step of nothing."""
    run = make_run(optimizer=replace(schedule(name)), budget=Budget(unit="steps", amount=200))
    ledger, rates = Ledger(run, V), []
    while ledger.fits:
        rates.append(learning_rate(run.optimizer, ledger.share_in_step))
        ledger.charge()
    assert len(rates) == 200 and rates[-1] < 0.01 * max(rates) and max(rates) == pytest.approx(2.0, rel=0.02)


@given(st.floats(0.6, 40.0), st.sampled_from(["flops", "tokens", "steps"]))
def test_the_ledger_stops_at_the_planned_step(multiple, unit):
    run = make_run()
    price = cost.train_step(run, V)["exact" if unit == "flops" else unit]
    run = replace(run, budget=Budget(unit=unit, amount=multiple * price))
    ledger = Ledger(run, V)
    while ledger.fits:
        ledger.charge()
    assert ledger.spent == cost.planned(run, V)
    assert abs(ledger.spent[ledger.unit] - run.budget.amount) <= price / 2 * (1 + 1e-9)
