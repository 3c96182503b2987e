"""The learning rate as a function of the spent share of the budget: one function and one dict line each."""

import math
from collections.abc import Callable

from lab.hyperparameters import Optimizer


def _cosine(share: float, optimizer: Optimizer) -> float:
    progress = (share - optimizer.warmup) / (1 - optimizer.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(share: float, optimizer: Optimizer) -> float:
    return 1 - (share - optimizer.warmup) / (1 - optimizer.warmup)


def _wsd(share: float, optimizer: Optimizer) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): constant, then linear over the last `decay` of the budget."""
    assert optimizer.decay is not None
    return min(1.0, (1 - share) / optimizer.decay)


def _constant(share: float, optimizer: Optimizer) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, Optimizer], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}


def learning_rate(optimizer: Optimizer, share: float) -> float:
    """The rate when `share` of the budget is spent (the middle of a step is where it is asked)."""
    if share < optimizer.warmup:
        return optimizer.learning_rate * share / optimizer.warmup
    decayed = SCHEDULES[optimizer.schedule](min(share, 1.0), optimizer)
    return optimizer.learning_rate * (optimizer.final + (1 - optimizer.final) * decayed)
