"""The programs that benchmarks time are those that the trainer runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bare import Bare, side_by_side
from lab.execution import Execution
from runs import make_run


def test_a_benchmark_times_steps_of_the_trainers_program():
    bare = Bare(make_run(), Execution(steps_per_dispatch=2, scan=True, attention="blocked"))
    before = bare.built.part(bare.state, 0)["params"]["embedding_VD"].copy()
    found = side_by_side({"a": bare}, 2, base="a")
    assert found["a"][0] > 0 and found["a"][1] == 1
    assert (bare.built.part(bare.state, 0)["params"]["embedding_VD"] != before).any()
