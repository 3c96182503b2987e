"""Sizes, and the rules for learning rate and batch that go with them; each rule states its source and its range."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from lab import cost
from lab.checks import nearest
from lab.spec import Run, Shape

HEAD_WIDTH = 16


def shape(D: int, L: int, *, L_input: int | None = None, head_width: int = HEAD_WIDTH) -> Shape:
    """D wide and L deep: multi-head with heads near `head_width`, gated MLP of 8/3 D rounded to a multiple of 8."""
    N = max(1, round(D / head_width))
    if D % N or (D // N) % 2:
        raise ValueError(
            f"D = {D}: {N} heads of near {head_width} do not divide it evenly; use a multiple of {head_width}"
        )
    return Shape(D=D, F=8 * round(D / 3), N=N, K=N, H=D // N, L=L, L_input=L if L_input is None else L_input)


def ladder(*widths: int, depth: int | Callable[[int], int], head_width: int = HEAD_WIDTH) -> tuple[Shape, ...]:
    """Shapes of these widths, smallest first; `depth` is a number of layers or a function of the width."""
    if sorted(set(widths)) != list(widths):
        raise ValueError(f"widths = {widths}: give them in ascending order, each once")
    return tuple(shape(D, depth(D) if callable(depth) else depth, head_width=head_width) for D in widths)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What learning-rate rules are functions of."""

    body_flops: float  # exact forward FLOPs of the body per token of text
    body_parameters: int
    tokens: float  # tokens of text over the whole run

    @classmethod
    def of(cls, run: Run, V: int) -> "Size":
        parts = (run.structure, run.shape, run.options, run.objective, V)
        return cls(
            body_flops=cost.body_per_token(*parts),
            body_parameters=cost.parameters(*parts).body,
            tokens=float(cost.planned(run, V)["tokens"]),
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A learning rate for every size: `rate(size)`, fitted where `measure(size)` lies in `fitted`."""

    source: str
    rate: Callable[[Size], float]
    measure: Callable[[Size], float]
    unit: str
    fitted: tuple[float, float]
    tokens: tuple[float, float] | None = None  # on which it was fitted too, where the source says

    def __call__(self, name: str, size: Size) -> float:
        for unit, value, fitted in ((self.unit, self.measure(size), self.fitted), ("tokens", size.tokens, self.tokens)):
            if fitted is not None and not fitted[0] <= value <= fitted[1]:
                warnings.warn(
                    f"learning-rate rule {name!r} was fitted on {unit} from {fitted[0]:.3g} to {fitted[1]:.3g} and is asked at "
                    f"{value:.3g}: that is extrapolation ({self.source})",
                    stacklevel=2,
                )
        return self.rate(size)


# Fitted to the points of docs/learning-rate.csv (docs/learning-rate.md; `lab tune learning_rate` measures such points).
LAB_COEFFICIENT, LAB_EXPONENT = 0.5301, -0.3314

LEARNING_RATES: dict[str, Rule] = {
    "lab": Rule(
        source="fitted here on encoder-decoder and decoder-only, docs/learning-rate.md",
        rate=lambda size: LAB_COEFFICIENT * size.body_flops**LAB_EXPONENT,
        measure=lambda size: size.body_flops,
        unit="body forward FLOPs per token",
        fitted=(6.2e3, 5.8e5),
        tokens=(8.8e4, 6.43e6),
    ),
    "porian": Rule(
        source="Porian et al. 2024, as in OLMo's ladder: 0.0047 (N / 108M)^(-1/3)",
        rate=lambda size: 0.0047 * (size.body_parameters / 108e6) ** (-1 / 3),
        measure=lambda size: size.body_parameters,
        unit="body parameters",
        fitted=(5e6, 901e6),
    ),
    "step_law": Rule(
        source="Li et al. 2025 (Step Law), the mean of its released bootstrap fits: 1.80 N^-0.713 D^0.307",
        rate=lambda size: 1.80 * size.body_parameters**-0.713 * size.tokens**0.307,
        measure=lambda size: size.body_parameters,
        unit="body parameters",
        fitted=(2.14e8, 1.08e9),  # of the released dense runs
        tokens=(4e9, 1e11),
    ),
}


def learning_rate(rule: str | float, run: Run, V: int) -> float:
    """A number stands for itself; a name is looked up in LEARNING_RATES. Warns outside the rule's fitted range."""
    if not isinstance(rule, str):
        return float(rule)
    if rule not in LEARNING_RATES:
        hint = nearest(rule, list(LEARNING_RATES))
        raise ValueError(
            f"learning_rate = {rule!r}: {hint}, or a number, or 'tuned:NAME' for rules that `lab tune` fitted"
        )
    rate = LEARNING_RATES[rule](rule, Size.of(run, V))
    # Six digits: enough for any optimizer, and the same text on every machine's mathematics library.
    return float(f"{rate:.6g}") if math.isfinite(rate) else rate
