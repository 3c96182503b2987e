"""Two processes over loopback that train one run, each with two devices: the same losses, one set of records."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lab import records
from lab.execution import Execution
from lab.mesh import ONE_DEVICE, join_hosts
from lab.spec import Budget, Evaluation, to_json
from lab.train import train
from test_mesh import outcome, wide_run

pytestmark = pytest.mark.multihost


def start(directory, *, mesh: str, hosts: int = 2):
    """`lab train` as a person would start it, once on each host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "sweeps.cli.main", "train", str(directory / "run.json"), "--out", str(directory)]
    return [
        subprocess.Popen(
            [*command, "--mesh", mesh, "--hosts", f"127.0.0.1:{port},{hosts},{number}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(hosts)
    ]  # fmt: skip


def ended(processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2", "fsdp=4"])
def test_two_hosts_train_what_one_device_trains(mesh, tmp_path):
    run = wide_run(evaluation=Evaluation(examples=16, times=2))
    records.write_json(tmp_path / "two" / "run.json", to_json(run))
    codes, said = ended(start(tmp_path / "two", mesh=mesh))
    assert codes == [0, 0], said
    two, one = records.read_result(tmp_path / "two"), train(run, tmp_path / "one", on=ONE_DEVICE)
    np.testing.assert_allclose(outcome(two), outcome(one), rtol=3e-6)
    assert two["measured"]["mesh"] == mesh
    lines = [line["step"] for line in records.read_metrics(tmp_path / "two")]
    assert lines == [line["step"] for line in records.read_metrics(tmp_path / "one")]


def test_hosts_that_are_stopped_save_together_and_go_on_on_another_mesh(tmp_path):
    """One of the two gets the signal; both save the same step and leave with status 75. One process goes on."""
    run = wide_run(budget=Budget(unit="steps", amount=3000))
    records.write_json(tmp_path / "run.json", to_json(run))
    processes = start(tmp_path, mesh="data=2,fsdp=2")
    until = time.monotonic() + 200
    while not records.read_metrics(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75], said
    (step,) = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert 0 < step < 3000
    alone = Execution(steps_per_dispatch=64, scan=False)
    whole, rest = train(run, tmp_path / "whole", on=ONE_DEVICE, execution=alone), train(run, tmp_path, on=ONE_DEVICE)
    assert rest["measured"]["attempts"] == 2
    np.testing.assert_allclose(rest["outcome"]["loss"], whole["outcome"]["loss"], rtol=1e-3)


@pytest.mark.parametrize("words", ["10.0.0.1", "10.0.0.1:1,2", "10.0.0.1:1,2,2", "10.0.0.1:1,two,0"])
def test_hosts_that_are_not_understood(words):
    with pytest.raises(ValueError, match="use the first host's address and port"):
        join_hosts(words)
