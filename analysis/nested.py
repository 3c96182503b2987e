"""How much of a law do the arms share? Nested laws, from one curve for all to one for each, tested step by step.

    identical          one law for all arms
    shared exponents   amplitudes by arm: an arm is a factor on N and D, and curves never cross
    shared E           exponents by arm too: curves may cross
    separate           everything by arm

Separate fits have far wider and, beyond the data, biased differences: an arm's E, amplitudes and exponents trade off
against each other, and do so differently in every arm. The smallest level that is not rejected is the one to compare
arms by.

A step is tested by how much the objective drops, in the form of an F ratio, against its distribution where the
restricted law is true: residuals of the restricted fit with random signs, one for each cluster, and both laws fitted
again (residual wild bootstrap: Wu 1986; Cameron, Gelbach and Miller 2008; six-point weights for few clusters: Webb 2013).

Letters: n rows, k free parameters, c clusters, m data sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis import fit as fits
from analysis import newton
from analysis.fit import Fit, fit_law
from analysis.laws import Law
from analysis.multiplicity import holm
from analysis.newton import LANES
from analysis.refusal import Refusal, Refused, attempt
from analysis.resample import codes, refuse_repeated

NULL_DRAWS = 399
_FEW, _MINIMUM_CLUSTERS = 12, 4
_LEAST = 0.05  # of a residual that the fit leaves to a cluster; what it takes up whole can not be told
_WEBB = np.sqrt([0.5, 1.0, 1.5]).repeat(2) * np.tile([-1.0, 1.0], 3)  # Webb 2013: mean 0, variance 1


@dataclass(frozen=True, kw_only=True)
class Level:
    """A law in which the parameters `per_arm` are each arm's own. `hold_out` is its rolling-origin root mean square error
    of log loss (score.py), NaN where it was not asked for or could not be scored."""

    name: str
    per_arm: tuple[str, ...]
    fit: Fit = field(repr=False)
    hold_out: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A restricted law against a fuller one. `statistic` is (drop / restrictions) / (the fuller law's objective / its
    degrees of freedom), which is F where residuals are squared; `p` is the share of data sets simulated from the restricted
    law whose statistic is as large."""

    restricted: str
    fuller: str
    restrictions: int
    drop: float
    statistic: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Nested:
    """`steps` test every level against the next and against the fullest. `selected` is the smallest level that neither
    rejects at `alpha` (Holm over its two tests); `null` says how data sets were simulated."""

    law: Law
    arms: tuple[str, ...]
    levels: tuple[Level, ...]
    steps: tuple[Step, ...]
    selected: str
    alpha: float
    null: str

    def level(self, name: str) -> Level:
        for level in self.levels:
            if level.name == name:
                return level
        raise ValueError(f"level = {name!r}: {self.law.name} has {', '.join(level.name for level in self.levels)}")

    def p_of(self, name: str) -> float:
        """Of the tests of a level against the next and the fullest, by Holm; 1 of the fullest, which nothing tests."""
        return min(holm([step.p for step in self.steps if step.restricted == name]), default=1.0)

    @property
    def p(self) -> float:
        """That arms differ at all."""
        return self.p_of(self.levels[0].name)

    def __str__(self) -> str:
        tests = "; ".join(
            f"{s.restricted} against {s.fuller}: F = {s.statistic:.2f}, p = {s.p:.3g}" for s in self.steps
        )
        return f"{self.law.name}: {self.selected} ({tests}; {self.null})"


def levels_of(law: Law) -> dict[str, tuple[str, ...]]:
    """Which parameters are each arm's own at every level that the law has.

    Exponents are the parameters without a unit; a law without E has no level that shares it alone, and one whose
    parameters say nothing of their units only has the ends.
    """
    if law.by_arm:
        own = [p.name for p in law.parameters if p.per_arm]
        raise ValueError(f"{law.name} gives every arm its own {', '.join(own)} already: use the law with shared ones")
    names = [p.name for p in law.parameters]
    others = [p for p in law.parameters if p.name != "E"]
    found: dict[str, tuple[str, ...]] = {"identical": ()}
    amplitudes = tuple(p.name for p in others if p.unit != "1")
    if all(p.unit for p in others) and 0 < len(amplitudes) < len(names):
        found["shared exponents"] = amplitudes
    if "E" in names:
        found["shared E"] = tuple(p.name for p in others)
    found["separate"] = tuple(names)
    return {name: own for name, own in found.items() if name == "separate" or set(own) != set(names)}


