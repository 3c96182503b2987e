"""Budgets of a study: a moment that is one wherever it is read, and FLOPs that count what came to nothing."""

import json
import shutil
import time
from datetime import UTC, datetime

import pytest

import sweeps
from lab import records
from small_studies import publish, result_of
from sweeps import Settings, Study, arm, corpus
from sweeps.cli.main import main
from sweeps.cli.studies import end_of
from sweeps.execute import within
from sweeps.ladder import ladder
from sweeps.launch.worker import work
from sweeps.store import Store


@pytest.fixture
def store(tmp_path):
    """Four runs: one failed after half of its budget and two attempts, one cancelled after a quarter, one before it began."""
    study = Study(name="budgets", question="?", baseline="a", budgets=(2e8,), batch=4, window=1, seeds=4, learning_rate=0.01,
                  arms={"a": arm("decoder_only", corpus("markov"), S=8, T=8)},
                  sizes=ladder(8, depth=1, head_width=8))  # fmt: skip
    store = Store(tmp_path / "study")
    store.write_plan(sweeps.plan(study).to_json())
    failing, cancelled, never, _ = store.runs
    for share in (0.25, 0.5):
        with store.claim(failing) as claim:
            written(claim, share)
            if share == 0.5:
                store.fail(claim, "no luck")
    with store.claim(cancelled) as claim:
        written(claim, 0.25)
        store.cancel([cancelled])
    store.cancel([never])
    return store


def written(claim, share) -> None:
    claim.run_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"step": 1, "share": share, "loss": 1.0, "seconds": 1.0})
    (claim.run_dir / records.METRICS).write_text(line + '\n{"step": 2, "sh')


def exact(store) -> int:
    return next(iter(store.runs.values()))["planned"]["exact"]


def test_flops_of_attempts_that_came_to_nothing_count(store, caplog):
    """Each from where it began: neither attempt of the failed run had a checkpoint to go on from."""
    assert store.spent() == pytest.approx((0.25 + 0.5 + 0.25) * exact(store))
    assert within(store, Settings(most_flops=1.1 * exact(store))) and not caplog.text
    assert not within(store, Settings(most_flops=0.9 * exact(store))) and "nothing more is begun" in caplog.text
    assert within(store, Settings(most_flops=1.0, hosts="10.0.0.1:9876,2,0")) and within(store, Settings())


def test_flops_count_alike_whoever_asks_and_when(store):
    """Another process, one without the index, after a retry, while it trains, and after its end."""
    (failed, _, _, fourth), whole = store.runs, exact(store)
    before = store.spent()
    store.retry()
    assert store.spent() == Store(store.root).spent() == before
    with store.claim(failed) as claim:
        written(claim, 0.3)
        assert Store(store.root).spent() == pytest.approx(before + 0.3 * whole)
        records.write_json(
            claim.run_dir / records.RESULT, {**result_of(store.begin(claim)), "outcome": {"spent": {"exact": whole}}}
        )
        assert store.publish(claim)
    assert store.spent() == pytest.approx(before + whole)
    with store.claim(fourth) as claim:
        written(claim, 0.5)
        records.write_json(claim.run_dir / "checksums" / "1.json", {"schema": 1})
    steps = store.runs[fourth]["planned"]["steps"]
    with store.claim(fourth) as claim:  # goes on from step 1
        written(claim, 0.75)
        store.fail(claim, "no luck")
    spent = before + (1 + 0.5 + 0.75 - 1 / steps) * whole
    assert store.spent() == pytest.approx(spent)
    shutil.rmtree(store.root / "ended")
    assert Store(store.root).spent() == pytest.approx(spent) and list((store.root / "ended").iterdir())


