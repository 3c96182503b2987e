"""How sure a fit is: resampling as one batched program.

Runs of one study are independent only where they are different trainings; what is resampled is therefore a cluster (a
run, or all runs of one configuration). Every resample goes through the whole estimator: delta taken from the scatter and
the outlier rule are found in it anew. Draws keep every resample, converged or not: keeping only those that converged
makes intervals too narrow. Every draw starts from the point fit.

One seed gives two fits the same draws. That pairs them, which is right where rows correspond (arms that share seeds) and far
too sure where they do not: give fits of independent runs different seeds before their difference is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis import fit as fits
from analysis.fit import Fit
from analysis.laws import Law
from analysis.refusal import Refusal

DRAWS = 400
EPSILON = 1e-3
_MINIMUM_CLUSTERS = 6
_MINIMUM_WILD = 4
# Webb 2013: six points of mean 0 and variance 1, so that few clusters still give many different resamples.
WEBB = np.sqrt([0.5, 1.0, 1.5]).repeat(2) * np.tile([-1.0, 1.0], 3)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Parameters refitted to resampled data; arrays of shape (draws,), or (draws, arms) where an arm has its own.

    `kind` says what was resampled. `converged` is the share of draws whose fit converged; all are kept.

    Draws of a covariance, and not of refits, carry `near`: parameters a small share EPSILON of the way from the point fit
    to each draw and to its mirror image. Quantities are then worked out linearly about the point fit: E, A and B are known
    far less well than the losses that they add up to, and the curvature of that sum would be taken for spread.
    """

    fit: Fit
    kind: str
    params: Mapping[str, np.ndarray] = field(repr=False)
    converged: float
    near: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None = field(default=None, repr=False)

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

    def of(self, quantity: Callable[[Mapping[str, Any]], Any], level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of a quantity worked out from the parameters, such as
        `draws.of(lambda p: p["beta"] / (p["alpha"] + p["beta"]))`."""
        return interval(self.values(quantity), level)

    def values(self, quantity: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
        """The quantity for every draw, its axis first."""
        if self.near is None:
            return np.asarray(quantity(self.params))
        point = {name: np.asarray(value)[None] for name, value in self.fit.params.items()}
        ahead, behind = (np.asarray(quantity(params)) for params in self.near)
        return np.asarray(quantity(point)) + (ahead - behind) / (2 * EPSILON)

    def predict(self, **columns: Any) -> np.ndarray:
        """Loss of every draw at the given columns, of shape (draws, *shape): spread of the MEAN CURVE, not of a new
        run."""
        return self.values(lambda params: fits.predict(self.law, params, self.fit.arms, columns))

    def predict_new_run(self, *, seed: int = 0, **columns: Any) -> np.ndarray:
        """As `predict`, with the scatter of one run about the curve: a residual of the fit drawn for every entry, widened
        for the degrees of freedom that the fit has used. Spread of a NEW RUN under the same law."""
        mean = self.predict(**columns)
        kept = (self.fit.data.weights_n > 0) & ~self.fit.dropped_n
        residual_n = self.fit.residuals()[kept]
        widened = residual_n * np.sqrt(len(residual_n) / max(1, len(residual_n) - self.fit.problem.k))
        drawn = np.random.default_rng([seed, 2]).choice(widened, size=mean.shape)
        return mean * np.exp(drawn)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pairs_bootstrap(fit: Fit, run_ids: Any, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Resamples rows, which is right only where every row is an independent run; raises Refusal where an id repeats."""
    names = [str(name) for name in run_ids]
    refuse_repeated(names)
    return cluster_bootstrap(fit, clusters=names, draws=draws, seed=seed)


def refuse_repeated(names: Sequence[str]) -> None:
    """Raises Refusal where two rows are of one run: they are not independent."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise Refusal(
            f"run_id {repeated!r} has {counts[repeated]} rows, which are not independent: a bootstrap of rows would be "
            "several times too sure; use clusters=run_ids (cluster_bootstrap, jackknife)"
        )


def cluster_bootstrap(fit: Fit, clusters: Any, *, strata: Any = None, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Resamples whole clusters with replacement, within each stratum (such as an arm) where `strata` is given."""
    labels_n, names = codes(clusters, fit, "clusters")
    strata_n, _ = codes(np.zeros(len(labels_n)) if strata is None else strata, fit, "strata")
    rng = np.random.default_rng(seed)
    counts_bc = np.zeros((draws, len(names)))
    for stratum in np.unique(strata_n):
        members = np.unique(labels_n[strata_n == stratum])
        if len(members) < _MINIMUM_CLUSTERS:
            raise Refusal(
                f"{len(members)} clusters in a stratum: a bootstrap needs {_MINIMUM_CLUSTERS} or more; add runs, or use "
                "wild_cluster_bootstrap, or parametric_bootstrap with the noise of a run"
            )
        counts_bc[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
    weights_bn = counts_bc[:, labels_n] * fit.data.weights_n
    return _estimated(fit, f"{len(names)} clusters resampled", weights_bn, fit.data.log_loss_n[None])


def wild_cluster_bootstrap(fit: Fit, clusters: Any, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Multiplies the residuals of each cluster by one draw of Webb's six-point distribution and refits: for few clusters
    (4 to 12), whose rows differ in design, so that leaving some out would leave the law undetermined.

    Residuals are divided by sqrt(1 - leverage) of their row first, without which a fit with few rows looks too sure
    (Davidson and Flachaire 2008).
    """
    from analysis.uncertainty import leverage

    labels_n, names = codes(clusters, fit, "clusters")
    if len(names) < _MINIMUM_WILD:
        raise Refusal(f"{len(names)} clusters: a wild bootstrap needs {_MINIMUM_WILD} or more; add runs")
    signs_bc = np.random.default_rng(seed).choice(WEBB, size=(draws, len(names)))
    residual_n = fit.residuals() / np.sqrt(1 - np.minimum(leverage(fit), 0.95))
    fitted_n = fit.data.log_loss_n - fit.residuals()
    losses_bn = fitted_n + signs_bc[:, labels_n] * residual_n
    return _estimated(fit, f"residuals of {len(names)} clusters, wild (Webb)", fit.data.weights_n[None], losses_bn)


def parametric_bootstrap(fit: Fit, *, sd: float, clusters: Any, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Adds normal noise of standard deviation `sd` (nats), one number for each cluster, to the fitted losses.

    Rows of one cluster are one observation (arms that share a run). It supposes that the law is right: where it is not,
    give an `sd` that contains the misfit, such as `fit.rms` times the loss.
    """
    if not (np.isfinite(sd) and sd > 0):
        raise ValueError(f"sd = {sd!r}: use the positive standard deviation of one run's loss, in nats")
    labels_n, names = codes(clusters, fit, "clusters")
    rng = np.random.default_rng(seed)
    noise_bn = sd * rng.standard_normal((draws, len(names)))[:, labels_n]
    fitted_n = np.exp(fit.data.log_loss_n - fit.residuals())
    losses_bn = np.log(np.maximum(fitted_n + noise_bn, 1e-6 * fitted_n))
    kind = f"normal noise of {sd:.2g} nats on the fitted law"
    return _estimated(fit, kind, fit.data.weights_n[None], losses_bn)


def codes(values: Any, fit: Fit, name: str) -> tuple[np.ndarray, list[str]]:
    """Labels of the fitted rows as indices into their distinct names."""
    texts = [str(value) for value in values]
    if len(texts) != len(fit.data.log_loss_n):
        raise ValueError(
            f"{name} has {len(texts)} labels: give one for each of the {len(fit.data.log_loss_n)} fitted rows"
        )
    names = list(dict.fromkeys(texts))
    index = {text: code for code, text in enumerate(names)}
    return np.asarray([index[text] for text in texts]), names


def _estimated(fit: Fit, kind: str, weights_bn: np.ndarray, losses_bn: np.ndarray) -> Draws:
    solved, params = fits.estimate(fit, weights_bn, losses_bn)
    return Draws(fit=fit, kind=kind, params=params, converged=float(np.mean(solved.converged_m)))
