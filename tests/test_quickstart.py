"""The first thing a user does, from nothing to a page, at a size that takes a minute or two."""

import json
import subprocess
import sys

import pytest


def quickstart(directory):
    command = [sys.executable, "-m", "sweeps.cli.main", "quickstart", "--preset", "smoke"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_quickstart_from_nothing_and_again(tmp_path):
    first = quickstart(tmp_path)
    assert first.returncode == 0, first.stderr
    study = tmp_path / "runs" / "quickstart"
    page = (study / "report.html").read_text()
    assert "decoder_only" in page and "<script src" not in page
    assert "report: " in first.stdout and "against decoder_only" in first.stdout
    results = {path: path.stat().st_mtime_ns for path in study.glob("runs/*/result.json")}
    assert len(results) == 56
    plan = json.loads((study / "plan.json").read_text())
    by_id = {path.parent.name: json.loads(path.read_text()) for path in results}
    for row in plan["runs"]:
        assert abs(row["residual"]) <= 0.01
        if by_id[row["run_id"]]["status"] == "done":
            assert by_id[row["run_id"]]["outcome"]["spent"] == row["planned"]
    again = quickstart(tmp_path)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert results == {path: path.stat().st_mtime_ns for path in study.glob("runs/*/result.json")}
