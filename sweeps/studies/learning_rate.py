"""Which learning rate is best at each size? Fits the default rule of sweeps/ladder.py.

command    lab run learning_rate && python -m sweeps.studies.learning_rate
cost       4.5e12 FLOPs in 48 runs; about 5 minutes on 2 CPU cores
result     docs/learning-rate.md: the measured losses, the optimum of each size and the fitted power law
"""

from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

RATES = tuple(float(f"{1e-3 * 2**i:.3g}") for i in range(1, 7))


def study(preset: str = "small") -> Study:
    data = corpus("python")
    return Study(
        name="learning_rate",
        question="Which peak learning rate is best for each size of encoder-decoder and decoder-only?",
        arms={name: arm(name, data, S=64, T=64) for name in ("encoder_decoder", "decoder_only")},
        baseline="decoder_only",
        budgets={"small": (1.6e11,), "smoke": (2e9,)}[preset],
        sizes=ladder(12, 16, 32, 64, 96, depth=2),
        window=5,
        batch=8,
        learning_rate=RATES,
    )
