"""A run's optimizer in numbers: which hyperparameters each optimizer has, what they are where nothing is said, their ranges.

No number that a run depends on is a library's: each stands here with its source, is resolved when an `Optimizer` is made, and is
written into run.json. What the optimizers do with them is lab.optimizers'.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lab.checks import check_choice, check_number, nearest, require

Schedule = Literal["cosine", "linear", "wsd", "constant"]
Curvature = Literal["gauss_newton", "hutchinson"]
COMMON = ("beta1", "beta2", "eps", "weight_decay", "clip")  # fields of an Optimizer; all others are in `extra`
ADAM = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)

# What each optimizer has, and its value where a run says nothing. docs/optimizers.md has the sources.
DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": ADAM,
    "nadamw": ADAM,
    "cautious_adamw": ADAM | dict(least_share=1e-3),
    "adamw_scale": dict(beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0, clip=1.0, least_rms=1e-3),
    "adafactor": dict(
        eps=1e-30, weight_decay=0.0, clip=1.0, decay_exponent=0.8, clip_update=1.0, least_rms=1e-3
    ),
    "lion": dict(beta1=0.9, beta2=0.99, weight_decay=0.3, clip=1.0),
    "sophia_g": dict(
        beta1=0.96, beta2=0.99, eps=1e-12, weight_decay=0.2, clip=1.0, gamma=0.05, interval=10, hessian_share=0.5
    ),
    "sophia_h": dict(
        beta1=0.96, beta2=0.99, eps=1e-12, weight_decay=0.2, clip=1.0, gamma=0.01, interval=10, hessian_share=1 / 15
    ),
    "muon": dict(
        beta1=0.95, eps=1e-7, weight_decay=0.1, clip=1.0, rms=0.2, iterations=5,
        adam_rate=1.0, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8,
    ),
    "soap": ADAM | dict(beta1=0.95, shampoo_beta=0.95, interval=10),
    "schedule_free_adamw": ADAM | dict(weight_power=2.0),
    "ademamix": ADAM | dict(beta2=0.999, beta3=0.9999, alpha=8.0, slow_warmup=1.0),
    "prodigy": ADAM | dict(beta2=0.999, beta3=0.999**0.5, d0=1e-6, d_coefficient=1.0),
}  # fmt: skip
CURVATURE: dict[str, Curvature] = {"sophia_g": "gauss_newton", "sophia_h": "hutchinson"}
# What is not the optimizer's own but the run's: its planned steps, and the seed that labels or directions are drawn with.
OF_THE_RUN = {"ademamix": ("steps",), "sophia_g": ("seed",), "sophia_h": ("seed",)}
# Those that divide by the root of a second moment, entry by entry: what the parametrizations' tables are derived for.
ADAM_LIKE = ("adamw", "nadamw", "cautious_adamw", "ademamix")

# Lowest, highest, whether the lowest itself is out; of all optimizers that have one of this name.
RANGES: dict[str, tuple[float, float, bool]] = {
    "beta1": (0.0, 0.9999, False),
    "beta2": (0.0, 0.999999, False),
    "eps": (0.0, 1.0, True),
    "weight_decay": (0.0, 100.0, False),
    "clip": (0.0, 1e9, True),
    "least_share": (0.0, 1.0, True),
    "least_rms": (0.0, 1.0, True),
    "decay_exponent": (0.0, 1.0, True),
    "clip_update": (0.0, 1e9, True),
    "gamma": (0.0, 1e9, True),
    "interval": (1, 10**6, False),
    "hessian_share": (0.0, 1.0, True),
    "rms": (0.0, 10.0, True),
    "iterations": (1, 50, False),
    "adam_rate": (0.0, 1e3, True),
    "adam_beta1": (0.0, 0.9999, False),
    "adam_beta2": (0.0, 0.999999, False),
    "adam_eps": (0.0, 1.0, True),
    "shampoo_beta": (0.0, 0.9999, False),
    "weight_power": (0.0, 10.0, False),
    "beta3": (0.0, 0.999999, True),
    "alpha": (0.0, 100.0, False),
    "slow_warmup": (0.0, 1.0, True),
    "d0": (0.0, 1.0, True),
    "d_coefficient": (0.0, 100.0, True),
}
WHOLE = ("interval", "iterations")


class Numbers(Mapping[str, float]):
    """Named numbers that do not change, and so can be part of a frozen run."""

    def __init__(self, content: Mapping[str, float] | None = None):
        self._content = dict(sorted((content or {}).items()))

    def __getitem__(self, name: str) -> float:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(tuple(self._content.items()))

    def __repr__(self) -> str:
        return repr(self._content)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Shares (warmup, decay) are of the budget, in the budget's own unit; `final` is a share of the peak rate.

    What is not given is the named optimizer's own (DEFAULTS), filled in when this is made; null is what it does not have. `extra`
    holds what only some optimizers have. To change the name make a new Optimizer: hyperparameters of one are not another's.
    """

    name: str = "adamw"
    learning_rate: float
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None  # on the layers' matrices; never on token tables, norms or other vectors
    clip: float | None = None  # global gradient norm
    extra: Numbers = field(default_factory=Numbers)
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float | None = None  # wsd only: the share at the end over which the rate falls linearly
    final: float = 0.0

    def __post_init__(self):
        require(bool(self.name) and isinstance(self.name, str), "optimizer.name", self.name, "name an optimizer")
        require(self.name in DEFAULTS, "optimizer.name", self.name, nearest(self.name, list(DEFAULTS)))
        check_number("optimizer.learning_rate", self.learning_rate, 0.0, 10.0, open_low=True)
        self._resolve(DEFAULTS[self.name])
        check_choice("optimizer.schedule", self.schedule, Schedule)
        check_number("optimizer.warmup", self.warmup, 0.0, 0.9)
        check_number("optimizer.final", self.final, 0.0, 1.0)
        if self.schedule == "wsd":
            require(
                self.decay is not None,
                "optimizer.decay",
                self.decay,
                "wsd needs the share of the budget that decays, such as 0.2",
            )
            check_number("optimizer.decay", self.decay, 0.0, 1.0 - self.warmup, open_low=True)
        else:
            require(
                self.decay is None,
                "optimizer.decay",
                self.decay,
                f"{self.schedule} {'does not decay' if self.schedule == 'constant' else 'decays from the end of warm-up'}: use "
                "null, or schedule='wsd'",
            )
        if self.schedule == "constant":
            require(self.final == 0.0, "optimizer.final", self.final, "constant falls to nothing: use 0")
        if self.name == "schedule_free_adamw":
            require(
                self.schedule == "constant",
                "optimizer.schedule",
                self.schedule,
                "schedule_free_adamw averages where others decay: use 'constant', which has a warm-up",
            )

    def _resolve(self, own: dict[str, float]) -> None:
        """Fills in what is not given; raises ValueError for what this optimizer does not have."""
        for name in COMMON:
            value = getattr(self, name)
            if name not in own:
                require(
                    value is None,
                    f"optimizer.{name}",
                    value,
                    f"{self.name} has none: use null; another optimizer's run starts from a new Optimizer(name=...)",
                )
                continue
            object.__setattr__(self, name, own[name] if value is None else value)
            self._check(f"optimizer.{name}", name, getattr(self, name))
        known = [name for name in own if name not in COMMON]
        require(isinstance(self.extra, Mapping), "optimizer.extra", self.extra, f"use an object with {known}")
        for name in self.extra:
            if name not in known:
                has = nearest(str(name), known) if known else f"{self.name} has none"
                raise ValueError(f"unknown key optimizer.extra.{name}: {has}")
        extra = {name: self.extra.get(name, own[name]) for name in known}
        for name, value in extra.items():
            self._check(f"optimizer.extra.{name}", name, value)
        object.__setattr__(self, "extra", Numbers({name: float(value) for name, value in extra.items()}))

    def _check(self, where: str, name: str, value: object) -> None:
        low, high, open_low = RANGES[name]
        # A weight of 0 would lose the average, which is told from what is trained by it.
        open_low = open_low or (self.name, name) == ("schedule_free_adamw", "beta1")
        check_number(where, value, low, high, open_low=open_low)
        if name in WHOLE:
            require(float(value).is_integer(), where, value, "use a whole number")  # pyright: ignore[reportArgumentType]

    @property
    def curvature(self) -> Curvature | None:
        """Which estimate of the Hessian's diagonal it takes an extra pass for, every `interval` steps from the first on."""
        return CURVATURE.get(self.name)

    def hessian_examples(self, batch: int) -> int:
        """How many of a batch's examples that pass reads: the first so many."""
        return max(1, round(self.extra["hessian_share"] * batch)) if self.curvature else 0

    def numbers(self, *, steps: int, seed: int) -> dict[str, float]:
        """Everything that the optimizer reads beside the learning rate, in a run of so many steps and this seed.

        A seed is taken modulo 2^24: all are float32, which holds those exactly.
        """
        own = {name: getattr(self, name) for name in COMMON if getattr(self, name) is not None}
        of_the_run = {"steps": float(steps), "seed": float(seed % 2**24)}
        return own | dict(self.extra) | {name: of_the_run[name] for name in OF_THE_RUN.get(self.name, ())}


def number_names(name: str) -> tuple[str, ...]:
    """Of the numbers of an optimizer of this name."""
    return (*DEFAULTS[name], *OF_THE_RUN.get(name, ()))
