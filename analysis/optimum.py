"""The compute-optimal size, tokens and loss, N*(C), D*(C), L*(C): what every approach returns, and approach 3, the
minimum of a fitted L(N, D) along the line of equal compute (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3).

Compute is C = flops_per_token(N) D, which is 6 N D unless another count is given: a factor of N, or a function of N.
approaches.py has the other two approaches and all three side by side.

Letters: m members (the point estimate, then draws), c values of compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis.fit import Fit
from analysis.isoflop import positive
from analysis.laws import LAWS, Law
from analysis.newton import float64_on_cpu
from analysis.refusal import Refusal
from analysis.resample import Draws

Cost = float | Callable[[np.ndarray], Any]  # FLOPs per token: a factor of N, or a function of N
Interval = tuple[float | None, float | None]  # an end is None where draws do not bound it

SIX_N = 6.0
CAVEATS = {
    "envelope": "the least of noisy losses: L* is optimistic and N* follows the noise; unfinished schedules are not "
    "annealed",
    "iso-FLOP": "biased intercept where alpha and beta differ or sizes are wide or off centre, biased exponent where "
    "their centre drifts with C; the interval holds the noise of runs only",
    "parametric": "unbiased only if the law holds; the interval is that of the mean curve and holds no misfit of the "
    "law",
}
_REACH = 1e4  # how far beyond the fitted sizes an optimum is looked for, as a factor
_COARSE, _FINE, _ZOOMS = 161, 17, 3


@dataclass(frozen=True, kw_only=True)
class Band:
    """Values at each C with the ends of their interval: None for all where there are no draws, infinite or 0 where
    draws do not bound it. `extrapolated` marks C outside of the measured range."""

    C: np.ndarray
    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    extrapolated: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """N* ~ C^a and D* ~ C^b, with percentile intervals at `level` whose kind `interval_kind` names; None without draws.

    Approaches 1 and 2 suppose the power law at every C; for a fitted law other than the five-parameter one, a and b are
    the slopes at the geometric middle of `measured`, the range of compute that was run. `G` is the coefficient of N* =
    G (C / 6)^a where there is a closed form. `caveat` says in what way the approach is known to err.
    """

    approach: Literal["envelope", "iso-FLOP", "parametric"]
    a: float
    b: float
    a_interval: Interval | None
    b_interval: Interval | None
    interval_kind: str
    level: float
    caveat: str
    measured: tuple[float, float]
    points: int  # that the power law goes through, or rows that the law was fitted to
    G: float | None = None
    sizes_at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = field(repr=False)  # N*, D* (m, c)
    losses_at: Callable[[np.ndarray], np.ndarray] = field(repr=False)  # L* (m, c)

    def N_at(self, C: Any) -> Band:
        C = _compute(C)
        return self._band(C, self.sizes_at(C)[0])

    def D_at(self, C: Any) -> Band:
        C = _compute(C)
        return self._band(C, self.sizes_at(C)[1])

    def loss_at(self, C: Any) -> Band:
        """Approaches 1 and 2: of L = E + A C^-gamma through the least losses, or of A C^-gamma where they do not carry
        an asymptote. Raises Refusal where they carry neither."""
        C = _compute(C)
        return self._band(C, self.losses_at(C))

    def _band(self, C: np.ndarray, value_mc: np.ndarray) -> Band:
        low = high = None
        if len(value_mc) > 1:
            low, high = _quantiles(value_mc[1:], self.level)
            low, high = np.where(np.isfinite(low), low, 0.0), high
        first, last = self.measured
        outside = np.maximum(first / C, C / last) > 1 + 1e-9
        return Band(C=C, value=value_mc[0], low=low, high=high, extrapolated=outside)


def with_compute(
    table: Any, *, columns: Mapping[str, str] | None = None, loss: str = "loss", flops_per_token: Cost = SIX_N
) -> dict[str, np.ndarray]:
    """N, D, C and loss of a table as floats; C (or D) from the other two where the table has no such column."""
    names = {name: (columns or {}).get(name, name) for name in ("N", "D", "C")}
    found = {"loss": positive(table, loss), "N": positive(table, names["N"])}
    cost = cost_of_token(flops_per_token, found["N"])
    if names["C"] in table or names["D"] not in table:
        found["C"] = positive(table, names["C"])
    found["D"] = positive(table, names["D"]) if names["D"] in table else found["C"] / cost
    return {"C": cost * found["D"], **found}


def cost_of_token(flops_per_token: Cost, N: np.ndarray) -> np.ndarray:
    """FLOPs per token of models of size N, as floats: 6 N D of integers would not fit in 64 bits."""
    N = np.asarray(N, float)
    return np.asarray(flops_per_token(N) if callable(flops_per_token) else flops_per_token * N, float)


# --- approach 3 ------------------------------------------------------------------------------------------------------


def parametric(
    law: Fit | Draws,
    *,
    arm: str | None = None,
    at: Mapping[str, float] | None = None,
    flops_per_token: Cost = SIX_N,
    level: float = 0.95,
) -> Optimum:
    """Approach 3: the minimum of a fitted law of N and D (and of other columns, held where `at` says) at equal compute.

    Closed form for the five-parameter law at a cost proportional to N, by search for any other. Draws give the
    interval; a Fit has none. Raises Refusal for a fit that has not converged, or whose loss has no minimum at that
    compute.
    """
    fit = law.fit if isinstance(law, Draws) else law
    if not {"N", "D"} <= set(fit.law.columns):
        raise Refusal(
            f"{fit.law.name} is a law of {', '.join(fit.law.columns)}: an optimal size needs a law of N and D"
        )
    if not fit.converged:
        raise Refusal(f"{fit.law.name} was not fitted: {fit.status}")
    missing = [name for name in fit.law.columns if name not in ("N", "D", *(at or {}))]
    if missing:
        raise ValueError(f"{fit.law.name} needs {missing[0]!r}: hold it with at={{{missing[0]!r}: ...}}")
    params = _of_arm(fit, law.params if isinstance(law, Draws) else None, arm)
    measured = fit.data.weights_n > 0
    N, D = fit.data.raw["N"][measured], fit.data.raw["D"][measured]
    C = cost_of_token(flops_per_token, N) * D
    G = None
    if fit.law.predict is LAWS["chinchilla"].predict and not callable(flops_per_token):
        A, B, alpha, beta = (params[name] for name in ("A", "B", "alpha", "beta"))
        a_m, b_m, G_m = beta / (alpha + beta), alpha / (alpha + beta), (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        G = float(G_m[0] * (6 / flops_per_token) ** a_m[0])

        def sizes_at(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            x = np.log(C / flops_per_token)
            N_mc = G_m[:, None] * np.exp(a_m[:, None] * x)
            return N_mc, np.exp(x) / N_mc
    else:
        span = (float(N.min()), float(N.max()), float(C.max()))

        def sizes_at(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return _searched(fit.law, params, at or {}, C, flops_per_token, span)

        middle = np.sqrt(C.min() * C.max()) * np.exp([-0.25, 0.25])
        N_mc, D_mc = sizes_at(middle)
        if not np.isfinite(N_mc[0]).all():
            raise Refusal(
                f"{fit.law.name} has no minimum over sizes at {middle[0]:.2g} FLOPs within {_REACH:g} of those run"
            )
        a_m, b_m = (np.log(value[:, 1] / value[:, 0]) / 0.5 for value in (N_mc, D_mc))

    def losses_at(C: np.ndarray) -> np.ndarray:
        N_mc, D_mc = sizes_at(C)
        return _loss(fit.law, params, at or {}, N_mc, D_mc)

    return Optimum(
        approach="parametric",
        a=float(a_m[0]),
        b=float(b_m[0]),
        a_interval=bounded(a_m[1:], level),
        b_interval=bounded(b_m[1:], level),
        interval_kind=f"percentile, {law.kind}; mean curve" if isinstance(law, Draws) else "none: a fit without draws",
        level=level,
        caveat=CAVEATS["parametric"],
        measured=(float(C.min()), float(C.max())),
        points=int(measured.sum()),
        G=G,
        sizes_at=sizes_at,
        losses_at=losses_at,
    )


def _of_arm(fit: Fit, drawn: Mapping[str, np.ndarray] | None, arm: str | None) -> dict[str, np.ndarray]:
    """Parameters (m,) of one arm, the fit's own first."""
    if fit.law.by_arm and arm not in fit.arms:
        raise ValueError(f"arm = {arm!r}: {fit.law.name} has an optimum for each arm; use one of {', '.join(fit.arms)}")
    params = {}
    for p in fit.law.parameters:
        sets = [np.asarray(fit.params[p.name], float)[None]]
        if drawn is not None:
            sets.append(np.asarray(drawn[p.name], float))
        value = np.concatenate(sets)
        params[p.name] = value[:, fit.arms.index(str(arm))] if p.per_arm else value
    return params


