"""What claims to train faster: one line each, with its settings, and what they are where a run says nothing.

As with optimizers (lab.hyperparameters), no number that a run depends on is left to the code: each is resolved when a
`Technique` is made and is written into run.json. What the techniques do is lab.techniques'; docs/techniques.md has the sources,
docs/add-a-technique.md shows how one more is added.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lab.checks import check_number, nearest, require
from lab.hyperparameters import Numbers

if TYPE_CHECKING:
    from lab.method import Method


class Setting(NamedTuple):
    """value: where a run says nothing. From low, itself excepted where open_low, to high. whole: a count, or 0 and 1."""

    value: float
    low: float
    high: float
    open_low: bool = False
    whole: bool = False


class Entry:
    """path: "module:class" of the lab.method.Method, which needs jax and is imported when a run is trained or planned."""

    def __init__(self, path: str, **settings: Setting):
        self.path, self.settings = path, settings

    @property
    def method(self) -> "type[Method]":
        module, name = self.path.split(":")
        return getattr(importlib.import_module(module), name)


def _share(value: float) -> Setting:
    """Of the budget, in the budget's own unit."""
    return Setting(value, 0.0, 1.0, open_low=True)


def _count(value: int, low: int, high: int) -> Setting:
    return Setting(value, low, high, whole=True)


TECHNIQUES: dict[str, Entry] = {
    "nothing": Entry("lab.method:Method"),
    "stacking": Entry("lab.techniques.stacking:Stacking", doublings=_count(2, 0, 3),
                      first=_share(0.125), second=_share(0.30), third=_share(0.5)),
    "layer_dropping": Entry("lab.techniques.layer_dropping:LayerDropping", theta=Setting(0.5, 0.0, 1.0),
                            gamma=Setting(100.0, 0.0, 1e6, open_low=True)),
    "selective_backprop": Entry("lab.techniques.selective_backprop:SelectiveBackprop", beta=Setting(1.0, 0.0, 100.0),
                                history=_count(5000, 1, 10**6)),
    "rho_loss": Entry("lab.techniques.rho_loss:RhoLoss", mega_batch=_count(2, 1, 100), holdout_share=Setting(0.25, 0.0, 0.9),
                      holdout_charged=_count(1, 0, 1)),
    "ema": Entry("lab.techniques.averaging:Ema", decay=Setting(0.999, 0.0, 0.999999)),
    "lawa": Entry("lab.techniques.averaging:Lawa", window=_count(5, 1, 100), every=_share(0.02)),
}  # fmt: skip
BOUNDARIES = ("first", "second", "third")  # of stacking: when the depth doubles


@dataclass(frozen=True, kw_only=True)
class Technique:
    """charged: what the technique executes is what it is charged. false, a labelled ablation: every update is charged what
    the plain run's is, whatever it takes. settings: what is not given is the named technique's own (TECHNIQUES)."""

    name: str
    charged: bool = True
    settings: Numbers = field(default_factory=Numbers)

    def __post_init__(self):
        require(bool(self.name) and isinstance(self.name, str), "technique.name", self.name, "name a technique")
        require(self.name in TECHNIQUES, "technique.name", self.name, nearest(self.name, list(TECHNIQUES)))
        require(isinstance(self.charged, bool), "technique.charged", self.charged, "use true or false")
        own, given = TECHNIQUES[self.name].settings, self.settings
        require(isinstance(given, Mapping), "technique.settings", given, f"use an object with {list(own)}")
        for name in given:
            if name not in own:
                has = nearest(str(name), list(own)) if own else f"{self.name} has none"
                raise ValueError(f"unknown key technique.settings.{name}: {has}")
        settings = {name: given.get(name, setting.value) for name, setting in own.items()}
        for name, value in settings.items():
            where, setting = f"technique.settings.{name}", own[name]
            check_number(where, value, setting.low, setting.high, open_low=setting.open_low)
            if setting.whole:
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
