"""The command as a person types it: what it prints, and what it says to mistakes."""

import json
import subprocess
import sys

import pytest

from lab.data import describe
from lab.spec import Budget, to_json
from runs import make_run
from sweeps.cli.main import COMMANDS, main


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        main(words)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(make_run(data=describe("markov").data, budget=Budget(unit="steps", amount=40)))))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"Example: lab {command}" in " ".join(out.replace("│", " ").split())


def test_describe_train_and_sample(capsys, run_file, tmp_path):
    code, out, _ = run(capsys, "describe", str(run_file))
    assert code == 0
    for shown in ("optimizer.learning_rate", "0.003", "target attention", "<- budget", "parameters"):
        assert shown in out
    code, out, _ = run(capsys, "train", str(run_file), "--out", str(tmp_path / "out"))
    assert code == 0 and "nats per target token" in out and "exact FLOP/s; seconds: compile" in out
    code, out, _ = run(capsys, "sample", str(tmp_path / "out"), "--prompt", "ab", "--tokens", "12")
    assert code == 0 and len(out.strip()) >= 12
    code, again, _ = run(capsys, "sample", str(tmp_path / "out"), "--prompt", "ab", "--tokens", "12")
    assert again == out


def test_flops_of_every_step_of_the_ladder(capsys):
    code, out, _ = run(capsys, "flops", "--D", "64", "--L", "2", "--head-width", "16")
    assert code == 0 and "encoder_decoder" in out and "1.000" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "quikstart"), "did you mean 'quickstart'"),
        (("run", "./nothing.py"), "no shipped study and no file"),
        (("report", "nowhere"), "no plan.json there nor under runs/nowhere"),
        (("status", "nowhere"), "no plan.json"),
        (("describe", "nowhere.json"), "no such file"),
        (("flops", "--D", "63"), "do not divide it evenly"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err


def test_debug_shows_the_traceback():
    done = subprocess.run([sys.executable, "-m", "sweeps.cli.main", "describe", "nowhere.json", "--debug"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_an_unknown_option_is_refused(capsys):
    code, _, err = run(capsys, "plan", "quickstart", "--presett", "small")
    assert code == 2 and "presett" in err
