"""Chung's ladder: what does each piece of an encoder-decoder's structure buy, when it is taken away one at a time?

command    lab run chung_ladder && lab report chung_ladder
cost       small: 2.3e14 FLOPs in 360 runs; planned 50 minutes on 2 CPU cores, measured 118 on slower ones
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

from dataclasses import replace

from lab.spec import Data
from lab.structure import ALONE, LADDER
from sweeps.scale import FULL, GPU, SMALL
from sweeps.study import Study, arm

# Budgets and rungs of `small` with three seeds: the minimum and its neighbours, as the first seeds found them.
NEAR_MINIMUM = {(0, 0), (0, 1), (0, 2), *((b, b + k) for b in (1, 2, 3) for k in (1, 2, 3))}
PRESETS = {
    "small": replace(
        SMALL,
        budgets=(*SMALL.budgets, 1.92e12),
        widths=(*SMALL.widths, 64),
        seeds=1,
        extra_seeds=dict.fromkeys(NEAR_MINIMUM, 3),
    ),
    "gpu": replace(GPU, budgets=(2.5e12, 1e13, 4e13), widths=(32, *GPU.widths[:-1]), seeds=1),
    "full": FULL,
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale = PRESETS[preset]
    data = data or scale.corpus()
    arms = {name: arm(name, data, **scale.halves) for name in LADDER}
    if preset != "gpu":  # the six steps alone fit into minutes of one GPU
        arms |= {name: arm(structure, data, **scale.halves) for name, structure in ALONE.items()}
    return Study(
        name="chung_ladder",
        question="Removing one piece of an encoder-decoder's structure at a time: what does each cost at matched compute?",
        arms=arms,
        baseline="encoder_decoder",
        sizes=scale.sizes(),
        **scale.study,
    )
