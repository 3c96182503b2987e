"""Which of the last years' modifications survive? A decoder-only model with each of them alone, at matched compute.

command    lab run options && lab report options
           the rules that it takes: lab tune zoo --rules sweeps/rules/zoo.json
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

The question of Narang et al. 2021 (arXiv 2102.11972), who found that few transfer; here at equal compute, and
differences are corrected for their number (Holm).
"""

from dataclasses import replace

from lab.spec import Data, Options
from sweeps.scale import FULL, GPU, SMALL
from sweeps.study import Study, arm

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
PRESETS = {
    "small": replace(SMALL, budgets=(1e10, 4e10, 1.6e11), learning_rate="tuned:zoo"),
    "gpu": replace(GPU, budgets=(1e12, 4e12, 1.6e13), widths=(32, *GPU.widths[:-2]), window=3, batch=16),
    "full": replace(FULL, budgets=FULL.budgets[:3], widths=FULL.widths[:6]),
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale = PRESETS[preset]
    data = data or scale.corpus()
    return Study(
        name="options",
        question="Which modification of a decoder-only transformer still pays at matched compute?",
        arms={name: arm("decoder_only", data, options=options, **scale.halves) for name, options in ZOO.items()},
        baseline=BASELINE,
        sizes=scale.sizes(),
        **scale.study,
    )
