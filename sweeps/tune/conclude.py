"""From the losses of trials to what was found: optima, rules, hold-outs, coordinates, regret, cost. Nothing is trained here."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sweeps.ladder import LEARNING_RATES, Size
from sweeps.tune import transfer
from sweeps.tune.optima import LEVEL, Edge, Optimum, TrialNoise, around_best, optimum, trial_noise
from sweeps.tune.rules import (
    CellRate,
    Centre,
    Coordinate,
    Form,
    HeldOut,
    NoiseOfTrial,
    Range,
    Regret,
    Rule,
    Rules,
    Source,
    setup,
)
from sweeps.tune.transfer import Columns, Laws, Point, PowerLaw, Scatter
from sweeps.tune.trials import Trial, Trials
from sweeps.tune.tuning import Cell

ALL = "all arms"  # one rule fitted to every arm's cells
DEFAULT = "lab"  # the default rule of sweeps.ladder
FORMS: dict[Columns, Form] = {("size", "tokens"): "c size^a tokens^b", ("size",): "c size^a", ("tokens",): "c tokens^b",
                              (): "c"}  # fmt: skip
At = tuple[str, Cell]  # an arm in a cell


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended: loss in nats, +inf where it diverged; exact FLOPs and seconds of training that were spent."""

    loss: float
    flops: float
    seconds: float


Outcomes = Mapping[str, Outcome]  # by run_id


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """`excess[rule, arm, cell]`: loss at that rule's rate less the least (nats; inf: diverges, NaN: not measured)."""

    trials: Trials
    outcomes: Outcomes
    noise: TrialNoise
    optima: Mapping[At, Optimum]
    sizes: Mapping[At, Size]
    laws: Laws
    held_out: Mapping[str, HeldOut]
    coordinates: Mapping[str, tuple[Coordinate, ...]]
    excess: Mapping[tuple[str, str, Cell], float]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.trials.tuning.arms)

    def of(self, arm: str) -> dict[str, Outcome]:
        """Each run once."""
        return {t.row.run_id: self.outcomes[t.row.run_id] for t in self.trials.trials if t.arm == arm}

    def flops(self, arm: str) -> float:
        return float(sum(o.flops for o in self.of(arm).values()))

    def hours(self, arm: str) -> float:
        return sum(o.seconds for o in self.of(arm).values()) / 3600

    def diverged(self, arm: str) -> int:
        return sum(math.isinf(o.loss) for o in self.of(arm).values())

    def regret(self, rule: str, arm: str) -> Regret:
        values = [self.excess[rule, arm, cell] for cell in self.trials.tuning.cells]
        known = [value for value in values if math.isfinite(value)]
        return Regret(
            mean=float(np.mean(known)) if known else None,
            worst=max(known) if known else None,
            cells=len(known),
            beyond=sum(math.isnan(value) for value in values),
            diverged=sum(math.isinf(value) for value in values),
        )


def grid_losses(trials: Trials, outcomes: Outcomes, at: At) -> tuple[np.ndarray, np.ndarray]:
    """The cell's rates (n,), ascending, and the losses (n, r) of each seed; inf where a trial diverged."""
    found: dict[float, list[tuple[int, float]]] = {}
    for trial in trials.of(*at):
        found.setdefault(trial.rate, []).append((trial.row.replicate, outcomes[trial.row.run_id].loss))
    rates = sorted(found)
    return np.array(rates), np.array([[loss for _, loss in sorted(found[rate])] for rate in rates])


def optima(trials: Trials, outcomes: Outcomes) -> tuple[dict[At, Optimum | Edge], TrialNoise | None]:
    """The best rate of every arm in every cell, and the noise of a trial that their intervals are of: declared, or pooled over
    the seeds of all cells about their best rates."""
    tuning = trials.tuning
    losses = {(arm, cell): grid_losses(trials, outcomes, (arm, cell)) for cell in tuning.cells for arm in tuning.arms}
    if tuning.noise is not None:
        noise = TrialNoise(sd=tuning.noise, dof=math.inf, source="declared")
    else:
        noise = trial_noise(about for _, loss_nr in losses.values() if (about := around_best(loss_nr)) is not None)
    return {
        at: optimum(rate_n.tolist(), loss_nr.mean(1).tolist(), noise=noise, replicates=tuning.seeds)
        for at, (rate_n, loss_nr) in losses.items()
    }, noise


