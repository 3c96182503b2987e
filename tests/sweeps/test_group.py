"""Two processes over loopback, each with two devices, that work on one study as one worker."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sweeps
from lab import records
from sweeps.store import Store

pytestmark = pytest.mark.multihost

STUDY = """
from dataclasses import replace
from sweeps import Study, arm, corpus
from sweeps.ladder import ladder

def study(preset="small"):
    data = corpus("markov")
    return Study(name="hosts", question="?", baseline="decoder_only", budgets=(2e9,), batch={batch}, window=1, seeds=3,
                 learning_rate=0.01, sizes=ladder(16, depth=1, head_width=8),
                 arms={{"decoder_only": arm("decoder_only", data, S=8, T=8)}})
"""


def start(study: Path, out: Path) -> list[subprocess.Popen]:
    """`lab run` as a person would start it, once on each host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "sweeps.cli.main", "run", str(study), "--out", str(out), "--mesh", "data=2,fsdp=2",
               "--checkpoint", "0.5", "--lease", "5"]  # fmt: skip
    return [
        subprocess.Popen([*command, "--hosts", f"127.0.0.1:{port},2,{number}"], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(2)
    ]  # fmt: skip


def ended(processes, seconds=240):
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.communicate()
    return [process.returncode for process in processes], "\n".join(said)


def workers_of(processes) -> list[int]:
    """Process ids of the workers that these launchers started."""
    found = []
    for launcher in processes:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        found += [int(child) for child in children]
    return found


def test_a_group_trains_a_study_and_goes_on_after_one_of_it_is_killed(tmp_path):
    (tmp_path / "study.py").write_text(STUDY.format(batch=4))
    alone = sweeps.run(sweeps.plan(sweeps.load(str(tmp_path / "study.py"))), tmp_path / "alone", workers=1)
    store, processes = Store(tmp_path / "group"), start(tmp_path / "study.py", tmp_path / "group")
    until, killed = time.monotonic() + 120, False
    while not killed and time.monotonic() < until:
        time.sleep(0.1)
        running = [s for s in store.status() if s.state == "running" and s.step] if store.local.exists() and (
            store.local / records.PLAN).exists() else []  # fmt: skip
        if running and len(workers := workers_of(processes)) == 2:
            os.kill(workers[1], signal.SIGKILL)  # of the second host, which holds no claim
            killed = True
    codes, said = ended(processes)
    logs = "\n".join(path.read_text() for path in (tmp_path / "group" / "logs").iterdir())
    assert killed and codes == [0, 0], (said, logs)
    assert [s.state for s in store.status()] == ["done"] * 3
    for run_id in store.runs:
        one, two = (records.read_result(place / "runs" / run_id) for place in (alone, store.local))
        np.testing.assert_allclose(two["outcome"]["loss"], one["outcome"]["loss"], rtol=1e-4)
        assert two["measured"]["mesh"] == "data=2,fsdp=2"
        assert two["outcome"]["spent"] == one["outcome"]["spent"]
    assert max(s.attempts for s in store.status()) >= 2


def test_an_error_that_all_of_a_group_meet_is_recorded_and_the_next_run_is_taken(tmp_path):
    (tmp_path / "study.py").write_text(STUDY.format(batch=3))  # which four devices can not share
    codes, said = ended(start(tmp_path / "study.py", tmp_path / "group"))
    assert codes == [1, 1], said
    store = Store(tmp_path / "group")
    assert [s.state for s in store.status()] == ["failed"] * 3
    assert "let data * fsdp divide the batch" in store.failure(next(iter(store.runs)))["error"]
