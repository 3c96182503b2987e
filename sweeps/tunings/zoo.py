"""Every modification of the study `options`, tuned alike.

command    lab tune zoo --rules sweeps/rules/zoo.json
cost       4.7e13 FLOPs in 1,760 trials (grids were moved twice; 1,232 are planned at first, for 28 minutes on 2 CPU cores),
           1.7 hours of training, 53 minutes on cores shared with other work
expected   docs/studies/tuning-zoo.md
"""

from lab.spec import Data
from sweeps.ladder import ladder, shape
from sweeps.studies.options import ZOO
from sweeps.study import arm, corpus
from sweeps.tune.tuning import Tuning

PRESETS = ("small",)


def tuning(preset: str = "small", data: Data | None = None) -> Tuning:
    data = data or corpus("python")
    return Tuning(
        name="zoo",
        arms={name: arm("decoder_only", data, S=64, T=64, options=options) for name, options in ZOO.items()},
        budgets=(5e9, 1.4e10, 4e10),
        sizes=ladder(8, 16, depth=2),
        hold_out=(8e10, shape(24, 2)),
        batch=8,
        rates=(0.015, 0.03, 0.06, 0.12),
        seeds=2,
    )
