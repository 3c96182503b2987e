"""Which law to use, by hold-out scores (score.py), and the average of laws where the scores do not tell.

    select(scores([...], table))                                        the law with the least rolling error, or why
    none law_average(found, {name: draws, ...}).predict(N=1e10, D=2e11)      median and law-averaged interval

Letters: h held-out rows, b draws, k blocks of held-out rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.refusal import Refusal, Refused
from analysis.resample import Draws
from analysis.score import Score

_MINIMUM_BLOCKS = 4
_SELECTION_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """`excess` is its rolling error less that of the selected law, with a percentile interval over held-out blocks."""

    law: str
    error: float
    excess: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`failed` holds the laws that were not compared and why."""

    law: str
    error: float
    runner_ups: tuple[RunnerUp, ...]
    failed: Mapping[str, str]


def select(found: Sequence[Score], *, level: float = 0.95, seed: int = 0) -> Selection | Refused:
    """The law with the least rolling error, or Refused where there is one cut only, or where the error of another law
    is larger by no more than its noise. Laws that failed at a cut are not compared.

    The noise is that of held-out rows, resampled in blocks of a factor of about two in compute: rows nearby share what
    a law misses there, so that they are one observation of it.
    """
    usable, failed = _usable(found)
    if not usable:
        return Refused(reason=f"no law was fitted at every cut: {'; '.join(f'{k}: {v}' for k, v in failed.items())}")
    if len(usable[0].cuts) < 2:
        return Refused(reason="one cut shows one extrapolation, which chance may decide; give two cuts or more")
    blocks = _blocks(usable[0])
    if blocks < _MINIMUM_BLOCKS:
        return Refused(
            reason=f"the held-out runs lie within {blocks} doublings of compute and {_MINIMUM_BLOCKS} are needed to "
            "know the noise of a score; hold out more budgets, or use law_average"
        )
    error_lb = _resampled_errors(usable, seed)
    best = int(np.argmin([one.error for one in usable]))
    runner_ups = []
    for i in np.argsort([one.error for one in usable]):
        if i != best:
            low, high = np.quantile(error_lb[i] - error_lb[best], [(1 - level) / 2, (1 + level) / 2])
            excess = usable[i].error - usable[best].error
            runner_ups.append(
                RunnerUp(law=usable[i].law, error=usable[i].error, excess=excess, low=float(low), high=float(high))
            )
    tied = [one for one in runner_ups if not one.low > 0]
    if tied:
        names = ", ".join(f"{one.law} ({one.error:.2%})" for one in tied)
        return Refused(
            reason=f"{usable[best].law} has the least rolling error ({usable[best].error:.2%}) by no more than its "
            f"noise against {names}; hold out more budgets, or use law_average"
        )
    return Selection(law=usable[best].law, error=usable[best].error, runner_ups=tuple(runner_ups), failed=failed)


def _usable(found: Sequence[Score]) -> tuple[list[Score], dict[str, str]]:
    if not found:
        raise ValueError("scores are empty: give those of one law or more")
    failed = {one.law: "; ".join(one.failures) for one in found if one.failures}
    return [one for one in found if not one.failures and np.isfinite(one.error)], failed


def _blocks(score: Score) -> int:
    return len(np.unique(np.concatenate([score.block_n[cut.rows_h] for cut in score.cuts])))


def _resampled_errors(usable: Sequence[Score], seed: int) -> np.ndarray:
    """Rolling errors (laws, b), of the same resampled blocks for every law."""
    names = np.unique(np.concatenate([usable[0].block_n[cut.rows_h] for cut in usable[0].cuts]))
    rng = np.random.default_rng(seed)
    count_bk = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_SELECTION_DRAWS)
    errors = []
    for one in usable:
        square_b, cuts_b = np.zeros((2, _SELECTION_DRAWS))
        for cut in one.cuts:
            block_h = np.searchsorted(names, one.block_n[cut.rows_h])
            rows_b = count_bk @ np.bincount(block_h, minlength=len(names))
            sum_b = count_bk @ np.bincount(block_h, weights=cut.log_error_h**2, minlength=len(names))
            square_b += np.where(rows_b > 0, sum_b / np.maximum(rows_b, 1), 0.0)
            cuts_b += rows_b > 0
        errors.append(np.sqrt(square_b / np.maximum(cuts_b, 1)))
    return np.stack(errors)


# --- averages of laws ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LawAverage:
    """Laws by weight. An interval is that of the mixture of their draws: it holds the disagreement of the laws, which
    one law's own interval does not."""

    weights: Mapping[str, float]
    failed: Mapping[str, str]
    draws: Mapping[str, Draws] = field(repr=False)

    def of(self, quantity: Callable[[Draws], Any], level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Median and ends of the law-averaged interval of `quantity(draws)`, an array whose first axis is the draws."""
        values = [np.asarray(quantity(draws), float) for draws in self.draws.values()]
        each = np.concatenate(
            [np.full(len(v), self.weights[name] / len(v)) for name, v in zip(self.draws, values, strict=True)]
        )
        stacked = np.concatenate(values)
        order = np.argsort(stacked, axis=0)
        ordered = np.take_along_axis(stacked, order, axis=0)
        share = np.cumsum(each[order], axis=0)
        median, low, high = (
            np.take_along_axis(ordered, (share < at * share[-1:]).sum(axis=0)[None], axis=0)[0]
            for at in (0.5, (1 - level) / 2, (1 + level) / 2)
        )
        return median, low, high

    def predict(
        self, *, level: float = 0.95, new_run: bool = False, **columns: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Median loss and the ends of its law-averaged interval, of the mean curve or of a new run."""
        return self.of(lambda draws: (draws.predict_new_run if new_run else draws.predict)(**columns), level)


def law_average(found: Sequence[Score], draws: Mapping[str, Draws]) -> LawAverage:
    """Laws weighted by the likelihood of the held-out errors, error^-k with k held-out blocks: normal errors whose
    variance is each law's own mean square, a block (`select`) being one observation. Laws that failed at a cut have no
    weight.

    `draws` are those of the laws on all runs, by the scores' labels. Raises Refusal where no law has a score.
    """
    usable, failed = _usable(found)
    if not usable:
        raise Refusal(f"no law was fitted at every cut: {'; '.join(f'{k}: {v}' for k, v in failed.items())}")
    missing = [one.law for one in usable if one.law not in draws]
    if missing:
        raise ValueError(f"draws: {missing[0]!r} is missing; give the draws of {', '.join(one.law for one in usable)}")
    log_weight = -_blocks(usable[0]) * np.log([max(one.error, 1e-12) for one in usable])
    weight = np.exp(log_weight - log_weight.max())
    return LawAverage(
        weights={one.law: float(w) for one, w in zip(usable, weight / weight.sum(), strict=True)},
        failed=failed,
        draws={one.law: draws[one.law] for one in usable},
    )
