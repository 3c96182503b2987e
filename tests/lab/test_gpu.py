"""On a GPU: the fused kernel against the reference, the structures against the processor, training and resuming."""

import functools
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.attention import attend
from lab.data import describe
from lab.execution import Execution
from lab.forms import forms
from lab.preemption import Preempted
from lab.spec import Budget, Options, Seed
from lab.train import train, train_together
from lab.transformer import Transformer
from runs import EVERY_STRUCTURE, make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no GPU"),
]
LENGTHS = {"square": (256, 256), "targets over memory and targets": (96, 256), "odd": (65, 131)}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("T, S", LENGTHS.values(), ids=LENGTHS)
def test_the_fused_kernel_is_the_reference(T, S, causal):
    """bf16 products differ by their rounding, forward and gradient; an even length is cuDNN's own."""
    rng = np.random.default_rng(T)
    q, k, v, along = (
        jnp.asarray(rng.normal(size=(2, n, heads, 64)), jnp.bfloat16) for n, heads in ((T, 4), (S, 2), (S, 2), (T, 4))
    )

    def loss(how, q, k, v):
        out = attend(q, k, v, causal=causal, how=how)
        return jnp.sum(out.astype(jnp.float32) * along.astype(jnp.float32)), out

    def both(how):
        return jax.jit(jax.value_and_grad(functools.partial(loss, how), argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, ours), gradients = both("fused")
    (_, theirs), expected = both("reference")
    for a, b in zip((ours, *gradients), (theirs, *expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
    if S % 2 == 0:
        text = jax.jit(functools.partial(attend, causal=causal, how="fused")).lower(q, k, v).compile().as_text()
        assert "cudnn" in (text or "").lower() or "fmha" in (text or "").lower()


@pytest.mark.parametrize("structure", EVERY_STRUCTURE, ids=lambda s: s.name)
def test_a_structure_is_what_it_is_on_the_processor(structure):
    run = make_run(structure)
    model = Transformer(
        structure=run.structure, shape=run.shape, options=Options(), V=run.V, sep=256, pad=258, attention="blocked"
    )
    params, (form,) = model.init(0), forms(run.objective)
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, 256, (3, form.S)), rng.integers(0, 256, (3, form.T))
    if structure.encoder_only:
        targets = np.sort(rng.permuted(np.tile(np.arange(form.S), (3, 1)), axis=1)[:, : form.T], axis=1)

    def logits(where):
        with jax.default_device(where), jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(model.__call__, static_argnums=1)(params, form, inputs, targets))

    np.testing.assert_allclose(logits(jax.devices()[0]), logits(jax.devices("cpu")[0]), rtol=0, atol=2e-4)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """Stopped by a signal and started again, a run ends where one that was left alone ends."""
    run = replace(make_run("prefix_lm"), data=describe("markov").data, budget=Budget(unit="steps", amount=40))
    settings = Execution(steps_per_dispatch=4, scan=False, attention="blocked")
    whole = train(run, tmp_path / "whole", execution=settings)
    assert whole["status"] == "done" and "NVIDIA" in whole["measured"]["device"]

    def stop(step, *_):
        if step >= 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(run, tmp_path / "cut", execution=settings, on_progress=stop)
    again = train(run, tmp_path / "cut")
    assert again["measured"]["attempts"] == 2
    assert again["outcome"]["loss"] == pytest.approx(whole["outcome"]["loss"], rel=1e-4)


def test_runs_side_by_side_are_those_alone(tmp_path):
    base = replace(make_run("encoder_decoder"), data=describe("markov").data)
    runs = [replace(base, seed=Seed(init=i, data=i)) for i in range(3)]
    packed = train_together(runs, [tmp_path / f"packed-{i}" for i in range(3)])
    for i, (run, result) in enumerate(zip(runs, packed, strict=True)):
        alone = train(run, tmp_path / f"alone-{i}")
        assert result["outcome"]["loss"] == pytest.approx(alone["outcome"]["loss"], rel=1e-3)
