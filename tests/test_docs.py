"""What a page tells a user to do is done, from the page's own text."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sweeps

ROOT = Path(__file__).parent.parent
PAGE = "add-a-technique.md"


def shown(kind: str, page: str = PAGE) -> list[tuple[str, str]]:
    """(what the fence is of, its text) of a page's fences of a language."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{kind} ?([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_timed_study_is_that_of_the_preset_that_was_calibrated(tmp_path):
    ((_, text),) = shown("python", "no-train-no-gain.md")
    (tmp_path / "timed.py").write_text(text)
    (words,) = re.findall(r"lab run \./timed\.py --preset (\w+)", text)
    assert f"lab calibrate no_train_no_gain --preset {words}" in text
    timed, whole = sweeps.load(str(tmp_path / "timed.py"), words), sweeps.load("no_train_no_gain", words)
    assert timed.sizes == whole.sizes and timed.arms == whole.arms
    assert (timed.match.quantity, timed.budgets) == ("reference_seconds", (600.0, 1200.0, 2400.0))


def test_arms_from_a_grid_are_every_combination():
    (text,) = (text for _, text in shown("python", "options.md") if "sweeps.grid" in text)
    given = {"arm": sweeps.arm, "data": sweeps.corpus("markov")}
    exec(text, given)
    assert {(run.options.mlp, run.options.norm) for run in given["arms"].values()} == {
        (mlp, norm) for mlp in ("swiglu", "relu2") for norm in ("rms", "layer")
    }
    assert len(given["arms"]) == 4


@pytest.mark.slow
def test_a_technique_in_one_file_and_one_line_goes_through_the_protocol(tmp_path):
    """The page's file, line and study, in a copy of the source, by the page's own commands."""
    for part in ("lab", "sweeps", "analysis"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    files = dict(shown("python"))
    line = files.pop("lab/technique.py")
    assert len(line.strip().splitlines()) == 1 and set(files) == {"lab/techniques/sharpness.py", "sharpness_study.py"}
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    table = tmp_path / "lab" / "technique.py"
    start = "TECHNIQUES: dict[str, Entry] = {\n"
    assert start in table.read_text()
    table.write_text(table.read_text().replace(start, start + line))
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    commands = [command for _, text in shown("") for command in text.splitlines() if command.startswith("lab ")]
    assert [command.split()[1] for command in commands] == ["tune", "run", "report"]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "sweeps.cli.main", *command.split()[1:]],
                              cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout

    found = json.loads((tmp_path / "runs/sharpness/verdict.json").read_text())
    claims = {(claim["arm"], claim["budget"]): claim for claim in found["claims"]}
    assert len(claims) == 3 * 3 and all(claims["no_op", budget]["value"] == 0 for budget in (4e8, 8e8, 1.6e9))
    rows = json.loads((tmp_path / "runs/sharpness/plan.json").read_text())["runs"]
    steps = {(row["arm"], row["budget"]): row["planned"]["steps"] for row in rows}
    for budget in (4e8, 8e8, 1.6e9):  # two gradients an update
        assert abs(2 * steps["sharpness", budget] - steps["adamw", budget]) <= 2
