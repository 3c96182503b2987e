"""A plan that changed: what is new, dropped and kept is said, by arm and budget, and what no plan has any more is counted."""

import logging
import shlex

import pytest

import sweeps
from sweeps.changes import changes, outside
from sweeps.cli.main import main
from sweeps.execute import prepared
from sweeps.store import Store

STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    return Study(name="changed", question="?", baseline="a", budgets={budgets}, batch=4, window=1, learning_rate=0.01,
                 arms={{"a": arm("decoder_only", corpus("markov"), S=8, T=8)}}, seeds=2, sizes=ladder(8, depth=1, head_width=8))
"""
HEAD = "2 runs new, 2 dropped, 2 kept"
CELLS = ["  new: 2 of a at 2e+08", "  dropped: 2 of a at 5e+07", "  kept: 2 of a at 1e+08"]


@pytest.fixture
def study(tmp_path):
    """A directory with a plan of two budgets, and a file that now has one of them and another."""
    path, out = tmp_path / "changed.py", tmp_path / "out"
    path.write_text(STUDY.format(budgets=(5e7, 1e8)))
    main(["plan", str(path), "--out", str(out)])
    path.write_text(STUDY.format(budgets=(1e8, 2e8)))
    return path, out


def test_the_difference_by_arm_and_budget(study, tmp_path):
    path, out = study
    plan = sweeps.plan(sweeps.load(str(path)))
    said = changes(Store(out), plan)
    assert HEAD in said[0] and said[1:] == CELLS
    assert changes(Store(tmp_path / "new"), plan) == []
    prepared(plan, out)
    assert changes(Store(out), plan) == []


def test_without_a_command_it_is_a_warning(study, caplog):
    path, out = study
    with caplog.at_level(logging.WARNING):
        prepared(sweeps.plan(sweeps.load(str(path))), out)
    assert HEAD in caplog.text and CELLS[1] in caplog.text


def test_plan_prints_it(study, capsys):
    capsys.readouterr()
    main(["plan", str(study[0]), "--out", str(study[1])])
    out = capsys.readouterr().out
    assert HEAD in " ".join(out.split()) and all(line in out for line in CELLS)


def test_run_prints_it_and_status_counts_what_no_plan_has(study, capsys):
    path, out = study
    main(["run", str(out), "--workers", "1"])
    assert "outside the plan" not in status(capsys, out)
    with pytest.raises(SystemExit):
        main(["run", str(path), "--out", str(out)])
    assert "the plan changed under its runs" in " ".join(capsys.readouterr().err.split())
    main(["run", str(path), "--out", str(out), "--workers", "1", "--replace-plan"])
    said = capsys.readouterr().err
    assert HEAD in " ".join(said.split()) and all(line in said for line in CELLS)
    assert len(outside(Store(out))) == 2
    assert "2 runs outside the plan, such as decoder_only-d8" in status(capsys, out)


def test_what_is_said_about_failed_runs_tries_them_again(study, capsys, monkeypatch):
    """Of a study that was named by its file, with a directory of its own."""
    path, out = study
    path.write_text(STUDY.format(budgets=(5e7, 1e8)))
    store = Store(out)
    for run_id in store.runs:
        store.fail(store.claim(run_id), "no luck")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["run", str(path), "--out", str(out)])
    said = capsys.readouterr().err.rpartition("once the cause is gone: ")[2].strip()
    monkeypatch.setattr("sweeps.execute.run", lambda *_, **__: None)
    main(shlex.split(said.removeprefix("lab ")))
    assert said.endswith("--retry") and [s.state for s in Store(out).status()] == ["waiting"] * 4


def status(capsys, out) -> str:
    capsys.readouterr()
    main(["status", str(out)])
    return capsys.readouterr().out
