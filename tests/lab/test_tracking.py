"""Trackers show what the records say, and can do a run no harm."""

import importlib.util
import json
import logging
import struct
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from lab import records, secrets, tracking
from lab.attempt import Attempt
from lab.clock import Clock
from lab.data import describe
from lab.execution import Execution
from lab.spec import Budget, Evaluation, to_json
from lab.train import train, train_together
from runs import make_run
from sweeps.cli.main import main
from sweeps.launch.settings import Settings
from test_train import Killed, killed_after

TWO_STEPS = Execution(steps_per_dispatch=2, scan=False)
KEY = "0123456789abcdef-not-a-key-0123456789abcdef"


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run():
    return make_run(data=describe("markov").data, evaluation=Evaluation(examples=16, times=2))


@pytest.fixture
def untracked(run, tmp_path):
    return train(run, tmp_path / "untracked", execution=TWO_STEPS)


def event_files(run_dir):
    return sorted((run_dir / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime)


def events(path):
    """TFRecord framing: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


def scalars(path):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(path)
        for value in event.summary.value
        if not value.tag.startswith("_hparams_")
    ]


def wandb_records(run_dir):
    """Of each offline run of the directory, oldest first. W&B's own process may be at the end of the file yet."""
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        deadline = time.monotonic() + 20
        found = wandb_file(path)
        while not any(r.HasField("exit") for r in found) and time.monotonic() < deadline:
            time.sleep(0.1)
            found = wandb_file(path)
        yield found


def wandb_file(path):
    """LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(found):
    return [
        {name: json.loads(item.value_json) for item in r.history.item if not (name := named(item)).startswith("_")}
        for r in found
        if r.HasField("history")
    ]


def named(item):
    return item.key or ".".join(item.nested_key)


def without_speed(lines):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "lab.tracking"]


@needs("tensorboardX")
def test_tensorboard_shows_the_records(run, tmp_path):
    result = train(run, tmp_path, execution=TWO_STEPS, track=("tensorboard",), labels={"study": "s", "arm": "a"})
    (path,) = event_files(tmp_path)
    shown, lines = scalars(path), records.read_metrics(tmp_path)
    steps = [step for step, *_ in shown]
    assert steps == sorted(steps)
    for name in ("loss", "learning_rate", "gradient_norm", "seconds", "held_out_loss"):
        written = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert [(step, np.float32(value)) for step, tag, value in shown if tag == name] == written and written
    assert sum(tag == "tokens_per_second" and value > 0 for _, tag, value in shown) == len(lines) - 1
    (last,) = [(step, value) for step, tag, value in shown if tag == "outcome.loss"]
    assert last == (run.budget.amount, np.float32(result["outcome"]["loss"]))
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    parts = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(path)
        for value in event.summary.value
        if value.tag.startswith("_hparams_")
    ]
    (began,) = [part.session_start_info.hparams for part in parts if part.HasField("session_start_info")]
    assert began["run_id"].string_value == run.run_id and began["arm"].string_value == "a"
    for name, value in tracking.flat(to_json(run)).items():
        if value is not None:
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            assert getattr(began[name], f"{kind}_value") == value
    assert sum(part.HasField("session_end_info") for part in parts) == 1


@needs("wandb")
def test_wandb_shows_the_records(run, tmp_path):
    result = train(run, tmp_path, execution=TWO_STEPS, track=("wandb",), labels={"study": "s", "arm": "a"})
    (found,) = wandb_records(tmp_path)
    assert without_speed(history(found)) == records.read_metrics(tmp_path)
    (made,) = [r.run for r in found if r.HasField("run")]
    assert (made.run_id, made.display_name, made.project, made.run_group) == (run.run_id, run.run_id, "s", "a")
    assert sorted(made.tags) == ["a", "s"]
    config = {named(item): json.loads(item.value_json) for item in made.config.update}
    config.pop("_wandb", None)
    assert config == {"run_id": run.run_id, **tracking.flat(to_json(run)), "study": "s", "arm": "a"}
    summary = {named(item): json.loads(item.value_json) for r in found for item in r.summary.update}
    assert summary["outcome.loss"] == result["outcome"]["loss"] and summary["status"] == "done"
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]


@needs("wandb")
@pytest.mark.parametrize("labels", [{}, {"study": "s"}])
def test_the_environment_names_the_project(labels, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(run, tmp_path, execution=TWO_STEPS, track=("wandb",), labels=labels)
    (found,) = wandb_records(tmp_path)
    assert [r.run.project for r in found if r.HasField("run")] == ["mine"]


@needs("tensorboardX")
@needs("wandb")
@pytest.mark.parametrize("same_directory", [True, False], ids=["one directory", "another attempt's directory"])
def test_a_resume_goes_on(same_directory, run, tmp_path):
    first, second = tmp_path / "1", tmp_path / ("1" if same_directory else "2")
    both = ("tensorboard", "wandb")
    with pytest.raises(Killed):
        train(run, first, execution=TWO_STEPS, track=both, checkpoint_seconds=0, on_progress=killed_after(3))
    begun, *_ = wandb_records(first)
    before = without_speed(history(begun))
    time.sleep(1.1)  # event files are named by the second
    train(run, second, execution=TWO_STEPS, track=both, earlier=[] if same_directory else [first])
    lines = records.read_metrics(second)
    newest = event_files(second)[-1]
    shown = [(step, np.float32(value)) for step, tag, value in scalars(newest) if tag == "loss"]
    assert shown == [(line["step"], np.float32(line["loss"])) for line in lines if "loss" in line]
    starts = [event for event in events(newest) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in starts] == [
        (0, 1)
    ]  # START: what older files hold is dropped
    found = list(wandb_records(second))[-1]
    after = without_speed(history(found))
    assert [r.run.run_id for r in (*begun, *found) if r.HasField("run")] == [run.run_id] * 2
    assert before and after and after == lines[-len(after) :]
    timeless = [{(k, v) for k, v in line.items() if k != "seconds"} for line in (*before, *after)]
    assert all(line in timeless for line in [{(k, v) for k, v in x.items() if k != "seconds"} for x in lines])
    assert all(line in [{(k, v) for k, v in x.items() if k != "seconds"} for x in lines] for line in timeless)
    steps = [line["step"] for line in after]
    assert steps == sorted(steps)


@needs("tensorboardX")
@needs("wandb")
def test_runs_side_by_side_have_trackers_of_their_own(run, tmp_path):
    runs = [replace(run, seed=replace(run.seed, init=seed)) for seed in range(3)]
    directories = [tmp_path / str(i) for i in range(3)]
    names = [{"study": "s", "arm": f"arm {i}"} for i in range(3)]
    train_together(runs, directories, execution=TWO_STEPS, track=("tensorboard", "wandb"), labels=names)
    for one, directory, named in zip(runs, directories, names, strict=True):
        (found,) = wandb_records(directory)
        assert [(r.run.run_id, r.run.run_group) for r in found if r.HasField("run")] == [(one.run_id, named["arm"])]
        lines = records.read_metrics(directory)
        assert without_speed(history(found)) == lines
        (path,) = event_files(directory)
        assert [(s, np.float32(v)) for s, tag, v in scalars(path) if tag == "loss"] == [
            (line["step"], np.float32(line["loss"])) for line in lines if "loss" in line
        ]


class Broken:
    """Fails, or hangs, at one place."""

    def __init__(self, at, error=None, hang=None):
        self.at, self.error, self.hang = at, error, hang

    def __call__(self, tracked):
        self._reach("start")
        return self

    def log(self, line):
        self._reach("log")

    def finish(self, result):
        self._reach("finish")

    def _reach(self, place):
        if place == self.at and self.hang:
            self.hang.wait(60)
        elif place == self.at:
            raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit(1), ImportError("No module named 'x'")]
)
@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_said_once(at, error, run, untracked, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken(at, error))
    result = train(run, tmp_path / "tracked", execution=TWO_STEPS, track=("wandb",))
    assert result["outcome"] == untracked["outcome"]
    (said,) = warnings(caplog)
    assert run.run_id in said and "wandb is off" in said and type(error).__name__ in said
    assert ("pip install" if isinstance(error, ImportError) else "WANDB_MODE=offline") in said


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.parametrize("limits", [{"FINISH_SECONDS": 0.2}, {"PATIENCE": 0.0, "FINISH_SECONDS": 5.0}, {"QUEUE": 1}])
def test_a_tracker_that_hangs_holds_nothing_up(at, limits, run, untracked, tmp_path, monkeypatch, caplog):
    over = threading.Event()
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Broken(at, hang=over))
    for name, value in {"FINISH_SECONDS": 0.5, **limits}.items():
        monkeypatch.setattr(tracking, name, value)
    began = time.monotonic()
    result = train(run, tmp_path / "tracked", execution=TWO_STEPS, track=("tensorboard",))
    assert time.monotonic() - began < 20
    over.set()
    assert result["outcome"] == untracked["outcome"]
    (said,) = warnings(caplog)
    assert "tensorboard is off" in said


def test_a_slow_tracker_gets_every_line(run, tmp_path, monkeypatch, caplog):
    got = []

    class Slow(Broken):
        def log(self, line):
            time.sleep(0.05)
            got.append(dict(line))

        def finish(self, result):
            got.append(result)

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Slow("nowhere"))
    result = train(run, tmp_path, execution=TWO_STEPS, track=("wandb",))
    assert without_speed(got[:-1]) == records.read_metrics(tmp_path) and got[-1] == result
    assert not warnings(caplog)


def test_keys_are_written_nowhere(run, tmp_path, monkeypatch, caplog):
    """By a tracker that says its key when it fails; and by those that there are."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(tracking.TRACKERS, "broken", Broken("log", RuntimeError(f"401 for Bearer {KEY}")))
    monkeypatch.setattr(tracking, "log", logging.getLogger("lab.tracking"))
    train(run, tmp_path, execution=TWO_STEPS, track=("broken", "tensorboard", "wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in caplog.text and "401 for Bearer [WANDB_API_KEY]" in caplog.text
    assert KEY not in " ".join(Settings(track="wandb").command(tmp_path, workers=1))


def test_tracebacks_in_logs_are_redacted(monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", KEY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # named like a token, and none
    try:
        raise RuntimeError(f"false: {KEY}")
    except RuntimeError as error:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "%s", (KEY,), (type(error), error, None))
    text = secrets.Formatter("%(message)s").format(record)
    assert KEY not in text and text.count("[SERVICE_TOKEN]") == 2 and "false: " in text


def test_names_that_are_not_known(run, tmp_path):
    with pytest.raises(ValueError, match="track = 'tensorbord': did you mean 'tensorboard'"):
        train(run, tmp_path, track=("tensorbord",))
    with pytest.raises(ValueError, match="track = 'wnadb': did you mean 'wandb'"):
        Settings(track="tensorboard,wnadb")
    assert tracking.read("wandb, tensorboard,wandb") == ("wandb", "tensorboard") and tracking.read(None) == ()


def test_only_the_first_host_tracks(run, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken("nowhere"))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    attempt = Attempt(run, tmp_path, wanted=TWO_STEPS, track=("wandb",))
    attempt.begin(Clock(), sharing=1)
    assert not attempt.mirrors
    attempt.close()


@needs("tensorboardX")
def test_lab_train_tracks(run, tmp_path):
    run = replace(run, budget=Budget(unit="steps", amount=4))
    records.write_json(tmp_path / "run.json", to_json(run))
    main(["train", str(tmp_path / "run.json"), "--out", str(tmp_path / "out"), "--track", "tensorboard"])
    assert any(tag == "loss" for _, tag, _ in scalars(*event_files(tmp_path / "out")))
