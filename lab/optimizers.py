"""Optimizers and schedules: one function and one dict line each.

Every hyperparameter is an array, so that one compiled program serves all learning rates. No default of a library
is in use unseen: what matters is in `lab.spec.Optimizer`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from lab.spec import Optimizer


class Hyperparameters(NamedTuple):
    """Float32 scalars; the learning rate comes with each step instead."""

    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    clip: Any

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Hyperparameters":
        return cls(*(np.float32(getattr(optimizer, name)) for name in cls._fields))


def decays(path: tuple[Any, ...]) -> bool:
    """Weight decay acts on the matrices of the layers: not on token tables, not on norms."""
    names = [str(entry.key) for entry in path]
    return "layers" in names and not names[-1].endswith(("norm_D", "norm_H"))


def decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def adamw(hyper: Hyperparameters, learning_rate: Array | float) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019, after clipping the global gradient norm; decay is scaled by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(hyper.clip),
        optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2, eps=hyper.eps, eps_root=0.0),
        optax.add_decayed_weights(hyper.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


OPTIMIZERS: dict[str, Callable[[Hyperparameters, Any], optax.GradientTransformation]] = {"adamw": adamw}


def _cosine(share: float, optimizer: Optimizer) -> float:
    progress = (share - optimizer.warmup) / (1 - optimizer.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(share: float, optimizer: Optimizer) -> float:
    return 1 - (share - optimizer.warmup) / (1 - optimizer.warmup)


def _wsd(share: float, optimizer: Optimizer) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): constant, then linear over the last `decay` of the budget."""
    assert optimizer.decay is not None
    return min(1.0, (1 - share) / optimizer.decay)


SCHEDULES: dict[str, Callable[[float, Optimizer], float]] = {"cosine": _cosine, "linear": _linear, "wsd": _wsd}


def learning_rate(optimizer: Optimizer, share: float) -> float:
    """The rate when `share` of the budget is spent (the middle of a step is where it is asked)."""
    if share < optimizer.warmup:
        return optimizer.learning_rate * share / optimizer.warmup
    decayed = SCHEDULES[optimizer.schedule](min(share, 1.0), optimizer)
    return optimizer.learning_rate * (optimizer.final + (1 - optimizer.final) * decayed)
