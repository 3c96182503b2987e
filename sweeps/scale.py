"""How large a study is. The shipped studies of structure share these, so that what one finds can be laid beside another's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lab.spec import Data, Shape
from sweeps.ladder import ladder
from sweeps.study import corpus


@dataclass(frozen=True, kw_only=True)
class Scale:
    """budgets: exact FLOPs. widths: of the ladder's rungs. text: tokens of an example, inputs and targets. learning_rate: the
    rule that suits these sizes. extra_seeds: as in a Study. repeat: whether more than four epochs of the default text are let
    pass, as in a plan that is for other text."""

    budgets: tuple[float, ...]
    widths: tuple[int, ...]
    depth: int
    text: int
    batch: int
    seeds: int
    learning_rate: str | float
    window: int = 4
    precision: Literal["f32", "bf16"] = "bf16"
    head_width: int = 16
    repeat: bool = False
    extra_seeds: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def tuned(self) -> bool:
        """Whether each arm has a rule of its own."""
        return isinstance(self.learning_rate, str) and self.learning_rate.startswith("tuned:")

    def sizes(self, widths: tuple[int, ...] | None = None, depth: int | None = None) -> tuple[Shape, ...]:
        return ladder(*(widths or self.widths), depth=depth or self.depth, head_width=self.head_width)

    def corpus(self, name: str = "python") -> Data:
        return corpus(name, allow_repeat=self.repeat)

    @property
    def halves(self) -> dict[str, Any]:
        """For `arm`: half of the text is inputs, half targets."""
        return {"S": self.text // 2, "T": self.text // 2, "precision": self.precision}

    @property
    def study(self) -> dict[str, Any]:
        """For `Study`: what does not depend on the question."""
        return {"budgets": self.budgets, "batch": self.batch, "seeds": self.seeds, "window": self.window,
                "learning_rate": self.learning_rate, "extra_seeds": self.extra_seeds}  # fmt: skip


# Two CPU cores, half an hour at most; one GPU, an hour at most; a cluster, as a plan.
SMALL = Scale(
    budgets=(3e10, 1.2e11, 4.8e11),
    widths=(8, 12, 16, 24, 32, 48),
    depth=2,
    text=128,
    batch=8,
    seeds=3,
    learning_rate="tuned:ladder",
    precision="f32",
)
GPU = Scale(
    budgets=(5e12, 2e13, 8e13),
    widths=(48, 64, 96, 128, 192, 256),
    depth=4,
    text=256,
    batch=32,
    seeds=3,
    learning_rate="lab",
)
FULL = Scale(
    budgets=(1e17, 4e17, 1.6e18, 6.4e18, 2.56e19),
    widths=(256, 384, 512, 640, 768, 1024, 1280, 1536),
    depth=12,
    text=1024,
    batch=128,
    seeds=3,
    learning_rate="porian",
    head_width=64,
    repeat=True,
)
SCALES = {"small": SMALL, "gpu": GPU, "full": FULL}
