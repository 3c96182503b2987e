"""Chung's ladder: what does each piece of an encoder-decoder's structure buy, when it is taken away one at a time?

command    lab run chung_ladder && lab report chung_ladder
cost       1.6e13 FLOPs in 84 runs; about 9 minutes on 2 CPU cores (preset `long`: five budgets, 2.1e14 FLOPs, 2 hours)
expected   not run yet at `long`; at `small` the steps differ by a few hundredths of a nat

0   encoder_decoder   separate cross-attention and stacks, final memory, bidirectional inputs
1a  tied_cross        cross-attention uses self-attention's projections
1b  merged_cross      one softmax over [inputs ; targets]
2   shared_stacks     one set of layers for both streams
3   prefix_lm         a target layer reads its own depth of the inputs, not the last one
4   decoder_only      causal inputs
"""

from lab.spec import Data
from lab.structure import LADDER
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

PRESETS = {
    "small": {"budgets": (3e10, 1.2e11, 4.8e11), "widths": (8, 12, 16, 24, 32, 48)},
    "long": {"budgets": (3e10, 1.2e11, 4.8e11, 1.92e12, 7.68e12), "widths": (8, 12, 16, 24, 32, 48, 64, 96)},
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    data, chosen = data or corpus("python"), PRESETS[preset]
    return Study(
        name="chung_ladder",
        question="Removing one piece of an encoder-decoder's structure at a time: what does each cost at matched compute?",
        arms={name: arm(name, data, S=64, T=64) for name in LADDER},
        baseline="encoder_decoder",
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=2),
        batch=8,
        extra_seeds={(1, 2): 3},
    )
