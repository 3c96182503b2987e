"""A study in an object store (fsspec's in memory): as one in a directory, with what a run needs brought to this machine."""

import errno
import shutil
import threading
import time

import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import sweeps
from lab import records
from lab.program import program_key
from lab.train import train_together
from small_studies import gone, publish
from sweeps import Study, arm, corpus, signs
from sweeps.cli.control import records_here
from sweeps.cli.main import main
from sweeps.files import files_at
from sweeps.history import History
from sweeps.ladder import ladder
from sweeps.launch import local
from sweeps.launch.worker import MachineTrouble, work
from sweeps.mirror import Mirror
from sweeps.store import Store

URL = "memory://bucket/studies/one"


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    """An empty store, and a cache of its own for what lies on this machine."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "cache"))


def plan(seeds=2):
    study = Study(name="remote", question="?", baseline="a", budgets=(1e9,), batch=4, window=1, seeds=seeds,
                  learning_rate=0.01, arms={"a": arm("decoder_only", corpus("markov"), S=8, T=8)},
                  sizes=ladder(8, depth=1, head_width=8))  # fmt: skip
    return sweeps.plan(study).to_json()


def trainer(stops=()):
    """Trains; runs in `stops` are interrupted once, when they have a checkpoint."""
    stopped = set()

    def train(runs, claims, superseded):
        stop = runs[0].run_id in stops and runs[0].run_id not in stopped
        stopped.add(runs[0].run_id)

        def enough():
            return superseded() or (stop and any((claims[0].run_dir / "checksums").glob("*.json")))

        train_together(runs, [c.run_dir for c in claims], earlier=[c.earlier for c in claims], checkpoint_seconds=0,
                       superseded=enough)  # fmt: skip

    return train


def outcomes(store):
    return {i: records.read_result(store.records() / "runs" / i)["outcome"] for i in store.runs}


def test_a_run_that_was_stopped_goes_on_on_another_machine_and_ends_as_in_a_directory(tmp_path, monkeypatch, capsys):
    made = plan()
    here = Store(tmp_path / "study")
    here.write_plan(made)
    work(here, trainer(), program_key)

    store = Store(URL)
    assert "new plan" in store.write_plan(made) and "2 kept" in Store(URL).write_plan(made)
    first = next(iter(store.runs))
    work(store, trainer(stops=[first]), program_key)
    assert [s.state for s in Store(URL).status()] == ["done", "done"]
    assert outcomes(Store(URL)) == outcomes(here)
    events = [store.history(first).read(n) for n in store.history(first).numbers()]
    assert [e.kind for e in events] == ["attempt", "released", "attempt", "ended"]
    assert events[2].content["from_step"] > 0
    assert not list((Store(URL).local / "runs").glob("*/attempts/*"))  # nothing is left on this machine

    capsys.readouterr()
    main(["status", URL])
    assert "2 done" in capsys.readouterr().out
    main(["export", URL, "--out", str(tmp_path / "runs.parquet")])
    assert len(pd.read_parquet(tmp_path / "runs.parquet")) == 2
    main(["gc", URL])
    files = store.files.sizes(f"runs/{first}/attempts")
    assert len({name.split("/checkpoints/")[1].split("/")[0] for name in files if "/checkpoints/" in name}) == 1
    main(["gc", URL, "--last"])
    assert not [name for name in store.files.sizes("runs") if "/checkpoints/" in name]
    main(["logs", URL, first])
    assert [s.state for s in Store(URL).status()] == ["done", "done"]


def test_a_result_that_was_changed_in_the_store_is_damage(tmp_path, capsys):
    store = Store(URL)
    store.write_plan(plan())
    work(store, trainer(), program_key)
    first = next(iter(store.runs))
    name = f"runs/{first}/result.json"
    store.files.write(name, store.files.read(name).replace(b'"steps": ', b'"steps": 1'))
    capsys.readouterr()
    main(["export", URL, "--out", str(tmp_path / "runs.parquet")])
    assert f"damaged, and exported without numbers: {first}" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "runs.parquet").set_index("run_id")
    assert table["state"].value_counts().to_dict() == {"damaged": 1, "done": 1} and pd.isna(table.loc[first, "loss"])
    with pytest.raises(SystemExit):
        main(["report", URL])
    assert "not what the run published" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_was_deleted_in_the_store_is_done_for_nobody_here():
    store = Store(URL)
    store.write_plan(plan())
    first, second = store.runs
    for run_id in (first, second):
        assert publish(store, store.claim(run_id))
    here = records_here(store)
    assert [records.read_result(here / "runs" / run_id) is None for run_id in (first, second)] == [False, False]
    store.files.remove_all(f"runs/{first}")
    assert [records.read_result(records_here(store) / "runs" / run_id) is None for run_id in (first, second)] == [
        True, False
    ]  # fmt: skip


def test_work_that_could_not_be_sent_is_gone_on_from_here(tmp_path, monkeypatch):
    """Heartbeats go through, checkpoints do not: the next worker of this machine begins where that one ended."""
    made = plan(seeds=1)
    here = Store(tmp_path / "study")
    here.write_plan(made)
    work(here, trainer(), program_key)
    store = Store(URL, lease=0.6)
    store.write_plan(made)
    (run_id,) = store.runs
    send = store.files.send

    def refused(path, name):
        if "/checkpoints/" in name:
            raise OSError(errno.ECONNRESET, "Connection reset by peer", name)
        send(path, name)

    monkeypatch.setattr(store.files, "send", refused)
    with pytest.raises(MachineTrouble, match="Connection reset"):
        work(store, trainer(), program_key)
    assert store.history(run_id).last().kind == "attempt"
    assert not store.files.names(f"runs/{run_id}/{store.history(run_id).last().directory}/checksums")
    again = Store(URL, lease=0.6)
    work(again, trainer(), program_key, poll_seconds=0.1)
    steps = records.read_result(again.records() / "runs" / run_id)["outcome"]["steps"]
    assert again.history(run_id).read(2).content["from_step"] == steps > 0  # it was only evaluated again
    assert outcomes(again) == outcomes(here)
    assert not list((again.local / "runs").glob("*"))


def refused(*_):
    raise RuntimeError("503")  # what a store raises is not always an OSError


def saved(claim, step) -> str:
    """A checkpoint of so many steps in the claim's directory on this machine; its checksums' name in the store."""
    assert claim.renew()
    for name, text in ((f"checkpoints/{step}/state", "x"), (f"checksums/{step}.json", "{}")):
        (claim.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (claim.run_dir / name).write_text(text)
    return f"runs/{claim.run_id}/{claim.event.directory}/checksums/{step}.json"


@pytest.mark.parametrize("sends", [True, False])
def test_what_a_cancelled_attempt_saved_is_kept(sends, monkeypatch):
    """In the store, and where that does not take it, here."""
    store = Store(URL)
    store.write_plan(plan())
    run_id = next(iter(store.runs))
    with store.claim(run_id) as claim:
        name = saved(claim, 7)
        store.cancel([run_id])
        assert not claim.renew()
        if not sends:
            monkeypatch.setattr(store.files, "send", refused)
    assert (store.files.exists(name), claim.run_dir.exists()) == (sends, not sends)
    assert store.retry([run_id]) == 1
    with Store(URL).claim(run_id) as later:
        assert later.event.content["from_step"] == 7
        assert [path.name for path in later.earlier] == [claim.run_dir.name]
        assert (later.earlier[0] / "checkpoints" / "7" / "state").read_text() == "x"


def test_an_attempt_that_was_superseded_leaves_what_the_next_one_reads_here():
    """Until the run has ended, here or elsewhere."""
    store = Store(URL)
    store.write_plan(plan())
    run_id = next(iter(store.runs))
    with store.claim(run_id, gone()) as first:
        saved(first, 7)
        second = store.claim(run_id)
        assert not first.renew()
    assert second.earlier == [first.run_dir] and first.run_dir.exists()
    store.mirror.tidy()
    assert first.run_dir.exists()
    assert publish(store, second)  # as from another machine: what lies here is left to those who work here
    assert first.run_dir.exists()
    work(Store(URL), trainer(), program_key)
    assert not (store.local / "runs" / run_id).exists()


def test_of_many_attempts_those_that_got_furthest_stay_here():
    """So that a store which takes nothing for days does not fill this machine's disk."""
    mirror = Mirror(files_at(URL))
    names = [f"runs/one/attempts/{number:04d}-0123abcd" for number in range(5, 0, -1)]
    for name, step in zip(names, (1, 4, 2, 9, 0), strict=True):
        (mirror.local / name / "checksums").mkdir(parents=True)
        if step:
            (mirror.local / name / "checksums" / f"{step}.json").write_text("{}")
    assert mirror.down(names) == [mirror.local / names[1], mirror.local / names[3]]
    assert sorted((mirror.local / "runs/one/attempts").iterdir()) == [mirror.local / names[3], mirror.local / names[1]]


