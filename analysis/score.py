"""How well laws predict runs that cost more than those they were fitted to: rolling-origin hold-out.

For each cut c every law is fitted to the runs with C <= c and scored on those up to `horizon` times c. Errors are of
the log loss. Fit in sample says nothing of that: a law with more exponents always fits better.

    tied = Candidate(law="chinchilla", options={"tied": {"beta": "alpha"}})
    for one in scores(["chinchilla", tied], table):
        print(one.law, one.error, one.bias, one.coverage)

selection.py picks a law by them, or averages laws.

Letters: n rows of the table, h held-out rows, b draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis import fit as fits
from analysis.fit import Fit, fit_law
from analysis.isoflop import TOLERANCE, IsoFlop, budgets, isoflop_minima, positive
from analysis.laws import Law
from analysis.optimum import SIX_N, Cost, parametric, with_compute
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import Draws, cluster_bootstrap

HORIZON = 10.0
DRAWS = 200
_CUTS = 5
_TIE = 1e-9  # of predicted log losses: rounding
_HELD_OUT = 3  # rows beyond a cut, or a twentieth of the table: one run decides no score
_BLOCK = 0.9  # held-out rows within a factor of 1.9 in C share what a law misses there


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A law and how it is fitted: `options` are fit_law's (tied, fixed, per_arm, delta, ...)."""

    law: Law | str
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        law = self.law if isinstance(self.law, str) else self.law.name
        settings = (f"{key} {_plain(value)}" for key, value in self.options.items())
        return self.name or ", ".join((law, *settings))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One law fitted to the runs with C <= `C` and scored on those up to `until`; NaN is what could not be scored.

    `error` is the root mean square of log predicted - log observed, `bias` its mean (positive: too pessimistic),
    `train_error` that of the rows it was fitted to. `coverage` is the share of held-out losses inside their intervals,
    `width` the mean log(high / low). `regret` is the compute that training at the law's predicted optimum wastes, as a
    share: by how much less compute the measured least loss reaches the same loss, by Akima interpolation at the
    held-out budgets that have a minimum over sizes, on average; where the predicted size was not run, it is that of the
    nearest that was, and too small. `rank_agreement` is the share of pairs of arms whose best held-out losses at one
    budget the law puts in the right order, a half where it predicts a tie. `failed` says why the law was not fitted, ""
    where it was.
    """

    C: float
    until: float
    trained: int
    held_out: int
    error: float = np.nan
    bias: float = np.nan
    train_error: float = np.nan
    coverage: float = np.nan
    width: float = np.nan
    regret: float = np.nan
    rank_agreement: float = np.nan
    failed: str = ""
    rows_h: np.ndarray = field(repr=False)
    log_error_h: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A law over all cuts. Every figure is the mean over the cuts that have it, `error` the root mean square;
    `failures` are the cuts at which the law was not fitted or did not converge, whose figures count where there are
    any."""

    law: str
    cuts: tuple[Cut, ...]
    interval: str  # what coverage and width are of
    level: float
    block_n: np.ndarray = field(repr=False)

    @property
    def error(self) -> float:
        return float(np.sqrt(_mean(cut.error**2 for cut in self.cuts)))

    @property
    def bias(self) -> float:
        return _mean(cut.bias for cut in self.cuts)

    @property
    def coverage(self) -> float:
        return _mean(cut.coverage for cut in self.cuts)

    @property
    def width(self) -> float:
        return _mean(cut.width for cut in self.cuts)

    @property
    def regret(self) -> float:
        return _mean(cut.regret for cut in self.cuts)

    @property
    def rank_agreement(self) -> float:
        return _mean(cut.rank_agreement for cut in self.cuts)

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"C <= {cut.C:.2g}: {cut.failed}" for cut in self.cuts if cut.failed)


