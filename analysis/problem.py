"""From a table and a law to the vector of free parameters that newton.py moves.

A law's parameters may be shared by arms or one for each, fixed, or tied to another; `Problem.slots` says for every arm
which free parameter each of them reads. Columns are divided by their geometric means where the law says how its
parameters change with that (`Law.natural`), so that a fit is well conditioned and the same in any unit.

Letters: n rows, k free parameters, m members of a batch.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.laws import Law, Parameter, Values
from analysis.newton import Problem, float64_on_cpu
from analysis.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Data:
    """Columns of n rows that passed every check: `raw` as given, `centred` divided by their geometric means `centre`;
    `arm_n` indexes `arms`, which are empty where no parameter has one for each arm."""

    raw: Mapping[str, np.ndarray]
    centred: Mapping[str, np.ndarray]
    centre: Mapping[str, float]
    log_loss_n: np.ndarray
    weights_n: np.ndarray
    arms: tuple[str, ...]
    arm_n: np.ndarray


def prepare(
    law: Law, table: Any, *, columns: Mapping[str, str] | None, loss: str, weights: Any, arm: str = "arm"
) -> Data:
    """The law's columns of `table`, checked, with zero-weight rows kept."""
    columns = columns or {}
    raw = {name: _column(table, columns.get(name, name)) for name in law.columns}
    loss_n = _column(table, loss)
    weights_n = np.ones(len(loss_n)) if weights is None else np.asarray(weights, float)
    if weights_n.shape != loss_n.shape or not np.all(np.isfinite(weights_n)) or np.any(weights_n < 0):
        raise ValueError(f"weights of shape {weights_n.shape}: give {len(loss_n)} finite numbers that are not negative")
    used = weights_n > 0
    if not used.any():
        raise Refusal(f"no row has a weight, so there is nothing to fit {law.name} to")
    arms: tuple[str, ...] = ()
    arm_n = np.zeros(len(loss_n), int)
    if law.by_arm:
        if arm not in table:
            raise ValueError(f"column {arm!r} is not in the table, and {law.name} has parameters by arm; see arm=")
        names = [str(name) for name in table[arm]]
        arms = tuple(dict.fromkeys(names))
        arm_n = codes(names, arms)
        lost = [name for index, name in enumerate(arms) if not np.any(used & (arm_n == index))]
        if lost:
            raise Refusal(f"arm {lost[0]!r} has no row with weight, so its parameters are not determined")
    for name, least in law.distinct:
        # Sizes that differ by rounding are one size.
        found = len(np.unique(np.round(np.log(raw[name][used]), 6)))
        if found < least:
            raise Refusal(f"{law.name} needs {least} distinct values of {name} and has {found}: add sizes or budgets")
    centre = {name: 1.0 for name in law.columns}
    if law.natural is not None:
        centre = {name: float(np.exp(np.log(raw[name][used]).mean())) for name in law.columns}
    centred = {name: value / centre[name] for name, value in raw.items()}
    return Data(
        raw=raw,
        centred=centred,
        centre=centre,
        log_loss_n=np.log(loss_n),
        weights_n=weights_n,
        arms=arms,
        arm_n=arm_n,
    )


def codes(arm: Any, arms: Sequence[str]) -> np.ndarray:
    """Arms' names as indices into `arms`."""
    known = {name: index for index, name in enumerate(arms)}
    unknown = sorted({str(name) for name in np.ravel(arm)} - set(known))
    if unknown:
        raise ValueError(f"arm = {unknown[0]!r}: {nearest(unknown[0], arms)}the fit has {', '.join(arms)}")
    return np.asarray([known[str(name)] for name in np.ravel(arm)], int).reshape(np.shape(arm))


def _column(table: Any, name: str) -> np.ndarray:
    if name not in table:
        known = [str(column) for column in table]
        raise ValueError(
            f"column {name!r} is not in the table: {nearest(name, known)}it has {', '.join(known)}; see columns="
        )
    values = np.asarray(table[name], float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] = {values[bad[0]]}: laws are fitted to positive finite numbers; drop the "
            f"{bad.size} such rows (a diverged run has no loss)"
        )
    return values


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


