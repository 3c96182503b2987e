"""The functions of the laws in laws.py: loss from parameters `p` and columns `x`, and what centring does to parameters.

They are written with exp and log: a law is differentiated twice, and exp(-a log x) is twice as fast as pow. Letters: N
parameters, D tokens, U distinct tokens, C FLOPs, E the loss that nothing removes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Values = Mapping[str, Any]

_LOG_BILLION = 20.72326583694641


def _decay(A: Any, x: Any, exponent: Any) -> Any:
    return A * jnp.exp(-exponent * jnp.log(x))


def power_law(p: Values, x: Values) -> Any:
    return _decay(p["A"], x["C"], p["gamma"])


def power_law_with_asymptote(p: Values, x: Values) -> Any:
    return p["E"] + _decay(p["A"], x["C"], p["gamma"])


def kaplan(p: Values, x: Values) -> Any:
    size = p["alpha_N"] / p["alpha_D"] * (jnp.log(p["N_c"]) - jnp.log(x["N"]))
    data = jnp.log(p["D_c"]) - jnp.log(x["D"])
    return jnp.exp(p["alpha_D"] * jnp.logaddexp(size, data))


def chinchilla(p: Values, x: Values) -> Any:
    return p["E"] + _decay(p["A"], x["N"], p["alpha"]) + _decay(p["B"], x["D"], p["beta"])


def chinchilla_tied(p: Values, x: Values) -> Any:
    return p["E"] + _decay(p["A"], x["N"], p["alpha"]) + _decay(p["B"], x["D"], p["alpha"])


def chinchilla_gamma(p: Values, x: Values) -> Any:
    size = jnp.log(p["A"]) - p["alpha"] * jnp.log(x["N"])
    data = jnp.log(p["B"]) - p["beta"] * jnp.log(x["D"])
    return p["E"] + jnp.exp(p["gamma"] * jnp.logaddexp(size, data))


def chinchilla_multipliers(p: Values, x: Values) -> Any:
    return chinchilla(p, {"N": p["rho_N"] * x["N"], "D": p["rho_D"] * x["D"]})


def _saturating(unique: Any, total: Any, half_life: Any) -> Any:
    """What `total` is worth where all beyond `unique` repeats it: R repetitions count as R*(1 - exp(-R/R*))."""
    repeats = jnp.maximum(total / unique - 1, 0.0)
    return unique * (1 - half_life * jnp.expm1(-repeats / half_life))


def data_constrained(p: Values, x: Values) -> Any:
    unique = jnp.minimum(x["U"], x["D"])
    # U_N is the size that is compute-optimal for U tokens: there alpha A U_N^-alpha = beta B U^-beta.
    log_optimal = jnp.log(p["alpha"] * p["A"]) - jnp.log(p["beta"] * p["B"]) + p["beta"] * jnp.log(unique)
    matched = jnp.minimum(x["N"], jnp.exp(log_optimal / p["alpha"]))
    return chinchilla(p, {"N": _saturating(matched, x["N"], p["R_N"]), "D": _saturating(unique, x["D"], p["R_D"])})


def broken(breaks: int) -> Callable[[Values, Values], Any]:
    def predict(p: Values, x: Values) -> Any:
        log_x = jnp.log(x["C"])
        log_power = jnp.log(p["A"]) - p["c0"] * log_x
        for i in range(1, breaks + 1):
            width = p[f"f{i}"]
            log_power -= p[f"c{i}"] * width * jax.nn.softplus((log_x - jnp.log(p[f"d{i}"])) / width)
        return p["E"] + jnp.exp(log_power)

    return predict


def width_depth(p: Values, x: Values) -> Any:
    shape = _decay(p["A"], x["width"], p["alpha"]) + _decay(p["B"], x["depth"], p["beta"])
    return p["E"] + shape + _decay(p["F"], x["D"], p["gamma"])


def encoder_decoder(p: Values, x: Values) -> Any:
    return p["E"] + jnp.exp(jnp.log(p["A"]) - p["p_e"] * jnp.log(x["N_e"]) - p["p_d"] * jnp.log(x["N_d"]))


def routed(p: Values, x: Values) -> Any:
    n = jnp.log10(x["N"])
    experts = -jnp.log10(1 / (x["experts"] + p["shift"]) + 1 / p["E_max"])
    return 10.0 ** (p["a"] * n + p["b"] * experts + p["c"] * n * experts + p["d"])


def farseer(p: Values, x: Values) -> Any:
    log_N, log_D = jnp.log(x["N"]) - _LOG_BILLION, jnp.log(x["D"])

    def stretched(i: int, exponent: Any) -> Any:
        """The paper's a N^alpha + b, as the value b and the slope a at N = 1e9: those are determined by data."""
        return p[f"b{i}"] + p[f"a{i}"] * jnp.expm1(exponent * log_N) / exponent

    slope = jnp.exp(stretched(1, p["alpha"]))
    return jnp.exp(stretched(3, p["gamma"])) + jnp.exp(stretched(2, p["beta"]) - slope * log_D)


def product(powers: dict[str, str]) -> Callable[[Values, Values], Any]:
    def predict(p: Values, x: Values) -> Any:
        return jnp.exp(jnp.log(p["c"]) + sum(p[name] * jnp.log(x[column]) for column, name in powers.items()))

    return predict


# --- how parameters change with the unit of a column ------------------------------------------------------------------


def natural_powers(amplitudes: dict[str, dict[str, str]]) -> Callable[[Values, Values], Values]:
    """`natural` of a law whose amplitudes multiply powers: {"A": {"N": "alpha"}} is A N^-alpha."""

    def natural(p: Values, centre: Values) -> Values:
        grown = {
            name: jnp.exp(jnp.log(p[name]) + sum(p[power] * jnp.log(centre[column]) for column, power in by.items()))
            for name, by in amplitudes.items()
        }
        return {**p, **grown}

    return natural


NATURAL_IN_C = natural_powers({"A": {"C": "gamma"}})
NATURAL_IN_N_AND_D = natural_powers({"A": {"N": "alpha"}, "B": {"D": "beta"}})


def natural_kaplan(p: Values, centre: Values) -> Values:
    return {**p, "N_c": p["N_c"] * centre["N"], "D_c": p["D_c"] * centre["D"]}


def natural_broken(p: Values, centre: Values) -> Values:
    breaks = {name: p[name] * centre["C"] for name in p if name.startswith("d")}
    return {**p, **breaks, "A": p["A"] * centre["C"] ** p["c0"]}


def natural_routed(p: Values, centre: Values) -> Values:
    n, experts = jnp.log10(centre["N"]), jnp.log10(centre["experts"])
    return {
        **p,
        "a": p["a"] - p["c"] * experts,
        "b": p["b"] - p["c"] * n,
        "d": p["d"] - p["a"] * n - p["b"] * experts + p["c"] * n * experts,
        "shift": p["shift"] * centre["experts"],
        "E_max": p["E_max"] * centre["experts"],
    }


def natural_product(powers: dict[str, str]) -> Callable[[Values, Values], Values]:
    def natural(p: Values, centre: Values) -> Values:
        return {**p, "c": p["c"] / jnp.exp(sum(p[name] * jnp.log(centre[column]) for column, name in powers.items()))}

    return natural