def scores(
    laws: Sequence[Law | str | Candidate],
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    arm: str = "arm",
    weights: Any = None,
    clusters: Any = None,
    cuts: Sequence[float] | None = None,
    horizon: float = HORIZON,
    flops_per_token: Cost = SIX_N,
    tolerance: float = TOLERANCE,
    interval: Literal["new run", "mean curve"] = "new run",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Score, ...]:
    """Every law's rolling-origin score, in the order given.

    Compute is the column C, or flops_per_token(N) D without one. `cuts` are FLOPs, by default up to five between the
    cheaper 40% of the runs and the last budget with enough runs beyond it. `clusters` labels rows that are one run, or
    are not independent otherwise; intervals resample them, rows without it; 0 draws leave intervals out. `weights` of
    rows count in the fits only. A law that can not be fitted at a cut is kept, with the reason. Raises Refusal where no
    cut has runs on both sides.
    """
    candidates = [one if isinstance(one, Candidate) else Candidate(law=one) for one in laws]
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels):
        raise ValueError(f"laws: {', '.join(labels)}: give candidates of one label each; see Candidate.name")
    if not horizon > 1:
        raise ValueError(f"horizon = {horizon!r}: use a factor above 1, such as 10 for the next decade of compute")
    full = _columns(candidates, table, dict(columns or {}), loss, arm, flops_per_token)
    C_n = full["C"]
    origins = _origins(C_n, tolerance) if cuts is None else sorted(float(cut) for cut in cuts)
    spans = [(c, c * horizon, np.flatnonzero((C_n > c) & (C_n <= c * horizon))) for c in origins]
    spans = [(c, until, rows) for c, until, rows in spans if len(rows) and (C_n <= c).any()]
    if not spans:
        raise Refusal("no cut has runs on both sides: give cuts inside the measured compute, or runs of more budgets")
    cluster_n = np.arange(len(C_n)).astype(str) if clusters is None else np.asarray([str(name) for name in clusters])
    if len(cluster_n) != len(C_n):
        raise ValueError(f"clusters has {len(cluster_n)} labels: give one for each of the {len(C_n)} rows")
    row_weight_n = np.ones(len(C_n)) if weights is None else np.asarray(weights, float)
    judge = _Judge.of(full, arm, tolerance)

    def score(candidate: Candidate) -> Score:
        done = []
        for c, until, rows in spans:
            options = {"loss": "loss", "arm": arm, "seed": seed, **candidate.options}
            weight_n = np.where(C_n <= c, row_weight_n, 0.0)
            fit = attempt(lambda w=weight_n, o=options: fit_law(candidate.law, full, weights=w, **o))
            at = {"C": c, "until": until, "trained": int((weight_n > 0).sum()), "held_out": len(rows), "rows_h": rows}
            if isinstance(fit, Refused):
                done.append(Cut(**at, failed=fit.reason, log_error_h=np.full(len(rows), np.nan)))
                continue
            held: dict[str, Any] = {
                name: full[name][rows] for name in (*fit.law.columns, *((arm,) if fit.law.by_arm else ()))
            }
            held = {"arm" if name == arm else name: value for name, value in held.items()}
            log_error_h = np.log(fit.predict(**held)) - np.log(full["loss"][rows])
            spread = attempt(lambda f=fit, w=weight_n: _resampled(f, cluster_n, w, draws, seed)) if draws else None
            coverage = width = np.nan
            if isinstance(spread, Draws):
                losses_bh = (
                    spread.predict_new_run(seed=seed, **held) if interval == "new run" else spread.predict(**held)
                )
                low, high = np.quantile(losses_bh, [(1 - level) / 2, (1 + level) / 2], axis=0)
                coverage = float(np.mean((full["loss"][rows] >= low) & (full["loss"][rows] <= high)))
                width = float(np.log(high / low).mean())
            done.append(
                Cut(
                    **at,
                    error=float(np.sqrt(np.mean(log_error_h**2))),
                    bias=float(log_error_h.mean()),
                    train_error=fit.rms,
                    coverage=coverage,
                    width=width,
                    regret=judge.regret(fit, c, until, flops_per_token),
                    rank_agreement=judge.rank_agreement(rows, log_error_h),
                    failed="" if fit.converged else fit.status,
                    log_error_h=log_error_h,
                )
            )
        about = "residuals drawn about resampled curves" if interval == "new run" else "resampled curves"
        return Score(
            law=candidate.label,
            cuts=tuple(done),
            interval=f"{interval}: {about}",
            level=level,
            block_n=budgets(C_n, _BLOCK),
        )

    return tuple(score(candidate) for candidate in candidates)


def _columns(
    candidates: Sequence[Candidate], table: Any, names: dict[str, str], loss: str, arm: str, flops_per_token: Cost
) -> dict[str, np.ndarray]:
    """Every column that a law reads, by the laws' names, and C, loss and arm."""
    needed = {column for candidate in candidates for column in fits.named(candidate.law).columns}
    full = {"loss": positive(table, loss)}
    if names.get("C", "C") in table:
        full["C"] = positive(table, names.get("C", "C"))
        needed |= {name for name in ("N", "D") if names.get(name, name) in table}
    else:
        full |= with_compute(table, columns=names, loss=loss, flops_per_token=flops_per_token)
    full |= {name: positive(table, names.get(name, name)) for name in sorted(needed - set(full))}
    if arm in table:
        full[arm] = np.asarray([str(name) for name in table[arm]])
    return full


