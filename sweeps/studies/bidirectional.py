"""Does the value of bidirectional inputs fade as compute grows? The one dial, in two structures.

command    lab run bidirectional && lab report bidirectional
           lab run bidirectional --preset must --out runs/bidirectional_must: words whose dictionary follows them, where
           inputs that see ahead must help at every budget (lab.data.synthetic.dictionary)
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

prefix_lm and decoder_only differ in nothing else; encoder_decoder and only_causal neither.
"""

from typing import Any

from lab.spec import Data, Evaluation
from lab.structure import ALONE, STRUCTURES
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

PAIRS = {
    "decoder_only": STRUCTURES["decoder_only"],
    "prefix_lm": STRUCTURES["prefix_lm"],
    "only_causal": ALONE["only_causal"],
    "encoder_decoder": STRUCTURES["encoder_decoder"],
}
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(
        budgets=(3e10, 1.2e11, 4.8e11), widths=(8, 12, 16, 24, 32, 48), depth=2, S=64, T=64, batch=8, seeds=3
    ),
    "must": dict(budgets=(2e11, 8e11, 3.2e12), widths=(16, 24, 32, 48), depth=1, S=32, T=16, batch=32, seeds=2),
    "gpu": dict(
        budgets=(5e12, 2e13, 8e13), widths=(48, 64, 96, 128, 192, 256), depth=4, S=128, T=128, batch=32, seeds=3
    ),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18, 6.4e18, 2.56e19),
        widths=(256, 384, 512, 640, 768, 1024, 1280, 1536),
        depth=12,
        S=512,
        T=512,
        batch=128,
        seeds=3,
    ),
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen, must = PRESETS[preset], preset == "must"
    text = "late_dictionary:documents=65536" if must else "python"
    data = data or corpus(text, allow_repeat=must or preset == "full")
    settings: dict[str, Any] = dict(
        S=chosen["S"],
        T=chosen["T"],
        precision="bf16" if preset in ("gpu", "full") else "f32",
        evaluation=Evaluation(examples=1024 if must else 512),
    )
    # With one layer and memory=same the dial has no effect (lab.structure.canonical): that task takes memory=final.
    names = ("only_causal", "encoder_decoder") if must else tuple(PAIRS)
    return Study(
        name="bidirectional_must" if must else "bidirectional",
        question="Do inputs that see ahead help where a dictionary follows the words that it explains?"
        if must
        else "Does the value of bidirectional inputs fade as compute grows?",
        arms={name: arm(PAIRS[name], data, **settings) for name in names},
        baseline=names[0],
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"], head_width=64 if preset == "full" else 16),
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate={"must": 0.01, "small": "tuned:ladder"}.get(preset, "porian"),
    )
