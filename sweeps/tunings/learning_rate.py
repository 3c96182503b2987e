"""Which learning rate is best at each size? Measures such points as the default rule of sweeps/ladder.py was fitted to.

command    lab tune learning_rate
cost       1.1e13 FLOPs in 72 trials; about 6 minutes on 2 CPU cores
expected   docs/learning-rate.md: optima near those of docs/learning-rate.csv, which was measured with seeds 0, on other seeds;
           one budget does not tell size from tokens, so that the rules are of size alone
"""

from lab.spec import Data
from sweeps.ladder import ladder
from sweeps.study import arm, corpus
from sweeps.tune.tuning import Tuning


def tuning(preset: str = "small", data: Data | None = None) -> Tuning:
    data = data or corpus("python")
    return Tuning(
        name="learning_rate",
        arms={name: arm(name, data, S=64, T=64) for name in ("encoder_decoder", "decoder_only")},
        budgets=(1.6e11,),
        sizes=ladder(8, 12, 16, 32, 64, 96, depth=2),
        batch=8,
        rates=(0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
        seeds=1,
        noise=0.014,  # over seeds, as the README's quickstart measured it at these sizes
    )


PRESETS = ("small",)
