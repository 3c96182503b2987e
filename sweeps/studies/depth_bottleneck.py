"""Is reading only the last layer a bottleneck, and more of one the deeper a model is? Final against same-layer memory.

command    lab run depth_bottleneck && lab report depth_bottleneck
cost       `lab plan` says it; not run yet
expected   docs/studies/README.md says what was found, once it was run

shared_stacks (memory=final) and prefix_lm (memory=same) differ in nothing but that dial. At each depth both have their own
ladder of widths, and spend the same.
"""

from typing import Any

from lab.spec import Data
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus

MEMORY = {"final": "shared_stacks", "same": "prefix_lm"}
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(
        budgets=(3e10, 1.2e11, 4.8e11),
        widths={
            1: (12, 16, 24, 32, 48, 64),
            2: (8, 12, 16, 24, 32, 48),
            4: (6, 8, 12, 16, 24, 32),
            8: (4, 6, 8, 12, 16, 24),
        },
        S=64,
        batch=8,
        seeds=2,
    ),
    "gpu": dict(
        budgets=(5e12, 2e13, 8e13),
        widths={2: (64, 96, 128, 192, 256, 320), 8: (32, 48, 64, 96, 128, 192), 24: (16, 32, 48, 64, 80, 96)},
        S=128,
        batch=32,
        seeds=3,
    ),
    "full": dict(
        budgets=(1e17, 4e17, 1.6e18, 6.4e18),
        widths={
            6: (384, 512, 640, 768, 1024, 1280, 1536),
            12: (256, 384, 512, 640, 768, 1024, 1280),
            24: (192, 256, 384, 448, 512, 640, 768),
            48: (128, 192, 256, 320, 384, 448, 512),
        },
        S=512,
        batch=128,
        seeds=3,
    ),
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    chosen = PRESETS[preset]
    data = data or corpus("python", allow_repeat=preset == "full")
    S, precision = chosen["S"], "f32" if preset == "small" else "bf16"
    head = {"small": 2, "gpu": 16, "full": 64}[preset]
    cells = [(memory, depth) for depth in chosen["widths"] for memory in MEMORY]
    return Study(
        name="depth_bottleneck",
        question="Does reading only the input stack's last layer cost more, the deeper the model is?",
        arms={f"{m}_{depth}": arm(MEMORY[m], data, S=S, T=S, precision=precision) for m, depth in cells},
        baseline=f"same_{min(chosen['widths'])}",
        budgets=chosen["budgets"],
        sizes={f"{m}_{depth}": ladder(*chosen["widths"][depth], depth=depth, head_width=head) for m, depth in cells},
        batch=chosen["batch"],
        seeds=chosen["seeds"],
        learning_rate="tuned:ladder" if preset == "small" else "porian",
        rules={f"{m}_{depth}": MEMORY[m] for m, depth in cells} if preset == "small" else {},  # tuned at two layers
    )
