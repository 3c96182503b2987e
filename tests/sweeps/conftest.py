from pathlib import Path

import pytest

from simulated_tuning import MINE, tuned
from sweeps.tune import report, rules
from sweeps.tune.rounds import source
from sweeps.tune.tuning import load


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def written(mine) -> rules.Rules:
    """The rules of a simulated tuning, in runs/tune-mine."""
    out = Path("runs/tune-mine")
    found, _ = tuned(load(str(mine)), out)
    return report.write(found, source(found, out), out)
