"""Chung's six structures, and decoder-only with loss on all tokens, tuned alike on S = T = 64 bytes of Python source.

command    lab tune ladder --rules sweeps/rules/ladder.json
cost       7.6e13 FLOPs in 630 trials, and a few more where grids are moved; planned 27 minutes on 2 CPU cores (settings: 42)
expected   not run yet at `small`; then `learning_rate="tuned:ladder"` in the studies that have these arms

settings: the same, and beta2 and weight decay on either side of AdamW's usual ones. smoke: two arms at sizes that show in a
minute whether every part works, and nothing else.
"""

from lab.spec import Data
from lab.structure import LADDER
from sweeps.ladder import ladder, shape
from sweeps.study import arm, corpus
from sweeps.tune.tuning import Tuning

SMALL = {"budgets": (3e10, 1.2e11), "widths": (8, 16, 24, 32), "hold_out": (4.8e11, 48), "batch": 8,
         "rates": (0.005, 0.01, 0.02, 0.04, 0.08)}  # fmt: skip
PRESETS = {
    "small": SMALL,
    "settings": {**SMALL, "coordinates": {"optimizer.beta2": (0.9, 0.99), "optimizer.weight_decay": (0.0, 0.3)}},
    "smoke": {
        "budgets": (1e9, 2e9),
        "widths": (8, 16),
        "hold_out": (2e9, 24),
        "batch": 1,
        "rates": (0.005, 0.02, 0.08),
    },
}


def tuning(preset: str = "small", data: Data | None = None) -> Tuning:
    data, chosen = data or corpus("python"), PRESETS[preset]
    arms = {name: arm(name, data, S=64, T=64) for name in LADDER}
    arms["decoder_only_all"] = arm("decoder_only", data, S=64, T=64, loss="all")
    if preset == "smoke":
        arms = {name: arms[name] for name in ("encoder_decoder", "decoder_only")}
    budget, width = chosen["hold_out"]
    return Tuning(
        name="ladder" if preset == "small" else f"ladder-{preset}",
        arms=arms,
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=2),
        hold_out=(budget, shape(width, 2)),
        batch=chosen["batch"],
        rates=chosen["rates"],
        coordinates=chosen.get("coordinates", {}),
    )
