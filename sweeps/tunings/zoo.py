"""Every modification of the study `options`, tuned alike.

command    lab tune zoo --rules sweeps/rules/zoo.json
cost       6.7e13 FLOPs in 1,144 trials (880 are planned at first, for 27 minutes on 2 CPU cores; grids were moved twice),
           1.2 hours of training, 37 minutes on cores shared with other work
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
        budgets=(1.5e10, 6e10),
        sizes=ladder(12, 24, depth=2),
        hold_out=(1.6e11, shape(32, 2)),
        batch=8,
        rates=(0.0125, 0.025, 0.05, 0.1),
        seeds=2,
    )