def test_a_checkpoint_goes_up_whole_and_is_removed_when_it_is_pruned(tmp_path):
    files = files_at(URL)
    mirror = Mirror(files)
    here = mirror.local / "runs/one/attempts/0001-a"

    def save(step, counts=True):
        (here / "checkpoints" / str(step)).mkdir(parents=True)
        (here / "checkpoints" / str(step) / "state").write_bytes(b"x" * step)
        (here / "checksums").mkdir(exist_ok=True)
        if counts:
            (here / "checksums" / f"{step}.json").write_text("{}")

    def there():
        return {name.removeprefix("runs/one/attempts/0001-a/") for name in files.sizes("runs")}

    save(1)
    save(2, counts=False)
    (here / ".metrics.jsonl.123").write_text("")
    (here / "metrics.jsonl").write_text("{}\n")
    mirror.up("runs/one/attempts/0001-a")
    assert there() == {"checkpoints/1/state", "checksums/1.json", "metrics.jsonl"}
    (here / "checksums" / "2.json").write_text("{}")
    shutil.rmtree(here / "checkpoints" / "1")
    (here / "checksums" / "1.json").unlink()
    mirror.up("runs/one/attempts/0001-a")
    assert there() == {"checkpoints/2/state", "checksums/2.json", "metrics.jsonl"}
    mirror.drop("runs/one")
    assert not here.exists()
    (found,) = Mirror(files).down(["runs/one/attempts/0002-b", "runs/one/attempts/0001-a"])
    assert (found / "checkpoints" / "2" / "state").read_bytes() == b"xx"


