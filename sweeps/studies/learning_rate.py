"""Which learning rate is best at each size? Fits the default rule of sweeps/ladder.py.

command    lab run learning_rate && python -m sweeps.tune runs/learning_rate docs/learning-rate.csv
cost       1.1e13 FLOPs in 72 runs; about 6 minutes on 2 CPU cores
expected   docs/learning-rate.md: the measured losses, the optimum of each size and the fitted power law
"""

from lab.spec import Data
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

PRESETS = {"small": (1.6e11,)}
RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)


def study(preset: str = "small", data: Data | None = None) -> Study:
    data = data or corpus("python")
    return Study(
        name="learning_rate",
        question="Which peak learning rate is best for each size of encoder-decoder and decoder-only?",
        arms={name: arm(name, data, S=64, T=64) for name in ("encoder_decoder", "decoder_only")},
        baseline="decoder_only",
        budgets=PRESETS[preset],
        sizes=ladder(8, 12, 16, 32, 64, 96, depth=2),
        window=6,
        batch=8,
        learning_rate=RATES,
    )
