"""A run directory is data: reading one runs nothing and reaches nothing outside of it; keys stay out of what is written."""

import ast
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lab import records
from lab.secrets import Formatter, is_secret, redacted
from lab.spec import to_json
from runs import make_run
from sweeps.cli.main import COMMANDS, main
from sweeps.files import files_at
from sweeps.launch import worker
from sweeps.launch.ray_node import Cluster
from sweeps.launch.worker import main as worker_main
from sweeps.mirror import Mirror
from sweeps.store import Store

ROOT = Path(__file__).parent.parent
RUNS_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize(
    "path", sorted(p for part in ("lab", "sweeps", "analysis") for p in (ROOT / part).rglob("*.py")), ids=str
)
def test_nothing_reads_files_in_a_way_that_runs_code(path):
    """A study's file is code, which `sweeps.study.load` imports; nothing else is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            {alias.name.partition(".")[0] for alias in node.names} if isinstance(node, ast.Import)
            else {(node.module or "").partition(".")[0]} if isinstance(node, ast.ImportFrom) else set()
        )  # fmt: skip
        assert not names & RUNS_CODE, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert not (isinstance(node.func, ast.Name) and called in ("eval", "exec", "__import__")), (
                f"{path}:{node.lineno}"
            )
            assert called not in ("exec_module", "read_pickle") or path.name == "study.py", f"{path}:{node.lineno}"
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords), path


@pytest.fixture
def study(tmp_path):
    """With a file beside it that none may read, and that would be accepted if it were."""
    store = Store(tmp_path / "studies" / "one")
    runs = [replace(make_run(), seed=replace(make_run().seed, init=i)) for i in range(2)]
    rows = [{"run_id": run.run_id, "arm": "a", "run": to_json(run)} for run in runs]
    store.write_plan({"schema": 1, "study": {"name": "s"}, "runs": rows})
    records.write_json(tmp_path / "outside" / "result.json", {"schema": 1, "status": "done", "outcome": {"loss": 0.0}})
    return store


@pytest.mark.parametrize("token", ["../../../../../../outside", "/etc", "0" * 7 + "/", "", "zz"])
def test_events_that_name_other_directories_are_damage(study, token):
    run_id = next(iter(study.runs))
    owner = {"host": "h", "machine": "m", "pid": 1, "started": 1, "token": token}
    outside = (study.local.parent.parent / "outside" / "result.json").read_bytes()
    ended = {"attempt": "../../../../outside", "status": "done", "sha256": hashlib.sha256(outside).hexdigest()}
    for content in ({"kind": "attempt", "owner": owner}, {"kind": "ended", **ended}):
        path = study.directory(run_id) / "history" / "0001.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": 1, **content}))
        (damaged, other) = Store(study.root).status()
        assert damaged.state == "damaged" and str(path) in damaged.reason and other.state == "waiting"
        with pytest.raises(ValueError, match=r"0001\.json"):
            Store(study.root).claim(run_id)
    assert records.read_result(study.directory(run_id)) is None
    assert [path.name for path in study.directory(run_id).iterdir()] == ["history"]


def test_an_index_that_names_other_directories_is_not_followed(study):
    line = {"run_id": "../../outside", "began": "x", "event": 1, "state": "done"}
    (study.local / "ended").mkdir()
    (study.local / "ended" / "x.jsonl").write_text(json.dumps(line) + "\n")
    assert [s.state for s in Store(study.root).status()] == ["waiting"] * 2
    main(["gc", str(study.root), "--last"])
    assert (study.local.parent.parent / "outside" / "result.json").exists()


def test_gc_does_not_follow_links(study, tmp_path):
    claim = study.claim(next(iter(study.runs)))
    with claim:
        claim.run_dir.mkdir(parents=True, exist_ok=True)
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis").write_text("x")
        (claim.run_dir / "checkpoints").symlink_to(tmp_path / "precious")
    study.cancel([claim.run_id])
    main(["gc", str(study.root), "--last"])
    assert (tmp_path / "precious" / "thesis").exists()


def test_gc_does_not_follow_links_above_what_it_deletes(study, tmp_path):
    """`attempts` itself, or the run's directory: out of the study."""
    inside, run_id = study.claim(next(iter(study.runs))), list(study.runs)[1]
    with inside:
        records.write_json(inside.run_dir / "checksums" / "5.json", {"schema": 1})
    attempts, away = study.directory(inside.run_id) / "attempts", tmp_path / "away"
    attempts.rename(away)
    attempts.symlink_to(away)
    with study.claim(run_id) as claim:
        records.write_json(claim.run_dir / "checksums" / "5.json", {"schema": 1})
    study.directory(run_id).rename(tmp_path / "run")
    study.directory(run_id).symlink_to(tmp_path / "run")
    study.cancel(study.runs)
    assert [s.state for s in study.status()] == ["cancelled"] * 2
    main(["gc", str(study.root), "--last"])
    assert len(list(tmp_path.glob("*/**/checksums/5.json"))) == 2
    study.files.remove_all(f"runs/{run_id}/attempts")
    study.files.remove_all(f"runs/{run_id}/../../../../run")
    assert (tmp_path / "run" / "history").exists() and len(list(tmp_path.glob("*/**/checksums/5.json"))) == 2


