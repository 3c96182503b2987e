"""Chung's third curve: more structure, less, and even less. Does the one with the least win in the end?

command    lab run less_structure && lab report less_structure
cost       small: 6.1e13 FLOPs in 144 runs; planned 15 minutes on 2 CPU cores, measured 25 beside other work
           gpu, full: plans, `lab plan` says what they cost
expected   docs/studies/less_structure.md

more        encoder_decoder   separate stacks and cross-attention, bidirectional inputs
less        decoder_only      one causal stack
even_less   dense_mixing      one causal stack whose tokens are mixed by a learned triangular matrix a head (options.mixing):
                              no queries and keys, and no weights shared over positions
"""

from dataclasses import replace

from lab.spec import Data, Options
from sweeps.scale import FULL, GPU, SMALL
from sweeps.study import Study, arm

DENSE = Options(
    mixing="dense", qk_norm=False, encoding="none"
)  # there are no queries, no keys and no positions but the matrix's
PRESETS = {
    "small": replace(SMALL, budgets=(2e10, 8e10, 3.2e11, 1.28e12), widths=(*SMALL.widths, 64)),
    "gpu": GPU,
    "full": FULL,
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale = PRESETS[preset]
    data = data or scale.corpus()
    return Study(
        name="less_structure",
        question="Encoder-decoder, decoder-only, and mixing that knows of no positions in common: which wins in the end?",
        arms={
            "encoder_decoder": arm("encoder_decoder", data, **scale.halves),
            "decoder_only": arm("decoder_only", data, **scale.halves),
            "dense_mixing": arm("decoder_only", data, options=DENSE, **scale.halves),
        },
        baseline="decoder_only",
        sizes=scale.sizes(),
        rules={"dense_mixing": "decoder_only"} if scale.tuned else {},
        **scale.study,
    )
