"""How sure a fit is: bootstraps as one batched program.

Runs of one study are independent only where they are different trainings; what is resampled is therefore a cluster (a
run, or all runs of one configuration). Draws keep every resample, converged or not: keeping only those that converged
makes intervals too narrow. Every draw starts from the point fit.

One seed gives two fits the same draws. That pairs them, which is right where rows correspond (arms that share seeds) and far
too sure where they do not: give fits of independent runs different seeds before their difference is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis import fit as fits
from analysis.fit import Fit
from analysis.laws import Law
from analysis.refusal import Refusal

DRAWS = 400
_MINIMUM_CLUSTERS = 6


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Parameters refitted to resampled data; arrays of shape (draws,), or (draws, arms) where an arm has its own.

    `kind` says what was resampled. `converged` is the share of draws whose fit converged; all are kept.
    """

    fit: Fit
    kind: str
    params: Mapping[str, np.ndarray] = field(repr=False)
    converged: float

    @property
    def law(self) -> Law:
        return self.fit.law

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    @property
    def flat(self) -> dict[str, np.ndarray]:
        return fits.flatten(self.law, self.params, self.fit.arms)

    def standard_errors(self) -> dict[str, float]:
        return {name: float(value.std(ddof=1)) for name, value in self.flat.items()}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile intervals of every parameter."""
        return {name: interval(value, level) for name, value in self.flat.items()}

    def predict(self, **columns: Any) -> np.ndarray:
        """Loss of every draw at the given columns, of shape (draws, *shape): spread of the mean curve, not of a new
        run."""
        return fits.predict(self.law, self.params, self.fit.arms, columns)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pairs_bootstrap(fit: Fit, run_ids: Any, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Resamples rows, which is right only where every row is an independent run; raises Refusal where an id repeats."""
    names = [str(name) for name in run_ids]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise Refusal(
            f"run_id {repeated!r} has {names.count(repeated)} rows, which are not independent: a bootstrap of rows would be "
            "several times too sure; use cluster_bootstrap(fit, clusters=run_ids)"
        )
    return cluster_bootstrap(fit, clusters=names, draws=draws, seed=seed)


def cluster_bootstrap(fit: Fit, clusters: Any, *, strata: Any = None, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Resamples whole clusters with replacement, within each stratum (such as an arm) where `strata` is given."""
    labels_n, names = _codes(clusters, fit, "clusters")
    strata_n, _ = _codes(np.zeros(len(labels_n)) if strata is None else strata, fit, "strata")
    rng = np.random.default_rng(seed)
    counts_bc = np.zeros((draws, len(names)))
    for stratum in np.unique(strata_n):
        members = np.unique(labels_n[strata_n == stratum])
        if len(members) < _MINIMUM_CLUSTERS:
            raise Refusal(
                f"{len(members)} clusters in a stratum: a bootstrap needs {_MINIMUM_CLUSTERS} or more; add runs, or use "
                "parametric_bootstrap with the noise of a run"
            )
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
        counts_bc[:, members] = drawn
    weights_bn = counts_bc[:, labels_n] * fit.data.weights_n
    losses_bn = np.broadcast_to(fit.data.log_loss_n, weights_bn.shape)
    return _refit(fit, f"{len(names)} clusters resampled", weights_bn, losses_bn)


def parametric_bootstrap(fit: Fit, *, sd: float, clusters: Any, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Adds normal noise of standard deviation `sd` (nats), one number for each cluster, to the fitted losses.

    Rows of one cluster are one observation (arms that share a run). It supposes that the law is right: where it is not,
    give an `sd` that contains the misfit, such as `fit.rms` times the loss.
    """
    if not (np.isfinite(sd) and sd > 0):
        raise ValueError(f"sd = {sd!r}: use the positive standard deviation of one run's loss, in nats")
    labels_n, names = _codes(clusters, fit, "clusters")
    rng = np.random.default_rng(seed)
    noise_bn = sd * rng.standard_normal((draws, len(names)))[:, labels_n]
    fitted_n = np.exp(fit.data.log_loss_n - fit.residuals())
    losses_bn = np.log(np.maximum(fitted_n + noise_bn, 1e-6 * fitted_n))
    weights_bn = np.broadcast_to(fit.data.weights_n, losses_bn.shape)
    return _refit(fit, f"normal noise of {sd:.2g} nats on the fitted law", weights_bn, losses_bn)


def _codes(values: Any, fit: Fit, name: str) -> tuple[np.ndarray, list[str]]:
    texts = [str(value) for value in values]
    if len(texts) != len(fit.data.log_loss_n):
        raise ValueError(
            f"{name} has {len(texts)} labels: give one for each of the {len(fit.data.log_loss_n)} fitted rows"
        )
    names = list(dict.fromkeys(texts))
    index = {text: code for code, text in enumerate(names)}
    return np.asarray([index[text] for text in texts]), names


def _refit(fit: Fit, kind: str, weights_bn: np.ndarray, losses_bn: np.ndarray) -> Draws:
    solved, params = fits.refit(fit, weights_bn, losses_bn)
    return Draws(fit=fit, kind=kind, params=params, converged=float(np.mean(solved.converged_m)))
