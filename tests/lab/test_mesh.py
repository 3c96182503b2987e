"""One run on many devices, and many runs side by side, against each alone on one device."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from lab import mesh, records
from lab.attempt import OutOfMemory
from lab.compiled import compiled
from lab.data import describe
from lab.execution import Execution
from lab.mesh import ONE_DEVICE, Mesh
from lab.program import abstract_state, program
from lab.spec import Budget, Evaluation, Objective, Optimizer, Seed, Shape
from lab.structure import LADDER, STRUCTURES
from lab.train import train, train_together
from runs import make_run

TWO_STEPS = Execution(steps_per_dispatch=2, scan=False)
SHAPE = Shape(D=16, F=32, N=4, K=2, H=4, L=2, L_input=2)
EIGHT = pytest.mark.mesh
MESHES = [Mesh(data=8), Mesh(fsdp=8), Mesh(data=2, fsdp=2, tensor=2)]


def wide_run(structure="decoder_only", **parts):
    return make_run(structure, **{"data": describe("markov").data, "batch": 8, "shape": SHAPE, **parts})


def outcome(result):
    """What can be compared between devices: sums are in another order there."""
    numbers = {key: result["outcome"][key] for key in ("loss", "train_loss", "loss_per_position")}
    return np.concatenate([np.atleast_1d(value) for value in numbers.values()])


class Killed(BaseException):
    """Stands for a process that is gone."""


def killed_after(step):
    def progress(done, steps, loss, speed):
        if done >= step:
            raise Killed

    return progress


@pytest.fixture
def alone(tmp_path):
    def trained(run, **options):
        return train(run, tmp_path / f"alone-{run.run_id}", execution=TWO_STEPS, on=ONE_DEVICE, **options)

    return trained


@pytest.mark.parametrize(
    ("batch", "devices", "pack", "expected"),
    [
        (8, 1, 1, ONE_DEVICE),
        (16, 8, 1, Mesh(data=8)),
        (4, 8, 1, Mesh(data=4, tensor=2)),
        (3, 8, 1, ONE_DEVICE),
        (3, 8, 16, Mesh(data=8)),
        (8, 8, 3, ONE_DEVICE),
    ],
)
def test_the_mesh_that_is_chosen(batch, devices, pack, expected):
    assert mesh.choose(batch, devices, pack=pack) == expected
    if pack == 1:
        assert mesh.choose(batch, devices, cut_matrices=True) == replace(expected, data=1, fsdp=expected.data)


def test_a_mesh_in_words():
    assert Mesh.read("data=4, fsdp=2") == Mesh(data=4, fsdp=2) and str(Mesh(data=4, fsdp=2)) == "data=4,fsdp=2"
    for text in ("data", "date=2", "data=x", "data=-1"):
        with pytest.raises(ValueError, match="use data, fsdp, tensor with numbers of devices"):
            Mesh.read(text)
    with pytest.raises(ValueError, match=r"mesh.tensor = 0: use at least 1"):
        Mesh.read("tensor=0")
    with pytest.raises(ValueError, match=r"5 devices, but JAX sees"):
        program(wide_run(), TWO_STEPS, on=Mesh(data=5))


@EIGHT
def test_a_mesh_that_can_not_share_the_work():
    with pytest.raises(ValueError, match="batch = 4 can not be cut in 8: let data \\* fsdp divide the batch"):
        program(replace(wide_run(), batch=4), TWO_STEPS, on=Mesh(data=8))
    with pytest.raises(ValueError, match="12 runs side by side can not be cut over 8 devices"):
        program(wide_run(), TWO_STEPS, on=Mesh(data=8), pack=12)


@EIGHT
@pytest.mark.parametrize("on", MESHES, ids=str)
def test_many_devices_train_what_one_trains(on, alone, tmp_path):
    run = wide_run(evaluation=Evaluation(examples=16, times=2))
    one, many = alone(run), train(run, tmp_path / "many", execution=TWO_STEPS, on=on)
    np.testing.assert_allclose(outcome(many), outcome(one), rtol=3e-6)
    assert many["measured"]["mesh"] == str(on)
    assert many["outcome"]["spent"] == one["outcome"]["spent"]
    assert (tmp_path / "many" / "metrics.jsonl").read_text().count("held_out_loss") == 1


@EIGHT
@pytest.mark.parametrize(
    "settings",
    [dict(scan=True, remat=True), dict(microbatches=2), dict(attention="reference")],
    ids=str,
)
def test_settings_on_many_devices(settings, alone, tmp_path):
    run = wide_run(batch=16)
    execution = replace(TWO_STEPS, **settings)
    many = train(run, tmp_path / "many", execution=execution, on=Mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(outcome(many), outcome(alone(run)), rtol=5e-6)


@EIGHT
@pytest.mark.parametrize("name", [name for name in (*LADDER, "encoder_only") if name != "decoder_only"])
def test_every_structure_on_many_devices(name, alone, tmp_path):
    objective = {} if name != "encoder_only" else dict(objective=Objective(name="masked_lm", S=8, T=3))
    run = wide_run(STRUCTURES[name], **objective)
    many = train(run, tmp_path / "many", execution=TWO_STEPS, on=Mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(outcome(many), outcome(alone(run)), rtol=3e-6)


@EIGHT
@pytest.mark.parametrize(
    "name", ["adafactor", "muon", "soap", "schedule_free_adamw", "sophia_g", "sophia_h", "prodigy"]
)
def test_optimizers_on_many_devices(name, alone, tmp_path):
    """Those whose states are more than moments of the parameters' shapes; the matrices of SOAP's are cut as well."""
    schedule = "constant" if name == "schedule_free_adamw" else "cosine"
    optimizer = Optimizer(name=name, learning_rate=0.5 if name == "prodigy" else 3e-3, schedule=schedule)
    run, on = wide_run(optimizer=optimizer), Mesh(data=2, fsdp=2, tensor=2)
    many = train(run, tmp_path / "many", execution=TWO_STEPS, on=on)
    # In a basis of gradients that hardly have all directions yet, SOAP makes rounding large: as much so where only sums differ.
    np.testing.assert_allclose(outcome(many), outcome(alone(run)), rtol=2e-3 if name == "soap" else 1e-4)
    if name == "soap":
        state = compiled(program(run, TWO_STEPS, on=on)).init(0)["optimizer"][1].inner_states["matrix"].inner_state
        rows = state.sides["shared"]["layers"]["attn"]["q_DNH"]["rows_DD"]
        assert rows.shape == (2, 16, 16) and rows.addressable_shards[0].data.shape == (2, 8, 16)


@EIGHT
def test_a_head_in_parts_on_many_devices(alone, tmp_path, monkeypatch):
    run = wide_run()
    whole = alone(run)
    monkeypatch.setattr("lab.program.LOGITS_AT_ONCE", 260)
    compiled.cache_clear()
    many = train(run, tmp_path / "many", execution=TWO_STEPS, on=Mesh(data=4, fsdp=2))
    compiled.cache_clear()
    np.testing.assert_allclose(outcome(many), outcome(whole), rtol=3e-6)


@EIGHT
def test_the_state_is_cut(tmp_path):
    """Each device holds its part of the matrices and of the optimizer's moments."""
    run, on = wide_run(), Mesh(data=2, fsdp=2, tensor=2)
    built = compiled(program(run, TWO_STEPS, on=on))
    state = built.init(0)
    for kind in (state["params"], state["optimizer"][1].mu):
        q, embedding, norm = kind["shared"]["layers"]["attn"]["q_DNH"], kind["embedding_VD"], kind["shared"]["norm_D"]
        assert [shard.data.shape for shard in q.addressable_shards] == [(2, 8, 2, 4)] * 8
        assert embedding.addressable_shards[0].data.shape == (130, 8)
        assert norm.addressable_shards[0].data.shape == (16,)
    bytes_of = lambda leaves: sum(leaf.size * 4 for leaf in jax.tree.leaves(leaves))  # noqa: E731
    held = sum(leaf.addressable_shards[0].data.size * 4 for leaf in jax.tree.leaves(state))
    assert held < 0.3 * bytes_of(abstract_state(program(run, TWO_STEPS)))


