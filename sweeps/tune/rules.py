"""A file of rules: what `lab tune` found, for each arm.

The file is strict JSON: an unknown, missing or ill-typed key is an error that names it. `lab tune` writes it; one that
studies share is committed as sweeps/rules/NAME.json.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import records
from lab.checks import check_number, nearest, require
from lab.spec import Run
from lab.strict_json import Reader
from sweeps.ladder import Size
from sweeps.study import TUNED
from sweeps.tune.optima import LEVEL

SCHEMA = 1
SHIPPED = Path(__file__).parents[1] / "rules"
Scalar = str | int | float | bool | None
Pair = tuple[float, float]
Form = Literal["c size^a tokens^b", "c size^a", "c tokens^b", "c"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Of the fitted cells: body forward FLOPs per token of text, and tokens of text."""

    size: Pair
    tokens: Pair


@dataclass(frozen=True, kw_only=True)
class Centre:
    size: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class CellRate:
    """A cell's best rate with its 95% interval (null: open), the loss there (nats), and the parabola's curvature."""

    budget: float
    D: int
    L: int
    held_out: bool
    size: float
    tokens: float
    rate: float
    low: float | None
    high: float | None
    loss: float
    curvature: float | None
    cliff: bool  # the next higher rate diverged


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rule at a size that it was not fitted to: log_off is log(rule's rate / best rate), excess the loss that costs
    (null: outside of the rates that were tried there, or diverged), inside whether the best lies in `interval`, which is 95%
    of the optima that the rule expects there (null: no scatter is known)."""

    rate: float
    log_off: float
    excess: float | None
    interval: Pair | None
    inside: bool | None


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """Another value of one setting, at the best rates: the mean difference in loss (nats) to the setting as it was, with its
    interval; null where a trial diverged. adopted: studies that use the rule take it."""

    path: str
    value: Scalar
    difference: float | None
    low: float | None
    high: float | None
    adopted: bool


@dataclass(frozen=True, kw_only=True)
class Rule:
    """rate = c size^a tokens^b. Intervals are 95%; covariance is that of (log rate at the centre, exponents in the form);
    scatter, pooled over arms, is the standard deviation of the best rates about their rules in log rate, of `dof` degrees of
    freedom (null where none is left). trials, flops (exact) and hours (of training) are what tuning this arm cost."""

    setup: Mapping[str, Scalar]
    form: Form
    exponents: Literal["shared", "own"]  # the same for all arms, or this arm's
    c: float
    a: float
    b: float
    a_interval: Pair | None
    b_interval: Pair | None
    centre: Centre
    rate_at_centre: float
    rate_interval: Pair | None
    covariance: tuple[tuple[float, ...], ...] | None
    scatter: float | None
    dof: int
    fitted: Range
    optimizer: Mapping[str, Scalar]  # other settings that this arm was found to do better with
    trials: int
    flops: float
    hours: float
    cells: tuple[CellRate, ...]
    held_out: HeldOut | None
    coordinates: tuple[Coordinate, ...]

    def __post_init__(self):
        for name, value in (("c", self.c), ("rate_at_centre", self.rate_at_centre), ("centre.size", self.centre.size),
                            ("centre.tokens", self.centre.tokens)):  # fmt: skip
            check_number(name, value, 0.0, math.inf, open_low=True)
        there = self.c * self.centre.size**self.a * self.centre.tokens**self.b
        ok = math.isclose(there, self.rate_at_centre, rel_tol=1e-6)
        require(
            ok, "rate_at_centre", self.rate_at_centre, f"c, a and b give {there:.6g}; write the file with `lab tune`"
        )
        for name, power, column in (("a", self.a, "size"), ("b", self.b, "tokens")):
            require(column in self.form or power == 0.0, name, power, f"the form {self.form!r} has none; use 0")

    def rate(self, size: Size) -> float:
        away = self.a * math.log(size.body_flops / self.centre.size) + self.b * math.log(
            size.tokens / self.centre.tokens
        )
        return self.rate_at_centre * math.exp(away)

    def within(self, size: Size) -> float | None:
        """The factor within which the rule's rate at this size is known, at 95%; None where no scatter is known."""
        if self.covariance is None or not self.dof:
            return None
        from scipy import stats  # slow to import, and every plan reads rules

        logs = {
            "size": math.log(size.body_flops / self.centre.size),
            "tokens": math.log(size.tokens / self.centre.tokens),
        }
        x_k = [1.0, *(away for name, away in logs.items() if name in self.form)]
        variance = sum(a * b * cov for a, row in zip(x_k, self.covariance, strict=True)
                       for b, cov in zip(x_k, row, strict=True))  # fmt: skip
        return math.exp(float(stats.t.ppf((1 + LEVEL) / 2, self.dof)) * math.sqrt(max(variance, 0.0)))

    def __str__(self) -> str:
        powers = "".join(f" {name}^{power:.3f}" for name, power in (("size", self.a), ("tokens", self.b))
                         if name in self.form)  # fmt: skip
        return f"{self.c:.3g}{powers}"


@dataclass(frozen=True, kw_only=True)
class Regret:
    """Loss at a rule's rate less the loss at the arm's own best (nats): mean and worst over the cells where both were
    measured; `beyond` cells lie outside of the rates that were tried, at `diverged` the rule's rate is one that diverges."""

    mean: float | None
    worst: float | None
    cells: int
    beyond: int
    diverged: int


@dataclass(frozen=True, kw_only=True)
class Source:
    command: str
    study: str
    plan_sha256: str
    data: Mapping[str, Scalar]
    versions: Mapping[str, Scalar]
    device: str


@dataclass(frozen=True, kw_only=True)
class NoiseOfTrial:
    sd: float
    dof: float | None  # null: declared
    source: Literal["seeds", "declared"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`regret[rule][arm]`: of using that rule for that arm; `all arms` is one rule fitted to all, `lab` the default rule."""

    name: str
    source: Source
    noise: NoiseOfTrial
    rules: Mapping[str, Rule]
    regret: Mapping[str, Mapping[str, Regret]]

    def __post_init__(self):
        require(bool(self.rules), "rules", {}, "give at least one arm's")
        for rule in self.rules:
            for arm in self.rules:
                there = arm in self.regret.get(rule, {})
                require(there, f"regret.{rule}", list(self.regret.get(rule, {})), f"give that of arm {arm!r} too")


FILE = Reader(what="rules", complete="a file of rules is complete; write it with `lab tune`")


def write(path: Path, rules: Rules) -> None:
    """Whole or not at all; raises ValueError for infinities and NaN."""
    records.write_json(path, {"schema": SCHEMA, **dataclasses.asdict(rules)})


def read(path: Path) -> Rules:
    """Raises ValueError, naming the file and the key, for anything that is not as `write` wrote it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}); write it again with `lab tune`") from error
    try:
        require(isinstance(content, dict), "rules", type(content).__name__, "use the object that `lab tune` writes")
        schema = content.pop("schema", None)
        require(
            schema == SCHEMA, "schema", schema, f"this version reads {SCHEMA}; tune again, or use the one that wrote it"
        )
        return FILE.read(Rules, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find(name: str) -> Path:
    """The file that "tuned:NAME" means: a path to one, or a shipped NAME."""
    if name.endswith(".json"):
        return Path(name)
    known = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if name not in known:
        hint = nearest(name, known) if known else "none are shipped"
        raise ValueError(
            f"learning_rate = '{TUNED}{name}': no file {name}.json in sweeps/rules; {hint}, or give the path of the rules.json "
            f"that `lab tune` wrote, as '{TUNED}runs/tune-{name}/rules.json'"
        )
    return SHIPPED / f"{name}.json"


def setup(run: Run) -> dict[str, Scalar]:
    """What a rule depends on besides size and tokens."""
    parts = {
        "options": vars(run.options),
        "optimizer": {k: v for k, v in vars(run.optimizer).items() if k not in ("name", "learning_rate")},
        "parametrization": vars(run.options.parametrization),
        "extra": run.optimizer.extra,
        "technique": run.technique.settings if run.technique else {},
    }
    return {
        "structure": run.structure.name,
        "objective": run.objective.name,
        "loss": run.objective.loss,
        "S": run.objective.S,
        "T": run.objective.T,
        "batch": run.batch,
        "precision": run.precision,
        "optimizer": run.optimizer.name,
        "technique": run.technique.name if run.technique else None,
        "charged": run.technique.charged if run.technique else True,
        **{f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()
           if isinstance(value, Scalar)},
    }  # fmt: skip


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")
