"""Reference times that are measured: all that a run needs, by keys that say what was measured, added to and never mixed."""

import json
from dataclasses import replace

import pytest

import lab.calibrate
from lab import cost, reference_times
from lab.calibrate import calibrate, measured, wanted
from lab.hyperparameters import Numbers
from lab.ledger import Ledger
from lab.spec import Budget, Objective, Optimizer
from lab.technique import Technique
from runs import TINY, make_run


def test_a_table_serves_the_runs_that_it_was_measured_for(tmp_path):
    """Sophia under layer dropping needs every depth, an estimate and an update; what is there already is not measured again."""
    run = make_run(technique=Technique(name="layer_dropping", settings=Numbers({"gamma": 50.0})),
                   optimizer=Optimizer(name="sophia_g", learning_rate=1e-3))  # fmt: skip
    path, said = tmp_path / "times.json", []
    table = calibrate([run], path, steps=3, on_progress=lambda key, number, of: said.append(key))
    kinds = {key.split("/", 1)[1] for key in table.entries}
    assert kinds == {"train/0 x4", "train/1 x4", "train/2 x4", "hessian/sophia_g/2 x2", "update/sophia_g/2 x0"}
    assert all(seconds > 0 for seconds in table.entries.values()) and sorted(said) == sorted(table.entries)
    entry = json.loads(path.read_text())["entries"][said[0]]
    assert entry["steps"] == 3 and entry["mean"] > 0 and entry["precision"] == "f32" and entry["shape"]["batch"] == 4
    timed = replace(run, budget=reference_times.budget(table, 20 * sum(table.entries.values())))
    ledger = Ledger(timed, timed.V)
    while ledger.fits:
        ledger.charge()
    assert ledger.spent == cost.planned(timed, timed.V) and ledger.spent["steps"] > 5
    said.clear()
    calibrate([run, make_run()], path, steps=3, on_progress=lambda key, number, of: said.append(key))
    assert [key.split("/", 1)[1] for key in said] == ["update/adamw/2 x0"]
    path.write_text(path.read_text().replace('"backend": "cpu"', '"backend": "abacus"'))
    with pytest.raises(ValueError, match="write to another file"):
        calibrate([run], path, steps=3)


def test_streams_of_unequal_depths_need_every_pair_of_them():
    """Each stream skips by its own probabilities, so that any number of one's layers meets any of the other's."""
    run = make_run("encoder_decoder", shape=replace(TINY, L=3, L_input=2), budget=Budget(unit="steps", amount=300),
                   technique=Technique(name="layer_dropping", settings=Numbers({"gamma": 1e3, "theta": 0.2})))  # fmt: skip
    ledger, met = Ledger(run, run.V), set()
    while ledger.fits:
        active = ledger.method.operations(ledger.moment)[0].active
        assert active is not None
        met.add((active.all_inputs, active.targets))
        ledger.charge()
    kinds = {key.split("/", 1)[1] for key in wanted([run])}
    names = {(i, t): f"train/{t if i == t else f'{i}+{t}'} x4" for i in range(3) for t in range(4)}
    assert kinds == {*names.values(), "update/adamw/2+3 x0"}
    assert {names[pair] for pair in met} <= kinds and len(met) > 8


def test_an_update_that_does_more_at_times_is_charged_the_mean(monkeypatch):
    """Of SOAP with an interval of 4: three updates of one second and one of nine."""
    run = make_run(optimizer=Optimizer(name="soap", learning_rate=1e-3, extra=Numbers({"interval": 4})))
    ((key, what),) = [(key, what) for key, what in wanted([run]).items() if "update" in key]
    assert key.endswith("update/soap,interval=4/2 x0")
    given, now = [], [0.0]

    def update(state, gradient):
        given.append(state.get("step", 0))
        now[0] += 9.0 if len(given) % 4 == 2 else 1.0
        return {**state, "step": len(given)}

    monkeypatch.setattr(lab.calibrate, "compile_lowered", lambda lowered: update)
    monkeypatch.setattr(lab.calibrate.time, "perf_counter", lambda: now[0])
    found = measured(*what, 10)
    assert found["steps"] == 12 and found["seconds"] == found["mean"] == 3.0
    assert given == list(range(15))  # each the state that the one before it left


def test_averages_are_measured(tmp_path):
    runs = [make_run(technique=Technique(name=name)) for name in ("ema", "lawa")]
    table = calibrate(runs, tmp_path / "times.json", steps=3)
    kinds = {key.split("/", 1)[1] for key in table.entries}
    assert kinds == {"train/2 x4", "update/adamw/2 x0", "average/ema/2 x0", "average/lawa,window=5/2 x0"}


def test_keys_tell_apart_what_takes_another_time():
    run = make_run()
    others = [
        replace(run, batch=5), replace(run, precision="bf16"), replace(run, objective=Objective(S=7, T=4)),
        replace(run, shape=replace(TINY, F=16)), replace(run, shape=replace(TINY, L=3, L_input=3)),
        replace(run, options=replace(run.options, qk_norm=False)), make_run("prefix_lm"),
    ]  # fmt: skip
    keys = [next(iter(wanted([r]))) for r in (run, *others)]
    assert len(set(keys)) == len(keys)
    muon = [
        make_run(optimizer=Optimizer(name="muon", learning_rate=1.0, extra=Numbers({"iterations": n}))) for n in (5, 6)
    ]
    assert len({tuple(wanted([r])) for r in muon}) == 2
    alike = [replace(run, seed=replace(run.seed, init=3)), replace(run, optimizer=Optimizer(learning_rate=1.0))]
    assert all(list(wanted([r])) == list(wanted([run])) for r in alike)
