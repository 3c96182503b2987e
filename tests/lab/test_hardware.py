"""Settings of the execution: what is chosen for which device, and what is refused."""

from dataclasses import replace

import jax
import pytest

from lab import hardware
from lab.execution import Execution
from lab.program import program, shapes, token_losses
from lab.structure import STRUCTURES, Structure
from runs import make_run, name_of

V = 260


def test_settings_by_kind_of_device():
    run = make_run("decoder_only")
    deep = replace(run, shape=replace(run.shape, L=12, L_input=12))
    cpu, gpu, tpu = (hardware.choose(run, V, kind) for kind in ("cpu", "gpu", "tpu"))
    assert (cpu.attention, gpu.attention, tpu.attention) == ("blocked", "fused", "blocked")
    assert not cpu.scan and hardware.choose(deep, V, "cpu").scan and hardware.choose(deep, V, "gpu").scan


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(unroll=2), r"execution.unroll = 2: layers are unrolled already; use 1, or scan = True"),
        (dict(steps_per_dispatch=0), r"execution.steps_per_dispatch = 0: use at least 1"),
        (dict(microbatches=-1), r"execution.microbatches = -1: use at least 1"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(settings, said):
    with pytest.raises(ValueError, match=said):
        Execution(**{"steps_per_dispatch": 1, "scan": False, **settings})


def test_settings_that_no_program_has():
    run = make_run("decoder_only")
    with pytest.raises(ValueError, match=r"execution.attention = 'blokked': did you mean 'blocked'\?"):
        program(run, Execution(steps_per_dispatch=1, scan=False, attention="blokked"))
    with pytest.raises(ValueError, match=r"execution.microbatches = 3: use a divisor of batch = 4"):
        program(run, Execution(steps_per_dispatch=1, scan=False, microbatches=3))


SEPARATE_STACKS = Structure(cross="separate", stacks="separate", memory="same", inputs="causal")


@pytest.mark.parametrize("structure", [STRUCTURES["decoder_only"], SEPARATE_STACKS], ids=name_of)
@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_less_of_every_layer(structure, scan):
    """Of the last one too, which runs by itself where nothing reads its inputs."""
    run = make_run(structure)
    run = replace(run, shape=replace(run.shape, L=1, L_input=1))

    def kept(remat):
        p = program(run, Execution(steps_per_dispatch=1, scan=scan, remat=remat))
        batch = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), shapes(p.forms, (run.batch,)))
        params = jax.tree.map(jax.numpy.asarray, p.model.init(0))
        backward = jax.vjp(lambda params: token_losses(p.model, p.forms[0], params, batch), params)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) - sum(leaf.size for leaf in jax.tree.leaves(params))

    assert kept(True) < 0.7 * kept(False)
