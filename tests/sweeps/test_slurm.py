"""Jobs of Slurm: what they ask for; and, on a controller and a node that are started here, what becomes of them when they are
preempted and when their time is over."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweeps
from lab import records
from sweeps.cli.studies import end_of
from sweeps.launch import slurm
from sweeps.launch.settings import Settings
from sweeps.launch.slurm import Job
from sweeps.launch.snapshot import snapshot
from sweeps.store import Store

CONF = Path(__file__).with_name("slurm.conf")
STUDY = """
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    return Study(name="queued", question="?", baseline="a", budgets=({flops},), batch=8, window=1, seeds=2, learning_rate=0.01,
                 arms={{"a": arm("decoder_only", corpus("markov"), S=16, T=16)}}, sizes=ladder(16, depth=2, head_width=8))
"""


@pytest.mark.parametrize(
    ("field", "value"),
    [("gpus", -1), ("cpus", 0), ("nodes", 0), ("minutes", 0), ("notice", 0), ("notice", 600), ("more", ("exclusive",))],
)
def test_what_can_not_be_asked_for(field, value):
    with pytest.raises(ValueError, match=rf"slurm\.{field} = "):
        Job(**{"minutes": 10, field: value})


def test_what_is_asked_for():
    job = Job(partition="gpu", constraint="h100", gpus=8, cpus=32, minutes=60, more=("--exclude=node7",))
    asked = job.parameters(3)
    assert asked["partition"] == "gpu" and asked["constraint"] == "h100" and asked["gpus_per_node"] == 8
    assert asked["time"] == 60 and asked["signal_delay_s"] == 120 and asked["array_parallelism"] == 3
    assert asked["additional_parameters"] == {"requeue": True, "exclude": "node7"} and "mem" not in asked


def test_settings_are_handed_on():
    end = time.time() + 7200
    settings = Settings(pack=2, most_flops=1e15, until=end, track="tensorboard")
    given = slurm.flags(settings, Job(nodes=2))
    words = dict(zip(given[::2], given[1::2], strict=True))
    assert words["--pack"] == "2" and float(words["--flops"]) == 1e15 and end_of(None, words["--until"]) == end
    assert "--hours" not in words  # a job that waits or is put back would begin them anew
    assert slurm.flags(settings, Job(nodes=2)) == given
    assert words["--hosts"] == "auto" and words["--track"] == "tensorboard" and "--mesh" not in words


def test_a_snapshot_keeps_the_code_of_its_time(tmp_path):
    first = snapshot(tmp_path)
    assert snapshot(tmp_path) == first and first.parent == tmp_path / "code"
    said = subprocess.run(
        [sys.executable, "-c", "import lab, sweeps.launch.worker, analysis; print(lab.__file__, sweeps.__file__)"],
        env={**os.environ, "PYTHONPATH": str(first), "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert said == [f"{first}/lab/__init__.py", f"{first}/sweeps/__init__.py"]
    assert len(list((tmp_path / "code").iterdir())) == 1


def test_where_there_is_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'bitterlab[slurm]'")
    with pytest.raises(ValueError, match="no sbatch and srun here"):
        slurm.submit(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'bitterlab\[slurm\]'"):
        slurm.submit(tmp_path, 1)


def test_an_object_store_and_numbers_of_hosts_are_not_for_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = sweeps.plan(sweeps.load("quickstart", "smoke"))
    for submit in (
        lambda out, s: slurm.submit(out, 1, settings=s),
        lambda out, s: sweeps.run(plan, out, on=Job(), settings=s),
    ):
        with pytest.raises(ValueError, match=r"out = 'memory://bucket/x': jobs of Slurm need a directory"):
            submit("memory://bucket/x", None)
        for hosts in ("10.0.0.1:9876,2,0", "auto"):
            with pytest.raises(ValueError, match=rf"hosts = '{hosts}': the nodes of a job find one another"):
                submit("out", Settings(hosts=hosts))
    assert not list(tmp_path.iterdir()) and not Store("memory://bucket/x").files.names("")
    Job(nodes=2).check("out", hosts="auto")


# ---- on a controller ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    """munged, slurmctld and slurmd with ports, keys and state of their own."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'bitterlab[slurm]'")
    needed = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    if missing := [name for name in needed if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("only root can start slurmd")
    state = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "munge"):
        (state / name).mkdir(mode=0o700)
    (state / "munge" / "key").write_bytes(os.urandom(1024))
    (state / "munge" / "key").chmod(0o400)
    values = {"HOST": socket.gethostname().partition(".")[0], "STATE": state, "PORT": _port(), "NODE_PORT": _port()}
    text = CONF.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    (state / "slurm.conf").write_text(text)
    munge = [
        f"--{name}={state}/munge/{name.partition('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(state / "slurm.conf"))
        started = [subprocess.Popen([*command, *more]) for command, more in (
            (["munged", "--force", "--foreground"], munge),
            (["slurmctld", "-D", "-f", str(state / "slurm.conf")], []),
            (["slurmd", "-D", "-f", str(state / "slurm.conf")], []),
        )]  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout:
                assert time.monotonic() < deadline, (state / "slurmctld.log").read_text()
                time.sleep(0.5)
            yield state
        finally:
            subprocess.run(["scancel", "--user=root"], check=False)
            time.sleep(1)
            for process in reversed(started):
                process.terminate()
                process.wait(timeout=30)


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submitted(tmp_path, flops, *words) -> tuple[Store, list[str]]:
    """By the command, as a person would; the study and the ids of its jobs."""
    (tmp_path / "study.py").write_text(STUDY.format(flops=flops))
    command = [sys.executable, "-m", "sweeps.cli.main", "run", str(tmp_path / "study.py"), "--out", str(tmp_path / "out"),
               "--on", "slurm", "--checkpoint", "2", "--lease", "10", *words]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    ids = said.stderr.rpartition("jobs ")[2].partition(";")[0].split(", ")
    return Store(tmp_path / "out"), ids


def until(store, condition, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        logs = [path.read_text()[-2000:] for path in (store.local / "slurm").glob("*.out")]
        queue = subprocess.run(["squeue"], capture_output=True, text=True).stdout
        assert time.monotonic() < deadline, "\n".join([queue, *logs])
        time.sleep(0.5)


def restarts(job: str) -> int:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return int(shown.partition("Restarts=")[2].split()[0])


def kinds(store) -> list[list[str]]:
    return [[store.history(i).read(n).kind for n in store.history(i).numbers()] for i in store.runs]


def check_outcomes(store, tmp_path):
    """Those of a study that nothing happened to."""
    alone = sweeps.run(sweeps.plan(sweeps.load(str(tmp_path / "study.py"))), tmp_path / "alone", workers=2)
    for run_id in store.runs:
        one, two = (records.read_result(place / "runs" / run_id) for place in (alone, store.local))
        assert one["outcome"] == two["outcome"]


@pytest.mark.slurm
def test_an_array_that_is_preempted_goes_on(controller, tmp_path):
    store, ids = submitted(tmp_path, 2e11, "--workers", "2")
    assert len(ids) == 2
    until(store, lambda: sum(s.state == "running" and (s.step or 0) > 0 for s in store.status()) == 2)
    subprocess.run(
        ["sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 3"], check=True
    )
    until(store, lambda: not store.left())
    assert [s.state for s in store.status()] == ["done", "done"]
    assert kinds(store) == [["attempt", "released", "attempt", "ended"]] * 2  # saved when they were told, not killed
    assert [restarts(job) for job in ids] == [1, 1]
    events = [store.history(run_id).read(3).content["from_step"] for run_id in store.runs]
    assert all(step > 0 for step in events)
    check_outcomes(store, tmp_path)
    assert len(list((store.local / "code").iterdir())) == 1
    assert json.loads((store.local / records.PLAN).read_text())["study"]["name"] == "queued"


@pytest.mark.slurm
def test_a_job_whose_time_is_over_goes_on_in_another(controller, tmp_path):
    store, (job,) = submitted(tmp_path, 2.5e11, "--slurm.minutes", "1", "--slurm.notice", "35", "--slurm.cpus", "2")
    until(store, lambda: not store.left())
    assert [s.state for s in store.status()] == ["done", "done"]
    assert restarts(job) >= 1
    happened = max(kinds(store), key=len)
    assert happened == [*["attempt", "released"] * (len(happened) // 2 - 1), "attempt", "ended"] and len(happened) >= 4
    check_outcomes(store, tmp_path)


@pytest.mark.slurm
def test_what_slurm_does_not_take_is_said(controller, tmp_path):
    (tmp_path / "study.py").write_text(STUDY.format(flops=1e9))
    store = Store(tmp_path / "out")
    store.write_plan(sweeps.plan(sweeps.load(str(tmp_path / "study.py"))).to_json())
    with pytest.raises(ValueError, match=r"Slurm does not take the job.*partition"):
        slurm.submit(store.root, 1, job=Job(partition="nonesuch"))
