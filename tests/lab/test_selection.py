"""Techniques that choose their examples: by a loop over what they are fed, and what they are charged."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import cost
from lab.compiled import compiled
from lab.ledger import method_of, simulated
from lab.method import Moment
from lab.objectives import Batch
from lab.optimizers import hyperparameters
from lab.program import program, token_losses, train_step
from lab.spec import Budget
from lab.techniques.rho_loss import most
from lab.techniques.selective_backprop import probability, remembered
from lab.train import train
from runs import make_run
from technique_runs import ONE, TWO, deep_run, some_batch, technique


def test_rho_trains_on_the_most_reducible():
    """Chosen by the two models' losses, worked out apart; then a plain step on just those."""
    run = make_run(technique=technique("rho_loss", mega_batch=3))
    p = program(run, ONE)
    assert p.inside.examples == 12
    hyper, rate = hyperparameters(run.optimizer, steps=9, seed=0), jnp.float32(0.01)
    state = compiled(p).init(0)
    state["holdout"] = jax.tree.map(jnp.array, p.model.init(1))
    batch = some_batch(run, 12)
    losses_of = jax.jit(lambda params, b: token_losses(p.model, p.forms[0], params, b).mean(axis=1))
    losses = [np.asarray(losses_of(state[of], batch)) for of in ("params", "holdout")]
    rows = np.sort(np.argsort(losses[1] - losses[0])[:4])
    plain = program(replace(run, technique=None), ONE)
    wanted, loss, _ = jax.jit(lambda s, b: train_step(plain, s, b, hyper, rate))(
        {k: state[k] for k in ("params", "optimizer")}, Batch(*(a[rows] for a in batch))
    )
    after, got, _ = jax.jit(lambda s, b: train_step(p, s, b, hyper, rate))(state, batch)
    assert float(got) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), after["params"], wanted["params"])
    assert sorted(most(jnp.array([0.1, 5.0, -1.0, 3.0, 2.0]), 3).tolist()) == [1, 3, 4]


def test_rho_holdout_examples_are_not_chosen_from():
    run = deep_run(technique=technique("rho_loss"), budget=Budget(unit="steps", amount=40))
    method, steps = method_of(run), simulated(run, run.V).steps
    read = [range(first, first + count) for first, count in map(method.examples, range(steps))]
    assert method.first_step == 10 and all(len(r) == 4 for r in read[:10]) and all(len(r) == 8 for r in read[10:])
    every = sorted(place for r in read for place in r)
    assert every == list(range(method.read(steps)))
    assert sum(map(len, read)) == method.read(steps)
    rates = [method.schedule(step, (step + 0.5) / 40) for step in range(steps)]
    assert rates[9] > 0.9 > 0.1 > rates[10] and rates[-1] > 0.9


def test_rho_that_would_repeat_is_refused(tmp_path):
    run = deep_run(technique=technique("rho_loss", mega_batch=100), batch=64, budget=Budget(unit="steps", amount=2000))
    with pytest.raises(ValueError, match="none of which may come again"):
        train(run, tmp_path)


@given(
    st.lists(st.floats(0, 10, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.integers(1, 20),
    st.just(0.0) | st.floats(0.0625, 4),
)
@settings(max_examples=30, deadline=None)
def test_percentile_rank(losses, room, beta):
    """Of each loss among the last `room`, counted one by one."""
    ring, scored = jnp.zeros(room), jnp.zeros((), jnp.int32)
    for start in range(0, len(losses), 3):
        now = jnp.array(losses[start : start + 3], jnp.float32)
        ring, scored = remembered(ring, scored, now)
        seen = losses[: start + 3][-room:]
        expected = [(sum(s <= x for s in seen) / len(seen)) ** beta for x in losses[start : start + 3]]
        np.testing.assert_allclose(probability(ring, scored, now, beta), expected, rtol=1e-5, atol=1e-7)


def test_selective_backprop_trains_on_what_it_keeps():
    """A host's own queue of kept examples: each update takes its first batch, and what is left waits."""
    run = make_run(technique=technique("selective_backprop", history=16))
    p, method, hyper = program(run, ONE), method_of(run), hyperparameters(run.optimizer, steps=9, seed=0)
    plain = program(replace(run, technique=None), ONE)
    step = jax.jit(lambda s, b, fed: train_step(p, s, b, hyper, jnp.float32(0.01), fed=fed))
    plain_step = jax.jit(lambda s, b: train_step(plain, s, b, hyper, jnp.float32(0.01)))
    losses_of = jax.jit(lambda params, b: token_losses(p.model, p.forms[0], params, b).mean(axis=1))
    state = compiled(p).init(0)
    mine, queue, seen, updates = {k: state[k] for k in ("params", "optimizer")}, [], [], 0
    for i in range(10):
        batch, fed = some_batch(run, 4, i), method.feed(Moment(i, 0, 0, 0.0))
        losses = np.asarray(losses_of(mine["params"], batch))
        seen = [*seen, *losses.tolist()][-16:]
        for row, loss in enumerate(losses.tolist()):
            if fed["drawn"][row] < sum(s <= loss for s in seen) / len(seen):
                queue.append(Batch(*(a[row] for a in batch)))
        state, _, norm = step(state, batch, fed)
        assert (norm != -1) == (len(queue) >= 4)
        if len(queue) >= 4:
            mine, _, wanted = plain_step(mine, Batch(*(np.stack(rows) for rows in zip(*queue[:4], strict=True))))
            queue, updates = queue[4:], updates + 1
            assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
        assert int(state["waits"]) == len(queue)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state["params"], mine["params"])
    assert 3 <= updates <= 9


def test_selective_backprop_is_charged_what_it_did(tmp_path):
    """Forward passes and updates as its result counts them; the budget is met to a step."""
    price = cost.prices(deep_run(), 260)[0]["exact"]
    run = deep_run(technique=technique("selective_backprop"), budget=Budget(amount=12.0 * price))
    result = train(run, tmp_path, execution=TWO)
    outcome, forward = result["outcome"], cost.operation(run, run.V, "forward", 4)["exact"]
    assert outcome["spent"]["exact"] == outcome["updates"] * price + outcome["steps"] * forward
    assert outcome["spent"]["tokens"] == outcome["updates"] * 4 * run.objective.length == outcome["tokens_seen"]
    assert abs(outcome["spent"]["exact"] - run.budget.amount) <= price + forward and result["planned_is"] == "expected"
    assert outcome["steps"] > outcome["updates"] > 0