def nested(
    law: Law | str,
    table: Any,
    *,
    columns: Mapping[str, str] | None = None,
    loss: str = "loss",
    arm: str = "arm",
    weights: Any = None,
    clusters: Any = None,
    run_ids: Any = None,
    delta: float | str = "scatter",
    levels: Mapping[str, Sequence[str]] | None = None,
    alpha: float = 0.05,
    draws: int = NULL_DRAWS,
    starts: int = fits.STARTS,
    hold_out: bool = False,
    seed: int = 0,
) -> Nested:
    """Fits every level of `law` (or the given `levels`, from the smallest up) and tests them.

    `clusters` labels rows that are not independent: signs are drawn for whole clusters, and a label that two arms share
    moves both alike. `run_ids` that repeat are refused without it. Delta is the fullest law's for all levels, since
    objectives of different deltas can not be compared. Raises Refusal where the fullest law can not be fitted.
    """
    law = fits.named(law)
    own = {name: tuple(parameters) for name, parameters in (levels or levels_of(law)).items()}
    if len(own) < 2 or not 0 < alpha < 1 or draws < 1:
        raise ValueError(
            f"levels = {list(own)}, alpha = {alpha}, draws = {draws}: use two levels, 0 < alpha < 1, draws > 0"
        )
    if clusters is None and run_ids is not None:
        refuse_repeated([str(run_id) for run_id in run_ids])
    options = {"columns": columns, "loss": loss, "arm": arm, "weights": weights, "starts": starts, "seed": seed}
    fullest = fit_law(law, table, delta=delta, per_arm=list(own.values())[-1], **options)
    if len(fullest.arms) < 2:
        raise Refusal(f"column {arm!r} has {len(fullest.arms)} arm, and a comparison needs two")
    fitted = [fit_law(law, table, delta=fullest.delta, per_arm=names, **options) for names in list(own.values())[:-1]]
    fitted.append(fullest)
    labels_n, _ = codes(range(len(fullest.data.weights_n)) if clusters is None else clusters, fullest, "clusters")
    used = np.unique(labels_n[fullest.data.weights_n > 0])
    if len(used) < _MINIMUM_CLUSTERS:
        raise Refusal(f"{len(used)} clusters: a wild bootstrap needs {_MINIMUM_CLUSTERS} or more; add runs")
    steps: list[Step] = []
    for place, (name, restricted) in enumerate(zip(list(own)[:-1], fitted[:-1], strict=True)):
        against = list(dict.fromkeys([place + 1, len(fitted) - 1]))
        tests = wild_tests(
            restricted, [fitted[i] for i in against], restricted.data.log_loss_n[None], labels_n, draws=draws,
            seed=seed + place,
        )  # fmt: skip
        for i, (statistic, p, drop) in zip(against, tests, strict=True):
            steps.append(
                Step(
                    restricted=name,
                    fuller=list(own)[i],
                    restrictions=fitted[i].problem.k - restricted.problem.k,
                    drop=float(drop[0]),
                    statistic=float(statistic[0]),
                    p=float(p[0]),
                )
            )
    errors = _hold_out(law, table, own, fullest, options, arm, clusters) if hold_out else {}
    kind = "Webb's six points" if len(used) <= _FEW else "Rademacher signs"
    answer = Nested(
        law=law,
        arms=fullest.arms,
        levels=tuple(
            Level(name=name, per_arm=own[name], fit=fit, hold_out=errors.get(name, float("nan")))
            for name, fit in zip(own, fitted, strict=True)
        ),
        steps=tuple(steps),
        selected=list(own)[-1],
        alpha=alpha,
        null=f"wild bootstrap, {kind} on {len(used)} clusters, {draws} data sets",
    )
    passed = [name for name in own if answer.p_of(name) >= alpha]
    return replace(answer, selected=passed[0])


