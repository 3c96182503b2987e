"""The command as a person types it: what it prints, and what it says to mistakes."""

import json
import shlex
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
    drawn = ("--temperature", "1.0", "--top-k", "40", "--seed", "3")
    code, other, _ = run(capsys, "sample", str(tmp_path / "out"), "--prompt", "ab", "--tokens", "12", *drawn)
    assert code == 0 and other != out
    tasks = {
        "choices": {"context": "ab", "choices": ["c", "dd"], "answer": 1},
        "pairs": {"source": "ab", "target": "c"},
    }
    for kind, line in tasks.items():
        (tmp_path / f"my-{kind}.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    files = [word for kind in tasks for word in (f"--{kind}", str(tmp_path / f"my-{kind}.jsonl"))]
    code, out, _ = run(capsys, "evaluate", str(tmp_path / "out"), *files)
    assert code == 0 and "accuracy, per byte" in out and "chrF" in out and "not ended after 5 tokens" in out
    for kind in tasks:
        written = json.loads((tmp_path / "out" / f"evaluation-my-{kind}.json").read_text())
        assert written["kind"] == kind and written[{"choices": "questions", "pairs": "pairs"}[kind]] == 3


def test_serve_cost_prints_a_table_and_writes_it(capsys, tmp_path):
    sizes = (
        "--D",
        "16",
        "--L",
        "2",
        "--head-width",
        "8",
        "--turns",
        "2",
        "--user",
        "3",
        "--reply",
        "2",
        "--repeats",
        "1",
    )
    names = ("--structures", "decoder_only,prefix_lm", "--out", str(tmp_path / "serve"))
    code, out, _ = run(capsys, "serve-cost", *sizes, *names)
    assert code == 0 and "first token ms" in out and "x1.00" in out and "prefix_lm" in out
    lines = (tmp_path / "serve" / "serve-cost.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("structure,turn,inputs,read,prefill_flops")
    assert (tmp_path / "serve" / "serve-cost.png").read_bytes().startswith(b"\x89PNG")


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
        (("serve-cost", "--structures", "prefix_ml"), "did you mean 'prefix_lm'"),
        (("sample", "nowhere", "--temperature", "-1"), "use 0 for the likeliest token"),
        (("quickstart", "--data", "./nothing", "--workers", "0"), "workers = 0: use a whole number of at least 1"),
        (("run", "./nothing.py", "--workers", "-1"), "workers = -1: use a whole number of at least 1"),
        (
            ("run", "./nothing.py", "--workers", "4", "--mesh", "data=4"),
            "workers = 4: with --mesh data=4 one worker has",
        ),
        (
            ("run", "./nothing.py", "--slurm.partition", "gpu"),
            "slurm.partition = 'gpu': it says nothing with --on local",
        ),
        (("run", "./nothing.py", "--on", "slurm", "--ray.gpus", "1"), "ray.gpus = 1: it says nothing with --on slurm"),
        (("tune", "./nothing.py", "--on", "ray", "--slurm.gpus", "8"), "slurm.gpus = 8: it says nothing with --on ray"),
        (
            ("run", "./nothing.py", "--on", "slurm", "--hosts", "10.0.0.1:9876,2,0"),
            "hosts = '10.0.0.1:9876,2,0': the nodes",
        ),
        (
            ("run", "./nothing.py", "--on", "slurm", "--out", "s3://bucket/x"),
            "out = 's3://bucket/x': jobs of Slurm need",
        ),
        (("evaluate", "nowhere"), "give --choices FILE, --pairs FILE or --held-out COUNT"),
        (("evaluate", "nowhere", "--choices", "nowhere.jsonl"), "nowhere: no such file"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err


def test_the_command_that_tries_failed_trials_again_is_the_one_that_was_given(capsys, tmp_path, monkeypatch):
    def fails(plan, directory, *, again, **_):
        raise ValueError(again)

    monkeypatch.setattr("sweeps.cli.studies.train", fails)
    words = ("tune", "ladder", "--preset", "smoke", "--out", str(tmp_path / "my trials"))
    code, _, err = run(capsys, *words, "--flops", "1e9")
    assert code == 2 and f"lab {shlex.join(words)} --retry" in " ".join(err.split())


def test_debug_shows_the_traceback():
    done = subprocess.run([sys.executable, "-m", "sweeps.cli.main", "describe", "nowhere.json", "--debug"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_an_unknown_option_is_refused(capsys):
    code, _, err = run(capsys, "plan", "quickstart", "--presett", "small")
    assert code == 2 and "presett" in err
