"""Predicted memory against what the compiler allocates, and the settings that are chosen by it."""

from dataclasses import replace

import pytest

from lab import hardware, memory
from lab.attention import ROWS
from lab.compiled import compiled
from lab.execution import Execution
from lab.program import program
from lab.spec import Objective, Options
from runs import make_run
from sweeps.ladder import shape

V = 260
PLAIN = Execution(steps_per_dispatch=2, scan=False)
OTHER = dict(mlp="geglu", norm="layer", norm_place="sandwich", share_layers=True)
CASES = {
    "unrolled": ("decoder_only", dict(L=2), dict()),
    "loss on all, reference attention": ("decoder_only", dict(L=2, loss="all"), dict(attention="reference")),
    "encoder-decoder, scan": ("encoder_decoder", dict(S=96, T=32), dict(scan=True)),
    "prefix, scan and remat": ("prefix_lm", dict(S=128, T=128), dict(scan=True, remat=True)),
    "tied cross-attention, microbatches": ("tied_cross", dict(L=2, S=32, T=96), dict(microbatches=2)),
    "window": pytest.param("decoder_only", dict(S=192, T=64, window=32), dict(), marks=pytest.mark.slow),
    "learned mixing": pytest.param(
        "prefix_lm", dict(mixing="dense", encoding="none", qk_norm=False), dict(), marks=pytest.mark.slow
    ),
    "encoder-decoder, scan, other options": ("encoder_decoder", dict(S=96, T=32, **OTHER), dict(scan=True)),
    "encoder only, scan": ("encoder_only", dict(name="masked_lm", S=128, T=16), dict(scan=True)),
}


def sized(structure="decoder_only", *, D=64, L=4, batch=16, **given):
    """given: of the objective, or options."""
    options = {name: given.pop(name) for name in vars(Options()).keys() & given}
    objective = Objective(**{"S": 64, "T": 64, **given})
    return make_run(structure, shape=shape(D, L), objective=objective, options=Options(**options), batch=batch)


@pytest.mark.first(2)
@pytest.mark.parametrize(("structure", "objective", "settings"), CASES.values(), ids=CASES)
def test_predicted_is_what_the_compiler_allocates(structure, objective, settings):
    """Within a fifth, arguments and results included."""
    run, execution = sized(structure, **objective), replace(PLAIN, **settings)
    allocated = compiled(program(run, execution)).memory_bytes
    assert memory.predict(run, V, execution).total == pytest.approx(allocated, rel=0.2)


def test_half_a_block_is_half_of_attentions():
    assert 2 * memory.HALF_A_BLOCK == ROWS


def test_devices_and_runs_share_and_multiply():
    run = sized()
    one = memory.predict(run, V, PLAIN)
    cut = memory.predict(run, V, PLAIN, by_batch=4, by_matrix=8)
    assert cut.state == pytest.approx(one.state / 8, rel=1e-3) and cut.activations == pytest.approx(
        one.activations / 4, rel=1e-3
    )
    assert memory.predict(run, V, PLAIN, pack=3).total == pytest.approx(3 * one.total, rel=1e-3)
    assert "MiB (state " in str(one)


def test_settings_give_way_to_memory_one_after_another():
    """Scan, then microbatches that fill a device, then remat, then smaller microbatches; never more than is asked for."""
    run = sized(D=512, L=4, batch=64, S=512, T=512)
    limit, seen = 10**12, []
    while limit > 10**8:
        chosen = hardware.choose(run, V, "cpu", limit=limit)
        predicted = memory.predict(run, V, chosen).total
        if predicted > hardware.SHARE_OF_MEMORY * limit:
            break
        if chosen not in seen:
            seen.append(chosen)
        limit //= 2
    settings = [(e.scan, e.remat, e.microbatches) for e in seen]
    assert settings[0] == (False, False, 1) and settings[1][0]
    assert settings == sorted(settings, key=lambda s: (s[0], s[1], s[2]))
    assert seen[-1].remat and seen[-1].microbatches > 8
    assert all(run.batch // e.microbatches * 1024 >= hardware.FULL_TOKENS or e.remat for e in seen)
    # Where nothing fits, the smallest there is: it is for the device to say no.
    assert hardware.choose(run, V, "cpu", limit=1) == replace(seen[-1], microbatches=64)
    assert hardware.choose(run, V, "cpu", limit=1, rows=4).microbatches == 16


def test_pack_sizes():
    run = sized()
    assert hardware.pack_size(run, V, "cpu", limit=10**12) == 1
    assert hardware.pack_size(run, V, "gpu", limit=10**12) == hardware.MAX_PACK
    one = memory.predict(run, V, hardware.choose(run, V, "gpu")).total
    assert hardware.pack_size(run, V, "gpu", limit=int(5 * one / hardware.SHARE_OF_MEMORY)) == 4
    assert hardware.pack_size(run, V, "gpu", limit=1) == 1


def test_this_machines_limit_is_not_more_than_it_has():
    limit = hardware.memory_limit()
    assert limit is None or 2**20 < limit < 2**50