@pytest.mark.parametrize("key", ["../../../escaped", "checkpoints/../../x", "/etc/escaped", "a//b", "./x", "..\\x"])
def test_object_keys_that_name_other_files_are_refused(monkeypatch, tmp_path, key):
    """A store's keys may be anything; those of a study become files of this machine."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setenv("BITTERLAB_CACHE", str(tmp_path / "cache"))
    files, name = files_at("memory://bucket/study"), "runs/r/attempts/0001-aaaaaaaa"
    mirror = Mirror(files)
    files.write(f"{name}/checksums/1.json", b"{}")
    MemoryFileSystem.store[f"{files.path(name)}/{key}"] = MemoryFileSystem.store[files.path(f"{name}/checksums/1.json")]
    with pytest.raises(ValueError, match="leaves the study's directory"):
        mirror.down([name])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_keys_are_not_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("EDITOR", "vim")
    assert redacted("with 0123456789abcdef and hush-hush in vim") == (
        "with [WANDB_API_KEY] and [AWS_SECRET_ACCESS_KEY] in vim"
    )
    assert os.environ["WANDB_API_KEY"] == "0123456789abcdef"


SECRETS = ("GITHUB_PAT", "PAT", "DB_PASS", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_CREDENTIALS", "MYSQL_PWD", "HF_TOKEN",
           "SSH_PASSPHRASE", "gitlab_pat", "DB_PASS_2", "API_KEYS")  # fmt: skip
OTHERS = ("PATH", "PYTHONPATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "COMPASS_HEADING", "SSH_ASKPASS", "PATTERN",
          "WANDB_MODE")  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t-value")
    assert is_secret(name) and redacted("has s3cr3t-value in it") == f"has [{name}] in it"


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_things(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:hunter2@db:5432/x failed", "postgres://me:[password]@db:5432/x failed"),
        ("('http://proxy:p@ss:w0rd@10.0.0.1:80')", "('http://proxy:[password]@10.0.0.1:80')"),
        ("redis://:hunter2@cache", "redis://:[password]@cache"),
        ("two: a://b:c@d and e+f://g:h@i", "two: a://b:[password]@d and e+f://g:[password]@i"),
        ("https://host:8080/a@b, gs://bucket/x:y@z, me@host", "https://host:8080/a@b, gs://bucket/x:y@z, me@host"),
    ],
)
def test_passwords_in_addresses(text, shown):
    assert redacted(text) == shown
    record = logging.LogRecord("x", logging.ERROR, "", 0, text, None, None)
    assert Formatter("%(message)s").format(record) == shown


@pytest.mark.parametrize("debug", [(), ("--debug",)])
@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_errors_of_the_command_have_no_keys(monkeypatch, capsys, error, debug):
    """Neither those that users make nor those of the lab's own, with or without a traceback."""
    monkeypatch.setenv("GITHUB_PAT", "0123456789abcdef")

    def fails() -> None:
        key = os.environ["GITHUB_PAT"]
        raise error(f"the server at https://me:hunter2@host/ does not take {key}")

    monkeypatch.setitem(COMMANDS, "status", fails)
    with pytest.raises(SystemExit) as left:
        main(["status", *debug])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "[GITHUB_PAT]" in said and "me:[password]@host" in said
    assert "0123456789abcdef" not in said and "hunter2" not in said
    assert ("Traceback" in said) == (bool(debug) or error is RuntimeError)


def test_a_traceback_has_no_keys_in_a_process_of_its_own():
    environment = {**os.environ, "HF_TOKEN": "nowhere-at-all.json"}
    command = [sys.executable, "-m", "sweeps.cli.main", "describe", "nowhere-at-all.json", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" in done.stderr and "[HF_TOKEN]" in done.stderr
    assert "nowhere-at-all" not in done.stdout + done.stderr


DIES = """
import os, sys, threading
from lab import secrets

def dies():
    raise RuntimeError("no: " + os.environ["HF_TOKEN"])

sys.excepthook = secrets.excepthook
with secrets.masked_threads():
    for target in (sys.exit, dies):
        thread = threading.Thread(target=target, name="claim r")
        thread.start()
        thread.join()
print("goes on")
dies()
"""


def test_what_threads_and_processes_die_of_has_no_keys():
    """And is said as Python says it: a thread that leaves says nothing, the process ends with status 1."""
    environment = {**os.environ, "HF_TOKEN": "0123456789abcdef"}
    done = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "goes on\n" and "0123456789abcdef" not in done.stderr
    assert done.stderr.count("RuntimeError: no: [HF_TOKEN]") == 2 and done.stderr.count("Exception in thread") == 1
    assert done.stderr.startswith("Exception in thread claim r:\nTraceback (most recent call last):\n")


@pytest.mark.parametrize("start", [main, worker_main], ids=["command", "worker"])
def test_threads_of_the_command_and_of_workers_have_no_keys(monkeypatch, capsys, tmp_path, start):
    monkeypatch.setenv("GITHUB_PAT", "0123456789abcdef")

    def dies() -> None:
        raise RuntimeError(f"no: {os.environ['GITHUB_PAT']}")

    def fails(*_: object) -> None:
        thread = threading.Thread(target=dies)
        thread.start()
        thread.join()

    monkeypatch.setitem(COMMANDS, "status", lambda: fails())
    monkeypatch.setattr(worker, "_main", fails)
    monkeypatch.setattr(sys, "argv", ["lab", "status" if start is main else str(tmp_path)])
    before = threading.excepthook
    start()
    said = capsys.readouterr().err
    assert "RuntimeError: no: [GITHUB_PAT]" in said and "0123456789abcdef" not in said
    assert threading.excepthook is before


def test_what_ray_nodes_are_told(monkeypatch):
    told = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "p",
        "WANDB_DIR": "/w",
        "BITTERLAB_CACHE": "/c",
        "XLA_FLAGS": "-x",
    }
    kept = {"WANDB_API_KEY": "0123456789", "BITTERLAB_TOKEN": "0123456789", "AWS_SECRET_ACCESS_KEY": "x", "HOME": "/h"}
    for name, value in {**told, **kept}.items():
        monkeypatch.setenv(name, value)
    found = Cluster().environment()
    assert {name: found.get(name) for name in told} == told and not set(kept) & set(found)