def test_a_claim_whose_checkpoints_can_not_be_brought_here_is_let_go():
    store = Store(URL)
    store.write_plan(plan())
    run_id = next(iter(store.runs))
    first = store.claim(run_id)
    name = f"runs/{run_id}/{first.event.directory}"
    store.files.write(f"{name}/checksums/1.json", b"{}")
    store.files.write(f"{name}/../x", b"{}")
    first.release()
    with pytest.raises(ValueError, match="leaves the study's directory"):
        store.claim(run_id)
    assert store.history(run_id).last().kind == "released"


def test_of_many_that_create_one_event_one_wins():
    for number in range(200):
        history, won = History(files_at(URL), f"runs/{number}"), []
        barrier = threading.Barrier(4)

        def create(history=history, won=won, barrier=barrier):
            barrier.wait()
            won.append(history.append(None, "attempt") is not None)

        threads = [threading.Thread(target=create) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(won) == 1


def test_a_store_that_can_not_say_who_was_first_is_refused_to_several_workers(tmp_path):
    url = f"file://{tmp_path}/study"
    store = Store(url, lease=0.2)
    store.write_plan(plan())
    with pytest.raises(ValueError, match=r"--workers 1"):
        local.start(url, local.cpu_slots(2))
    work(store, trainer(), program_key)  # one may
    assert [s.state for s in store.status()] == ["done", "done"]


def test_a_second_worker_of_such_a_store_is_refused_while_the_first_one_lives(tmp_path):
    url = f"file://{tmp_path}/study"
    store, other = Store(url, lease=0.6), Store(url, lease=0.6)
    store.write_plan(plan())
    claim = store.claim(next(iter(store.runs)))
    with claim, pytest.raises(ValueError, match="only one may work"):
        claim.renew()
        other.check_alone()
    other.check_alone()  # it was released
    claim = store.claim(next(iter(store.runs)))
    claim.renew()
    Store(url, lease=0.6).check_alone()  # it beats no more


class Ignoring(MemoryFileSystem):
    """As a server that takes a conditional put and ignores its condition."""

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value, **options)


class Refusing(MemoryFileSystem):
    def pipe_file(self, path, value, mode="overwrite", **options):
        if mode == "create":
            raise NotImplementedError("A header you provided implies functionality that is not implemented")
        super().pipe_file(path, value, **options)


@pytest.mark.parametrize("kind", [Ignoring, Refusing])
def test_a_server_without_conditional_puts_is_refused_to_several_workers(kind):
    store = Store(URL)
    store.files.system = kind(skip_instance_cache=True)
    store.write_plan(plan())
    with pytest.raises(ValueError, match=rf"{URL}: this server .*If-None-Match.*--workers 1, a directory"):
        store.check_shared()
    assert not [name for name in MemoryFileSystem.store if "create" in name]
    store.check_alone()  # one may


def test_a_server_is_asked_once_whether_it_keeps_conditions(monkeypatch):
    files, asked = files_at(URL), []
    create = files.create
    monkeypatch.setattr(files, "create", lambda *given: asked.append(1) or create(*given))
    assert files.exclusive and files.exclusive and len(asked) == 2 and not files.sizes("")


@pytest.mark.parametrize("root", [URL, "directory"])
def test_when_a_file_was_written(root, tmp_path):
    files = files_at(root if root == URL else tmp_path)
    files.write("runs/one", b"")
    assert files.modified("runs/one") == pytest.approx(time.time(), abs=60)
    with pytest.raises(FileNotFoundError):
        files.modified("runs/two")


def test_signs_are_of_stores_that_tell_no_time_and_hide_no_mistake(monkeypatch):
    files = files_at(URL)
    files.write("beat", b"")

    def fails(error):
        monkeypatch.setattr(MemoryFileSystem, "modified", lambda self, path: (_ for _ in ()).throw(error))
        return signs._modified(files, "beat")

    assert fails(NotImplementedError()) is None and fails(OSError(110, "Connection timed out")) is None
    with pytest.raises(AttributeError):
        fails(AttributeError("a misspelt name"))


def test_what_is_no_store_says_what_to_install():
    with pytest.raises(ValueError, match=r"nonesuch://.*gcsfs.*s3fs"):
        Store("nonesuch://bucket/study")
