"""Losses fall where they can and stay where they must; the first steps are what they were."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lab.data import Examples, describe, load
from lab.data.tokenizers import TOKENIZERS
from lab.execution import Execution
from lab.forms import forms
from lab.objectives import Batch, build
from lab.optimizers import hyperparameters
from lab.program import initial_optimizer, program, train_step
from lab.spec import Objective, Optimizer, Shape
from lab.structure import ALL_TWO_STREAM, LADDER
from runs import EVERY_STRUCTURE, make_run, name_of, named_first

GOLDEN = Path(__file__).parent / "golden" / "first_losses.json"
BYTES = TOKENIZERS["bytes"]
SMALL = Shape(D=32, F=64, N=2, K=2, H=16, L=2, L_input=2)
TOGETHER = 50  # steps of one call: divides all numbers of them but 20, so that there is one program a structure
HYPER = hyperparameters(Optimizer(learning_rate=1.0, weight_decay=0.0), steps=1, seed=0)


def losses(run, batches, rate, seed=0):
    """Training losses on these batches, one step each."""
    p = program(run, Execution(steps_per_dispatch=1, scan=False))
    params = p.model.init(seed)
    state = {"params": params, "optimizer": initial_optimizer(p, params)}

    found = []
    for at in range(0, len(batches), TOGETHER):
        stacked = Batch(*(np.stack(arrays) for arrays in zip(*batches[at : at + TOGETHER], strict=True)))
        state, some = steps_of(p)(state, stacked, np.float32(rate))
        found.append(np.asarray(some))
    return np.concatenate(found)


@functools.cache
def steps_of(p):
    @jax.jit
    def steps(state, batches, rate):
        def body(state, batch):
            state, loss, _ = train_step(p, state, batch, HYPER, rate)
            return state, loss

        return jax.lax.scan(body, state, batches)

    return steps


def random_text(run, steps, symbols, *, copied=False, seed=0):
    rng, o = np.random.default_rng(seed), run.objective
    for step in range(steps):
        tokens = rng.integers(97, 97 + symbols, (run.batch, o.length)).astype(np.int32)
        if copied:
            tokens[:, o.S :] = tokens[:, : o.T]
        yield build(forms(o)[0], tokens, BYTES, seed=seed, first=step * run.batch)


@pytest.mark.first(2)
@pytest.mark.parametrize("structure", named_first(EVERY_STRUCTURE), ids=name_of)
def test_learns_what_is_there_and_nothing_else(structure):
    """One batch again and again is learned by heart; so are targets that repeat random inputs, which only what is read from
    the inputs can predict; of fresh independent tokens nothing is learned, and the loss stays at ln V."""
    run = make_run(structure, shape=SMALL, batch=16)
    batch = next(iter(random_text(run, 1, 16)))
    fell = losses(run, [batch] * 150, rate=1e-2)
    assert fell[0] > 4 and fell[-1] < 0.1
    if not structure.encoder_only:
        copied = losses(run, list(random_text(run, 600, 8, copied=True)), rate=4e-3)
        assert copied[-20:].mean() < 0.25 * math.log(8)
    stayed = losses(run, list(random_text(run, 150, 4)), rate=4e-3)
    # A tenth of the masked tokens stays in sight (BERT's recipe), and then they are known.
    least = 0.9 * math.log(4) if structure.encoder_only else math.log(4)
    assert least - 0.01 < stayed[-30:].mean() < 2.0


def test_a_leak_would_be_seen():
    """The same test with the labels let into the target stream one place early: the loss falls far below ln V."""
    run = make_run("decoder_only", shape=SMALL, batch=16)
    leaky = [b._replace(targets=b.labels) for b in random_text(run, 150, 4)]
    assert losses(run, leaky, rate=4e-3)[-30:].mean() < 0.5 * math.log(4)


def test_loss_on_all_tokens_of_independent_text():
    for structure in (s for s in ALL_TWO_STREAM if s.inputs == "causal" and s.cross == "merged" and s.memory == "same"):
        run = make_run(structure, shape=SMALL, batch=32, objective=Objective(S=6, T=5, loss="all"))
        assert losses(run, list(random_text(run, 100, 4)), rate=4e-3)[-30:].mean() > math.log(4) - 0.01


def first_losses(name: str) -> list[float]:
    run = make_run(name, shape=SMALL, objective=Objective(S=12, T=12), data=describe("markov").data, batch=8)
    examples = Examples(load(run.data), run.objective.length, seed=0)
    batches = [
        build(forms(run.objective)[0], examples.batch(step, 8), BYTES, seed=0, first=8 * step) for step in range(20)
    ]
    return [float(loss) for loss in losses(replace(run, data=run.data), batches, rate=3e-3)]


@pytest.mark.first(2)
@pytest.mark.parametrize("name", LADDER)
def test_first_losses_are_the_golden_ones(name):
    """To 1e-4 across versions and processors. `python tests/lab/test_learning.py` writes them anew."""
    np.testing.assert_allclose(first_losses(name), json.loads(GOLDEN.read_text())[name], rtol=1e-4)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({name: first_losses(name) for name in LADDER}, indent=1) + "\n")