@EIGHT
def test_a_checkpoint_of_one_mesh_goes_on_on_another(alone, tmp_path, caplog):
    run = wide_run()
    expected = outcome(alone(run))
    places = [Mesh(fsdp=8), ONE_DEVICE, Mesh(data=2, fsdp=2, tensor=2)]
    for on, step in zip(places[:2], (3, 5), strict=True):  # each has saved before
        with pytest.raises(Killed):
            train(run, tmp_path, execution=TWO_STEPS, on=on, checkpoint_seconds=0, on_progress=killed_after(step))
    last = train(run, tmp_path, execution=TWO_STEPS, on=places[2])
    assert last["measured"]["attempts"] == 3
    np.testing.assert_allclose(outcome(last), expected, rtol=3e-6)


@EIGHT
def test_matrices_are_cut_where_a_device_could_not_hold_them(alone, tmp_path, monkeypatch):
    run = wide_run()
    expected = outcome(alone(run))
    monkeypatch.setattr("lab.hardware.memory_limit", lambda: 1000)
    many = train(run, tmp_path / "many", execution=TWO_STEPS)
    assert many["measured"]["mesh"] == "fsdp=8"
    np.testing.assert_allclose(outcome(many), expected, rtol=3e-6)


# ---- side by side ------------------------------------------------------------------------------------------------------


