"""Optimizers: one function, in a file of its kind, and one dict line each; what a run says of them is lab.hyperparameters'.

Every hyperparameter is an array, so that one compiled program serves all learning rates and betas, and no state depends on
one when it is made. A state follows its parameters: arrays of a parameter's shape have its name, whatever else there is does
not end in letters of a shape that it does not have (lab.mesh).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from lab.hyperparameters import Optimizer, number_names
from lab.optimizers.adafactor import adafactor
from lab.optimizers.adam import adamw, adamw_scale, ademamix, cautious_adamw, nadamw
from lab.optimizers.descent import Hyperparameters, decay_mask, decays
from lab.optimizers.lion import lion
from lab.optimizers.muon import muon
from lab.optimizers.prodigy import prodigy
from lab.optimizers.scales import Scales, scales
from lab.optimizers.schedule_free import averaged, schedule_free_adamw
from lab.optimizers.schedules import SCHEDULES, learning_rate
from lab.optimizers.soap import soap
from lab.optimizers.sophia import sophia

__all__ = [
    "OPTIMIZERS", "SCHEDULES", "Hyperparameters", "Scales", "decay_mask", "decays", "eval_params", "hyperparameters",
    "learning_rate", "no_numbers", "scales",
]  # fmt: skip

# (hyperparameters, learning rate, scales of a parametrization or None) -> what turns a gradient into an update.
OPTIMIZERS: dict[str, Callable[[Hyperparameters, Any, Scales | None], optax.GradientTransformation]] = {
    "adamw": adamw,
    "nadamw": nadamw,
    "cautious_adamw": cautious_adamw,
    "adamw_scale": adamw_scale,
    "adafactor": adafactor,
    "lion": lion,
    "sophia_g": sophia,
    "sophia_h": sophia,
    "muon": muon,
    "soap": soap,
    "schedule_free_adamw": schedule_free_adamw,
    "ademamix": ademamix,
    "prodigy": prodigy,
}
# What is evaluated and reported, where it is not what gradients are taken at: (hyperparameters, parameters, state).
AVERAGES: dict[str, Callable[[Hyperparameters, Any, Any], Any]] = {"schedule_free_adamw": averaged}


def hyperparameters(optimizer: Optimizer, *, steps: int, seed: int) -> Hyperparameters:
    """Float32 scalars; the learning rate comes with each step instead. steps, seed: those of the run."""
    return {name: np.float32(value) for name, value in optimizer.numbers(steps=steps, seed=seed).items()}


def no_numbers(name: str) -> Hyperparameters:
    """Zeros: for shapes, and for a state's start, which no number decides."""
    return dict.fromkeys(number_names(name), np.float32(0))


def eval_params(optimizer: Optimizer, state: dict[str, Any]) -> Any:
    """The parameters that a training state stands for: what is evaluated, hashed and handed on."""
    average = AVERAGES.get(optimizer.name)
    if average is None:
        return state["params"]
    hyper = hyperparameters(optimizer, steps=1, seed=0)
    # Compiled, wherever the state is: the same numbers give the same bits. The average lies as the parameters do.
    places = jax.tree.map(lambda p: getattr(p, "sharding", None), state["params"])
    return jax.jit(average, out_shardings=places)(hyper, state["params"], state["optimizer"])
