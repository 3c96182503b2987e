"""Scaling laws: loss as a function of size, data and compute.

A law is one function `loss = predict(p, x)` of named parameters `p` and named columns `x`, in jax.numpy, and the ranges
of its parameters. Adding one is one `Law(...)` and one entry in `LAWS`; `fit_law` also takes a Law that is in no dict:

    def shifted(p, x):
        return p["E"] + p["A"] * (x["C"] + p["C0"]) ** -p["gamma"]

    law = Law(
        name="shifted", formula="E + A (C + C0)^-gamma", source="mine", predict=shifted, columns=("C",),
        parameters=(Parameter(name="E", start=(0.5, 4.0)), ...),
    )

Letters: N parameters, D tokens, C FLOPs, L loss in nats per target token, E the loss that no size or data removes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """`start` is where random starts are drawn, `bounds` what the fit may not leave; a fit that ends on a bound says
    so.

    A positive parameter is fitted as its logarithm and its starts are log-uniform. `per_arm` gives every arm of a table
    its own value; a law's function does not know of arms, it is given the value of the row's arm. Ranges hold where
    columns are centred (`Law.natural`), that is for a column of geometric mean 1.
    """

    name: str
    start: tuple[float, float]
    bounds: tuple[float, float] = (1e-12, 1e12)
    positive: bool = True
    per_arm: bool = False
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Law:
    """`predict(p, x)` is the loss at one row: `p` holds a number for each parameter, `x` one for each column.

    `natural(p, centre)` turns parameters fitted on columns that were divided by their geometric means `centre` into
    those of the columns themselves; with it a fit is well conditioned and the same in any unit. Without it columns are
    used as they are. Both may be given arrays that broadcast against each other.
    """

    name: str
    formula: str
    source: str
    predict: Callable[[Values, Values], Any]
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    natural: Callable[[Values, Values], Values] | None = None
    # Distinct values that a column must have before the law can be told from another.
    distinct: tuple[tuple[str, int], ...] = ()

    @property
    def by_arm(self) -> bool:
        return any(parameter.per_arm for parameter in self.parameters)


def by_arm(law: Law, *names: str) -> Law:
    """The law with a value of its own for every arm of the named parameters, or of all where none is named."""
    known = [parameter.name for parameter in law.parameters]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"parameter {unknown[0]!r} is not one of {law.name}: use {', '.join(known)}")
    chosen = set(names or known)
    return replace(law, parameters=tuple(replace(p, per_arm=p.per_arm or p.name in chosen) for p in law.parameters))


def _decay(A: Any, x: Any, exponent: Any) -> Any:
    """A x^-exponent; in a bootstrap exp(log) is twice as fast as pow."""
    return A * jnp.exp(-exponent * jnp.log(x))


def _power_law(p: Values, x: Values) -> Any:
    return _decay(p["A"], x["C"], p["gamma"])


def _power_law_with_asymptote(p: Values, x: Values) -> Any:
    return p["E"] + _decay(p["A"], x["C"], p["gamma"])


def _chinchilla(p: Values, x: Values) -> Any:
    return p["E"] + _decay(p["A"], x["N"], p["alpha"]) + _decay(p["B"], x["D"], p["beta"])


def _natural_in_C(p: Values, centre: Values) -> Values:
    return {**p, "A": p["A"] * centre["C"] ** p["gamma"]}


def _natural_in_N_and_D(p: Values, centre: Values) -> Values:
    return {**p, "A": p["A"] * centre["N"] ** p["alpha"], "B": p["B"] * centre["D"] ** p["beta"]}


_E = Parameter(name="E", start=(0.2, 4.0), bounds=(1e-4, 1e3))
_AMPLITUDE, _EXPONENT = (0.02, 3.0), (0.1, 1.0)
_EXPONENT_BOUNDS = (1e-3, 5.0)


def _amplitude(name: str, *, per_arm: bool = False) -> Parameter:
    return Parameter(name=name, start=_AMPLITUDE, bounds=(1e-8, 1e6), per_arm=per_arm)


def _exponent(name: str) -> Parameter:
    return Parameter(name=name, start=_EXPONENT, bounds=_EXPONENT_BOUNDS)


LAWS: dict[str, Law] = {
    "power_law": Law(
        name="power_law",
        formula="L = A C^-gamma",
        source="Kaplan et al. 2020, arXiv:2001.08361, equation 1.3",
        predict=_power_law,
        natural=_natural_in_C,
        columns=("C",),
        parameters=(_amplitude("A"), _exponent("gamma")),
        distinct=(("C", 3),),
    ),
    # Three parameters through fewer than five budgets leave no freedom to see that the law is wrong.
    "power_law_with_asymptote": Law(
        name="power_law_with_asymptote",
        formula="L = E + A C^-gamma",
        source="Henighan et al. 2020, arXiv:2010.14701, equation 1.1",
        predict=_power_law_with_asymptote,
        natural=_natural_in_C,
        columns=("C",),
        parameters=(_E, _amplitude("A"), _exponent("gamma")),
        distinct=(("C", 5),),
    ),
    "chinchilla": Law(
        name="chinchilla",
        formula="L = E + A N^-alpha + B D^-beta",
        source="Hoffmann et al. 2022, arXiv:2203.15556, equation 2",
        predict=_chinchilla,
        natural=_natural_in_N_and_D,
        columns=("N", "D"),
        parameters=(_E, _amplitude("A"), _amplitude("B"), _exponent("alpha"), _exponent("beta")),
        distinct=(("N", 3), ("D", 3)),
    ),
    # Arms that differ in E or the exponents too are fitted by separate calls; small grids can not tell those apart.
    "chinchilla_by_arm": Law(
        name="chinchilla_by_arm",
        formula="L = E + A[arm] N^-alpha + B[arm] D^-beta",
        source="Hoffmann et al. 2022 with E, alpha, beta shared by the arms; compare Clark et al. 2022, arXiv:2202.01169",
        predict=_chinchilla,
        natural=_natural_in_N_and_D,
        columns=("N", "D"),
        parameters=(
            _E,
            _amplitude("A", per_arm=True),
            _amplitude("B", per_arm=True),
            _exponent("alpha"),
            _exponent("beta"),
        ),
        distinct=(("N", 3), ("D", 3)),
    ),
}


def flops_6nd(N: float, D: float) -> float:
    """6 N D as a float: the product of two realistic integers does not fit in 64 bits."""
    return 6.0 * float(N) * float(D)