def wild_tests(
    restricted: Fit, fuller: Sequence[Fit], log_loss_mn: np.ndarray, labels_n: np.ndarray, *, draws: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Statistic, p-value and drop of the objective, (m,) each, of every fuller law, for m data sets on one design.

    Residuals of a cluster are multiplied by (I - H)^-1/2, H its block of the restricted fit's hat matrix, by which that
    fit has shrunk them (CR2: Bell and McCaffrey 2002). Without it clusters of rows are rejected too often.
    """
    weights_n = _weights(restricted)
    solved, params = _refit(
        restricted, log_loss_mn, np.broadcast_to(restricted.theta_k, (len(log_loss_mn), restricted.problem.k))
    )
    residual_mn = fits.residuals_of(restricted, params, log_loss_mn)
    widened_mn = residual_mn @ _widening(restricted, labels_n).T
    few = len(np.unique(labels_n[weights_n > 0])) <= _FEW
    signs = np.random.default_rng([seed, 7]).choice(
        _WEBB if few else np.array([-1.0, 1.0]), size=(len(log_loss_mn), draws, labels_n.max() + 1)
    )
    null_mbn = (log_loss_mn - residual_mn)[:, None] + signs[:, :, labels_n] * widened_mn[:, None]
    null_Mn = null_mbn.reshape(-1, log_loss_mn.shape[1])
    theta_Mk = np.repeat(solved.theta_mk, draws, axis=0)
    null, _ = _refit(restricted, null_Mn, theta_Mk)
    answers = []
    for fit in fuller:
        observed, drop = _statistic(restricted, fit, solved, log_loss_mn)
        simulated, _ = _statistic(restricted, fit, null, null_Mn)
        as_large = simulated.reshape(len(log_loss_mn), draws) >= observed[:, None]
        answers.append((observed, (1 + as_large.sum(axis=1)) / (draws + 1), drop))
    return answers


def _widening(fit: Fit, labels_n: np.ndarray) -> np.ndarray:
    """What residuals are multiplied by: (n, n), a block for each cluster."""
    J_nk = newton.jacobian(fit.problem, fit.theta_k) * np.sqrt(_weights(fit))[:, None]
    q_nk, r_kk = np.linalg.qr(J_nk)
    well = np.abs(np.diag(r_kk)) > 1e-10 * np.abs(np.diag(r_kk)).max()
    q_nk = q_nk[:, well]
    widening_nn = np.eye(len(labels_n))
    for label in np.unique(labels_n):
        rows = np.flatnonzero(labels_n == label)
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - q_nk[rows] @ q_nk[rows].T)
        widening_nn[np.ix_(rows, rows)] = vectors / np.sqrt(np.maximum(values, _LEAST)) @ vectors.T
    return widening_nn


def _statistic(restricted: Fit, fuller: Fit, solved: Any, log_loss_mn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fuller law starts where the restricted one ended, so that it can not end higher."""
    weights_n = _weights(fuller)
    again, _ = _refit(fuller, log_loss_mn, _embedded(restricted, fuller, solved.theta_mk))
    least_m = np.minimum(solved.objective_m, again.objective_m)
    drop_m = solved.objective_m - least_m
    q, dof = fuller.problem.k - restricted.problem.k, int((weights_n > 0).sum()) - fuller.problem.k
    # Data without noise leave nothing: what is then left to drop is rounding.
    floor = 1e-24 * weights_n.sum()
    return drop_m / q / (np.maximum(least_m, floor) / dof), drop_m


def _embedded(restricted: Fit, fuller: Fit, theta_mk: np.ndarray) -> np.ndarray:
    """The restricted law's parameters as those of the fuller one, in which arms then have equal ones."""
    if (restricted.problem.columns is restricted.data.raw) != (fuller.problem.columns is fuller.data.raw):
        return np.broadcast_to(fuller.theta_k, (len(theta_mk), fuller.problem.k))
    start_mk = np.broadcast_to(fuller.theta_k, (len(theta_mk), fuller.problem.k)).copy()
    for of_restricted, of_fuller in zip(restricted.problem.slots, fuller.problem.slots, strict=True):
        for place, u in enumerate(of_fuller):
            source = of_restricted[min(place, len(of_restricted) - 1)]
            if u >= 0 and source >= 0:
                start_mk[:, u] = theta_mk[:, source]
    return start_mk


def _refit(fit: Fit, log_loss_mn: np.ndarray, theta0_mk: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Few data sets are filled up to a full set of lanes, so that the program compiled for many serves them too."""
    m = len(log_loss_mn)
    fill = np.concatenate([np.arange(m), np.zeros(max(0, LANES - m), int)])
    solved, params = fits.refit(fit, _weights(fit)[None], log_loss_mn[fill], theta0_mk=theta0_mk[fill])
    kept = {name: getattr(solved, name)[:m] for name in solved.__dict__}
    return replace(solved, **kept), {name: value[:m] for name, value in params.items()}


def _weights(fit: Fit) -> np.ndarray:
    return fit.data.weights_n * ~fit.dropped_n


def _hold_out(
    law: Law, table: Any, own: Mapping[str, tuple[str, ...]], fullest: Fit, options: Mapping[str, Any], arm: str,
    clusters: Any,
) -> dict[str, float]:  # fmt: skip
    from analysis.score import Candidate, scores

    settings = {"delta": fullest.delta, "starts": options["starts"]}
    candidates = [
        Candidate(law=law, name=name, options={**settings, **({"per_arm": names} if names else {})})
        for name, names in own.items()
    ]
    given = {key: options[key] for key in ("columns", "loss", "weights", "seed")}
    scored = attempt(lambda: scores(candidates, table, arm=arm, clusters=clusters, draws=0, **given))
    return {} if isinstance(scored, Refused) else {one.law: one.error for one in scored}