def conclude(trials: Trials, outcomes: Outcomes) -> Tuned:
    """Raises ValueError where an optimum lies at an edge, or where no two seeds of any cell show the noise of a trial."""
    tuning = trials.tuning
    found, noise = optima(trials, outcomes)
    best = {at: value for at, value in found.items() if isinstance(value, Optimum)}
    if edges := [f"{arm}, {cell}" for (arm, cell), value in found.items() if isinstance(value, Edge)]:
        raise ValueError(f"tuning {tuning.name}: the best rate is at the edge of its grid in {edges[0]}")
    if noise is None:
        raise ValueError(
            f"tuning {tuning.name}: its {tuning.seeds} seeds show no noise: in no cell did all end beside its best rate, or they "
            "changed nothing; give tuning.noise, the standard deviation of one trial's loss"
        )
    sizes = {at: Size.of(run, run.V) for at in best for run in [trials.of(*at)[0].row.run]}
    points = {arm: [Point(size=sizes[arm, c], rate=best[arm, c].rate) for c in tuning.fitted] for arm in tuning.arms}
    columns = transfer.determined(list(points.values()))
    laws = transfer.laws_of(points, columns)
    rates = {
        **{arm: law.rate for arm, law in laws.of.items()},
        ALL: laws.one.rate,
        DEFAULT: LEARNING_RATES[DEFAULT].rate,
    }
    held = tuning.held_out
    return Tuned(
        trials=trials,
        outcomes=outcomes,
        noise=noise,
        optima=best,
        sizes=sizes,
        laws=laws,
        held_out={arm: _held_out(law, laws.scatter, best[arm, held], sizes[arm, held]) for arm, law in laws.of.items()}
        if held
        else {},
        coordinates={arm: _coordinates(trials, outcomes, arm) for arm in tuning.arms},
        excess={(name, *at): best[at].excess(rate(sizes[at])) for name, rate in rates.items() for at in best},
    )


def _held_out(law: PowerLaw, scatter: Scatter, best: Optimum, size: Size) -> HeldOut:
    rate, excess = law.rate(size), best.excess(law.rate(size))
    interval = _about(rate, scatter.t * law.log_sd(size, scatter.sd, new=True))
    return HeldOut(
        rate=rate,
        log_off=math.log(rate / best.rate),
        excess=excess if math.isfinite(excess) else None,
        interval=interval,
        inside=None if interval is None else interval[0] <= best.rate <= interval[1],
    )


def _coordinates(trials: Trials, outcomes: Outcomes, arm: str) -> tuple[Coordinate, ...]:
    """Each other value against the trials with nothing changed, paired by cell and seed. A cell's seeds share what the value
    does there, so that the interval is Student's over cells, of level 1 - 0.05 / (values tried x arms) (Bonferroni): what one
    arm adopts by chance would be a difference between arms. Of one setting's values that are better beyond it, the best is
    adopted; the batch is the study's, and is reported only."""
    mine = [t for t in trials.trials if t.arm == arm and t.stage != "grid"]
    base = {(t.cell, t.row.replicate): outcomes[t.row.run_id].loss for t in mine if t.stage == "centre"}
    tried: dict[tuple[str, int], list[Trial]] = {}
    for trial in (t for t in mine if t.stage == "coordinate"):
        index = trials.tuning.coordinates[trial.path].index(trial.value)
        tried.setdefault((trial.path, index), []).append(trial)
    found = []
    for (path, _), those in tried.items():
        by_cell: dict[Cell, list[float]] = {}
        for t in those:
            by_cell.setdefault(t.cell, []).append(outcomes[t.row.run_id].loss - base[t.cell, t.row.replicate])
        gaps = np.array([np.mean(of_cell) for of_cell in by_cell.values()])
        mean = low = high = None
        if np.isfinite(gaps).all():
            mean = float(gaps.mean())
            t = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / len(tried) / len(trials.tuning.arms), max(len(gaps) - 1, 1)))
            half = t * float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
            low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
        found.append(Coordinate(path=path, value=those[0].value, difference=mean, low=low, high=high, adopted=False))
    for path in {c.path for c in found if c.path != "batch"}:
        better = [c for c in found if c.path == path and c.high is not None and c.high < 0]
        if better:
            chosen = min(better, key=lambda c: c.difference or 0.0)
            found[found.index(chosen)] = dataclasses.replace(chosen, adopted=True)
    return tuple(found)


