"""The documented Python API, as a user's ten statements; they stand in the README word for word."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import analysis
import sweeps
from sweeps.ladder import ladder

data = sweeps.corpus("text", "novels")
arms = {name: sweeps.arm(name, data, S=32, T=32) for name in ("prefix_lm", "decoder_only")}
study = sweeps.Study(
    name="mine",
    question="Do bidirectional inputs help?",
    arms=arms,
    baseline="decoder_only",
    budgets=(1e9, 2e9),
    sizes=ladder(8, 16, 24, 32, depth=2, head_width=8),
    window=3,
    batch=4,
)
directory = sweeps.run(sweeps.plan(study), "runs/mine")
print(analysis.load(directory)[["arm", "budget", "loss"]])
"""


def test_the_api_in_ten_lines(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert SCRIPT.strip() in readme
    assert len(ast.parse(SCRIPT).body) <= 10
    (tmp_path / "novels").mkdir()
    for i in range(40):
        chapter = " ".join(
            f"Chapter {i}, sentence {j}: the ship sailed on, and {i * j} gulls followed it." for j in range(500)
        )
        (tmp_path / "novels" / f"{i}.txt").write_text(chapter)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prefix_lm") == done.stdout.count("decoder_only") == 6
    assert "NaN" not in done.stdout
