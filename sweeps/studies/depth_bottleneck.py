"""Is reading only the last layer a bottleneck, and more of one the deeper a model is? Final against same-layer memory.

command    lab run depth_bottleneck && lab report depth_bottleneck
cost       small: 6.0e13 FLOPs in 288 runs; planned 23 minutes on 2 CPU cores, measured 38 on cores shared with other work
           gpu and full: plans, `lab plan` says what they cost
expected   docs/studies/depth_bottleneck.md

shared_stacks (memory=final) and prefix_lm (memory=same) differ in nothing but that dial. At each depth both have their own
ladder of widths, and spend the same. The answer is in the steps, final -> same at each depth; how they go with depth is read
off, and is no verdict of its own. With one layer, exact counting spares `same` the last input layer's MLP, which nothing reads.
"""

from dataclasses import replace

from lab.spec import Data
from sweeps.scale import FULL, GPU, SMALL, Scale
from sweeps.study import Study, arm

MEMORY = {"final": "shared_stacks", "same": "prefix_lm"}
# A scale, and the widths of the ladder at each depth.
PRESETS: dict[str, tuple[Scale, dict[int, tuple[int, ...]]]] = {
    "small": (
        SMALL,
        {
            1: (12, 16, 24, 32, 48, 64),
            2: (8, 12, 16, 24, 32, 48),
            4: (6, 8, 12, 16, 24, 32),
            8: (4, 6, 8, 12, 16, 24),
        },
    ),
    "gpu": (
        GPU,
        {2: (64, 96, 128, 192, 256, 320), 8: (32, 48, 64, 96, 128, 192), 24: (16, 32, 48, 64, 80, 96)},
    ),
    "full": (
        replace(FULL, budgets=FULL.budgets[:-1]),
        {
            6: (384, 512, 640, 768, 1024, 1280, 1536),
            12: (256, 384, 512, 640, 768, 1024, 1280),
            24: (192, 256, 384, 448, 512, 640, 768),
            48: (128, 192, 256, 320, 384, 448, 512),
        },
    ),
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    scale, widths = PRESETS[preset]
    data = data or scale.corpus()
    cells = [(memory, depth) for depth in widths for memory in MEMORY]
    return Study(
        name="depth_bottleneck",
        question="Does reading only the input stack's last layer cost more, the deeper the model is?",
        arms={f"{memory}_{depth}": arm(MEMORY[memory], data, **scale.halves) for memory, depth in cells},
        baseline=f"same_{min(widths)}",
        sizes={f"{memory}_{depth}": scale.sizes(widths[depth], depth) for memory, depth in cells},
        # Tuned at two layers.
        rules={f"{memory}_{depth}": MEMORY[memory] for memory, depth in cells} if scale.tuned else {},
        steps=tuple((f"final_{depth}", f"same_{depth}") for depth in widths),
        **scale.study,
    )
