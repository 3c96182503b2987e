"""What claims to train faster, in numbers: which settings each technique has, what they are where nothing is said, their ranges.

As with optimizers (lab.hyperparameters), no number that a run depends on is left to the code: each is resolved when a
`Technique` is made and is written into run.json. What the techniques do is lab.techniques'; docs/techniques.md has the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lab.checks import check_number, nearest, require
from lab.hyperparameters import Numbers

# What each technique has, and its value where a run says nothing. Shares are of the budget, in the budget's own unit.
SETTINGS: dict[str, dict[str, float]] = {
    "nothing": {},
    "stacking": dict(doublings=2, first=0.125, second=0.30, third=0.5),
    "layer_dropping": dict(theta=0.5, gamma=100.0),
    "selective_backprop": dict(beta=1.0, history=5000),
    "rho_loss": dict(mega_batch=2, holdout_share=0.25, holdout_charged=1),
    "ema": dict(decay=0.999),
    "lawa": dict(window=5, every=0.02),
}
# Lowest, highest, whether the lowest itself is out; of all techniques that have a setting of this name.
RANGES: dict[str, tuple[float, float, bool]] = {
    "doublings": (0, 3, False),
    "first": (0.0, 1.0, True),
    "second": (0.0, 1.0, True),
    "third": (0.0, 1.0, True),
    "theta": (0.0, 1.0, False),
    "gamma": (0.0, 1e6, True),
    "beta": (0.0, 100.0, False),
    "history": (1, 10**6, False),
    "mega_batch": (1, 100, False),
    "holdout_share": (0.0, 0.9, False),
    "holdout_charged": (0, 1, False),
    "decay": (0.0, 0.999999, False),
    "window": (1, 100, False),
    "every": (0.0, 1.0, True),
}
WHOLE = ("doublings", "history", "mega_batch", "holdout_charged", "window")
BOUNDARIES = ("first", "second", "third")  # of stacking: when the depth doubles


@dataclass(frozen=True, kw_only=True)
class Technique:
    """charged: what the technique executes is what it is charged. false, a labelled ablation: every update is charged what
    the plain run's is, whatever it takes. settings: what is not given is the named technique's own (SETTINGS)."""

    name: str
    charged: bool = True
    settings: Numbers = field(default_factory=Numbers)

    def __post_init__(self):
        require(bool(self.name) and isinstance(self.name, str), "technique.name", self.name, "name a technique")
        require(self.name in SETTINGS, "technique.name", self.name, nearest(self.name, list(SETTINGS)))
        require(isinstance(self.charged, bool), "technique.charged", self.charged, "use true or false")
        own, given = SETTINGS[self.name], self.settings
        require(isinstance(given, Mapping), "technique.settings", given, f"use an object with {list(own)}")
        for name in given:
            if name not in own:
                has = nearest(str(name), list(own)) if own else f"{self.name} has none"
                raise ValueError(f"unknown key technique.settings.{name}: {has}")
        settings = {name: given.get(name, value) for name, value in own.items()}
        for name, value in settings.items():
            where, (low, high, open_low) = f"technique.settings.{name}", RANGES[name]
            check_number(where, value, low, high, open_low=open_low)
            if name in WHOLE:
                require(float(value).is_integer(), where, value, "use a whole number")
        object.__setattr__(self, "settings", Numbers({name: float(value) for name, value in settings.items()}))
        if self.name == "stacking":
            at = self.boundaries
            require(list(at) == sorted(set(at)), "technique.settings.first, second, third", at, "use rising shares")
        if self.name == "rho_loss" and self.settings["mega_batch"] > 1:
            require(self.settings["holdout_share"] > 0, "technique.settings.holdout_share", 0,
                    "losses are measured against a holdout model's: give its training a share of the budget")  # fmt: skip

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Of stacking: the shares of the budget at which the depth doubles."""
        return tuple(self.settings[name] for name in BOUNDARIES[: int(self.settings["doublings"])])
