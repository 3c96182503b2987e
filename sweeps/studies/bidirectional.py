"""Does the value of bidirectional inputs fade as compute grows? The one dial, in two structures.

command    lab run bidirectional && lab report bidirectional
           lab run bidirectional --preset must --out runs/bidirectional_must: words whose dictionary follows them, where
           inputs that see ahead must help at every budget (lab.data.synthetic.dictionary)
cost       small: 3.0e13 FLOPs in 144 runs; planned 10 minutes on 2 CPU cores, measured 18 on cores shared with other work
           must: planned 16 minutes; not run yet. gpu, full: plans, `lab plan` says what they cost
expected   docs/studies/bidirectional.md

prefix_lm and decoder_only differ in nothing else; encoder_decoder and only_causal neither.
"""

from dataclasses import replace

from lab.spec import Data, Evaluation
from lab.structure import ALONE, STRUCTURES
from sweeps.scale import SCALES, SMALL
from sweeps.study import Study, arm

PAIRS = {
    "decoder_only": STRUCTURES["decoder_only"],
    "prefix_lm": STRUCTURES["prefix_lm"],
    "only_causal": ALONE["only_causal"],
    "encoder_decoder": STRUCTURES["encoder_decoder"],
}
MUST = replace(
    SMALL,
    budgets=(1e11, 2e11, 4e11),
    widths=(16, 24, 32),
    depth=1,
    batch=32,
    seeds=3,
    window=3,
    repeat=True,
    learning_rate=0.01,
)
WORDS = 8  # and as many entries: with 16 some seeds had learned nothing after 1.6e12 FLOPs
PRESETS = {**SCALES, "must": MUST}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale, must = PRESETS[preset], preset == "must"
    data = data or scale.corpus(f"late_dictionary:documents=65536,words={WORDS},keys={WORDS}" if must else "python")
    settings = scale.halves
    if must:
        settings |= {"S": 2 * WORDS, "T": WORDS, "evaluation": Evaluation(examples=1024)}
    # With one layer and memory=same the dial has no effect (lab.structure.canonical): that task takes memory=final.
    names = ("only_causal", "encoder_decoder") if must else tuple(PAIRS)
    return Study(
        name="bidirectional_must" if must else "bidirectional",
        question="Do inputs that see ahead help where a dictionary follows the words that it explains?"
        if must
        else "Does the value of bidirectional inputs fade as compute grows?",
        arms={name: arm(PAIRS[name], data, **settings) for name in names},
        baseline=names[0],
        sizes=scale.sizes(),
        **scale.study,
    )
