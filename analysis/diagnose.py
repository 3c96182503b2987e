"""What a fit rests on: how each run moves it, and whether the law misses by more than replicates explain.

Letters: n rows, g groups of rows, k free parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from analysis import fit as fits
from analysis.fit import Fit
from analysis.refusal import Refusal
from analysis.resample import codes


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Fits that leave out one group of rows each. `moves` holds, for every parameter and quantity, how far it moves from
    the whole fit's value: arrays (g,). `names` are the groups, the most influential on the first quantity first."""

    names: tuple[str, ...]
    moves: Mapping[str, np.ndarray] = field(repr=False)
    whole: Mapping[str, float] = field(repr=False)

    def largest(self, quantity: str) -> str:
        """One sentence: drop this run and the quantity moves by so much."""
        if quantity not in self.moves:
            raise ValueError(f"quantity = {quantity!r}: use one of {', '.join(self.moves)}")
        index = int(np.argmax(np.abs(self.moves[quantity])))
        move, value = self.moves[quantity][index], self.whole[quantity]
        return f"without {self.names[index]}, {quantity} moves by {move:+.3g} from {value:.6g}"


def influence(
    fit: Fit, groups: Any, *, quantities: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None
) -> Influence:
    """Leaves out every group (a run, a configuration) in turn and fits again, in one batch, the whole estimator each time.
    `quantities` are worked out from the parameters, such as {"a": lambda p: p["beta"] / (p["alpha"] + p["beta"])}."""
    labels_n, names = codes(groups, fit, "groups")
    weights_gn = fit.data.weights_n * (labels_n[None] != np.arange(len(names))[:, None])
    left = (weights_gn > 0).sum(axis=1)
    if left.min() <= fit.problem.k:
        raise Refusal(
            f"without {names[int(left.argmin())]} {left.min()} rows are left for {fit.problem.k} parameters; "
            "use smaller groups"
        )
    _, params = fits.estimate(fit, weights_gn)
    after = {**{name: of(params) for name, of in (quantities or {}).items()}, **fits.flatten(fit.law, params, fit.arms)}
    before = {**{name: of(fit.params) for name, of in (quantities or {}).items()}, **fit.flat}
    whole = {name: float(value) for name, value in before.items()}
    moves = {name: np.asarray(value) - whole[name] for name, value in after.items()}
    order = np.argsort(-np.abs(next(iter(moves.values()))))
    return Influence(
        names=tuple(names[g] for g in order), moves={name: value[order] for name, value in moves.items()}, whole=whole
    )


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """F test of what the law misses against what replicates scatter. `misfit_sd` and `replicate_sd` are of log loss (about
    relative loss); a misfit above the replicates' scatter dominates every interval that supposes the law to be true."""

    F: float
    p: float
    misfit_sd: float
    replicate_sd: float
    dof: tuple[int, int]

    @property
    def flagged(self) -> bool:
        return self.p < 0.05

    def __str__(self) -> str:
        verdict = "the law misses by more than replicates scatter" if self.flagged else "no lack of fit is seen"
        return (
            f"{verdict}: misfit {100 * self.misfit_sd:.2g}%, replicates {100 * self.replicate_sd:.2g}% "
            f"(F{self.dof} = {self.F:.3g}, p = {self.p:.2g})"
        )


def lack_of_fit(fit: Fit, *, tolerance: float = 1e-3) -> LackOfFit:
    """Rows whose columns agree within `tolerance` (relative), and whose arm is the same, are replicates.

    The law is fitted again by least squares, for which the F test holds. Raises Refusal where no two rows are replicates,
    or fewer designs than parameters remain.
    """
    kept = (fit.data.weights_n > 0) & ~fit.dropped_n
    keys = np.stack([np.round(np.log(value) / tolerance) for value in fit.data.raw.values()], axis=1)
    keys = np.concatenate([keys, fit.data.arm_n[:, None]], axis=1)
    _, cell_n = np.unique(keys, axis=0, return_inverse=True)
    cell_n = cell_n.reshape(-1)
    cells, pure_dof, pure = 0, 0, 0.0
    for cell in np.unique(cell_n[kept]):
        losses = fit.data.log_loss_n[kept & (cell_n == cell)]
        cells, pure_dof = cells + 1, pure_dof + len(losses) - 1
        pure += float(((losses - losses.mean()) ** 2).sum())
    if pure_dof < 1 or pure == 0.0:
        raise Refusal("no two rows are replicates (same columns, different losses); repeat some runs with other seeds")
    lack_dof = cells - fit.problem.k
    if lack_dof < 1:
        raise Refusal(f"{cells} designs and {fit.problem.k} parameters leave nothing to test the law by; add sizes")
    _, params = fits.refit(fit, (fit.data.weights_n * kept)[None], delta=fits.LEAST_SQUARES)
    residual_n = fits.residuals_of(fit, params, fit.data.log_loss_n[None])[0][kept]
    lack = max(0.0, float((residual_n**2).sum()) - pure)
    F = (lack / lack_dof) / (pure / pure_dof)
    replicate = pure / pure_dof
    return LackOfFit(
        F=F,
        p=float(stats.f.sf(F, lack_dof, pure_dof)),
        misfit_sd=float(np.sqrt(max(0.0, lack / lack_dof - replicate))),
        replicate_sd=float(np.sqrt(replicate)),
        dof=(lack_dof, pure_dof),
    )
