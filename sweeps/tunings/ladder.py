"""Chung's six structures, each dial alone, and decoder-only with loss on all tokens, tuned alike on Python source.

command    lab tune ladder --rules sweeps/rules/ladder.json
cost       9.3e13 FLOPs in 700 trials, and a few more where grids are moved; about half an hour on 2 CPU cores
expected   sweeps/rules/ladder.json and docs/studies/tuning-ladder.md, trained on a GPU

small: S = T = 64 bytes. gpu: the six steps alone, 4 layers, S = T = 128, bf16; --rules sweeps/rules/ladder-gpu.json.
settings: as small, and beta2 and weight decay on either side of AdamW's usual ones. smoke: two arms at sizes that show in a
minute whether every part works, and nothing else.
"""

from lab.spec import Data
from lab.structure import ALONE, LADDER
from sweeps.ladder import ladder, shape
from sweeps.study import arm, corpus
from sweeps.tune.tuning import Tuning

SMALL = {"budgets": (3e10, 1.2e11), "widths": (8, 16, 32), "hold_out": (4.8e11, 48), "batch": 8,
         "rates": (0.005, 0.01, 0.02, 0.04, 0.08), "depth": 2, "S": 64}  # fmt: skip
PRESETS = {
    "small": SMALL,
    "settings": {**SMALL, "coordinates": {"optimizer.beta2": (0.9, 0.99), "optimizer.weight_decay": (0.0, 0.3)}},
    "gpu": {
        "budgets": (1.2e12, 4.8e12),
        "widths": (32, 48, 64),
        "hold_out": (1e13, 96),
        "batch": 32,
        "rates": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "depth": 4,
        "S": 128,
    },
    "smoke": {
        **SMALL,
        "budgets": (1e9, 2e9),
        "widths": (8, 16),
        "hold_out": (2e9, 24),
        "batch": 1,
        "rates": (0.005, 0.02, 0.08),
    },
}


def tuning(preset: str = "small", data: Data | None = None) -> Tuning:
    data, chosen = data or corpus("python"), PRESETS[preset]
    settings = {"S": chosen["S"], "T": chosen["S"], "precision": "bf16" if preset == "gpu" else "f32"}
    arms = {name: arm(name, data, **settings) for name in LADDER}
    if preset == "smoke":
        arms = {name: arms[name] for name in ("encoder_decoder", "decoder_only")}
    elif preset != "gpu":
        arms |= {name: arm(structure, data, **settings) for name, structure in ALONE.items()}
        arms["decoder_only_all"] = arm("decoder_only", data, loss="all", **settings)
    budget, width = chosen["hold_out"]
    return Tuning(
        name="ladder" if preset == "small" else f"ladder-{preset}",
        arms=arms,
        budgets=chosen["budgets"],
        sizes=ladder(*chosen["widths"], depth=chosen["depth"]),
        hold_out=(budget, shape(width, chosen["depth"])),
        batch=chosen["batch"],
        rates=chosen["rates"],
        coordinates=chosen.get("coordinates", {}),
    )
