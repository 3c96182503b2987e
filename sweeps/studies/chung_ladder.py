"""Chung's ladder: what does each piece of an encoder-decoder's structure buy, when it is taken away one at a time?

command    lab run chung_ladder && lab report chung_ladder
cost       small: 9.2e13 FLOPs in 144 runs; planned 23 minutes on 2 CPU cores, measured 42 on cores shared with other work
           gpu: 1.9e15 FLOPs in 72 runs; full: 3.7e21 FLOPs in 540 runs, some 4,600 hours of an H100 (plans, not run)
expected   docs/studies/chung_ladder.md

The steps, each from the one before:
0   encoder_decoder   separate cross-attention and stacks, final memory, bidirectional inputs
1a  tied_cross        cross-attention uses self-attention's projections
1b  merged_cross      one softmax over [inputs ; targets]
2   shared_stacks     one set of layers for both streams
3   prefix_lm         a target layer reads its own depth of the inputs, not the last one
4   decoder_only      causal inputs

And each dial alone, from the encoder-decoder (its cross dial alone is 1b); the GPU's preset leaves these out.
"""

from typing import Any

from lab.spec import Data
from lab.structure import ALONE, LADDER
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(
        budgets=(3e10, 1.2e11, 4.8e11, 1.92e12), widths=(8, 12, 16, 24, 32, 48, 64), depth=2, S=64, batch=8, seeds=1
    ),
    "gpu": dict(budgets=(2.5e12, 1e13, 4e13), widths=(32, 48, 64, 96, 128, 192), depth=4, S=128, batch=32, seeds=1),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18, 6.4e18, 2.56e19),
        widths=(256, 384, 512, 640, 768, 1024, 1280, 1536),
        depth=12,
        S=512,
        batch=128,
        seeds=3,
    ),
}
RULES = {"small": "tuned:ladder", "gpu": "tuned:ladder-gpu", "full": "porian"}


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen = PRESETS[preset]
    big = preset != "small"
    data = data or corpus("python", allow_repeat=preset == "full")  # a plan: real runs of that size need more text
    settings: dict[str, Any] = dict(S=chosen["S"], T=chosen["S"], precision="bf16" if big else "f32")
    arms = {name: arm(name, data, **settings) for name in LADDER}
    if preset != "gpu":  # the six steps alone fit into minutes of one GPU
        arms |= {name: arm(structure, data, **settings) for name, structure in ALONE.items()}
    return Study(
        name="chung_ladder",
        question="Removing one piece of an encoder-decoder's structure at a time: what does each cost at matched compute?",
        arms=arms,
        baseline="encoder_decoder",
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"], head_width=64 if preset == "full" else 16),
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate=RULES[preset],
    )
