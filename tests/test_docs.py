"""What a page tells a user to do is done, from the page's own text."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add-a-technique.md"


def shown(kind: str) -> list[tuple[str, str]]:
    """(what the fence is of, its text) of the page's fences of a language."""
    return re.findall(rf"^```{kind} ?([^\n]*)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)


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
