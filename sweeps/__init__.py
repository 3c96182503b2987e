"""Many runs: `plan(study)` solves them, `run(plan)` trains them and goes on where it was stopped."""

from sweeps.execute import run
from sweeps.launch.settings import Settings
from sweeps.plan import Plan, plan
from sweeps.study import Gains, Match, Study, arm, corpus, load
from sweeps.tune.tuning import Tuning

__all__ = ["Gains", "Match", "Plan", "Settings", "Study", "Tuning", "arm", "corpus", "load", "plan", "run"]
