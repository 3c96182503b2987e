"""What importing costs and touches."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [("analysis", "jax"), ("analysis", "matplotlib"), ("lab.spec", "jax"), ("lab.cost", "jax"), ("lab.data", "grain")],
)
def test_light_imports(module, absent):
    script = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_lab_stands_alone():
    modules = "lab.train, lab.conversation, lab.downstream"
    script = f"import sys, {modules}; sys.exit(any(m.split('.')[0] in ('sweeps', 'analysis') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