def test_steps_that_a_result_was_resumed_from_count_once(store):
    """A result is of the whole run: of the attempt before it only what was trained again counts beside it."""
    fourth, whole, before = list(store.runs)[3], exact(store), store.spent()
    steps = store.runs[fourth]["planned"]["steps"]
    with store.claim(fourth) as claim:  # to the half, with a checkpoint at step 1
        written(claim, 0.5)
        records.write_json(claim.run_dir / "checksums" / "1.json", {"schema": 1})
    with store.claim(fourth) as claim:
        assert claim.event.content["from_step"] == 1
        result = {**result_of(store.begin(claim)), "outcome": {"spent": {"exact": whole}}}
        records.write_json(claim.run_dir / records.RESULT, result)
        assert store.publish(claim)
    assert store.spent() == pytest.approx(before + (1.5 - 1 / steps) * whole)
    shutil.rmtree(store.directory(fourth) / store.history(fourth).read(1).directory)
    shutil.rmtree(store.root / "ended")  # and nothing is taken off for an attempt of which nobody knows what it spent
    assert Store(store.root).spent() == pytest.approx(before + whole)


def test_runs_that_were_begun_anew_count_and_those_of_an_earlier_plan_do_not(store):
    """A run whose directory was deleted, which is the way out of damage, has two histories in the index."""
    (_, _, _, fourth), before = store.runs, store.spent()
    for _ in range(2):
        shutil.rmtree(store.directory(fourth), ignore_errors=True)
        assert publish(store, store.claim(fourth))
    assert store.spent() == Store(store.root).spent() == before + 100
    plan = json.loads((store.root / records.PLAN).read_text())
    plan["runs"] = [row for row in plan["runs"] if row["run_id"] != fourth]
    store.write_plan(plan, replace=True)
    assert store.spent() == Store(store.root).spent() == before


def test_a_worker_counts_what_fails_while_it_works(store):
    """Of two runs that wait, the first fails at its end, which is beyond the budget: the second is not begun."""
    store.retry()
    began = []

    def fails(runs, claims, superseded):
        began.append(claims[0].run_id)
        written(claims[0], 1.0)
        raise RuntimeError("no luck")

    work(store, fails, lambda run: "one", most_flops=1.5 * exact(store))
    assert len(began) == 1 and sorted(s.state for s in store.status()) == ["cancelled"] * 2 + ["failed", "waiting"]


def test_the_command_begins_nothing_beyond_either(store, capsys):
    for words in (("--flops", f"{0.5 * exact(store)}"), ("--until", "2020-01-01T00:00")):
        with pytest.raises(SystemExit) as left:
            main(["run", str(store.root), "--workers", "1", *words])
        assert left.value.code == 1  # one has failed
        assert Store(store.root).left() == list(store.runs)[3:] and "1 waiting" in " ".join(
            capsys.readouterr().err.split()
        )


def test_what_is_left_is_laid_to_a_budget_only_where_there_is_one(store, capsys, monkeypatch):
    store.retry()
    monkeypatch.setattr("sweeps.execute.run", lambda *_, **__: None)
    for words, said in (
        ((), "2 runs are left; the same command"),
        (("--flops", "1e30"), "the study's budget is spent"),
    ):
        main(["run", str(store.root), "--workers", "1", *words])
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_moment_is_one_however_it_is_written():
    assert end_of(None, "1764230400.5") == 1764230400.5
    assert end_of(None, "2026-12-01T08:00:00Z") == datetime(2026, 12, 1, 8, tzinfo=UTC).timestamp()
    assert end_of(None, "2026-12-01T08:00") == datetime(2026, 12, 1, 8).timestamp()
    assert end_of(2, None) == pytest.approx(time.time() + 7200, abs=60) and end_of(None, None) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hours", "0"), "hours = 0.0: use a number above 0"),
        (("--until", "tomorrow"), "until = 'tomorrow': use a moment such as"),
        (("--until", "-5"), "until = '-5': use a moment such as"),
        (("--until", "nan"), "until = 'nan': use a moment such as"),
        (("--until", "2026-12-01", "--hours", "1"), "give one of them"),
    ],
)
def test_what_is_no_budget(capsys, words, said):
    with pytest.raises(SystemExit) as left:
        main(["run", "quickstart", *words])
    assert left.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