def several(count, **parts):
    """Runs of one program: other seeds, learning rates, weight decays and budgets."""
    return [
        wide_run(
            seed=Seed(init=i, data=i // 2),
            optimizer=Optimizer(learning_rate=1e-3 * (1 + i), weight_decay=0.1 * i),
            budget=Budget(unit="steps", amount=8 - 3 * (i % 2)),
            evaluation=Evaluation(examples=16, times=2),
            **parts,
        )
        for i in range(count)
    ]


def together(runs, tmp_path, **options):
    directories = [tmp_path / f"together-{run.run_id}" for run in runs]
    return train_together(runs, directories, execution=TWO_STEPS, **options), directories


def sum_of_losses(lines):
    """Over all steps: a line is the mean of a dispatch, which ends where any run of the pack is evaluated or ends."""
    total, before = 0.0, 0
    for line in lines:
        if "loss" in line:
            total, before = total + line["loss"] * (line["step"] - before), line["step"]
    return total


@pytest.mark.parametrize("structure", ["decoder_only", "encoder_decoder"])
def test_side_by_side_is_as_alone(structure, alone, tmp_path):
    """To rounding: the products of a pack are batched, and their sums in another order (measured: 1e-7)."""
    runs = several(3, structure=STRUCTURES[structure])
    packed, directories = together(runs, tmp_path)
    for run, result, directory in zip(runs, packed, directories, strict=True):
        one = alone(run)
        np.testing.assert_allclose(outcome(result), outcome(one), rtol=1e-6)
        assert result["outcome"]["spent"] == one["outcome"]["spent"]
        assert result["run_id"] == run.run_id and result["measured"]["pack"] == 3
        ours, theirs = (records.read_metrics(d) for d in (directory, tmp_path / f"alone-{run.run_id}"))
        assert [line["step"] for line in ours if "held_out_loss" in line] == [
            line["step"] for line in theirs if "held_out_loss" in line
        ]
        assert ours[-1]["step"] == run.budget.amount
        assert sum_of_losses(ours) == pytest.approx(sum_of_losses(theirs), rel=1e-6)
        assert json.loads((directory / "result.json").read_text()) == result


def test_one_that_diverges_does_not_touch_the_others(alone, tmp_path):
    good, bad, other = several(3)
    bad = replace(bad, optimizer=replace(bad.optimizer, learning_rate=10.0), budget=Budget(unit="steps", amount=60))
    packed, _ = together([good, bad, other], tmp_path)
    assert [result["status"] for result in packed] == ["done", "diverged", "done"]
    assert packed[1]["outcome"]["diverged_at"] == alone(bad)["outcome"]["diverged_at"]
    for result, run in ((packed[0], good), (packed[2], other)):
        np.testing.assert_allclose(outcome(result), outcome(alone(run)), rtol=1e-6)


def test_a_pack_that_is_killed_goes_on(tmp_path):
    """What had ended is not trained again, and the others go on where they were."""
    runs = several(3)
    whole, _ = together(runs, tmp_path / "whole")
    with pytest.raises(Killed):
        together(runs, tmp_path / "killed", checkpoint_seconds=0, on_progress=killed_after(7))
    done = [records.read_result(tmp_path / "killed" / f"together-{run.run_id}") for run in runs]
    assert [result is not None for result in done] == [False, True, False]
    again, _ = together(runs, tmp_path / "killed")
    assert [r["measured"]["attempts"] for r in again] == [2, 1, 2] and [r["measured"]["pack"] for r in again] == [
        2,
        3,
        2,
    ]
    for ours, theirs in zip(again, whole, strict=True):
        np.testing.assert_allclose(outcome(ours), outcome(theirs), rtol=1e-6)


def test_runs_of_different_programs_are_not_packed(tmp_path):
    one, other = several(2)
    other = replace(other, shape=replace(SHAPE, D=8))
    with pytest.raises(ValueError, match="are runs of different programs"):
        together([one, other], tmp_path)


def test_runs_begun_with_other_settings_are_not_packed(alone, tmp_path, caplog):
    runs = several(2)
    directories = [tmp_path / str(i) for i in range(2)]
    with pytest.raises(Killed):
        train(runs[0], directories[0], execution=replace(TWO_STEPS, scan=True), checkpoint_seconds=0,
              on_progress=killed_after(3))  # fmt: skip
    results = train_together(runs, directories, execution=TWO_STEPS)
    assert "2 runs do not train side by side" in caplog.text
    assert [r["measured"]["pack"] for r in results] == [1, 1]
    assert [r["measured"]["execution"]["scan"] for r in results] == [True, False]


@EIGHT
def test_a_pack_is_cut_over_devices_by_runs(alone, tmp_path):
    runs = several(8)
    packed, _ = together(runs, tmp_path)
    for run, result in zip(runs, packed, strict=True):
        np.testing.assert_allclose(outcome(result), outcome(alone(run)), rtol=1e-6)
        assert result["measured"]["mesh"] == "data=8" and result["measured"]["pack"] == 8
    text = compiled(program(runs[0], TWO_STEPS, on=Mesh(data=8), pack=8))
    assert text.memory_bytes < 1.5 * compiled(program(runs[0], TWO_STEPS)).memory_bytes


# ---- memory ------------------------------------------------------------------------------------------------------------


def out_of_memory_once(monkeypatch, fails):
    """Each call of a program that `fails(program)` says so of raises what XLA raises."""
    real = compiled

    def built(p):
        if not fails(p):
            return real(p)

        def advance(*_):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\nmore"
            )

        return replace(real(p), advance=advance)

    monkeypatch.setattr("lab.train.compiled", built)


