"""RedLLM's question uncrossed: is it the encoder-decoder's structure, or the objective that it was trained with?

command    lab run redllm && lab report redllm
cost       small: 3.8e13 FLOPs in 180 runs; planned 13 minutes on 2 CPU cores, measured 22 on cores shared with other work
           gpu, full: plans, `lab plan` says what they cost
expected   docs/studies/redllm.md

RedLLM (Zhang et al. 2025, arXiv 2510.26622) compares an encoder-decoder trained on a prefix LM with a decoder-only model
trained on all tokens: structure and objective change together. Here they are crossed:

                         encoder_decoder     decoder_only
prefix LM, targets       ed_prefix           do_prefix
all tokens               none can            do_all
half of the text         ed_half             do_half

All are scored alike: the targets after 1/4, 1/2 and 3/4 of the same held-out texts.
"""

from lab.spec import Data, Evaluation, Objective
from sweeps.scale import SCALES
from sweeps.study import Study, arm

PRESETS = SCALES
# Tuned on the half of a text; a prefix LM's arms take the rules of its structure.
RULES = {
    "do_prefix": "decoder_only",
    "do_half": "decoder_only",
    "do_all": "decoder_only_all",
    "ed_prefix": "encoder_decoder",
    "ed_half": "encoder_decoder",
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale = PRESETS[preset]
    data = data or scale.corpus()
    half, quarters = scale.text // 2, (scale.text // 4, scale.text // 2, 3 * scale.text // 4)
    objectives = {
        "prefix": Objective(name="prefix_lm", S=half, T=half, splits=quarters),
        "half": Objective(S=half, T=half),
        "all": Objective(S=half, T=half, loss="all"),
    }
    scored_alike = Evaluation(examples=512, splits=quarters)
    arms = {
        f"{short}_{name}": arm(structure, data, objective=objective, evaluation=scored_alike, precision=scale.precision)
        for short, structure in (("do", "decoder_only"), ("ed", "encoder_decoder"))
        for name, objective in objectives.items()
        if not (short == "ed" and name == "all")
    }
    return Study(
        name="redllm",
        question="Encoder-decoder with a prefix LM against decoder-only with all tokens: is it structure or objective?",
        arms=arms,
        baseline="do_all",
        steps=(
            ("ed_prefix", "do_prefix"),  # structure, at each objective that both can have
            ("ed_half", "do_half"),
            ("ed_prefix", "ed_half"),  # objective, at each structure
            ("do_prefix", "do_half"),
            ("do_half", "do_all"),
        ),
        sizes=scale.sizes(),
        rules=RULES if scale.tuned else {},
        **scale.study,
    )
