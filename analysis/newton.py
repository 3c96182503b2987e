"""The solver under every fit: damped Newton with exact derivatives, many members at once, one compiled program.

A member of a batch is one start on one set of weights and losses: a random start, a resample, a row left out. LANES of
them advance side by side; a lane whose member has converged is given the next one, so that no member waits for the
slowest and one compilation serves any number of them.

The objective is the sum over rows of w huber_delta(log predicted - log observed). It is approached through a falling
sequence of deltas, because at 1e-3 it is nearly a sum of absolute deviations, on whose kinks descent from afar stops.
Convergence is judged by the whole Newton step, which no scale of the objective changes.

Letters: n rows, k free parameters, b lanes, m members.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.laws import Law

LANES = 64
_ENTRIES = 2**21
_SHORT = 1024  # rows
STEP_TOLERANCE = 1e-7  # of the whole Newton step, in internal parameters: what counts as converged
_STOP = 1e-9  # where a lane stops; from 1e-7 that is one step more
_ROUNDING = 1e-14  # a change, as a share of the objective, that its evaluation does not resolve
_STUCK = 1e8  # a damping at which steps have no length left
_STALLED = 20  # iterations in a row without a gain
_ITERATIONS_A_CALL = 8
_COARSE_STEP, _COARSE_ITERATIONS = 1e-2, 12  # when a lane goes on to the next smaller delta
_ITERATIONS = 400  # at the last delta, after which a lane gives up
_FLOOR = 1e-30  # a law may go negative on the way; the logarithm stays finite, far from any optimum


@contextmanager
def float64_on_cpu() -> Iterator[None]:
    """float64 for what runs inside, on the CPU; the caller's precision and device are as before afterwards."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "JAX_PLATFORMS leaves out the CPU, where fits run in float64; add 'cpu' to its list"
        ) from error
    with jax.enable_x64(True), jax.default_device(cpu), jax.numpy_rank_promotion("allow"):
        yield


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A law on its columns. `slots[i][arm]` is the free parameter that the law's i-th parameter reads in that arm, or -1
    where it is `constants[i, arm]`: a parameter that every arm shares, one for each arm, tied ones and fixed ones alike.
    Free parameters are internal: logarithms of positive ones. `tau` is the quantile that is fitted, 0.5 the median.
    """

    law: Law
    slots: tuple[tuple[int, ...], ...]
    constants: np.ndarray = field(repr=False)
    columns: Mapping[str, np.ndarray] = field(repr=False)
    arm_n: np.ndarray = field(repr=False)
    low_k: np.ndarray = field(repr=False)
    high_k: np.ndarray = field(repr=False)
    tau: float = 0.5

    @property
    def k(self) -> int:
        return len(self.low_k)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where each member ended. `step_m` is its last whole Newton step, infinite where there is none; objective and
    `gradient_m` are in the units of the published objective, `hessian_mkk` of the objective divided by delta."""

    theta_mk: np.ndarray
    objective_m: np.ndarray
    gradient_m: np.ndarray
    step_m: np.ndarray
    hessian_mkk: np.ndarray
    iterations_m: np.ndarray

    @property
    def converged_m(self) -> np.ndarray:
        return self.step_m < STEP_TOLERANCE


def deltas_down_to(delta: float | np.ndarray, *, first: float = 0.1, stages: int = 3) -> np.ndarray:
    """The sequence of deltas, ending at `delta`: of shape (stages + 1, m), m = 1 for one delta."""
    delta_m = np.atleast_1d(np.asarray(delta, float))
    return np.geomspace(np.maximum(first, delta_m), delta_m, stages + 1)