def _origins(C_n: np.ndarray, tolerance: float) -> list[float]:
    """Cuts between budgets, log-evenly from the cheaper 40% of the rows on."""
    group_n = budgets(C_n, tolerance)
    tops = np.array([C_n[group_n == g].max() for g in range(group_n.max() + 1)])
    beyond = np.array([(C_n > top).sum() for top in tops])
    possible = tops[(tops >= np.quantile(C_n, 0.4)) & (beyond >= max(_HELD_OUT, len(C_n) / 20))]
    if not possible.size:
        return []
    wanted = np.geomspace(possible[0], possible[-1], _CUTS)
    return sorted({float(possible[np.abs(np.log(possible / c)).argmin()]) for c in wanted})


def _resampled(fit: Fit, cluster_n: np.ndarray, weight_n: np.ndarray, draws: int, seed: int) -> Draws:
    # Rows without weight take the name of a cluster that has some: only clusters that were fitted are drawn.
    trained = weight_n > 0
    return cluster_bootstrap(fit, np.where(trained, cluster_n, cluster_n[trained][0]), draws=draws, seed=seed)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """What was measured, to which predictions are held: minima over sizes, and the arms' best losses at each budget."""

    minima: Mapping[str, Sequence[IsoFlop]]
    slope: Mapping[str, tuple[float, np.ndarray]]  # a centre, and d log L* / d log C as a polynomial in log C about it
    loss_n: np.ndarray
    budget_n: np.ndarray
    arm_n: np.ndarray | None

    @classmethod
    def of(cls, full: Mapping[str, np.ndarray], arm: str, tolerance: float) -> "_Judge":
        minima: dict[str, list[IsoFlop]] = {}
        if "N" in full:
            by = arm if arm in full else None
            for (name, _), m in isoflop_minima(full, arm=by, noise=0.0, draws=0, tolerance=tolerance).items():
                if isinstance(m, IsoFlop):
                    minima.setdefault(name, []).append(m)
        minima = {name: found for name, found in minima.items() if len(found) > 2}
        slope = {}
        for name, found in minima.items():
            x, y = np.log([m.C for m in found]), np.log([m.loss for m in found])
            curve = np.polyfit(x - x.mean(), y, min(2, len(x) - 2))
            slope[name] = (float(x.mean()), np.polyder(curve))
        return cls(
            minima=minima,
            slope=slope,
            loss_n=full["loss"],
            budget_n=budgets(full["C"], tolerance),
            arm_n=full.get(arm),
        )

    def regret(self, fit: Fit, C: float, until: float, flops_per_token: Cost) -> float:
        if set(fit.law.columns) != {"N", "D"}:
            return np.nan
        wasted = []
        for name, found in self.minima.items():
            optimum = attempt(
                lambda n=name: parametric(fit, arm=n if fit.law.by_arm else None, flops_per_token=flops_per_token)
            )
            if isinstance(optimum, Refused):
                continue
            centre, polynomial = self.slope[name]
            for m in found:
                slope = np.polyval(polynomial, np.log(m.C) - centre)
                if C < m.C <= until and slope < 0:
                    N = np.clip(optimum.N_at(m.C).value[0], *m.N_range)
                    wasted.append(np.expm1(np.log(float(m.curve(N)) / m.loss) / -slope))
        return _mean(wasted)

    def rank_agreement(self, rows: np.ndarray, log_error_h: np.ndarray) -> float:
        if self.arm_n is None:
            return np.nan
        right = []
        for budget in np.unique(self.budget_n[rows]):
            here = self.budget_n[rows] == budget
            arms = np.unique(self.arm_n[rows][here])
            observed, predicted = [], []
            for name in arms:
                of_arm = here & (self.arm_n[rows] == name)
                log_loss = np.log(self.loss_n[rows][of_arm])
                observed.append(log_loss.min())
                predicted.append((log_loss + log_error_h[of_arm]).min())
            for i in range(len(arms)):
                for j in range(i):
                    apart = predicted[i] - predicted[j]
                    said = abs(apart) > _TIE
                    right.append(float((observed[i] < observed[j]) == (apart < 0)) if said else 0.5)
        return _mean(right)


def _mean(values: Any) -> float:
    known = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {one}" for key, one in value.items())
    return (
        value
        if isinstance(value, str)
        else ", ".join(map(str, value))
        if isinstance(value, tuple | list)
        else f"{value}"
    )
