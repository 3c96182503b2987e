"""Best loss against compute, L*(C), of every arm and draw: laws of C as they are, laws of N and D by their optimum.

Unlike crossing.frontier, which keeps to the sizes that a study has run, these curves go beyond the data: they are what
forecasts and the design of the next runs are made of.

Letters: C FLOPs, N parameters, D tokens, b draws, g points of the grid of C.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis.laws import Law
from analysis.optimum import SIX_N, Cost, cost_of_token
from analysis.refusal import Refusal
from analysis.resample import Draws

REACH = 1e4  # how far beyond the largest measured budget curves are drawn, as a factor
BELOW = 10.0  # how far below the smallest
_POINTS = 241
_GOLDEN = (np.sqrt(5) - 1) / 2
_LEAST = -7.0  # log N from which an optimum is searched, and log D to which
_STEPS = 42  # of golden section: log N to 1e-7, the loss at its minimum to rounding

OfArms = Cost | Mapping[str, Cost]  # FLOPs per token, the same for all arms or each arm's own


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Best loss (nats) of each arm on a grid of C: `loss[arm]` of shape (b, g), from more to less structure. Draw i of one
    arm belongs to draw i of the others. `measured` are the least and largest C that every arm was trained at."""

    C: np.ndarray = field(repr=False)
    loss: Mapping[str, np.ndarray] = field(repr=False)
    measured: tuple[float, float]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.loss)

    def difference(self, more: str, less: str) -> np.ndarray:
        """Loss of `less` minus that of `more`, (b, g): negative where less structure is better."""
        for name in (more, less):
            if name not in self.loss:
                raise ValueError(f"arm = {name!r}: the curves are of {', '.join(self.loss)}")
        return self.loss[less] - self.loss[more]

    def at(self, C: Any, arm: str) -> np.ndarray:
        """Loss of every draw at C inside the grid, linear in log C between its points: (b, *shape of C)."""
        C = np.asarray(C, float)
        x, grid = np.log(np.atleast_1d(C)).ravel(), np.log(self.C)
        if x.min() < grid[0] - 1e-9 or x.max() > grid[-1] + 1e-9:
            raise ValueError(f"C = {C!r} is beyond the curves, {self.C[0]:.3g} to {self.C[-1]:.3g}; see reach=")
        i = np.clip(np.searchsorted(grid, x) - 1, 0, len(grid) - 2)
        share = (x - grid[i]) / (grid[i + 1] - grid[i])
        loss = self.loss[arm]
        values = loss[:, i] * (1 - share) + loss[:, i + 1] * share
        return values.reshape(len(values), *C.shape)