def _about(rate: float, half: float) -> tuple[float, float] | None:
    return (rate * math.exp(-half), rate * math.exp(half)) if math.isfinite(half) else None


# --- the file -------------------------------------------------------------------------------------------------------


def rules_of(tuned: Tuned, source: Source) -> Rules:
    names = (*tuned.arms, ALL, DEFAULT)
    noise = tuned.noise
    return Rules(
        name=tuned.trials.tuning.name,
        source=source,
        noise=NoiseOfTrial(sd=noise.sd, dof=noise.dof if math.isfinite(noise.dof) else None, source=noise.source),
        rules={arm: _rule(tuned, arm) for arm in tuned.arms},
        regret={name: {arm: tuned.regret(name, arm) for arm in tuned.arms} for name in names},
    )


def _rule(tuned: Tuned, arm: str) -> Rule:
    law, scatter, tuning = tuned.laws.of[arm], tuned.laws.scatter, tuned.trials.tuning
    known = scatter.dof > 0
    half_k = scatter.t * scatter.sd * np.sqrt(np.diag(law.unscaled_kk)) if known else None
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(("size", "tokens"))
    for k, (name, exponent) in enumerate(zip(law.columns, law.exponents, strict=True), start=1):
        if half_k is not None:
            intervals[name] = (exponent - float(half_k[k]), exponent + float(half_k[k]))
    rate = math.exp(law.log_rate)
    return Rule(
        setup=setup(tuned.trials.of(arm, tuning.fitted[0])[0].row.run),
        form=FORMS[law.columns],
        exponents="shared" if tuned.laws.shared else "own",
        c=law.c,
        a=law.exponent("size"),
        b=law.exponent("tokens"),
        a_interval=intervals["size"],
        b_interval=intervals["tokens"],
        centre=Centre(size=law.centre["size"], tokens=law.centre["tokens"]),
        rate_at_centre=rate,
        rate_interval=_about(rate, float(half_k[0])) if half_k is not None else None,
        covariance=tuple(map(tuple, (scatter.sd**2 * law.unscaled_kk).tolist())) if known else None,
        scatter=scatter.sd if known else None,
        dof=scatter.dof,
        fitted=Range(size=law.fitted["size"], tokens=law.fitted["tokens"]),
        optimizer={c.path.removeprefix("optimizer."): c.value for c in tuned.coordinates[arm] if c.adopted},
        trials=tuned.trials.per_arm()[arm],
        flops=tuned.flops(arm),
        hours=tuned.hours(arm),
        cells=tuple(_cell_rate(tuned, arm, cell) for cell in tuning.cells),
        held_out=tuned.held_out.get(arm),
        coordinates=tuned.coordinates[arm],
    )


def _cell_rate(tuned: Tuned, arm: str, cell: Cell) -> CellRate:
    best, size = tuned.optima[arm, cell], tuned.sizes[arm, cell]
    shape = tuned.trials.tuning.shape(arm, cell)
    return CellRate(
        budget=cell.budget,
        D=shape.D,
        L=shape.L,
        held_out=cell.held_out,
        size=size.body_flops,
        tokens=size.tokens,
        **{name: getattr(best, name) for name in ("rate", "low", "high", "loss", "curvature", "cliff")},
    )
