"""RedLLM's question uncrossed: is it the encoder-decoder's structure, or the objective that it was trained with?

command    lab run redllm && lab report redllm
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

RedLLM (Zhang et al. 2025, arXiv 2510.26622) compares an encoder-decoder trained on a prefix LM with a decoder-only model
trained on all tokens: structure and objective change together. Here they are crossed:

                         encoder_decoder     decoder_only
prefix LM, targets       ed_prefix           do_prefix
all tokens               none can            do_all
half of the text         ed_half             do_half

All are scored alike: the targets after 1/4, 1/2 and 3/4 of the same held-out texts.
"""

from typing import Any

from lab.spec import Data, Evaluation, Objective
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(budgets=(3e10, 1.2e11, 4.8e11), widths=(8, 12, 16, 24, 32, 48), depth=2, text=128, batch=8, seeds=3),
    "gpu": dict(budgets=(5e12, 2e13, 8e13), widths=(48, 64, 96, 128, 192, 256), depth=4, text=256, batch=32, seeds=3),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18, 6.4e18, 2.56e19),
        widths=(256, 384, 512, 640, 768, 1024, 1280, 1536),
        depth=12,
        text=1024,
        batch=128,
        seeds=3,
    ),
}
# Tuned on the half of a text; a prefix LM's arms take the rules of its structure.
RULES = {
    "do_prefix": "decoder_only",
    "do_half": "decoder_only",
    "do_all": "decoder_only_all",
    "ed_prefix": "encoder_decoder",
    "ed_half": "encoder_decoder",
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen = PRESETS[preset]
    data = data or corpus("python", allow_repeat=preset == "full")
    text = chosen["text"]
    quarters = (text // 4, text // 2, 3 * text // 4)
    half = text // 2
    objectives = {
        "prefix": Objective(name="prefix_lm", S=half, T=half, splits=quarters),
        "half": Objective(S=half, T=half),
        "all": Objective(S=half, T=half, loss="all"),
    }
    settings: dict[str, Any] = dict(
        evaluation=Evaluation(examples=512, splits=quarters), precision="f32" if preset == "small" else "bf16"
    )
    arms = {
        f"{short}_{name}": arm(structure, data, objective=objective, **settings)
        for short, structure in (("do", "decoder_only"), ("ed", "encoder_decoder"))
        for name, objective in objectives.items()
        if not (short == "ed" and name == "all")
    }
    return Study(
        name="redllm",
        question="Encoder-decoder with a prefix LM against decoder-only with all tokens: is it structure or objective?",
        arms=arms,
        baseline="do_all",
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"], head_width=64 if preset == "full" else 16),
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate="tuned:ladder" if preset == "small" else "porian",
        rules=RULES if preset == "small" else {},
    )
