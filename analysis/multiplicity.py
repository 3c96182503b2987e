"""Many comparisons at once: adjusted p-values, and whether the small scale ranks arms as the large one does.

Letters: a arms, b draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.refusal import Refusal

_MINIMUM_ARMS = 3


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of one wrong call or more, valid under any dependence between the
    comparisons (Holm 1979)."""
    order = np.argsort(p)
    corrected, running = [1.0] * len(p), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = running
    return corrected


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """The share of wrong calls among all calls, for comparisons that are independent or depend positively (Benjamini and
    Hochberg 1995): less strict than Holm where many arms are screened."""
    if not len(p):
        return []
    order = np.argsort(p)[::-1]
    ranks = np.arange(len(p), 0, -1)
    stepped = np.minimum.accumulate(np.asarray(p, float)[order] * len(p) / ranks)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


@dataclass(frozen=True, kw_only=True)
class RankAgreement:
    """Does the small scale rank the arms as the large one does.

    `accuracy` is DataDecide's decision accuracy (Magnusson et al. 2025, arXiv:2504.11393): the share of pairs of arms of
    which the better one at the small scale is the better one at the large; `tau` is Kendall's, 2 accuracy - 1 without
    ties. Intervals are of a bootstrap of arms, with the noise of their losses where it is known.
    """

    arms: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    tau: float
    tau_interval: tuple[float, float]
    level: float

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        return (
            f"the small scale ranks {self.accuracy:.0%} of the pairs of {self.arms} arms as the large one does "
            f"({self.level:.0%} interval {low:.0%} to {high:.0%}); Kendall's tau {self.tau:.2f}"
        )


def rank_agreement(
    small: Mapping[str, float],
    large: Mapping[str, float],
    *,
    small_error: Mapping[str, float] | None = None,
    large_error: Mapping[str, float] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> RankAgreement:
    """Of the arms' losses at two scales; `*_error` are standard errors of those losses, nats.

    Every draw takes as many arms with replacement and adds normal noise of the given errors; a pair of an arm with itself
    is none. Raises Refusal for fewer than three arms.
    """
    arms = [name for name in small if name in large]
    if len(arms) < _MINIMUM_ARMS:
        raise Refusal(
            f"{len(arms)} arms at both scales: agreement of ranks needs {_MINIMUM_ARMS} or more, and is vague below ten"
        )
    rng = np.random.default_rng(seed)

    def drawn(losses: Mapping[str, float], errors: Mapping[str, float] | None) -> np.ndarray:
        point = np.array([losses[name] for name in arms], float)
        error = np.array([(errors or {}).get(name, 0.0) for name in arms], float)
        return np.concatenate([point[None], point + error * rng.standard_normal((draws, len(arms)))])

    chosen_ba = rng.integers(len(arms), size=(draws, len(arms)))
    # The point estimate's arms are each there once.
    picked_ba = np.concatenate([np.arange(len(arms))[None], chosen_ba])
    at_small, at_large = (
        np.take_along_axis(drawn(losses, errors), picked_ba, axis=1)
        for losses, errors in ((small, small_error), (large, large_error))
    )
    i, j = np.triu_indices(len(arms), 1)
    product = np.sign(at_small[:, i] - at_small[:, j]) * np.sign(at_large[:, i] - at_large[:, j])
    pairs = picked_ba[:, i] != picked_ba[:, j]
    count = pairs.sum(axis=1)
    usable = count > 0  # a draw of one arm alone has no pair
    tau = (product * pairs).sum(axis=1)[usable] / count[usable]
    # A tie at either scale is no decision: it is half right.
    accuracy = ((product + 1) / 2 * pairs).sum(axis=1)[usable] / count[usable]
    tail = (1 - level) / 2

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        return float(low), float(high)

    return RankAgreement(
        arms=len(arms),
        accuracy=float(accuracy[0]),
        accuracy_interval=interval(accuracy),
        tau=float(tau[0]),
        tau_interval=interval(tau),
        level=level,
    )