def test_out_of_memory_halves_the_microbatch_once(alone, tmp_path, monkeypatch, caplog):
    run = wide_run()
    expected = outcome(alone(run))
    out_of_memory_once(monkeypatch, lambda p: p.execution.microbatches == 1)
    result = train(run, tmp_path / "run", execution=TWO_STEPS, on=ONE_DEVICE)
    assert result["measured"]["out_of_memory"] == 1 and result["measured"]["execution"]["microbatches"] == 2
    assert "RESOURCE_EXHAUSTED" in caplog.text and "2 microbatches from here on" in caplog.text
    np.testing.assert_allclose(outcome(result), expected, rtol=1e-6)


def test_out_of_memory_again_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    out_of_memory_once(monkeypatch, lambda p: True)
    with pytest.raises(OutOfMemory, match="no memory for half the examples at once either: use remat, a mesh"):
        train(wide_run(), tmp_path / "twice", execution=TWO_STEPS, on=ONE_DEVICE)
    with pytest.raises(ValueError, match="no memory for 1 examples at once, which can not be halved"):
        train(wide_run(batch=1), tmp_path / "one", execution=TWO_STEPS, on=ONE_DEVICE)


def test_a_pack_without_memory_is_halved(alone, tmp_path, monkeypatch, caplog):
    runs = several(5)
    out_of_memory_once(monkeypatch, lambda p: p.pack > 2)
    packed, _ = together(runs, tmp_path)
    assert [r["measured"]["pack"] for r in packed] == [2, 2, 1, 2, 2] and "RESOURCE_EXHAUSTED" in caplog.text
    assert [r["measured"]["out_of_memory"] for r in packed] == [0] * 5
    for run, result in zip(runs, packed, strict=True):
        assert math.isclose(result["outcome"]["loss"], alone(run)["outcome"]["loss"], rel_tol=1e-6)
