"""What a fit does about points that lie far off: Huber's delta from the scatter, and outlier rules by name.

Both are part of the estimator. `fit_law(..., delta=SCATTER, outliers="beyond_4_sd")` applies them to the data, and every
resample applies them again to its own; five points that were dropped by hand decide the published Chinchilla exponents.

Letters: n rows, m members of a batch.
"""

from collections.abc import Callable

import numpy as np

SCATTER = "scatter"
_HUBER = 1.345  # standard deviations: 95% efficient where residuals are normal (Huber 1964)
_MAD = 1.482602218505602  # sd of a normal distribution over its median absolute deviation

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def weighted_median(values_mn: np.ndarray, weights_mn: np.ndarray) -> np.ndarray:
    """The least value at which half of the weight is reached: shape (m,)."""
    order = np.argsort(values_mn, axis=1)
    weights = np.take_along_axis(np.broadcast_to(weights_mn, values_mn.shape), order, axis=1)
    reached = np.cumsum(weights, axis=1)
    at = (reached < 0.5 * reached[:, -1:]).sum(axis=1)
    at = np.minimum(at, values_mn.shape[1] - 1)[:, None]
    return np.take_along_axis(np.take_along_axis(values_mn, order, axis=1), at, axis=1)[:, 0]


def spread(residual_mn: np.ndarray, weights_mn: np.ndarray, parameters: int) -> np.ndarray:
    """Standard deviation of residuals by their median absolute value, for the rows that the parameters have used up."""
    n_m = (np.broadcast_to(weights_mn, residual_mn.shape) > 0).sum(axis=1)
    left = np.maximum(n_m - parameters, 1)
    return _MAD * weighted_median(np.abs(residual_mn), weights_mn) * np.sqrt(n_m / left)


def huber_delta(residual_mn: np.ndarray, weights_mn: np.ndarray, parameters: int, least: float) -> np.ndarray:
    """Huber's delta for residuals of a least-squares fit; `least` where they are smaller still."""
    return np.maximum(_HUBER * spread(residual_mn, weights_mn, parameters), least)


def _beyond(sds: float) -> Rule:
    def keep(residual_mn: np.ndarray, weights_mn: np.ndarray, log_loss_mn: np.ndarray) -> np.ndarray:
        return np.abs(residual_mn) <= sds * spread(residual_mn, weights_mn, 0)[:, None] + 1e-12

    return keep


def _five_highest_losses(residual_mn: np.ndarray, weights_mn: np.ndarray, log_loss_mn: np.ndarray) -> np.ndarray:
    losses = np.broadcast_to(log_loss_mn, residual_mn.shape)
    weights = np.broadcast_to(weights_mn, residual_mn.shape)
    order = np.argsort(-losses, axis=1, kind="stable")
    # A row that was drawn twice is two of the five.
    before = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    keep = np.empty(losses.shape, bool)
    np.put_along_axis(keep, order, before > 5, axis=1)
    return keep


# From residuals, weights and log losses (m, n) to the rows that are kept.
OUTLIER_RULES: dict[str, Rule] = {
    # Further than four robust standard deviations from the curve that was fitted to all.
    "beyond_4_sd": _beyond(4.0),
    "beyond_3_sd": _beyond(3.0),
    # Besiroglu et al. 2024 (arXiv:2404.10102) drop the five points of highest loss.
    "five_highest_losses": _five_highest_losses,
}


def rule(name: str) -> Rule:
    if name not in OUTLIER_RULES:
        raise ValueError(f"outliers = {name!r}: use one of {', '.join(OUTLIER_RULES)}, or None to keep every row")
    return OUTLIER_RULES[name]
