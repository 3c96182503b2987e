"""How initial sizes, learning rates and forward multipliers follow width and depth, so that what is tuned on a small model
holds for a large one. Everything is relative to a base model, of which each parametrization is the standard one.

    standard   every group of parameters has the run's learning rate; weights start with variance 1 / fan-in
    mup        Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466), table 8 for Adam: width
    completep  Dey et al. 2025 (arXiv 2505.01618), table 1 at alpha = 1: width and depth

With m = D / base_D and l = L / base_L (of the layer's own stack), in the table "matrices" are the layers':

                                 standard        mup                 completep
    token tables, untied head    1/D             1/base_D            1/base_D            initial variance
      what is read at the input  sqrt(D)         sqrt(base_D)        sqrt(base_D)        times the rows
      logits                     1               1/m                 1/m                 times the product
    matrices                     1/fan-in        1/fan-in            1/fan-in            initial variance
                                 1               1/m                 1/m                 times the learning rate
                                 1               1                   m                   times the weight decay
    scores of attention          1/sqrt(H)       sqrt(base_H)/H      sqrt(base_H)/H      times the product
    residual branches            1               1                   1/l                 times what is added
      and their last matrix      1/branches      1/branches          1/base's branches   times the initial variance
    eps                          1               1                   1/m, in layers 1/(m l)

Parameters of which one side alone grows with the width are lists of vectors, as token tables are (vector-like in Tensor Programs
V): learned positions, and the factor E x D of a table, are drawn, scaled and trained as token tables; T5's biases of scores are
drawn with their variance, and added as they are; matrices that mix tokens have the run's rate and decay. Of these two there are
as many as heads, and in their eps N / base_N takes the place of m. The factor V x E has no side that grows, and nothing of it is
scaled.

Shapes are meant to grow alike: F / D and N H / D as in the base model, so that each matrix' fan-in grows as D does; an
embedding width E stays as it is. CompleteP's multiplier of a branch comes after a sandwich's second norm. CompleteP is
refused with norms after the sum and with layers that share weights (lab.spec), for which no table of depth is known.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lab.checks import check_choice, check_integer, require

Name = Literal["standard", "mup", "completep"]
BASES: dict[str, tuple[str, ...]] = {
    "standard": (),
    "mup": ("base_D", "base_H"),
    "completep": ("base_D", "base_H", "base_L"),
}


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """base_D, base_H, base_L: width, head width and depth (of each stack) of the model that was tuned."""

    name: Name = "standard"
    base_D: int | None = None
    base_H: int | None = None
    base_L: int | None = None

    def __post_init__(self):
        check_choice("options.parametrization.name", self.name, Name)
        for base in ("base_D", "base_H", "base_L"):
            where, value = f"options.parametrization.{base}", getattr(self, base)
            if base in BASES[self.name]:
                require(
                    value is not None, where, value, f"{self.name} is relative to a base model: give its {base[5:]}"
                )
                check_integer(where, value, 1)
            else:
                require(value is None, where, value, f"{self.name} does not depend on it: use null")

    def width(self, D: int) -> float:
        """m."""
        return D / self.base_D if self.base_D else 1.0

    def depth(self, L: int) -> float:
        """l, of a stack of L layers."""
        return L / self.base_L if self.base_L else 1.0

    def table_width(self, D: int) -> int:
        """The reciprocal of the initial variance of token tables, and the square of what their rows are multiplied by."""
        return self.base_D or D

    def branch_depth(self, L: int) -> int:
        """The depth by which residual branches start smaller."""
        return self.base_L or L

    def attention(self, H: int) -> float:
        """Times H^-1/2: what scores are multiplied by."""
        return math.sqrt(self.base_H / H) if self.base_H else 1.0
