"""Commands on a study that ran: what they print, what they delete, what they refuse."""

import contextlib
import shutil

import pandas as pd
import pytest

import sweeps
from lab import records
from lab.preemption import Superseded
from lab.program import program_key
from lab.spec import from_json
from lab.train import restore_parameters, train_together
from sweeps import Study, arm, corpus
from sweeps.cli.main import main
from sweeps.ladder import ladder
from sweeps.launch.worker import work
from sweeps.store import Store


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A study of four runs: two done (one of them at its second attempt), one failed, one cancelled."""
    directory = tmp_path_factory.mktemp("ended") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTERLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        study = Study(name="control", question="?", baseline="a", budgets=(2e8,), batch=4, window=1, seeds=4,
                      learning_rate=0.01, arms={"a": arm("decoder_only", corpus("markov"), S=8, T=8)},
                      sizes=ladder(8, depth=1, head_width=8))  # fmt: skip
        store = Store(directory)
        store.write_plan(sweeps.plan(study).to_json())
        stopped, failing, cancelled, _ = store.runs
        store.cancel([cancelled])
        seen = []

        def train(runs, claims, superseded):
            if runs[0].run_id == failing:
                raise RuntimeError("no luck today")
            stop = runs[0].run_id == stopped and stopped not in seen
            seen.append(runs[0].run_id)
            train_together(runs, [c.run_dir for c in claims], earlier=[c.earlier for c in claims],
                           checkpoint_seconds=0, superseded=lambda: stop)  # fmt: skip

        work(store, train, program_key)
        assert seen.count(stopped) == 2
    return directory, dict(zip(("stopped", "failing", "cancelled", "done"), store.runs, strict=True))


@pytest.fixture
def study(ended, tmp_path):
    """A copy, to be changed."""
    shutil.copytree(ended[0], tmp_path / "study")
    return tmp_path / "study", ended[1]


def lab(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_status(study, capsys):
    directory, ids = study
    out = lab(capsys, "status", directory)
    assert "2 done, 0 running, 0 waiting, 1 failed, 1 cancelled" in out
    assert "failed (error)" in " ".join(out.split()) and ids["done"][:20] in out
    assert "2 done" in lab(capsys, "status", directory, "--watch")  # all of it has ended, so it returns
    assert "no plan.json" in refused(capsys, "status", directory / "nothing")


def test_logs(study, capsys):
    directory, ids = study
    out = lab(capsys, "logs", directory, ids["failing"])
    assert "no luck today" in out and "== failed (error) after 1 attempts" in out
    assert "no luck" not in lab(capsys, "logs", directory, ids["done"])
    assert "none of its runs begins so" in refused(capsys, "logs", directory, "nonesuch")
    assert "4 runs begin so" in refused(capsys, "logs", directory, "decoder_only")


def test_retry_and_cancel(study, capsys):
    directory, ids = study
    assert "1 runs wait again" in lab(capsys, "retry", directory)
    assert "0 runs wait again" in lab(capsys, "retry", directory)
    assert "1 runs wait again" in lab(capsys, "retry", directory, ids["cancelled"])
    assert "2 waiting" in lab(capsys, "status", directory)
    assert "2 runs cancelled" in lab(capsys, "cancel", directory, "decoder_only")  # what is done stays done
    assert "2 done, 0 running, 0 waiting, 2 cancelled" in lab(capsys, "status", directory)
    assert "name those" in refused(capsys, "cancel", directory)


def test_gc_keeps_what_can_be_sampled_unless_it_is_told(study, capsys):
    directory, ids = study
    store = Store(directory)
    attempts = records.attempts(store.directory(ids["stopped"]))
    assert len(attempts) == 2
    run = from_json(store.runs[ids["stopped"]]["run"])
    before = restore_parameters(run, store.directory(ids["stopped"]))[1]
    said = lab(capsys, "gc", directory, "--dry")
    assert "would be freed" in said and list(attempts[1].glob("checkpoints/*"))
    assert lab(capsys, "gc", directory).split()[0] == said.split()[0]  # the same number of MiB
    assert not list(attempts[1].glob("checkpoints/*")) and len(list(attempts[0].glob("checkpoints/*"))) == 1
    after = restore_parameters(run, store.directory(ids["stopped"]))[1]
    assert str(before) == str(after)
    assert lab(capsys, "gc", directory).startswith("0.0 MiB of 0 runs")
    lab(capsys, "gc", directory, "--last")
    with pytest.raises(ValueError, match="no checkpoint here"):
        restore_parameters(run, store.directory(ids["stopped"]))
    assert "2 done" in lab(capsys, "status", directory)


@pytest.fixture
def half(study):
    """The study's failing run, tried again and cancelled half-way; a later attempt has begun a checkpoint and not ended it."""
    directory, ids = study
    store = Store(directory)
    store.retry([ids["failing"]])
    with store.claim(ids["failing"]) as claim:
        with contextlib.suppress(Superseded):
            saved = claim.run_dir / "checksums"
            train_together([store.begin(claim)], [claim.run_dir], checkpoint_seconds=0,
                           superseded=lambda: any(saved.glob("*.json")))  # fmt: skip
        store.cancel([ids["failing"]])
    later = store.directory(ids["failing"]) / "attempts" / "0009-0123abcd" / "checkpoints" / "7"
    later.mkdir(parents=True)
    (later / "part").write_bytes(b"x" * 100)
    return directory, ids["failing"], claim.run_dir, later