def _loss(
    law: Law, params: Mapping[str, np.ndarray], at: Mapping[str, float], N: np.ndarray, D: np.ndarray
) -> np.ndarray:
    """Loss of member m at N[m, ...], D[m, ...]."""
    values = {name: value.reshape(-1, *(1,) * (N.ndim - 1)) for name, value in params.items()}
    with float64_on_cpu():
        return np.asarray(law.predict(values, {"N": N, "D": D, **{name: np.full_like(N, v) for name, v in at.items()}}))


def _searched(
    law: Law,
    params: Mapping[str, np.ndarray],
    at: Mapping[str, float],
    C: np.ndarray,
    flops_per_token: Cost,
    span: tuple[float, float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """N*, D* (m, c): a wide grid in log N, zoomed in; NaN where the least loss is at its edge."""
    low, high = np.log(span[0] / _REACH), np.log(span[1] * _REACH * max(1.0, C.max() / span[2]))
    members = len(next(iter(params.values())))
    centre_mc = np.full((members, len(C)), (low + high) / 2)
    half, inside = (high - low) / 2, np.ones((members, len(C)), bool)
    for zoom in range(1 + _ZOOMS):
        grid = np.linspace(-half, half, _COARSE if zoom == 0 else _FINE)
        N = np.exp(centre_mc[..., None] + grid)
        value = _loss(law, params, at, N, C[:, None] / cost_of_token(flops_per_token, N))
        least = np.where(np.isfinite(value), value, np.inf).argmin(axis=-1)
        if zoom == 0:
            inside = (least > 0) & (least < len(grid) - 1)
        middle = np.clip(least, 1, len(grid) - 2)
        left, centre, right = (np.take_along_axis(value, (middle + k)[..., None], axis=-1)[..., 0] for k in (-1, 0, 1))
        step, bend = grid[1] - grid[0], left - 2 * centre + right
        # The last grid is as fine as its parabola is exact.
        shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1)), 0) if zoom == _ZOOMS else 0.0
        centre_mc = centre_mc + grid[middle] + np.clip(shift, -1, 1) * step
        half = 2 * step
    N_mc = np.where(inside, np.exp(centre_mc), np.nan)
    return N_mc, C / cost_of_token(flops_per_token, N_mc)


# --- intervals -------------------------------------------------------------------------------------------------------


def _compute(C: Any) -> np.ndarray:
    values = np.atleast_1d(np.asarray(C, float))
    if values.ndim > 1 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"C = {C!r}: use positive finite FLOPs, one or a sequence")
    return values


def _quantiles(value_b: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Along the first axis. A draw that has no value (NaN) may lie at either end and counts as beyond both."""
    ordered = [np.sort(np.where(np.isnan(value_b), end, value_b), axis=0) for end in (-np.inf, np.inf)]
    tail = (1 - level) / 2
    if not np.isnan(value_b).any():
        return np.quantile(value_b, tail, axis=0), np.quantile(value_b, 1 - tail, axis=0)
    # An order statistic, since interpolation between infinities is not a number.
    low = np.quantile(ordered[0], tail, axis=0, method="inverted_cdf")
    return low, np.quantile(ordered[1], 1 - tail, axis=0, method="inverted_cdf")


def bounded(value_b: np.ndarray, level: float) -> Interval | None:
    if not value_b.size:
        return None
    low, high = (float(end) for end in _quantiles(value_b, level))
    return (low if np.isfinite(low) else None), (high if np.isfinite(high) else None)
