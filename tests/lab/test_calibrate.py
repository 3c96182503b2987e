"""Reference times that are measured: all that a run needs, by keys that say what was measured, added to and never mixed."""

import json
from dataclasses import replace

import pytest

from lab import cost, reference_times
from lab.calibrate import calibrate, wanted
from lab.ledger import Ledger
from lab.spec import Objective, Optimizer
from lab.technique import Technique
from runs import TINY, make_run


def test_a_table_serves_the_runs_that_it_was_measured_for(tmp_path):
    """Sophia under layer dropping needs every depth, an estimate and an update; what is there already is not measured again."""
    run = make_run(technique=Technique(name="layer_dropping", settings={"gamma": 50.0}),
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


def test_keys_tell_apart_what_takes_another_time():
    run = make_run()
    others = [
        replace(run, batch=5), replace(run, precision="bf16"), replace(run, objective=Objective(S=7, T=4)),
        replace(run, shape=replace(TINY, F=16)), replace(run, shape=replace(TINY, L=3, L_input=3)),
        replace(run, options=replace(run.options, qk_norm=False)), make_run("prefix_lm"),
    ]  # fmt: skip
    keys = [next(iter(wanted([r]))) for r in (run, *others)]
    assert len(set(keys)) == len(keys)
    alike = [replace(run, seed=replace(run.seed, init=3)), replace(run, optimizer=Optimizer(learning_rate=1.0))]
    assert all(list(wanted([r])) == list(wanted([run])) for r in alike)