def curves(
    draws: Draws | Mapping[str, Draws],
    *,
    arms: Sequence[str] | None = None,
    measured: tuple[float, float] | None = None,
    reach: float = REACH,
    flops_per_token: OfArms = SIX_N,
    paired: bool = False,
    points: int = _POINTS,
) -> Curves:
    """L*(C) of every draw and arm, from a tenth of the smallest measured budget to `reach` times the largest.

    `draws` are of one law with parameters by arm, or one Draws for each arm; `arms` orders them from more to less
    structure (default: as given). A law of C is taken as it is; of a law of N and D the minimum over N at
    D = C / flops_per_token(N) is taken (a number is a factor of N). Separate Draws are of independent runs unless `paired`:
    draws that one seed has made alike are then put out of step, so that their difference has both arms' spread.
    """
    if not reach >= 1:
        raise ValueError(f"reach = {reach!r}: use a factor of at least 1")
    of = _of_arms(draws, arms)
    for one in of.values():
        if not one.fit.converged:
            raise Refusal(
                f"curves are drawn of a fit that has converged, and {one.law.name} says: {one.fit.status}; let arms share "
                "what they can not each determine (such as E), or fix it"
            )
    cost = {name: cost_of_arm(flops_per_token, name) for name in of}
    ranges = [_measured(one, name, cost[name]) for name, one in of.items()]
    low, high = measured or (max(r[0] for r in ranges), min(r[1] for r in ranges))
    if not 0 < low < high:
        raise ValueError(
            f"measured = ({low:.3g}, {high:.3g}): the arms were trained at budgets that do not overlap; give the range in "
            "which they are compared"
        )
    C = np.geomspace(low / BELOW, high * reach, points)
    if isinstance(draws, Mapping) and not paired:
        of = apart(of)
    loss = {name: frontier(one, C, arm=name, flops_per_token=cost[name]) for name, one in of.items()}
    lengths = {name: len(value) for name, value in loss.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arms have {lengths} draws: draw the same number for each")
    return Curves(C=C, loss=loss, measured=(float(low), float(high)))


def apart(draws: Mapping[str, Draws]) -> dict[str, Draws]:
    """Draws of independent runs put out of step: those that one seed has made alike would make a difference between arms
    look far too sure. Draws that are one and the same fit stay in step."""
    first = next(iter(draws.values()))
    moved = {}
    for index, (name, one) in enumerate(draws.items()):
        order = np.random.default_rng(index).permutation(len(one)) if one is not first else slice(None)
        ordered = [{key: value[order] for key, value in params.items()} for params in (one.params, *(one.near or ()))]
        moved[name] = replace(one, params=ordered[0], near=(ordered[1], ordered[2]) if one.near else None)
    return moved


def frontier(draws: Draws, C: Any, *, arm: str | None = None, flops_per_token: Cost = SIX_N) -> np.ndarray:
    """L*(C) of every draw, (b, g): a law of C as it is, or the minimum over N of a law of N and D."""
    law, C = draws.law, np.asarray(C, float)
    if law.columns == ("C",):
        return draws.predict(C=C, **({"arm": np.full(C.shape, arm)} if law.by_arm else {}))
    return draws.values(
        lambda params: optimum(law, params, C, arms=draws.fit.arms, arm=arm, flops_per_token=flops_per_token)[0]
    )


def optimum(
    law: Law,
    params: Mapping[str, Any],
    C: Any,
    *,
    arms: Sequence[str] = (),
    arm: str | None = None,
    flops_per_token: Cost = SIX_N,
) -> tuple[np.ndarray, np.ndarray]:
    """Least loss and the N that has it at every C, (b, g) each, by golden section in log N: a sum of powers of N and of
    1 / N has one minimum there. `params` lead with an axis of draws. Sizes are not held to those that were measured."""
    if set(law.columns) != {"N", "D"}:
        raise ValueError(
            f"{law.name} is a law of {', '.join(law.columns)}: curves against compute are drawn of laws of C, or of N and D; "
            "make Curves(C=..., loss=..., measured=...) of any other"
        )
    from analysis.newton import float64_on_cpu

    C = np.atleast_1d(np.asarray(C, float))
    values = _of_arm(law, params, arms, arm)
    shape = np.broadcast_shapes(*(value.shape for value in values.values()), C.shape)
    low = np.full(shape, _LEAST)
    high = np.broadcast_to(np.log(C) - _LEAST, shape)

    def loss(log_N: np.ndarray) -> np.ndarray:
        N = np.exp(log_N)
        return np.asarray(law.predict(values, {"N": N, "D": C / cost_of_token(flops_per_token, N)}))

    with float64_on_cpu():
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = loss(left), loss(right)
        for _ in range(_STEPS):
            down = at_left < at_right
            high, low = np.where(down, right, high), np.where(down, low, left)
            new = np.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
            at_new = loss(new)
            left, right = np.where(down, new, right), np.where(down, left, new)
            at_left, at_right = np.where(down, at_new, at_right), np.where(down, at_left, at_new)
    down = at_left < at_right
    return np.where(down, at_left, at_right), np.exp(np.where(down, left, right))


def measured_cost(N: Any, D: Any, C: Any) -> Callable[[np.ndarray], np.ndarray]:
    """FLOPs of a token as a function of N, from runs: C / (D N) log-log between the sizes, and level beyond them."""
    N, D, C = (np.asarray(values, float) for values in (N, D, C))
    sizes, which = np.unique(N, return_inverse=True)
    ratio = np.bincount(which, weights=np.log(C / (D * N))) / np.bincount(which)
    return lambda N: N * np.exp(np.interp(np.log(N), np.log(sizes), ratio))


def _of_arms(draws: Draws | Mapping[str, Draws], arms: Sequence[str] | None) -> dict[str, Draws]:
    if isinstance(draws, Mapping):
        known: dict[str, Draws] = dict(draws)
    else:
        known = dict.fromkeys(draws.fit.arms, draws)
    chosen = list(known) if arms is None else list(arms)
    unknown = [name for name in chosen if name not in known]
    if unknown or len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"arms = {chosen}: name two or more, from more to less structure, of {', '.join(known) or 'a law by arm'}"
        )
    return {name: known[name] for name in chosen}


def cost_of_arm(given: OfArms, arm: str) -> Cost:
    if not isinstance(given, Mapping):
        return given
    if arm not in given:
        raise ValueError(f"flops_per_token has no {arm!r}: give one for each arm, {', '.join(given)} are there")
    return given[arm]


def _measured(draws: Draws, arm: str, cost: Cost) -> tuple[float, float]:
    data = draws.fit.data
    used = data.weights_n > 0
    if draws.law.by_arm:
        used &= data.arm_n == draws.fit.arms.index(arm)
    raw = {name: column[used] for name, column in data.raw.items()}
    C = (
        raw["C"]
        if "C" in raw
        else cost_of_token(cost, raw["N"]) * raw["D"]
        if {"N", "D"} <= set(raw)
        else np.array([np.nan])
    )
    return float(C.min()), float(C.max())


def _of_arm(law: Law, params: Mapping[str, Any], arms: Sequence[str], arm: str | None) -> dict[str, np.ndarray]:
    """Each parameter of the given arm as a column (b, 1)."""
    if law.by_arm and arm not in arms:
        raise ValueError(f"arm = {arm!r}: the law has {', '.join(arms)}")
    index = list(arms).index(str(arm)) if law.by_arm else 0
    values = {}
    for p in law.parameters:
        value = np.asarray(params[p.name], float)
        values[p.name] = (value[..., index] if p.per_arm else value)[..., None]
    return values