def test_gc_keeps_what_a_cancelled_run_would_go_on_from(half, capsys):
    directory, run_id, run_dir, later = half
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())
    lab(capsys, "gc", directory)
    left = [int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()]
    assert left == steps[-1:] and (run_dir / "checksums" / f"{steps[-1]}.json").exists() and not later.exists()
    assert "1 runs wait again" in lab(capsys, "retry", directory, run_id)
    with Store(directory).claim(run_id) as claim:
        assert claim.event.content["from_step"] == steps[-1]
        Store(directory).cancel([run_id])
    lab(capsys, "gc", directory, "--last")
    assert not list((run_dir / "checkpoints").glob("*"))


def test_logs_where_no_worker_of_this_machine_has_logged(study, capsys):
    directory = study[0]
    out = lab(capsys, "logs", directory)
    assert f"no worker has logged in {directory / 'logs'}" in out and f"lab logs {directory} RUN" in out
    (directory / "logs").mkdir()
    (directory / "logs" / "worker-here-0.log").write_text("at work")
    assert "at work" in lab(capsys, "logs", directory) and "no worker" not in lab(capsys, "logs", directory)


def test_export(study, capsys, tmp_path):
    directory, ids = study
    assert "4 rows" in lab(capsys, "export", directory)
    table = pd.read_parquet(directory / "runs.parquet").set_index("run_id")
    assert dict(table["status"]) == {
        ids["stopped"]: "done", ids["failing"]: "failed", ids["cancelled"]: "cancelled", ids["done"]: "done"
    }  # fmt: skip
    assert dict(table["state"]) == dict(table["status"])
    assert table.loc[ids["failing"], "reason"] == "error" and table.loc[ids["done"], "reason"] == ""
    assert table.loc[ids["stopped"], "attempts"] == 2 and table.loc[ids["done"], "attempts"] == 1
    assert table.loc[ids["done"], "loss"] == records.read_result(directory / "runs" / ids["done"])["outcome"]["loss"]
    lab(capsys, "export", directory, "--out", tmp_path / "runs.csv")
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 4
    assert "end it in .parquet or .csv" in refused(capsys, "export", directory, "--out", tmp_path / "runs.txt")


def test_a_damaged_result_is_exported_as_that_and_refused_by_a_report(study, capsys):
    directory, ids = study
    path = directory / "runs" / ids["done"] / "result.json"
    whole = path.read_text()
    loss = records.read_result(path.parent)["outcome"]["loss"]
    path.write_text(whole.replace(str(loss), str(loss / 2)))
    out = lab(capsys, "export", directory)
    assert "4 rows" in out and f"damaged, and exported without numbers: {ids['done']}" in out and str(path) in out
    table = pd.read_parquet(directory / "runs.parquet").set_index("run_id")
    assert table.loc[ids["done"], "state"] == table.loc[ids["done"], "status"] == "damaged"
    assert "not what the run published" in table.loc[ids["done"], "reason"] and pd.isna(table.loc[ids["done"], "loss"])
    assert table.loc[ids["stopped"], "state"] == "done" and table.loc[ids["stopped"], "loss"] > 0
    said = refused(capsys, "report", directory)
    assert "not what the run published" in said and "copy" in said and "which is whole" in said
    (own,) = (directory / "runs" / ids["done"] / "attempts").glob("*/result.json")
    shutil.copy(own, path)
    assert "damaged, and" not in lab(capsys, "export", directory)