def solve(
    problem: Problem,
    theta0_mk: np.ndarray,
    weights_mn: np.ndarray,
    log_loss_mn: np.ndarray,
    *,
    deltas_sm: np.ndarray,
    low_mk: np.ndarray | None = None,
    high_mk: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solved:
    """Minimises every member; `weights_mn`, `log_loss_mn` and the stages' deltas have one member, or all.

    Bounds of each member stand in for the problem's: equal ones hold a parameter where they are. `progress(done, members)`
    is called as members finish.
    """
    members, k = theta0_mk.shape
    low_mk = np.broadcast_to(problem.low_k if low_mk is None else low_mk, (members, k))
    high_mk = np.broadcast_to(problem.high_k if high_mk is None else high_mk, (members, k))
    deltas_sm = np.broadcast_to(deltas_sm, (len(deltas_sm), members))
    weights_mn, log_loss_mn = (np.broadcast_to(a, (members, a.shape[1])) for a in (weights_mn, log_loss_mn))
    rows = weights_mn.shape[1]
    padded = _padded(rows)
    lanes = LANES
    if padded > _SHORT:  # idle lanes cost more than another compilation
        # A few tens of arrays of (n, lanes) doubles are alive at once.
        lanes = max(1, min(LANES, 1 << (members - 1).bit_length(), _ENTRIES // padded))
    out = Solved(
        theta_mk=np.empty((members, k)),
        objective_m=np.empty(members),
        gradient_m=np.empty(members),
        step_m=np.empty(members),
        hessian_mkk=np.empty((members, k, k)),
        iterations_m=np.zeros(members, int),
    )
    with float64_on_cpu():
        more = (0, padded - rows)  # rows like the last, without weight
        columns = {name: np.pad(np.asarray(v, float), more, mode="edge") for name, v in problem.columns.items()}
        data = (columns, np.pad(problem.arm_n, more, mode="edge"), problem.constants)
        weights_nb, log_loss_nb = np.zeros((2, padded, lanes))
        low_kb, high_kb, deltas_sb = np.zeros((k, lanes)), np.zeros((k, lanes)), np.ones((len(deltas_sm), lanes))
        state = {name: np.array(value) for name, value in _idle(k, lanes).items()}
        member_b = np.full(lanes, -1)
        waiting = 0
        finished = 0
        while finished < members:
            free = np.flatnonzero(member_b < 0)[: members - waiting]
            taken = np.arange(waiting, waiting + len(free))
            waiting += len(free)
            if len(free):
                member_b[free] = taken
                weights_nb[:rows, free], log_loss_nb[:rows, free] = weights_mn[taken].T, log_loss_mn[taken].T
                low_kb[:, free], high_kb[:, free] = low_mk[taken].T, high_mk[taken].T
                deltas_sb[:, free] = deltas_sm[:, taken]
                state["theta"][:, free] = np.clip(theta0_mk[taken], low_mk[taken], high_mk[taken]).T
                state["damping"][free], state["fresh"][free], state["done"][free] = 1e-2, True, False
                state["stage"][free] = state["iteration"][free] = state["total"][free] = state["stalled"][free] = 0
            new, summary = _advance(
                problem.law,
                problem.slots,
                problem.tau,
                state,
                weights_nb,
                log_loss_nb,
                deltas_sb,
                low_kb,
                high_kb,
                data,
            )
            state = {name: np.array(value) for name, value in new.items()}
            ended = np.flatnonzero(state["done"] & (member_b >= 0))
            m = member_b[ended]
            out.theta_mk[m] = state["theta"][:, ended].T
            out.hessian_mkk[m] = np.moveaxis(state["hessian"], -1, 0)[ended]
            out.iterations_m[m] = state["total"][ended]
            for target, value in zip((out.objective_m, out.gradient_m, out.step_m), summary, strict=True):
                target[m] = np.asarray(value)[ended]
            member_b[ended] = -1
            finished += len(ended)
            if progress is not None and len(ended):
                progress(finished, members)
    return out


def _padded(rows: int) -> int:
    """Tables of about as many rows share one compiled program."""
    step = 16 if rows <= 256 else 64
    return rows if rows > _SHORT else -(-rows // step) * step


def _idle(k: int, lanes: int) -> dict[str, Any]:
    zeros = partial(np.zeros, dtype=float)
    return {
        "theta": zeros((k, lanes)),
        "value": zeros(lanes),
        "gradient": zeros((k, lanes)),
        "hessian": zeros((k, k, lanes)),
        "damping": np.ones(lanes),
        "stage": np.zeros(lanes, np.int32),
        "iteration": np.zeros(lanes, np.int32),
        "total": np.zeros(lanes, np.int32),
        "stalled": np.zeros(lanes, np.int32),
        "fresh": np.ones(lanes, bool),
        "done": np.ones(lanes, bool),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(law, slots, tau, state, weights_nb, log_loss_nb, deltas_sb, low, high, data):
    columns, arm_n, constants = data
    last = len(deltas_sb) - 1
    evaluate = partial(_derivatives, law, slots, tau, columns, arm_n, constants, weights_nb, log_loss_nb)

    def held(theta, gradient):
        """Parameters on a bound that the gradient holds there take no part in a step."""
        return ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))

    def without(theta, gradient, hessian):
        keep = (~held(theta, gradient)).astype(theta.dtype)
        eye = jnp.eye(len(theta))[:, :, None]
        return gradient * keep, hessian * keep[:, None] * keep[None] + eye * (1 - keep)

    def iterate(carry):
        count, s = carry
        gradient, hessian = without(s["theta"], s["gradient"], s["hessian"])
        diagonal = jnp.abs(jnp.einsum("iib->ib", hessian))
        scale = jnp.maximum(diagonal, 1e-12 * (1e-30 + diagonal.max(axis=0)))
        damped = hessian + jnp.eye(len(scale))[:, :, None] * (s["damping"] * scale)
        step = _newton_step(gradient, damped)
        step = step * jnp.minimum(1.0, 2.0 / jnp.maximum(jnp.abs(step).max(axis=0), 1e-300))
        trial = jnp.where(s["fresh"], s["theta"], jnp.clip(s["theta"] - step, low, high))
        value, new_gradient, new_hessian = evaluate(
            trial, jnp.take_along_axis(deltas_sb, s["stage"][None], axis=0)[0], s["stage"] < jnp.minimum(1, last)
        )
        # Derivatives are exact where the objective's own change is lost in rounding: steps go on there. False for NaN.
        better = (s["fresh"] | (value <= s["value"] * (1 + _ROUNDING))) & jnp.isfinite(value)
        size = jnp.where(jnp.isfinite(step), jnp.abs(step), jnp.inf).max(axis=0)
        damping = jnp.clip(jnp.where(better, s["damping"] / 8, s["damping"] * 5), 1e-14, 1e12)
        damping = jnp.where(s["fresh"], s["damping"], damping)
        # A tiny step that a large damping did not make, or one that would gain less than rounding.
        small = ~s["fresh"] & (s["damping"] <= 1e-3)
        gain = (gradient * step).sum(axis=0)
        arrived = size < jnp.where(s["stage"] == last, _STOP, _COARSE_STEP)
        arrived = small & (arrived | ((gain < _ROUNDING * s["value"]) & (size < STEP_TOLERANCE / 10)))
        late = s["iteration"] >= jnp.where(s["stage"] == last, _ITERATIONS, _COARSE_ITERATIONS)
        gained = s["fresh"] | (s["value"] - value > _ROUNDING * s["value"])
        stalled = jnp.where(gained, 0, s["stalled"] + 1)
        late = late | (damping > _STUCK) | (stalled >= _STALLED)
        on = (arrived | late) & (s["stage"] < last)
        active = ~s["done"]

        def keep(new, old):
            return jnp.where(active, new, old)

        new = {
            "theta": jnp.where(active & better, trial, s["theta"]),
            "value": jnp.where(active & better, value, s["value"]),
            "gradient": jnp.where(active & better, new_gradient, s["gradient"]),
            "hessian": jnp.where(active & better, new_hessian, s["hessian"]),
            "damping": keep(jnp.where(on, jnp.clip(damping, 1e-6, 1e-2), damping), s["damping"]),
            "stage": keep(s["stage"] + on, s["stage"]),
            "iteration": keep(jnp.where(on, 0, s["iteration"] + 1), s["iteration"]),
            "total": s["total"] + active,
            "stalled": keep(jnp.where(on, 0, stalled), s["stalled"]),
            # What was computed belongs to the delta before: the same place is evaluated again.
            "fresh": keep(on, s["fresh"]),
            "done": s["done"] | ((arrived | late) & (s["stage"] == last)),
        }
        return count + 1, new

    def going(carry):
        count, s = carry
        return (count < _ITERATIONS_A_CALL) & ~s["done"].all()

    _, state = jax.lax.while_loop(going, iterate, (0, state))
    gradient, hessian = without(state["theta"], state["gradient"], state["hessian"])
    step = jnp.abs(_newton_step(gradient, hessian)).max(axis=0)
    step = jnp.where(jnp.isfinite(step), step, jnp.inf)
    delta = deltas_sb[-1]
    return state, (state["value"] * delta, jnp.sqrt((gradient**2).sum(axis=0)) * delta, step)


def log_predicted(problem: Problem, theta_k: Any) -> Any:
    """log of the law at every row, differentiable by the free parameters: shape (n,)."""
    at = jnp.concatenate([theta_k, jnp.zeros(1)])
    params = {}
    for i, (p, slot) in enumerate(zip(problem.law.parameters, problem.slots, strict=True)):
        internal = jnp.where(np.asarray(slot) >= 0, at[np.asarray(slot)], problem.constants[i])[problem.arm_n]
        params[p.name] = jnp.exp(internal) if p.positive else internal
    columns = {name: jnp.asarray(value, float) for name, value in problem.columns.items()}
    return jnp.log(jnp.maximum(problem.law.predict(params, columns), _FLOOR))


def jacobian(problem: Problem, theta_k: np.ndarray) -> np.ndarray:
    """Derivatives (n, k) of log predicted by the free internal parameters."""
    with float64_on_cpu():
        return np.asarray(jax.jacfwd(partial(log_predicted, problem))(jnp.asarray(theta_k)))


def _derivatives(law, slots, tau, columns, arm_n, constants, weights_nb, log_loss_nb, theta_kb, delta_b, coarse_b):
    """Objective, gradient (k, b) and Hessian (k, k, b) over delta, by forward differentiation of every row and lane:
    all of it is arithmetic on (n, b) arrays, whose sums over rows are then sums of vectors."""
    k, lanes = theta_kb.shape
    locals_, row_axes = [], []
    for i, slot in enumerate(slots):
        if len(set(slot)) == 1 and slot[0] >= 0:
            locals_.append(theta_kb[slot[0]])
            row_axes.append(None)
        elif max(slot) < 0 and len(slot) == 1:
            locals_.append(jnp.broadcast_to(constants[i, 0], (lanes,)))
            row_axes.append(None)
        else:
            of_arm = [
                theta_kb[u] if u >= 0 else jnp.broadcast_to(constants[i, a], (lanes,)) for a, u in enumerate(slot)
            ]
            locals_.append(jnp.stack(of_arm)[arm_n])
            row_axes.append(0)
    free = tuple(i for i, slot in enumerate(slots) if max(slot) >= 0)
    names = tuple(columns)
    row = partial(_row, law, free, names)
    per_lane = jax.vmap(row, in_axes=((0,) * len(slots), None))
    per_row = jax.vmap(per_lane, in_axes=(tuple(row_axes), 0))
    P, first, second = per_row(tuple(locals_), tuple(columns[name] for name in names))
    inverse = 1.0 / P
    residual = jnp.log(P) - log_loss_nb
    size = jnp.abs(residual)
    near = jnp.minimum(size, delta_b)
    if tau != 0.5:
        weights_nb = weights_nb * jnp.where(residual < 0, 2 * tau, 2 * (1 - tau))
    # Divided by delta, least absolute deviations and least squares have derivatives of like size.
    value = (weights_nb * near * (size - near / 2)).sum(axis=0) / delta_b
    slope = weights_nb * jnp.sign(residual) * near / delta_b
    # The second derivative of log P is P''/P - (P'/P)^2. Far from an optimum, in the first and coarsest stage, it is
    # left out and the loss is bounded by a parabola: Gauss and Newton's step, whose matrix is never indefinite.
    majorant = weights_nb * near / jnp.maximum(size, 1e-300) / delta_b
    bend = jnp.where(coarse_b, majorant, weights_nb * (size < delta_b) / delta_b - slope)
    J = [d * inverse for d in first]
    # Without a barrier the compiler computes the law anew for each of the sums below.
    J, slope, bend, inverse, second = jax.lax.optimization_barrier((J, slope, bend, inverse, second))
    scaled = jnp.where(coarse_b, 0.0, slope * inverse)
    mask_an = (arm_n[None, :] == jnp.arange(len(slots[0]))[:, None]).astype(slope.dtype)
    gradient, hessian = [jnp.zeros(lanes)] * k, [[jnp.zeros(lanes)] * k for _ in range(k)]
    for p, i in enumerate(free):
        for u, total in _by_slot(slots[i], slots[i], mask_an, slope * J[p]):
            gradient[u[0]] = gradient[u[0]] + total
        for q in range(p, len(free)):
            curvature = second[p][q - p]
            product = bend * J[p] * J[q] + (0.0 if curvature is None else scaled * curvature)
            for (u, v), total in _by_slot(slots[i], slots[free[q]], mask_an, product):
                hessian[u][v] = hessian[u][v] + total
                if p != q:
                    hessian[v][u] = hessian[v][u] + total
    return value, jnp.stack(gradient), jnp.stack([jnp.stack(line) for line in hessian])


def _by_slot(slot_i, slot_j, mask_an, product_nb):
    """The sum over rows of `product_nb` for each pair of free parameters that the rows' arms read."""
    pairs = list(zip(slot_i, slot_j, strict=True))
    if len(set(pairs)) == 1:
        return [(pairs[0], product_nb.sum(axis=0))] if min(pairs[0]) >= 0 else []
    totals = mask_an @ product_nb
    return [(pair, totals[arm]) for arm, pair in enumerate(pairs) if min(pair) >= 0]


def _row(law, free, names, theta, x):
    """The law at one row, its first and second derivatives by the free internal parameters; None where a second one is
    zero by structure."""
    values = dict(zip(names, x, strict=True))

    def predict(*internal):
        at = list(theta)
        for i, value in zip(free, internal, strict=True):
            at[i] = value
        params = {p.name: jnp.exp(v) if p.positive else v for p, v in zip(law.parameters, at, strict=True)}
        return jnp.maximum(law.predict(params, values), _FLOOR)

    def along(f, p):
        def derivative(*at):
            def of_one(value):
                return f(*at[:p], value, *at[p + 1 :])

            return jax.jvp(of_one, (at[p],), (jnp.ones_like(at[p]),))[1]

        return derivative

    at = tuple(theta[i] for i in free)
    first = [along(predict, p)(*at) for p in range(len(free))]
    second = [[along(along(predict, p), q)(*at) for q in range(p, len(free))] for p in range(len(free))]
    return predict(*at), first, second


def _newton_step(gradient_kb, hessian_kkb):
    """hessian^-1 gradient by elimination, NaN where the Hessian is not positive definite.

    Not jnp.linalg: as whole-batch arithmetic it is faster for matrices this small, and a program that scans over
    batched LAPACK calls was seen to hang for good on a busy machine with two cores (jaxlib 0.10.2).
    """

    def eliminate(i, system):
        rows, positive = system
        pivot = rows[i, i]
        row = rows[i] / pivot
        cleared = rows - rows[:, i][:, None] * row[None]
        return cleared.at[i].set(row), positive & (pivot > 0)

    augmented = jnp.concatenate([hessian_kkb, gradient_kb[:, None]], axis=1)
    positive = jnp.ones(gradient_kb.shape[1], bool)
    rows, positive = jax.lax.fori_loop(0, len(gradient_kb), eliminate, (augmented, positive))
    return jnp.where(positive, rows[:, -1], jnp.nan)