# --- parameters as one vector ----------------------------------------------------------------------------------------


def build(law: Law, data: Data, fixed: Mapping[str, float], tied: Mapping[str, str], tau: float) -> Problem:
    """Which free parameter each of the law's parameters reads in each arm, on centred columns where that is possible.

    A parameter that centring changes (an amplitude, by its exponent) can be fixed, tied or shared by arms with exponents
    of their own only on the columns themselves.
    """
    arms = data.arms or ("",)
    names = [p.name for p in law.parameters]
    for name, other in tied.items():
        for one in (name, other):
            if one not in names:
                raise ValueError(f"tied: {one!r} is not one of {', '.join(names)}")
        if other in tied or name == other:
            raise ValueError(f"tied: {name!r} = {other!r}: tie each parameter to one that is itself free")
    values = _fixed_values(law, arms, fixed)
    slots, low, high = [], [], []
    at: dict[str, tuple[int, ...]] = {}
    for p in sorted(law.parameters, key=lambda p: p.name in tied):
        if p.name in tied:
            at[p.name] = at[tied[p.name]]
            continue
        row: list[int] = []
        for index, _ in enumerate(arms):
            if np.isfinite(values[p.name][index]):
                row.append(-1)
            elif row and not p.per_arm:
                row.append(row[0])
            else:
                row.append(len(low))
                bounds = np.log(p.bounds) if p.positive else p.bounds
                low.append(bounds[0])
                high.append(bounds[1])
        at[p.name] = tuple(row)
    if not low:
        raise ValueError(f"{law.name}: every parameter is fixed, so there is nothing to fit; free at least one")
    slots = tuple(at[name] for name in names)
    constants = np.zeros((len(names), len(arms)))
    for i, p in enumerate(law.parameters):
        value = np.nan_to_num(values[tied.get(p.name, p.name)], nan=1.0)
        constants[i] = np.log(value) if p.positive else value
    problem = Problem(
        law=law,
        slots=slots,
        constants=constants,
        columns=data.centred,
        arm_n=data.arm_n,
        low_k=np.asarray(low, float),
        high_k=np.asarray(high, float),
        tau=tau,
    )
    if law.natural is None or _survives_centring(problem, data):
        return problem
    return _on_the_columns_themselves(problem, data)


def _on_the_columns_themselves(problem: Problem, data: Data) -> Problem:
    """There amplitudes, which centring changes, may be anything."""
    moves = set(_changed_by_centring(problem, data))
    wide = [i in moves for i in _owner(problem)]
    return replace(
        problem,
        columns=data.raw,
        low_k=np.where(wide, -460.0, problem.low_k),
        high_k=np.where(wide, 460.0, problem.high_k),
    )


def uncentred(problem: Problem, data: Data, theta_k: np.ndarray, name: str) -> tuple[Problem, np.ndarray]:
    """The same fit with the free parameter `name` in its natural unit, so that it can be held at a value."""
    i = _owner(problem)[free_names(problem, data.arms).index(name)]
    if problem.law.natural is None or problem.columns is data.raw or i not in _changed_by_centring(problem, data):
        return problem, theta_k
    return _on_the_columns_themselves(problem, data), _moved(problem, data, theta_k[None])[0]


def _fixed_values(law: Law, arms: Sequence[str], fixed: Mapping[str, float]) -> dict[str, np.ndarray]:
    """NaN where a parameter is free."""
    values = {p.name: np.full(len(arms), np.nan) for p in law.parameters}
    known = {p.name: (p, range(len(arms))) for p in law.parameters}
    known |= {f"{p.name}[{arm}]": (p, [index]) for p in law.parameters if p.per_arm for index, arm in enumerate(arms)}
    for name, value in fixed.items():
        if name not in known:
            raise ValueError(f"fixed: {name!r} is not a parameter: {nearest(name, known)}use one of {', '.join(known)}")
        p, where = known[name]
        if not np.isfinite(value) or (p.positive and value <= 0):
            raise ValueError(f"fixed: {name} = {value!r}: use a {'positive ' if p.positive else ''}finite number")
        for index in where:
            values[p.name][index] = value
    return values


