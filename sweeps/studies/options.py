"""Which of the last years' modifications survive? A decoder-only model with each of them alone, at matched compute.

command    lab run options && lab report options
           each arm by its own rule: lab tune zoo --rules sweeps/rules/zoo.json, then learning_rate="tuned:zoo" below
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

The question of Narang et al. 2021 (arXiv 2102.11972), who found that few transfer; here at equal compute, and
differences are corrected for their number (Holm).
"""

from typing import Any

from lab.spec import Data, Options
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

BASELINE = "default"  # RMSNorm before, SwiGLU, RoPE, QK-norm, tied embeddings
ZOO = {
    BASELINE: Options(),
    "layer_norm": Options(norm="layer"),
    "no_norm": Options(norm="scale"),
    "post_norm": Options(norm_place="post"),
    "sandwich_norm": Options(norm_place="sandwich"),
    "no_qk_norm": Options(qk_norm=False),
    "geglu": Options(mlp="geglu"),
    "gelu": Options(mlp="gelu"),
    "relu": Options(mlp="relu"),
    "relu2": Options(mlp="relu2"),
    "parallel": Options(block="parallel"),
    "learned": Options(encoding="learned"),
    "sinusoidal": Options(encoding="sinusoidal"),
    "alibi": Options(encoding="alibi"),
    "t5": Options(encoding="t5"),
    "no_positions": Options(encoding="none"),
    "window_32": Options(window=32),
    "softcap_30": Options(logit_softcap=30.0),
    "z_loss": Options(z_loss=1e-4),
    "untied": Options(tied_embeddings=False),
    "factorised_8": Options(embedding_width=8),
    "shared_layers": Options(share_layers=True),
}
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(budgets=(1e10, 4e10, 1.6e11), widths=(8, 12, 16, 24, 32), window=3, depth=2, S=64, batch=8, seeds=3),
    "gpu": dict(
        budgets=(1e12, 4e12, 1.6e13), widths=(32, 48, 64, 96, 128), window=3, depth=4, S=128, batch=16, seeds=3
    ),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18),
        widths=(256, 384, 512, 640, 768, 1024),
        window=4,
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
        name="options",
        question="Which modification of a decoder-only transformer still pays at matched compute?",
        arms={name: arm("decoder_only", data, options=options, **settings) for name, options in ZOO.items()},
        baseline=BASELINE,
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"], head_width=64 if preset == "full" else 16),
        window=chosen["window"],
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate="lab" if preset == "small" else "porian",  # `tuned:zoo` once that tuning has been run
    )
