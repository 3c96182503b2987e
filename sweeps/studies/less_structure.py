"""Chung's third curve: more structure, less, and even less. Does the one with the least win in the end?

command    lab run less_structure && lab report less_structure
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

more        encoder_decoder   separate stacks and cross-attention, bidirectional inputs
less        decoder_only      one causal stack
even_less   dense_mixing      one causal stack whose tokens are mixed by a learned triangular matrix a head (options.mixing):
                              no queries and keys, and no weights shared over positions
"""

from typing import Any

from lab.spec import Data, Options
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

DENSE = Options(
    mixing="dense", qk_norm=False, encoding="none"
)  # there are no queries, no keys and no positions but the matrix's
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(
        budgets=(2e10, 8e10, 3.2e11, 1.28e12), widths=(8, 12, 16, 24, 32, 48, 64), depth=2, S=64, batch=8, seeds=3
    ),
    "gpu": dict(budgets=(5e12, 2e13, 8e13), widths=(48, 64, 96, 128, 192, 256), depth=4, S=128, batch=32, seeds=3),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18, 6.4e18, 2.56e19),
        widths=(256, 384, 512, 640, 768, 1024, 1280, 1536),
        depth=12,
        S=512,
        batch=128,
        seeds=3,
    ),
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen = PRESETS[preset]
    data = data or corpus("python", allow_repeat=preset == "full")
    settings: dict[str, Any] = dict(S=chosen["S"], T=chosen["S"], precision="f32" if preset == "small" else "bf16")
    return Study(
        name="less_structure",
        question="Encoder-decoder, decoder-only, and mixing that knows of no positions in common: which wins in the end?",
        arms={
            "encoder_decoder": arm("encoder_decoder", data, **settings),
            "decoder_only": arm("decoder_only", data, **settings),
            "dense_mixing": arm("decoder_only", data, options=DENSE, **settings),
        },
        baseline="decoder_only",
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"], head_width=64 if preset == "full" else 16),
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate="tuned:ladder" if preset == "small" else "porian",
        rules={"dense_mixing": "decoder_only"} if preset == "small" else {},
    )