def _owner(problem: Problem) -> list[int]:
    """The law's parameter (the first) that reads each free one."""
    return [next(i for i, slot in enumerate(problem.slots) if u in slot) for u in range(problem.k)]


def free_names(problem: Problem, arms: tuple[str, ...]) -> tuple[str, ...]:
    names = []
    for u, i in enumerate(_owner(problem)):
        slot, p = problem.slots[i], problem.law.parameters[i]
        names.append(f"{p.name}[{arms[slot.index(u)]}]" if p.per_arm and arms else p.name)
    return tuple(names)


def _local(problem: Problem, theta_mk: np.ndarray) -> dict[str, np.ndarray]:
    """Every parameter of the law in every arm: arrays (m, arms)."""
    values = {}
    for i, p in enumerate(problem.law.parameters):
        columns = [
            theta_mk[:, u] if u >= 0 else np.full(len(theta_mk), problem.constants[i, a])
            for a, u in enumerate(problem.slots[i])
        ]
        stacked = np.stack(columns, axis=1)
        values[p.name] = np.exp(stacked) if p.positive else stacked
    return values


def _natural(law: Law, local: Mapping[str, np.ndarray], centre: Values) -> dict[str, np.ndarray]:
    if law.natural is None:
        return dict(local)
    with float64_on_cpu():
        return {name: np.asarray(value, float) for name, value in law.natural(local, centre).items()}


def natural_params(problem: Problem, data: Data, theta_mk: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters in the columns' own units: shape (m,), or (m, arms)."""
    local = _local(problem, theta_mk)
    if problem.columns is data.centred:
        local = _natural(problem.law, local, data.centre)
    return {p.name: local[p.name] if p.per_arm else local[p.name][:, 0] for p in problem.law.parameters}


def _probe(problem: Problem, data: Data) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    theta = random_internal(problem.law, problem, 3, 0)
    local = _local(problem, theta)
    return local, _natural(problem.law, local, data.centre)


def _changed_by_centring(problem: Problem, data: Data) -> list[int]:
    before, after = _probe(problem, data)
    names = [p.name for p in problem.law.parameters]
    return [i for i, name in enumerate(names) if not np.allclose(before[name], after[name], rtol=1e-9, atol=0)]


def _survives_centring(problem: Problem, data: Data) -> bool:
    """Whether what is fixed, tied or shared is so in natural parameters too."""
    _, after = _probe(problem, data)
    changed = set(_changed_by_centring(problem, data))
    read: dict[int, np.ndarray] = {}
    for i, (p, slot) in enumerate(zip(problem.law.parameters, problem.slots, strict=True)):
        for a, u in enumerate(slot):
            if u < 0 and i in changed:
                return False
            value = after[p.name][:, a]
            if u >= 0 and not np.allclose(read.setdefault(u, value), value, rtol=1e-9, atol=0):
                return False
    return True


def random_internal(law: Law, problem: Problem, starts: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = []
    for i in _owner(problem):
        p: Parameter = law.parameters[i]
        low, high = np.log(p.start) if p.positive else p.start
        columns.append(rng.uniform(low, high, starts))
    return np.stack(columns, axis=1)


def random_starts(problem: Problem, data: Data, starts: int, seed: int) -> np.ndarray:
    """Drawn where columns are centred; moved to the columns themselves where the fit is on those."""
    theta_mk = random_internal(problem.law, problem, starts, seed)
    if problem.columns is data.centred or problem.law.natural is None:
        return theta_mk
    return _moved(problem, data, theta_mk)


def _moved(problem: Problem, data: Data, theta_mk: np.ndarray) -> np.ndarray:
    """Free parameters of centred columns as those of the columns themselves."""
    moved = _natural(problem.law, _local(problem, theta_mk), data.centre)
    internal = {p.name: np.log(moved[p.name]) if p.positive else moved[p.name] for p in problem.law.parameters}
    out = np.zeros_like(theta_mk)
    for u in range(problem.k):
        readers = [
            internal[p.name][:, a]
            for p, slot in zip(problem.law.parameters, problem.slots, strict=True)
            for a, reads in enumerate(slot)
            if reads == u
        ]
        out[:, u] = np.mean(readers, axis=0)
    return out
