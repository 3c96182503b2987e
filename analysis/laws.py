"""Scaling laws: loss as a function of size, data and compute.

A law is one function `loss = predict(p, x)` of named parameters `p` and named columns `x`, in jax.numpy, and the ranges
of its parameters. Adding one is one function in formulas.py and one entry in `LAWS` below. `fit_law` also takes a Law
that is in no dict:

    def shifted(p, x):
        return p["E"] + p["A"] * jnp.exp(-p["gamma"] * jnp.log(x["C"] + p["C0"]))
    ranges = {"E": (0.5, 4.0), "A": (0.1, 1e4), "gamma": (0.02, 1.0), "C0": (1e-2, 1e3)}
    parameters = tuple(Parameter(name=name, start=start) for name, start in ranges.items())
    law = Law(name="shifted", formula="", source="", predict=shifted, columns=("C",), parameters=parameters)

Letters: N parameters, D tokens, C FLOPs, L loss in nats per target token, E the loss that no size or data removes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from analysis import formulas
from analysis.formulas import Values


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


# --- ranges: they hold where columns have geometric mean 1 ------------------------------------------------------------

_E = Parameter(name="E", start=(0.2, 4.0), bounds=(1e-4, 1e3), unit="nats")


def _amplitude(name: str, unit: str, *, start: tuple[float, float] = (0.02, 3.0), per_arm: bool = False) -> Parameter:
    return Parameter(name=name, start=start, bounds=(1e-8, 1e6), unit=unit, per_arm=per_arm)


def _exponent(name: str, start: tuple[float, float] = (0.1, 1.0)) -> Parameter:
    return Parameter(name=name, start=start, bounds=(1e-3, 5.0), unit="1")


def _signed(name: str, start: tuple[float, float], bounds: tuple[float, float] = (-10.0, 10.0)) -> Parameter:
    return Parameter(name=name, start=start, bounds=bounds, positive=False, unit="1")


_A, _B = _amplitude("A", "nats N^alpha"), _amplitude("B", "nats D^beta")
_EXPONENTS = (_exponent("alpha"), _exponent("beta"))


def _bnsl(breaks: int) -> Law:
    """C is any scale: compute, data or size. Each break bends the slope by c_i at d_i over a width of f_i."""
    parameters = [_E, _amplitude("A", "nats C^c0"), _signed("c0", (0.0, 0.8))]
    for i in range(1, breaks + 1):
        parameters += [
            _signed(f"c{i}", (-0.5, 0.8)),
            Parameter(name=f"d{i}", start=(1e-2, 1e2), bounds=(1e-12, 1e12), unit="C"),
            Parameter(name=f"f{i}", start=(0.1, 1.0), bounds=(1e-2, 10.0), unit="1"),
        ]
    return Law(
        name=f"bnsl_{breaks}",
        formula="L = E + A C^-c0 prod_i (1 + (C/d_i)^(1/f_i))^(-c_i f_i), i = 1.." + str(breaks),
        source="Caballero et al. 2022, arXiv:2210.14891, equation 1",
        predict=formulas.broken(breaks),
        natural=formulas.natural_broken,
        columns=("C",),
        parameters=tuple(parameters),
        distinct=(("C", 5 + 3 * breaks),),
    )


def _optimum(name: str, symbol: str, source: str, *, unit: str, start: tuple[float, float], **powers: str) -> Law:
    """A rule for a hyperparameter: the column that is fitted is the optimum that was found, given as `loss=`."""
    return Law(
        name=name,
        formula=f"{symbol} = c " + " ".join(f"{column}^{power}" for column, power in powers.items()),
        source=source,
        predict=formulas.product(powers),
        natural=formulas.natural_product(powers),
        columns=tuple(powers),
        parameters=(
            Parameter(name="c", start=start, bounds=(1e-30, 1e30), unit=f"{unit} per power of the columns"),
            *(_signed(power, (-1.0, 1.0)) for power in powers.values()),
        ),
        distinct=tuple((column, 3) for column in powers),
    )


_RATE: dict[str, Any] = {"symbol": "eta", "unit": "learning rate", "start": (1e-5, 1e-1)}
_BATCH: dict[str, Any] = {"symbol": "B", "unit": "tokens (or sequences)", "start": (1e1, 1e7)}
_PORIAN = "Porian et al. 2024, arXiv:2406.19146"
_STEP = "Li et al. 2025 (Step Law), arXiv:2503.04715"
_DEEPSEEK = "DeepSeek-AI 2024, arXiv:2401.02954"

LAWS: dict[str, Law] = {
    "power_law": Law(
        name="power_law",
        formula="L = A C^-gamma",
        source="Kaplan et al. 2020, arXiv:2001.08361, equation 1.3",
        predict=formulas.power_law,
        natural=formulas.NATURAL_IN_C,
        columns=("C",),
        parameters=(_amplitude("A", "nats C^gamma"), _exponent("gamma")),
        distinct=(("C", 3),),
    ),
    # Three parameters through fewer than five budgets leave no freedom to see that the law is wrong.
    "power_law_with_asymptote": Law(
        name="power_law_with_asymptote",
        formula="L = E + A C^-gamma",
        source="Henighan et al. 2020, arXiv:2010.14701, equation 1.1",
        predict=formulas.power_law_with_asymptote,
        natural=formulas.NATURAL_IN_C,
        columns=("C",),
        parameters=(_E, _amplitude("A", "nats C^gamma"), _exponent("gamma")),
        distinct=(("C", 5),),
    ),
    "kaplan": Law(
        name="kaplan",
        formula="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
        source="Kaplan et al. 2020, arXiv:2001.08361, equation 1.5",
        predict=formulas.kaplan,
        natural=formulas.natural_kaplan,
        columns=("N", "D"),
        parameters=(
            Parameter(name="N_c", start=(1.0, 1e6), bounds=(1e-30, 1e60), unit="N"),
            Parameter(name="D_c", start=(1.0, 1e6), bounds=(1e-30, 1e60), unit="D"),
            _exponent("alpha_N", (0.05, 0.5)),
            _exponent("alpha_D", (0.05, 0.5)),
        ),
        distinct=(("N", 3), ("D", 3)),
    ),
    "chinchilla": Law(
        name="chinchilla",
        formula="L = E + A N^-alpha + B D^-beta",
        source="Hoffmann et al. 2022, arXiv:2203.15556, equation 2",
        predict=formulas.chinchilla,
        natural=formulas.NATURAL_IN_N_AND_D,
        columns=("N", "D"),
        parameters=(_E, _A, _B, *_EXPONENTS),
        distinct=(("N", 3), ("D", 3)),
    ),
    "chinchilla_tied": Law(
        name="chinchilla_tied",
        formula="L = E + A N^-alpha + B D^-alpha",
        source="Hoffmann et al. 2022, arXiv:2203.15556, with one exponent; Muennighoff et al. 2023, arXiv:2305.16264",
        predict=formulas.chinchilla_tied,
        natural=formulas.natural_powers({"A": {"N": "alpha"}, "B": {"D": "alpha"}}),
        columns=("N", "D"),
        parameters=(_E, _A, _amplitude("B", "nats D^alpha"), _exponent("alpha")),
        distinct=(("N", 3), ("D", 3)),
    ),
    "chinchilla_gamma": Law(
        name="chinchilla_gamma",
        formula="L = E + (A N^-alpha + B D^-beta)^gamma",
        source="Kaplan et al. 2020, equation 1.5, with free exponents and the asymptote of Hoffmann et al. 2022",
        predict=formulas.chinchilla_gamma,
        natural=formulas.NATURAL_IN_N_AND_D,
        columns=("N", "D"),
        parameters=(
            _E,
            _amplitude("A", "nats^(1/gamma) N^alpha"),
            _amplitude("B", "nats^(1/gamma) D^beta"),
            *_EXPONENTS,
            _exponent("gamma", (0.3, 2.0)),
        ),
        distinct=(("N", 3), ("D", 3)),
    ),
    # Arms that differ in E or the exponents too are fitted by separate calls; small grids can not tell those apart.
    "chinchilla_by_arm": Law(
        name="chinchilla_by_arm",
        formula="L = E + A[arm] N^-alpha + B[arm] D^-beta",
        source="Hoffmann et al. 2022 with E, alpha, beta shared by the arms; compare Clark et al. 2022, arXiv:2202.01169",
        predict=formulas.chinchilla,
        natural=formulas.NATURAL_IN_N_AND_D,
        columns=("N", "D"),
        parameters=(
            _E,
            _amplitude("A", "nats N^alpha", per_arm=True),
            _amplitude("B", "nats D^beta", per_arm=True),
            *_EXPONENTS,
        ),
        distinct=(("N", 3), ("D", 3)),
    ),
    # The same law told as how many times over an arm's parameters and tokens count. Fix both multipliers of one arm:
    # fixed={"rho_N[base]": 1.0, "rho_D[base]": 1.0}.
    "chinchilla_multipliers": Law(
        name="chinchilla_multipliers",
        formula="L = E + A (rho_N[arm] N)^-alpha + B (rho_D[arm] D)^-beta",
        source="Hoffmann et al. 2022 with effective sizes; compare Clark et al. 2022, arXiv:2202.01169",
        predict=formulas.chinchilla_multipliers,
        natural=formulas.NATURAL_IN_N_AND_D,
        columns=("N", "D"),
        parameters=(
            _E,
            _A,
            _B,
            *_EXPONENTS,
            Parameter(name="rho_N", start=(0.3, 3.0), bounds=(1e-6, 1e6), per_arm=True, unit="1"),
            Parameter(name="rho_D", start=(0.3, 3.0), bounds=(1e-6, 1e6), per_arm=True, unit="1"),
        ),
        distinct=(("N", 3), ("D", 3)),
    ),
    # D and U are compared with each other, so columns are used as they are: both in one unit.
    "data_constrained": Law(
        name="data_constrained",
        formula="L = E + A N'^-alpha + B D'^-beta, D' = U (1 + R_D (1 - exp(-(D/U - 1)/R_D))), N' likewise from U_N and R_N",
        source="Muennighoff et al. 2023, arXiv:2305.16264",
        predict=formulas.data_constrained,
        columns=("N", "D", "U"),
        parameters=(
            _E,
            Parameter(name="A", start=(1e1, 1e4), bounds=(1e-12, 1e12), unit="nats N^alpha"),
            Parameter(name="B", start=(1e1, 1e4), bounds=(1e-12, 1e12), unit="nats D^beta"),
            _exponent("alpha", (0.2, 0.6)),
            _exponent("beta", (0.2, 0.6)),
            Parameter(name="R_D", start=(1.0, 50.0), bounds=(1e-3, 1e6), unit="repetitions"),
            Parameter(name="R_N", start=(1.0, 50.0), bounds=(1e-3, 1e6), unit="repetitions"),
        ),
        distinct=(("N", 3), ("D", 3), ("U", 2)),
    ),
    "bnsl_1": _bnsl(1),
    "bnsl_2": _bnsl(2),
    "width_depth": Law(
        name="width_depth",
        formula="L = E + A width^-alpha + B depth^-beta + F D^-gamma",
        source="McLeish et al. 2025 (Gemstones), arXiv:2502.06857",
        predict=formulas.width_depth,
        natural=formulas.natural_powers({"A": {"width": "alpha"}, "B": {"depth": "beta"}, "F": {"D": "gamma"}}),
        columns=("width", "depth", "D"),
        parameters=(
            _E,
            _amplitude("A", "nats width^alpha"),
            _amplitude("B", "nats depth^beta"),
            _amplitude("F", "nats D^gamma"),
            *_EXPONENTS,
            _exponent("gamma"),
        ),
        distinct=(("width", 3), ("depth", 3), ("D", 3)),
    ),
    "encoder_decoder": Law(
        name="encoder_decoder",
        formula="L = E + A N_e^-p_e N_d^-p_d",
        source="Ghorbani et al. 2021, arXiv:2109.07740",
        predict=formulas.encoder_decoder,
        natural=formulas.natural_powers({"A": {"N_e": "p_e", "N_d": "p_d"}}),
        columns=("N_e", "N_d"),
        parameters=(_E, _amplitude("A", "nats N_e^p_e N_d^p_d"), _exponent("p_e"), _exponent("p_d")),
        distinct=(("N_e", 3), ("N_d", 3)),
    ),
    # The paper's 1/X = 1/(experts - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max, told by shift = 1/(1/E_start - 1/E_max) - 1:
    # that stays defined for every positive value. A dense model has experts = 1 and X = E_start.
    "routed": Law(
        name="routed",
        formula="log10 L = a log10 N + b log10 X + c log10 N log10 X + d, 1/X = 1/(experts + shift) + 1/E_max",
        source="Clark et al. 2022, arXiv:2202.01169, equation 1",
        predict=formulas.routed,
        natural=formulas.natural_routed,
        columns=("N", "experts"),
        parameters=(
            _signed("a", (-0.3, 0.0)),
            _signed("b", (-0.3, 0.0)),
            _signed("c", (-0.05, 0.05)),
            _signed("d", (-0.3, 1.2)),
            Parameter(name="shift", start=(1e-3, 1.0), bounds=(1e-9, 1e9), unit="experts"),
            Parameter(name="E_max", start=(1.0, 1e3), bounds=(1e-3, 1e9), unit="experts"),
        ),
        distinct=(("N", 3), ("experts", 4)),
    ),
    # The power of D is different at every N, so no unit of D can be taken out: columns are used as they are.
    "farseer": Law(
        name="farseer",
        formula="L = exp(g3) + exp(g2) D^-exp(g1), g1 = b1 + a1 ((N/1e9)^alpha - 1)/alpha, g2 with beta, g3 with gamma",
        source="Li et al. 2025 (Farseer), arXiv:2506.10972",
        predict=formulas.farseer,
        columns=("N", "D"),
        parameters=(
            _signed("a1", (-0.3, 0.3)),
            _signed("b1", (-1.8, -0.4)),
            _signed("alpha", (-0.5, 0.5)),
            _signed("a2", (-1.0, 1.0)),
            _signed("b2", (1.0, 10.0), (-40.0, 40.0)),
            _signed("beta", (-0.5, 0.5)),
            _signed("a3", (-0.3, 0.0)),
            _signed("b3", (-1.0, 1.5)),
            _signed("gamma", (-0.5, 0.5)),
        ),
        distinct=(("N", 4), ("D", 3)),
    ),
    "learning_rate_porian": _optimum("learning_rate_porian", source=_PORIAN, **_RATE, N="p_N"),
    "learning_rate_step": _optimum("learning_rate_step", source=_STEP, **_RATE, N="p_N", D="p_D"),
    "learning_rate_deepseek": _optimum("learning_rate_deepseek", source=_DEEPSEEK, **_RATE, C="p_C"),
    "batch_size_porian": _optimum("batch_size_porian", source=_PORIAN, **_BATCH, N="p_N"),
    "batch_size_step": _optimum("batch_size_step", source=_STEP, **_BATCH, D="p_D"),
    "batch_size_deepseek": _optimum("batch_size_deepseek", source=_DEEPSEEK, **_BATCH, C="p_C"),
}


def flops_6nd(N: float, D: float) -> float:
    """6 N D as a float: the product of two realistic integers does not fit in 64 bits."""
    return 6.0 * float(N) * float(D)
